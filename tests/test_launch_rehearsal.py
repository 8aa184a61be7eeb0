"""The rehearsal with real QEMU processes, and with a fake one for what real ones do not do when asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures.tiny_guest import (
    COMPLAINT_LISTING,
    DISK_NAME,
    DVD_NAME,
    SILENT_LISTING,
    boot_sector_disk,
    make_bundle,
    make_uefi_bundle,
    tiny_disk,
    uefi_disk,
)
from imagekit.errors import (
    Cancelled,
    CorruptImage,
    SourceError,
    TargetError,
    ToolError,
    UnsupportedFeature,
    UsageError,
)
from imagekit.launch import ovmf, qemu_process, rehearsal, watch
from imagekit.launch.rehearsal import CONSOLE_NAME, SCREEN_NAME, rehearse
from imagekit.launch.result import BootResult, Evidence
from imagekit.machine import FILE_NAME, Machine
from tests import fake_qemu
from tests.oracles import need_tool

MIB = 1 << 20
pytestmark = pytest.mark.oracle


@pytest.fixture
def qemu_img() -> str:
    need_tool("qemu-system-x86_64")
    return need_tool("qemu-img")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the rehearsal keeps its temporary files; longer than a socket path may be."""
    folder = tmp_path / ("long, name " * 12)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def tiny(tmp_path: Path, scratch: Path, qemu_img: str) -> Path:
    """A bundle with the tiny guest."""
    make_bundle(tmp_path / "tiny, bündle", tiny_disk(tmp_path / "tiny.raw"), qemu_img=qemu_img)
    return tmp_path / "tiny, bündle"


@pytest.fixture
def silent(tmp_path: Path, scratch: Path, qemu_img: str) -> Path:
    """A bundle whose guest does nothing."""
    make_bundle(tmp_path / "silent", boot_sector_disk(tmp_path / "s.raw", SILENT_LISTING), qemu_img=qemu_img)
    return tmp_path / "silent"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def console(result: BootResult) -> str:
    assert result.console is not None
    return result.console.read_text(errors="replace")


def lines(result: BootResult) -> str:
    return "\n".join(item.line for item in result.evidence)


def processes_with(text: str) -> list[int]:
    """The processes whose command line holds ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
        except OSError:
            pass
    return [pid for pid in found if pid != os.getpid()]


def assert_shows_text(result: BootResult) -> None:
    """The screenshot is a PNG of the display on which something is drawn."""
    assert result.screenshot is not None
    picture = result.screenshot.read_bytes()
    assert picture.startswith(b"\x89PNG")
    start = picture.index(b"IDAT") + 4
    (length,) = struct.unpack_from(">I", picture, start - 8)
    assert len(set(zlib.decompress(picture[start : start + length]))) > 1


class TestWithQemu:
    def test_the_tiny_guest_boots_and_finds_its_data_and_its_config_drive(self, tiny: Path) -> None:
        result = rehearse(tiny, accelerator="tcg")
        assert (result.verdict, result.stage, result.accelerator) == ("booted", "marker", "tcg")
        assert [item.stage for item in result.evidence if item.source == "console"] == [
            "firmware",
            "bootloader",
            "marker",
        ]
        text = console(result)
        assert text.count(": right") == 3
        assert "config drive found: config-2" in text

    def test_the_bundle_stays_as_it_was(self, tiny: Path, scratch: Path) -> None:
        before = digests(tiny)
        rehearse(tiny, accelerator="tcg")
        after = digests(tiny)
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {CONSOLE_NAME, SCREEN_NAME}
        assert list(scratch.iterdir()) == []

    def test_the_screenshot_shows_what_the_guest_drew(self, tiny: Path, silent: Path) -> None:
        drawn, blank = rehearse(tiny, accelerator="tcg"), rehearse(silent, accelerator="tcg", timeout=1.0)
        assert drawn.screenshot is not None and blank.screenshot is not None
        assert drawn.screenshot.read_bytes().startswith(b"\x89PNG")
        assert drawn.screenshot.read_bytes() != blank.screenshot.read_bytes()

    def test_the_records_go_where_they_are_asked_to(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        result = rehearse(tiny / FILE_NAME, accelerator="tcg", out=tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONSOLE_NAME, SCREEN_NAME]
        assert sorted(path.name for path in tiny.iterdir()) == sorted([DVD_NAME, DISK_NAME, FILE_NAME])
        assert result.console == tmp_path / "out" / CONSOLE_NAME

    def test_the_result_is_a_document(self, tiny: Path) -> None:
        document = json.loads(json.dumps(rehearse(tiny, accelerator="tcg").to_json()))
        promised = {"schema", "backend", "verdict", "stage", "evidence", "console", "screenshot", "seconds"}
        assert promised | {"accelerator"} <= set(document)
        assert document["evidence"][-1]["line"] == "IMAGEKIT-BOOT-OK"

    def test_a_disk_with_one_wrong_byte_far_in_does_not_pass(
        self, tmp_path: Path, scratch: Path, qemu_img: str
    ) -> None:
        """The guest reads its disk: a conversion that loses data there is found."""
        raw = tiny_disk(tmp_path / "tiny.raw")
        with raw.open("r+b") as file:
            file.seek(37 * MIB + 100)
            file.write(b"\0\1\2")
        make_bundle(tmp_path / "bad", raw, qemu_img=qemu_img)
        result = rehearse(tmp_path / "bad", accelerator="tcg")
        assert result.verdict == "no-boot"
        assert "sector at 37 MiB: WRONG" in console(result)
        assert result.evidence[-1].failure

    def test_a_machine_without_config_drive_says_so_and_boots(
        self, tmp_path: Path, scratch: Path, qemu_img: str
    ) -> None:
        make_bundle(tmp_path / "b", tiny_disk(tmp_path / "tiny.raw"), qemu_img=qemu_img, label=None)
        result = rehearse(tmp_path / "b", accelerator="tcg")
        assert result.verdict == "booted"
        assert "no config drive" in console(result)

    def test_a_disk_without_boot_sector_does_not_boot_and_that_is_soon_known(
        self, tmp_path: Path, scratch: Path, qemu_img: str
    ) -> None:
        make_bundle(tmp_path / "empty", boot_sector_disk(tmp_path / "e.raw", None), qemu_img=qemu_img)
        result = rehearse(tmp_path / "empty", accelerator="tcg", timeout=60.0)
        assert (result.verdict, result.stage) == ("no-boot", "firmware")
        assert result.seconds < 30
        assert "No bootable device" in lines(result)
        assert_shows_text(result)

    def test_a_complaint_that_is_only_on_the_screen_is_read_there(
        self, tmp_path: Path, scratch: Path, qemu_img: str
    ) -> None:
        make_bundle(tmp_path / "b", boot_sector_disk(tmp_path / "c.raw", COMPLAINT_LISTING), qemu_img=qemu_img)
        result = rehearse(tmp_path / "b", accelerator="tcg", timeout=60.0)
        assert result.verdict == "no-boot"
        assert [item.line for item in result.evidence if item.source == "screen"] == ["Missing operating system"]
        assert_shows_text(result)

    def test_a_guest_that_says_nothing_is_unknown_and_its_screen_is_kept(self, silent: Path) -> None:
        result = rehearse(silent, accelerator="tcg", timeout=2.0)
        assert (result.verdict, result.stage) == ("unknown", "firmware")
        assert not result.accepted(accept_unknown=False)
        assert result.accepted(accept_unknown=True)
        assert result.screenshot is not None and result.screenshot.exists()

    def test_a_guest_that_never_prints_the_callers_marker_did_not_boot(self, tiny: Path) -> None:
        result = rehearse(tiny, accelerator="tcg", marker="something else")
        assert result.verdict == "no-boot"
        assert_shows_text(result)
        assert not result.accepted(accept_unknown=True)

    def test_evidence_is_told_as_it_comes(self, tiny: Path) -> None:
        told: list[Evidence] = []
        result = rehearse(tiny, accelerator="tcg", on_event=told.append)
        assert tuple(told) == result.evidence

    def test_an_error_of_the_callers_own_ends_the_run(self, silent: Path, scratch: Path) -> None:
        def fail(item: Evidence) -> None:
            if item.source == "console":
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            rehearse(silent, accelerator="tcg", on_event=fail)
        assert list(scratch.iterdir()) == []

    def test_the_control_channel_of_windows_works_too(self, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(qemu_process, "_SocketPair", qemu_process._Loopback)
        assert rehearse(tiny, accelerator="tcg").verdict == "booted"

    def test_cancelling_is_quick_and_leaves_nothing(self, silent: Path, scratch: Path) -> None:
        """Within 250 ms; the best of three, for the machine may be busy."""
        before = sorted(path.name for path in silent.iterdir())
        times = [cancelled_after(silent) for _ in range(3)]
        assert min(times) < 0.25
        assert sorted(path.name for path in silent.iterdir()) == before
        assert list(scratch.iterdir()) == []
        if sys.platform == "linux":
            assert processes_with(str(scratch)) == []

    @pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
    def test_ctrl_c_leaves_nothing(self, silent: Path, scratch: Path) -> None:
        with rehearsing(silent, scratch) as child:
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=10)
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert list(scratch.iterdir()) == []
        assert processes_with(str(scratch)) == []

    @pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux kills QEMU with us")
    def test_qemu_does_not_outlive_a_killed_program(self, silent: Path, scratch: Path) -> None:
        with rehearsing(silent, scratch) as child:
            assert processes_with(str(scratch))
            child.kill()
            child.communicate(timeout=10)
        deadline = time.monotonic() + 5
        while (alive := processes_with(str(scratch))) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive == []

    def test_a_disk_that_qemu_cannot_read_is_named(self, tiny: Path) -> None:
        disk = tiny / DISK_NAME
        disk.write_bytes(bytes(disk.stat().st_size))
        with pytest.raises(ToolError, match="qemu-img cannot use the disk") as caught:
            rehearse(tiny, accelerator="tcg")
        assert caught.value.path == str(disk)


def cancelled_after(bundle: Path) -> float:
    """Seconds from asking a running rehearsal to stop until it has stopped."""
    cancel = threading.Event()
    asked: list[float] = []

    def ask(item: Evidence) -> None:
        if item.stage == "firmware":
            asked.append(time.monotonic())
            cancel.set()

    with pytest.raises(Cancelled):
        rehearse(bundle, accelerator="tcg", cancel=cancel, on_event=ask)
    return time.monotonic() - asked[0]


@contextlib.contextmanager
def rehearsing(bundle: Path, scratch: Path) -> Iterator[subprocess.Popen[str]]:
    """A program of its own that rehearses ``bundle``, once its machine has begun to print."""
    program = (
        "import sys; from imagekit.launch.rehearsal import rehearse; "
        "rehearse(sys.argv[1], accelerator='tcg', on_event=lambda item: print(item.source, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as child:
        assert child.stdout is not None
        while "console" not in child.stdout.readline():
            assert child.poll() is None
        yield child


Pretend = Callable[[str], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pretend:
    """Put something in place of QEMU: a shell script that gets its arguments, with the real one as ``$QEMU``."""
    real = need_tool("qemu-system-x86_64")

    def install(script: str) -> None:
        program = tmp_path / "qemu-instead"
        program.write_text(f"#!/bin/sh\nQEMU={real}\n{script}\n")
        program.chmod(0o755)
        find = qemu_process.find_program
        monkeypatch.setattr(
            rehearsal, "find_program", lambda name: find(name) if name == "qemu-img" else str(program)
        )
        monkeypatch.setattr(rehearsal, "kvm_usable", lambda: True)

    return install


def scene(name: str) -> str:
    return f'exec "{sys.executable}" "{fake_qemu.__file__}" {name} "$@"'


ONLY_UNDER_KVM = 'case "$*" in *"-accel kvm"*) {} ;; esac; exec $QEMU "$@"'


@pytest.mark.skipif(sys.platform != "linux", reason="stands in for KVM")
class TestWithoutWorkingKvm:
    @pytest.mark.parametrize(
        ("failure", "said"),
        [
            ('echo "qemu: failed to set MSR 0x10a" >&2; exit 1', "failed to set MSR 0x10a"),
            (scene("dies_later"), "assertion failed"),
            (scene("internal_error"), "internal error"),
        ],
        ids=["QEMU refuses", "QEMU crashes", "internal error"],
    )
    def test_a_kvm_that_fails_is_left_and_the_run_restarted(
        self, tiny: Path, pretend: Pretend, failure: str, said: str
    ) -> None:
        pretend(ONLY_UNDER_KVM.format(failure))
        result = rehearse(tiny)
        assert (result.verdict, result.accelerator) == ("booted", "tcg")
        assert said in lines(result)
        assert "starting again without KVM" in lines(result)
        assert lines(result).count("SeaBIOS") == 1

    def test_a_kvm_that_hangs_is_left_too(
        self, silent: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first of two runs is given to KVM in name only: what counts is that it stays silent."""
        pretend(
            'for a; do shift; case "$a" in kvm) a=tcg;; host) a=max;; esac; set -- "$@" "$a"; done; exec $QEMU "$@"'
        )
        monkeypatch.setattr(watch, "SILENCE_SECONDS", 1.0)
        result = rehearse(silent, timeout=3.0)
        assert (result.verdict, result.accelerator) == ("unknown", "tcg")
        assert "nothing was printed or drawn for 1 s under KVM" in lines(result)

    def test_kvm_alone_is_not_replaced(self, tiny: Path, pretend: Pretend) -> None:
        pretend(scene("internal_error"))
        with pytest.raises(ToolError, match="internal error") as caught:
            rehearse(tiny, accelerator="kvm")
        assert caught.value.hint is not None and "tcg" in caught.value.hint

    def test_without_access_to_kvm_asking_for_it_is_an_error(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rehearsal, "KVM_DEVICE", tiny / "kvm")
        with pytest.raises(ToolError, match="cannot be opened"):
            rehearse(tiny, accelerator="kvm")
        assert rehearse(tiny).accelerator == "tcg"


@pytest.mark.skipif(sys.platform == "win32", reason="the fake is a shell script")
class TestWithFakeQemu:
    def test_a_qemu_that_does_not_start_is_quoted(self, tiny: Path, scratch: Path, pretend: Pretend) -> None:
        pretend(scene("dies_at_once"))
        with pytest.raises(ToolError, match="Invalid") as caught:
            rehearse(tiny, accelerator="tcg")
        assert "\\x1b[31mparameter" in str(caught.value)
        assert list(scratch.iterdir()) == []

    def test_a_qemu_that_crashes_is_quoted(self, tiny: Path, pretend: Pretend) -> None:
        pretend(scene("dies_later"))
        with pytest.raises(ToolError, match="ended with status 1: qemu: assertion failed"):
            rehearse(tiny, accelerator="tcg")

    def test_a_qemu_built_without_sandbox_is_used_without(self, tiny: Path, pretend: Pretend) -> None:
        pretend(scene("no_sandbox"))
        result = rehearse(tiny, accelerator="tcg")
        assert result.verdict == "booted"
        assert result.screenshot is None

    def test_a_screenshot_of_an_earlier_run_does_not_stay(self, tiny: Path, pretend: Pretend) -> None:
        (tiny / SCREEN_NAME).write_bytes(b"earlier")
        pretend(scene("no_sandbox"))
        rehearse(tiny, accelerator="tcg")
        assert not (tiny / SCREEN_NAME).exists()

    def test_a_full_disk_for_the_overlay_is_no_fault_of_the_guest(self, tiny: Path, pretend: Pretend) -> None:
        pretend(scene("full_disk"))
        with pytest.raises(TargetError, match="no longer fit") as caught:
            rehearse(tiny, accelerator="tcg")
        assert caught.value.hint is not None and "TMPDIR" in caught.value.hint

    def test_the_recorded_console_has_a_limit_and_reading_goes_on(
        self, tiny: Path, pretend: Pretend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rehearsal, "MAX_CONSOLE", 100_000)
        pretend(scene("endless_noise"))
        result = rehearse(tiny, accelerator="tcg")
        assert result.verdict == "booted"
        assert result.console is not None and result.console.stat().st_size == 100_000


class TestBadInput:
    def test_without_qemu_the_error_says_what_to_install(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "nothing").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        with pytest.raises(ToolError, match="qemu-system-x86_64 was not found") as caught:
            rehearse(tiny)
        assert caught.value.hint is not None and "apt install qemu-system-x86 qemu-utils" in caught.value.hint

    def test_a_full_or_missing_folder_for_temporary_files_is_a_target_error(
        self, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tiny / "missing"))
        with pytest.raises(TargetError, match="temporary files cannot be written") as caught:
            rehearse(tiny)
        assert caught.value.hint is not None and "TMPDIR" in caught.value.hint

    def test_a_folder_that_is_no_bundle_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="cannot read the machine"):
            rehearse(tmp_path)

    def test_a_bundle_with_another_disk_is_refused(self, tiny: Path) -> None:
        with (tiny / DISK_NAME).open("ab") as file:
            file.write(b"\0")
        with pytest.raises(CorruptImage, match=r"machine\.json says"):
            rehearse(tiny)

    def test_without_firmware_generation_2_is_not_started_and_the_error_says_what_to_install(
        self, tmp_path: Path, qemu_img: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_uefi_bundle(tmp_path / "b", uefi_disk(tmp_path / "u.raw"), qemu_img=qemu_img)
        monkeypatch.setattr(ovmf, "_description_folders", lambda program: iter(()))
        monkeypatch.setattr(ovmf, "_share_folders", lambda program: iter(()))
        with pytest.raises(ToolError, match="no UEFI firmware") as caught:
            rehearse(tmp_path / "b")
        assert caught.value.hint is not None and "apt install ovmf" in caught.value.hint

    def test_a_machine_that_qemu_cannot_stand_in_for_is_refused_before_anything_runs(self, tmp_path: Path) -> None:
        disk = {"path": "d.vhdx", "format": "vhdx", "kind": "disk", "controller": "scsi", "size": 1}
        media = [disk, {**disk, "path": "e.vhdx", "number": 1}]
        fields = {"uuid": "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11", "name": "d", "media": media}
        machine = Machine.parse({**fields, "generation": 2, "firmware": "uefi", "secure_boot": "windows"})
        (tmp_path / FILE_NAME).write_bytes(machine.dumps())
        with pytest.raises(UnsupportedFeature, match="SCSI 1:0"):
            rehearse(tmp_path)

    def test_a_missing_folder_for_the_records_is_refused(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="not a folder"):
            rehearse(tiny, out=tmp_path / "missing")

    @pytest.mark.parametrize("marker", ["", "a\nb", "x" * 201])
    def test_a_marker_that_no_line_can_hold_is_refused(self, tmp_path: Path, marker: str) -> None:
        with pytest.raises(UsageError, match="marker"):
            rehearse(tmp_path, marker=marker)

    @pytest.mark.parametrize("timeout", [0.0, -1.0])
    def test_a_timeout_that_has_passed_is_refused(self, tmp_path: Path, timeout: float) -> None:
        with pytest.raises(UsageError, match="timeout"):
            rehearse(tmp_path, timeout=timeout)
