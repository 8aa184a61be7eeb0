"""What every medium of guest metadata shares: which names and labels can be on it, and what its date is.

A tree is path (with ``/``) to content. A name is refused when one of the systems that may read the medium could not
read it, whichever file system carries it: so one tree is the same on Linux and on Windows, or is not written. The
rules are those of ECMA-119 and the Joliet specification for ISO 9660, of Microsoft's FAT specification 1.03 for VFAT,
and of "Naming Files, Paths, and Namespaces" (Microsoft Learn) for both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from imagekit.errors import UsageError

DEFAULT_TIMESTAMP = 1535328000
"""2018-08-27 00:00:00 UTC, the date of the metadata version; fixed, so that equal input gives equal bytes."""

MAX_MEDIUM = 64 << 20
"""Bytes; the size of Nova's config drives."""

_DEVICES = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9\u00b9\u00b2\u00b3])(?: *\..*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Rules:
    """What one file system can hold. ``forbidden`` are characters, besides control characters."""

    file_system: str
    forbidden: str
    max_name: int
    bytes_of_utf8: bool
    """``max_name`` counts bytes of UTF-8, else UTF-16 units."""

    max_levels: int
    max_label: int
    forbidden_in_label: str


ISO = Rules(
    file_system="ISO 9660",
    forbidden="*/:;?\\",  # Joliet specification, "Allowed characters"
    max_name=64,  # Joliet: characters of one name; pycdlib: bytes of it in UTF-8, never fewer
    bytes_of_utf8=True,
    max_levels=8,  # ECMA-119 6.8.2.1, the root included
    max_label=16,  # of a Joliet volume descriptor
    forbidden_in_label="*/:;?\\",
)
VFAT = Rules(
    file_system="VFAT",
    forbidden='"*/:<>?\\|',  # FAT specification, "Name Limits and Character Sets"
    max_name=255,
    bytes_of_utf8=False,
    max_levels=32,  # a path of Windows has 260 characters
    max_label=11,
    forbidden_in_label='"*+,./:;<=>?[\\]|',
)


def check_label(label: str, rules: Rules) -> None:
    """Raise UsageError for a label that the file system cannot hold."""
    if not 1 <= len(label) <= rules.max_label:
        raise UsageError(
            f"label {label!r} has {len(label)} characters, {rules.file_system} takes 1 to {rules.max_label}"
        )
    wrong = set(rules.forbidden_in_label) & set(label)
    if not label.isascii() or not label.isprintable() or wrong or label != label.strip():
        signs = " ".join(rules.forbidden_in_label)
        raise UsageError(f"label {label!r}: expected printable ASCII without {signs} or spaces around it")


def check_tree(tree: Mapping[str, bytes], rules: Rules) -> list[str]:
    """Refuse what a guest could not read; return the folders, parents first."""
    seen: dict[str, tuple[str, bool]] = {}
    for path in sorted(tree):
        parts = path.split("/")
        if len(parts) > rules.max_levels:
            raise UsageError(f"{path!r} is {len(parts)} levels deep, {rules.file_system} allows {rules.max_levels}")
        for level, name in enumerate(parts, start=1):
            _check_name(name, path, rules)
            entry = ("/".join(parts[:level]), level < len(parts))
            other = seen.setdefault(entry[0].casefold(), entry)
            if other[0] != entry[0]:
                raise UsageError(f"{other[0]!r} and {entry[0]!r} differ only by case: Windows would see one of them")
            if other != entry:
                raise UsageError(f"{entry[0]!r} is both a file and a folder")
    return sorted(path for path, is_folder in seen.values() if is_folder)


def _check_name(name: str, path: str, rules: Rules) -> None:
    """Refuse one component of ``path`` that the file system, Windows or pycdlib cannot hold."""
    where = "" if name == path else f" in {path!r}"
    if name in ("", ".", ".."):
        raise UsageError(f"{path!r}: expected a relative path without empty, '.' or '..' parts")
    if any(c in rules.forbidden or ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in name):
        raise UsageError(f"name {name!r}{where} holds a control character or one of {' '.join(rules.forbidden)}")
    if any(0xD800 <= ord(c) <= 0xDFFF or ord(c) > 0xFFFF for c in name):
        raise UsageError(f"name {name!r}{where} holds a character that UCS-2 cannot express")
    length, unit = (len(name.encode()), "bytes") if rules.bytes_of_utf8 else (len(name), "characters")
    if length > rules.max_name:
        raise UsageError(f"name {name!r}{where} has {length} {unit}, the most is {rules.max_name}")
    if name.endswith((".", " ")):
        raise UsageError(f"name {name!r}{where} ends with a dot or space, which Windows drops")
    if _DEVICES.fullmatch(name):
        raise UsageError(f"name {name!r}{where} is a device of Windows, not a file, whatever follows its dot")


def check_size(size: int) -> None:
    """Raise UsageError for a medium that is larger than any reader has to expect."""
    if size > MAX_MEDIUM:
        raise UsageError(
            f"the medium would have {size} bytes, the most is {MAX_MEDIUM}",
            hint="let the guest fetch what is large: put its address into the user data",
        )


def default_timestamp() -> int:
    """SOURCE_DATE_EPOCH of the environment, else `DEFAULT_TIMESTAMP`: seconds since 1970, UTC."""
    text = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return DEFAULT_TIMESTAMP
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"SOURCE_DATE_EPOCH is {text!r}, expected seconds since 1970")
    return int(text)
