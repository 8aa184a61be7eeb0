"""What one parse or conversion may use at most, whatever the image says of itself.

Exceeding a limit is a refusal by the rule ``limit-NAME`` (exit 13). The defaults let through every disk that the
formats can describe and stop what only an attack, or a mistake, would need; a service sets its own.

The virtual size is judged when an image is opened (imagekit.policy), memory when tables and plan are (formats,
imagekit.plan), output before the first byte is written, time at every look at the caller's wishes
(imagekit.progress). A confined run (imagekit.confinement.jobs) is held to the same numbers by the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from imagekit.errors import UnsafeImage, UsageError
from imagekit.records import dataclass

MiB, TiB = 1 << 20, 1 << 40
Item = TypeVar("Item")

ENVIRONMENT = "IMAGEKIT_LIMIT_"
RUN_MEMORY = 320
"""Bytes that a run of blocks takes in a plan and its layout: two tuples with their numbers, and two lists' places."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Picklable; sizes in bytes."""

    virtual_size: int = 64 * TiB
    """Of a disk that is read: what the largest format, VHDX, can hold."""

    output_bytes: int = 16 * TiB
    """Really written to a target; holes do not count."""

    metadata_memory: int = 512 * MiB
    """For an image's tables and for the plan of a conversion."""

    seconds: int = 24 * 3600
    """By the clock, for a whole conversion."""

    def __post_init__(self) -> None:
        for name in self.__match_args__:
            if getattr(self, name) < 1:
                raise UsageError(f"limit {shown(name)} {getattr(self, name)}, at least 1 is needed")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """The defaults, with what ``IMAGEKIT_LIMIT_…`` variables say instead; plain numbers."""
        values = {}
        for name in cls.__match_args__:
            text = environment.get(ENVIRONMENT + name.upper())
            if text is None:
                continue
            if not (text.isascii() and text.isdigit()):
                raise UsageError(f"{ENVIRONMENT}{name.upper()}={text!r} is not a whole number")
            values[name] = int(text)
        return cls(**values)

    def check(self, name: str, value: int, what: str) -> None:
        """UnsafeImage when ``value``, which is ``what``, is above the limit of that name."""
        most: int = getattr(self, name)
        if value > most:
            raise over_limit(name, f"{what}: {value} bytes, at most {most} are allowed")

    def counted(self, runs: Iterable[Item]) -> Iterator[Item]:
        """The runs of blocks of a plan, as long as they fit into the memory for metadata."""
        for number, run in enumerate(runs):
            self.check_runs(number)
            yield run

    def check_runs(self, number: int) -> None:
        """UnsafeImage when one more than ``number`` runs of blocks do not fit into the memory for metadata."""
        most = self.metadata_memory // RUN_MEMORY
        if number >= most:
            raise over_limit(
                "metadata_memory",
                f"the plan has more than {most} runs of blocks, which take {self.metadata_memory} bytes",
            )


DEFAULT = Limits()


def shown(name: str) -> str:
    """The limit's name in options and rules."""
    return name.replace("_", "-")


def over_limit(name: str, message: str) -> UnsafeImage:
    """The refusal by a limit."""
    return UnsafeImage(
        f"refused by rule limit-{shown(name)}: {message}",
        rule=f"limit-{shown(name)}",
        hint=f"where its origin is trusted: a larger --limit-{shown(name)}",
    )
