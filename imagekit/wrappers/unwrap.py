"""Disk images inside something else: gzip, xz, bzip2, zstd, zip, tar, OVA. Unpacked into a file without a name.

What a file is wrapped in is found by its content alone. The one disk in it is written, sparse, to a temporary file
that has no name (and is gone with its descriptor, however the program ends), and is then an image like any other:
recognised, judged and read from that one open file.

Design notes
- Everything here works on untrusted input. Sizes, ratios, numbers of members and depth have limits (WrapperLimits),
  and names inside a wrapper are shown, never used for a file.
- All of an archive but the chosen member is ignored; more than one disk is refused, with their names.
- Every check that a wrapper offers is made (CRCs, sizes, digests), and nothing but zeros may follow its end.
- A file that is a wrapper and a disk image at once is refused, as two formats in one file are.

Not here: 7z, rar, cab, iso, folders, the description of an OVA's machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from imagekit.errors import CorruptImage, TargetError, UnknownFormat, UnsafeImage
from imagekit.formats import registry
from imagekit.formats.base import Fact, File, MiB
from imagekit.formats.files import LocalFile, free_space, nameless
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass
from imagekit.remote.arriving import Arriving
from imagekit.wrappers.ova import is_ovf_name, open_ova
from imagekit.wrappers.parts import (
    Part,
    WrapperLimits,
    base_name,
    check_unique,
    choose_disk,
    data_runs,
    over_limit,
)
from imagekit.wrappers.streams import Input, all_streams, detect_stream
from imagekit.wrappers.tar import first_name, is_tar, tar_members
from imagekit.wrappers.zip import is_zip, zip_members

__all__ = ["DEFAULT_LIMITS", "Unwrapped", "WrapperLimits", "detect", "unwrap"]

DEFAULT_LIMITS = WrapperLimits()
PHASE = "unpack"
TELL_EVERY = 16 * MiB
LOOK_EVERY = 64 * MiB
"""Bytes written between two looks at the free space."""

_STREAM_SUFFIXES = {
    "gzip": {".gz": "", ".tgz": ".tar"},
    "xz": {".xz": "", ".txz": ".tar"},
    "bzip2": {".bz2": "", ".tbz2": ".tar", ".tbz": ".tar"},
    "zstd": {".zst": "", ".tzst": ".tar"},
}


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """What was inside. Whoever has it closes ``file``, which is where its bytes lie, under no name."""

    file: LocalFile
    name: str
    """Of the innermost member, without folders; for messages, and for what its suffix promises."""

    chain: tuple[str, ...]
    """The wrappers, the outermost first: ("gzip", "tar")."""

    facts: tuple[Fact, ...] = ()

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Unwrapped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def detect(file: File) -> str | None:
    """The wrapper that the file's content is: gzip, xz, bzip2, zstd, zip, tar or ova; None when it is none."""
    found = detect_stream(file)
    if found is None and is_zip(file):
        return "zip"
    if found is None and is_tar(file):
        return "ova" if is_ovf_name(first_name(file, DEFAULT_LIMITS) or "") else "tar"
    return found


def unwrap(
    file: LocalFile,
    *,
    limits: WrapperLimits = DEFAULT_LIMITS,
    folder: Path | None = None,
    make: Callable[[str], LocalFile] | None = None,
    control: Control = SILENT,
) -> Unwrapped:
    """Unpack the one disk in ``file``, which stays open and the caller's.

    ``folder`` takes the unpacked bytes: choose where the target goes, for the default (``TMPDIR``, ``/tmp``) may
    be memory. ``make`` makes the file for them instead, given a name for messages.

    Raises CorruptImage for anything damaged, UnsupportedFeature when there is no one disk to read, UnsafeImage by the
    rules wrapper-limit, wrapper-reference and ambiguous, TargetError when there is no room.
    """
    current, chain, facts = file, list[str](), list[Fact]()
    made = make or (lambda name: nameless(folder or Path(tempfile.gettempdir()), name))
    try:
        while (kind := detect(current)) is not None:
            if len(chain) == limits.nesting:
                raise over_limit(
                    f"{kind} inside {' inside '.join(reversed(chain))}: at most {limits.nesting} wrappers are opened",
                    path=file.name,
                    hint="unpack it by hand",
                )
            streamed = isinstance(current, Arriving) and kind in _STREAM_SUFFIXES
            if not streamed:
                _check_only_a_wrapper(current, kind)
            content = _open(current, kind, limits, control)
            inner = _unpack(content, file, limits, made, control)
            if streamed:  # a claim may lie at the end, and what is packed is unpacked as it comes
                try:
                    _check_only_a_wrapper(current, kind)
                except BaseException:
                    inner.close()
                    raise
            if current is not file:
                current.close()
            current = inner
            chain.append(content.kind)
            facts += content.facts
            if content.packed is not None and detect(current) != content.packed:
                raise CorruptImage(
                    f"{content.name!r} is described as packed with {content.packed}, and is not", path=file.name
                )
        if current is file:
            raise UnknownFormat("the file is no archive and not packed", path=file.name)
        return Unwrapped(current, content.name, tuple(chain), tuple(facts))
    except BaseException:
        if current is not file:
            current.close()
        raise


def _check_only_a_wrapper(file: File, kind: str) -> None:
    claims = registry.probe(file)
    if claims:
        found = ", ".join(f"{claim.format} ({claim.found})" for claim in claims)
        raise UnsafeImage(
            f"refused by rule ambiguous: the file is {kind}, and a disk image: {found} — "
            "a file that is two formats at once means something else to the next program",
            rule="ambiguous",
            path=file.name,
            hint="ask who made it",
        )


# --- what is inside --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Content:
    """A wrapper's one file, ready to be read. ``size`` is known beforehand, or None."""

    kind: str
    name: str
    parts: Iterator[Part]
    size: int | None
    progress: Callable[[int], tuple[int, int]]
    """(done, total) bytes, given how many were unpacked."""

    facts: tuple[Fact, ...] = ()
    packed: str | None = None


def _open(file: LocalFile, kind: str, limits: WrapperLimits, control: Control) -> _Content:
    if kind in _STREAM_SUFFIXES:
        source = Input(file)
        parts = all_streams(source, kind, limits)
        name = _stream_name(file.name, kind)
        return _Content(kind, name, parts, None, lambda _: (source.at, max(source.at, file.size_so_far)))
    members = zip_members(file, limits) if kind == "zip" else tar_members(file, limits)
    check_unique(members, file.name)
    facts: tuple[Fact, ...] = ()
    packed = None
    if kind != "zip" and any(is_ovf_name(one.name) for one in members):
        kind = "ova"
        ova = open_ova(file, members, limits, control)
        chosen, packed, facts = ova.disk, ova.packed, ova.facts
    else:
        chosen = choose_disk(members, file.name)
    size = chosen.size
    return _Content(
        kind, base_name(chosen.name), chosen.parts(), size, lambda done: (done, size), facts=facts, packed=packed
    )


def _stream_name(name: str, kind: str) -> str:
    """The name of what was packed: that of the file, without the packer's suffix."""
    name = base_name(name.rpartition("!")[2])
    for suffix, plain in _STREAM_SUFFIXES[kind].items():
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)] + plain
    return name


# --- writing it ------------------------------------------------------------------------------------------------


def _unpack(
    content: _Content,
    outermost: LocalFile,
    limits: WrapperLimits,
    make: Callable[[str], LocalFile],
    control: Control,
) -> LocalFile:
    """The content in a temporary file."""
    path = outermost.name
    _check_size(content.size or 0, limits, path)
    target = make(f"{path}!{content.name}")
    try:
        writer = _Writer(target, outermost, limits, path)
        told = done = 0
        for offset, piece in content.parts:
            control.check()
            writer.put(offset, piece)
            done = offset + len(piece)
            if done - told >= TELL_EVERY:
                told = done
                control.tell(PHASE, *content.progress(done))
        size = done if content.size is None else content.size
        target.truncate(size)
        control.tell(PHASE, *content.progress(size))
    except BaseException:
        target.close()
        raise
    return target


def _check_size(size: int, limits: WrapperLimits, path: str) -> None:
    if size > limits.size:
        raise over_limit(
            f"unpacked it has {size} bytes or more, at most {limits.size} are allowed",
            path=path,
            hint="unpack it by hand where its origin is trusted",
        )


class _Writer:
    """Writes what is not zero, within the limits."""

    def __init__(self, target: LocalFile, packed: LocalFile, limits: WrapperLimits, path: str) -> None:
        self._target = target
        self._outermost = packed
        self._limits = limits
        self._path = path
        self._unpacked = self._written = 0
        self._next_look = 0

    def put(self, offset: int, piece: bytes) -> None:
        _check_size(offset + len(piece), self._limits, self._path)
        self._unpacked += len(piece)
        view = memoryview(piece)
        for start, end in data_runs(offset, piece):
            self._written += end - start
            self._check_ratios()
            self._look_for_room()
            self._target.pwrite(offset + start, view[start:end])
        self._check_ratios()

    def _check_ratios(self) -> None:
        limits, packed = self._limits, self._outermost.size_so_far
        for what, count, ratio, free in (
            ("bytes of data", self._written, limits.ratio, limits.ratio_from),
            ("bytes", self._unpacked, limits.zero_ratio, limits.zero_ratio_from),
        ):
            if count > free + ratio * packed:
                raise over_limit(
                    f"{packed} bytes unpack to more than {count} {what}, at most {ratio} to one are allowed",
                    path=self._path,
                    hint="unpack it by hand where its origin is trusted",
                )

    def _look_for_room(self) -> None:
        if self._written < self._next_look:
            return
        self._next_look = self._written + LOOK_EVERY
        free = free_space(self._target)
        if free is not None and free < self._limits.reserve:
            raise TargetError(
                f"no space to unpack: {free} bytes are free, {self._limits.reserve} are to stay so",
                path=self._path,
                hint="make room, or choose another folder for temporary files",
            )
