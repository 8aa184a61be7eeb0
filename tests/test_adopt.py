"""A download becomes a disk that Hyper-V starts, in place, or stays what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import imagekit
from imagekit import conversion, sources
from imagekit.adopt import adopt
from imagekit.errors import ImagekitError, InvalidImage, UnsafeImage, UsageError
from imagekit.formats.base import MiB
from tests.disks import noise


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(2 * MiB) + bytes(MiB))
    return path


def download(folder: Path, raw: Path, kind: str) -> Path:
    """As a cache lands it: named after the image's id, with no suffix."""
    path = folder / "download"
    imagekit.convert(raw, path, target_format=kind)
    return path


@pytest.mark.parametrize("target", ["vhd", "vhdx"])
@pytest.mark.parametrize("declared", ["raw", "qcow2"])
def test_what_hyper_v_does_not_start_is_converted_under_its_name(
    raw: Path, tmp_path: Path, declared: str, target: str
) -> None:
    path = download(tmp_path, raw, declared)
    assert adopt(str(path), declared, target=target) == {"format": target, "converted": True}
    assert imagekit.info(path).info.format == target
    assert imagekit.compare(path, raw).same
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.raw", "download"]


@pytest.mark.parametrize("declared", ["vhd", "vhdx"])
def test_what_it_starts_is_not_touched_even_if_declared_as_its_sister(
    raw: Path, tmp_path: Path, declared: str
) -> None:
    path = download(tmp_path, raw, "vhdx")
    before = path.read_bytes()
    assert adopt(str(path), declared) == {"format": "vhdx", "converted": False}
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "declared", "error"),
    [
        ("qcow2", "raw", UnsafeImage),
        ("qcow2", "vhd", UsageError),
        ("raw", "qcow2", InvalidImage),
        ("raw", "vdi", UsageError),
    ],
)
def test_content_that_is_not_what_was_declared_is_refused_and_stays(
    raw: Path, tmp_path: Path, content: str, declared: str, error: type[ImagekitError]
) -> None:
    path = download(tmp_path, raw, content)
    before = path.read_bytes()
    with pytest.raises(error):
        adopt(str(path), declared)
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.raw", "download"]


@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_a_disk_that_names_a_parent_is_refused(raw: Path, tmp_path: Path, kind: str) -> None:
    base = tmp_path / f"base.{kind}"
    imagekit.convert(raw, base)
    child = tmp_path / f"child.{kind}"
    imagekit.create(child, parent=base)
    path = child.rename(tmp_path / "download")
    with pytest.raises(UnsafeImage) as refused:
        adopt(str(path), kind)
    assert refused.value.rule == "parent-file"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no confinement elsewhere")
@pytest.mark.parametrize("kind", ["vhdx", "qcow2"])
def test_a_download_is_parsed_where_it_is_confined_and_nowhere_else(
    raw: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = download(tmp_path, raw, kind)

    def parsed_here(*words: object, **more: object) -> None:
        raise AssertionError("parsed in the driver's process")

    for module in (sources, conversion):
        monkeypatch.setattr(module, "open_source", parsed_here)
    assert adopt(str(path), kind)["converted"] is (kind != "vhdx")
