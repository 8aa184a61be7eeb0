"""Writing VFAT media: what goes in comes out, equal input gives equal bytes, bad names are refused.

`imagekit.contents.fat` reads them back here, which shares no code with the writer; other programs do in
``test_against_vfat_readers``.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekit.cloudinit.medium import DEFAULT_TIMESTAMP
from imagekit.cloudinit.vfat import MIN_VOLUME, PARTITION_START, write_vfat
from imagekit.contents.drives import Volume, read_volumes
from imagekit.contents.partitions import partitions
from imagekit.errors import UsageError
from imagekit.formats.base import MiB
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from tests.test_cloudinit_iso import CONTENTS, trees

DRIVE = {
    "openstack/2018-08-27/meta_data.json": b'{"uuid": "x"}',
    "openstack/latest/meta_data.json": b'{"uuid": "x"}',
    "openstack/latest/user_data": b"#!/bin/sh\n" + bytes(5000),
}


def opened(medium: bytes) -> RawImage:
    return RawImage(MemoryFile(medium), len(medium))


def read(medium: bytes) -> Volume:
    (volume,) = read_volumes(opened(medium))
    return volume


def sectors(volume: bytes) -> tuple[int, int]:
    """(bits of its FAT, clusters), worked out as the specification says."""
    _, per_cluster, reserved, fats, root_entries, small, _, fat_size = struct.unpack_from("<HBHBHHBH", volume, 11)
    (large,) = struct.unpack_from("<I", volume, 32)
    clusters = ((small or large) - reserved - fats * fat_size - root_entries * 32 // 512) // per_cluster
    return (12 if clusters < 4085 else 16), clusters


@settings(max_examples=40)
@given(trees(), st.booleans())
def test_any_tree_of_legal_names_comes_back(tree: dict[str, bytes], partitioned: bool) -> None:
    legal = {path: content for path, content in tree.items() if not set('"<>|') & set(path)}
    medium = write_vfat(legal, label="config-2", partitioned=partitioned)
    volume = read(medium)
    assert (volume.label, volume.tree) == ("config-2", legal)
    assert volume.partition == (1 if partitioned else None)
    assert write_vfat(dict(reversed(legal.items())), label="config-2", partitioned=partitioned) == medium


@given(st.lists(st.text("aA~1 .é-_+", min_size=1, max_size=14), unique_by=str.casefold, max_size=30), CONTENTS)
def test_no_short_name_is_one_that_another_file_is_called_by(names: list[str], content: bytes) -> None:
    """Windows takes either name for the file; a short one that is another's long one would be two files."""
    legal = [name for name in names if not name.endswith((".", " "))]
    medium = write_vfat(dict.fromkeys(legal, content))
    assert read(medium).tree == dict.fromkeys(legal, content)
    short = short_names(medium)
    assert len(set(short)) == len(short) == len(legal)
    for name in legal:
        assert [one for one in short if one == name.upper()] in ([], [name.upper()])


def short_names(volume: bytes) -> list[str]:
    """Of the root, with a dot; the label is none of them."""
    reserved, fats, entries = struct.unpack_from("<HBH", volume, 14)
    root = (reserved + fats * struct.unpack_from("<H", volume, 22)[0]) * 512
    found = []
    for at in range(root, root + entries * 32, 32):
        if volume[at] and volume[at + 11] not in (0x0F, 0x08):
            base, extension = volume[at : at + 8].decode().rstrip(), volume[at + 8 : at + 11].decode().rstrip()
            found.append(f"{base}.{extension}" if extension else base)
    return found


def test_a_name_of_8_and_3_capitals_needs_no_long_name() -> None:
    medium = write_vfat({"README.TXT": b"x", "README.MD2": b"y", "A": b"z"})
    assert short_names(medium) == ["A", "README.MD2", "README.TXT"]
    assert b"R\0E\0A\0D" not in medium
    assert b"r\0e\0a\0d" in write_vfat({"readme.txt": b"x"})


@pytest.mark.parametrize("size", [0, 1, 2048, 2049, 5 * MiB, 7 * MiB, 8 * MiB, 9 * MiB, 62 * MiB])
def test_the_volume_is_as_large_as_it_has_to_be_and_its_kind_is_beyond_doubt(size: int) -> None:
    """Near 4085 clusters some programs take FAT12 for FAT16."""
    medium = write_vfat({"big": bytes(size)})
    bits, clusters = sectors(medium)
    assert read(medium).details == (f"FAT{bits}",)
    assert not 4085 - 16 <= clusters < 4085 + 16
    assert len(medium) % MiB == 0 and MIN_VOLUME <= len(medium) <= max(MIN_VOLUME, size + 3 * MiB)


def test_the_partition_starts_at_a_mib_and_the_file_system_knows_it() -> None:
    medium = write_vfat(DRIVE, partitioned=True)
    (partition,) = partitions(opened(medium))
    assert (partition.start, partition.start + partition.length) == (PARTITION_START, len(medium))
    (hidden,) = struct.unpack_from("<I", medium, PARTITION_START + 28)
    assert hidden * 512 == PARTITION_START
    whole = bytearray(write_vfat(DRIVE))
    struct.pack_into("<I", whole, 28, hidden)
    assert medium[PARTITION_START:] == bytes(whole)


def test_two_guests_disks_have_ids_of_their_own() -> None:
    """Windows takes a second disk with an id it knows offline."""
    other = {**DRIVE, "openstack/latest/meta_data.json": b'{"uuid": "y"}'}
    ids = [write_vfat(tree, partitioned=True)[440:444] for tree in (DRIVE, other)]
    assert ids[0] != ids[1] and bytes(4) not in ids
    serials = [write_vfat(tree)[39:43] for tree in (DRIVE, other)]
    assert serials[0] != serials[1]


def test_the_same_tree_gives_the_same_bytes_in_every_time_zone_and_process() -> None:
    code = (
        "import hashlib; from imagekit.cloudinit.vfat import write_vfat; "
        f"print(hashlib.sha256(write_vfat({DRIVE!r})).hexdigest())"
    )
    digests = {hashlib.sha256(write_vfat(DRIVE)).hexdigest()}
    for zone, seed in [("Asia/Tokyo", "1"), ("America/St_Johns", "2")]:
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("timestamp", "date", "time"),
    [
        (1535328001, (2018, 8, 27), (0, 0, 0)),
        (1700000000, (2023, 11, 14), (22, 13, 20)),
        (0, (1980, 1, 1), (0, 0, 0)),
        (5_000_000_000, (2107, 12, 31), (23, 59, 58)),
    ],
)
def test_every_date_is_the_timestamp_or_the_nearest_that_fat_knows(
    timestamp: int, date: tuple[int, int, int], time: tuple[int, int, int]
) -> None:
    medium = write_vfat({"A": b""}, timestamp=timestamp)
    at = medium.index(b"A          ")
    stored = struct.unpack_from("<HHH", medium, at + 14) + struct.unpack_from("<HH", medium, at + 22)
    day = (date[0] - 1980) << 9 | date[1] << 5 | date[2]
    second = time[0] << 11 | time[1] << 5 | time[2] // 2
    assert stored == (second, day, day, second, day)


def test_the_timestamp_is_source_date_epoch_where_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_vfat(DRIVE) == write_vfat(DRIVE, timestamp=DEFAULT_TIMESTAMP)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert write_vfat(DRIVE) == write_vfat(DRIVE, timestamp=1700000000) != write_vfat(DRIVE, timestamp=0)


def test_a_timestamp_that_is_no_date_is_refused() -> None:
    with pytest.raises(UsageError, match="expected seconds since 1970"):
        write_vfat(DRIVE, timestamp=10**20)


@pytest.mark.parametrize("name", ["x" * 255, "é" * 255, "a b", "+,;=[]", ".profile", "COM", "console", "n.u.l"])
def test_names_that_are_long_or_odd_are_taken(name: str) -> None:
    assert read(write_vfat({name: b"1"})).tree == {name: b"1"}


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (["x" * 256], "has 256 characters, the most is 255"),
        (["/".join("a" * 33)], "33 levels deep, VFAT allows 32"),
        *(([f"a{sign}b"], "holds a control character or one of") for sign in '"*:<>?\\|\n\x7f'),
        (["\U0001f600"], "UCS-2 cannot express"),
        (["Meta", "meta"], "differ only by case"),
        (["a", "a/b"], "both a file and a folder"),
        (["a."], "ends with a dot or space"),
        *(([name], "is a device of Windows") for name in ("con", "NUL.txt", "Com1", "lpt9.a.b", "x/aux")),
        (["../a"], "relative path"),
        ([""], "relative path"),
    ],
)
def test_a_path_that_some_guest_could_not_read_is_refused(paths: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        write_vfat(dict.fromkeys(paths, b""))


@pytest.mark.parametrize("label", ["", "x" * 12, "config.2", "a/b", "käse", " config-2", "a\nb"])
def test_a_label_that_fat_cannot_hold_is_refused(label: str) -> None:
    with pytest.raises(UsageError, match="label"):
        write_vfat(DRIVE, label=label)


@pytest.mark.parametrize(
    "tree",
    [{"big": bytes(65 << 20)}, {"a": bytes(32 << 20), "b": bytes(32 << 20)}],
)
def test_what_does_not_fit_into_64_mib_is_refused(tree: Mapping[str, bytes]) -> None:
    with pytest.raises(UsageError, match="67108864") as caught:
        write_vfat(tree)
    assert caught.value.hint is not None


def test_a_root_with_more_names_than_usual_has_room_for_them() -> None:
    tree = {f"file number {number} in the root": b"%d" % number for number in range(900)}
    assert read(write_vfat(tree)).tree == tree
