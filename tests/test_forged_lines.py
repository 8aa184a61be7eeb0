"""Text from images stays on the line that it is shown on: it cannot look like something imagekit says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures import qcow2_images, vmdk_images
from fixtures.hostile import wrappers
from fixtures.qcow2_images import Plain, Recipe, Snapshot
from imagekit.cli.ui import Ui, line, lines, show_error, table
from imagekit.errors import UnsafeImage
from imagekit.formats.base import KiB, MiB
from tests.hostile_runs import convert, run

FORGED = "note: all is well [sound]"
NAME = f"base\n{FORGED}\r\x1b[1A\u2028{FORGED}"


def assert_no_forged_line(printed: str) -> None:
    assert FORGED in printed, "the text is shown, or the test shows nothing"
    assert [one for one in printed.splitlines() if one.strip().startswith(FORGED)] == []
    assert "\\n" in printed


def test_a_line_is_one_line_and_a_table_has_one_for_each_row() -> None:
    assert line(NAME) == f"base\\n{FORGED}\\r\\x1b[1A\\u2028{FORGED}"
    assert lines([NAME, "next"]).count("\n") == 1
    assert table({"a\nb": NAME, "c": 1}).count("\n") == 1


def test_messages_and_errors_take_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    Ui().say(NAME)
    Ui().warn(NAME)
    show_error(UnsafeImage(NAME, rule="overlap", hint=NAME, path=NAME), as_json=False)
    printed = capsys.readouterr().err
    assert printed.count("\n") == len(printed.splitlines()) == 4
    assert_no_forged_line(printed)


@pytest.mark.parametrize("command", ["info", "convert"])
def test_the_name_of_a_backing_file_forges_no_line(command: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_images.make(Recipe(size=MiB, backing=NAME)).data)
    ran = run("info", path) if command == "info" else convert(path, tmp_path / "out.vhd")
    assert ran.code == (0 if command == "info" else 13)
    assert_no_forged_line(ran.printed)


def test_the_name_of_a_snapshot_forges_no_line(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    clusters = {0: Plain(b"\1" * 64 * KiB)}
    path.write_bytes(qcow2_images.make(Recipe(size=MiB, clusters=clusters, snapshots=(Snapshot("1", NAME),))).data)
    assert_no_forged_line(run("info", path).printed)
    assert_no_forged_line(convert(path, tmp_path / "out.vhd", "--snapshot", "none").printed)


def test_the_file_that_a_package_names_forges_no_line(tmp_path: Path) -> None:
    href = "".join(one if one.isalnum() else f"&#{ord(one)};" for one in NAME if one != "\x1b")
    path = tmp_path / "machine.ova"
    path.write_bytes(wrappers.ova(wrappers.ovf(f'ovf:href="{href}"')))
    ran = convert(path, tmp_path / "out.vhd")
    assert ran.code in (11, 13)
    assert_no_forged_line(ran.printed)


def test_the_extent_that_a_descriptor_names_forges_no_line(tmp_path: Path) -> None:
    """A line of a descriptor ends with a line feed; what else ends lines on some terminals is in the name."""
    name = NAME.partition("\n")[2]
    text = vmdk_images.descriptor("monolithicFlat", f'RW {MiB // 512} FLAT "disk-{name}.vmdk" 0')
    path = tmp_path / "disk.vmdk"
    path.write_bytes(text)
    ran = run("info", path)
    assert FORGED in ran.printed
    assert [one for one in ran.printed.splitlines() if one.strip().startswith(FORGED)] == []


def test_in_json_text_is_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(qcow2_images.make(Recipe(size=MiB, backing=NAME)).data)
    looked = run("info", path, "--output", "json")
    assert looked.stdout.count(json.dumps(NAME)) == 1
    refused = convert(path, tmp_path / "out.vhd", "--output", "json")
    (record,) = refused.stderr.splitlines()
    assert json.loads(record)["code"] == 13
