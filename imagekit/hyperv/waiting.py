"""Watch a machine on a host: five questions with an answer each, and one verdict of them all.

Running, heartbeat, address, serial text and ARP are separate: many cloud images lack the daemon that tells
addresses, so a machine that is up may answer one question and stay silent on the rest. What the guest printed is
judged by the same table as in the rehearsal.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from imagekit.errors import Cancelled
from imagekit.hyperv.host import Host
from imagekit.hyperv.transport import HostError, TransportError
from imagekit.launch.evidence import DEFAULT_MARKER, Reader, escape
from imagekit.launch.launcher import OnEvent
from imagekit.launch.result import BootResult, Evidence, Verdict
from imagekit.machine import Machine
from imagekit.progress import SILENT, Control

Check = Literal["yes", "no", "unknown"]
CHECKS = ("running", "heartbeat", "address", "serial", "arp")
POLL_SECONDS = 3.0
SERIAL_SECONDS = 2
MAX_SERIAL = 16 << 20
ON_THE_WAY = ("unknown", "Starting", "Resuming", "Reset")
"""States that are neither running nor a reason to give up; those not known here are one."""
LOST = 5
"""Failed calls in a row after which the host counts as lost."""


@dataclass
class Watching:
    """What is known so far."""

    checks: dict[str, Check] = field(default_factory=lambda: dict.fromkeys(CHECKS, "unknown"))
    addresses: list[str] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    console: bytearray = field(default_factory=bytearray)
    state: str = "unknown"


class Waiter:
    """Asks the host again and again until it is clear, or the time is over."""

    def __init__(
        self,
        host: Host,
        machine: Machine,
        identifier: str,
        *,
        marker: str | None = None,
        on_event: OnEvent | None = None,
        control: Control = SILENT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._host, self._machine, self._id = host, machine, identifier
        self._marker, self._on_event, self._control = marker, on_event, control
        self._clock, self._sleep = clock, sleep
        self._reader = Reader(marker=marker or DEFAULT_MARKER)
        self._began = clock()
        self._serial = True
        self.known = Watching()

    def wait(self, timeout: float) -> BootResult:
        """The verdict, after at most ``timeout`` seconds and one more answer of the host."""
        failures = 0
        while True:
            if self._control.cancelled:
                raise Cancelled("stopped on request; the machine goes on")
            try:
                self._look()
                failures = 0
            except TransportError:
                failures += 1
                if failures >= LOST:
                    raise
            verdict = self._decided()
            if verdict is not None or self._clock() - self._began >= timeout:
                return self._result(verdict or self._undecided())
            self._sleep(POLL_SECONDS)

    def _look(self) -> None:
        seen = self._host.call("observe", {"id": self._id, "macs": [nic.mac for nic in self._machine.nics]})
        known = self.known
        if seen["state"] != known.state:
            known.state = seen["state"]
            self._note(f"the machine is {escape(known.state)}", failure=False)
        if known.state == "Running":
            self._answer("running", True)
        elif known.state not in ON_THE_WAY:
            self._answer("running", False)
        heartbeat = str(seen.get("heartbeat") or "")
        if heartbeat:
            self._answer("heartbeat", heartbeat.startswith("Ok"), f"heartbeat: {heartbeat}")
        addresses = [str(one) for one in seen.get("addresses") or ()]
        if addresses:
            known.addresses = addresses
            self._answer("address", True, f"address: {', '.join(addresses)}")
        neighbours = [str(one) for one in seen.get("neighbours") or ()]
        if neighbours:
            known.addresses = known.addresses or neighbours
            self._answer("arp", True, f"the host's neighbour table has {', '.join(neighbours)}")
        if self._serial:
            self._listen()

    def _listen(self) -> None:
        try:
            heard = self._host.call("read-serial", {"id": self._id, "seconds": SERIAL_SECONDS})
        except HostError as error:
            self._serial = False
            self._note(f"the serial port cannot be read: {escape(error.message)}", failure=False)
            return
        try:
            data = base64.b64decode(str(heard.get("data") or ""), validate=True)
        except binascii.Error:
            return
        if not data:
            return
        self.known.console += data[: max(0, MAX_SERIAL - len(self.known.console))]
        now = self._now()
        found = [*self._reader.feed(data, now), *self._reader.pause(now)]
        self.known.evidence += found
        for item in found:
            self._tell(item)
        if self._reader.failed:
            self.known.checks["serial"] = "no"
        elif self._reader.reached("login" if self._marker is None else "marker"):
            self.known.checks["serial"] = "yes"

    def _decided(self) -> Verdict | None:
        checks = self.known.checks
        if self._reader.failed or checks["running"] == "no":
            return "no-boot"
        if self._marker is not None:
            return "booted" if "marker" in self._reader.seen else None
        if checks["serial"] == "yes" or checks["address"] == "yes":
            return "booted"
        # A heartbeat is the kernel's: it comes before there is a network to have an address.
        return None

    def _undecided(self) -> Verdict:
        """What the end of the time makes of it."""
        checks = self.known.checks
        if self._marker is not None:
            return "timeout"
        if checks["heartbeat"] == "yes" or checks["arp"] == "yes":
            return "booted"
        return "timeout" if self._reader.reached("kernel") else "unknown"

    def _answer(self, check: str, yes: bool, line: str | None = None) -> None:
        answer: Check = "yes" if yes else "no"
        if self.known.checks[check] != answer:
            self.known.checks[check] = answer
            if line is not None:
                self._note(escape(line), failure=False)

    def _note(self, line: str, *, failure: bool) -> None:
        item = Evidence(round(self._now(), 1), self._reader.stage, "host", line[:300], failure)
        self.known.evidence.append(item)
        self._tell(item)

    def _tell(self, item: Evidence) -> None:
        if self._on_event is not None:
            self._on_event(item)

    def _now(self) -> float:
        return self._clock() - self._began

    def _result(self, verdict: Verdict) -> BootResult:
        return BootResult(
            backend="hyperv",
            verdict=verdict,
            stage=self._reader.stage,
            evidence=tuple(self.known.evidence),
            console=None,
            screenshot=None,
            seconds=self._now(),
            accelerator=None,
            checks=dict(self.known.checks),
            addresses=tuple(self.known.addresses),
        )
