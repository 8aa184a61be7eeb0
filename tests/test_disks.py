"""Disks as such: new ones, chains of them, and changes in place. Content is compared with plain byte strings."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import imagekit
import imagekit.conversion
import imagekit.sources
from imagekit.changes import apply
from imagekit.disks import DiskReport
from imagekit.errors import (
    Cancelled,
    CorruptImage,
    ImagekitError,
    SourceError,
    TargetError,
    UnsafeImage,
    UnsupportedFeature,
    UsageError,
)
from imagekit.formats.base import Copy, GiB, MiB
from imagekit.formats.files import LocalFile
from imagekit.formats.raw import RawImage
from imagekit.report import Report
from tests.disks import content, noise

FAMILY = ("vhd", "vhdx")
SIZE = 9 * MiB
"""Not a multiple of the usual block sizes."""


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def raw_disk(seed: int, *, size: int = SIZE, holes: bool = True) -> bytes:
    """Noise with holes in it, and an end inside a block."""
    data = bytearray(noise(size, seed))
    if holes:
        data[3 * MiB : 5 * MiB + 512] = bytes(2 * MiB + 512)
    return bytes(data)


def changed(data: bytes, seed: int) -> bytes:
    """The disk after a guest wrote a little: some data, some zeros, at sectors that are no block's edge."""
    out = bytearray(data)
    out[MiB // 2 : MiB // 2 + 1536] = noise(1536, seed)
    out[4 * MiB : 4 * MiB + 4096] = noise(4096, seed + 1)
    out[7 * MiB + 512 : 8 * MiB] = bytes(MiB - 512)
    out[-512:] = noise(512, seed + 2)
    return bytes(out)


def read(path: Path, **options: Any) -> bytes:
    with imagekit.open_image(path, follow_references=True, **options) as disk:
        return content(disk)


def make_chain(folder: Path, fmt: str, depth: int, *, base: str | None = None) -> tuple[list[Path], list[bytes]]:
    """A base and ``depth`` - 1 children, each written by ``convert --parent``; paths and contents."""
    contents = [raw_disk(1)]
    paths = [folder / f"0.{fmt}"]
    imagekit.convert(written(folder / "0.raw", contents[0]), paths[0], subformat=base, sync=False)
    for number in range(1, depth):
        contents.append(changed(contents[-1], number * 10))
        raw = written(folder / f"{number}.raw", contents[-1])
        paths.append(folder / f"{number}.{fmt}")
        imagekit.convert(raw, paths[-1], parent=str(paths[-2]), verify="content", sync=False)
    return paths, contents


@pytest.fixture(params=FAMILY)
def fmt(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- new disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "subformat"),
    [
        ("a.raw", None),
        ("a.vhd", "dynamic"),
        ("a.vhd", "fixed"),
        ("a.vhdx", "dynamic"),
        ("a.vhdx", "fixed"),
        ("a.qcow2", None),
    ],
)
def test_a_new_disk_is_all_zeros_sound_and_of_its_size(name: str, subformat: str | None, tmp_path: Path) -> None:
    path = tmp_path / name
    report = imagekit.create(path, 5 * MiB, subformat=subformat, sync=False)
    assert isinstance(report, DiskReport)
    assert (report.virtual_size, report.file_size) == (5 * MiB, path.stat().st_size)
    assert read(path) == bytes(5 * MiB)
    if not name.endswith(".raw"):
        assert imagekit.check(path).problems == ()
        assert imagekit.info(path).findings == ()


def test_a_new_disk_of_the_same_id_has_the_same_bytes(fmt: str, tmp_path: Path) -> None:
    identifier = "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"
    for name in ("a", "b"):
        imagekit.create(tmp_path / f"{name}.{fmt}", GiB, identifier=identifier, sync=False)
    assert (tmp_path / f"a.{fmt}").read_bytes() == (tmp_path / f"b.{fmt}").read_bytes()
    imagekit.create(tmp_path / f"c.{fmt}", GiB, sync=False)
    assert (tmp_path / f"a.{fmt}").read_bytes() != (tmp_path / f"c.{fmt}").read_bytes()


def test_a_size_is_rounded_up_to_whole_sectors_and_that_is_said(tmp_path: Path) -> None:
    report = imagekit.create(tmp_path / "a.vhdx", 5 * MiB + 1, sector_size=4096, sync=False)
    assert report.virtual_size == 5 * MiB + 4096
    assert report.notes == (f"size rounded up from {5 * MiB + 1} to {5 * MiB + 4096} bytes",)


def test_a_new_child_reads_as_its_parent_and_takes_little_room(fmt: str, tmp_path: Path) -> None:
    base, data = tmp_path / f"base.{fmt}", raw_disk(3)
    imagekit.convert(written(tmp_path / "base.raw", data), base, sync=False)
    report = imagekit.create(tmp_path / f"child.{fmt}", parent=str(base), sync=False)
    assert (report.subformat, report.virtual_size, report.parent) == ("differencing", SIZE, str(base))
    assert read(tmp_path / f"child.{fmt}") == data
    assert report.file_size <= 6 * MiB


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, UsageError),
        ({"size": 0}, UsageError),
        ({"size": MiB, "subformat": "differencing"}, UsageError),
        ({"parent": "missing.vhdx"}, SourceError),
        ({"size": MiB, "parent": "base.vhdx", "subformat": "fixed"}, UsageError),
        ({"parent": "base.raw"}, UsageError),
        ({"parent": "base.vhd"}, UsageError),
        ({"parent": "base.vhdx", "target_format": "qcow2"}, UsageError),
        ({"size": 65 * 1024 * GiB}, UnsupportedFeature),
    ],
    ids=["no size", "zero", "no parent", "missing", "fixed child", "raw parent", "VHD parent", "qcow2", "65 TiB"],
)
def test_a_disk_that_cannot_be_made_is_not(options: dict[str, Any], kind: type[Exception], tmp_path: Path) -> None:
    imagekit.create(tmp_path / "base.vhdx", 4 * MiB, sync=False)
    imagekit.create(tmp_path / "base.raw", 4 * MiB, sync=False)
    imagekit.create(tmp_path / "base.vhd", 4 * MiB, sync=False)
    options = dict(options)
    if "parent" in options:
        options["parent"] = str(tmp_path / options["parent"])
    with pytest.raises(kind):
        imagekit.create(tmp_path / "new.vhdx", options.pop("size", None), **options)
    assert not (tmp_path / "new.vhdx").exists()


def test_an_existing_file_is_not_replaced_by_a_new_disk(tmp_path: Path) -> None:
    path = written(tmp_path / "a.vhdx", b"mine")
    with pytest.raises(TargetError, match="exists already"):
        imagekit.create(path, GiB)
    assert path.read_bytes() == b"mine"


# --- chains ----------------------------------------------------------------------------------------------------


def test_a_chain_of_five_reads_as_its_last_disk_at_every_depth(fmt: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 5)
    assert [read(path) for path in paths] == contents
    assert all(imagekit.check(path).problems == () for path in paths)


def test_a_child_holds_only_the_blocks_that_differ(fmt: str, tmp_path: Path) -> None:
    data = raw_disk(5, size=33 * MiB, holes=False)
    imagekit.convert(written(tmp_path / "0.raw", data), tmp_path / f"0.{fmt}", sync=False)
    other = data[: 20 * MiB] + noise(512, 77) + data[20 * MiB + 512 :]
    raw = written(tmp_path / "1.raw", other)
    report = imagekit.convert(raw, tmp_path / f"1.{fmt}", parent=str(tmp_path / f"0.{fmt}"), sync=False)
    assert report.data_bytes == 2 * MiB
    with imagekit.open_image(tmp_path / f"1.{fmt}", follow_references=True) as disk:
        own = [(one.start, one.length) for one in disk.extents() if one.depth == 0]
    assert own == [(20 * MiB, 2 * MiB)]


def test_a_child_is_refused_until_references_may_be_followed(fmt: str, tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, fmt, 2)
    for use in (imagekit.open_image, lambda path: imagekit.convert(path, tmp_path / "out.raw")):
        with pytest.raises(UnsafeImage) as caught:
            use(paths[1])
        assert (caught.value.rule, caught.value.hint) == (
            "parent-file",
            "where its origin is trusted: --follow-references",
        )
    assert not (tmp_path / "out.raw").exists()
    assert [one.rule for one in imagekit.info(paths[1]).findings] == ["parent-file"]


def test_a_chain_with_a_missing_link_says_which_and_where_it_was_looked_for(fmt: str, tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, fmt, 3)
    paths[0].unlink()
    with pytest.raises(SourceError, match=rf"1\.{fmt}: its parent file .* was not found; tried: .*0\.{fmt}"):
        read(paths[2])


def test_another_disk_in_the_parents_place_is_refused_unless_that_is_asked_for(fmt: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 2)
    paths[0].unlink()
    imagekit.convert(tmp_path / "0.raw", paths[0], sync=False)  # the same content, another disk
    with pytest.raises(UnsafeImage) as caught:
        read(paths[1])
    assert caught.value.rule == "parent-id"
    assert read(paths[1], ignore_parent_id=True) == contents[1]


def test_a_chain_that_leads_back_to_itself_is_corrupt(fmt: str, tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, fmt, 2)
    paths[1].replace(paths[0])
    with pytest.raises(CorruptImage, match="leads back to itself"):
        read(paths[0], ignore_parent_id=True)


def test_a_chain_too_long_is_refused(fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (imagekit.sources, imagekit.conversion):  # 64 takes its time
        monkeypatch.setattr(module, "MAX_DEPTH", 5)
    paths = [tmp_path / f"{number}.{fmt}" for number in range(7)]
    imagekit.create(paths[0], 4 * MiB, sync=False)
    with pytest.raises(UnsupportedFeature, match="a chain of more than"):
        for above, below in zip(paths[1:], paths, strict=False):
            imagekit.create(above, parent=str(below), sync=False)
    assert len(list(tmp_path.iterdir())) == 5
    assert read(paths[4]) == bytes(4 * MiB)


def test_a_parent_in_another_folder_is_found_by_the_map_of_folders(fmt: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "elsewhere").mkdir()
    base, child = tmp_path / "base" / f"p.{fmt}", tmp_path / f"c.{fmt}"
    imagekit.create(base, 4 * MiB, sync=False)
    parent_map = {"D:\\Disks": str(tmp_path / "base")}
    imagekit.create(child, parent=str(base), parent_map=parent_map, sync=False)
    base.rename(tmp_path / "elsewhere" / base.name)
    with pytest.raises(SourceError, match="was not found"):
        read(child)
    assert read(child, parent_map={"d:\\disks": str(tmp_path / "elsewhere")}) == bytes(4 * MiB)


# --- merge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["out.vhd", "out.vhdx", "out.raw", "out.qcow2"])
def test_a_chain_merges_into_one_new_file(fmt: str, target: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 3)
    before = [path.read_bytes() for path in paths]
    report = imagekit.merge(paths[-1], tmp_path / target, follow_references=True, verify="content", sync=False)
    assert isinstance(report, Report)
    assert read(tmp_path / target) == contents[-1]
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("base", ["dynamic", "fixed"])
def test_a_chain_merges_step_by_step_into_its_base(fmt: str, base: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 4, base=base)
    for child, parent in ((3, 2), (2, 1), (1, 0)):
        report = imagekit.merge(paths[child], follow_references=True, verify="content")
        assert isinstance(report, DiskReport)
        assert "can be removed" in report.notes[0]
        assert read(paths[parent]) == contents[-1]
        assert imagekit.check(paths[parent]).problems == ()


def test_merging_a_child_that_grew_grows_its_parent(tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, "vhdx", 2)
    imagekit.resize(paths[1], 2 * SIZE)
    assert read(paths[1]) == contents[1] + bytes(SIZE)
    report = imagekit.merge(paths[1], follow_references=True, verify="content")
    assert isinstance(report, DiskReport)
    assert (report.old_virtual_size, report.virtual_size) == (SIZE, 2 * SIZE)
    assert read(paths[0]) == contents[1] + bytes(SIZE)


def test_merging_needs_leave_to_follow_references(fmt: str, tmp_path: Path) -> None:
    paths, _ = make_chain(tmp_path, fmt, 2)
    before = paths[0].read_bytes()
    with pytest.raises(UsageError, match="decides which file would be written"):
        imagekit.merge(paths[1])
    with pytest.raises(UnsafeImage):
        imagekit.merge(paths[1], tmp_path / "out.raw")
    assert paths[0].read_bytes() == before


def test_a_merge_into_the_parent_that_is_stopped_can_be_done_again(fmt: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 2)
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        imagekit.merge(
            paths[1],
            follow_references=True,
            cancel=cancel,
            progress=lambda told: cancel.set() if told.phase == "merge" and told.done else None,
        )
    assert read(paths[1], ignore_parent_id=True) == contents[1]
    imagekit.merge(paths[1], follow_references=True, ignore_parent_id=True, verify="content")
    assert read(paths[0]) == contents[1]


@pytest.mark.parametrize("name", ["0.vhd", "0.raw"])
def test_a_disk_without_a_parent_cannot_be_merged_into_one(name: str, tmp_path: Path) -> None:
    make_chain(tmp_path, "vhd", 1)
    with pytest.raises(UnsupportedFeature, match="not a differencing"):
        imagekit.merge(tmp_path / name, follow_references=True)


# --- rebase ----------------------------------------------------------------------------------------------------


def test_a_parent_that_moved_is_named_again(fmt: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 2)
    folder = tmp_path / ("a rather long name of a folder, longer than the name before it " * 3)
    folder.mkdir()
    moved = paths[0].rename(folder / f"moved.{fmt}")
    with pytest.raises(SourceError):
        read(paths[1])
    report = imagekit.rebase(paths[1], moved)
    assert report.parent == str(moved)
    assert read(paths[1]) == contents[1]
    assert imagekit.check(paths[1]).problems == ()


def test_another_disk_does_not_become_the_parent_unless_that_is_asked_for(fmt: str, tmp_path: Path) -> None:
    paths, contents = make_chain(tmp_path, fmt, 2)
    other = tmp_path / f"other.{fmt}"
    imagekit.convert(tmp_path / "0.raw", other, sync=False)
    before = paths[1].read_bytes()
    with pytest.raises(UnsafeImage) as caught:
        imagekit.rebase(paths[1], other)
    assert caught.value.rule == "parent-id"
    assert paths[1].read_bytes() == before
    imagekit.rebase(paths[1], other, ignore_parent_id=True)
    paths[0].unlink()
    assert read(paths[1]) == contents[1]


@pytest.mark.parametrize(
    ("child", "parent", "kind", "words"),
    [
        ("0.vhdx", "1.vhdx", UnsupportedFeature, "not a differencing"),
        ("1.vhdx", "0.raw", UsageError, "must be a VHD or a VHDX"),
        ("1.vhdx", "plain.vhd", UsageError, "the parent is a vhd, its child a vhdx"),
        ("1.vhdx", "1.vhdx", UsageError, "its own parent"),
        ("1.vhdx", "2.vhdx", UsageError, "lies on this disk itself"),
    ],
    ids=["no child", "raw", "another format", "itself", "its own child"],
)
def test_a_rebase_that_makes_no_sense_changes_nothing(
    child: str, parent: str, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    make_chain(tmp_path, "vhdx", 3)
    imagekit.create(tmp_path / "plain.vhd", SIZE, sync=False)
    before = (tmp_path / child).read_bytes()
    with pytest.raises(kind, match=words):
        imagekit.rebase(tmp_path / child, tmp_path / parent, ignore_parent_id=True)
    assert (tmp_path / child).read_bytes() == before


# --- resize ----------------------------------------------------------------------------------------------------

KINDS = [("raw", None), ("vhd", "dynamic"), ("vhd", "fixed"), ("vhdx", "dynamic"), ("vhdx", "fixed")]


@pytest.mark.parametrize(("name", "subformat"), KINDS)
def test_a_disk_grows_by_zeros_and_shrinks_back(name: str, subformat: str | None, tmp_path: Path) -> None:
    path, data = tmp_path / f"a.{name}", raw_disk(8)
    imagekit.convert(written(tmp_path / "a.in", data), path, source_format="raw", subformat=subformat, sync=False)
    report = imagekit.resize(path, 50 * MiB)
    assert (report.old_virtual_size, report.virtual_size) == (SIZE, 50 * MiB)
    assert read(path) == data + bytes(50 * MiB - SIZE)
    with pytest.raises(UsageError, match="would make it smaller"):
        imagekit.resize(path, SIZE)
    imagekit.resize(path, SIZE, shrink=True)
    assert read(path) == data


@pytest.mark.parametrize(("name", "subformat"), KINDS)
def test_a_disk_never_shrinks_over_data(name: str, subformat: str | None, tmp_path: Path) -> None:
    path, data = tmp_path / f"a.{name}", raw_disk(8)
    imagekit.convert(written(tmp_path / "a.in", data), path, source_format="raw", subformat=subformat, sync=False)
    before = path.read_bytes()
    with pytest.raises(UnsupportedFeature, match="data"):
        imagekit.resize(path, SIZE - 512, shrink=True)
    assert path.read_bytes() == before


def test_the_size_it_has_already_changes_nothing(fmt: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{fmt}"
    imagekit.create(path, 5 * MiB, sync=False)
    before = path.read_bytes()
    assert imagekit.resize(path, 5 * MiB).notes == ("it has that size already",)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("size", "kind"), [(5 * MiB + 100, ImagekitError), (65 * 1024 * GiB, UnsupportedFeature)], ids=["odd", "65 TiB"]
)
def test_a_size_that_the_format_does_not_have_changes_nothing(
    fmt: str, size: int, kind: type[Exception], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{fmt}"
    imagekit.create(path, 5 * MiB, sync=False)
    before = path.read_bytes()
    with pytest.raises(kind):
        imagekit.resize(path, size)
    assert path.read_bytes() == before


def test_a_disk_held_by_another_program_is_not_changed(fmt: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{fmt}"
    imagekit.create(path, 5 * MiB, sync=False)
    with LocalFile.open_for_change(path), pytest.raises(SourceError, match="held by another program"):
        imagekit.resize(path, 6 * MiB)


def test_qcow2_is_not_resized_in_place_and_the_hint_says_what_to_do(tmp_path: Path) -> None:
    imagekit.create(tmp_path / "a.qcow2", 5 * MiB, sync=False)
    with pytest.raises(UnsupportedFeature) as caught:
        imagekit.resize(tmp_path / "a.qcow2", 6 * MiB)
    assert "convert with --size" in str(caught.value.hint)


def test_a_copy_is_taken_in_steps_and_tells_where_it_is(tmp_path: Path) -> None:
    from imagekit.progress import Control

    data = noise(5 * MiB, 9)
    source = LocalFile.open_source(written(tmp_path / "in", data))
    told: list[int] = []
    with LocalFile.open_for_change(written(tmp_path / "out", bytes(6 * MiB))) as target:
        control = Control(lambda progress: told.append(progress.done))
        apply([Copy(MiB, 512, 4 * MiB + 5)], target, image=RawImage(source, len(data)), control=control)
        assert target.pread(0, 6 * MiB) == bytes(MiB) + data[512 : 4 * MiB + 517] + bytes(MiB - 5)
    assert told == [512, 512 + 2 * MiB, 512 + 4 * MiB]
