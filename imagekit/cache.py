"""The base images of a compute host: each converted once, whoever asks for it, and shared by the disks built on it.

An entry is one file, named after the image and the target it was made for, with a small JSON file beside it. What it
was made from decides its name: image id, digest and the parameters of the target. So a new version of an image is a
new entry, and an old one stays what its children know.

    get        the entry; made when it is not there. However many threads and processes ask: one conversion.
    resized    the same disk with another size, for children that cannot have their own (VHD)
    prune      removes what nobody used for some time, and nothing that is in use or has children

Crash safety: a file gets its name when it is complete (imagekit.publish), so every name is a whole image. What a
killed download left is removed by whoever takes the lock next.

``shared_with_nova``: names and locks are those of compute-hyperv's ``_base`` folder (``ID.vhdx``, lock
``nova-ID-cache.lock``), so that both can work in one folder. Nova is not needed for it, nor imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from imagekit.child import Child
from imagekit.errors import ImagekitError, SourceError, TargetError, UsageError, VerificationFailed
from imagekit.formats import registry
from imagekit.formats.base import JSON
from imagekit.formats.files import LocalFile
from imagekit.locks import held
from imagekit.progress import Callback, Control
from imagekit.publish import write_file
from imagekit.records import dataclass, field, replace
from imagekit.references import Following, find
from imagekit.warm import make_ready

SCHEMA = 1
SUFFIXES = (".vhd", ".vhdx", ".avhd", ".avhdx")
RESERVED_FOR = 3600.0
"""Seconds for which a place that was promised an entry counts as using it, although nothing is there yet."""

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_LEFT_OVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.download")

Fetch = Callable[[Path], None]
"""Puts the image's file at the path it is given."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an entry is to be: part of its name, so different targets of one image lie side by side."""

    format: Literal["vhd", "vhdx"] = "vhdx"
    subformat: Literal["dynamic", "fixed"] = "dynamic"
    block_size: int | None = None
    sector_size: int | None = None

    def options(self) -> dict[str, Any]:
        """As the conversion wants them."""
        return {
            "target_format": self.format,
            "subformat": self.subformat,
            "block_size": self.block_size,
            "sector_size": self.sector_size,
        }


@dataclass(frozen=True, slots=True)
class Entry:
    """A base image in the cache. Sizes in bytes, times in seconds since 1970."""

    path: Path
    image_id: str
    target: Target
    digest: str | None
    virtual_size: int
    created: float
    used: float
    hits: int = 0
    users: tuple[str, ...] = ()
    """Files that were promised, or built on, this entry."""

    made: bool = field(default=False, compare=False)
    """Whether this call made it."""

    @property
    def file_size(self) -> int:
        """Bytes the file takes on the medium."""
        with LocalFile.open_source(self.path) as file:
            return file.allocated_size

    def to_json(self) -> dict[str, JSON]:
        return {
            "schema": SCHEMA,
            "filename": os.fspath(self.path),
            "image": self.image_id,
            "digest": self.digest,
            "format": self.target.format,
            "subformat": self.target.subformat,
            "block-size": self.target.block_size,
            "sector-size": self.target.sector_size,
            "virtual-size": self.virtual_size,
            "size": self.file_size,
            "created": self.created,
            "used": self.used,
            "hits": self.hits,
            "users": list(self.users),
        }


@dataclass(frozen=True, slots=True)
class Pruned:
    """What :meth:`ImageCache.prune` did: paths removed, bytes freed, and why what is old was kept."""

    removed: tuple[Path, ...]
    freed: int
    kept: tuple[tuple[Path, str], ...]


class ImageCache:
    """A folder of base images. Safe for threads, processes and green threads; any number of objects can share one.

    ``instances`` are folders below which disks may lie that were built on the entries (Nova's instances_path):
    :meth:`prune` looks there for children. ``child`` is how conversions are run.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        instances: tuple[str | os.PathLike[str], ...] = (),
        child: Child | None = None,
        shared_with_nova: bool = False,
        allow: frozenset[str] = frozenset(),
    ) -> None:
        make_ready()
        self.folder = Path(folder)
        self._instances = tuple(Path(one) for one in instances)
        self._child = child or Child()
        self._nova = shared_with_nova
        self._allow = allow

    # --- get ---------------------------------------------------------------------------------------------------

    def get(
        self,
        image_id: str,
        source: str | os.PathLike[str] | Fetch,
        *,
        digest: str | None = None,
        target: Target | None = None,
        source_format: str | None = None,
        user: str | os.PathLike[str] | None = None,
        progress: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> Entry:
        """The entry of an image, made from ``source`` (a file, or what fetches it) when it is not there.

        ``digest`` is ``ALGORITHM:HEX`` of the source's bytes and is checked before they are looked at. ``user`` is
        the file that will be built on the entry: until it is gone the entry is not pruned.

        Raises what the conversion raises (UnsafeImage for an image the policy refuses, …); then nothing was added.
        """
        control = Control(progress, cancel)
        target = target or Target()
        path = self._path(image_id, digest, target)
        with held(self._lock(image_id, path), control=control):
            found = self._read(path)
            if found is not None:
                return self._touched(found, user)
            self._remove_leftovers(path)
            started = time.time()
            with self._fetched(source, path, control) as image:
                if digest is not None:
                    self._check_digest(image, digest, control)
                report = self._convert(image, path, target, source_format, control)
            entry = Entry(
                path, image_id, target, digest, int(report["target"]["virtual-size"]), started, started, made=True
            )
            return self._touched(entry, user, hit=False)

    def resized(
        self,
        entry: Entry,
        size: int,
        *,
        label: str | None = None,
        user: str | os.PathLike[str] | None = None,
        progress: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> Entry:
        """The entry's disk with ``size`` bytes, kept beside it; ``label`` goes into its name (default: the size).

        Shares its bytes with the entry where the file system can (reflink).
        """
        if size == entry.virtual_size:
            return self.touch(entry, user)
        if size < entry.virtual_size:
            raise UsageError(
                f"the image's disk has {entry.virtual_size} bytes, {size} would cut it off",
                hint="choose a larger flavor",
                path=entry.path,
            )
        control = Control(progress, cancel)
        path = entry.path.with_name(f"{entry.path.stem}_{label or size}{entry.path.suffix}")
        with held(self._lock(entry.image_id, path), control=control):
            found = self._read(path)
            if found is not None and found.virtual_size == size:
                return self._touched(found, user)
            self._convert(entry.path, path, entry.target, entry.target.format, control, size=size, overwrite=True)
            now = time.time()
            made = replace(entry, path=path, virtual_size=size, created=now, used=now, hits=0, users=(), made=True)
            return self._touched(made, user, hit=False)

    def touch(self, entry: Entry, user: str | os.PathLike[str] | None = None) -> Entry:
        """Note that the entry is used, by ``user``."""
        with held(self._lock(entry.image_id, entry.path)):
            return self._touched(self._read(entry.path) or entry, user)

    def _convert(
        self, source: Path, path: Path, target: Target, declared: str | None, control: Control, **more: Any
    ) -> dict[str, Any]:
        options = {**target.options(), **more, "source_format": declared, "allow": sorted(self._allow)}
        options["confined"] = True  # an image is a stranger's
        return self._child.run(
            "convert",
            {"source": os.fspath(source), "target": os.fspath(path), **options},
            progress=control.callback,
            cancel=control.cancel,
        )

    @contextmanager
    def _fetched(self, source: str | os.PathLike[str] | Fetch, path: Path, control: Control) -> Iterator[Path]:
        if not callable(source):
            yield Path(source)
            return
        landing = path.with_name(f".{path.name}.{os.urandom(4).hex()}.download")
        try:
            control.tell("download", 0, 0)
            source(landing)
            yield landing
        finally:
            with suppress(FileNotFoundError):
                landing.unlink()

    def _check_digest(self, image: Path, digest: str, control: Control) -> None:
        algorithm, _, wanted = digest.partition(":")
        if not wanted or algorithm not in hashlib.algorithms_available:
            raise UsageError(f"{digest!r} is not ALGORITHM:HEX", hint="for example sha256:e3b0…")
        found = self._child.run(
            "digest",
            {"path": os.fspath(image), "algorithm": algorithm},
            progress=control.callback,
            cancel=control.cancel,
        )
        if found["value"] != wanted.lower():
            raise VerificationFailed(
                f"its {algorithm} is {found['value']}, {wanted.lower()} was expected",
                path=image,
                hint="fetch it again; if it stays so, ask who published it",
            )

    # --- names and notes ---------------------------------------------------------------------------------------

    def _path(self, image_id: str, digest: str | None, target: Target) -> Path:
        if not _SAFE.fullmatch(image_id):
            raise UsageError(
                f"{image_id!r} cannot be an image's id", hint="letters, digits, dots, - and _, up to 128"
            )
        if not self.folder.is_dir():
            raise TargetError("the folder of the cache does not exist", path=self.folder, hint="make it first")
        if self._nova:
            return self.folder / f"{image_id}.{target.format}"
        parameters = json.dumps([digest, *target.options().values()]).encode()
        return self.folder / f"{image_id}-{hashlib.sha256(parameters).hexdigest()[:8]}.{target.format}"

    def _lock(self, image_id: str, path: Path) -> Path:
        """compute-hyperv's, where the folder is shared: an image's own lock, or that of a resized copy."""
        if not self._nova:
            return path.with_name(f".{path.name}.lock")
        return path.with_name(f"nova-{image_id if path.stem == image_id else path.name}-cache.lock")

    def _notes(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.json")

    def _read(self, path: Path) -> Entry | None:
        """What is there under that name; of a file that has no notes (Nova's own, a crash) what it says itself."""
        if not path.exists():
            return None
        notes = self._notes(path)
        try:
            entry = _entry(path, json.loads(notes.read_bytes()))
            # The driver leaves its use of an entry on the file alone.
            return replace(entry, used=max(entry.used, path.stat().st_mtime)) if self._nova else entry
        except (OSError, ValueError, KeyError, TypeError):
            pass
        chosen = registry.find(path.suffix[1:].lower())
        with LocalFile.open_source(path) as file:
            info = chosen.open(file).info()
            stamp = path.stat().st_mtime
        target = Target(chosen.name, "fixed" if info.subformat == "fixed" else "dynamic")  # type: ignore[arg-type]
        return Entry(path, path.stem, target, None, info.virtual_size, stamp, stamp)

    def _touched(self, entry: Entry, user: str | os.PathLike[str] | None, *, hit: bool = True) -> Entry:
        """Note the use; the caller holds the entry's lock."""
        users = [one for one in entry.users if Path(one).exists()]
        if user is not None and (name := str(Path(user).absolute())) not in users:
            users.append(name)
        now = time.time()
        noted = replace(entry, used=now, hits=entry.hits + hit, users=tuple(users))
        known = {**noted.to_json(), "filename": noted.path.name}
        write_file(self._notes(entry.path), json.dumps(known).encode(), overwrite=True, sync=False)
        os.utime(entry.path)  # compute-hyperv tells by it when an image was last used
        return noted

    def _remove_leftovers(self, path: Path) -> None:
        """Downloads of this entry that a killed process left; the caller holds the lock, so nobody writes them."""
        for one in path.parent.iterdir():
            match = _LEFT_OVER.fullmatch(one.name)
            if match and match["name"] == path.name:
                with suppress(OSError):
                    one.unlink()

    # --- list and prune ----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        found = []
        for path in sorted(self.folder.iterdir()):
            if path.suffix.lower() in (".vhd", ".vhdx") and not path.name.startswith("."):
                with suppress(ImagekitError, OSError):  # a foreign or damaged file is none of ours
                    entry = self._read(path)
                    if entry is not None:
                        found.append(entry)
        return sorted(found, key=lambda entry: entry.used, reverse=True)

    def prune(
        self, *, unused_for: float | None = None, max_bytes: int | None = None, dry_run: bool = False
    ) -> Pruned:
        """Remove entries unused for that many seconds, then the least recently used beyond ``max_bytes`` in all.

        Never one that is in use, that is being made or used by another process, or that has children.
        """
        entries, now = self.entries(), time.time()
        children, unseen = self._children()
        total = sum(entry.file_size for entry in entries)
        removed: list[Path] = []
        kept: list[tuple[Path, str]] = []
        freed = 0
        for entry in reversed(entries):
            old = unused_for is not None and now - entry.used > unused_for
            if not old and not (max_bytes is not None and total - freed > max_bytes):
                continue
            size = entry.file_size
            reason = children.get(_real(entry.path)) or unseen or self._remove(entry, now, dry_run=dry_run)
            if reason is not None:
                kept.append((entry.path, reason))
                continue
            removed.append(entry.path)
            freed += size
        return Pruned(tuple(removed), freed, tuple(kept))

    def _remove(self, entry: Entry, now: float, *, dry_run: bool) -> str | None:
        """Remove it, or say why not."""
        with held(self._lock(entry.image_id, entry.path), wait=False) as taken:
            if not taken:
                return "another process works with it"
            current = self._read(entry.path)
            if current is None:
                return "it is gone"
            if current.used > entry.used:
                return "it was used meanwhile"
            for user in current.users:
                if Path(user).exists():
                    return f"{user} is built on it"
                if now - current.used < RESERVED_FOR:
                    return f"it is promised to {user}"
            if not dry_run:
                # The image first: notes without one are nothing, an image without notes is an entry.
                try:
                    entry.path.unlink()
                except OSError as error:  # open in another program, on Windows
                    return f"it cannot be removed: {error.strerror}"
                with suppress(FileNotFoundError):
                    self._notes(entry.path).unlink()
            return None

    def _children(self) -> tuple[Mapping[str, str], str | None]:
        """Parent → a child of it, of all disks below the instances' folders and in the cache itself.

        And what could not be looked at, if anything: a disk that another program has open, or a folder that is not
        mounted, may be built on any entry.
        """
        found: dict[str, str] = {}
        unseen: list[str] = []

        def failed(error: OSError) -> None:
            unseen.append(f"{error.filename} cannot be read: {error.strerror}")

        for folder in (self.folder, *self._instances):
            for where, _, names in os.walk(folder, onerror=failed):
                for name in names:
                    if not name.lower().endswith(SUFFIXES):
                        continue
                    path = Path(where) / name
                    try:
                        for parent in _parents(path, self.folder):
                            found.setdefault(_real(parent), f"{path} is built on it")
                    except SourceError as error:
                        if path.exists():
                            unseen.append(f"{path} cannot be read, and may be built on it: {error.message}")
        return found, unseen[0] if unseen else None


def _entry(path: Path, known: Mapping[str, Any]) -> Entry:
    target = Target(known["format"], known["subformat"], known["block-size"], known["sector-size"])
    return Entry(
        path,
        str(known["image"]),
        target,
        known["digest"],
        int(known["virtual-size"]),
        float(known["created"]),
        float(known["used"]),
        int(known["hits"]),
        tuple(map(str, known["users"])),
    )


def _real(path: Path) -> str:
    return os.path.normcase(os.path.realpath(path))


def _parents(path: Path, base: Path) -> Iterator[Path]:
    """The files that a differencing disk may be built on; one that is not found may be the cache's of that name.

    SourceError for a disk that cannot be read. What is no disk has no parent.
    """
    chosen = registry.by_suffix(os.fspath(path)) or registry.find("vhdx")
    with LocalFile.open_source(path) as file:
        try:
            references = chosen.open(file).info().references
        except ImagekitError:
            return
    for reference in references:
        try:
            yield from find(reference, path, Following())
        except ImagekitError:
            yield base / PureWindowsPath(reference.name).name
