"""A look into an ext2, ext3 or ext4 file system on a guest's disk: its id, folders, files by their path.

Follows the Linux kernel's documentation ("ext4 Data Structures and Algorithms") as far as reading files needs:
extents and block maps, 64-bit group descriptors, symbolic links. Read-only and bounded whatever the bytes say: every
number is checked before it is used, and no more is read than asked for. Damage is ExtError, which says what is wrong;
an image that cannot be read raises its own errors. A journal is not replayed: what is read may be a moment old.

No htree (folders are read from their start), inline data, meta block groups, or encrypted files. Checksums are not
checked. For one thread at a time.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from uuid import UUID

from imagekit.formats.base import DiskImage, KiB, MiB
from imagekit.records import dataclass

MAX_FOLDER = 4 * MiB
MAX_LINKS = 16
MAX_PIECES = 65536
"""Extents or block pointers of one file that are followed."""
MAX_DEPTH = 5

_SUPERBLOCK, _SUPERBLOCK_SIZE, _MAGIC = 1024, 1024, 0xEF53
_64BIT = 0x80
_KNOWN = 0x2 | 0x4 | 0x40 | _64BIT | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000
"""Incompatible features that do not change how a plain file is found."""
_EXTENTS, _INLINE, _ENCRYPTED = 0x80000, 0x10000000, 0x800
_EXTENT_MAGIC = 0xF30A
_UNWRITTEN = 32768
_ROOT = 2


class ExtError(Exception):
    """There is no ext file system, or it is damaged or beyond us; the text says how."""


@dataclass(frozen=True, slots=True)
class Inode:
    """A file, folder or link: its kind, size and where its content is described."""

    mode: int
    size: int
    flags: int
    block: bytes

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


class Ext:
    """The file system in ``length`` bytes from ``start`` of a disk."""

    def __init__(self, image: DiskImage, start: int, length: int) -> None:
        """Read the superblock; ExtError when there is none that makes sense."""
        self._image, self._start, self._length = image, start, length
        head = self._read(_SUPERBLOCK, _SUPERBLOCK_SIZE)
        (magic,) = struct.unpack_from("<H", head, 56)
        if magic != _MAGIC:
            raise ExtError("it holds no ext file system")
        self._inodes, _, _, _, _, first, size = struct.unpack_from("<7I", head, 0)
        self._per_group = struct.unpack_from("<I", head, 40)[0]
        (revision,) = struct.unpack_from("<I", head, 76)
        features = struct.unpack_from("<I", head, 96)[0] if revision else 0
        self._inode_size = struct.unpack_from("<H", head, 88)[0] if revision else 128
        if size > 6 or self._per_group == 0 or not 128 <= self._inode_size <= 4096:
            raise ExtError("its superblock is damaged")
        if features & ~_KNOWN:
            raise ExtError(f"it has features that are not read here ({features & ~_KNOWN:#x})")
        self._block = KiB << size
        self._table = (first + 1) * self._block
        self._entry = max(32, struct.unpack_from("<H", head, 254)[0]) if features & _64BIT else 32
        if self._entry > 1024:
            raise ExtError("its superblock is damaged")
        self.uuid = UUID(bytes=head[104:120])
        self.label = head[120:136].split(b"\0", 1)[0].decode("utf-8", "replace")

    def find(self, path: str) -> Inode | None:
        """What is at ``path``, links followed; None when there is nothing."""
        steps = [part for part in reversed(path.split("/")) if part]
        trail = [self._inode(_ROOT)]
        links = 0
        while steps:
            name = steps.pop()
            if name == ".":
                continue
            if name == "..":
                trail = trail[:-1] or trail
                continue
            if not trail[-1].is_folder:
                return None
            number = next((inode for entry, inode in self._entries(trail[-1]) if entry == name), None)
            if number is None:
                return None
            found = self._inode(number)
            if not found.is_link:
                trail.append(found)
                continue
            links += 1
            if links > MAX_LINKS:
                raise ExtError(f"{path!r} has more than {MAX_LINKS} links on its way")
            target = self._target(found)
            if target.startswith("/"):
                trail = trail[:1]
            steps += [part for part in reversed(target.split("/")) if part]
        return trail[-1]

    def names(self, path: str) -> list[str]:
        """The names in a folder, sorted; none when there is no such folder."""
        folder = self.find(path)
        if folder is None or not folder.is_folder:
            return []
        return sorted(name for name, _ in self._entries(folder) if name not in (".", ".."))

    def read(self, path: str, limit: int) -> bytes | None:
        """The file at ``path``; None when there is none. ExtError when it is larger than ``limit``."""
        inode = self.find(path)
        if inode is None or not inode.is_file:
            return None
        if inode.size > limit:
            raise ExtError(f"{path} has {inode.size} bytes, more than {limit}")
        return self._content(inode)

    # --- inodes and their content ---

    def _inode(self, number: int) -> Inode:
        if not 1 <= number <= self._inodes:
            raise ExtError(f"there is no inode {number}")
        group, index = divmod(number - 1, self._per_group)
        entry = self._read(self._table + group * self._entry, self._entry)
        (block,) = struct.unpack_from("<I", entry, 8)
        if self._entry >= 64:
            block |= struct.unpack_from("<I", entry, 40)[0] << 32
        raw = self._read(block * self._block + index * self._inode_size, 128)
        mode, _, low = struct.unpack_from("<HHI", raw, 0)
        (flags,) = struct.unpack_from("<I", raw, 32)
        high = struct.unpack_from("<I", raw, 108)[0] if stat.S_ISREG(mode) else 0
        return Inode(mode, low | high << 32, flags, raw[40:100])

    def _target(self, link: Inode) -> str:
        if link.size > 4096:
            raise ExtError("a link is longer than a path can be")
        short = link.size < 60 and not link.flags & _EXTENTS
        return (link.block[: link.size] if short else self._content(link)).decode("utf-8", "surrogateescape")

    def _entries(self, folder: Inode) -> Iterator[tuple[str, int]]:
        if folder.size > MAX_FOLDER:
            raise ExtError(f"a folder of {folder.size} bytes")
        data = self._content(folder)
        at = 0
        while at + 8 <= len(data):
            inode, length, name_length = struct.unpack_from("<IHB", data, at)
            if length < 8 or 8 + name_length > length:
                raise ExtError("a folder is damaged")
            if inode:
                yield data[at + 8 : at + 8 + name_length].decode("utf-8", "surrogateescape"), inode
            at += length

    def _content(self, inode: Inode) -> bytes:
        if inode.flags & (_INLINE | _ENCRYPTED):
            raise ExtError("a file is encrypted or lies in its inode")
        content = bytearray(inode.size)
        budget = [MAX_PIECES]
        pieces = self._extents(inode.block, MAX_DEPTH, budget)
        if not inode.flags & _EXTENTS:
            pieces = self._mapped(inode.block, -(-inode.size // self._block), budget)
        for logical, physical, count in pieces:
            begin = logical * self._block
            length = min(count * self._block, inode.size - begin)
            if length > 0:
                content[begin : begin + length] = self._read(physical * self._block, length)
        return bytes(content)

    def _extents(self, node: bytes, depth: int, budget: list[int]) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, level = struct.unpack_from("<4H", node, 0)
        if magic != _EXTENT_MAGIC or level > depth or 12 + entries * 12 > len(node):
            raise ExtError("the extents of a file are damaged")
        for number in range(entries):
            self._spend(budget)
            logical, second, third, fourth = struct.unpack_from("<IHHI", node, 12 + number * 12)
            if level:
                below = struct.unpack_from("<I", node, 16 + number * 12)[0] | (fourth & 0xFFFF) << 32
                yield from self._extents(self._read(below * self._block, self._block), level - 1, budget)
            elif second <= _UNWRITTEN:  # more: promised, never written, zeros
                yield logical, third << 32 | fourth, second

    def _mapped(self, block: bytes, blocks: int, budget: list[int]) -> Iterator[tuple[int, int, int]]:
        """The old block map: twelve pointers, then one, two and three levels of blocks of pointers."""
        pointers = struct.unpack("<15I", block)
        per_block = self._block // 4
        logical = 0
        for place, pointer in enumerate(pointers):
            level = max(0, place - 11)
            if logical >= blocks:
                return
            yield from self._pointed(pointer, level, logical, blocks, budget)
            logical += per_block**level

    def _pointed(
        self, pointer: int, level: int, logical: int, blocks: int, budget: list[int]
    ) -> Iterator[tuple[int, int, int]]:
        self._spend(budget)
        if pointer == 0:
            return
        if level == 0:
            yield logical, pointer, 1
            return
        step = (self._block // 4) ** (level - 1)
        for one in struct.unpack(f"<{self._block // 4}I", self._read(pointer * self._block, self._block)):
            if logical >= blocks:
                return
            yield from self._pointed(one, level - 1, logical, blocks, budget)
            logical += step

    @staticmethod
    def _spend(budget: list[int]) -> None:
        budget[0] -= 1
        if budget[0] < 0:
            raise ExtError(f"a file in more than {MAX_PIECES} pieces")

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self._length:
            raise ExtError("it points behind its end")
        data = self._image.pread(self._start + offset, length)
        if len(data) != length:
            raise ExtError("the disk ends before it")
        return data
