"""One protocol for every place where a prepared machine is started.

``plan`` says what would happen and sends nothing; the other five are the life of the machine, in order. Every one
may be repeated: what is done already is left as it is. What makes the machine of a bundle its own is the uuid of
machine.json, so that two runs never make two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from imagekit.launch.result import BootResult, Evidence
from imagekit.records import dataclass

OnEvent = Callable[[Evidence], None]


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step: what it is for, and exactly what would be run.

    A program's ``command``, or a constant ``script`` with the ``data`` it would get; a step that only this computer
    takes has neither.
    """

    name: str
    does: str
    command: tuple[str, ...] = ()
    script: str | None = None
    script_name: str | None = None
    data: dict[str, object] | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "does": self.does,
            "command": list(self.command),
            "script-name": self.script_name,
            "script": self.script,
            "data": self.data,
        }


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All steps of a launch, and what whoever reads them should know (``notes``)."""

    backend: str
    target: str
    steps: tuple[PlannedStep, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            "schema": 1,
            "backend": self.backend,
            "target": self.target,
            "steps": [step.to_json() for step in self.steps],
            "notes": list(self.notes),
        }


class Launcher(Protocol):
    """Plans, creates, starts, watches, stops and deletes the machine of one bundle."""

    def plan(self) -> LaunchPlan:
        """What would be done, complete; nothing is started, sent or written."""

    def create(self) -> None:
        """Make the machine, or recognise it as made. Undone when it fails halfway."""

    def start(self) -> None:
        """Switch it on, unless it is."""

    def wait(self, timeout: float) -> BootResult:
        """Watch it for at most ``timeout`` seconds and say how far it came."""

    def stop(self) -> None:
        """Switch it off, unless it is."""

    def delete(self) -> None:
        """Remove the machine and the files that came with it, and no others."""
