"""How a differencing VHD names its parent: the parent locators, and the name field of the dynamic header.

Follows the specification 1.0, "Parent Locator", and what Windows and XenServer write (blktap, libvhd.c).

    W2ru, W2ku   relative, absolute path, UTF-16 little-endian, backslashes
    Wi2r, Wi2k   the same in the code page of the machine that wrote it; deprecated
    MacX         a file URL; XenServer puts a path after ``file://``, relative to the child
    Mac          a Macintosh alias: names nothing here

Design notes
- A locator's data lies anywhere in the file; only its offset and length are needed to read it. Both are bounded
  before anything is read. One that is damaged is a fact: the others may still lead to the parent.
- Windows puts the absolute path into the header too (big-endian, cut at 256 characters), XenServer the file name,
  and its tools want every locator's last component to be that name.
- Nothing here looks for a file: names are handed on as they are.
"""

from __future__ import annotations

from typing import NamedTuple

from imagekit.errors import UnsupportedFeature
from imagekit.formats.base import Fact, File, KiB, ParentLink
from imagekit.formats.vhd_header import LOCATOR_SIZE, LOCATORS_OFFSET, DynamicHeader, Footer, Locator
from imagekit.records import dataclass

MAX_LENGTH = 64 * KiB
"""Bytes of a name: the longest path of Windows, 32767 characters, in UTF-16."""
NAME_FIELD = 512
MACINTOSH = b"Mac "
ENCODINGS = {b"W2ru": "utf-16-le", b"Wi2r": "cp1252", b"W2ku": "utf-16-le", b"Wi2k": "cp1252", b"MacX": "utf-8"}
"""Platform codes in the order in which their names are tried: a chain that moved as a whole keeps relative names."""


@dataclass(frozen=True, slots=True)
class ParentNames:
    """All names of a parent, in the order to try them, and what was wrong with the others."""

    name: str
    names: tuple[str, ...]
    facts: tuple[Fact, ...]


def read_names(file: File, footer: Footer, header: DynamicHeader) -> ParentNames:
    """What the header of a differencing disk says about its parent. Never raises on content."""
    found: dict[bytes, list[str]] = {code: [] for code in ENCODINGS}
    facts = []
    for number, locator in enumerate(header.locators):
        if locator.code in (bytes(4), MACINTOSH):
            continue
        name, wrong = _read(file, locator)
        if name is not None:
            found[locator.code].append(name)
        else:
            at = footer.data_offset + LOCATORS_OFFSET + LOCATOR_SIZE * number
            code = locator.code.decode("latin-1")
            facts.append(Fact("parent-locator-damaged", f"parent locator {number} ({code!r}) {wrong}", at))
    field = _field(footer, header.parent_name)
    names = [name for code in ENCODINGS for name in found[code]] + ([field] if field else [])
    if not names:
        facts.append(Fact("parent-unnamed", "a differencing disk that does not say where its parent is"))
    return ParentNames(field or (names[0] if names else ""), tuple(dict.fromkeys(names)), tuple(facts))


def _read(file: File, locator: Locator) -> tuple[str | None, str]:
    """The name, or None and what is wrong with it."""
    if locator.code not in ENCODINGS:
        return None, "has an unknown platform code"
    if not 0 < locator.length <= MAX_LENGTH:
        return None, f"has a name of {locator.length} bytes, expected 1 to {MAX_LENGTH}"
    if locator.offset + locator.length > file.size:
        end = locator.offset + locator.length
        return None, f"lies at {locator.offset:#x}..{end:#x}, behind the file's end {file.size:#x}"
    try:
        name = file.pread(locator.offset, locator.length).decode(ENCODINGS[locator.code])
    except UnicodeDecodeError:
        return None, f"is no {ENCODINGS[locator.code]} text"
    name = name.split("\0", 1)[0]
    if locator.code == b"MacX" and name.startswith("file://."):
        name = name[len("file://") :]
    return (name, "") if name else (None, "is empty")


def _field(footer: Footer, raw: bytes) -> str | None:
    """The header's own name of the parent, None where it is empty or no text."""
    order = "utf-16-be" if footer.bit_order == "big" else "utf-16-le"
    end = next((at for at in range(0, len(raw), 2) if raw[at : at + 2] == b"\0\0"), len(raw))
    try:
        return raw[:end].decode(order).lstrip("\ufeff") or None
    except UnicodeDecodeError:
        return None


# --- writing ---------------------------------------------------------------------------------------------------


class Name(NamedTuple):
    """One form of a parent's name, encoded."""

    code: bytes
    data: bytes


def encode_names(link: ParentLink, *, xen: bool) -> tuple[Name, ...]:
    """The locators to write, in the order that Windows or XenServer gives them."""
    if len(link.identity) != 16:
        raise UnsupportedFeature("the parent of a differencing VHD must be a VHD", hint="convert the parent first")
    if xen:
        url = "file://" + link.relative.replace("\\", "/")
        return _encoded(b"MacX", url), _encoded(b"W2ru", link.relative)
    absolute = (_encoded(b"W2ku", link.absolute),) if link.absolute else ()
    return *absolute, _encoded(b"W2ru", link.relative)


def _encoded(code: bytes, text: str) -> Name:
    try:
        data = text.encode(ENCODINGS[code])
    except UnicodeEncodeError:
        raise UnsupportedFeature(
            f"the parent's name {text!a} cannot be written as Unicode", hint="rename the file"
        ) from None
    if not 0 < len(data) <= MAX_LENGTH:
        raise UnsupportedFeature(f"a parent's name of {len(data)} bytes; a VHD takes 1 to {MAX_LENGTH}")
    return Name(code, data)


def encode_field(link: ParentLink, *, xen: bool) -> bytes:
    """The header's name field: the whole path where it fits and Windows writes it, else the file's name."""
    path = link.absolute or link.relative.removeprefix(".\\")
    text = path.rsplit("\\", 1)[-1] if xen or len(path.encode("utf-16-be", "replace")) > NAME_FIELD - 2 else path
    # What is still too long is cut, never inside a pair of surrogates.
    whole = text.encode("utf-16-be", "replace")[: NAME_FIELD - 2].decode("utf-16-be", "ignore")
    return whole.encode("utf-16-be").ljust(NAME_FIELD, b"\0")
