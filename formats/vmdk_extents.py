"""A VMDK that is a text: its data is in the files that it names, each opened through the caller's resolver only.

Flat extents are bytes of a file from an offset on, sparse ones are sparse VMDK files, ZERO is neither. The disk is
all extents one after the other. Files are opened at first need, one that several extents name only once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature
from imagekit.formats.base import (
    SECTOR,
    DiskImage,
    Extent,
    File,
    ImageInfo,
    Range,
    Reference,
    Resolver,
    clip,
    merge_extents,
)
from imagekit.formats.chain import Below
from imagekit.formats.vmdk_descriptor import FLAT_TYPES, MAX_DESCRIPTOR, SPARSE_TYPES, Descriptor, ExtentLine
from imagekit.formats.vmdk_header import MAX_SIZE, TRUNCATED
from imagekit.formats.vmdk_info import check_readable, descriptor_features
from imagekit.formats.vmdk_sparse import SparseImage

READABLE = frozenset(
    {"monolithicflat", "twogbmaxextentflat", "twogbmaxextentsparse", "vmfs", "vmfssparse", "sesparse"}
)
"""Kinds of disks (createType, in lower case) that are regular files. The others are devices of a machine, or mixtures
of devices and files."""


class DescriptorImage(DiskImage):
    def __init__(self, file: File, resolver: Resolver | None = None) -> None:
        self.file = file
        # One more byte than is read of a descriptor: what is longer is none.
        self.descriptor = Descriptor.parse(file.pread(0, MAX_DESCRIPTOR + 1))
        self._lines = self.descriptor.extents
        self._starts = [0, *accumulate(one.size for one in self._lines)]
        self.virtual_size = self._starts.pop()
        if not 0 < self.virtual_size <= MAX_SIZE:
            raise InvalidImage(f"extents of {self.virtual_size} bytes, expected 1 to {MAX_SIZE}", path=file.name)
        self._files: dict[Reference, Below] = {}
        for line in self._lines:
            reference = line.reference()
            if reference is not None:
                self._files.setdefault(reference, Below(reference, resolver, file.name))

    def info(self) -> ImageInfo:
        descriptor = self.descriptor
        parent = descriptor.parent()
        named = (one.reference() for one in self._lines)
        return ImageInfo(
            format="vmdk",
            virtual_size=self.virtual_size,
            subformat=descriptor.create_type,
            features=descriptor_features(descriptor) | {"extents": len(self._lines)},
            references=(*(one for one in named if one is not None), *(() if parent is None else (parent,))),
            facts=descriptor.facts,
        )

    def _check_readable(self) -> None:
        check_readable(None, self.descriptor, self.file.name)
        if self.descriptor.create_type.lower() not in READABLE:
            raise UnsupportedFeature(
                f"a VMDK of the kind {self.descriptor.create_type!r}, which imagekit does not read",
                hint="export it to a file where it comes from",
                path=self.file.name,
            )
        for line in self._lines:
            if line.type not in FLAT_TYPES | SPARSE_TYPES | {"ZERO"}:
                raise UnsupportedFeature(f"an extent of type {line.type} is a device", path=self.file.name)
            if line.access == "NOACCESS":
                raise UnsupportedFeature(
                    f"the extent {line.name or line.type!r} is marked as not accessible", path=self.file.name
                )

    # --- the guest's view ------------------------------------------------------------------------------------

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, ExtentLine, DiskImage | None, int]]:
        """(start, end, line, its file or None for zeros, offset in that of the start); cover exactly the range."""
        number = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            line, base = self._lines[number], self._starts[number]
            stop = min(end, base + line.size)
            flat = line.type in FLAT_TYPES
            yield start, stop, line, self._open(line), start - base + (line.offset * SECTOR if flat else 0)
            start, number = stop, number + 1

    def _open(self, line: ExtentLine) -> DiskImage | None:
        reference = line.reference()
        if reference is None:
            return None
        image = self._files[reference].image()
        assert image is not None
        if line.type in FLAT_TYPES:
            if image.virtual_size < line.offset * SECTOR + line.size:
                raise self._mismatch(line, f"{image.virtual_size} bytes, {line.offset * SECTOR + line.size} expected")
        elif not isinstance(image, SparseImage):
            # A descriptor here could lead back to this one.
            raise InvalidImage(f"the extent {line.name!r} is not a sparse VMDK file", path=self.file.name)
        elif image.virtual_size != line.size:
            raise self._mismatch(line, f"{image.virtual_size} bytes of the disk, {line.size} expected")
        return image

    def _mismatch(self, line: ExtentLine, what: str) -> CorruptImage:
        return CorruptImage(f"the extent file {line.name!r} holds {what}", hint=TRUNCATED, path=self.file.name)

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        self._check_readable()
        return merge_extents(self._extents(*clip(start, length, self.virtual_size)))

    def _extents(self, start: int, end: int) -> Iterator[Extent]:
        for begin, stop, _, image, inside in self._parts(start, end):
            if image is None:
                yield Extent(begin, stop - begin, data=False, zero=True)
                continue
            for one in image.extents(inside, stop - begin):
                yield one.elsewhere(one.start - inside + begin, image.container)

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        self._check_readable()
        for begin, stop, _, image, inside in self._parts(offset, offset + len(buffer)):
            part = buffer[begin - offset : stop - offset]
            if image is None:
                part[:] = bytes(len(part))
            else:
                image.pread_into(inside, part)

    def ranges(self) -> Iterator[Range]:
        yield Range(0, self.file.size, "descriptor")

    def close(self) -> None:
        for one in self._files.values():
            one.close()
        self.file.close()
