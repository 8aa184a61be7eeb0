"""qemu-img: a second opinion on what imagekit made, and, where the caller allows it, formats that only it knows.

As a second opinion it is only ever run on files imagekit made or has judged, never to find out what one is. Reading a
format that imagekit does not (``convert_in``) is another matter: those are QEMU's parsers on a file of unknown
origin. So the caller has to allow it, and then

- the format is named, never probed; qemu-img is given ``json:`` names of one local file each (on Linux by descriptor,
  so that it is the file looked at here), and nothing below an image is opened;
- a file that refers to others is refused, by what qemu-img says of it;
- the process is confined and limited (tool_process.py).

Not here: formats that are more than one file, encrypted images, internal snapshots.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from imagekit.errors import (
    CorruptImage,
    InvalidImage,
    TargetError,
    ToolError,
    UnsafeImage,
    UnsupportedFeature,
    VerificationFailed,
)
from imagekit.formats.base import SECTOR, MiB, round_up
from imagekit.formats.files import LocalFile
from imagekit.progress import SILENT, Control
from imagekit.records import replace
from imagekit.tool_process import Finished, ToolLimits, run

INSTALL_HINT = "install it: apt-get install qemu-utils, dnf install qemu-img, or brew install qemu"
TIMEOUT = 3600.0
PHASE = "qemu-img"
DEFAULT_LIMITS = ToolLimits()

EXTERNAL_SOURCES: Mapping[str, str] = {
    "parallels": "Parallels, one file (.hdd)",
    "qcow": "QEMU's first copy-on-write format",
    "qed": "QEMU Enhanced Disk",
}
"""Formats that can be read through qemu-img only, and what they are."""

EXTERNAL_TARGETS: Mapping[str, Mapping[str, str]] = {
    "parallels": {},
    "qed": {},
    "vdi": {"dynamic": "static=off", "fixed": "static=on"},
    "vmdk": {"monolithicSparse": "subformat=monolithicSparse", "streamOptimized": "subformat=streamOptimized"},
}
"""Formats that can be written through qemu-img only, and their subformats, the default first."""

_QEMU_NAMES = {"vhd": "vpc"}
_WITH_BACKING = ("qcow2", "qcow", "qed", "vmdk", "parallels")
_MAGICS = {
    "parallels": (b"WithoutFreeSpace", b"WithouFreSpacExt"),
    "qcow": (b"QFI\xfb\0\0\0\1",),
    "qed": (b"QED\0",),
}
_PERCENT = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")


def find_qemu_img() -> str:
    """Path of qemu-img; ToolError when it is not installed."""
    path = shutil.which("qemu-img")
    if path is None:
        raise ToolError("qemu-img was not found", hint=INSTALL_HINT)
    return path


def image_options(path: str | os.PathLike[str], format_name: str) -> str:
    """A ``json:`` name that opens the path as exactly that format and lets it refer to nothing else."""
    driver = _QEMU_NAMES.get(format_name, format_name)
    node: dict[str, object] = {
        "driver": driver,
        "file": {"driver": "file", "filename": str(Path(path).absolute())},
    }
    if driver == "vpc":
        node["force_size_calc"] = "current_size"
    if driver in _WITH_BACKING:
        node["backing"] = None
    return "json:" + json.dumps(node)


def compare(one: str | os.PathLike[str], one_format: str, other: str | os.PathLike[str], other_format: str) -> None:
    """Raise VerificationFailed when qemu-img finds the contents of two images to differ."""
    command = [
        find_qemu_img(),
        "compare",
        "-U",
        image_options(one, one_format),
        image_options(other, other_format),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    if result.returncode == 1:
        raise VerificationFailed(f"qemu-img compare: {result.stdout.strip()}", path=other)
    if result.returncode != 0:
        raise ToolError(f"qemu-img compare failed: {result.stderr.strip()}", path=other)


# --- reading through qemu-img ----------------------------------------------------------------------------------


def convert_in(
    source: LocalFile | str | os.PathLike[str],
    format_name: str,
    out: Path,
    *,
    limits: ToolLimits = DEFAULT_LIMITS,
    control: Control = SILENT,
) -> int:
    """Write what an image of one of EXTERNAL_SOURCES holds to ``out``, a new file, raw and sparse; its size in bytes.

    A file that is open already stays so, and is the one that is read (on Linux; elsewhere the one of its name).
    InvalidImage when the file is not of that format, UnsafeImage when it refers to others, UnsupportedFeature when it
    is encrypted or too large, ToolError with qemu-img's last words when that fails. Then ``out`` does not exist.
    """
    if format_name not in EXTERNAL_SOURCES:
        raise UnsupportedFeature(
            f"{format_name!r} is not read through qemu-img", hint=f"formats: {', '.join(EXTERNAL_SOURCES)}"
        )
    with _opened(source) as file, _New(out):
        _check_header(file, format_name)
        tool = _Tool(file, format_name, limits, control)
        size = _check_info(tool.info(), file, limits)
        tool.convert("raw", out, size)
        if out.stat().st_size != round_up(size, SECTOR):
            raise ToolError(
                f"qemu-img wrote {out.stat().st_size} bytes of a disk of {size}", path=file.name, hint="try again"
            )
    return size


def open_external(
    source: LocalFile | str | os.PathLike[str],
    format_name: str,
    *,
    folder: Path | None = None,
    limits: ToolLimits = DEFAULT_LIMITS,
    control: Control = SILENT,
) -> LocalFile:
    """:func:`convert_in` to a temporary file in ``folder``: it has no name any more, and is gone when it is closed.

    Choose a folder on the target's medium: the default (``TMPDIR``, ``/tmp``) may be memory.
    """
    try:
        private = tempfile.TemporaryDirectory(dir=folder, prefix=".imagekit-", ignore_cleanup_errors=True)
    except OSError as error:
        raise TargetError(
            f"no temporary file can be made: {error.strerror}", path=folder, hint="choose another folder"
        ) from error
    with private as made:
        raw = Path(made, "disk.raw")
        convert_in(source, format_name, raw, limits=limits, control=control)
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        # Windows removes the file when it is closed; elsewhere its name can go at once.
        name = source.name if isinstance(source, LocalFile) else os.fspath(source)
        return LocalFile(os.open(raw, flags | getattr(os, "O_TEMPORARY", 0)), name)


@contextmanager
def _opened(source: LocalFile | str | os.PathLike[str]) -> Iterator[LocalFile]:
    if isinstance(source, LocalFile):
        yield source
        return
    with LocalFile.open_source(source) as file:
        yield file


def _check_header(file: LocalFile, format_name: str) -> None:
    """Refuse what is not of that format: what QEMU's drivers are not meant for, they need not see."""
    head = file.pread(0, 64)
    if not head.startswith(_MAGICS[format_name]):
        raise InvalidImage(
            f"declared {format_name}, but the file starts with {head[:8]!r}",
            hint="leave out -f to use the format found, or ask who made it",
            path=file.name,
            offset=0,
        )


def _check_info(info: Mapping[str, Any], file: LocalFile, limits: ToolLimits) -> int:
    """The virtual size, once qemu-img says of nothing that speaks against reading it."""
    below = info.get("backing-filename") or info.get("full-backing-filename")
    if below:
        raise UnsafeImage(
            f"refused by rule backing-file: the image refers to another file: {below!r} — an image must not decide "
            "which other file of this machine is read",
            rule="backing-file",
            hint="make it one file first, where its origin is trusted: qemu-img convert",
            path=file.name,
        )
    if info.get("encrypted"):
        raise UnsupportedFeature("the data is encrypted", path=file.name, hint="decrypt it where it comes from")
    size = info.get("virtual-size")
    if not isinstance(size, int) or size <= 0:
        raise CorruptImage(f"qemu-img finds a virtual size of {size!r}", path=file.name)
    if size > limits.file_size:
        raise UnsupportedFeature(
            f"a virtual size of {size} bytes, at most {limits.file_size} are allowed", path=file.name
        )
    return size


# --- writing through qemu-img ----------------------------------------------------------------------------------


def convert_out(
    raw: LocalFile | str | os.PathLike[str],
    format_name: str,
    out: Path,
    *,
    subformat: str | None = None,
    limits: ToolLimits = DEFAULT_LIMITS,
    control: Control = SILENT,
) -> None:
    """Write the raw disk in ``raw`` to ``out``, a new file, in one of EXTERNAL_TARGETS.

    A VMDK holds its own file name: give ``out`` the name it will keep, in a folder of its own if need be. Raises
    UnsupportedFeature for other formats, ToolError with qemu-img's last words; then ``out`` does not exist.
    """
    options = _target_options(format_name, subformat)
    with _opened(raw) as file, _New(out):
        size = file.size
        if size == 0 or size % SECTOR:
            raise UnsupportedFeature(
                f"a raw disk of {size} bytes: at least one sector of 512, and whole ones, are needed", path=file.name
            )
        # Data that does not compress takes a little more room than it has, tables come on top, and Parallels'
        # writer takes room 128 MiB ahead.
        limits = replace(limits, file_size=min(limits.file_size, size + size // 8 + 256 * MiB))
        _Tool(file, "raw", limits, control).convert(format_name, out, size, options=options)


def _target_options(format_name: str, subformat: str | None) -> str:
    if format_name not in EXTERNAL_TARGETS:
        raise UnsupportedFeature(
            f"{format_name!r} is not written through qemu-img", hint=f"formats: {', '.join(EXTERNAL_TARGETS)}"
        )
    known = EXTERNAL_TARGETS[format_name]
    if subformat is None:
        return next(iter(known.values()), "")
    if subformat not in known:
        hint = f"subformats: {', '.join(known)}" if known else "it has no subformats"
        raise UnsupportedFeature(f"{format_name} has no subformat {subformat!r}", hint=hint)
    return known[subformat]


# --- the program -----------------------------------------------------------------------------------------------


class _New:
    """A new file that is there to be written to, by this user only; removed again when the block fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            raise TargetError("exists already", path=path, hint="choose another name") from None
        except OSError as error:
            raise TargetError(f"cannot be created: {error.strerror}", path=path) from error

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            with suppress(OSError):
                self._path.unlink()


class _Tool:
    """qemu-img at work on one source, which it opens as one format and by nothing but our descriptor."""

    def __init__(self, file: LocalFile, format_name: str, limits: ToolLimits, control: Control) -> None:
        descriptor = file.fileno()
        assert descriptor is not None
        by_descriptor = sys.platform == "linux"
        self._program = find_qemu_img()
        self._file = file
        self._fds = (descriptor,) if by_descriptor else ()
        self._name = image_options(f"/proc/self/fd/{descriptor}" if by_descriptor else file.name, format_name)
        self._limits = limits
        self._control = control

    def info(self) -> Mapping[str, Any]:
        """What qemu-img says of the source."""
        command = [self._program, "info", "--output=json", self._name]
        finished = run(command, limits=self._limits, read_fds=self._fds, control=self._control)
        self._check(finished, "read")
        try:
            found = json.loads(finished.stdout)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ToolError("qemu-img info printed no JSON", path=self._file.name)
        return found

    def convert(self, format_name: str, out: Path, size: int, *, options: str = "") -> None:
        """Write the source's ``size`` bytes to an empty file that is there."""
        command = [self._program, "convert", "-p", "-O", format_name]
        command += ["-o", options] if options else []
        command += [self._name, str(out.absolute())]

        def on_output(said: bytes) -> None:
            if percents := _PERCENT.findall(said):
                self._control.tell(PHASE, min(size, int(float(percents[-1]) / 100 * size)), size)

        finished = run(
            command,
            limits=self._limits,
            read_fds=self._fds,
            write=out.absolute(),
            control=self._control,
            on_output=on_output,
        )
        self._check(finished, "convert")

    def _check(self, finished: Finished, what: str) -> None:
        if finished.returncode == 0:
            return
        words = finished.last_words.replace(self._name, self._file.name)
        words = re.sub(r"/proc/self/fd/\d+", lambda _: self._file.name, words)
        if finished.returncode < 0:
            number = -finished.returncode
            with suppress(ValueError):
                words = f"it was ended by {signal.Signals(number).name}; {words}".rstrip("; ")
        hint = "the image may be damaged, or take more than the limits allow"
        if "Unknown driver" in words or "Unknown file format" in words:
            hint = "this qemu-img was built without the format; another distribution's may have it"
        raise ToolError(f"qemu-img cannot {what} it: {words}", path=self._file.name, hint=hint)
