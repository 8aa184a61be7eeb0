"""Chains of VHDs in memory: made, opened, and what may be left of one whose change in place is cut short."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence

from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit import changes
from imagekit.formats.base import Barrier, Change, DiskImage, ParentLink, Reference, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage, ZeroImage
from imagekit.formats.vhd import FORMAT, VhdImage
from tests.disks import content, noise

KiB = 1 << 10
BLOCK = 4 * KiB
XEN_0_1 = vhd_images.Footer(size=0, disk_type=4, creator=b"tap\0", creator_version=1)
SPOILED_BY_A_CRASH = {"footer-missing"}
"""All that a check may find in a file whose change was cut short."""


def raw(data: bytes) -> RawImage:
    return RawImage(MemoryFile(data), len(data))


def over(data: bytes, parent: DiskImage) -> VhdImage:
    return FORMAT.open(MemoryFile(data), resolver=lambda _: parent)


def link_to(parent: MemoryFile, name: str = "parent.vhd", *, absolute: bool = True) -> ParentLink:
    image = FORMAT.open(parent)
    return ParentLink(image.identity, image.virtual_size, f".\\{name}", f"C:\\disks\\{name}" if absolute else None)


def empty(size: int, options: WriterOptions) -> MemoryFile:
    """A new disk without any block."""
    layout, file = FORMAT.writer(size, options).layout(), MemoryFile()
    file.truncate(layout.file_size)
    for offset, data in layout.metadata():
        file.pwrite(offset, data)
    return file


def child_of(parent: MemoryFile, number: int = 1, block: int | None = None, creator: str | None = None) -> MemoryFile:
    """A new child of the disk in ``parent``, as imagekit writes it."""
    options = WriterOptions(uuid.UUID(int=number), "differencing", block, parent=link_to(parent), creator=creator)
    return empty(FORMAT.open(parent).virtual_size, options)


@dataclasses.dataclass(frozen=True)
class Child:
    """A differencing disk, its parent's content, and what a guest reads of the two; shown by how it was made."""

    data: bytes = dataclasses.field(repr=False)
    below: bytes = dataclasses.field(repr=False)
    content: bytes = dataclasses.field(repr=False)
    how: object


@st.composite
def children(draw: st.DrawFn, *, smaller: bool = True) -> Child:
    """Blocks of all sizes, runs of sectors in any order, parents that end before, with and behind the child."""
    block = draw(st.sampled_from([512, BLOCK, 64 * KiB]))
    sectors = draw(st.integers(1, 6 * block // 512))
    below = noise(draw(st.integers(0 if smaller else sectors, sectors + 20)) * 512, 1)
    xen = draw(st.booleans())
    footer = dataclasses.replace(XEN_0_1, size=sectors * 512) if xen else None
    data = vhd_images.differencing(
        sectors * 512, "p.vhd", block_size=block, footer=footer, spare_entries=draw(st.sampled_from([0, 100]))
    )
    runs = draw(st.lists(st.tuples(st.integers(0, sectors - 1), st.integers(1, 40)), max_size=8))
    writes = [(at * 512, noise(min(count, sectors - at) * 512, 2 + at)) for at, count in runs]
    for at, written in writes:
        data = vhd_images.write(data, at, written)
    return Child(data, below, vhd_images.overlaid(below, sectors * 512, writes), (block, sectors, runs, xen))


def chained(files: Sequence[MemoryFile]) -> VhdImage:
    """The last of the files, each one's parent found among them by its identity."""

    def resolve(reference: Reference) -> DiskImage:
        for file in files:
            if FORMAT.open(file).identity in reference.identities:
                return FORMAT.open(file, resolver=resolve)
        raise AssertionError(f"no parent {reference}")

    return FORMAT.open(files[-1], resolver=resolve)


def on_zeros(data: bytes) -> VhdImage:
    """A disk whose parent, if it has one, holds nothing."""
    return FORMAT.open(MemoryFile(data), resolver=lambda one: ZeroImage(one.size or 0))


def crashes(steps: Sequence[Change]) -> Iterator[list[Change]]:
    """The steps that may have reached the file when they were cut short.

    Each prefix of them; and since no order is promised between two barriers, also without the first and without the
    last but one of those behind the last barrier, and with only the last of them.
    """
    done: list[Change] = []
    recent: list[Change] = []
    yield []
    for step in steps:
        if isinstance(step, Barrier):
            done, recent = done + recent, []
            continue
        recent.append(step)
        yield done + recent
        if len(recent) > 1:
            yield done + recent[1:]
            yield [*done, *recent[:-2], step]
            yield [*done, step]


def changed(data: bytes, steps: Iterable[Change], image: DiskImage | None = None) -> bytes:
    """The file after the steps."""
    file = MemoryFile(data)
    changes.apply(steps, file, image=image)
    return bytes(file.data)


def assert_survives(
    data: bytes,
    steps: Iterable[Change],
    allowed: Iterable[bytes],
    *,
    image: DiskImage | None = None,
    look: Callable[[bytes], VhdImage] = on_zeros,
    most: int = 25,
) -> bytes:
    """Wherever the steps are cut short, the file opens, is sound and reads as one of ``allowed``. Returns the end."""
    allowed, steps = tuple(allowed), list(steps)
    states = list(crashes(steps))
    for taken in states[:: -(-len(states) // most)] + states[-most:]:
        state = changed(data, taken, image)
        assert content(look(state)) in allowed
        found = {problem.code for problem in FORMAT.check(MemoryFile(state))}
        assert found <= SPOILED_BY_A_CRASH
        mended = changed(state, FORMAT.repair(MemoryFile(state)))
        assert FORMAT.check(MemoryFile(mended)) == []
        assert content(look(mended)) == content(look(state))
    end = changed(data, steps, image)
    assert FORMAT.check(MemoryFile(end)) == []
    assert content(look(end)) == allowed[-1]
    return end
