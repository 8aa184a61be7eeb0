"""Reading zip archives: where each file's packed bytes lie, by the directory at the end, checked against the rest.

Follows PKWARE's APPNOTE 6.3.10: stored and deflated members, zip64. The directory is the truth; a local header that
contradicts it, a second end record or bytes between the directory and its end are refused, for the next program might
believe those instead.

Not here: encryption, several volumes, methods other than stored and deflate (Windows packs files above 2 GiB with
Deflate64: 7-Zip unpacks that).
"""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Iterator
from functools import partial

from imagekit.errors import CorruptImage, UnsafeImage, UnsupportedFeature
from imagekit.formats.base import File, KiB, MiB, read_exactly
from imagekit.records import dataclass
from imagekit.wrappers.parts import ZEROS, Member, Part, WrapperLimits, leads_elsewhere, over_limit, plain_parts
from imagekit.wrappers.streams import Input, one_stream

LOCAL, ENTRY, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
END64, LOCATOR64 = b"PK\6\6", b"PK\6\7"
SPLIT = b"PK\7\x08"
MAX_COMMENT = 65535
MAX_PADDING = 64 * KiB
"""Zeros tolerated behind the end record: it is found from the end of the file."""
MAX_DIRECTORY = 4 * MiB
STORED, DEFLATED = 0, 8
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 99: "AES encryption"}
ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
UTF8 = 1 << 11
UNIX = 3
EXTRA_ZIP64 = 1
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")


@dataclass(frozen=True, slots=True)
class _Directory:
    offset: int
    size: int
    entries: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A member as the directory describes it."""

    at: int
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    local: int
    mode: int

    @property
    def name(self) -> str:
        text = self.raw_name.decode("utf-8" if self.flags & UTF8 else "cp437", "backslashreplace")
        return text.replace("\\", "/") if "/" not in text else text  # some Windows programs


def is_zip(file: File) -> bool:
    """Whether the file starts as a zip archive, also as an empty or a split one."""
    return file.pread(0, 4) in (LOCAL, END, SPLIT)


def zip_members(file: File, limits: WrapperLimits) -> list[Member]:
    """The files of the archive, in the order of its directory."""
    if file.pread(0, 4) == SPLIT:
        raise UnsupportedFeature(
            "a zip archive in several volumes", path=file.name, hint="join and unpack it with 7-Zip"
        )
    directory = _directory(file)
    if directory.entries > limits.members or directory.size > MAX_DIRECTORY:
        raise over_limit(
            f"{directory.entries} members in a zip archive, with a directory of {directory.size} bytes",
            path=file.name,
            hint="an archive of an image has a few; unpack it by hand",
        )
    return [
        Member(entry.name, entry.size, partial(_parts, file, entry, directory, limits))
        for entry in _entries(file, directory)
        if not (entry.name.endswith("/") or stat.S_ISDIR(entry.mode))
    ]


def _bad(message: str, file: File, offset: int | None = None) -> CorruptImage:
    return CorruptImage(
        message, hint="the archive is damaged; fetch it again and compare its checksum", path=file.name, offset=offset
    )


# --- the directory ---------------------------------------------------------------------------------------------


def _directory(file: File) -> _Directory:
    """Where the directory is, from the one end record."""
    start = max(0, file.size - _END.size - MAX_COMMENT - MAX_PADDING)
    tail = file.pread(start, file.size - start)
    ends = []
    at = tail.find(END)
    while at >= 0:
        if at + _END.size <= len(tail):
            comment = int.from_bytes(tail[at + 20 : at + 22], "little")
            if at + _END.size + comment <= len(tail) and not any(tail[at + _END.size + comment :]):
                ends.append(at)
        at = tail.find(END, at + 1)
    if not ends:
        raise _bad("a zip archive without its end: no directory was found", file, file.size)
    if len(ends) > 1:
        raise _ambiguous("the archive has two ends, so two directories", file, start + ends[0])
    return _parse_end(file, start + ends[0], tail[ends[0] : ends[0] + _END.size])


def _parse_end(file: File, at: int, raw: bytes) -> _Directory:
    _, disk, first_disk, here, entries, size, offset, _ = _END.unpack(raw)
    end = at
    if FULL16 in (here, entries) or FULL32 in (size, offset):
        located = file.pread(at - _LOCATOR64.size, _LOCATOR64.size) if at >= _LOCATOR64.size else b""
        if located[:4] == LOCATOR64:
            _, _, end, _ = _LOCATOR64.unpack(located)
            record = read_exactly(file, end, _END64.size, "the zip64 end record") if end < at else b""
            if record[:4] != END64:
                raise _bad("no zip64 end record where one was announced", file, at)
            _, length, _, _, disk, first_disk, here, entries, size, offset = _END64.unpack(record)
            if end + 12 + length != at - _LOCATOR64.size:
                raise _bad("the zip64 end record does not end where its locator begins", file, end)
    if disk or first_disk or here != entries:
        raise UnsupportedFeature(
            "a zip archive in several volumes", path=file.name, hint="join and unpack it with 7-Zip"
        )
    if offset + size != end:
        raise _bad(f"the directory at {offset:#x}..{offset + size:#x} does not end at its end record", file, end)
    return _Directory(offset, size, entries)


def _ambiguous(message: str, file: File, offset: int) -> UnsafeImage:
    return UnsafeImage(
        f"refused by rule ambiguous: {message} — a file that is two things at once means something else to the "
        "next program",
        rule="ambiguous",
        path=file.name,
        offset=offset,
        hint="unpack it, and see which one is meant",
    )


def _entries(file: File, directory: _Directory) -> Iterator[_Entry]:
    raw = read_exactly(file, directory.offset, directory.size, "the zip directory")
    at = 0
    for _ in range(directory.entries):
        if raw[at : at + 4] != ENTRY or at + _ENTRY.size > len(raw):
            raise _bad("the zip directory holds something that is no entry", file, directory.offset + at)
        fields = _ENTRY.unpack_from(raw, at)
        name_length, extra_length, comment_length = fields[10:13]
        after = at + _ENTRY.size + name_length + extra_length + comment_length
        if after > len(raw):
            raise _bad("an entry of the zip directory is cut short", file, directory.offset + at)
        names = at + _ENTRY.size
        extra = raw[names + name_length : names + name_length + extra_length]
        yield _entry(file, directory.offset + at, fields, raw[names : names + name_length], extra)
        at = after
    if at != len(raw):
        raise _bad("more in the zip directory than its entries", file, directory.offset + at)


def _entry(file: File, at: int, fields: tuple[int, ...], name: bytes, extra: bytes) -> _Entry:
    size, packed, local = _zip64(file, at, extra, size=fields[9], packed=fields[8], local=fields[16])
    mode = fields[15] >> 16 if fields[1] >> 8 == UNIX else 0
    entry = _Entry(at, name, fields[3], fields[4], fields[7], packed, size, local, mode)
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "a device or the like"
        raise leads_elsewhere(f"{entry.name!r} is {what}", path=file.name, offset=at)
    return entry


def _zip64(file: File, at: int, extra: bytes, *, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Size, packed size and local header, from the zip64 field where the entry has no room for them."""
    values = [size, packed, local]
    missing = [place for place, value in enumerate(values) if value == FULL32]
    while missing and len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        content, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind != EXTRA_ZIP64:
            continue
        if len(content) < 8 * len(missing):
            raise _bad("the zip64 field of an entry is cut short", file, at)
        for place, value in zip(missing, struct.unpack_from(f"<{len(missing)}Q", content), strict=True):
            values[place] = value
        missing = []
    return values[0], values[1], values[2]


# --- a member --------------------------------------------------------------------------------------------------


def _parts(file: File, entry: _Entry, directory: _Directory, limits: WrapperLimits) -> Iterator[Part]:
    """The member's bytes; its length and CRC are checked at the end."""
    start = _data_start(file, entry, directory)
    crc = done = 0
    for offset, piece in _unpacked(file, entry, start, start + entry.packed, limits):
        crc = zlib.crc32(piece, _crc_of_zeros(offset - done, crc))
        done = offset + len(piece)
        if done > entry.size:
            break
        yield offset, piece
    if entry.method == STORED:  # may lie in holes of the file, which count all the same
        crc, done = _crc_of_zeros(entry.size - done, crc), entry.size
    if done != entry.size:
        found = "more" if done > entry.size else str(done)
        raise _bad(f"{entry.name!r}: {entry.size} bytes in the directory, {found} unpacked", file, start)
    if crc != entry.crc:
        raise _bad(f"{entry.name!r}: CRC {crc:#010x}, {entry.crc:#010x} in the directory", file, start)


def _crc_of_zeros(length: int, crc: int) -> int:
    while length > 0:
        crc = zlib.crc32(ZEROS[:length], crc)
        length -= len(ZEROS)
    return crc


def _data_start(file: File, entry: _Entry, directory: _Directory) -> int:
    """Where the packed bytes begin, once the local header agrees with the directory."""
    if entry.flags & ENCRYPTED or entry.method == 99:
        raise UnsupportedFeature(
            f"{entry.name!r} is encrypted", path=file.name, hint="unpack it with 7-Zip", offset=entry.at
        )
    if entry.method not in (STORED, DEFLATED):
        method = METHODS.get(entry.method, f"method {entry.method}")
        raise UnsupportedFeature(
            f"{entry.name!r} is packed with {method}; stored and deflated members are read",
            path=file.name,
            hint="unpack it with 7-Zip",
            offset=entry.at,
        )
    raw = file.pread(entry.local, _LOCAL.size)
    if len(raw) < _LOCAL.size or raw[:4] != LOCAL:
        raise _bad(f"{entry.name!r}: no local header", file, entry.local)
    _, _, flags, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(raw)
    name = file.pread(entry.local + _LOCAL.size, name_length)
    if (name, method, flags & ENCRYPTED) != (entry.raw_name, entry.method, entry.flags & ENCRYPTED):
        raise _ambiguous(f"{entry.name!r}: its local header says something else", file, entry.local)
    start: int = entry.local + _LOCAL.size + name_length + extra_length
    if start + entry.packed > directory.offset:
        raise _bad(f"{entry.name!r} reaches into the directory", file, entry.local)
    return start


def _unpacked(file: File, entry: _Entry, start: int, end: int, limits: WrapperLimits) -> Iterator[Part]:
    if entry.method == STORED:
        if entry.packed != entry.size:
            raise _bad(f"{entry.name!r} is stored, but of two sizes", file, entry.at)
        yield from plain_parts(file, start, entry.packed)
        return
    source, done = Input(file, start, end), 0
    for piece in one_stream(source, "deflate", limits):
        yield done, piece
        done += len(piece)
    if source.at != end:
        raise _bad(f"{entry.name!r}: its stream ends before its packed size", file, source.at)
