"""Every error imagekit raises on purpose: a handful of kinds, each with one exit code.

The kinds answer *whose fault it is*: the caller's (usage, spec), the image's (unknown, invalid, corrupt,
unsupported, unsafe), the environment's (source, target, tool) or the machine's (boot). A message says what was
found, what was expected and where; the hint says what to do. Adding a format adds no kind.

The exit codes are the contract of the command line (README, "Exit codes").
"""

from __future__ import annotations

import os
from typing import ClassVar


class ImagekitError(Exception):
    """Base of all errors raised on purpose.

    ``hint`` says what to do about it, ``path`` names the file, ``offset`` is the byte position in that file.
    """

    exit_code: ClassVar[int] = 70

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.path = None if path is None else os.fspath(path)
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" (at offset {self.offset:#x})"
        name = "" if self.path is None else f"{self.path}: "
        return f"{name}{self.message}{where}"

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call cls(str) and lose hint, path and offset on the way to another process.
        return (_rebuild, (type(self), self.message, self.hint, self.path, self.offset))


def _rebuild(
    kind: type[ImagekitError], message: str, hint: str | None, path: str | None, offset: int | None
) -> ImagekitError:
    return kind(message, hint=hint, path=path, offset=offset)


class UsageError(ImagekitError):
    """The caller asked for something that makes no sense (also: target = source)."""

    exit_code = 2


class InvalidSpec(UsageError):
    """The guest metadata spec has unknown fields, wrong types or values that contradict each other."""


class SourceError(ImagekitError):
    """The source is missing, unreadable, held by another program, or changed while it was read."""

    exit_code = 10


class UnknownFormat(ImagekitError):
    """No format recognises the file, or it is one that imagekit knows by name only."""

    exit_code = 11


class InvalidImage(ImagekitError):
    """A header or table says something that no valid image says."""

    exit_code = 11


class CorruptImage(ImagekitError):
    """The structure is damaged, or bytes that must be there are missing."""

    exit_code = 11


class UnsupportedFeature(ImagekitError):
    """The image or the caller wants something imagekit does not do."""

    exit_code = 12


class UnsafeImage(ImagekitError):
    """The safety policy refuses; ``rule`` is the stable code of the rule."""

    exit_code = 13

    def __init__(
        self,
        message: str,
        *,
        rule: str = "",
        hint: str | None = None,
        path: str | os.PathLike[str] | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint, path=path, offset=offset)
        self.rule = rule

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_unsafe, (self.message, self.rule, self.hint, self.path, self.offset))


def _rebuild_unsafe(message: str, rule: str, hint: str | None, path: str | None, offset: int | None) -> UnsafeImage:
    return UnsafeImage(message, rule=rule, hint=hint, path=path, offset=offset)


class TargetError(ImagekitError):
    """The target exists, or its folder is missing, not writable or full."""

    exit_code = 14


class VerificationFailed(ImagekitError):
    """What was written does not read back as what was meant, or a checksum differs."""

    exit_code = 15


class ToolError(ImagekitError):
    """An outside tool or service is missing or failed."""

    exit_code = 16


class BootFailed(ImagekitError):
    """The machine did not boot, or nobody can tell."""

    exit_code = 17


class BatchFailed(ImagekitError):
    """Some items of a batch failed; the others are done."""

    exit_code = 3


class Cancelled(ImagekitError):
    """The caller asked to stop; nothing is left behind."""

    exit_code = 130


EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done, verified to the level named"),
    (1, "compare: the contents differ"),
    (2, "usage error (also: target = source)"),
    (3, "batch: some items failed"),
    (10, "source missing, unreadable or in use by another program"),
    (11, "format unknown or invalid; image corrupt or truncated"),
    (12, "feature or option not supported"),
    (13, "refused by the safety policy"),
    (14, "target exists, its folder is missing or not writable, or no space"),
    (15, "verification or checksum failed"),
    (16, "an outside tool or service failed"),
    (17, "the machine did not boot, or nobody can tell"),
    (70, "internal error (a bug: please report)"),
    (130, "interrupted, nothing left behind"),
    (143, "terminated, nothing left behind"),
)
"""Code and meaning, as ``imagekit --help`` and the README print them."""
