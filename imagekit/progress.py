"""Progress as plain data, and the request to stop.

The library calls a function with :class:`Progress` values from the caller's own thread and looks at a
``threading.Event``; what to draw, and which signal sets the event, is the caller's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeAlias

from imagekit.errors import Cancelled
from imagekit.limits import over_limit
from imagekit.records import dataclass, replace

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
    deadline: float | None = None
    """On the monotonic clock; what is not done by then is refused (rule limit-seconds)."""

    def within(self, seconds: float) -> Control:
        """The same, with an end in ``seconds`` from now; one that comes sooner stays."""
        end = time.monotonic() + seconds
        return self if self.deadline is not None and self.deadline <= end else replace(self, deadline=end)

    def tell(self, phase: str, done: int, total: int) -> None:
        """Report, and raise Cancelled when the caller asked to stop."""
        self.check()
        if self.callback is not None:
            self.callback(Progress(phase, done, total))

    def check(self) -> None:
        if self.cancelled:
            raise Cancelled("stopped on request")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise over_limit("seconds", "it took longer than is allowed")

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


SILENT = Control()
