"""How a constant script and its data get to a host, and its text comes back.

Data never becomes part of a script: a transport hands over the script as it is shipped, and beside it named
parameters, each a string. Two ways: :mod:`imagekit.hyperv.local` starts powershell.exe on this computer,
:mod:`imagekit.hyperv.winrm` speaks WinRM. Neither retries: what a broken connection left behind on the host is only
found out by asking it, which the steps do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from imagekit.errors import ToolError
from imagekit.records import dataclass


class TransportError(ToolError):
    """The host was not reached, or its answer did not arrive whole: what it did is unknown."""


class LoginFailed(TransportError):
    """The host knows us not, or not well enough: nothing was done."""


class HostError(ToolError):
    """The script ran and says that it failed; ``kind`` is its word for why, the same in every language."""

    def __init__(self, message: str, *, kind: str = "failed", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.kind, self.hint))


def _rebuild(message: str, kind: str, hint: str | None) -> HostError:
    return HostError(message, kind=kind, hint=hint)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a script wrote to its output, and to its error stream."""

    text: str
    errors: tuple[str, ...] = ()


class Transport(Protocol):
    """A way to a host."""

    @property
    def target(self) -> str:
        """The host, as messages name it."""

    @property
    def hops(self) -> bool:
        """Whether the host may use our identity towards a third computer (a share)."""

    def run(self, script: str, parameters: Mapping[str, str], *, timeout: float) -> Answer:
        """Run ``script`` with ``parameters``. Raises TransportError (LoginFailed) when no answer came."""

    def close(self) -> None:
        """Say goodbye; never raises."""
