"""What the wrappers around disk images share: the limits, a member of an archive, and the choice of the one disk.

An unwrapped file comes as *parts*: (offset, bytes) in ascending order, of at most about PIECE bytes each. What lies
between two parts is zero; so holes cost nothing, and a gigantic one is never held in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from imagekit.errors import CorruptImage, UnsafeImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import File, KiB, MiB, TiB
from imagekit.records import dataclass

PIECE = 1 * MiB
ZEROS = bytes(PIECE)
BLOCK = 4 * KiB
"""Zeros are left out by blocks of this size, as file systems allocate."""
WIDE = 64 * KiB
LIMIT_RULE = "wrapper-limit"
REFERENCE_RULE = "wrapper-reference"
NAMES_SHOWN = 8

Part: TypeAlias = tuple[int, bytes]

_PACKED_SUFFIX = re.compile(r"\.(gz|xz|bz2|zst)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class WrapperLimits:
    """How much a wrapper may ask of this machine. Sizes in bytes.

    What fills a medium is data, what costs time is everything: so bytes other than zero and all bytes unpacked have
    ratios of their own, both to the size of the outermost file, which is what a sender has to send. A disk that is
    mostly empty is honest at any ratio its packer reaches: gzip 1000, xz 7000, zstd 33000 to one. Only bzip2 (1.3
    million) and one packer inside another go beyond ``zero_ratio``.
    """

    size: int = 64 * TiB
    """Of one unwrapped file, holes included."""

    ratio: int = 250
    """Unpacked bytes in blocks that are not all zero, to one packed byte; beyond the first ``ratio_from``."""

    ratio_from: int = 256 * MiB
    zero_ratio: int = 40_000
    """All bytes unpacked, zeros too, to one packed byte; beyond the first ``zero_ratio_from``."""

    zero_ratio_from: int = 1 * TiB
    nesting: int = 2
    """Wrappers around one disk: .tar.gz is two, an .ova with a packed disk is two."""

    members: int = 1000
    """Files and folders in one archive."""

    memory: int = 256 * MiB
    """What an xz stream may ask for; the window of a zstd stream is at most half of it."""

    reserve: int = 64 * MiB
    """What stays free where the unwrapped file is written."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive. ``size`` is what the archive's directory says; ``parts`` reads and checks."""

    name: str
    size: int
    parts: Callable[[], Iterator[Part]]


def over_limit(message: str, *, path: str, hint: str, offset: int | None = None) -> UnsafeImage:
    """The error for a wrapper that asks for more than the limits allow."""
    return UnsafeImage(
        f"refused by rule {LIMIT_RULE}: {message}", rule=LIMIT_RULE, path=path, hint=hint, offset=offset
    )


def leads_elsewhere(message: str, *, path: str, offset: int | None = None) -> UnsafeImage:
    """The error for a package that names something that is not in it."""
    return UnsafeImage(
        f"refused by rule {REFERENCE_RULE}: {message} — a package must not decide what else of this machine is read",
        rule=REFERENCE_RULE,
        path=path,
        hint="unpack it by hand where its origin is trusted",
        offset=offset,
    )


def cut_short(what: str, file: File, offset: int) -> CorruptImage:
    return CorruptImage(
        f"{what} is cut short: the file ends at {file.size}",
        hint="the file looks truncated; fetch it again and compare its checksum",
        path=file.name,
        offset=offset,
    )


def first_data(file: File, start: int) -> int | None:
    """Offset of the first byte from ``start`` that is not zero; None when there is none."""
    for first, length in file.data_ranges(start, file.size - start):
        at, end = first, first + length
        while at < end:
            piece = file.pread(at, min(PIECE, end - at))
            if not piece:
                return None
            if not ZEROS.startswith(piece):
                return at + len(piece) - len(piece.lstrip(b"\0"))
            at += len(piece)
    return None


def plain_parts(file: File, start: int, length: int, *, to: int = 0) -> Iterator[Part]:
    """Bytes stored as they are, as parts from ``to`` on; holes of the file are left out."""
    for first, run in file.data_ranges(start, length):
        at, end = first, first + run
        while at < end:
            piece = file.pread(at, min(PIECE, end - at))
            if not piece:
                raise cut_short("the data", file, at)
            yield to + at - start, piece
            at += len(piece)


def without_gaps(parts: Iterator[Part], size: int) -> Iterator[bytes]:
    """The bytes of the parts with the zeros between them, for whoever needs to see all: digests."""
    done = 0
    for offset, piece in parts:
        yield from _zeros(offset - done)
        yield piece
        done = offset + len(piece)
    yield from _zeros(size - done)


def _zeros(length: int) -> Iterator[bytes]:
    while length > 0:
        yield ZEROS[:length]
        length -= PIECE


def base_name(name: str) -> str:
    """The last component of a member's name, whichever slash its maker used."""
    return re.split(r"[/\\]", name)[-1]


def is_disk_name(name: str) -> bool:
    """Whether a name promises a disk: the suffix of a format known here, or .ova; also packed once more."""
    plain = _PACKED_SUFFIX.sub("", base_name(name))
    return registry.suffix_format(plain) is not None or os.path.splitext(plain)[1].lower() == ".ova"  # noqa: PTH122


def choose_disk(members: Sequence[Member], path: str) -> Member:
    """The only file, or the only one named like a disk. UnsupportedFeature with the names otherwise."""
    # What macOS puts beside every file: "._NAME", or all of it under "__MACOSX/".
    files = [one for one in members if not (one.name.startswith("__MACOSX/") or base_name(one.name).startswith("._"))]
    disks = [one for one in files if is_disk_name(one.name)]
    for chosen in (files, disks):
        if len(chosen) == 1:
            return chosen[0]
    if not files:
        raise UnsupportedFeature("the archive holds no file", path=path, hint="check what it was made from")
    found = disks or files
    names = ", ".join(repr(one.name) for one in found[:NAMES_SHOWN])
    more = "" if len(found) <= NAMES_SHOWN else f" and {len(found) - NAMES_SHOWN} more"
    what = "more than one disk" if disks else "several files, none of them named like a disk"
    raise UnsupportedFeature(
        f"the archive holds {what}: {names}{more}",
        path=path,
        hint="unpack it, and convert each disk by its own name",
    )


def check_unique(members: Sequence[Member], path: str) -> None:
    """Refuse two members of one name: which of them counts differs from program to program."""
    seen: set[str] = set()
    for one in members:
        if one.name in seen:
            raise UnsafeImage(
                f"refused by rule ambiguous: two members are called {one.name!r} — "
                "a file that is two things at once means something else to the next program",
                rule="ambiguous",
                path=path,
                hint="unpack it, and see which one is meant",
            )
        seen.add(one.name)


def data_runs(offset: int, piece: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of ``piece``, which belongs at ``offset``, in blocks that are not all zero."""
    start = at = 0  # what lies between is data, and not yielded yet
    while at < len(piece):
        end = min(at + BLOCK - (offset + at) % BLOCK, len(piece))
        wide = min(at + WIDE, len(piece))
        zero = _is_zero(piece, at, wide)
        if zero:
            end = wide
        else:
            zero = _is_zero(piece, at, end)
        if zero:
            if at > start:
                yield start, at
            start = end
        at = end
    if at > start:
        yield start, at


_ZERO_BLOCK, _ZERO_WIDE = bytes(BLOCK), bytes(WIDE)


def _is_zero(piece: bytes, start: int, end: int) -> bool:
    length = end - start
    zeros = _ZERO_WIDE if length == WIDE else _ZERO_BLOCK if length == BLOCK else ZEROS[:length]
    return piece.startswith(zeros, start)
