"""VMDKs for property tests, and what a test of them needs again and again."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st

from fixtures.vmdk_images import Recipe
from imagekit.formats.files import MemoryFile
from imagekit.formats.vmdk import FORMAT
from imagekit.formats.vmdk_sparse import SparseImage
from tests.disks import pieces


def small(size: int, grains: Mapping[int, bytes | None], *, redundant: bool = True) -> Recipe:
    """Grains of a sector, four in a table."""
    return Recipe(size=size, grains=grains, grain_sectors=1, table_entries=4, redundant=redundant)


def sparse(data: bytes) -> SparseImage:
    """An image that is one file."""
    image = FORMAT.open(MemoryFile(data))
    assert isinstance(image, SparseImage)
    return image


def facts(data: bytes) -> list[str]:
    return [fact.code for fact in FORMAT.open(MemoryFile(data)).info().facts]


@st.composite
def recipes(
    draw: st.DrawFn,
    *,
    grain_sectors: tuple[int, ...] = (1, 2, 16),
    table_entries: tuple[int, ...] = (1, 3, 16, 512),
    zeros: bool = True,
) -> Recipe:
    """Grains of every kind, in any order, in one table or several; disks whose sizes end anywhere."""
    sectors = draw(st.sampled_from(grain_sectors))
    entries = draw(st.sampled_from(table_entries))
    grain = sectors * 512
    places = st.integers(0, 12) | st.integers(max(0, entries - 2), entries + 2)
    numbers = draw(st.lists(places, max_size=8, unique=True))
    kinds = pieces(grain) | st.none() if zeros else pieces(grain)
    return Recipe(
        size=max(numbers, default=0) * grain + draw(st.integers(1, 2 * sectors)) * 512,
        grains={number: draw(kinds) for number in numbers},
        grain_sectors=sectors,
        table_entries=entries,
        version=draw(st.sampled_from([1, 2, 3])),
        redundant=draw(st.booleans()),
        all_tables=draw(st.booleans()),
    )
