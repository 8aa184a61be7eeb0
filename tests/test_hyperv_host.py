"""A host behind a transport: what is asked, what is believed of the answers, and which host is not changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from imagekit.errors import ImagekitError, UnsupportedFeature, UsageError
from imagekit.hyperv import operations
from imagekit.hyperv.contract import ERROR_KINDS, OPERATIONS
from imagekit.hyperv.frames import frame
from imagekit.hyperv.host import NoHost, RealHost
from imagekit.hyperv.passed import remember_passed
from imagekit.hyperv.transport import Answer, HostError, TransportError


class Canned:
    """A transport that answers every call with the same value."""

    target, hops = "host1", False

    def __init__(self, value: object, errors: tuple[str, ...] = ()) -> None:
        self.value, self.errors = value, errors
        self.sent: list[Mapping[str, str]] = []

    def run(self, script: str, parameters: Mapping[str, str], *, timeout: float) -> Answer:
        self.sent.append(parameters)
        text = frame(self.value, parameters["Nonce"]) if self.value is not None else "rubbish"
        return Answer(text, self.errors)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No script is run here, whichever there is; and no host has passed a self-test."""
    monkeypatch.setattr(
        operations, "request", lambda name, family, asked: operations.Request(name, "", json.dumps(asked))
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))


def ask(value: object, operation: str = "start", asked: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return RealHost(Canned(value, **more), family="2016").call(operation, {"id": "x"} if asked is None else asked)


def test_a_result_is_what_the_contract_names_and_may_be_more() -> None:
    assert ask({"ok": True, "result": {"more": 1}}) == {"more": 1}


@pytest.mark.parametrize("kind", sorted(ERROR_KINDS))
def test_a_failure_keeps_its_kind(kind: str) -> None:
    with pytest.raises(HostError, match="host1, start: Zugriff verweigert") as caught:
        ask({"ok": False, "error": {"kind": kind, "message": "Zugriff\r\nverweigert"}})
    assert caught.value.kind == kind


def test_a_failure_of_an_unknown_kind_is_a_failure() -> None:
    with pytest.raises(HostError) as caught:
        ask({"ok": False, "error": {"kind": "new", "message": None}})
    assert caught.value.kind == "failed"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"ok": True},
        {"ok": 1, "result": {}},
        {"ok": False},
        {"ok": False, "error": "text"},
        {"ok": True, "result": []},
        {"result": {}},
    ],
)
def test_what_is_no_answer_is_a_failure_of_the_transport(value: object) -> None:
    with pytest.raises(TransportError):
        ask(value)


@pytest.mark.parametrize(
    ("operation", "asked", "result"),
    [
        ("find", {"uuid": "u", "name": "n", "folder": "f"}, {}),
        ("find", {"uuid": "u", "name": "n", "folder": "f"}, {"machines": "none"}),
        ("find", {"uuid": "u", "name": "n", "folder": "f"}, {"machines": [{"id": 7}]}),
        ("file-info", {"path": "p", "hash": True, "size": 1}, {"exists": True}),
        ("file-info", {"path": "p", "hash": True, "size": 1}, {"exists": 1}),
        ("file-info", {"path": "p", "hash": True, "size": 1}, {"exists": True, "size": True}),
        ("preflight", {"store": "s", "bytes": 1, "memory": 1, "switches": []}, {"problems": ["text"]}),
    ],
)
def test_a_result_of_another_form_is_not_believed(
    operation: str, asked: dict[str, Any], result: dict[str, Any]
) -> None:
    with pytest.raises(TransportError, match=operation):
        ask({"ok": True, "result": result}, operation, asked)


def test_without_a_frame_the_hosts_own_error_is_shown() -> None:
    with pytest.raises(TransportError, match="its error: The term 'Hyper-V' is not recognized"):
        ask(None, errors=("The term 'Hyper-V'\nis not recognized",))


def test_wrong_parameters_are_a_mistake_of_ours_and_not_sent() -> None:
    transport = Canned({"ok": True, "result": {}})
    for asked in ({}, {"id": 1}, {"id": "x", "more": 1}):
        with pytest.raises(ImagekitError, match="wrong"):
            RealHost(transport, family="2016").call("start", asked)
    assert not transport.sent


def test_the_kind_of_host_is_asked_for_once() -> None:
    transport = Canned({"ok": True, "result": {"family": "2012r2", "store": "C:\\x"}})
    host = RealHost(transport)
    assert (host.family, host.family, len(transport.sent)) == ("2012r2", "2012r2", 1)


def test_a_kind_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError):
        RealHost(Canned({"ok": True, "result": {"family": "2003", "store": ""}})).family  # noqa: B018


def test_a_2008_r2_host_is_looked_at_but_not_changed_before_a_self_test_passed_there() -> None:
    host = RealHost(Canned({"ok": True, "result": {}}), family="2008r2")
    with pytest.raises(UnsupportedFeature, match="stay a plan") as caught:
        host.call("start", {"id": "x"})
    assert caught.value.exit_code == 12 and "selftest" in (caught.value.hint or "")
    remember_passed("another", "2008r2")
    with pytest.raises(UnsupportedFeature):
        host.call("start", {"id": "x"})
    remember_passed("host1", "2008r2")
    assert host.call("start", {"id": "x"}) == {}


def test_every_operation_that_only_looks_may_be_asked_of_any_host() -> None:
    looking = {name for name, operation in OPERATIONS.items() if not operation.changes}
    assert looking == {
        *("probe", "preflight", "find", "file-info", "observe", "read-serial", "selftest", "hash-disk"),
    }


def test_a_plan_asks_nobody() -> None:
    with pytest.raises(UsageError):
        NoHost("h", "2016", False).call("find", {})


def test_parameters_for_2008_r2_are_lines_of_base64() -> None:
    lines = list(operations._lines({"a": "x=\n", "b": True, "c": None, "n": [{"m": 1}, {"m": 2}], "k": {"d": "ü"}}))
    assert lines == [
        *("a=eD0K\n", "b=dHJ1ZQ==\n", "n.count=Mg==\n"),
        *("n.0.m=MQ==\n", "n.1.m=Mg==\n", "k.d=w7w=\n"),
    ]
