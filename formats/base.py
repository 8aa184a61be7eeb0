"""The vocabulary of disk images, and nothing else.

A :class:`File` is the random-access bytes of a container. A :class:`DiskFormat` recognises one format and opens
such a file as a :class:`DiskImage`, the guest's view of it, or writes one through an :class:`ImageWriter`.
Formats state *facts* (references, features, oddities); whether a fact is a reason to refuse is judged elsewhere.

Nothing here opens a file, starts a thread or knows a policy.
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Literal, Protocol, TypeAlias

from imagekit.errors import CorruptImage, UnsupportedFeature, UsageError
from imagekit.records import dataclass, field, replace

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
SECTOR = 512

Buffer: TypeAlias = bytes | bytearray | memoryview
JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
BlockRuns: TypeAlias = tuple[tuple[int, int], ...]
"""Allocated blocks as (first block, count), sorted and never adjacent."""


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


# --- bytes -----------------------------------------------------------------------------------------------------


class File(Protocol):
    """Random-access bytes of a container. Positional calls only, so threads can share one.

    Implementations: :class:`imagekit.formats.files.LocalFile` and ``MemoryFile``.
    """

    name: str
    """For messages; never opened again."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    @property
    def allocated_size(self) -> int:
        """Bytes that take room on the medium; at most about ``size``."""
        ...

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset``; the count is short only at the end of the file."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``offset``; short only at the end of the file."""
        ...

    def pwrite(self, offset: int, *buffers: Buffer) -> None:
        """Write the buffers one after the other from ``offset``, all of them."""
        ...

    def truncate(self, size: int) -> None:
        """Set the length; new bytes read as zero."""
        ...

    def flush(self) -> None:
        """Return when everything written is on the medium."""
        ...

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the parts that may hold something other than zero, in order."""
        ...

    def fileno(self) -> int | None:
        """Descriptor for kernel copies, or None where there is none."""
        ...

    def close(self) -> None: ...


def read_exactly(file: File, offset: int, length: int, what: str) -> bytes:
    """``length`` bytes from ``offset``, or CorruptImage that names ``what`` is cut short."""
    data = file.pread(offset, length)
    if len(data) != length:
        raise CorruptImage(
            f"{what} is cut short: {length} bytes expected, {len(data)} found (the file has {file.size})",
            hint="the file looks truncated; fetch it again and compare its checksum",
            path=file.name,
            offset=offset,
        )
    return data


# --- the guest's view ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of the guest's disk whose bytes lie in one way; the keys of ``qemu-img map --output=json``.

    ``offset`` is where the bytes lie unencoded in a file, so that the kernel can copy them; else None. ``file`` is
    that file, where it is not the image's own: a parent's, an extent's.
    """

    start: int
    length: int
    data: bool
    zero: bool
    present: bool = True
    depth: int = 0
    compressed: bool = False
    offset: int | None = None
    file: File | None = field(default=None, compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.start + self.length

    def to_json(self) -> dict[str, JSON]:
        out: dict[str, JSON] = {
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        }
        if self.offset is not None and self.file is None:
            out["offset"] = self.offset
        return out

    def joins(self, after: Extent) -> bool:
        """Whether ``after`` continues this extent, in the guest and (when mapped) in the file."""
        if (self.data, self.zero, self.present, self.depth, self.compressed, self.end) != (
            after.data,
            after.zero,
            after.present,
            after.depth,
            after.compressed,
            after.start,
        ):
            return False
        if self.offset is None or after.offset is None:
            return self.offset is after.offset
        return self.file is after.file and self.offset + self.length == after.offset

    def part(self, start: int, end: int) -> Extent:
        """What of it lies in ``start``..``end``, which lies in it."""
        offset = None if self.offset is None else self.offset + start - self.start
        return replace(self, start=start, length=end - start, offset=offset)

    def elsewhere(self, start: int, file: File | None, *, deeper: int = 0) -> Extent:
        """The same bytes as a part of another disk, from ``start``: ``file`` is the file of the image they lie in."""
        return replace(self, start=start, depth=self.depth + deeper, file=self.file or file)


def merge_extents(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours that differ in nothing but where they start."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.joins(extent):
            last = replace(last, length=last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


@dataclass(frozen=True, slots=True)
class Reference:
    """Another file that an image names. Only ever opened by a resolver that the caller passes.

    ``names`` are all forms of the name, in the order to try them (empty: only ``name``). The file found must have
    one of the ``identities`` as its :attr:`DiskImage.identity` (empty: any will do). ``size`` is the virtual size of
    the image that refers, where both should have the same.
    """

    kind: Literal["backing-file", "data-file", "parent-file", "extent-file"]
    name: str
    format: str | None = None
    names: tuple[str, ...] = ()
    identities: tuple[bytes, ...] = ()
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a format noticed. ``code`` is stable and is what the policy's rules are about."""

    code: str
    message: str
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the headers say. Sizes in bytes."""

    format: str
    virtual_size: int
    subformat: str | None = None
    block_size: int | None = None
    features: dict[str, JSON] = field(default_factory=dict)
    references: tuple[Reference, ...] = ()
    facts: tuple[Fact, ...] = ()
    table_memory: int = 0
    """Bytes of tables that are held in memory, all at once, while the disk is read."""


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of the file that the image claims, for overlap checks."""

    offset: int
    length: int
    kind: str


class DiskImage(Protocol):
    """The guest's disk inside a file. Positional reads only; safe to share between threads."""

    virtual_size: int

    identity: bytes | None = None
    """What a differencing child knows its parent by: VHD's unique id, VHDX' DataWriteGuid; as stored."""

    disk_id: bytes | None = None
    """What the guest knows the disk by (VHDX: page 83 data), which a child inherits; as stored."""

    sector_size: int = SECTOR
    """Logical sector size in bytes."""

    @property
    def container(self) -> File | None:
        """The file that the offsets of its extents are in; None where there is none, or more than one."""
        return None

    def info(self) -> ImageInfo:
        """What the headers say; works on images that cannot be read."""
        ...

    def extents(self, start: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Sorted, adjacent, merged extents that cover exactly the range asked for (default: the disk)."""
        ...

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the guest's bytes from ``offset``; the range lies inside the disk."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """The guest's bytes from ``offset``, cut at the end of the disk."""
        length = max(0, min(length, self.virtual_size - offset))
        data = bytearray(length)
        self.pread_into(offset, memoryview(data))
        return bytes(data)

    def pieces(self, offset: int, buffer: memoryview) -> Iterator[Buffer]:
        """The guest's bytes from ``offset``, as many as ``buffer`` has, in order and in pieces.

        For whoever writes them at once: what a decoder made is handed out as it is, what is read lies in ``buffer``.
        """
        self.pread_into(offset, buffer)
        yield buffer

    def first_data(self, start: int) -> int | None:
        """Guest offset of the first byte from ``start`` on that is not zero, None when there is none."""
        for extent in self.extents(start):
            for offset in range(extent.start, extent.end, MiB) if extent.data else ():
                data = self.pread(offset, min(MiB, extent.end - offset))
                if data.count(0) != len(data):
                    return offset + len(data) - len(data.lstrip(b"\0"))
        return None

    def ranges(self) -> Iterator[Range]:
        """All metadata and data the image claims in its file; may take a pass over its tables."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> DiskImage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clip(start: int, length: int | None, virtual_size: int) -> tuple[int, int]:
    """(start, end) of a range asked for, inside the disk."""
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"negative range: start {start}, length {length}")
    start = min(start, virtual_size)
    end = virtual_size if length is None else min(start + length, virtual_size)
    return start, end


Resolver: TypeAlias = Callable[[Reference], DiskImage]
"""Opens what an image refers to. Without one nothing but the image's own file is ever read."""


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to look at an image, where there is more than one way; a format names in ``reads`` what it heeds."""

    snapshot: str | None = None
    """Name or id of an internal snapshot: the disk as it was then."""

    size_from: Literal["current", "chs"] | None = None
    """Which of a VHD's sizes counts; None: the one its creator means."""

    def __post_init__(self) -> None:
        if self.size_from not in (None, "current", "chs"):
            raise UsageError(f"size from {self.size_from!r}", hint="choose one of: current, chs")


AS_IS = OpenOptions()


# --- writing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParentLink:
    """What a differencing disk says about its parent. Paths in the form to be stored, Windows' own (backslashes)."""

    identity: bytes
    virtual_size: int
    relative: str
    """From the child's folder: ``.\\parent.vhdx``."""

    absolute: str | None = None
    """``C:\\VMs\\parent.vhdx``, where the caller knows it."""

    disk_id: bytes | None = None
    sector_size: int = SECTOR


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """What a writer needs to know besides the size. Same options, same bytes."""

    identifier: uuid.UUID
    subformat: str | None = None
    block_size: int | None = None
    sector_size: int | None = None
    """Logical sector size in bytes; None: 512."""

    creator: str | None = None
    """Whose conventions a VHD follows: None is Windows', ``tap`` is XenServer's."""

    compression: Literal["zlib", "zstd"] | None = None
    parent: ParentLink | None = None
    """For the subformat ``differencing``."""

    timestamp: int = 946684800
    """Seconds since 1970, UTC. The default is the start of VHD's own epoch: the clock is not an input."""


class SlotMap:
    """Which block lies in which slot of the file; slots are handed out in arrival order.

    In bulk (sorted runs) and one by one are the same operation, so a plan and a pipe share a writer. Neighbours
    that arrive in order share one run: memory follows fragmentation, not size.
    """

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._runs: list[tuple[int, int, int]] = []  # (first block, count, first slot), sorted by block
        self.count = 0
        for first, count in runs:
            self.add(first, count)

    def add(self, first: int, count: int = 1) -> int:
        """Give the next ``count`` slots to the blocks from ``first``; returns the first slot."""
        at = bisect_right(self._firsts, first)
        before, length, its_slot = self._runs[at - 1] if at else (0, 0, 0)
        if first < before + length or (at < len(self._firsts) and first + count > self._firsts[at]):
            raise ValueError(f"one of the blocks {first}..{first + count - 1} has a slot already")
        slot, self.count = self.count, self.count + count
        if length and first == before + length and its_slot + length == slot:
            self._runs[at - 1] = (before, length + count, its_slot)
            return slot
        self._firsts.insert(at, first)
        self._runs.insert(at, (first, count, slot))
        return slot

    def get(self, block: int) -> int | None:
        """The block's slot, or None."""
        at = bisect_right(self._firsts, block) - 1
        if at < 0:
            return None
        first, count, slot = self._runs[at]
        return slot + block - first if block < first + count else None

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """(first block, count, first slot), sorted by block."""
        return iter(self._runs)


class Layout(Protocol):
    """Where everything of one target file lies. Pure: knows offsets, touches no file."""

    prefix: bytes
    """Bytes that stand right before each block's data (VHD's sector bitmap)."""

    @property
    def file_size(self) -> int:
        """Length of the finished file, for the blocks placed so far."""
        ...

    def place(self, block: int) -> int:
        """File offset of the block's data; a block not placed yet gets the next slot."""
        ...

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of everything else, for the blocks placed so far."""
        ...


class EncodedLayout(Layout):
    """A layout that stores blocks in other bytes than the guest's, as long as those are fewer.

    Where a block lies is known once its encoding is: so ``file_size`` is a bound that counts a block the layout was
    made with in full until it is added, and exact when all of them are. A block is added once, or placed once, which
    takes it as it is. The order of calls decides the file; the same order gives the same file.
    """

    @abstractmethod
    def encode(self, data: Buffer) -> Buffer:
        """What to store for a whole block: its encoding, the data as it is, or nothing for zeros.

        Looks at nothing but ``data``, so that threads can encode side by side.
        """

    @abstractmethod
    def add(self, block: int, length: int) -> int:
        """File offset for the ``length`` bytes that are stored for the block; of no bytes nothing is stored."""


class ImageWriter(Protocol):
    """Turns an allocation into a layout. ``block_size`` is the unit of allocation, in guest bytes."""

    virtual_size: int
    block_size: int

    def layout(self, blocks: BlockRuns = ()) -> Layout:
        """Place the blocks in the order given; further ones can be placed as they arrive."""
        ...


class FlatLayout:
    """Every guest byte at its own offset, then a trailer: raw and fixed disks."""

    prefix = b""

    def __init__(self, virtual_size: int, block_size: int, trailer: bytes = b"") -> None:
        self._virtual_size = virtual_size
        self._block_size = block_size
        self._trailer = trailer

    @property
    def file_size(self) -> int:
        return self._virtual_size + len(self._trailer)

    def place(self, block: int) -> int:
        return block * self._block_size

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        if self._trailer:
            yield self._virtual_size, self._trailer


# --- changing in place -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Write:
    """Put ``data`` at ``offset``."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Barrier:
    """Everything before is on the medium before anything after is written."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Put ``length`` guest bytes from ``start`` of the image being merged at ``offset``: a write, read when due."""

    offset: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Set the file's length; new bytes read as zero."""

    size: int


Change: TypeAlias = Write | Copy | Truncate | Barrier
"""A step of a change in place. What the steps are is decided before the first one is taken; every prefix of them
leaves a file that opens, with the content it had or the content it is to have."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check found. Leaks waste room; everything else is damage."""

    code: str
    message: str
    offset: int | None = None
    leak: bool = False


# --- formats ---------------------------------------------------------------------------------------------------


class DiskFormat(Protocol):
    """One format: how to recognise, open, check and write it. Module attribute ``FORMAT``."""

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    suffixes: ClassVar[tuple[str, ...]] = ()
    subformats: ClassVar[tuple[str, ...]] = ()
    """What can be written, the default first; empty when the format is only read."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`OpenOptions` that the format heeds."""

    writes: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`WriterOptions`, besides those every format has, that there is a choice of."""

    def probe(self, file: File) -> str | None:
        """What of this format was found, in a few words; None when nothing was. Never raises on content."""
        ...

    def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> DiskImage:
        """Parse the headers. InvalidImage, CorruptImage or UnsupportedFeature when they cannot be parsed."""
        ...

    def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
        """A writer for a disk of ``virtual_size`` bytes, a multiple of 512."""
        raise UnsupportedFeature(f"imagekit does not write {self.name}", hint="choose another target format")

    def check(self, file: File) -> list[Problem]:
        """Everything wrong with the structure; empty when sound."""
        raise UnsupportedFeature(f"{self.name} images have no structure to check")

    def repair(self, file: File) -> list[Change]:
        """The changes that mend what can be mended with certainty."""
        raise UnsupportedFeature(f"imagekit cannot repair {self.name} images")

    def resize(self, file: File, size: int) -> Iterable[Change]:
        """The changes that give the disk in ``file`` another virtual size, in bytes, a multiple of its sector size.

        Growing adds zeros (a differencing disk does not show more of its parent). Shrinking raises
        UnsupportedFeature when anything but zeros would be lost.
        """
        raise UnsupportedFeature(f"imagekit does not resize {self.name} images in place", hint="convert with --size")

    def rebase(self, file: File, parent: ParentLink) -> Iterable[Change]:
        """The changes that make the differencing disk in ``file`` name another parent, whatever that holds."""
        raise UnsupportedFeature(f"imagekit does not change the parent of {self.name} images")

    def identify(self, file: File, identifier: uuid.UUID) -> Iterable[Change]:
        """The changes that give the disk in ``file`` another id; its content is not touched.

        A guest knows the disk by it, and the children of a VHD know their parent by it: give it to a fresh copy.
        """
        raise UnsupportedFeature(f"imagekit does not change the id of {self.name} images")

    def absorb(self, file: File, child: DiskImage) -> Iterable[Change]:
        """The changes that put into ``file`` what ``child``, at least as large, holds itself (extents of depth 0).

        The file's disk has the child's size then. After every prefix the child on top of it reads as before.
        """
        raise UnsupportedFeature(f"imagekit does not merge into {self.name} images", hint="merge into a new file")
