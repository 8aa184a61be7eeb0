"""Disks to convert, and what must hold for any of them."""

from __future__ import annotations

import hashlib
import itertools
import random
import uuid
from collections.abc import Sequence

from hypothesis import strategies as st

from fixtures.qcow2_images import SUBCLUSTERS, Cluster, Compressed, Plain, Recipe, Split, Zero
from imagekit import copying
from imagekit.errors import ImagekitError
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Extent, File, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.plan import build_plan, target_size

IDENTIFIER = uuid.UUID("6f9c1d2e-0b1a-4c3d-8e5f-001122334455")
OPTIONS = WriterOptions(IDENTIFIER)


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that do not compress; the same for the same seed."""
    return random.Random(seed).randbytes(length)


def text(length: int, seed: int = 0) -> bytes:
    """Bytes that compress well, without a zero among them."""
    return (b"%d: all work and no play\n" % seed * (length // 20 + 1))[:length]


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def content(image: DiskImage) -> bytes:
    """Everything a guest reads."""
    return image.pread(0, image.virtual_size)


def assert_extents_agree(image: DiskImage, file: File, expected: bytes) -> list[Extent]:
    """Extents cover the disk exactly, are merged, and say of every byte what is true; returns them."""
    extents = list(image.extents())
    assert [extent.start for extent in extents] == [0, *(extent.end for extent in extents)][: len(extents)]
    assert sum(extent.length for extent in extents) == image.virtual_size == len(expected)
    assert not any(one.joins(other) for one, other in itertools.pairwise(extents))
    for extent in extents:
        piece = expected[extent.start : extent.end]
        assert image.pread(extent.start, extent.length) == piece
        if extent.zero or not extent.data:
            assert not any(piece)
        if extent.offset is not None and extent.data:
            assert (extent.file or file).pread(extent.offset, extent.length) == piece
    return extents


def cut(extents: Sequence[Extent], start: int, end: int) -> list[Extent]:
    """What ``extents(start, end - start)`` must be, worked out from the extents of the whole disk."""
    out = []
    for extent in extents:
        low, high = max(start, extent.start), min(end, extent.end)
        if low < high:
            offset = None if extent.offset is None else extent.offset + low - extent.start
            flags = extent.data, extent.zero, extent.present, extent.depth, extent.compressed
            out.append(Extent(low, high - low, *flags, offset))
    return out


def convert(
    source: File,
    source_format: str,
    target_format: str,
    *,
    options: WriterOptions = OPTIONS,
    size: int | None = None,
    jobs: int = 1,
) -> MemoryFile:
    """A conversion in memory: plan and copy, without the files and the judging around them."""
    image = registry.find(source_format).open(source)
    virtual_size, notes = target_size(image.virtual_size, size)
    plan = build_plan(
        image,
        source_format=source_format,
        target_format=target_format,
        options=options,
        virtual_size=virtual_size,
        notes=notes,
    )
    target = MemoryFile(name="target")
    copying.copy_image(plan, image, source, target, jobs=jobs)
    return target


def read_or_error(format_name: str, data: bytes) -> bytes | ImagekitError:
    """The content of an image, or why it cannot be had: extents and bytes must agree on that."""
    try:
        image = registry.find(format_name).open(MemoryFile(data))
        list(image.extents())
        return content(image)
    except ImagekitError as error:
        return error


# --- strategies ------------------------------------------------------------------------------------------------


def pieces(length: int) -> st.SearchStrategy[bytes]:
    """Contents of a block: data, data with a hole in it, one byte at either end, zeros stored as data."""
    return st.sampled_from(
        [
            noise(length, 1),
            noise(length, 2),
            text(length, 3),
            bytes(length // 2) + text(length - length // 2, 4),
            b"\x01" + bytes(length - 1),
            bytes(length - 1) + b"\x01",
            bytes(length),
        ]
    )


@st.composite
def disks(draw: st.DrawFn, *, unit: int = 512, most: int = 40) -> bytes:
    """Contents of a disk: runs of data and of zeros, and an end that may lie inside a sector of data."""
    runs = draw(st.lists(st.tuples(st.integers(1, most // 4), st.booleans()), min_size=1, max_size=6))
    out = b"".join(noise(count * unit, at) if data else bytes(count * unit) for at, (count, data) in enumerate(runs))
    return out[: len(out) - draw(st.integers(0, unit // 512 - 1)) * 512]


@st.composite
def qcow2_recipes(draw: st.DrawFn, *, cluster_bits: tuple[int, ...] = (9, 10, 12, 14)) -> Recipe:
    """Images of up to about two L2 tables, of every kind of cluster, whose sizes end anywhere."""
    bits = draw(st.sampled_from(cluster_bits))
    size = 1 << bits
    version = draw(st.sampled_from([2, 3, 3]))
    extended = version == 3 and bits >= 14 and draw(st.booleans())
    span = size // (16 if extended else 8)
    places = st.integers(0, 12)
    if span * size <= 4 << 20:
        places |= st.integers(span - 3, span + 3)
    numbers = draw(st.lists(places, max_size=8, unique=True))
    kinds: list[st.SearchStrategy[Cluster]] = [st.builds(Plain, pieces(size))]
    compressible = st.sampled_from([text(size, 5), text(size, 6), bytes(size)])
    kinds.append(st.builds(Compressed, compressible))
    if version == 3:
        kinds.append(st.builds(Zero, st.none() | st.just(noise(size, 7))))
    if extended:
        part = st.none() | st.just(b"") | pieces(size // SUBCLUSTERS)
        kinds.append(st.builds(Split, st.tuples(*[part] * SUBCLUSTERS)))
    last = max(numbers, default=0)
    return Recipe(
        size=last * size + draw(st.integers(1, 2 * size // 512)) * 512,
        clusters={number: draw(st.one_of(kinds)) for number in numbers},
        version=version,
        cluster_bits=bits,
        refcount_order=4 if version == 2 else draw(st.integers(0, 6)),
        zstd=version == 3 and draw(st.booleans()),
        extended_l2=extended,
    )
