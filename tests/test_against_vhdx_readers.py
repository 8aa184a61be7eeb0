"""Against the readers of others: what imagekit writes or changes, and what its tests are made of, is read alike.

Each reader is asked only about what it gets right: qemu-img knows neither parents nor sectors of 4096 bytes, replays
a log only into the file, and not one whose entries have several sectors of descriptors or whose sequence goes on
behind the ring's end; libvhdi and dissect replay none; libvhdi takes a child's zeros for its parent's data, and the
start of the file for a sector bitmap that is not there; 7-Zip refuses disks of an odd number of sectors. 7-Zip looks
for a parent in its child's folder.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures import vhdx_images as made
from fixtures.vhdx_images import PARTIAL, UNMAPPED, ZERO, Block, Recipe
from fixtures.vhdx_logs import Descriptor, Entry, Run, Zeros, rewrite, with_log
from imagekit import changes
from imagekit.formats.base import Change, ParentLink, WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhdx import FORMAT
from imagekit.formats.vhdx_image import VhdxImage
from tests.disks import IDENTIFIER, content, convert, md5, noise, text
from tests.oracles import dissect_md5, need_tool, qemu_img_md5, vhdi_md5
from tests.samples import PARENTS, sample, sample_facts

pytestmark = pytest.mark.oracle

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


# --- readers -----------------------------------------------------------------------------------------------------


def seven_zip_md5(path: Path) -> str:
    """MD5 of the guest content of a VHDX as 7-Zip reads it."""
    command = [need_tool("7z"), "x", "-tvhdx", "-so", str(path)]
    digest = hashlib.md5(usedforsecurity=False)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while piece := process.stdout.read(1 << 20):
            digest.update(piece)
        errors = process.stderr.read().decode(errors="replace")
    assert process.returncode == 0, errors
    return digest.hexdigest()


def qemu(path: Path) -> str:
    """What qemu-img reads, once it has found nothing wrong."""
    check = subprocess.run([need_tool("qemu-img"), "check", "-f", "vhdx", str(path)], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
    return qemu_img_md5(path, "vhdx")


def dissect(path: Path) -> str:
    return dissect_md5(path, "vhdx")


def readers(recipe: Recipe) -> Iterable[Callable[[Path], str]]:
    """Those that read a disk without a parent and without a log rightly."""
    yield vhdi_md5
    yield dissect
    if recipe.sector == 512:
        yield qemu
    if recipe.size // recipe.sector % 2 == 0:
        yield seven_zip_md5


def assert_read_alike(path: Path, recipe: Recipe, expected: bytes) -> None:
    for reader in readers(recipe):
        assert reader(path) == md5(expected), reader


# --- what the tests are made of ----------------------------------------------------------------------------------

BLOCKS = {
    4: Block(data=noise(MiB, 4)),
    0: Block(data=text(MiB, 1)),
    1: Block(state=ZERO),
    3: Block(state=UNMAPPED),
    2: Block(data=noise(MiB, 2)),
}
MADE = {
    "windows": Recipe(size=6 * MiB + 1024, blocks=BLOCKS),
    "odd": Recipe(size=6 * MiB + 512, blocks=BLOCKS),
    "qemu": Recipe(size=6 * MiB, blocks=BLOCKS, layout="qemu"),
    "disk2vhd": Recipe(size=6 * MiB, blocks=BLOCKS, layout="disk2vhd"),
    "fixed": Recipe(size=3 * MiB, blocks={number: Block(data=noise(MiB, number)) for number in range(3)}, fixed=True),
    "large blocks": Recipe(size=12 * MiB, blocks={1: Block(data=noise(8 * MiB, 1))}, block_size=8 * MiB),
    "sectors of 4096": Recipe(size=6 * MiB, blocks=BLOCKS, sector=4096),
    "empty": Recipe(size=64 * MiB),
}


@pytest.mark.parametrize("name", MADE)
def test_the_generators_disks_are_read_alike(name: str, tmp_path: Path) -> None:
    recipe = MADE[name]
    assert_read_alike(made.make(recipe).write(tmp_path / "disk.vhdx"), recipe, made.content(recipe))


def test_blocks_behind_a_sector_bitmap_entry_are_found(tmp_path: Path) -> None:
    """256 MiB blocks: every sixteen have one. Contents of 5 GiB are compared by their few bytes that are not zero."""
    blocks = {number: Block(data=noise(512, number)) for number in (17, 3, 16, 15, 18)}
    recipe = Recipe(size=20 * 256 * MiB, block_size=256 * MiB, blocks=blocks)
    path = made.make(recipe).write(tmp_path / "disk.vhdx")
    for number in (15, 16, 17, 18):
        with LocalFile.open_source(path) as file:
            assert FORMAT.open(file).pread(number * 256 * MiB, 512) == noise(512, number)
        command = ["qemu-io", "-r", "-f", "vhdx", "-c", f"read -v {number * 256}M 512", str(path)]
        shown = subprocess.run(
            [need_tool("qemu-io"), *command[1:]], capture_output=True, text=True, check=True
        ).stdout
        lines = [line.split(":  ")[1].split("  ")[0] for line in shown.splitlines() if ":  " in line]
        assert bytes.fromhex("".join(lines)) == noise(512, number)


SECTORS = random.Random(5)
CHILDREN = {
    "sectors here and there": Block(
        state=PARTIAL, data=noise(MiB, 9), present=frozenset(SECTORS.sample(range(2048), 700))
    ),
    "one sector": Block(state=PARTIAL, data=noise(MiB, 9), present=frozenset({2047})),
    "no sector": Block(state=PARTIAL, data=noise(MiB, 9), present=frozenset()),
    "all": Block(data=noise(MiB, 9)),
    "zeros": Block(state=ZERO),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_the_generators_children_are_read_alike(name: str, tmp_path: Path) -> None:
    parent = replace(MADE["windows"], data_write=b"parent's content")
    child = Recipe(
        size=parent.size, blocks={2: CHILDREN[name], 0: CHILDREN[name]}, parent=made.linked_to(parent.data_write)
    )
    below = made.make(parent).write(tmp_path / "parent.vhdx")
    path = made.make(child).write(tmp_path / "child.vhdx")
    expected = md5(made.content(child, made.content(parent)))
    assert seven_zip_md5(path) == expected
    if name != "zeros":
        assert vhdi_md5(path, parent=below) == expected


PLACES = MADE["windows"].places()
FIRST = PLACES.first_block
LOGGED: dict[str, list[Descriptor]] = {
    "data": [*rewrite(FIRST + 4 * KiB, noise(20 * KiB, 8))],
    "zeros": [Zeros(offset=FIRST + 8 * KiB, length=256 * KiB)],
    "zeros, then data": [Zeros(offset=FIRST, length=64 * KiB), *rewrite(FIRST + 16 * KiB, noise(4 * KiB, 8))],
    "the BAT": [
        *rewrite(
            PLACES.bat, made.make(replace(MADE["windows"], blocks={3: Block(data=b"")})).bytes()[3 * MiB :][:4096]
        )
    ],
}


@pytest.mark.parametrize("around", [False, True], ids=["several entries", "one around the end"])
@pytest.mark.parametrize("name", LOGGED)
def test_qemu_replays_the_generators_logs_as_we_do(name: str, around: bool, tmp_path: Path) -> None:
    entries = [Entry(sequence=7), *(Entry(sequence=8 + at, descriptors=[one]) for at, one in enumerate(LOGGED[name]))]
    start = 0
    if around:
        entries = [Entry(sequence=7), Entry(sequence=8, descriptors=LOGGED[name])]
        start = MiB - 8 * KiB
    recipe = with_log(MADE["windows"], Run(start, entries))
    path = made.make(recipe).write(tmp_path / "disk.vhdx")
    with LocalFile.open_source(path) as file:
        ours = md5(content(FORMAT.open(file)))
    assert ours != md5(made.content(MADE["windows"]))
    repaired = tmp_path / "ours.vhdx"
    repaired.write_bytes(path.read_bytes())
    apply(repaired, FORMAT.repair)
    subprocess.run([need_tool("qemu-img"), "check", "-q", "-r", "all", str(path)], capture_output=True, check=True)
    assert qemu(path) == qemu(repaired) == ours


# --- what is written ---------------------------------------------------------------------------------------------

DISK = (text(MiB, 1) + bytes(3 * MiB) + noise(2 * MiB, 2) + bytes(MiB) + noise(64 * KiB, 3)).ljust(10 * MiB, b"\0")
WRITTEN = {
    "dynamic": WriterOptions(IDENTIFIER),
    "fixed": WriterOptions(IDENTIFIER, "fixed"),
    "blocks of 2 MiB": WriterOptions(IDENTIFIER, block_size=2 * MiB),
    "blocks of 32 MiB": WriterOptions(IDENTIFIER, block_size=32 * MiB),
    "sectors of 4096": WriterOptions(IDENTIFIER, sector_size=4096),
}


@pytest.mark.parametrize("size", [10 * MiB, 10 * MiB - 512, 7 * MiB + 4096])
@pytest.mark.parametrize("name", WRITTEN)
def test_converted_disks_are_read_alike(name: str, size: int, tmp_path: Path) -> None:
    options = WRITTEN[name]
    if size % (options.sector_size or 512):
        size += 512
    path = tmp_path / "disk.vhdx"
    path.write_bytes(convert(MemoryFile(DISK[:size]), "raw", "vhdx", options=options).data)
    assert_read_alike(path, Recipe(size=size, sector=options.sector_size or 512), DISK[:size])


def make_child(path: Path, parent: Path, blocks: dict[int, bytes], *, seed: int = 1) -> None:
    """A differencing disk by our writer."""
    with LocalFile.open_source(parent) as file:
        image = FORMAT.open(file)
        link = ParentLink(image.identity or b"", image.virtual_size, f".\\{parent.name}", disk_id=image.disk_id)
    options = WriterOptions(uuid.UUID(int=seed), "differencing", block_size=MiB, parent=link)
    layout = FORMAT.writer(link.virtual_size, options).layout()
    out = MemoryFile()
    for block, data in blocks.items():
        out.pwrite(layout.place(block), data)
    out.truncate(layout.file_size)
    for offset, data in layout.metadata():
        out.pwrite(offset, data)
    path.write_bytes(out.data)


def test_a_written_child_is_read_on_its_parent(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.vhdx", tmp_path / "child.vhdx"
    parent.write_bytes(convert(MemoryFile(DISK), "raw", "vhdx").data)
    make_child(child, parent, {3: noise(MiB, 7), 1: noise(MiB, 8)})
    expected = DISK[:MiB] + noise(MiB, 8) + DISK[2 * MiB : 3 * MiB] + noise(MiB, 7) + DISK[4 * MiB :]
    assert seven_zip_md5(child) == md5(expected)


# --- what is changed ---------------------------------------------------------------------------------------------


def apply(
    path: Path, change: Callable[[LocalFile], Iterable[Change]], child: VhdxImage | RawImage | None = None
) -> None:
    with LocalFile.open_for_change(path) as file:
        changes.apply(change(file), file, image=child)


RESIZED = [
    *[(name, size) for name in ("windows", "qemu", "disk2vhd", "fixed") for size in (12 * MiB, 6 * MiB + 4096)],
    *[(name, 300 * GiB) for name in ("windows", "qemu", "disk2vhd")],
]


@pytest.mark.parametrize(("name", "size"), RESIZED, ids=[f"{name}-{size // MiB} MiB" for name, size in RESIZED])
def test_resized_disks_are_read_alike(name: str, size: int, tmp_path: Path) -> None:
    recipe = MADE[name]
    path = made.make(recipe).write(tmp_path / "disk.vhdx")
    apply(path, lambda file: FORMAT.resize(file, size))
    if size > GiB:
        # Its content is zeros nobody wants to hash: shrunk again, the BAT stays where it is.
        assert qemu_size(path) == size
        size = 12 * MiB
        apply(path, lambda file: FORMAT.resize(file, size))
    recipe = replace(recipe, size=size)
    assert_read_alike(path, recipe, made.content(MADE[name])[: MADE[name].size].ljust(size, b"\0"))


def qemu_size(path: Path) -> int:
    done = subprocess.run(
        [need_tool("qemu-img"), "info", "--output=json", str(path)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split('"virtual-size": ')[1].split(",")[0])


def test_a_rebased_child_is_read_on_its_new_parent(tmp_path: Path) -> None:
    parent, other, child = (tmp_path / f"{name}.vhdx" for name in ("parent", "other", "child"))
    parent.write_bytes(convert(MemoryFile(DISK), "raw", "vhdx").data)
    second = DISK[::-1]
    options = WriterOptions(uuid.UUID(int=2))
    other.write_bytes(convert(MemoryFile(second), "raw", "vhdx", options=options).data)
    make_child(child, parent, {3: noise(MiB, 7)})
    with LocalFile.open_source(other) as file:
        link = ParentLink(FORMAT.open(file).identity or b"", len(DISK), ".\\other.vhdx", "C:\\VMs\\other.vhdx")
    apply(child, lambda file: FORMAT.rebase(file, link))
    expected = second[: 3 * MiB] + noise(MiB, 7) + second[4 * MiB :]
    assert seven_zip_md5(child) == md5(expected)


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_a_merged_parent_is_read_alike(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "parent.vhdx"
    path.write_bytes(convert(MemoryFile(DISK), "raw", "vhdx", options=WriterOptions(IDENTIFIER, kind)).data)
    blocks = {
        1: Block(state=PARTIAL, data=noise(MiB, 9), present=frozenset(range(3, 2000, 3))),
        4: Block(state=ZERO),
        5: Block(state=PARTIAL, data=noise(MiB, 8), present=frozenset(range(100, 900))),
        7: Block(data=noise(MiB, 7)),
    }
    child = Recipe(size=11 * MiB, blocks=blocks, parent=made.linked_to(bytes(16)))
    image = FORMAT.open(
        MemoryFile(made.make(child).bytes()), resolver=lambda _: RawImage(MemoryFile(DISK), len(DISK))
    )
    apply(path, lambda file: FORMAT.absorb(file, image), image)
    assert_read_alike(path, child, made.content(child, DISK))


def test_a_parent_with_a_parent_is_merged_into_and_read_on_that(tmp_path: Path) -> None:
    grand, parent = tmp_path / "grand.vhdx", tmp_path / "parent.vhdx"
    grand.write_bytes(convert(MemoryFile(DISK), "raw", "vhdx").data)
    make_child(parent, grand, {3: noise(MiB, 7), 5: noise(MiB, 6)})
    below = DISK[: 3 * MiB] + noise(MiB, 7) + DISK[4 * MiB : 5 * MiB] + noise(MiB, 6) + DISK[6 * MiB :]
    some = frozenset(range(100, 900, 7))
    blocks = {number: Block(state=PARTIAL, data=noise(MiB, number), present=some) for number in (0, 3, 9)}
    child = Recipe(size=len(DISK), blocks=blocks, parent=made.linked_to(bytes(16)))
    image = FORMAT.open(
        MemoryFile(made.make(child).bytes()), resolver=lambda _: RawImage(MemoryFile(below), len(below))
    )
    apply(parent, lambda file: FORMAT.absorb(file, image), image)
    expected = md5(made.content(child, below))
    assert seven_zip_md5(parent) == vhdi_md5(parent, parent=grand) == expected


# --- changes of files made by others -----------------------------------------------------------------------------

THEIRS = [
    "fat-parent.vhdx",
    "ntfs-dynamic.vhdx",
    "ext2.vhdx",
    pytest.param("vhdx-log-replay.vhdx", marks=pytest.mark.slow),
    pytest.param("iotest-dynamic-1G.vhdx", marks=pytest.mark.slow),
]


def copied(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_bytes(sample(name).read_bytes())
    return path


@pytest.mark.parametrize("name", THEIRS)
def test_files_of_others_grow_and_keep_their_content(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    with LocalFile.open_source(path) as file:
        before = FORMAT.open(file).virtual_size
    apply(path, lambda file: FORMAT.resize(file, before + 5 * MiB))
    with LocalFile.open_source(path) as file:
        assert FORMAT.check(file) == []
        image = FORMAT.open(file)
        digest = hashlib.md5(usedforsecurity=False)
        for at in range(0, before, 16 * MiB):
            digest.update(image.pread(at, min(16 * MiB, before - at)))
        assert digest.hexdigest() == sample_facts(name).content_md5
        assert not any(image.pread(before, 5 * MiB))
    if before < 64 * MiB:
        whole = qemu_img_md5(path, "vhdx")
        with LocalFile.open_source(path) as file:
            assert md5(content(FORMAT.open(file))) == whole
    else:
        qemu_size(path)


@pytest.mark.slow
def test_a_log_that_windows_left_is_written_back(tmp_path: Path) -> None:
    path = copied("vhdx-log-replay.vhdx", tmp_path)
    apply(path, FORMAT.repair)
    assert qemu(path) == sample_facts("vhdx-log-replay.vhdx").content_md5


def test_a_child_of_windows_is_merged_into_its_parent(tmp_path: Path) -> None:
    name = "fat-differential.vhdx"
    parent, child = copied(PARENTS[name], tmp_path), copied(name, tmp_path)
    with LocalFile.open_source(child) as file, LocalFile.open_source(parent) as below:
        image = FORMAT.open(file, resolver=lambda _: FORMAT.open(below))
        apply(parent, lambda file: FORMAT.absorb(file, image), image)
    expected = sample_facts(name).content_md5
    assert qemu(parent) == seven_zip_md5(parent) == vhdi_md5(parent) == expected


def test_a_child_of_windows_grows_on_its_parent(tmp_path: Path) -> None:
    name = "fat-differential.vhdx"
    parent, child = copied(PARENTS[name], tmp_path), copied(name, tmp_path)
    apply(child, lambda file: FORMAT.resize(file, 9 * MiB))
    with LocalFile.open_source(child) as file, LocalFile.open_source(parent) as below:
        ours = content(FORMAT.open(file, resolver=lambda _: FORMAT.open(below)))
    assert md5(ours[: 4 * MiB]) == sample_facts(name).content_md5
    assert not any(ours[4 * MiB :])
    assert seven_zip_md5(child) == md5(ours)
