"""The hot path: any disk, from any format to any other, by kernel or by buffer, in any number of threads."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import qcow2_images, vhd_images
from fixtures.qcow2_images import Cluster, Compressed, Plain, Recipe, Zero, make
from imagekit import copying
from imagekit.errors import Cancelled, CorruptImage, TargetError
from imagekit.formats import registry
from imagekit.formats.base import Buffer, DiskImage, File, OpenOptions, WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.qcow2_writer import PackedLayout
from imagekit.formats.raw import RawImage
from imagekit.plan import Chunk, ConversionPlan, build_plan, chunks
from imagekit.progress import SILENT, Control, Progress
from tests.disks import IDENTIFIER, OPTIONS, content, convert, disks, noise, qcow2_recipes, text
from tests.timing import assert_within

KiB, MiB = 1 << 10, 1 << 20

TARGETS = [
    ("raw", OPTIONS),
    ("vhd", OPTIONS),
    ("vhd", WriterOptions(IDENTIFIER, block_size=4 * KiB)),
    ("vhd", WriterOptions(IDENTIFIER, block_size=8 * MiB)),
    ("vhd", WriterOptions(IDENTIFIER, subformat="fixed")),
    ("qcow2", OPTIONS),
    ("qcow2", WriterOptions(IDENTIFIER, block_size=4 * KiB, compression="zlib")),
    ("qcow2", WriterOptions(IDENTIFIER, compression="zstd")),
]
each_target = pytest.mark.parametrize(
    ("target", "options"),
    TARGETS,
    ids=["raw", "vhd", "vhd 4K", "vhd 8M", "vhd fixed", "qcow2", "qcow2 4K zlib", "qcow2 zstd"],
)
ZSTD = WriterOptions(IDENTIFIER, block_size=4 * KiB, compression="zstd")


def plan_for(image: DiskImage, source: str, target: str = "vhd", options: WriterOptions = OPTIONS) -> ConversionPlan:
    return build_plan(image, source_format=source, target_format=target, options=options)


@each_target
@given(recipe=qcow2_recipes(), jobs=st.integers(1, 3))
@settings(max_examples=30)
def test_any_qcow2_becomes_the_same_disk(target: str, options: WriterOptions, recipe: Recipe, jobs: int) -> None:
    file = convert(MemoryFile(make(recipe).data), "qcow2", target, options=options, jobs=jobs)
    assert content(registry.find(target).open(file)) == recipe.content()


@each_target
@given(disk=disks())
@settings(max_examples=30)
def test_any_raw_disk_becomes_the_same_disk(target: str, options: WriterOptions, disk: bytes) -> None:
    file = convert(MemoryFile(disk), "raw", target, options=options)
    assert content(registry.find(target).open(file)) == disk


@each_target
def test_a_vhd_that_another_program_packed_is_laid_out_anew(target: str, options: WriterOptions) -> None:
    blocks = {2: noise(MiB), 0: noise(2 * MiB, 1)}
    source = vhd_images.dynamic(9 * MiB, blocks)
    file = convert(MemoryFile(source), "vhd", target, options=options)
    assert content(registry.find(target).open(file)) == vhd_images.dynamic_content(9 * MiB, blocks)


def test_formats_may_follow_each_other_round_and_round() -> None:
    disk = noise(300 * KiB) + bytes(3 * MiB) + text(MiB)
    file: File = MemoryFile(make(recipe_of(disk)).data)
    for one, other in (("qcow2", "vhd"), ("vhd", "raw"), ("raw", "vhd"), ("vhd", "vhd")):
        file = convert(file, one, other)
        assert content(registry.find(other).open(file)) == disk


def recipe_of(disk: bytes) -> Recipe:
    size = 64 * KiB
    parts = {at: disk[at * size : (at + 1) * size].ljust(size, b"\0") for at in range(-(-len(disk) // size))}
    return Recipe(
        size=len(disk),
        clusters={at: (Compressed if at % 2 else Plain)(part) for at, part in parts.items() if any(part)},
    )


def test_the_same_disk_gives_the_same_bytes_whatever_it_was_before(tmp_path: Path) -> None:
    """Sparse, dense, qcow2 or VHD: the target depends on the content alone."""
    disk = bytes(2 * MiB) + noise(3 * MiB) + bytes(4 * MiB) + text(64 * KiB)
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as out:
        for at in range(0, len(disk), 64 * KiB):
            if any(disk[at : at + 64 * KiB]):
                out.seek(at)
                out.write(disk[at : at + 64 * KiB])
        out.truncate(len(disk))
    expected = convert(MemoryFile(disk), "raw", "vhd").data
    with LocalFile.open_source(sparse) as file:
        assert convert(file, "raw", "vhd", jobs=3).data == expected
    assert convert(MemoryFile(make(recipe_of(disk)).data), "qcow2", "vhd", jobs=2).data == expected
    blocks = {4: disk[8 * MiB :], 1: disk[2 * MiB : 4 * MiB], 2: disk[4 * MiB : 6 * MiB], 3: bytes(2 * MiB)}
    assert convert(MemoryFile(vhd_images.dynamic(len(disk), blocks)), "vhd", "vhd").data == expected


# --- blocks and their bitmaps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2 * MiB, 4 * MiB, 8 * MiB])
@pytest.mark.parametrize("at", [0, MiB, 3 * MiB, 7 * MiB])
def test_every_block_has_its_whole_bitmap_wherever_its_data_begins(block: int, at: int) -> None:
    """Other readers take a clear bit for zeros. Large blocks are copied in chunks, and the first may have no data."""
    size = 64 * KiB
    made = make(Recipe(size=16 * MiB, clusters={at // size: Compressed(text(size)), 200: Plain(noise(size))}))
    options = WriterOptions(IDENTIFIER, block_size=block)
    file = convert(MemoryFile(made.data), "qcow2", "vhd", options=options)
    image = registry.find("vhd").open(file)
    bits = vhd_images.bitmap_length(block)
    offsets = [one.offset for one in image.extents() if one.present and one.offset is not None]
    starts = {offset - (one.start % block) for one in image.extents() if (offset := one.offset) is not None}
    assert offsets
    for start in starts:
        assert file.pread(start - bits, bits) == b"\xff" * bits


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX holes")
def test_zeros_inside_a_block_take_no_room(tmp_path: Path) -> None:
    size = 64 * KiB
    clusters: dict[int, Cluster] = {0: Plain(noise(size)), 5: Zero(noise(size)), 31: Plain(noise(size, 1))}
    source = MemoryFile(make(Recipe(size=2 * MiB, clusters=clusters)).data)
    image = registry.find("qcow2").open(source)
    plan = plan_for(image, "qcow2")
    with (tmp_path / "target").open("w+b") as out, LocalFile(os.dup(out.fileno()), "target") as target:
        result = copying.copy_image(plan, image, source, target)
        assert (result.data_bytes, result.kernel_copied_bytes) == (2 * size, 0)
        assert target.size == plan.file_size
        assert target.allocated_size < MiB


# --- by the kernel or by buffer --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="copy_file_range")
def test_what_lies_unencoded_is_copied_by_the_kernel_and_the_rest_is_not(tmp_path: Path) -> None:
    size = 64 * KiB
    clusters: dict[int, Cluster] = {at: Plain(noise(size, at)) for at in range(40)}
    clusters |= {at: Compressed(text(size, at)) for at in range(64, 70)}
    source_path, target_path = tmp_path / "source", tmp_path / "target"
    recipe = Recipe(size=8 * MiB, clusters=clusters)
    source_path.write_bytes(make(recipe).data)
    target_path.touch()
    with LocalFile.open_source(source_path) as source, LocalFile.open_for_change(target_path) as target:
        image = registry.find("qcow2").open(source)
        result = copying.copy_image(plan_for(image, "qcow2"), image, source, target, jobs=2)
        assert result.data_bytes == 46 * size
        assert result.kernel_copied_bytes in (40 * size, 0)  # 0: this kernel or file system cannot
        assert content(registry.find("vhd").open(target)) == recipe.content()


@pytest.mark.parametrize("limit", [0, 1, 4096, 100_000])
def test_where_the_kernel_stops_the_buffer_goes_on(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may stop anywhere: at a file system's border, or because it does not feel like it."""

    def some(source: File, offset: int, target: File, target_offset: int, length: int) -> int:
        count = min(limit, length)
        target.pwrite(target_offset, source.pread(offset, count))
        return count

    monkeypatch.setattr(copying, "kernel_copy", some)
    size = 64 * KiB
    recipe = Recipe(size=4 * MiB, clusters={at: Plain(noise(size, at)) for at in (0, 1, 2, 7, 9, 40)})
    file = convert(MemoryFile(make(recipe).data), "qcow2", "vhd")
    assert content(registry.find("vhd").open(file)) == recipe.content()


@pytest.mark.parametrize("target", ["vhd", "vhdx"])
@pytest.mark.parametrize("limit", [0, 3 * MiB, 64 * MiB])
def test_a_task_may_hold_more_than_is_read_in_one_go(
    limit: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies side by side goes to the kernel at once; where part of it is compressed, or it stops, pieces are."""
    asked: list[int] = []

    def some(source: File, offset: int, target: File, target_offset: int, length: int) -> int:
        asked.append(length)
        count = min(limit, length)
        target.pwrite(target_offset, source.pread(offset, count))
        return count

    monkeypatch.setattr(copying, "kernel_copy", some)
    size, total = 1 << 20, 48
    clusters: dict[int, Cluster] = {at: Plain(noise(size, at)) for at in range(total)}
    clusters[30] = Compressed(text(size, 30))
    recipe = Recipe(size=total * size, clusters=clusters, cluster_bits=20)
    file = convert(MemoryFile(make(recipe).data), "qcow2", target, jobs=1)
    assert content(registry.find(target).open(file)) == recipe.content()
    assert max(asked) == (2 * MiB if target == "vhd" else 12 * MiB)


def test_a_chunk_in_many_pieces_is_read_and_written_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system call a piece would cost more than the copy."""
    calls: list[object] = []

    def count(*arguments: object) -> int:
        calls.append(arguments)
        return 0

    monkeypatch.setattr(copying, "kernel_copy", count)
    size = 4 * KiB
    clusters = {at: Plain(noise(size, at)) for at in range(0, 100, 2)}
    recipe = Recipe(size=MiB, clusters=clusters, cluster_bits=12)
    file = convert(MemoryFile(make(recipe).data), "qcow2", "vhd")
    assert calls == []
    assert content(registry.find("vhd").open(file)) == recipe.content()


# --- tasks -----------------------------------------------------------------------------------------------------


def tasks_of(disk: bytes, target: str, options: WriterOptions) -> list[Chunk]:
    plan = plan_for(RawImage(MemoryFile(disk), len(disk)), "raw", target, options)
    return list(chunks(plan, plan.layout()))


def test_small_blocks_side_by_side_are_one_task() -> None:
    """A task a cluster of 64 KiB would cost more than its copy."""
    disk = noise(5 * MiB) + bytes(MiB) + noise(100 * KiB)
    tasks = tasks_of(disk, "qcow2", OPTIONS)
    assert [(task.start, task.length) for task in tasks] == [
        (0, 2 * MiB),
        (2 * MiB, 2 * MiB),
        (4 * MiB, MiB),
        (6 * MiB, 100 * KiB),
    ]
    first = tasks[0].target
    assert [task.target - first for task in tasks] == [0, 2 * MiB, 4 * MiB, 5 * MiB]


def test_blocks_with_something_between_them_are_a_task_each() -> None:
    tasks = tasks_of(noise(64 * KiB), "vhd", WriterOptions(IDENTIFIER, block_size=4 * KiB))
    assert [(task.length, task.first_of_block) for task in tasks] == [(4 * KiB, True)] * 16


@given(st.permutations(range(12)), st.integers(1, 12))
def test_only_blocks_that_lie_side_by_side_in_the_target_are_one_task(order: list[int], count: int) -> None:
    """A layout may have placed some of them before, wherever it liked."""
    disk = noise(12 * 512)
    options = WriterOptions(IDENTIFIER, block_size=512)
    plan = plan_for(RawImage(MemoryFile(disk), len(disk)), "raw", "qcow2", options)
    layout = dataclasses.replace(plan, blocks=()).layout()
    for block in order[:count]:
        layout.place(block)
    tasks = list(chunks(plan, layout))
    assert [at for task in tasks for at in range(task.start, task.start + task.length, 512)] == [
        block * 512 for block in range(12)
    ]
    for task in tasks:
        blocks = range(task.start // 512, (task.start + task.length) // 512)
        places = [layout.place(block) for block in blocks]
        assert places == [task.target + at * 512 for at in range(len(places))]
    assert all(
        one.target + one.length != other.target for one, other in itertools.pairwise(tasks)
    )  # nothing more could be joined


# --- encoded ---------------------------------------------------------------------------------------------------


def encoded_copy(disk: bytes, target: File, *, jobs: int, control: Control = SILENT) -> copying.CopyResult:
    image = RawImage(MemoryFile(disk), len(disk))
    return copying.copy_image(
        plan_for(image, "raw", "qcow2", ZSTD), image, image.file, target, jobs=jobs, control=control
    )


def mixed(pieces: int) -> bytes:
    """Chunks that take different times to encode, and blocks that are stored in every way."""
    kinds = (noise(256 * KiB), text(256 * KiB), bytes(256 * KiB), noise(5000) + bytes(251 * KiB) + b"x" * 120)
    return b"".join(kinds[at * 7 % 4][: 256 * KiB - at % 3 * 512] for at in range(pieces))


def test_the_file_is_the_same_whatever_thread_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = mixed(90)
    expected = MemoryFile()
    encoded_copy(disk, expected, jobs=1)
    encode, chance = PackedLayout.encode, random.Random(1)

    def slowly(self: PackedLayout, data: Buffer) -> Buffer:
        if chance.random() < 0.02:
            time.sleep(0.005)
        return encode(self, data)

    monkeypatch.setattr(PackedLayout, "encode", slowly)
    for jobs in (2, 3, 8):
        target = MemoryFile()
        encoded_copy(disk, target, jobs=jobs)
        assert target.data == expected.data
    assert content(registry.find("qcow2").open(expected)) == disk


def test_neighbours_in_the_target_are_written_by_one_call() -> None:
    calls: list[tuple[int, int]] = []

    class Watched(MemoryFile):
        def pwrite(self, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
            calls.append((offset, len(buffers)))
            super().pwrite(offset, *buffers)

    encoded_copy(text(4 * MiB), Watched(), jobs=1)
    assert [count for _, count in calls[:2]] == [512, 512]


@pytest.mark.parametrize("jobs", [1, 2, 6])
@pytest.mark.parametrize("step", ["encode", "add"])
def test_a_thread_that_fails_leaves_none_waiting_for_its_turn(
    step: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    real = getattr(PackedLayout, step)

    def fails(self: PackedLayout, *arguments: object) -> object:
        if next(calls) == 1500:
            raise CorruptImage("on purpose")
        return real(self, *arguments)

    monkeypatch.setattr(PackedLayout, step, fails)
    before = threading.active_count()
    with pytest.raises(CorruptImage, match="on purpose"):
        encoded_copy(text(20 * MiB), MemoryFile(), jobs=jobs)
    assert threading.active_count() == before


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_source_damaged_on_the_way_stops_an_encoding_copy_with_its_error(jobs: int) -> None:
    size = 64 * KiB
    clusters: dict[int, Cluster] = {at: Compressed(text(size, at)) for at in range(150)}
    clusters[100] = Compressed(b"", stream=b"\xff" * 100)
    source = MemoryFile(make(Recipe(size=150 * size, clusters=clusters)).data)
    before = threading.active_count()
    with pytest.raises(CorruptImage, match="guest bytes from 0x640000"):
        convert(source, "qcow2", "qcow2", options=ZSTD, jobs=jobs)
    assert threading.active_count() == before


def test_a_full_target_stops_an_encoding_copy_with_its_error() -> None:
    class Full(MemoryFile):
        def pwrite(self, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
            if offset > 4 * MiB:
                raise TargetError("cannot be written: No space left on device")
            super().pwrite(offset, *buffers)

    with pytest.raises(TargetError, match="No space left"):
        encoded_copy(noise(16 * MiB), Full(), jobs=3)


def test_an_encoding_copy_stops_soon_when_asked_and_leaves_no_thread() -> None:
    disk = text(100 * MiB)
    image = Slow(MemoryFile(disk), len(disk))
    plan = plan_for(RawImage(MemoryFile(disk), len(disk)), "raw", "qcow2", ZSTD)
    cancel, before = threading.Event(), threading.active_count()

    def ask(progress: Progress) -> None:
        if progress.done:
            cancel.set()

    with pytest.raises(Cancelled):
        copying.copy_image(plan, image, image.file, MemoryFile(), jobs=2, control=Control(ask, cancel))
    assert threading.active_count() == before


def test_progress_of_an_encoding_copy_ends_with_all_of_it() -> None:
    told: list[Progress] = []
    disk = noise(5 * MiB + 512)
    encoded_copy(disk, MemoryFile(), jobs=2, control=Control(told.append))
    assert told[-1] == Progress("copy", len(disk), len(disk))


# --- stopping --------------------------------------------------------------------------------------------------


def test_a_source_that_is_damaged_on_the_way_stops_all_threads_with_its_error() -> None:
    size = 64 * KiB
    clusters: dict[int, Cluster] = {at: Compressed(text(size, at)) for at in range(300)}
    clusters[250] = Compressed(b"", stream=b"\xff" * 100)
    source = MemoryFile(make(Recipe(size=300 * size, clusters=clusters)).data)
    before = threading.active_count()
    with pytest.raises(CorruptImage, match="guest bytes from 0xfa0000"):
        convert(source, "qcow2", "vhd", jobs=4)
    assert threading.active_count() == before


def test_a_target_that_is_full_stops_the_copy_with_its_error() -> None:
    class Full(MemoryFile):
        def pwrite(self, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
            if offset > 4 * MiB:
                raise TargetError("cannot be written: No space left on device")
            super().pwrite(offset, *buffers)

    image = RawImage(MemoryFile(noise(16 * MiB)), 16 * MiB)
    with pytest.raises(TargetError, match="No space left"):
        copying.copy_image(plan_for(image, "raw"), image, image.file, Full(), jobs=3)


class Slow(RawImage):
    """A disk that takes 20 ms for each piece of it."""

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.02)
        super().pread_into(offset, buffer)


def test_a_copy_stops_soon_when_asked_and_leaves_no_thread() -> None:
    disk = noise(MiB) * 100
    image = Slow(MemoryFile(disk), len(disk))
    plan = plan_for(RawImage(MemoryFile(disk), len(disk)), "raw")
    before = threading.active_count()

    def stopped() -> float:
        cancel, asked = threading.Event(), list[float]()

        def ask(progress: Progress) -> None:
            if progress.done and not asked:
                asked.append(time.monotonic())
                cancel.set()

        with pytest.raises(Cancelled):
            copying.copy_image(plan, image, image.file, MemoryFile(), jobs=2, control=Control(ask, cancel))
        assert threading.active_count() == before
        return time.monotonic() - asked[0]

    assert_within(0.25, stopped)


def test_progress_ends_with_all_of_it() -> None:
    told: list[Progress] = []
    image = RawImage(MemoryFile(noise(5 * MiB)), 5 * MiB)
    plan = plan_for(image, "raw")
    copying.copy_image(plan, image, image.file, MemoryFile(), control=Control(told.append))
    assert told[-1] == Progress("copy", 5 * MiB, 5 * MiB)
    assert [one.done for one in told] == sorted(one.done for one in told)


def test_an_error_of_the_callers_own_callback_reaches_the_caller() -> None:
    def broken(_: Progress) -> None:
        raise ZeroDivisionError

    image = RawImage(MemoryFile(noise(5 * MiB)), 5 * MiB)
    plan = plan_for(image, "raw")
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        copying.copy_image(plan, image, image.file, MemoryFile(), control=Control(broken))
    assert threading.active_count() == before


def test_a_plan_and_two_open_files_are_all_that_is_needed() -> None:
    """Nothing is opened, probed or decided: so it can run in a process that may do none of it."""
    disk = noise(3 * MiB)
    source = MemoryFile(qcow2_images.make(recipe_of(disk)).data)
    image = registry.find("qcow2").open(source)
    plan, target = plan_for(image, "qcow2"), MemoryFile()
    copying.run(plan, source, target)
    assert content(registry.find("vhd").open(target)) == disk
    assert target.data == convert(source, "qcow2", "vhd").data


def test_a_plan_for_a_snapshot_is_carried_out_with_that_snapshot() -> None:
    then = qcow2_images.Snapshot("1", "then", {0: Plain(text(64 * KiB))})
    recipe = Recipe(size=128 * KiB, clusters={1: Plain(noise(64 * KiB))}, snapshots=(then,))
    source, view = MemoryFile(make(recipe).data), OpenOptions(snapshot="then")
    plan, target = plan_for(registry.find("qcow2").open(source, options=view), "qcow2"), MemoryFile()
    copying.run(plan, source, target, view=view)
    assert content(registry.find("vhd").open(target)) == recipe.content(then)


def test_metadata_comes_after_the_blocks() -> None:
    """A file that is cut off in the middle has no header that says it is whole."""
    order: list[int] = []

    class Watched(MemoryFile):
        def pwrite(self, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
            order.append(offset)
            super().pwrite(offset, *buffers)

    image = RawImage(MemoryFile(noise(5 * MiB)), 5 * MiB)
    plan = dataclasses.replace(plan_for(image, "raw"))
    copying.copy_image(plan, image, image.file, Watched(), jobs=1)
    assert order.index(0) > max(order.index(one) for one in order if 4096 <= one < plan.file_size - 512)
