"""VHDX files to change in place, and what must hold wherever a change is interrupted.

An interruption is every prefix of the steps, and any part of what was written since the last barrier: a disk may
write sectors in any order, and lose the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

from hypothesis import strategies as st

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, UNMAPPED, ZERO, Block, Recipe
from imagekit import changes
from imagekit.formats.base import Barrier, Change, Copy, DiskImage, Reference, Write
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhdx import FORMAT
from imagekit.formats.vhdx_image import VhdxImage
from tests.disks import content, noise, text

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNKNOWN_ID = made.guid("AAAAAAAA-1111-4222-8333-444444444444")
GRANDPARENT = noise(6 * MiB, 100)
"""What lies below every differencing disk here."""

DISK = Recipe(size=3 * MiB + 1024, blocks={2: Block(data=noise(MiB, 2)), 0: Block(data=text(MiB, 3))})
CHILD = Recipe(size=4 * MiB, blocks={1: Block(data=noise(MiB))}, parent=made.linked_to(UNKNOWN_ID))
KINDS = ("dynamic", "fixed", "differencing")
ODD_BUT_OPEN = {"header-invalid", "region-table-invalid", "log-replayed"}
"""What an interrupted change may leave: facts that refuse nothing."""

MOST_PREFIXES = 60


def file_of(recipe: Recipe) -> MemoryFile:
    return MemoryFile(made.make(recipe).bytes(), "disk.vhdx")


def raw_disk(data: bytes) -> RawImage:
    return RawImage(MemoryFile(data), len(data))


def over(disk: bytes) -> Callable[[Reference], DiskImage]:
    """A resolver that knows one disk."""
    return lambda _: raw_disk(disk)


def opened(file: MemoryFile, below: bytes = GRANDPARENT) -> VhdxImage:
    return FORMAT.open(file, resolver=over(below))


def read(file: MemoryFile, below: bytes = GRANDPARENT) -> bytes:
    return content(opened(file, below))


def grown(disk: bytes, size: int) -> bytes:
    """The disk with zeros behind it."""
    return disk[:size].ljust(size, b"\0")


def assert_sound(file: MemoryFile) -> VhdxImage:
    """Nothing is wrong, nothing is odd, and both headers say the same."""
    assert FORMAT.check(file) == []
    image = FORMAT.open(file)
    first, second = image.headers.copies
    assert first is not None and second is not None
    assert abs(first.sequence - second.sequence) == 1
    assert dataclasses.replace(first, sequence=0) == dataclasses.replace(second, sequence=0)
    return image


# --- interruptions -----------------------------------------------------------------------------------------------


def carried_out(steps: Iterable[Change], child: DiskImage | None) -> list[Change]:
    """The steps with what they copy."""
    return [
        Write(one.offset, child.pread(one.start, one.length)) if isinstance(one, Copy) and child else one
        for one in steps
    ]


def prefixes(file: MemoryFile, steps: list[Change]) -> Iterator[int]:
    """Take the steps in ``file``, stopping after each; of a long list after some."""
    every = -(-len(steps) // MOST_PREFIXES)
    for number, step in enumerate(steps, 1):
        changes.apply([step], file)
        if number == len(steps) or not (isinstance(step, Barrier) or number % every):
            yield number


def power_failures(file: MemoryFile, steps: list[Change], *, torn: int) -> Iterator[MemoryFile]:
    """What may be on the medium when the power fails: of what follows a barrier, any steps and any sectors of them.

    Of a few steps every selection that is no prefix, of more some; of each stretch also ``torn`` with sectors lost.
    """
    medium, stretch, chance = MemoryFile(file.data, file.name), list[Change](), random.Random(1)
    for step in steps:
        if not isinstance(step, Barrier):
            stretch.append(step)
            continue
        for taken in _selections(len(stretch), chance):
            out = MemoryFile(medium.data, file.name)
            changes.apply(itertools.compress(stretch, taken), out)
            yield out
        for _ in range(torn if any(map(_spans_sectors, stretch)) else 0):
            out = MemoryFile(medium.data, file.name)
            changes.apply(_torn(stretch, chance), out)
            yield out
        changes.apply(stretch, medium)
        stretch = []


def _spans_sectors(step: Change) -> bool:
    return isinstance(step, Write) and step.offset // 512 != (step.offset + len(step.data) - 1) // 512


def _selections(count: int, chance: random.Random) -> Iterator[tuple[bool, ...]]:
    if count > 3:
        for _ in range(3):
            yield tuple(chance.random() < 0.5 for _ in range(count))
        return
    for taken in itertools.product((False, True), repeat=count):
        if (False, True) in itertools.pairwise(taken):
            yield taken


def _torn(steps: list[Change], chance: random.Random) -> Iterator[Change]:
    for step in steps:
        if isinstance(step, Write):
            # A disk writes whole sectors: 512 bytes from a multiple of that.
            at = 0
            while at < len(step.data):
                stop = min(len(step.data), at + 512 - (step.offset + at) % 512)
                if chance.random() < 0.5:
                    yield Write(step.offset + at, step.data[at:stop])
                at = stop
        elif chance.random() < 0.5:
            yield step


def assert_interruptible(
    recipe: Recipe,
    change: Callable[[MemoryFile], Iterable[Change]],
    allowed: Callable[[VhdxImage], bool],
    child: DiskImage | None = None,
    *,
    torn: int = 1,
) -> MemoryFile:
    """Every prefix opens as ``allowed``, and whatever a power failure leaves; returns the file when all is done."""
    file = file_of(recipe)
    facts = {fact.code for fact in FORMAT.open(file).facts()} | ODD_BUT_OPEN
    steps = carried_out(change(file), child)
    assert steps == [] or isinstance(steps[-1], Barrier)
    for medium in power_failures(file, steps, torn=torn):
        broken = opened(medium)
        assert {fact.code for fact in broken.facts()} <= facts
        assert allowed(broken)
    for number in prefixes(file, steps):
        image = opened(file)
        assert {fact.code for fact in image.facts()} <= facts
        assert allowed(image), number
    return file


# --- disks -------------------------------------------------------------------------------------------------------

DATA = [noise(2 * MiB, 1), text(2 * MiB, 2), bytes(2 * MiB), bytes(MiB // 2) + noise(MiB, 3) + bytes(MiB // 2)]


@st.composite
def recipes(draw: st.DrawFn, *, kinds: tuple[str, ...] = KINDS, sector: int | None = None) -> Recipe:
    """Small disks; where no disk looks, there is junk: behind the end, in spare BAT entries, under clear bits."""
    kind = draw(st.sampled_from(kinds))
    sector = sector or draw(st.sampled_from([512, 4096]))
    block = draw(st.sampled_from([MiB, 2 * MiB]))
    count = draw(st.integers(1, 3))
    blocks: dict[int, Block] = {}
    numbers = draw(st.permutations(range(count)))
    for number in numbers if kind == "fixed" else numbers[: draw(st.integers(0, count))]:
        states = {"fixed": [FULL], "dynamic": [1, ZERO, UNMAPPED, FULL, FULL], "differencing": [1, 2, 3, 6, 7, 7]}
        state = draw(st.sampled_from(states[kind]))
        present = None
        if state == PARTIAL:
            edges = draw(st.lists(st.integers(0, block // sector), max_size=6).map(sorted))
            present = frozenset(at for pair in itertools.pairwise(edges[::2]) for at in range(*pair))
        data = draw(st.sampled_from(DATA))[:block] if state in (FULL, PARTIAL) else None
        blocks[number] = Block(state=state, data=data, present=present)
    recipe = Recipe(
        size=count * block - draw(st.sampled_from([0, 1, 3, block // 4096 - 1])) * 4096,
        blocks=blocks,
        block_size=block,
        sector=sector,
        fixed=kind == "fixed",
        parent=made.linked_to(UNKNOWN_ID) if kind == "differencing" else None,
        layout=draw(st.sampled_from(["windows", "disk2vhd"])),
        bitmaps_last=draw(st.booleans()),
    )
    junk = {recipe.entry_of(number): 64 * TiB | FULL for number in range(count, count + draw(st.integers(0, 3)))}
    return dataclasses.replace(recipe, entries=junk)


WIDE = 256 * GiB
JUNK = {4096 + 10: 77 * MiB | FULL, **dict.fromkeys(range(65_000, 66_000), ZERO)}
"""In spare entries, some of it what a larger disk would have there."""


def wide(kind: str, **fields: object) -> Recipe:
    """A disk whose BAT of 1 MiB has no room for `WIDE` bytes."""
    blocks = {1: Block(data=noise(MiB, 1)), 0: Block(data=noise(MiB, 2))}
    if kind == "differencing":
        blocks[2] = Block(state=PARTIAL, data=noise(MiB, 3), present=frozenset({0, 7, 2047}))
    parent = made.linked_to(UNKNOWN_ID) if kind == "differencing" else None
    recipe = Recipe(size=5 * MiB + 512, blocks=blocks, parent=parent, entries=JUNK)
    return dataclasses.replace(recipe, **fields)  # type: ignore[arg-type]
