"""VHDs against other readers: 7-Zip for differencing disks, libvhdi and qemu-img for the others.

7-Zip looks for a parent in the child's own folder, by the name that the child gives it. qemu-img and libvhdi are
asked about what is right for them: disks without a parent, and for libvhdi children whose bitmaps have no holes
inside a byte.
"""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from pathlib import Path

import pytest

from fixtures import vhd_images
from imagekit import changes
from imagekit.formats.base import DiskImage, ParentLink, Reference, WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.vhd import FORMAT, VhdImage
from tests.disks import content, convert, md5, noise, text
from tests.oracles import need_tool, qemu_img_md5, vhdi_md5
from tests.samples import PARENTS, sample

pytestmark = pytest.mark.oracle

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SIZE = 12 * MiB
DISK = (noise(3 * MiB, 1) + bytes(MiB) + text(3 * MiB + 512, 2)).ljust(SIZE, b"\0")


def seven_zip_md5(path: Path) -> str:
    """MD5 of the guest content of a VHD as 7-Zip reads it."""
    command = [need_tool("7z"), "x", "-tvhd", "-so", str(path)]
    digest = hashlib.md5(usedforsecurity=False)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while piece := process.stdout.read(1 << 20):
            digest.update(piece)
        errors = process.stderr.read().decode(errors="replace")
    assert process.returncode == 0, errors
    return digest.hexdigest()


def beside(path: Path) -> VhdImage:
    """A disk whose parents lie in its folder."""

    def resolve(reference: Reference) -> DiskImage:
        return beside(path.with_name(reference.names[0].rsplit("\\", 1)[-1]))

    return FORMAT.open(LocalFile.open_source(path), resolver=resolve)


def make_parent(path: Path, kind: str = "dynamic", block: int | None = None) -> None:
    options = WriterOptions(uuid.UUID(int=1), kind, block)
    path.write_bytes(convert(MemoryFile(DISK), "raw", "vhd", options=options).data)


def make_child(path: Path, parent: Path, *, block: int | None = None, creator: str | None = None) -> None:
    with beside(parent) as image:
        assert image.identity is not None
        link = ParentLink(image.identity, image.virtual_size, f".\\{parent.name}", f"C:\\disks\\{parent.name}")
        options = WriterOptions(
            uuid.uuid5(uuid.NAMESPACE_URL, path.name), "differencing", block, parent=link, creator=creator
        )
        layout, file = FORMAT.writer(image.virtual_size, options).layout(), MemoryFile()
    file.truncate(layout.file_size)
    for offset, data in layout.metadata():
        file.pwrite(offset, data)
    path.write_bytes(file.data)


def write(path: Path, *writes: tuple[int, bytes]) -> None:
    """What a host does whose guest writes; not by our hand."""
    data = path.read_bytes()
    for at, written in writes:
        data = vhd_images.write(data, at, written)
    path.write_bytes(data)


def apply(path: Path, steps: object, image: DiskImage | None = None) -> None:
    with LocalFile.open_for_change(path) as file:
        changes.apply(steps(file), file, image=image)  # type: ignore[operator]


WRITES = [(512 * at, noise(512 * (at % 9 + 1), at)) for at in range(3, 20000, 1777)]


@pytest.mark.parametrize("name", ["fat-differential.vhd", "win8-child.vhd"])
def test_a_child_that_windows_made_is_read_alike(name: str, tmp_path: Path) -> None:
    for one in (PARENTS[name], name):
        (tmp_path / one).write_bytes(sample(one).read_bytes())
    with beside(tmp_path / name) as image:
        assert md5(content(image)) == seven_zip_md5(tmp_path / name)


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
@pytest.mark.parametrize(("block", "creator"), [(None, None), (512 * KiB, None), (None, "tap")])
def test_a_child_that_we_made_is_read_alike(
    kind: str, block: int | None, creator: str | None, tmp_path: Path
) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    make_parent(parent, kind)
    make_child(child, parent, block=block, creator=creator)
    assert seven_zip_md5(child) == md5(DISK)
    write(child, *WRITES)
    expected = vhd_images.overlaid(DISK, SIZE, WRITES)
    with beside(child) as image:
        assert md5(content(image)) == md5(expected)
    assert seven_zip_md5(child) == md5(expected)


def test_a_child_without_holes_inside_a_byte_is_read_alike_by_libvhdi(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhd", tmp_path / "child.vhd"
    make_parent(parent)
    make_child(child, parent)
    writes = [(4096 * at, noise(4096 * (at % 9 + 1), at)) for at in range(3, 2000, 177)]
    write(child, *writes)
    assert vhdi_md5(child, parent=parent) == seven_zip_md5(child)
    with beside(child) as image:
        assert md5(content(image)) == seven_zip_md5(child)


def test_a_chain_is_read_alike_before_and_after_each_merge(tmp_path: Path) -> None:
    paths = [tmp_path / f"disk{number}.vhd" for number in range(4)]
    make_parent(paths[0], block=512 * KiB)
    expected = [DISK]
    for number in range(1, 4):
        make_child(paths[number], paths[number - 1], block=(512 * KiB, 2 * MiB)[number % 2])
        writes = [((at + number * 65536) % (SIZE - 8192), data) for at, data in WRITES[number::3]]
        write(paths[number], *writes)
        expected.append(vhd_images.overlaid(expected[-1], SIZE, writes))
    for number in (3, 2, 1):
        assert seven_zip_md5(paths[number]) == md5(expected[number])
        with beside(paths[number]) as image:
            apply(paths[number - 1], lambda file, child=image: FORMAT.absorb(file, child), image)
            assert seven_zip_md5(paths[number - 1]) == md5(expected[3])
        expected[number - 1] = expected[3]
    assert qemu_img_md5(paths[0], "vpc") == vhdi_md5(paths[0]) == md5(expected[3])


def test_another_parent_is_found_by_its_new_name(tmp_path: Path) -> None:
    old, new, child = tmp_path / "old.vhd", tmp_path / "new.vhd", tmp_path / "child.vhd"
    make_parent(old)
    make_child(child, old)
    write(child, *WRITES)
    old.rename(new)
    with beside(new) as image:
        assert image.identity is not None
        link = ParentLink(image.identity, SIZE, ".\\new.vhd", "D:\\disks\\new.vhd")
    apply(child, lambda file: FORMAT.rebase(file, link))
    assert seven_zip_md5(child) == md5(vhd_images.overlaid(DISK, SIZE, WRITES))


@pytest.mark.parametrize("block", [None, 512 * KiB, 4 * KiB])
@pytest.mark.parametrize("size", [SIZE + 512, 30 * MiB, 8 * MiB])
def test_a_disk_with_another_size_is_read_alike(block: int | None, size: int, tmp_path: Path) -> None:
    """With small blocks the longer table makes the first of them move."""
    path = tmp_path / "disk.vhd"
    make_parent(path, block=block)
    apply(path, lambda file: FORMAT.resize(file, size))
    expected = DISK[:size].ljust(size, b"\0")
    assert qemu_img_md5(path, "vpc") == md5(expected)
    assert vhdi_md5(path) == md5(expected)
    assert seven_zip_md5(path) == md5(expected)


@pytest.mark.parametrize("size", [SIZE + 512, 40 * MiB, 8 * MiB])
def test_a_fixed_disk_with_another_size_is_read_alike(size: int, tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    make_parent(path, "fixed")
    apply(path, lambda file: FORMAT.resize(file, size))
    expected = DISK[:size].ljust(size, b"\0")
    assert qemu_img_md5(path, "vpc") == vhdi_md5(path) == md5(expected)


def test_a_disk_that_qemu_made_has_the_size_asked_for_afterwards(tmp_path: Path) -> None:
    """Its geometry would count; no geometry gives 40 MiB."""
    path = tmp_path / "disk.vhd"
    qemu_img = need_tool("qemu-img")
    subprocess.run([qemu_img, "create", "-q", "-f", "vpc", path, "10M"], check=True)
    apply(path, lambda file: FORMAT.resize(file, 40 * MiB))
    assert qemu_img_md5(path, "vpc") == md5(bytes(40 * MiB))
    subprocess.run([need_tool("qemu-io"), "-f", "vpc", "-c", "write -P 7 39M 1M", path], check=True)
    with beside(path) as image:
        assert md5(content(image)) == md5(bytes(39 * MiB) + b"\7" * MiB)


def test_a_guest_may_write_to_a_disk_that_grew(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    make_parent(path, block=4 * KiB)
    apply(path, lambda file: FORMAT.resize(file, 30 * MiB))
    command = [need_tool("qemu-io"), "-f", "vpc", "-c", "write -P 5 100k 10k", "-c", "write -P 6 28M 1M", str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    writes = [(100 * KiB, b"\5" * 10 * KiB), (28 * MiB, b"\6" * MiB)]
    with beside(path) as image:
        assert md5(content(image)) == md5(vhd_images.overlaid(DISK, 30 * MiB, writes))
    with LocalFile.open_source(path) as file:
        assert FORMAT.check(file) == []
