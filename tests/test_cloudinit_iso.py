"""Writing ISO 9660 media: what goes in comes out, equal input gives equal bytes, bad names are refused."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.cloudinit import iso9660
from imagekit.cloudinit.iso import DEFAULT_TIMESTAMP, read_iso, verify_iso, write_iso
from imagekit.errors import UsageError, VerificationFailed

DRIVE = {
    "openstack/2018-08-27/meta_data.json": b'{"uuid": "x"}',
    "openstack/latest/meta_data.json": b'{"uuid": "x"}',
    "openstack/latest/user_data": b"#!/bin/sh\n" + bytes(5000),
}


def is_legal(name: str) -> bool:
    devices = {
        "con",
        "prn",
        "aux",
        "nul",
        *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³"),
    }
    return (
        not name.endswith((".", " "))
        and len(name.encode()) <= 64
        and name.split(".")[0].strip(" ").casefold() not in devices
    )


NAMES = st.text(
    st.characters(
        min_codepoint=32, max_codepoint=0xFFFF, exclude_categories=["Cs", "Cc"], exclude_characters="*/:;?\\"
    ),
    min_size=1,
    max_size=64,
).filter(is_legal)
SHORT_NAMES = st.text("aAbB-_.1é", min_size=1, max_size=3).filter(lambda name: not name.endswith("."))
PATHS = st.lists(NAMES | SHORT_NAMES, min_size=1, max_size=8).map("/".join)
CONTENTS = st.binary(max_size=40) | st.sampled_from([b"", b"\0" * 2048, b"x" * 2049, b"y" * 7000])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes]:
    """Trees of legal names: paths that clash with one already there are left out."""
    tree: dict[str, bytes] = {}
    spelling: dict[str, tuple[str, bool]] = {}
    for path in draw(st.lists(PATHS, max_size=12, unique=True)):
        parts = path.split("/")
        nodes = [("/".join(parts[:n]), n < len(parts)) for n in range(1, len(parts) + 1)]
        if all(spelling.get(node[0].casefold(), node) == node for node in nodes):
            spelling.update((node[0].casefold(), node) for node in nodes)
            tree[path] = draw(CONTENTS)
    return tree


@given(trees())
def test_any_tree_of_legal_names_comes_back_through_both_views(tree: dict[str, bytes]) -> None:
    medium = write_iso(tree, label="config-2")
    content = read_iso(medium)
    assert (content.rock_ridge, content.tree, content.joliet) == (True, tree, tree)
    assert (content.label, content.joliet_label) == ("config-2", "config-2")
    assert write_iso(dict(reversed(tree.items())), label="config-2") == medium


def test_the_same_tree_gives_the_same_bytes_in_every_time_zone_and_process() -> None:
    code = (
        "import hashlib; from imagekit.cloudinit.iso import write_iso; "
        f"print(hashlib.sha256(write_iso({DRIVE!r})).hexdigest())"
    )
    digests = {hashlib.sha256(write_iso(DRIVE)).hexdigest()}
    for zone, seed in [("Asia/Tokyo", "1"), ("America/St_Johns", "2"), ("UTC", "3")]:
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed}
        environment.pop("SOURCE_DATE_EPOCH", None)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_every_date_on_the_medium_is_the_timestamp_in_utc() -> None:
    """The seven-byte dates of today's records would show up where the timestamp's are counted."""
    when = datetime(2031, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    medium = write_iso(DRIVE, timestamp=int(when.timestamp()))
    date = struct.pack("<7B", 131, 2, 3, 4, 5, 6, 0)
    for descriptor in iso9660.volume_descriptors(medium):
        dates = [medium[descriptor.offset + field :][:17] for field in (813, 830, 847, 864)]
        assert dates[:2] + dates[3:] == [b"2031020304050600\0"] * 3
        assert dates[2] == b"0" * 16 + b"\0"
        pending = [iso9660.root_record(medium, descriptor)]
        records = list(pending)
        while pending:
            for record in iso9660.folder_records(medium, pending.pop()):
                records.append(record)
                if record.is_folder and record.identifier not in (b"\0", b"\1"):
                    pending.append(record)
        assert {medium[record.offset + 18 :][:7] for record in records} == {date}
        entries = [
            entry
            for record in records
            if not descriptor.joliet
            for entry in iso9660.system_use_entries(medium, record)
            if entry.signature == b"TF"
        ]
        assert descriptor.joliet or len(entries) == len(records) - 1  # the copy of the root has none
        assert {entry.body[1:] for entry in entries} <= {date * 3}


def test_the_timestamp_is_source_date_epoch_where_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_iso(DRIVE) == write_iso(DRIVE, timestamp=DEFAULT_TIMESTAMP)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert write_iso(DRIVE) == write_iso(DRIVE, timestamp=1700000000) != write_iso(DRIVE, timestamp=0)


@pytest.mark.parametrize("value", ["soon", "-1", "99999999999", "1e9", "９"])
def test_a_source_date_epoch_that_is_no_date_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(UsageError, match="expected seconds since 1970"):
        write_iso(DRIVE)


def test_files_of_equal_content_share_their_bytes_on_the_medium() -> None:
    once = write_iso({"a/b": bytes(range(256)) * 400, "a/c": b""})
    twice = write_iso({"a/b": bytes(range(256)) * 400, "a/c": bytes(range(256)) * 400})
    assert len(twice) == len(once)


def test_names_that_iso_9660_would_confuse_stay_apart() -> None:
    tree = {f"{'long-name-' * 5}{n:02}.{extension}": b"%d" % n for n in range(12) for extension in ("a-b", "a_b")}
    tree |= {"meta-data": b"1", "meta_data": b"2", "meta data": b"3", ".x": b"4", "..x": b"5", "x/y": b"6"}
    assert read_iso(write_iso(tree)).tree == tree


def test_a_folder_of_a_thousand_files_comes_back() -> None:
    tree = {f"folder/file-{n}": str(n).encode() for n in range(1000)}
    assert read_iso(write_iso(tree)).tree == tree


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["/etc/motd"], "expected a relative path"),
        (["a//b"], "expected a relative path"),
        (["a/"], "expected a relative path"),
        ([""], "expected a relative path"),
        (["../a"], "expected a relative path"),
        (["a/./b"], "expected a relative path"),
        (["a:b"], "control character or one of"),
        (["a/b*"], "control character or one of"),
        (["a;1"], "control character or one of"),
        (["what?"], "control character or one of"),
        (["a\\b"], "control character or one of"),
        (["a\0"], "control character or one of"),
        (["a\nb"], "control character or one of"),
        (["a\x7f"], "control character or one of"),
        (["a\x85"], "control character or one of"),
        (["\U0001f600"], "UCS-2 cannot express"),
        (["\ud800"], "UCS-2 cannot express"),
        (["a."], "ends with a dot or space"),
        (["a /b"], "ends with a dot or space"),
        (["a" * 65], "has 65 bytes, the most is 64"),
        (["é" * 33], "has 66 bytes, the most is 64"),
        (["a/b/c/d/e/f/g/h/i"], "9 levels deep, ISO 9660 allows 8"),
        (["Readme", "README"], "differ only by case"),
        (["a/x", "A/y"], "differ only by case"),
        (["straße", "STRASSE"], "differ only by case"),
        (["a", "a/b"], "both a file and a folder"),
        (["a/b/c", "a/b"], "both a file and a folder"),
    ],
)
def test_a_path_that_some_guest_could_not_read_is_refused(paths: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        write_iso(dict.fromkeys(paths, b""))


@pytest.mark.parametrize("label", ["", "seventeen letters", "é", "a/b", "a;1", " a", "a ", "a\n", "a*"])
def test_a_label_that_joliet_cannot_hold_is_refused(label: str) -> None:
    with pytest.raises(UsageError, match="label"):
        write_iso(DRIVE, label=label)


@pytest.mark.parametrize("timestamp", [-1, 5869583999 + 1])
def test_a_timestamp_that_iso_9660_cannot_hold_is_refused(timestamp: int) -> None:
    with pytest.raises(UsageError, match="up to the year 2155"):
        write_iso(DRIVE, timestamp=timestamp)


def test_a_changed_byte_of_content_fails_the_verification() -> None:
    medium = write_iso(DRIVE)
    position = medium.index(b"#!/bin/sh")
    damaged = medium[:position] + b"%" + medium[position + 1 :]
    with pytest.raises(VerificationFailed, match="Rock Ridge view differs in openstack/latest/user_data"):
        verify_iso(damaged, DRIVE, "config-2")


def test_a_changed_joliet_name_fails_the_verification() -> None:
    medium = write_iso(DRIVE)
    damaged = medium.replace("user_data".encode("utf-16-be"), "user_date".encode("utf-16-be"))
    with pytest.raises(VerificationFailed, match="Joliet view differs in openstack/latest/user_data"):
        verify_iso(damaged, DRIVE, "config-2")


def test_a_missing_or_additional_file_fails_the_verification() -> None:
    medium = write_iso(DRIVE)
    for tree in ({**DRIVE, "more": b""}, dict(list(DRIVE.items())[:2])):
        with pytest.raises(VerificationFailed, match="view differs in"):
            verify_iso(medium, tree, "config-2")


def test_another_label_fails_the_verification() -> None:
    with pytest.raises(VerificationFailed, match="label reads back as 'cidata', expected 'config-2'"):
        verify_iso(write_iso(DRIVE, label="cidata"), DRIVE, "config-2")


@pytest.mark.parametrize("mark", [b"%/E", b"SP\x07\x01\xbe\xef"], ids=["joliet", "rock-ridge"])
def test_a_medium_without_one_of_its_views_fails_the_verification(mark: bytes) -> None:
    medium = write_iso(DRIVE)
    assert mark in medium
    with pytest.raises(VerificationFailed, match="lacks its Rock Ridge or its Joliet names"):
        verify_iso(medium.replace(mark, bytes(len(mark))), DRIVE, "config-2")


def test_a_medium_cut_short_fails_the_verification() -> None:
    with pytest.raises(VerificationFailed, match="does not read back"):
        verify_iso(write_iso(DRIVE)[:-2048], DRIVE, "config-2")
