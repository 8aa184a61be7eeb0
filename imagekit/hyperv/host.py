"""A host: its kind, found out once, and operations called by name.

An operation is a constant script for this kind of host, its parameters, and the result it must give
(:mod:`imagekit.hyperv.operations`). What the host answers is input from outside: its form is checked before
anything believes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from imagekit.hyperv.request import Family

CALL_SECONDS = 120.0
"""For an operation that only looks or switches; those that hash a disk take a time-out of their own."""


class Host(Protocol):
    """What the stage asks; a model of a host in our tests has the same."""

    @property
    def target(self) -> str:
        """The host, as messages name it."""

    @property
    def local(self) -> bool:
        """Whether paths on the host are paths on this computer."""

    @property
    def hops(self) -> bool:
        """Whether the host may use our identity towards a third computer."""

    @property
    def family(self) -> Family:
        """Its kind."""

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = CALL_SECONDS) -> dict[str, Any]:
        """Do one operation. Raises HostError when it failed, TransportError when nobody can tell."""
