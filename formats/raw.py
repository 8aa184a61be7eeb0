"""Raw disks: the file is the disk.

There is no header to recognise, so raw is what a file is when the caller says so, or when no other format is found
in it. Holes of the file are reported as zeros; they never change what a conversion writes (see imagekit.plan).
"""

from __future__ import annotations

from collections.abc import Iterator

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import (
    AS_IS,
    BlockRuns,
    Change,
    DiskFormat,
    DiskImage,
    Extent,
    File,
    FlatLayout,
    ImageInfo,
    MiB,
    OpenOptions,
    Range,
    Resolver,
    Truncate,
    WriterOptions,
    clip,
    merge_extents,
)


class RawImage(DiskImage):
    def __init__(self, file: File, virtual_size: int) -> None:
        self.file = file
        self.virtual_size = virtual_size

    @property
    def container(self) -> File:
        return self.file

    def info(self) -> ImageInfo:
        return ImageInfo(format="raw", virtual_size=self.virtual_size)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        return merge_extents(flat_extents(self.file, *clip(start, length, self.virtual_size)))

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        read_flat(self.file, offset, buffer)

    def ranges(self) -> Iterator[Range]:
        yield Range(0, self.virtual_size, "data")

    def close(self) -> None:
        self.file.close()


class ZeroImage(DiskImage):
    """A disk of zeros that lies in no file: what a new disk holds."""

    def __init__(self, virtual_size: int) -> None:
        self.virtual_size = virtual_size

    def info(self) -> ImageInfo:
        return ImageInfo(format="raw", virtual_size=self.virtual_size)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        start, end = clip(start, length, self.virtual_size)
        if start < end:
            yield Extent(start, end - start, data=False, zero=True, present=False)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def ranges(self) -> Iterator[Range]:
        return iter(())

    def close(self) -> None:
        pass


def flat_extents(file: File, start: int, end: int) -> Iterator[Extent]:
    """Extents of a file whose bytes are the guest's, each at its own offset."""
    for at, length in file.data_ranges(start, end - start):
        if at > start:
            yield Extent(start, at - start, data=False, zero=True, offset=start)
        yield Extent(at, length, data=True, zero=False, offset=at)
        start = at + length
    if start < end:
        yield Extent(start, end - start, data=False, zero=True, offset=start)


def read_flat(file: File, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from ``offset``; CorruptImage when the file is too short."""
    count = file.pread_into(offset, buffer)
    if count != len(buffer):
        raise CorruptImage(
            f"the data is cut short: {len(buffer)} bytes expected, {count} found",
            hint="the file looks truncated, or another program shortened it",
            path=file.name,
            offset=offset,
        )


class FlatWriter:
    """Writes the guest's bytes at their own offsets."""

    block_size = 2 * MiB

    def __init__(self, virtual_size: int, trailer: bytes = b"") -> None:
        self.virtual_size = virtual_size
        self._trailer = trailer

    def layout(self, blocks: BlockRuns = ()) -> FlatLayout:
        return FlatLayout(self.virtual_size, self.block_size, self._trailer)


class RawFormat(DiskFormat):
    name = "raw"
    suffixes = (".raw", ".img", ".bin")
    subformats = ("flat",)

    def probe(self, file: File) -> str | None:
        return None

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> RawImage:
        return RawImage(file, file.size)

    def writer(self, virtual_size: int, options: WriterOptions) -> FlatWriter:
        if options.block_size is not None:
            raise UnsupportedFeature("a raw disk has no blocks", hint="leave out --block-size")
        return FlatWriter(virtual_size)

    def resize(self, file: File, size: int) -> Iterator[Change]:
        lost = self.open(file).first_data(size)
        if lost is not None:
            raise UnsupportedFeature(
                f"the disk holds data at {lost:#x}, behind the new end {size:#x}",
                hint="shrink its partitions and file systems first",
                path=file.name,
            )
        yield Truncate(size)


FORMAT = RawFormat()
