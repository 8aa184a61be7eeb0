"""The plan: what will be written, decided by content and before a byte is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.qcow2_images import Cluster, Compressed, Plain, Recipe, Zero, make
from imagekit.errors import Cancelled, UnsupportedFeature, UsageError
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Extent, WriterOptions
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.plan import (
    CHUNK,
    TASK,
    ConversionPlan,
    ConvertOptions,
    build_plan,
    chunks,
    data_parts,
    find_blocks,
    target_size,
    tasks,
)
from imagekit.progress import Control, Progress
from tests.disks import IDENTIFIER, OPTIONS, disks, noise, text
from tests.timing import assert_within

MiB, GiB = 1 << 20, 1 << 30


def plan_of(
    data: bytes, *, target: str = "vhd", options: WriterOptions = OPTIONS, size: int | None = None
) -> ConversionPlan:
    image = RawImage(MemoryFile(data), len(data))
    virtual_size, notes = target_size(image.virtual_size, size)
    return build_plan(
        image,
        source_format="raw",
        target_format=target,
        options=options,
        virtual_size=virtual_size,
        notes=notes,
    )


def blocks_of(data: bytes, block: int) -> list[int]:
    """The blocks that hold anything, by looking at every byte."""
    return [at for at in range(-(-len(data) // block)) if any(data[at * block : (at + 1) * block])]


def spread(runs: Iterator[tuple[int, int]] | tuple[tuple[int, int], ...]) -> list[int]:
    return [first + at for first, count in runs for at in range(count)]


# --- which blocks ----------------------------------------------------------------------------------------------


@given(disks(), st.sampled_from([512, 1024, 4096, 16384]))
def test_the_blocks_are_those_with_anything_in_them(data: bytes, block: int) -> None:
    image = RawImage(MemoryFile(data), len(data))
    runs = list(find_blocks(image, block))
    assert spread(tuple(runs)) == blocks_of(data, block)
    assert all(one[0] + one[1] < other[0] for one, other in itertools.pairwise(runs))


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 300_000, 2 * MiB - 1])
def test_one_byte_anywhere_in_a_block_is_found(at: int) -> None:
    data = bytearray(6 * MiB)
    data[2 * MiB + at] = 1
    assert list(find_blocks(RawImage(MemoryFile(data), len(data)), 2 * MiB)) == [(1, 1)]


def test_a_sparse_and_a_dense_copy_make_the_same_plan(tmp_path: Path) -> None:
    """Whether zeros take room on the host is not part of the image."""
    content = bytes(3 * MiB) + noise(MiB) + bytes(5 * MiB)
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dense.write_bytes(content)
    with sparse.open("wb") as out:
        out.seek(3 * MiB)
        out.write(noise(MiB))
        out.truncate(len(content))
    plans = []
    for path in (dense, sparse):
        with LocalFile.open_source(path) as file:
            image = registry.find("raw").open(file)
            plans.append(build_plan(image, source_format="raw", target_format="vhd", options=OPTIONS))
    assert plans[0] == plans[1]
    assert plans[0].blocks == ((1, 1),)


def test_compressed_clusters_count_as_data_and_plain_zeros_do_not() -> None:
    size = 1 << 16
    clusters: dict[int, Cluster] = {
        0: Compressed(bytes(size)),
        40: Plain(bytes(size)),
        80: Zero(noise(size)),
        120: Plain(text(size)),
    }
    image = registry.find("qcow2").open(MemoryFile(make(Recipe(size=200 * size, clusters=clusters)).data))
    assert list(find_blocks(image, 32 * size)) == [(0, 1), (3, 1)]


@given(disks(unit=4096), st.sampled_from([4096, 8192, 65536]), st.integers(0, 5))
def test_the_chunks_are_the_blocks_each_byte_once(data: bytes, block: int, grown: int) -> None:
    size = len(data) + grown * 4096
    plan = plan_of(data, options=WriterOptions(IDENTIFIER, block_size=block), size=size)
    layout = plan.layout()
    tasks = list(chunks(plan, layout))
    assert all(0 < task.length <= CHUNK for task in tasks)
    covered = [(task.start + at) for task in tasks for at in range(0, task.length, 512)]
    wanted = [
        at for one in blocks_of(data, block) for at in range(one * block, min((one + 1) * block, len(data)), 512)
    ]
    assert covered == wanted
    assert sum(task.length for task in tasks) == plan.data_bytes
    assert all(task.target == layout.place(task.start // block) + task.start % block for task in tasks)
    assert [task.start // block for task in tasks if task.first_of_block] == blocks_of(data, block)


@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.sampled_from(["vhd", "vhdx"]),
    st.sampled_from([1, 2, 16]),
)
def test_tasks_are_the_same_parts_few_for_each_thread(used: list[bool], target: str, jobs: int) -> None:
    """Of a VHD, whose blocks lie apart, several make a task; of a VHDX, what lies side by side is one part."""
    data = b"".join(b"x" + bytes(MiB - 1) if one else bytes(MiB) for one in used)
    plan = plan_of(data, options=WriterOptions(IDENTIFIER, block_size=MiB), target=target)
    layout = plan.layout()
    found = list(tasks(plan, layout, jobs))
    small = [part for task in found for chunk in task for part in chunk.parts()]
    assert [(part.start + at, part.target + at) for part in small for at in range(0, part.length, MiB)] == [
        (block * MiB, layout.place(block)) for block, one in enumerate(used) if one
    ]
    sizes = [sum(chunk.length for chunk in task) for task in found]
    assert all(0 < size <= TASK for size in sizes) and all(part.length <= CHUNK for part in small)
    if sum(used) >= 8 * jobs:
        assert len(found) >= 4 * jobs
    if all(used) and len(used) > 16 and jobs == 1:
        assert len(found) <= len(used) // 3


def test_blocks_larger_than_a_chunk_are_copied_in_chunks() -> None:
    plan = plan_of(bytes(3 * MiB) + noise(6 * MiB), options=WriterOptions(IDENTIFIER, block_size=8 * MiB))
    tasks = list(chunks(plan, plan.layout()))
    assert [(task.start, task.length, task.first_of_block) for task in tasks] == [
        (0, 2 * MiB, True),
        (2 * MiB, 2 * MiB, False),
        (4 * MiB, 2 * MiB, False),
        (6 * MiB, 2 * MiB, False),
        (8 * MiB, MiB, True),
    ]


def test_parts_with_data_are_joined_whatever_their_kind() -> None:
    extents = [
        Extent(0, 10, data=True, zero=False, offset=5),
        Extent(10, 10, data=True, zero=False, compressed=True),
        Extent(20, 10, data=False, zero=True),
        Extent(30, 10, data=True, zero=False, offset=0),
        Extent(40, 5, data=False, zero=True),
    ]
    assert list(data_parts(iter(extents))) == [(0, 20), (30, 10)]
    assert list(data_parts(iter([]))) == []


# --- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wanted", "expected", "note"),
    [
        (1024, None, 1024, None),
        (1000, None, 1024, "size rounded up from 1000 to 1024 bytes"),
        (1024, 4096, 4096, "disk grown from 1024 to 4096 bytes"),
        (1024, 1024, 1024, None),
        (1024, 1025, 1536, "size rounded up from 1025 to 1536 bytes"),
        (1000, 1000, 1024, "size rounded up from 1000 to 1024 bytes"),
    ],
)
def test_sizes_are_rounded_up_to_sectors_and_it_is_said(
    source: int, wanted: int | None, expected: int, note: str | None
) -> None:
    assert target_size(source, wanted) == (expected, () if note is None else (note,))


def test_a_disk_does_not_shrink() -> None:
    with pytest.raises(UsageError, match="size 1023 is smaller than the disk's 1024 bytes"):
        target_size(1024, 1023)


def test_a_disk_without_bytes_is_not_converted() -> None:
    with pytest.raises(UsageError, match="no bytes at all"):
        target_size(0, None)
    assert target_size(0, 512) == (512, ("disk grown from 0 to 512 bytes",))


@pytest.mark.parametrize(("target", "size"), [("raw", 9 * MiB), ("vhd", 0x1E00 + 2 * 0x201000 + 512)])
def test_the_size_of_the_finished_file_is_known_before_a_byte_is_written(target: str, size: int) -> None:
    plan = plan_of(bytes(3 * MiB) + noise(2 * MiB), target=target, size=9 * MiB)
    assert (plan.virtual_size, plan.file_size, plan.layout().file_size) == (9 * MiB, size, size)


def test_a_target_that_cannot_be_is_refused_before_the_source_is_read() -> None:
    class Unread(RawImage):
        def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
            raise AssertionError("the source was read")

    with pytest.raises(UnsupportedFeature, match="2040 GiB"):
        build_plan(Unread(MemoryFile(), 2041 * GiB), source_format="raw", target_format="vhd", options=OPTIONS)


# --- the plan as data ------------------------------------------------------------------------------------------


def test_a_plan_is_frozen_and_goes_to_another_process() -> None:
    plan = plan_of(noise(3 * MiB))
    assert pickle.loads(pickle.dumps(plan)) == plan
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.blocks = ()  # type: ignore[misc]


def test_a_plan_is_json() -> None:
    plan = plan_of(bytes(2 * MiB) + noise(3 * MiB), size=9 * MiB)
    again = json.loads(json.dumps(plan.to_json()))
    assert again["blocks"] == [[1, 2]]
    assert again["writer-options"]["identifier"] == str(IDENTIFIER)
    assert (again["virtual-size"], again["file-size"]) == (9 * MiB, plan.file_size)
    assert again["notes"] == ["disk grown from 5242880 to 9437184 bytes"]


def test_a_layout_made_twice_is_the_same() -> None:
    plan = plan_of(noise(3 * MiB))
    assert list(plan.layout().metadata()) == list(plan.layout().metadata())


@pytest.mark.parametrize(
    "options", [{"verify": "maybe"}, {"jobs": 0}, {"jobs": -1}, {"size": 0}, {"size": -512}], ids=str
)
def test_options_that_make_no_sense_are_refused_when_they_are_made(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ConvertOptions(**options)  # type: ignore[arg-type]


def test_options_go_to_another_process() -> None:
    options = ConvertOptions(identifier=IDENTIFIER, allow=frozenset({"in-use"}), size=512)
    assert pickle.loads(pickle.dumps(options)) == options


# --- progress and stopping -------------------------------------------------------------------------------------


def test_planning_tells_how_far_it_is_also_over_zeros() -> None:
    told: list[Progress] = []
    image = RawImage(MemoryFile(bytes(200 * MiB)), 200 * MiB)
    assert list(find_blocks(image, 2 * MiB, control=Control(told.append))) == []
    assert [one.phase for one in told] == ["plan"] * len(told)
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert len(told) >= 3
    assert told[-1] == Progress("plan", 200 * MiB, 200 * MiB)


class Slow(RawImage):
    """A disk of zeros that takes its time: a GiB would take minutes."""

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.01)
        buffer[:] = bytes(len(buffer))

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        yield Extent(0, self.virtual_size, data=True, zero=False, offset=0)


def test_planning_over_a_slow_disk_of_zeros_stops_at_once_when_asked() -> None:
    image: DiskImage = Slow(MemoryFile(), GiB)

    def stopped() -> float:
        cancel = threading.Event()
        timer = threading.Timer(0.05, cancel.set)
        timer.start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            list(find_blocks(image, 2 * MiB, control=Control(cancel=cancel)))
        took = time.monotonic() - started
        timer.join()
        return took

    assert_within(0.3, stopped)
