"""Five questions, one verdict: what a machine on a host shows, and what is made of it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pytest

from imagekit.errors import Cancelled
from imagekit.hyperv.transport import HostError, TransportError
from imagekit.hyperv.waiting import Waiter
from imagekit.launch.result import BootResult
from imagekit.progress import Control
from tests.test_hyperv_request import machine


class Scripted:
    """A host that shows one thing after the other; the last one stays."""

    target, local, hops = "h", False, False
    family: Any = "2016"

    def __init__(
        self, shown: list[dict[str, Any] | Exception], serial: list[bytes | Exception] | None = None
    ) -> None:
        self.shown, self.serial = shown, serial
        self.calls = 0

    def close(self) -> None:
        pass

    def call(self, operation: str, parameters: Mapping[str, Any], *, timeout: float = 0) -> dict[str, Any]:
        if operation == "read-serial":
            if self.serial is None:
                raise HostError("no such pipe", kind="not-found")
            heard = self.serial.pop(0) if self.serial else b""
            if isinstance(heard, Exception):
                raise heard
            return {"data": base64.b64encode(heard).decode()}
        self.calls += 1
        seen = self.shown.pop(0) if len(self.shown) > 1 else self.shown[0]
        if isinstance(seen, Exception):
            raise seen
        return {"heartbeat": "", "addresses": [], "neighbours": []} | seen


def watch(host: Scripted, *, timeout: float = 60, marker: str | None = None) -> BootResult:
    now = [0.0]
    waiter = Waiter(
        host,
        machine(),
        "id",
        marker=marker,
        clock=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    return waiter.wait(timeout)


RUNNING = {"state": "Running"}


def test_an_address_is_a_boot() -> None:
    result = watch(Scripted([{"state": "Starting"}, RUNNING, RUNNING | {"addresses": ["192.0.2.7"]}]))
    assert (result.verdict, result.addresses, result.backend) == ("booted", ("192.0.2.7",), "hyperv")
    assert result.checks == {
        "running": "yes",
        "heartbeat": "unknown",
        "address": "yes",
        "serial": "unknown",
        "arp": "unknown",
    }


def test_a_login_prompt_is_a_boot_though_nobody_tells_an_address() -> None:
    """The commonest cloud image: no daemon for key-value pairs."""
    result = watch(Scripted([RUNNING], [b"Linux version 6.1\r\n", b"debian login: "]))
    assert (result.verdict, result.stage, result.checks["address"]) == ("booted", "login", "unknown")


def test_a_heartbeat_alone_is_a_boot_when_the_time_is_over() -> None:
    result = watch(Scripted([RUNNING | {"heartbeat": "OkApplicationsUnknown"}]))
    assert (result.verdict, result.checks["heartbeat"]) == ("booted", "yes")
    assert result.seconds >= 60


def test_an_address_in_the_neighbour_table_counts_at_the_end() -> None:
    result = watch(Scripted([RUNNING | {"neighbours": ["192.0.2.9"]}]))
    assert (result.verdict, result.addresses, result.checks["arp"]) == ("booted", ("192.0.2.9",), "yes")


def test_a_panic_on_the_serial_port_is_no_boot() -> None:
    result = watch(Scripted([RUNNING], [b"Linux version 6.1\n[ 1.0] Kernel panic - not syncing: VFS\n"]))
    assert (result.verdict, result.checks["serial"]) == ("no-boot", "no")
    assert any(item.failure for item in result.evidence)


@pytest.mark.parametrize("state", ["Off", "OffCritical", "Paused", "Saved"])
def test_a_machine_that_went_off_did_not_boot(state: str) -> None:
    result = watch(Scripted([RUNNING, {"state": state}]))
    assert (result.verdict, result.checks["running"]) == ("no-boot", "no")


def test_a_machine_that_runs_and_says_nothing_is_unknown() -> None:
    result = watch(Scripted([RUNNING]))
    assert (result.verdict, result.checks["running"]) == ("unknown", "yes")
    assert any("serial port cannot be read" in item.line for item in result.evidence)


def test_a_kernel_that_gets_no_further_is_a_timeout() -> None:
    assert watch(Scripted([RUNNING], [b"Linux version 6.1\n"])).verdict == "timeout"


def test_with_a_marker_nothing_less_counts() -> None:
    shown: list[dict[str, Any] | Exception] = [RUNNING | {"addresses": ["192.0.2.7"]}]
    assert watch(Scripted(shown, [b"login: "]), marker="ALL-WELL").verdict == "timeout"
    assert watch(Scripted(shown, [b"ALL-WELL\n"]), marker="ALL-WELL").verdict == "booted"


def test_an_answer_lost_now_and_then_is_borne_and_a_host_that_is_gone_is_not() -> None:
    lost = TransportError("lost")
    shown: list[dict[str, Any] | Exception] = [lost, lost, RUNNING, lost, RUNNING | {"addresses": ["192.0.2.7"]}]
    assert watch(Scripted(shown)).verdict == "booted"
    with pytest.raises(TransportError):
        watch(Scripted([lost]))


def test_cancelling_leaves_the_machine_alone() -> None:
    import threading

    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        Waiter(Scripted([RUNNING]), machine(), "id", control=Control(None, cancel)).wait(10)
