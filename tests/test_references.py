"""Following references: which file a name means, and which files are never opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekit.errors import SourceError, UnsafeImage, UsageError
from imagekit.formats.base import DiskImage, ParentLink, Reference
from imagekit.formats.raw import ZeroImage
from imagekit.references import Following, ParentMap, check_identity, find, link_to, parse_parent_map

CHILD = "child.vhdx"


def parent(*names: str) -> Reference:
    return Reference("parent-file", names[-1], "vhdx", names=names)


def found(reference: Reference, folder: Path, parent_map: ParentMap = ()) -> list[str]:
    """The files found, relative to ``folder``."""
    return [str(path.relative_to(folder)) for path in find(reference, folder / CHILD, Following(parent_map))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("parent.vhdx", "sub/Base.vhdx", "vms/old/parent.vhdx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (r".\parent.vhdx", "parent.vhdx"),
        ("parent.vhdx", "parent.vhdx"),
        (r".\sub\Base.vhdx", "sub/Base.vhdx"),
        (r".\sub\BASE.VHDX", "sub/Base.vhdx"),
        (r"sub/Base.vhdx", "sub/Base.vhdx"),
    ],
    ids=["dot", "bare", "folder", "other case", "slashes"],
)
def test_a_relative_name_is_looked_for_from_the_childs_folder(folder: Path, name: str, expected: str) -> None:
    assert found(parent(name), folder)[0] == expected


@pytest.mark.parametrize(
    "name",
    [
        r"C:\VMs\old\parent.vhdx",
        r"c:\vms\OLD\parent.vhdx",
        r"\\?\C:\VMs\old\parent.vhdx",
        "C:/VMs/old/parent.vhdx",
    ],
)
def test_a_windows_path_is_translated_by_the_map(folder: Path, name: str) -> None:
    parent_map = parse_parent_map([rf"C:\VMs={folder}/vms"])
    candidates = found(parent(name), folder, parent_map)
    assert candidates == ["vms/old/parent.vhdx", "parent.vhdx"]


def test_a_volume_path_is_translated_by_a_map_of_that_volume(folder: Path) -> None:
    volume = r"\\?\Volume{8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11}"
    assert (
        found(parent(volume + r"\old\parent.vhdx"), folder, ((volume, f"{folder}/vms"),))[0] == "vms/old/parent.vhdx"
    )


def test_the_map_never_leads_out_of_its_folder(folder: Path) -> None:
    candidates = found(parent(r"C:\VMs\..\parent.vhdx"), folder, ((r"C:\VMs", str(folder / "vms")),))
    assert candidates == ["parent.vhdx"]  # beside the child, not through the map


def test_the_names_are_tried_in_their_order(folder: Path) -> None:
    assert found(parent(r".\sub\Base.vhdx", r"C:\elsewhere\parent.vhdx"), folder) == ["sub/Base.vhdx", "parent.vhdx"]


def test_a_parent_that_moved_with_its_child_is_found_beside_it(folder: Path) -> None:
    assert found(parent(r"\\server\share\disks\parent.vhdx"), folder) == ["parent.vhdx"]
    assert found(parent("file:///Volumes/disks/parent.vhdx"), folder) == ["parent.vhdx"]


def test_a_file_url_is_a_path(folder: Path) -> None:
    assert found(parent(f"file://{folder}/sub/Base.vhdx"), folder)[0] == "sub/Base.vhdx"


def test_a_missing_parent_says_what_was_tried_and_how_to_help(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"parent file 'C:.*gone.vhdx' was not found; tried: .*gone.vhdx") as caught:
        found(parent(r"C:\VMs\gone.vhdx"), tmp_path)
    assert "--parent-map" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name", ['json:{"driver":"nbd"}', "nbd://host/x", "http://host/x.raw", "ssh://host/x", "rbd:pool/x", "file:x"]
)
@pytest.mark.parametrize("kind", ["backing-file", "data-file", "extent-file"])
def test_a_name_with_a_protocol_is_never_opened(folder: Path, name: str, kind: str) -> None:
    reference = Reference(kind, name)  # type: ignore[arg-type]
    with pytest.raises(UnsafeImage) as caught:
        found(reference, folder)
    assert caught.value.rule == "reference-protocol"


def test_a_folder_is_not_a_parent(folder: Path) -> None:
    with pytest.raises(SourceError, match="not a regular file"):
        found(Reference("backing-file", "sub"), folder)


def test_a_name_with_a_nul_finds_nothing(folder: Path) -> None:
    with pytest.raises(SourceError, match="was not found"):
        found(parent("parent.vhdx\0.txt"), folder)


@pytest.mark.parametrize("text", ["", "C:", "=/mnt", "C:\\=", "nothing"])
def test_a_map_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="is not FROM=TO"):
        parse_parent_map([text])


def image(size: int = 4096, identity: bytes | None = b"\x01" * 16) -> DiskImage:
    disk = ZeroImage(size)
    disk.identity = identity
    return disk


def test_a_parent_of_another_identity_is_refused_unless_that_is_ignored(tmp_path: Path) -> None:
    reference = Reference("parent-file", "p", identities=(b"\x02" * 16, b"\x03" * 16))
    with pytest.raises(UnsafeImage, match=r"0202.* or 0303") as caught:
        check_identity(reference, image(), tmp_path, ignore=False)
    assert caught.value.rule == "parent-id"
    check_identity(reference, image(), tmp_path, ignore=True)
    check_identity(reference, image(identity=b"\x03" * 16), tmp_path, ignore=False)


def test_a_parent_larger_than_its_child_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeImage) as caught:
        check_identity(Reference("parent-file", "p", size=4096), image(8192), tmp_path, ignore=False)
    assert caught.value.rule == "parent-size"
    check_identity(Reference("parent-file", "p", size=8192), image(4096), tmp_path, ignore=False)


def test_a_link_is_relative_to_the_child_and_absolute_where_the_folder_is_mapped(tmp_path: Path) -> None:
    link = link_to(
        image(), tmp_path / "base" / "p.vhdx", tmp_path / "vms" / "c.vhdx", ((r"D:\Disks\ "[:-1], str(tmp_path)),)
    )
    assert link == ParentLink(b"\x01" * 16, 4096, r"..\base\p.vhdx", r"D:\Disks\base\p.vhdx")
    beside = link_to(image(), tmp_path / "p.vhdx", tmp_path / "c.vhdx")
    assert (beside.relative, beside.absolute) == (r".\p.vhdx", None)


def test_a_disk_without_identity_cannot_be_a_parent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a VHD or a VHDX"):
        link_to(image(identity=None), tmp_path / "p.raw", tmp_path / "c.vhdx")
