"""Progress as plain data, and the request to stop.

The library calls a function with :class:`Progress` values from the caller's own thread and looks at a
``threading.Event``; what to draw, and which signal sets the event, is the caller's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from imagekit.errors import Cancelled

INTERVAL = 0.1
"""Seconds between two looks at the workers: the bound on how late progress and cancel are."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: ``done`` of ``total`` bytes of a phase (unpack, plan, copy, verify, sync, hash, …)."""

    phase: str
    done: int
    total: int


Callback: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Control:
    """What a caller passes down: whom to tell, and whether to stop."""

    callback: Callback | None = None
    cancel: threading.Event | None = None

    def tell(self, phase: str, done: int, total: int) -> None:
        """Report, and raise Cancelled when the caller asked to stop."""
        self.check()
        if self.callback is not None:
            self.callback(Progress(phase, done, total))

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled("stopped on request")

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


SILENT = Control()
