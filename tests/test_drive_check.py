"""``configdrive --check``: any medium is read, judged and listed, and nothing secret is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import imagekit
from imagekit.cli.app import run
from imagekit.cloudinit.iso import write_iso
from imagekit.cloudinit.vfat import write_vfat
from imagekit.contents.drive_check import check_drive
from tests.cloudinit_specs import FULL, UUID

SECRET = str(FULL["password"])


def write(tmp_path: Path, tree: dict[str, bytes], label: str, name: str = "medium.iso") -> Path:
    path = tmp_path / name
    path.write_bytes((write_iso if name.endswith("iso") else write_vfat)(tree, label=label))
    return path


@pytest.mark.parametrize("name", ["c.iso", "c.img", "c.vhd", "c.vhdx"])
def test_our_own_drives_are_sound_whatever_they_lie_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    imagekit.build_config_drive(
        {**FULL, "guest": "windows"}, tmp_path / name, media="vfat" if name == "c.img" else "iso"
    )
    assert run(["configdrive", "--check", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    assert "guests can use it" in said and UUID in said and "web1.example" in said
    assert SECRET not in said
    assert run(["configdrive", "--check", str(tmp_path / name), "--output", "json"]) == 0
    text = capsys.readouterr().out
    assert SECRET not in text
    document = json.loads(text)
    assert (document["schema"], document["sound"], document["problems"]) == (1, True, [])
    (volume,) = document["volumes"]
    assert (volume["label"], volume["datasource"]) == ("config-2", "configdrive")
    agents = {one["agent"]: one for one in volume["agents"]}
    assert agents["cloud-init (ConfigDrive)"]["facts"]["instance-id"] == UUID
    assert agents["cloudbase-init (ConfigDrive)"]["facts"]["password"] == "given (not shown)"
    assert [entry["path"] for entry in volume["files"]] == sorted(entry["path"] for entry in volume["files"])


def test_a_medium_that_no_agent_reads_is_refused_with_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, {"openstack/latest/meta_data.json": b'{"uuid": "x"}'}, "my-drive")
    assert run(["configdrive", "--check", str(path)]) == 11
    said = capsys.readouterr().out
    assert "error: no guest agent reads it" in said
    assert "the label is 'my-drive', it looks for config-2 or CONFIG-2" in said
    assert "guests cannot use it" in said


def test_a_drive_for_no_cloud_is_read_too(tmp_path: Path) -> None:
    path = write(tmp_path, {"meta-data": b"instance-id: i-1\n", "user-data": b"#cloud-config\n"}, "CIDATA", "c.img")
    checked = check_drive(path)
    assert checked.sound
    (volume,) = checked.volumes
    assert {seen.agent for seen in volume.seen if seen.found} == {
        "cloud-init (NoCloud)",
        "cloudbase-init (NoCloud)",
    }


def test_an_iso_without_joliet_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"openstack/latest/meta_data.json": b'{"uuid": "x"}'}, "config-2")
    path.write_bytes(path.read_bytes().replace(b"\x02CD001", b"\x00CD001"))
    checked = check_drive(path)
    assert [problem for problem in checked.problems if "Joliet" in problem]


def test_names_from_a_medium_reach_the_terminal_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = b'{"uuid": "x", "hostname": "\\u001b[31mred", "name": "\\u202eevil"}'
    path = write(tmp_path, {"openstack/latest/meta_data.json": meta}, "config-2")
    assert run(["configdrive", "--check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--check", "missing.iso"], 10, "No such file"),
        (["--check", "zeros.img"], 11, "no guest reads metadata"),
        (["--check", "zeros.img", "out.iso"], 2, "leave out one of them"),
        ([], 2, "no name for the medium"),
    ],
)
def test_what_cannot_be_checked_has_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zeros.img").write_bytes(bytes(1 << 20))
    assert run(["configdrive", *arguments]) == code
    assert said.lower() in capsys.readouterr().err.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["zeros.img"]


def test_what_was_read_is_linted_for_the_guest_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty network file leaves a guest without a network; a constant instance id is only unwise."""
    tree = {"meta-data": b"instance-id: iid-local01\n", "user-data": b"#cloud-config\npackages: nginx: 1\n"}
    path = write(tmp_path, tree, "cidata")
    assert run(["configdrive", "--check", str(path)]) == 11
    said = capsys.readouterr().out
    assert "error: user-data, line 2" in said and "[cloud-config-yaml;" in said
    assert "warning: " in said and "[instance-id-constant;" in said
    drive = {"openstack/latest/meta_data.json": b'{"uuid": "x", "public_keys": {"a": "b"}}'}
    path = write(tmp_path, {**drive, "openstack/latest/network_data.json": b"{}"}, "config-2", "empty.iso")
    assert run(["configdrive", "--check", str(path), "--output", "json"]) == 11
    (volume,) = json.loads(capsys.readouterr().out)["volumes"]
    assert "error" in {finding["severity"] for finding in volume["lint"] if "network" in finding["rule"]}


def test_a_drive_is_held_against_the_machine_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wrong MAC address, which stops cloud-init in the guest, is found on the finished medium before it boots."""
    image = tmp_path / "small.raw"
    image.write_bytes(b"boot" * 1024)
    spec = {key: value for key, value in FULL.items() if key != "password"}
    imagekit.prepare(image, tmp_path / "web1", spec=spec, machine={"generation": 1})
    own = tmp_path / "web1" / "web1-config.iso"
    assert run(["configdrive", "--check", str(own), "--machine", str(tmp_path / "web1")]) == 0
    text = json.dumps(spec).replace("02:15:5d:00:00:01", "02:15:5d:00:00:02")
    imagekit.build_config_drive(json.loads(text), tmp_path / "other.iso")
    capsys.readouterr()
    assert run(["configdrive", "--check", str(tmp_path / "other.iso"), "--machine", str(tmp_path / "web1")]) == 11
    assert "02:15:5d:00:00:02" in capsys.readouterr().out


def test_with_strict_a_warning_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, {"meta-data": b"instance-id: iid-local01\n", "user-data": b"#!/bin/sh\n"}, "cidata")
    assert run(["configdrive", "--check", str(path)]) == 0
    assert run(["configdrive", "--check", str(path), "--strict"]) == 11


def test_a_file_too_long_to_be_judged_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, {"meta-data": b"", "user-data": b"#!" + bytes(2 << 20)}, "cidata")
    assert any("too many to be judged" in problem for problem in check_drive(path).problems)
