"""A host: its kind, found out once, and operations called by name.

An operation is a constant script for this kind of host, its parameters, and the result it must give
(:mod:`imagekit.hyperv.operations`). What the host answers is input from outside: its form is checked before
anything believes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from imagekit.errors import UnsupportedFeature, UsageError
from imagekit.hyperv import operations
from imagekit.hyperv.contract import OPERATIONS, check_parameters, judge
from imagekit.hyperv.frames import make_nonce, unframe
from imagekit.hyperv.passed import has_passed
from imagekit.hyperv.request import Family, as_family
from imagekit.hyperv.transport import Transport, TransportError

ANY_WINDOWS = frozenset(("hash-disk",))
"""Operations that need no Hyper-V, so that the kind of host is not asked for."""
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

    def close(self) -> None:
        """End the connection."""

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = CALL_SECONDS) -> dict[str, Any]:
        """Do one operation. Raises HostError when it failed, TransportError when nobody can tell."""


class RealHost:
    """A host behind a transport. ``family`` None: asked for when it is first needed."""

    def __init__(self, transport: Transport, *, family: Family | None = None, local: bool = False) -> None:
        self._transport, self._family, self._local = transport, family, local

    @property
    def target(self) -> str:
        return self._transport.target

    @property
    def local(self) -> bool:
        return self._local

    @property
    def hops(self) -> bool:
        return self._transport.hops

    @property
    def family(self) -> Family:
        if self._family is None:
            self._family = as_family(str(self._ask("probe", None, {}, CALL_SECONDS)["family"]))
        return self._family

    def close(self) -> None:
        self._transport.close()

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = CALL_SECONDS) -> dict[str, Any]:
        family = self._family if operation in ANY_WINDOWS else self.family
        if family == "2008r2" and OPERATIONS[operation].changes and not has_passed(self.target, "2008r2"):
            raise UnsupportedFeature(
                f"{self.target} is a Windows Server 2008 R2, and {operation} would change it: its scripts were never "
                "run on one, so they stay a plan until a self-test has passed there",
                hint="imagekit hyperv selftest --host HOST; what would be done: imagekit hyperv plan --family 2008r2",
            )
        return self._ask(operation, family, parameters, timeout)

    def _ask(
        self, operation: str, family: Family | None, parameters: Mapping[str, Any], timeout: float
    ) -> dict[str, Any]:
        check_parameters(operation, parameters)
        request = operations.request(operation, family, parameters)
        nonce = make_nonce()
        sent = {"Parameters": request.text, "Nonce": nonce}
        answer = self._transport.run(request.script, sent, timeout=timeout)
        try:
            value = unframe(answer.text, nonce)
        except TransportError as error:
            if answer.errors:
                said = " ".join(answer.errors[0].split())[:300]
                raise TransportError(f"{error.message}; its error: {said}", hint=error.hint) from None
            raise
        return judge(operation, value, self.target)


class NoHost:
    """Stands where a plan needs a host: it knows its kind, and refuses to be asked."""

    hops = True

    def __init__(self, target: str, family: Family, local: bool) -> None:
        self.target, self.family, self.local = target, family, local

    def close(self) -> None:
        """There is nothing to end."""

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = CALL_SECONDS) -> dict[str, Any]:
        raise UsageError(f"a plan asks no host, but {operation} would")
