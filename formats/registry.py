"""Finding formats: by name, by suffix, and by looking into a file.

A format is a module of this package with a ``FORMAT`` object, or an entry point of the group ``imagekit.formats``.
Nothing is registered by hand: adding a format is adding a file.

Detection asks every format, about both ends of the file, and never trusts a name. Two answers are an answer too:
they are returned, and the policy refuses them. A file that starts like a format imagekit knows by name only is
not raw either.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path, PurePath

import imagekit.formats
from imagekit.errors import UnknownFormat, UnsupportedFeature
from imagekit.formats.base import DiskFormat, File
from imagekit.records import dataclass

ENTRY_POINTS = "imagekit.formats"

NAMED_ONLY: tuple[tuple[str, int, bytes], ...] = (
    ("qed", 0, b"QED\0"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
)
"""(name, offset, magic) of formats that are recognised so that they are never taken for raw."""

BY_QEMU_IMG = ("qed", "parallels")
"""Those of them that imagekit.qemu_img can have read."""

BESIDE: tuple[tuple[str, int, bytes], ...] = (("mbr", 0x1FE, b"\x55\xaa"), ("iso9660", 0x8001, b"CD001"))
"""What a raw disk may well have, and an image must not have as well: another program would read it as a raw disk."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One format's answer to "is it yours?"."""

    format: str
    found: str


@cache
def formats() -> dict[str, DiskFormat]:
    """All formats by name, in alphabetical order."""
    found: dict[str, DiskFormat] = {}
    for module in pkgutil.iter_modules(imagekit.formats.__path__):
        if "_" in module.name:
            continue  # a part of a format: vhd_header
        candidate = getattr(importlib.import_module(f"imagekit.formats.{module.name}"), "FORMAT", None)
        if candidate is not None:
            found[candidate.name] = candidate
    for name, candidate in _third_party():
        found.setdefault(name, candidate)
    return dict(sorted(found.items()))


def _third_party() -> list[tuple[str, DiskFormat]]:
    if not _is_declared(ENTRY_POINTS):
        return []
    from importlib.metadata import entry_points

    return [(point.name, point.load()) for point in entry_points(group=ENTRY_POINTS)]


def _is_declared(group: str) -> bool:
    """Whether an installed distribution may have entry points of that group.

    Loading importlib.metadata takes as long as the rest of ``imagekit info``, and hardly ever is there anything to
    find. A file on the path is not looked into: then the answer is yes.
    """
    header = f"[{group}]".encode()
    for place in map(Path, sys.path):
        if place.is_file():
            return True
        for declared in chain(place.glob("*.dist-info/entry_points.txt"), place.glob("*.egg-info/entry_points.txt")):
            with suppress(OSError):
                if header in declared.read_bytes():
                    return True
    return False


def is_known(name: str) -> bool:
    """Whether there is a format of that name or alias."""
    return any(name.lower() in (one.name, *one.aliases) for one in formats().values())


def find(name: str) -> DiskFormat:
    """The format of that name or alias; UnsupportedFeature when there is none."""
    for candidate in formats().values():
        if name.lower() in (candidate.name, *candidate.aliases):
            return candidate
    raise UnsupportedFeature(
        f"imagekit does not read or write the format {name!r}", hint=f"known formats: {', '.join(formats())}"
    )


def by_suffix(path: str) -> DiskFormat | None:
    """The format whose usual suffix the name has."""
    suffix = PurePath(path).suffix.lower()
    for candidate in formats().values():
        if suffix in candidate.suffixes:
            return candidate
    return None


def suffix_format(path: str) -> str | None:
    """The name of the format, also of one known by name only, whose usual suffix the path has."""
    found = by_suffix(path)
    if found is not None:
        return found.name
    name = PurePath(path).suffix.lower().lstrip(".")
    return name if name in {known for known, _, _ in NAMED_ONLY} else None


def probe(file: File) -> list[Claim]:
    """Every format that claims the file; empty when none does."""
    claims = [
        Claim(name, found) for name, candidate in formats().items() if (found := candidate.probe(file)) is not None
    ]
    head = file.pread(0, 72)
    for name, offset, magic in NAMED_ONLY:
        if name not in formats() and head[offset : offset + len(magic)] == magic:
            claims.append(Claim(name, f"{name} magic at {offset:#x}"))
    return claims + _beside(file, claims)


def _beside(file: File, claims: list[Claim]) -> list[Claim]:
    """Partition tables and file systems that lie in an image as if it were a raw disk.

    In a fixed VHD they are the guest's own, and where they belong.
    """
    if not claims or (claims[0].format == "vhd" and file.pread(0, 8) != b"conectix"):
        return []
    return [
        Claim(name, f"{name} magic at {offset:#x}")
        for name, offset, magic in BESIDE
        if file.pread(offset, len(magic)) == magic
    ]


def choose(file: File, claims: list[Claim], declared: str | None = None) -> DiskFormat:
    """The format to open with, once the policy has accepted the claims. Never probes."""
    if file.size == 0:
        raise UnknownFormat("the file is empty", hint="an image has at least one sector", path=file.name)
    if declared is not None:
        return find(declared)
    if not claims:
        return formats()["raw"]
    name = claims[0].format
    if name not in formats():
        other = f"-f {name} --allow external-qemu-img has qemu-img read it; " if name in BY_QEMU_IMG else ""
        raise UnsupportedFeature(
            f"this is a {name} image ({claims[0].found}), which imagekit does not read",
            hint=f"{other}formats read: {', '.join(formats())}; -f raw takes the bytes as they are",
            path=file.name,
        )
    return formats()[name]
