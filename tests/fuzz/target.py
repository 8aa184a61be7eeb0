"""Bytes, looked at as ``info``, ``convert`` and ``check`` look at a file. What must not happen raises.

As a program (``python -m tests.fuzz.target [CORPUS] [libFuzzer's options]``, or ``make fuzz``) it is a target for
atheris, which is no dependency: it has a requirements file of its own beside this module. All else works without.
"""

from __future__ import annotations

import importlib
import json
import sys
from itertools import islice
from typing import Any

from imagekit import policy
from imagekit.errors import BootFailed, Cancelled, ImagekitError, TargetError, ToolError, UsageError
from imagekit.formats import registry
from imagekit.formats.base import DiskFormat, DiskImage, MiB
from imagekit.formats.files import MemoryFile

MAGICS = (b"QFI\xfb", b"KDMV", b"COWD", b"vhdxfile", b"conectix", b"QED\0", b"LUKS\xba\xbe", b"<<< Orac")
"""What no file that is taken for raw begins with."""

WRONG_KINDS = (UsageError, TargetError, ToolError, BootFailed, Cancelled)
"""Errors that bytes cannot be the cause of."""

EXTENTS, READ = 2000, 1 * MiB
"""How much of a disk is looked at."""


class Wrong(AssertionError):
    """Something that must not happen, whatever the bytes."""


def look(file: MemoryFile) -> str:
    """What became of it: the name of the format, or of the error."""
    try:
        claims = registry.probe(file)
        policy.enforce(policy.judge_claims(claims, None, name=file.name))
        chosen = registry.choose(file, claims)
        if chosen.name == "raw" and file.data[:8].startswith(MAGICS):
            raise Wrong("taken for raw, and begins like an image")
        image = chosen.open(file)
        info = image.info()
        json.dumps(info.features)
        list(policy.judge_info(info))
        _read(image)
        _check(chosen, file)
        policy.enforce(policy.judge_info(info))
    except ImagekitError as error:
        if isinstance(error, WRONG_KINDS):
            raise Wrong(f"{type(error).__name__} is nothing that bytes can be the cause of: {error}") from error
        if not str(error).isprintable():
            raise Wrong(f"a message that controls a terminal: {str(error)!r}") from error
        return type(error).__name__
    return chosen.name


def _read(image: DiskImage) -> None:
    """Some of the extents, which must cover the disk from its start, and some of the data."""
    at = left = 0
    left = READ
    for extent in islice(image.extents(), EXTENTS):
        if extent.start != at or extent.length <= 0:
            raise Wrong(f"extents with a gap, or on one another, at {at:#x}: {extent}")
        at = extent.end
        if extent.data and left > 0:
            length = min(extent.length, left)
            if len(image.pread(extent.start, length)) != length:
                raise Wrong(f"a short read at {extent.start:#x}")
            left -= length
    if at > image.virtual_size:
        raise Wrong(f"extents up to {at:#x} of a disk of {image.virtual_size:#x} bytes")


def _check(chosen: DiskFormat, file: MemoryFile) -> None:
    if chosen.name != "raw":
        problems = chosen.check(file)
        json.dumps([problem.message for problem in problems])
        list(policy.judge_structure(problems))


def TestOneInput(data: bytes) -> None:  # noqa: N802 - the name that atheris knows
    """One case of a fuzzer."""
    look(MemoryFile(data))


def _main() -> None:
    fuzzer: Any = importlib.import_module("atheris")
    fuzzer.instrument_all()
    fuzzer.Setup(sys.argv, TestOneInput)
    fuzzer.Fuzz()


if __name__ == "__main__":
    _main()
