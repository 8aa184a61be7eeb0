"""What a driver's spawn, resize, rescue and snapshot need: right sizes or one clear message, right content."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import imagekit
from imagekit.cache import ImageCache
from imagekit.errors import ImagekitError, TargetError, UsageError
from imagekit.formats.base import GiB, MiB, TiB
from imagekit.nova import attach_config_drive, disks
from imagekit.nova.sizes import internal_size, new_disk_size
from tests.disks import noise
from tests.here import Here

IMAGE = "0b2a7b1e-6c1e-4f39-9f4c-4d6f2f3a1f00"
ONE, OTHER = UUID(int=1), UUID(int=2)
SIZE = 8 * MiB
KINDS = ("vhd", "vhdx")
COW = pytest.mark.parametrize("cow", [True, False], ids=["cow", "copy"])
KIND = pytest.mark.parametrize("kind", KINDS)


prepare_root = functools.partial(disks.prepare_root, child=Here())
create_ephemeral = functools.partial(disks.create_ephemeral, child=Here())
resize_root = functools.partial(disks.resize_root, child=Here())
snapshot = functools.partial(disks.snapshot, child=Here())


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(noise(3 * MiB) + bytes(SIZE - 3 * MiB))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    folder = tmp_path / "cache"
    folder.mkdir()
    return ImageCache(folder, child=Here())


def virtual_size(path: Path) -> int:
    return imagekit.info(path).info.virtual_size


@KIND
@COW
def test_a_root_disk_has_the_flavors_size_and_the_images_content(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, cow: bool
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=GiB, instance=ONE, cow=cow)
    assert (made.virtual_size, virtual_size(made.path)) == (GiB, GiB)
    assert (made.base is not None) == cow
    assert imagekit.compare(made.path, raw, follow_references=True).same
    assert imagekit.check(made.path).sound


@KIND
@COW
@pytest.mark.parametrize("size", [None, 0])
def test_flavor_zero_keeps_the_images_size(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, cow: bool, size: int | None
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=size, cow=cow)
    assert made.virtual_size == virtual_size(made.path) == SIZE


@KIND
@COW
def test_an_image_exactly_as_large_as_the_flavor_fits(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, cow: bool
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=SIZE, cow=cow)
    assert virtual_size(made.path) == SIZE


@KIND
def test_by_file_size_it_does_not_and_the_message_has_all_three_sizes(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=SIZE, size_rule="file")
    assert str(SIZE) in caught.value.message
    assert "leaves" in caught.value.message
    assert caught.value.hint is not None
    assert "size_rule='virtual'" in caught.value.hint
    assert not (tmp_path / f"root.{kind}").exists()


@KIND
@COW
def test_an_odd_size_is_kept_in_whole_sectors(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, cow: bool
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=100 * MiB + 512, cow=cow)
    assert made.virtual_size == virtual_size(made.path) == 100 * MiB + 512


def test_2040_gib_is_the_end_of_vhd_and_not_of_vhdx(cache: ImageCache, raw: Path, tmp_path: Path) -> None:
    assert prepare_root(cache, IMAGE, raw, tmp_path / "a.vhd", size=2040 * GiB).virtual_size == 2040 * GiB
    assert prepare_root(cache, IMAGE, raw, tmp_path / "a.vhdx", size=2041 * GiB).virtual_size == 2041 * GiB
    with pytest.raises(ImagekitError, match="2040 GiB"):
        prepare_root(cache, IMAGE, raw, tmp_path / "b.vhd", size=2041 * GiB)
    assert not (tmp_path / "b.vhd").exists()


def test_a_smaller_flavor_is_refused_with_both_sizes(cache: ImageCache, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{SIZE} bytes, the flavor's {MiB}"):
        prepare_root(cache, IMAGE, raw, tmp_path / "root.vhdx", size=MiB)


def test_a_rescue_disk_keeps_the_images_size_and_must_fit(cache: ImageCache, raw: Path, tmp_path: Path) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / "root-rescue.vhdx", size=GiB, rescue=True)
    assert made.virtual_size == SIZE
    with pytest.raises(UsageError):
        prepare_root(cache, IMAGE, raw, tmp_path / "other.vhdx", size=MiB, rescue=True)


def test_two_instances_have_two_disk_ids_and_one_has_the_same_again(
    cache: ImageCache, raw: Path, tmp_path: Path
) -> None:
    ids = []
    for name, instance in (("a", ONE), ("b", OTHER), ("c", ONE)):
        made = prepare_root(cache, IMAGE, raw, tmp_path / f"{name}.vhdx", instance=instance, cow=False)
        ids.append(imagekit.info(made.path).info.features["disk-id"])
    assert ids[0] == ids[2] != ids[1]


def test_an_existing_root_disk_is_never_replaced(cache: ImageCache, raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "root.vhdx"
    path.write_bytes(b"somebody's")
    with pytest.raises(TargetError):
        prepare_root(cache, IMAGE, raw, path)
    assert path.read_bytes() == b"somebody's"


@KIND
def test_a_base_in_use_is_not_pruned(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=GiB)
    assert made.base not in cache.prune(unused_for=-1).removed
    made.path.unlink()
    monkeypatch.setattr("imagekit.cache.RESERVED_FOR", 0)
    assert made.base in cache.prune(unused_for=-1).removed


@KIND
def test_an_ephemeral_disk_is_empty_and_exact(tmp_path: Path, kind: str) -> None:
    made = create_ephemeral(tmp_path / f"eph0.{kind}", 20 * GiB, instance=ONE)
    assert made.virtual_size == virtual_size(made.path) == 20 * GiB
    with imagekit.open_image(made.path) as disk:
        assert disk.first_data(0) is None
    by_file = create_ephemeral(tmp_path / f"eph1.{kind}", GiB, index=1, size_rule="file")
    with imagekit.open_image(by_file.path) as disk:
        assert internal_size(disk, GiB) == by_file.virtual_size < GiB


@pytest.mark.parametrize("size", [GiB, 500 * GiB + 7, 2 * TiB, 64 * TiB])
def test_the_size_for_a_new_vhdx_is_what_its_own_layout_allows(tmp_path: Path, size: int) -> None:
    """The block size depends on the disk's size, which depends on the block size."""
    wanted = new_disk_size("vhdx", "dynamic", size)
    imagekit.create(tmp_path / "a.vhdx", wanted)
    with imagekit.open_image(tmp_path / "a.vhdx") as disk:
        assert disk.virtual_size == wanted
        assert wanted <= internal_size(disk, size) < wanted + 32 * MiB


@KIND
@COW
def test_a_resize_grows_and_keeps_the_content(
    cache: ImageCache, raw: Path, tmp_path: Path, kind: str, cow: bool
) -> None:
    made = prepare_root(cache, IMAGE, raw, tmp_path / f"root.{kind}", size=16 * MiB, cow=cow)
    grown = resize_root(made.path, GiB)
    assert grown.virtual_size == virtual_size(made.path) == GiB
    assert imagekit.compare(made.path, raw, follow_references=True).same
    assert resize_root(made.path, GiB).virtual_size == GiB
    with pytest.raises(UsageError, match="cut off"):
        resize_root(made.path, 16 * MiB)
    assert sorted(one.suffix for one in tmp_path.iterdir() if one.is_file()) == sorted([".raw", f".{kind}"])


@pytest.mark.parametrize("target", ["flat.vhd", "flat.vhdx", "flat.qcow2"])
def test_a_snapshot_is_one_file_without_a_chain(cache: ImageCache, raw: Path, tmp_path: Path, target: str) -> None:
    root = prepare_root(cache, IMAGE, raw, tmp_path / "root.vhdx", size=16 * MiB).path
    top = tmp_path / "top.avhdx"
    imagekit.create(top, parent=str(root), target_format="vhdx")
    made = snapshot(top, tmp_path / target)
    assert (made.disk_format, made.container_format) == (target.split(".")[1], "bare")
    assert (made.virtual_size, made.file_size) == (16 * MiB, made.path.stat().st_size)
    assert imagekit.info(made.path).info.references == ()
    assert imagekit.compare(made.path, raw).same


@pytest.mark.parametrize(("generation", "place"), [(1, ("ide", 1, 0)), (2, ("scsi", 0, 1))])
def test_a_config_drive_is_a_dvd_where_hyper_v_has_it(
    tmp_path: Path, generation: Any, place: tuple[Any, ...]
) -> None:
    spec = {"name": "web1", "uuid": str(ONE)}
    drive = attach_config_drive(tmp_path, spec, generation=generation)
    assert (drive.controller, drive.number, drive.slot) == place
    assert drive.kind == "dvd"
    assert drive.path.read_bytes()[32769:32774] == b"CD001"
    if sys.platform != "win32":
        assert drive.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TargetError):
        attach_config_drive(tmp_path, spec, generation=generation)
    attach_config_drive(tmp_path, spec, rescue=True)
