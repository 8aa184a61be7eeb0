"""VMDK and VDI against qemu-img and 7-Zip: the same content, the same map, and no image taken that QEMU refuses.

What QEMU wrote is read by us; images made from the specifications alone are read by us, by QEMU and by 7-Zip.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import vdi_images, vmdk_images
from fixtures.vmdk_images import Recipe, descriptor
from imagekit.conversion import convert_image
from imagekit.errors import ImagekitError, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Reference
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.vmdk_stream import read_stream
from imagekit.plan import ConvertOptions
from tests.disks import content, md5, noise, text
from tests.oracles import need_tool, qemu_img_md5

pytestmark = pytest.mark.oracle

KiB, MiB = 1 << 10, 1 << 20
K64 = 64 * KiB


def qemu_img(*arguments: str | Path) -> str:
    done = subprocess.run(
        [need_tool("qemu-img"), *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"qemu-img {arguments}: {done.stderr}"
    return done.stdout


def qemu_refuses(path: Path, format_name: str) -> bool:
    """Whether QEMU cannot open it, or cannot read all of it."""
    out = path.with_suffix(".out")
    command = [need_tool("qemu-img"), "convert", "-f", format_name, "-O", "raw", str(path), str(out)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    out.unlink(missing_ok=True)
    return done.returncode != 0


def seven_zip_md5(path: Path, kind: str) -> str:
    command = [need_tool("7z"), "x", f"-t{kind}", "-so", str(path)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    return hashlib.md5(done.stdout, usedforsecurity=False).hexdigest()


class Beside:
    """A resolver for files in the same folder, which is what a user allows."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, reference: Reference) -> DiskImage:
        file = LocalFile.open_source(self._folder / reference.name)
        return registry.find(reference.format or "raw").open(file, resolver=self)


def opened(path: Path, format_name: str) -> DiskImage:
    return registry.find(format_name).open(LocalFile.open_source(path), resolver=Beside(path.parent))


def said(extents: list[dict[str, object]], *, offsets: bool, flat: bool) -> list[tuple[object, ...]]:
    """Where what is said of the bytes changes, and what is said from there on.

    QEMU calls a hole of the host's file data that is zero; whether it is data counts where the image decides that.
    """
    out: list[tuple[object, ...]] = []
    for extent in extents:
        start, place = extent["start"], extent.get("offset")
        assert isinstance(start, int)
        shift = place - start if offsets and extent["data"] and isinstance(place, int) else None
        what = (extent["zero"] if flat else extent["data"], shift)
        if not out or out[-1][1:] != what:
            out.append((start, *what))
    return out


def assert_read_alike(
    path: Path, format_name: str, expected: bytes, *, offsets: bool = True, flat: bool = False
) -> None:
    """Content and map of an image, as we and QEMU see them."""
    with opened(path, format_name) as image:
        assert md5(content(image)) == md5(expected)
        ours: list[dict[str, object]] = [dict(extent.to_json()) for extent in image.extents()]
    assert qemu_img_md5(path, format_name) == md5(expected)
    theirs = json.loads(qemu_img("map", "--output=json", "-f", format_name, path))
    one, other = (said(extents, offsets=offsets, flat=flat) for extents in (ours, theirs))
    assert one == other


# --- what QEMU writes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A raw disk of all sorts: noise, text, zeros, short pieces, an end inside a grain and inside a block."""
    parts = [
        noise(200 * KiB, 1),
        bytes(312 * KiB),
        text(300 * KiB, 2),
        bytes(4 * MiB + 200 * KiB),
        noise(K64, 3) + bytes(K64) + text(K64, 4) + noise(512, 5) + bytes(K64 - 512),
        bytes(40 * MiB),
        noise(100 * KiB, 6),
        bytes(3 * MiB + 1536),
        text(4096, 7),
    ]
    data = b"".join(parts)
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(data)
    return path, data


VMDK_MADE = [
    "subformat=monolithicSparse",
    "subformat=monolithicSparse,zeroed_grain=on",
    "subformat=monolithicSparse,compat6=on,adapter_type=lsilogic",
    "subformat=streamOptimized",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentSparse,zeroed_grain=on",
    "subformat=twoGbMaxExtentFlat",
]


@pytest.mark.parametrize("how", VMDK_MADE)
def test_a_vmdk_that_qemu_wrote_is_read(how: str, disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", how, disk[0], path)
    one_file = len(list(tmp_path.iterdir())) == 1
    assert_read_alike(path, "vmdk", disk[1], offsets=one_file, flat="Flat" in how)
    with opened(path, "vmdk") as image:
        info = image.info()
        assert info.facts == ()
        assert info.subformat == how.split(",", maxsplit=1)[0].removeprefix("subformat=")
        assert {one.kind for one in info.references} == (set() if one_file else {"extent-file"})
    with LocalFile.open_source(path) as file:
        assert registry.find("vmdk").check(file) == []


def test_a_stream_that_qemu_wrote_is_read_in_one_pass(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", disk[0], path)
    with path.open("rb") as file:
        passing = read_stream(file.read, str(path))
        out = bytearray(passing.virtual_size)
        for offset, grain in passing:
            out[offset : offset + len(grain)] = grain
    assert md5(bytes(out)) == md5(disk[1])


@pytest.mark.parametrize("how", ["static=off", "static=on"])
def test_a_vdi_that_qemu_wrote_is_read(how: str, disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / "disk.vdi"
    qemu_img("convert", "-f", "raw", "-O", "vdi", "-o", how, disk[0], path)
    assert_read_alike(path, "vdi", disk[1])
    with opened(path, "vdi") as image:
        assert image.info().subformat == ("static" if how == "static=on" else "dynamic")
        assert (image.info().facts, image.info().references) == ((), ())
    with LocalFile.open_source(path) as file:
        assert registry.find("vdi").check(file) == []


@pytest.mark.parametrize(
    ("format_name", "how", "size"),
    [
        ("vmdk", "subformat=monolithicSparse", 300 << 30),
        ("vmdk", "subformat=streamOptimized", 70 << 30),
        ("vmdk", "subformat=monolithicSparse", 512),
        ("vdi", "static=off", 3 << 40),
        ("vdi", "static=off", 512),
    ],
)
def test_an_empty_disk_of_any_size_is_all_holes(format_name: str, how: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / f"disk.{format_name}"
    qemu_img("create", "-q", "-f", format_name, "-o", how, path, str(size))
    with opened(path, format_name) as image:
        assert image.virtual_size == size
        assert [(one.length, one.present) for one in image.extents()] == [(size, False)]
    with LocalFile.open_source(path) as file:
        assert registry.find(format_name).check(file) == []


@pytest.mark.parametrize(
    ("format_name", "how"),
    [("vmdk", "subformat=monolithicSparse"), ("vmdk", "subformat=streamOptimized"), ("vdi", "static=off")],
)
def test_a_disk_is_converted(format_name: str, how: str, disk: tuple[Path, bytes], tmp_path: Path) -> None:
    path = tmp_path / f"disk.{format_name}"
    qemu_img("convert", "-f", "raw", "-O", format_name, "-o", how, disk[0], path)
    target = tmp_path / "disk.vhd"
    report = convert_image(path, target, ConvertOptions(sync=False, verify="content"))
    assert (report.source_format, report.verified) == (format_name, "content")
    assert qemu_img_md5(target, "vpc", force_size_calc="current_size") == md5(disk[1])


def test_a_delta_disk_that_qemu_wrote_is_not_read_alone(disk: tuple[Path, bytes], tmp_path: Path) -> None:
    base, delta = tmp_path / "base.vmdk", tmp_path / "delta.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", disk[0], base)
    qemu_img("create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", base, delta)
    with opened(delta, "vmdk") as image:
        assert image.info().references == (Reference("parent-file", str(base), "vmdk"),)
        with pytest.raises(UnsupportedFeature, match="a delta disk"):
            content(image)


# --- what the specifications alone make ------------------------------------------------------------------------

RECIPE = Recipe(
    size=40 * MiB + 1536,
    grains={5: noise(K64, 1), 0: text(K64, 2), 513: noise(K64, 3), 640: text(1536, 4), 7: bytes(K64)},
    grain_sectors=128,
)
ZEROS = dataclasses.replace(RECIPE, grains={**RECIPE.grains, 3: None}, version=2)


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (vmdk_images.hosted, RECIPE),
        (vmdk_images.hosted, ZEROS),
        (vmdk_images.hosted, dataclasses.replace(RECIPE, redundant=False, all_tables=False, version=3)),
        (vmdk_images.hosted, Recipe(40 * MiB, {9: noise(8192), 70: text(8192)}, grain_sectors=16, table_entries=64)),
        (vmdk_images.stream, RECIPE),
        (vmdk_images.stream, dataclasses.replace(ZEROS, version=3)),
        (vmdk_images.qemu_stream, RECIPE),
    ],
)
def test_a_vmdk_from_the_specification_is_read_alike(
    make: Callable[[Recipe], vmdk_images.Vmdk], recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "test.vmdk"
    path.write_bytes(make(recipe).data)
    assert_read_alike(path, "vmdk", recipe.content())


@pytest.mark.parametrize("make", [vmdk_images.hosted, vmdk_images.stream], ids=["hosted", "stream"])
def test_7_zip_reads_what_the_specification_says(make: Callable[[Recipe], vmdk_images.Vmdk], tmp_path: Path) -> None:
    path = tmp_path / "test.vmdk"
    path.write_bytes(make(dataclasses.replace(RECIPE, version=1)).data)
    assert seven_zip_md5(path, "vmdk") == md5(RECIPE.content())


@pytest.mark.parametrize(
    ("kind", "line", "make", "recipe"),
    [
        ("vmfsSparse", "VMFSSPARSE", vmdk_images.cowd, dataclasses.replace(RECIPE, grain_sectors=128)),
        ("vmfsSparse", "VMFSSPARSE", vmdk_images.cowd, Recipe(4099 * 512, {4098: noise(512)}, grain_sectors=1)),
        ("seSparse", "SESPARSE", vmdk_images.sesparse, Recipe(MiB, {3: noise(4096), 9: None}, grain_sectors=8)),
        ("seSparse", "SESPARSE", vmdk_images.sesparse, Recipe(40 * MiB, {5000: noise(4096)}, grain_sectors=8)),
    ],
)
def test_the_sparse_files_of_esx_are_read_alike(
    kind: str, line: str, make: Callable[[Recipe], vmdk_images.Vmdk], recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "part.vmdk").write_bytes(make(recipe).data)
    path = tmp_path / "disk.vmdk"
    path.write_bytes(descriptor(kind, f'RW {recipe.size // 512} {line} "part.vmdk"'))
    assert_read_alike(path, "vmdk", recipe.content(), offsets=False)


def test_a_disk_in_flat_parts_is_read_alike(tmp_path: Path) -> None:
    parts = {"a b-flat.vmdk": noise(5 * K64), "c-flat.vmdk": text(3 * K64)}
    for name, data in parts.items():
        (tmp_path / name).write_bytes(noise(1024, 9) + data)
    path = tmp_path / "disk.vmdk"
    lines = [f'RW {len(data) // 512} FLAT "{name}" 2' for name, data in parts.items()]
    path.write_bytes(descriptor("twoGbMaxExtentFlat", *lines, newline="\r\n"))
    assert_read_alike(path, "vmdk", b"".join(parts.values()), offsets=False, flat=True)


VDI = vdi_images.Recipe(size=9 * MiB + 1536, blocks={4: noise(MiB, 1), 9: text(1536, 2), 0: bytes(MiB), 7: None})


@pytest.mark.parametrize(
    "recipe",
    [
        VDI,
        dataclasses.replace(VDI, spare_blocks=3, data_offset=MiB, header_size=384),
        dataclasses.replace(VDI, image_type=vdi_images.STATIC),
    ],
    ids=["dynamic", "spare blocks", "static"],
)
def test_a_vdi_from_the_layout_is_read_alike(recipe: vdi_images.Recipe, tmp_path: Path) -> None:
    path = tmp_path / "test.vdi"
    path.write_bytes(vdi_images.make(recipe).data)
    assert_read_alike(path, "vdi", recipe.content())
    qemu_img("check", "-f", "vdi", path)
    assert seven_zip_md5(path, "vdi") == md5(recipe.content())


# --- what QEMU refuses, we refuse ------------------------------------------------------------------------------


def we_refuse(path: Path, format_name: str) -> bool:
    try:
        with opened(path, format_name) as image:
            content(image)
    except ImagekitError:
        return True
    return False


SMALL = Recipe(size=5 * 8192, grains={1: noise(8192, 1), 4: text(8192, 2)})
VMDK_POKES = [
    (offset, width, value)
    for offset, width in ((4, 4), (8, 4), (12, 8), (20, 8), (44, 4), (48, 8), (56, 8), (64, 8), (77, 2))
    for value in (0, 1, 0x7F, (1 << (8 * width)) - 1, 1 << (8 * width - 1), 1 << 20)
    if value < 1 << (8 * width)
]


@pytest.mark.parametrize("make", [vmdk_images.hosted, vmdk_images.stream], ids=["hosted", "stream"])
def test_a_vmdk_header_that_qemu_refuses_is_refused(
    make: Callable[[Recipe], vmdk_images.Vmdk], tmp_path: Path
) -> None:
    path, taken = tmp_path / "test.vmdk", []
    for offset, width, value in VMDK_POKES:
        path.write_bytes(make(SMALL).poked(offset, value, width).data)
        with LocalFile.open_source(path) as file:
            size = int.from_bytes(file.pread(12, 8), "little")
        if size > 1 << 20 or we_refuse(path, "vmdk"):
            continue
        if qemu_refuses(path, "vmdk"):
            taken.append((offset, width, value))
    assert taken == []


VDI_POKES = [
    (offset, width, value)
    for offset, width in ((68, 4), (340, 4), (344, 4), (360, 4), (368, 8), (376, 4), (384, 4), (424, 4), (440, 4))
    for value in (0, 1, 512, 4096, 1 << 20, 1 << 31, (1 << (8 * width)) - 1)
]


def test_a_vdi_header_that_qemu_refuses_is_refused(tmp_path: Path) -> None:
    """But for the block size: QEMU reads 1 MiB only, VirtualBox' layout has any."""
    path, taken = tmp_path / "test.vdi", []
    made = vdi_images.make(vdi_images.Recipe(size=2 * MiB, blocks={1: noise(MiB)}))
    for offset, width, value in VDI_POKES:
        path.write_bytes(made.poked(offset, value, width).data)
        if not we_refuse(path, "vdi") and qemu_refuses(path, "vdi"):
            taken.append((offset, value))
    assert [one for one in taken if one[0] != vdi_images.AT_BLOCK_SIZE] == []


@pytest.mark.parametrize("entry", [1, 2], ids=["overlap", "outside"])
def test_a_map_that_qemu_finds_wrong_is_found_wrong(entry: int, tmp_path: Path) -> None:
    made = vdi_images.make(vdi_images.Recipe(size=2 * MiB, blocks={0: noise(MiB), 1: noise(MiB)}))
    path = tmp_path / "test.vdi"
    path.write_bytes(made.poked(made.entry(0), entry).data + bytes(MiB))
    command = [need_tool("qemu-img"), "check", "-f", "vdi", str(path)]
    assert subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 2
    assert registry.find("vdi").check(MemoryFile(path.read_bytes())) != []
