"""Command line, stage, WinRM and a model of a host together: what a user does, over a connection that may break.

The endpoint speaks the real protocol and hands each script's parameters to the model, by the script it is; no
PowerShell runs here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagekit.cli.app import run
from imagekit.hyperv import operations
from imagekit.hyperv.contract import OPERATIONS
from imagekit.hyperv.credentials import PASSWORD, USER, Credentials
from imagekit.hyperv.frames import frame
from imagekit.hyperv.host import RealHost
from imagekit.hyperv.journal import Journal
from imagekit.hyperv.push import Item, push_file
from imagekit.hyperv.transport import HostError
from imagekit.hyperv.winrm import Endpoint, WinrmTransport
from imagekit.launch.qemu import QemuLauncher
from imagekit.launch.result import BootResult
from tests.hyperv_model import STORE, ModelHost
from tests.test_hyperv_stage import FOLDER, UUID, measured, write_bundle
from tests.wsman_endpoint import Call, Reply, WsmanEndpoint

BY_SCRIPT = {operations.request(name, "2016", {}).script: name for name in OPERATIONS}
MIB = 1 << 20


def answers_of(model: ModelHost) -> Any:
    """What the endpoint does with a call: the model's operation, framed as a script frames it."""

    def answering(call: Call) -> Reply:
        nonce = call.parameters["Nonce"]
        try:
            result = model.call(BY_SCRIPT[call.script], json.loads(call.parameters["Parameters"]))
        except HostError as error:
            return Reply([frame({"ok": False, "error": {"kind": error.kind, "message": error.message}}, nonce)])
        return Reply(["noise of a profile", frame({"ok": True, "result": result}, nonce)])

    return answering


@pytest.fixture
def model() -> ModelHost:
    return ModelHost(target="loopback")


@pytest.fixture
def endpoint(model: ModelHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WsmanEndpoint]:
    users = tmp_path / "users"
    users.write_text("LAB:tester:pass word\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(users))
    monkeypatch.setenv(USER, "LAB\\tester")
    monkeypatch.setenv(PASSWORD, "pass word")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with WsmanEndpoint(answers_of(model)) as listening:
        yield listening


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "web1")


def arguments(step: str, bundle: Path, endpoint: WsmanEndpoint, *more: str) -> list[str]:
    host = f"hyperv+http://127.0.0.1:{endpoint.port}"
    return ["hyperv", step, str(bundle), "--host", host, "--auth", "ntlm", "--output", "json", *more]


def test_a_machine_from_the_command_line_to_its_end(
    bundle: Path, endpoint: WsmanEndpoint, model: ModelHost, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    for step in ("push", "create", "start", "wait", "eject", "stop", "delete"):
        assert run(arguments(step, bundle, endpoint)) == 0, capsys.readouterr().err
        printed = capsys.readouterr()
        seen[step] = json.loads(printed.out)
        assert "pass word" not in printed.out + printed.err
        assert "every message is sealed" in printed.err
    assert seen["push"]["done"] == [f"sent {FOLDER}\\web1.vhd", f"sent {FOLDER}\\web1-config.iso"]
    assert seen["create"]["done"][-1] == "made web1"
    assert (seen["wait"]["backend"], seen["wait"]["verdict"]) == ("hyperv", "booted")
    assert seen["wait"]["checks"]["address"] == "yes" and seen["wait"]["accelerator"] is None
    assert "removed machine web1" in seen["delete"]["done"]
    assert not model.machines and not model.files


def test_boot_on_a_host_is_create_start_and_wait(
    bundle: Path, endpoint: WsmanEndpoint, model: ModelHost, capsys: pytest.CaptureFixture[str]
) -> None:
    on = f"hyperv+http://127.0.0.1:{endpoint.port}"
    command = ["boot", str(bundle), "--on", on, "--auth", "ntlm", "--store", STORE, "--output", "json"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["addresses"] == ["192.0.2.77"]
    assert [machine.state for machine in model.machines.values()] == ["Running"]


@pytest.mark.parametrize(
    ("verdict", "code", "sent"), [("no-boot", 17, False), ("unknown", 17, False), ("booted", 0, True)]
)
def test_a_bundle_whose_rehearsal_does_not_boot_is_not_sent(
    bundle: Path, endpoint: WsmanEndpoint, monkeypatch: pytest.MonkeyPatch, verdict: Any, code: int, sent: bool
) -> None:
    rehearsed = BootResult("qemu", verdict, "firmware", (), None, None, 1.0, "tcg")
    monkeypatch.setattr(QemuLauncher, "wait", lambda launcher, timeout: rehearsed)
    on = f"hyperv+http://127.0.0.1:{endpoint.port}"
    assert run(["boot", str(bundle), "--on", on, "--auth", "ntlm", "--rehearse", "-q"]) == code
    assert bool(endpoint.calls) is sent


def test_a_failure_on_the_host_has_its_exit_code_and_is_undone(
    bundle: Path, endpoint: WsmanEndpoint, model: ModelHost, capsys: pytest.CaptureFixture[str]
) -> None:
    model.switches.clear()
    assert run(arguments("create", bundle, endpoint)) == 14
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert "no switch 'LAN'" in error["message"]
    assert not model.files and not model.machines


@pytest.mark.parametrize(
    "operation",
    ["create", *(pytest.param(name, marks=pytest.mark.slow) for name in ("publish-file", "attach", "finish"))],
)
def test_a_connection_that_breaks_after_the_host_acted_is_undone_over_a_new_one(
    bundle: Path, endpoint: WsmanEndpoint, model: ModelHost, operation: str
) -> None:
    def cut(name: str, asked: dict[str, Any]) -> None:
        if name == operation:
            model.before = None
            endpoint.hang_up = True

    model.before = cut
    assert run(arguments("create", bundle, endpoint)) == 16
    assert not model.files and not model.machines and list(model.folders.values()) == [STORE]
    assert run(arguments("create", bundle, endpoint)) == 0


def test_off_a_terminal_nothing_is_asked(bundle: Path, endpoint: WsmanEndpoint) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in (USER, PASSWORD)}
    done = subprocess.run(
        [sys.executable, "-m", "imagekit", *arguments("create", bundle, endpoint)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 2
    assert "no credentials for 127.0.0.1" in done.stderr
    assert not endpoint.calls


def test_a_self_test_prints_what_was_found_and_compares_a_disk(
    tmp_path: Path, endpoint: WsmanEndpoint, model: ModelHost, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MIB) + b"guest" * 1000 + bytes(8))
    model.disks["D:\\disk.vhdx"] = disk.read_bytes()
    host = f"hyperv+http://127.0.0.1:{endpoint.port}"
    command = ["hyperv", "selftest", "--host", host, "--auth", "ntlm", "--output", "json"]
    vhdx = tmp_path / "disk.vhdx"
    assert run(["convert", "-f", "raw", str(disk), str(vhdx), "-q", "--output", "json"]) == 0
    size = int(json.loads(capsys.readouterr().out)["target"]["virtual-size"])
    model.disks["D:\\disk.vhdx"] = disk.read_bytes().ljust(size, b"\0")
    compare = ["--disk", str(vhdx), "--disk-there", "D:\\disk.vhdx"]
    assert run([*command, *compare]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True and report["disk"]["same"] is True
    model.disks["D:\\disk.vhdx"] = bytes(size)
    assert run([*command, *compare]) == 15
    capsys.readouterr()
    model.checks = [{"name": "rights", "status": "failed", "detail": "not in Hyper-V Administrators"}]
    assert run(command) == 16
    assert json.loads(capsys.readouterr().out)["passed"] is False
    # Any Windows can compare a disk; only a host passes without one.
    model.has_hyperv, model.disks["D:\\disk.vhdx"] = False, disk.read_bytes().ljust(size, b"\0")
    assert run([*command, *compare]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["disk"]["same"]) == ("none", True)
    assert run(command) == 16


def test_a_plan_prints_scripts_and_data_and_reaches_nobody(
    bundle: Path, endpoint: WsmanEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("plan", bundle, endpoint, "--store", STORE)) == 0
    plan = json.loads(capsys.readouterr().out)
    steps = {step["name"]: step for step in plan["steps"]}
    assert list(steps) == [
        *("find", "preflight", "make-folder", "file-info", "publish-file"),
        *("create", "configure", "attach", "finish", "start", "observe"),
    ]
    assert steps["create"]["data"]["uuid"] == UUID
    assert all(step["script"] and step["script-name"] for step in steps.values())
    assert not endpoint.calls
    for family in ("2008r2", "2012"):
        assert run(arguments("plan", bundle, endpoint, "--store", STORE, "--family", family)) == 0
        noted = json.loads(capsys.readouterr().out)["notes"]
        assert bool(noted) is (family == "2008r2")


def push_through(endpoint: WsmanEndpoint, tmp_path: Path, size: int) -> tuple[Item, RealHost]:
    source = tmp_path / "big.vhd"
    data = os.urandom(MIB) * (size // MIB) + os.urandom(size % MIB)
    source.write_bytes(data)
    transport = WinrmTransport(
        Endpoint("127.0.0.1", endpoint.port, False, "ntlm"), Credentials("LAB\\tester", "pass word")
    )
    return Item(source, f"{STORE}\\big.vhd", **measured(data)), RealHost(transport, family="2016")


@pytest.mark.parametrize("size", [0, 1, MIB, 2 * MIB + 17])
def test_a_file_arrives_whole_through_winrm(
    endpoint: WsmanEndpoint, model: ModelHost, tmp_path: Path, size: int
) -> None:
    item, host = push_through(endpoint, tmp_path, size)
    with Journal(tmp_path / "journal", host="h", uuid="u", run="r") as journal:
        assert push_file(host, journal, item, run="r", share=None, store=STORE)
        assert not push_file(host, journal, item, run="r", share=None, store=STORE)
        assert journal.names("file", item.target) and len(journal.present()) == 1
    assert {path: file.data for path, file in model.files.items()} == {item.target.lower(): item.source.read_bytes()}


@pytest.mark.slow
def test_64_mib_arrive_whole_through_winrm(endpoint: WsmanEndpoint, model: ModelHost, tmp_path: Path) -> None:
    """The largest that goes this way, sealed by NTLM; the host hashes it before it gets its name."""
    item, host = push_through(endpoint, tmp_path, 64 * MIB)
    with Journal(tmp_path / "journal", host="h", uuid="u", run="r") as journal:
        assert push_file(host, journal, item, run="r", share=None, store=STORE)
    assert model.files[item.target.lower()].data == item.source.read_bytes()
    assert [name for name, _ in model.calls].count("write-chunk") == 64
