"""Reading tar archives: where each file's bytes lie, without trusting a number or a name.

Follows POSIX.1-2017 (ustar, pax) and the GNU tar manual, "Basic Tar Format" and "Sparse Formats". Members that are
not plain files (links, devices) are refused, folders are passed over. Sparse members are read as GNU tar 1.0 and pax
1.0 store them: a raw disk in a tar.gz is often one of these.

Design notes
- One pass over the headers; every offset is checked against the file before it is used, and each step goes forward.
- An archive without its two zero blocks at the end was cut: tools that leave out the second are tolerated.

Not here: V7 archives without "ustar", volumes, GNU's sparse pax formats 0.0 and 0.1, incremental dumps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from imagekit.errors import CorruptImage, InvalidImage, UnsafeImage, UnsupportedFeature
from imagekit.formats.base import SECTOR as BLOCK
from imagekit.formats.base import File, KiB, MiB, round_up
from imagekit.records import dataclass, field
from imagekit.wrappers.parts import (
    Member,
    Part,
    WrapperLimits,
    cut_short,
    first_data,
    leads_elsewhere,
    over_limit,
    plain_parts,
)

MAGIC_AT = 257
POSIX_MAGIC = b"ustar\0"
MAX_NAME = 64 * KiB
MAX_PAX = 1 * MiB
MAX_EXTENSIONS = 4
"""Headers in a row that only say more about the next member."""
MAX_RUNS = 1 << 18
"""Pieces of a sparse member: a disk of terabytes in fragments has some ten thousand."""
MAX_DECIMAL = 20
SPARSE_IN_HEADER = (386, 4, 482)
SPARSE_IN_BLOCK = (0, 21, 504)
"""GNU: where the pieces begin, how many there are, and where it says that another block follows."""

REGULAR = (b"0", b"\0", b"7")
FOLDER, SPARSE = b"5", b"S"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
ELSEWHERE = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
}
CHANGES_MEMBERS = ("path", "size", "linkpath", "GNU.sparse.")
"""Keys that no global header may hold: they would be about every member at once."""

Runs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Header:
    """One header block. ``size`` is the length of what is stored behind it."""

    at: int
    name: str
    size: int
    kind: bytes
    block: bytes


@dataclass(slots=True)
class _Extensions:
    """What headers before a member say about it."""

    name: str | None = None
    pax: dict[str, str] = field(default_factory=dict)
    count: int = 0


def is_tar(file: File) -> bool:
    """Whether the file starts with a tar header: magic and checksum. Where it ends in it, the rest was cut off."""
    block = file.pread(0, BLOCK)
    return block[MAGIC_AT : MAGIC_AT + 5] == POSIX_MAGIC[:5] and (len(block) < BLOCK or _sum_is_right(block))


def _sum_is_right(block: bytes) -> bool:
    try:
        stated = _number(block[148:156])
    except InvalidImage:
        return False
    unsigned = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    # Some old programs summed signed characters.
    signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
    return stated in (unsigned, signed)


def _number(raw: bytes) -> int:
    """Octal digits, or GNU's binary form for large values."""
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    text = raw.replace(b"\0", b" ").strip()
    if text and not (text.isdigit() and set(text) <= set(b"01234567")):
        raise InvalidImage(f"{raw!r} is not a number of a tar header")
    return int(text or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def first_name(file: File, limits: WrapperLimits) -> str | None:
    """Name of the first file of an archive; None when its headers cannot be read."""
    try:
        return next((member.name for member in _members(file, limits)), None)
    except (CorruptImage, InvalidImage, UnsupportedFeature, UnsafeImage):
        return None  # opening it will say why


def tar_members(file: File, limits: WrapperLimits) -> list[Member]:
    """The files of the archive, in order."""
    return list(_members(file, limits))


def _members(file: File, limits: WrapperLimits) -> Iterator[Member]:
    at = count = 0
    extensions = _Extensions()
    while (header := _header(file, at)) is not None:
        data = at + BLOCK
        if header.kind in (LONG_NAME, LONG_LINK, PAX):
            _check_inside(file, header, data, header.size)
            _extend(file, header, extensions)
            at = data + round_up(header.size, BLOCK)
            continue
        count += 1
        if count > limits.members:
            raise over_limit(
                f"more than {limits.members} members in a tar archive",
                path=file.name,
                hint="an archive of an image has a few; unpack it by hand",
                offset=at,
            )
        if header.kind == PAX_GLOBAL:
            _check_inside(file, header, data, header.size)
            _check_global(file, header)
            at = data + round_up(header.size, BLOCK)
            continue
        member, at = _member(file, header, extensions)
        if member is not None:
            yield member
        extensions = _Extensions()
    if extensions.count:
        raise _bad("the archive ends where a member was announced", file, at)


def _bad(message: str, file: File, offset: int) -> CorruptImage:
    return CorruptImage(
        message, hint="the archive is damaged; fetch it again and compare its checksum", path=file.name, offset=offset
    )


def _header(file: File, at: int) -> _Header | None:
    """The header at ``at``, or None at the end of the archive."""
    block = file.pread(at, BLOCK)
    if len(block) < BLOCK:
        raise cut_short("the tar archive", file, at)
    if not any(block):
        behind = first_data(file, at + BLOCK)
        if behind is not None:
            raise _bad("the tar archive ends, but more follows", file, behind)
        return None
    if block[MAGIC_AT : MAGIC_AT + 5] != POSIX_MAGIC[:5] or not _sum_is_right(block):
        raise _bad("a damaged tar header: wrong magic or checksum", file, at)
    try:
        size = _number(block[124:136])
    except InvalidImage as error:
        raise _bad(error.message, file, at + 124) from None
    name = _text(block[:100])
    if block[MAGIC_AT : MAGIC_AT + 6] == POSIX_MAGIC and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return _Header(at, name, size, block[156:157], block)


def _check_inside(file: File, header: _Header, data: int, length: int) -> None:
    if data + length > file.size:
        raise cut_short(f"member {header.name!r} of {length} bytes", file, header.at)


def _extend(file: File, header: _Header, extensions: _Extensions) -> None:
    """Take in a header that says more about the member to come."""
    extensions.count += 1
    most = MAX_PAX if header.kind == PAX else MAX_NAME
    if header.size > most or extensions.count > MAX_EXTENSIONS:
        raise _bad("an extension of a tar header is too long, or one of too many", file, header.at)
    data = file.pread(header.at + BLOCK, header.size)
    if header.kind == LONG_NAME:
        extensions.name = _text(data)
    elif header.kind == PAX:
        extensions.pax.update(_pax(data, file, header.at + BLOCK))


def _check_global(file: File, header: _Header) -> None:
    """A global header may hold a comment and the like."""
    if header.size > MAX_PAX:
        raise _bad("a global pax header is too long", file, header.at)
    for key in _pax(file.pread(header.at + BLOCK, header.size), file, header.at + BLOCK):
        if key.startswith(CHANGES_MEMBERS):
            raise UnsupportedFeature(
                f"a global pax header sets {key!r} of every member", path=file.name, offset=header.at
            )


def _pax(data: bytes, file: File, offset: int) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE\\n`` of a pax header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        length, space, _ = data[at : at + MAX_DECIMAL].partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(data) - at:
            raise _bad("a damaged pax record", file, offset + at)
        record = data[at + len(length) + 1 : at + int(length)]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _bad("a damaged pax record", file, offset + at)
        found[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        at += int(length)
    return found


def _member(file: File, header: _Header, extensions: _Extensions) -> tuple[Member | None, int]:
    """The member that a header begins (None: a folder), and where the next header is."""
    pax = extensions.pax
    name = pax.get("path", extensions.name or header.name)
    stored = _decimal(pax["size"], file, header.at) if "size" in pax else header.size
    if header.kind in ELSEWHERE:
        raise leads_elsewhere(f"{name!r} is {ELSEWHERE[header.kind]}", path=file.name, offset=header.at)
    if header.kind == FOLDER or (header.kind == b"\0" and name.endswith("/")):
        if stored:
            raise _bad(f"the folder {name!r} has {stored} bytes of its own", file, header.at)
        return None, header.at + BLOCK
    data, size = header.at + BLOCK, stored
    runs: Runs = [(0, stored)]
    if header.kind == SPARSE:
        runs, size, data = _gnu_runs(file, header)
    elif header.kind not in REGULAR:
        raise UnsupportedFeature(
            f"{name!r} is a tar member of type {header.kind!r}", path=file.name, offset=header.at
        )
    _check_inside(file, header, data, stored)
    behind = data + stored
    if header.kind in REGULAR and any(key.startswith("GNU.sparse.") for key in pax):
        name, size = _pax_sparse(file, header, pax, name)
        runs, data = _pax_runs(file, data, behind)
    _check_runs(runs, size, behind - data, file, header.at)
    member = Member(name.removeprefix("./"), size, partial(_parts, file, runs, data))
    return member, round_up(behind, BLOCK)


def _parts(file: File, runs: Runs, data: int) -> Iterator[Part]:
    for offset, length in runs:
        yield from plain_parts(file, data, length, to=offset)
        data += length


# --- sparse members --------------------------------------------------------------------------------------------


def _check_runs(runs: Runs, size: int, stored: int, file: File, offset: int) -> None:
    """Pieces in ascending order, inside the member, and as long together as what is stored."""
    end = 0
    for start, length in runs:
        if start < end or start + length > size:
            raise _bad(f"a piece at {start}..{start + length} of a member of {size} bytes", file, offset)
        end = start + length
    total = sum(length for _, length in runs)
    if total != stored:
        raise _bad(f"a member's pieces have {total} bytes together, {stored} are stored", file, offset)


def _too_many_runs(file: File, offset: int) -> Exception:
    return over_limit(
        f"a sparse member in more than {MAX_RUNS} pieces",
        path=file.name,
        hint="unpack it with tar, and convert the file",
        offset=offset,
    )


def _gnu_runs(file: File, header: _Header) -> tuple[Runs, int, int]:
    """Pieces, real size, and where the data begins, of a member in GNU's own sparse form."""
    runs: Runs = []
    block, at, (first, count, more) = header.block, header.at, SPARSE_IN_HEADER
    try:
        size = _number(header.block[483:495])
        while True:
            for place in range(first, first + count * 24, 24):
                if not block[place]:
                    break
                runs.append((_number(block[place : place + 12]), _number(block[place + 12 : place + 24])))
            at += BLOCK
            if not block[more]:
                return runs, size, at
            if len(runs) > MAX_RUNS:
                raise _too_many_runs(file, at)
            block, (first, count, more) = file.pread(at, BLOCK), SPARSE_IN_BLOCK
            if len(block) < BLOCK:
                raise cut_short("a sparse member's map", file, at)
            if not block[0]:
                raise _bad("a block without pieces in a sparse member's map", file, at)
    except InvalidImage as error:
        raise _bad(error.message, file, at) from None


def _pax_sparse(file: File, header: _Header, pax: dict[str, str], name: str) -> tuple[str, int]:
    """Name and real size of a sparse member in pax form 1.0."""
    version = f"{pax.get('GNU.sparse.major', '0')}.{pax.get('GNU.sparse.minor', '0')}"
    if version != "1.0" or "GNU.sparse.realsize" not in pax:
        raise UnsupportedFeature(
            f"{name!r} is stored in the sparse pax format {version}; 1.0 is read",
            path=file.name,
            hint="unpack it with tar, and convert the file",
            offset=header.at,
        )
    return pax.get("GNU.sparse.name", name), _decimal(pax["GNU.sparse.realsize"], file, header.at)


def _pax_runs(file: File, at: int, end: int) -> tuple[Runs, int]:
    """The map before the data of a sparse member: decimal lines, the count of pieces first, padded to a block."""
    numbers: list[int] = []
    rest = b""
    while not numbers or len(numbers) <= 2 * numbers[0]:
        if at + BLOCK > end or len(rest) > BLOCK:
            raise _bad("a sparse member's map is cut short, or no list of numbers", file, at)
        *lines, rest = (rest + file.pread(at, BLOCK)).split(b"\n")
        for line in lines:
            if numbers and len(numbers) > 2 * numbers[0]:
                break  # the padding
            numbers.append(_decimal(line.decode("latin-1"), file, at))
            if numbers[0] > MAX_RUNS:
                raise _too_many_runs(file, at)
        at += BLOCK
    return list(zip(numbers[1::2], numbers[2::2], strict=True)), at


def _decimal(text: str, file: File, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= MAX_DECIMAL):
        raise _bad(f"{text[:40]!r} where a tar archive has a number", file, offset)
    return int(text)
