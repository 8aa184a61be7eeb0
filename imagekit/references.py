"""Following what an image refers to: parents, backing files, data files and extents.

Only when the caller says so. A reference is a name that the image's maker chose, so it is never taken as it is: it
must lead to a regular file of this machine, in a format that fits, and a differencing disk's parent must be the one
it knows by its identity. Names that Windows wrote are translated (``--parent-map``), relative ones are looked for
from the folder of the image that refers, and a parent that moved is also looked for beside its child.

What opens the file is the caller's (imagekit.sources); this module finds it.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote, urlsplit

from imagekit.errors import SourceError, UnsafeImage, UsageError
from imagekit.formats.base import DiskImage, ParentLink, Reference
from imagekit.records import dataclass

MAX_DEPTH = 64
"""Images in a chain. Each one costs every read a step."""

ParentMap = tuple[tuple[str, str], ...]
"""(folder as Windows names it, the same folder here)."""

_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_DEVICE_PREFIXES = ("\\\\?\\", "\\\\.\\")


@dataclass(frozen=True, slots=True)
class Following:
    """The caller's leave to open what images refer to, and how to find it."""

    parent_map: ParentMap = ()
    ignore_parent_id: bool = False


def parse_parent_map(items: Iterable[str]) -> ParentMap:
    r"""``C:\VMs=/mnt/vms`` as pairs; UsageError for anything else."""
    pairs = []
    for item in items:
        there, sign, here = item.rpartition("=")
        if not sign or not there or not here:
            raise UsageError(
                f"{item!r} is not FROM=TO", hint=r"for example --parent-map 'C:\VMs=/mnt/vms' (in quotes)"
            )
        pairs.append((there, here))
    return tuple(pairs)


def find(reference: Reference, origin: Path, following: Following) -> Iterator[Path]:
    """The existing regular files that a reference of the image at ``origin`` may mean, the likeliest first.

    SourceError when there is none, UnsafeImage for a name that is not one of a file.
    """
    tried: list[Path] = []
    found = 0
    for name in reference.names or (reference.name,):
        for candidate in _candidates(reference, name, origin.parent, following.parent_map):
            if candidate in tried:
                continue
            tried.append(candidate)
            path = _existing(candidate)
            if path is not None:
                found += 1
                yield path
    if not found:
        kind = reference.kind.replace("-", " ")
        raise SourceError(
            f"its {kind} {reference.name!r} was not found; tried: {', '.join(map(str, tried)) or 'nothing'}",
            hint=r"put it there, or say where its folder is: --parent-map 'C:\VMs=/mnt/vms'"
            if reference.kind == "parent-file"
            else "put it there; the name is relative to the folder of the image that refers to it",
            path=origin,
        )


def _candidates(reference: Reference, name: str, folder: Path, parent_map: ParentMap) -> Iterator[Path]:
    if not name or "\0" in name:
        return
    if reference.kind in ("backing-file", "data-file", "extent-file"):
        if _PROTOCOL.match(name):
            raise UnsafeImage(
                f"refused by rule reference-protocol: {name!r} is not the name of a file",
                rule="reference-protocol",
                hint="imagekit follows references to files only; fetch it and make it one file first",
            )
        yield folder / name
        return
    if name.lower().startswith("file:"):
        yield Path(unquote(urlsplit(name).path))
        name = PurePosixPath(unquote(urlsplit(name).path)).name
    elif name.startswith("/"):
        yield Path(name)
        name = PurePosixPath(name).name
    yield from _windows_candidates(name, folder, parent_map)


def _windows_candidates(name: str, folder: Path, parent_map: ParentMap) -> Iterator[Path]:
    for there, here in parent_map:
        rest = _below(name, there)
        if rest is not None:
            yield Path(here, *rest)
    path = PureWindowsPath(name)
    if not path.drive and not path.root:
        yield Path(folder, *path.parts)
    elif sys.platform == "win32" and not name.startswith("\\\\"):
        yield Path(name)
    # A chain that was copied as a whole into one folder: the name alone, which the identity then proves.
    if path.name:
        yield folder / path.name


def _below(name: str, there: str) -> tuple[str, ...] | None:
    """The components of ``name`` below the Windows folder ``there``, None when it is not below it."""
    whole, top = (_components(text) for text in (name, there))
    if len(whole) <= len(top) or [part.lower() for part in whole[: len(top)]] != [part.lower() for part in top]:
        return None
    rest = whole[len(top) :]
    return None if ".." in rest else tuple(rest)


def _components(name: str) -> list[str]:
    # \\?\C:\x is C:\x; \\?\Volume{…}\x keeps its volume as the first component.
    if name.startswith(_DEVICE_PREFIXES):
        name = name[4:]
    return [part for part in re.split(r"[\\/]+", name) if part not in ("", ".")]


def _existing(path: Path) -> Path | None:
    """The regular file of that name; where names know upper and lower case, also one that differs in that alone."""
    try:
        found = _spelled(path)
    except (OSError, ValueError):  # not readable, a NUL in it, too long
        return None
    if found is not None and not stat.S_ISREG(found.stat().st_mode):
        raise SourceError("is referred to by an image, and is not a regular file", path=found)
    return found


def _spelled(path: Path) -> Path | None:
    """The existing path of that name, as it is spelled here; None when there is none, or more than one."""
    if path.exists():
        return path
    folder = None if path.parent == path else _spelled(path.parent)
    if folder is None or not folder.is_dir():
        return None
    same = [one for one in folder.iterdir() if one.name.lower() == path.name.lower()]
    return same[0] if len(same) == 1 else None


def check_identity(reference: Reference, image: DiskImage, path: Path, *, ignore: bool) -> None:
    """UnsafeImage unless the image is the one that the reference is about."""
    if ignore:
        return
    if reference.identities and image.identity not in reference.identities:
        expected = " or ".join(map(_guid, reference.identities))
        found = "none" if image.identity is None else _guid(image.identity)
        raise UnsafeImage(
            f"refused by rule parent-id: the parent has the id {found}, its child expects {expected}: it is another "
            "disk, or was written to after the child was made",
            rule="parent-id",
            hint="find the right parent; --ignore-parent-id where you know that this one is right",
            path=path,
        )
    if reference.size is not None and image.virtual_size > reference.size:
        raise UnsafeImage(
            f"refused by rule parent-size: the parent's disk has {image.virtual_size} bytes, its child's only "
            f"{reference.size}: it was resized after the child was made",
            rule="parent-size",
            hint="find the right parent; --ignore-parent-id where you know that this one is right",
            path=path,
        )


def _guid(identity: bytes) -> str:
    """As ``info`` shows it, in the order of Windows."""
    return str(uuid.UUID(bytes_le=identity))


def link_to(parent: DiskImage, parent_path: Path, child_path: Path, parent_map: ParentMap = ()) -> ParentLink:
    """What a child at ``child_path`` is to say about its parent. The Windows path is known where it is mapped."""
    if parent.identity is None:
        raise UsageError(
            "a parent must be a VHD or a VHDX: other formats have no identity",
            path=parent_path,
            hint="convert it first",
        )
    parent_path, child_path = parent_path.resolve(), child_path.resolve()
    relative = os.path.relpath(parent_path, child_path.parent).replace(os.sep, "\\")
    return ParentLink(
        identity=parent.identity,
        virtual_size=parent.virtual_size,
        relative=relative if relative.startswith("..") else ".\\" + relative,
        absolute=_windows_path(parent_path, parent_map),
        disk_id=parent.disk_id,
        sector_size=parent.sector_size,
    )


def _windows_path(path: Path, parent_map: ParentMap) -> str | None:
    if sys.platform == "win32":
        return str(path)
    for there, here in parent_map:
        folder = Path(here).resolve()
        if path.is_relative_to(folder):
            return "\\".join((there.rstrip("\\/"), *path.relative_to(folder).parts))
    return None
