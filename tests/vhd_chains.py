"""Chains of VHDs in memory, and what may be left of a file when a change in place is cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from imagekit import changes
from imagekit.formats.base import Barrier, Change, DiskImage, Reference
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import ZeroImage
from imagekit.formats.vhd import FORMAT, VhdImage
from tests.disks import content

SPOILED_BY_A_CRASH = {"footer-missing"}
"""All that a check may find in a file whose change was cut short."""


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
