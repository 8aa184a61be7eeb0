"""A disk gets another id in place: its content and structure stay, every step leaves a disk that opens."""

from __future__ import annotations

import struct
from pathlib import Path
from uuid import UUID

import pytest

import imagekit
from imagekit.errors import UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import Barrier, MiB, Truncate, Write
from imagekit.formats.files import MemoryFile
from tests.disks import content, noise

OLD, NEW = UUID(int=1), UUID("6f9c1d2e-0b1a-4c3d-8e5f-001122334455")
KINDS = [("vhd", "dynamic"), ("vhd", "fixed"), ("vhdx", "dynamic"), ("vhdx", "fixed")]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(3 * MiB) + bytes(2 * MiB))
    return path


def stored_id(path: Path) -> bytes:
    """The id where the specification has it: offset 68 of the footer, or the page 83 metadata item."""
    if path.suffix == ".vhd":
        return path.read_bytes()[-512:][68:84]
    with imagekit.open_image(path) as image:
        assert image.disk_id is not None
        return image.disk_id


@pytest.mark.parametrize(("kind", "subformat"), KINDS)
def test_the_id_changes_and_nothing_else_that_a_guest_sees(
    raw: Path, tmp_path: Path, kind: str, subformat: str
) -> None:
    disk = tmp_path / f"disk.{kind}"
    imagekit.convert(raw, disk, subformat=subformat, identifier=OLD)
    report = imagekit.identify(disk, NEW)
    assert report.identifier == str(NEW)
    assert stored_id(disk) == NEW.bytes_le
    assert imagekit.compare(raw, disk).same
    assert imagekit.check(disk).problems == ()


@pytest.mark.parametrize(("kind", "subformat"), KINDS)
def test_every_step_leaves_the_old_disk_or_the_new_one(raw: Path, tmp_path: Path, kind: str, subformat: str) -> None:
    disk = tmp_path / f"disk.{kind}"
    imagekit.convert(raw, disk, subformat=subformat, identifier=OLD)
    chosen = registry.find(kind)
    file = MemoryFile(disk.read_bytes())
    expected = content(chosen.open(file))
    for change in list(chosen.identify(file, NEW)):
        if isinstance(change, Write):
            file.pwrite(change.offset, change.data)
        elif isinstance(change, Truncate):
            file.truncate(change.size)
        else:
            assert isinstance(change, Barrier)
        assert content(chosen.open(file)) == expected
    assert not chosen.check(file)


def test_a_vhdx_child_keeps_the_id_of_its_parent(raw: Path, tmp_path: Path) -> None:
    imagekit.convert(raw, tmp_path / "parent.vhdx")
    imagekit.create(tmp_path / "child.vhdx", parent=str(tmp_path / "parent.vhdx"))
    with pytest.raises(UnsupportedFeature, match="id of its parent"):
        imagekit.identify(tmp_path / "child.vhdx", NEW)


def test_a_vhd_child_may_have_its_own(raw: Path, tmp_path: Path) -> None:
    imagekit.convert(raw, tmp_path / "parent.vhd")
    child = tmp_path / "child.vhd"
    imagekit.create(child, parent=str(tmp_path / "parent.vhd"))
    imagekit.identify(child, NEW)
    assert stored_id(child) == NEW.bytes_le
    assert imagekit.compare(child, raw, follow_references=True).same


def test_the_footers_checksum_is_right(raw: Path, tmp_path: Path) -> None:
    """By the specification's own rule, computed here: the ones' complement of the sum of all other bytes."""
    disk = tmp_path / "disk.vhd"
    imagekit.convert(raw, disk, identifier=OLD)
    imagekit.identify(disk, NEW)
    data = disk.read_bytes()
    for footer in (data[:512], data[-512:]):
        (stored,) = struct.unpack(">I", footer[64:68])
        assert stored == ~(sum(footer) - sum(footer[64:68])) & 0xFFFFFFFF


def test_other_formats_say_so(raw: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="id of raw"):
        imagekit.identify(raw, NEW)
