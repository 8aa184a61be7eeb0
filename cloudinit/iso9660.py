"""Reads ISO 9660 media with their Joliet and Rock Ridge names; the bytes may come from anyone.

Follows ECMA-119 (ISO 9660), Microsoft's Joliet specification, IEEE P1281 (SUSP) and P1282 (Rock Ridge). It is
deliberately not built on the library that `imagekit.cloudinit.iso` writes with, so that reading back what was
written is a second opinion, and so that damaged input ends in imagekit's errors.

Bounds on hostile input: folders and files may together claim no more bytes than the medium has (files
that share an extent count once), a folder is entered once, and depth and continuation chains are capped.

Not read: multi-extent and interleaved files, relocated folders, symbolic links, zisofs, UDF:
UnsupportedFeature.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from imagekit.errors import CorruptImage, InvalidImage, UnsupportedFeature

SECTOR = 2048
_FIRST_DESCRIPTOR = 16  # sectors before it are the system area, ECMA-119 6.2.1
_PRIMARY, _SUPPLEMENTARY, _TERMINATOR = 1, 2, 255
_JOLIET_ESCAPES = (b"%/@", b"%/C", b"%/E")  # UCS-2 levels 1, 2 and 3
_FOLDER, _MULTI_EXTENT = 0x02, 0x80  # file flags, ECMA-119 9.1.6
_RECORD = struct.Struct("<BBI4xI4x7xBBB4xB")  # little-endian halves of the both-byte-order fields
_CONTINUATION = struct.Struct("<I4xI4xI4x")
_UNSUPPORTED_ENTRIES = {
    b"CL": "a relocated folder",
    b"SL": "a symbolic link",
    b"ZF": "a zisofs-compressed file",
}

MAX_DEPTH = 64
MAX_CONTINUATIONS = 8
DEFAULT_MAX_SIZE = 256 << 20
"""Largest medium that `read_iso` takes into memory; config drives are at most 64 MiB."""


@dataclass(frozen=True, slots=True)
class IsoContent:
    """What a medium holds: path (with ``/``) to bytes, without empty folders.

    ``tree`` is what Linux shows: Rock Ridge names where there are any, else Joliet, else plain ISO names.
    ``joliet`` is what Windows shows, None without Joliet; then it shows ``plain``, the bare ISO names. Labels come
    from the descriptors of each view.
    """

    label: str
    tree: dict[str, bytes]
    rock_ridge: bool
    joliet_label: str | None
    joliet: dict[str, bytes] | None
    plain: dict[str, bytes] = field(default_factory=dict)
    """Read only when there is no Joliet."""


@dataclass(frozen=True, slots=True)
class VolumeDescriptor:
    """A primary or supplementary descriptor; ``offset`` is its byte position."""

    offset: int
    joliet: bool
    label: str


@dataclass(frozen=True, slots=True)
class DirectoryRecord:
    """One directory record; ``offset`` is its byte position, ``start`` that of the content."""

    offset: int
    start: int
    size: int
    is_folder: bool
    identifier: bytes
    system_use: int
    end: int


@dataclass(frozen=True, slots=True)
class SystemUseEntry:
    """One SUSP entry; ``offset`` is the byte position of its signature, ``body`` what follows the header."""

    signature: bytes
    offset: int
    body: bytes


def read_iso(source: bytes | BinaryIO, *, max_size: int = DEFAULT_MAX_SIZE) -> IsoContent:
    """Read the whole medium: label and files, through every kind of name it has.

    ``max_size`` is in bytes. Raises InvalidImage when it is no ISO 9660 medium or larger than that,
    CorruptImage when it is damaged, UnsupportedFeature for what the module does not read.
    """
    image = source if isinstance(source, bytes) else source.read(max_size + 1)
    if len(image) > max_size:
        raise InvalidImage(f"the medium is larger than {max_size} bytes, the most that is read here")
    return _Medium(image).content()


def volume_descriptors(image: bytes) -> list[VolumeDescriptor]:
    """The primary descriptor, which comes first, and the supplementary ones."""
    found: list[VolumeDescriptor] = []
    for offset in range(_FIRST_DESCRIPTOR * SECTOR, len(image) - SECTOR + 1, SECTOR):
        if image[offset + 1 : offset + 6] != b"CD001":
            break
        kind = image[offset]
        if kind == _TERMINATOR:
            if not found or found[0].joliet:
                raise CorruptImage("no primary volume descriptor before the terminator", offset=offset)
            return found
        if kind in (_PRIMARY, _SUPPLEMENTARY):
            block_size = struct.unpack_from("<H", image, offset + 128)[0]
            if block_size != SECTOR:
                raise UnsupportedFeature(f"logical blocks of {block_size} bytes, expected 2048", offset=offset)
            joliet = kind == _SUPPLEMENTARY and image[offset + 88 : offset + 91] in _JOLIET_ESCAPES
            if kind == _PRIMARY or joliet:
                raw = image[offset + 40 : offset + 72]
                label = raw.decode("utf-16-be" if joliet else "utf-8", "backslashreplace")
                found.append(VolumeDescriptor(offset, joliet, label.rstrip(" \0")))
    if not found:
        raise InvalidImage("not an ISO 9660 medium: no volume descriptor in sector 16")
    raise CorruptImage("the volume descriptors have no terminator: the medium is cut short or damaged")


def root_record(image: bytes, descriptor: VolumeDescriptor) -> DirectoryRecord:
    """The root folder's record, which lies inside the descriptor."""
    return _record(image, descriptor.offset + 156, descriptor.offset + 190)


def folder_records(image: bytes, folder: DirectoryRecord) -> Iterator[DirectoryRecord]:
    """The records of a folder, "." and ".." first."""
    end = folder.start + folder.size
    if end > len(image):
        raise CorruptImage(f"a folder ends at {end:#x}, past the end of the medium", offset=folder.offset)
    position = folder.start
    while position < end:
        length = image[position]
        if length == 0:  # records never cross sectors; the rest of this one is padding
            position = (position // SECTOR + 1) * SECTOR
            continue
        yield _record(image, position, min(end, (position // SECTOR + 1) * SECTOR))
        position += length


def _record(image: bytes, offset: int, limit: int) -> DirectoryRecord:
    if offset + _RECORD.size > limit or limit > len(image):
        raise CorruptImage("a directory record crosses the end of its sector", offset=offset)
    length, attributes, block, size, flags, unit, gap, name_length = _RECORD.unpack_from(image, offset)
    name_end = offset + _RECORD.size + name_length
    system_use = name_end + 1 - name_length % 2  # a pad byte keeps the system use field even
    end = offset + length
    if name_length == 0 or not name_end <= end <= limit:
        raise CorruptImage(f"a directory record of {length} bytes cannot be right", offset=offset)
    if flags & _MULTI_EXTENT or unit or gap:
        raise UnsupportedFeature("a multi-extent or interleaved file", offset=offset)
    return DirectoryRecord(
        offset=offset,
        start=(block + attributes) * SECTOR,
        size=size,
        is_folder=bool(flags & _FOLDER),
        identifier=image[offset + _RECORD.size : name_end],
        system_use=system_use,
        end=end,
    )


def system_use_entries(image: bytes, record: DirectoryRecord, *, skip: int = 0) -> Iterator[SystemUseEntry]:
    """The SUSP entries of a record, continuation areas included; ``skip`` as the root's SP entry says."""
    position, end = record.system_use + skip, record.end
    for _ in range(MAX_CONTINUATIONS):
        continued: tuple[int, int] | None = None
        while position + 4 <= end:
            signature, length = image[position : position + 2], image[position + 2]
            if length == 0 and signature == b"\0\0":  # padding
                break
            if length < 4 or position + length > end:
                raise CorruptImage("a system use entry overruns its area", offset=position)
            body = image[position + 4 : position + length]
            yield SystemUseEntry(signature, position, body)
            if signature == b"ST":
                break
            if signature == b"CE" and len(body) == _CONTINUATION.size:
                block, offset, size = _CONTINUATION.unpack(body)
                if offset + size > SECTOR:
                    raise CorruptImage("a system use continuation crosses its sector", offset=position)
                continued = (block * SECTOR + offset, size)
            position += length
        if continued is None:
            return
        position, end = continued[0], sum(continued)
        if end > len(image):
            raise CorruptImage("a system use continuation lies past the end of the medium", offset=position)
    raise CorruptImage(f"more than {MAX_CONTINUATIONS} system use continuations", offset=record.offset)


def rock_ridge_skip(image: bytes, root: DirectoryRecord) -> int | None:
    """Bytes to skip before each record's SUSP entries, or None when the medium has no Rock Ridge names."""
    dot = next(folder_records(image, root), None)
    if dot is None or image[dot.system_use : dot.system_use + 6] != b"SP\x07\x01\xbe\xef":
        return None
    return image[dot.system_use + 6]


class _Medium:
    """One read of one medium: the bytes, and how many of them folders and files have claimed so far."""

    def __init__(self, image: bytes) -> None:
        self._image = image
        self._files: dict[tuple[int, int], bytes] = {}
        self._claimed = 0

    def content(self) -> IsoContent:
        primary, *others = volume_descriptors(self._image)
        joliet = next((other for other in others if other.joliet), None)
        joliet_tree = None if joliet is None else self._tree(joliet, None)
        skip = rock_ridge_skip(self._image, root_record(self._image, primary))
        plain_is_hidden = skip is None and joliet_tree is not None
        return IsoContent(
            label=primary.label,
            tree=joliet_tree if plain_is_hidden and joliet_tree is not None else self._tree(primary, skip),
            rock_ridge=skip is not None,
            joliet_label=None if joliet is None else joliet.label,
            joliet=joliet_tree,
            plain=self._tree(primary, None) if joliet_tree is None else {},
        )

    def _tree(self, descriptor: VolumeDescriptor, skip: int | None) -> dict[str, bytes]:
        """All files of one view; ``skip`` is not None where Rock Ridge gives the names."""
        tree: dict[str, bytes] = {}
        self._claimed = sum(map(len, self._files.values()))  # each view has folders of its own
        entered: set[int] = set()
        names: set[str] = set()
        pending = [("", root_record(self._image, descriptor))]
        while pending:
            prefix, folder = pending.pop()
            if folder.start in entered or prefix.count("/") > MAX_DEPTH:
                raise CorruptImage("folders that contain themselves, or nested too deep", offset=folder.offset)
            entered.add(folder.start)
            self._claim(folder)
            for record in folder_records(self._image, folder):
                if record.identifier in (b"\0", b"\1"):  # "." and ".."
                    continue
                path = prefix + self._name(record, descriptor.joliet, skip)
                if path in names:
                    raise CorruptImage(f"{path!r} is there twice", offset=record.offset)
                names.add(path)
                if record.is_folder:
                    pending.append((path + "/", record))
                else:
                    tree[path] = self._read(record)
        return tree

    def _name(self, record: DirectoryRecord, joliet: bool, skip: int | None) -> str:
        if joliet:
            name = record.identifier.decode("utf-16-be", "backslashreplace").removesuffix(";1")
        elif skip is None:
            name = record.identifier.decode("utf-8", "backslashreplace").split(";")[0].rstrip(".")
        else:
            name = self._rock_ridge_name(record, skip).decode("utf-8", "backslashreplace")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptImage(f"{name!r} is not a file name", offset=record.offset)
        return name

    def _rock_ridge_name(self, record: DirectoryRecord, skip: int) -> bytes:
        name = b""
        for entry in system_use_entries(self._image, record, skip=skip):
            if entry.signature in _UNSUPPORTED_ENTRIES:
                raise UnsupportedFeature(_UNSUPPORTED_ENTRIES[entry.signature], offset=entry.offset)
            if entry.signature == b"NM":
                name += entry.body[1:]
        return name or record.identifier.split(b";")[0]

    def _read(self, record: DirectoryRecord) -> bytes:
        extent = (record.start, record.size)
        if record.size and extent not in self._files:
            self._claim(record)
            self._files[extent] = self._image[record.start : record.start + record.size]
        return self._files.get(extent, b"")

    def _claim(self, record: DirectoryRecord) -> None:
        """Count bytes that a folder or file lays claim to: they exist, and no byte serves two of them."""
        end = record.start + record.size
        if end > len(self._image):
            raise CorruptImage(
                f"content ends at {end:#x}, past the end of the medium at {len(self._image):#x}",
                offset=record.offset,
            )
        self._claimed += record.size
        if self._claimed > len(self._image):
            raise CorruptImage("folders and files claim more bytes than the medium has", offset=record.offset)
