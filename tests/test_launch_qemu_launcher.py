"""The rehearsal behind the protocol that the Hyper-V stage has too."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fixtures.tiny_guest import SILENT_LISTING, boot_sector_disk, make_bundle, tiny_disk
from imagekit.errors import Cancelled, SourceError
from imagekit.launch.launcher import Launcher
from imagekit.launch.qemu import QemuLauncher
from imagekit.launch.rehearsal import CONSOLE_NAME, SCREEN_NAME
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    need_tool("qemu-system-x86_64")
    make_bundle(tmp_path / "tiny", tiny_disk(tmp_path / "tiny.raw"), qemu_img=need_tool("qemu-img"))
    return tmp_path / "tiny"


def test_a_machine_lives_from_plan_to_delete(bundle: Path) -> None:
    before = {path.name for path in bundle.iterdir()}
    launcher: Launcher = QemuLauncher(bundle, accelerator="tcg")
    plan = launcher.plan()
    launcher.create()
    launcher.start()
    launcher.start()
    result = launcher.wait(60)
    assert result.verdict == "booted"
    assert plan.backend == result.backend == "qemu"
    launcher.stop()
    assert {path.name for path in bundle.iterdir()} == before | {CONSOLE_NAME, SCREEN_NAME}
    launcher.delete()
    assert {path.name for path in bundle.iterdir()} == before


def test_the_plan_names_what_would_run_and_runs_nothing(bundle: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    plan = QemuLauncher(bundle, accelerator="tcg").plan()
    assert [step.name for step in plan.steps] == ["overlay", "boot"]
    overlay, boot = (step.command for step in plan.steps)
    assert overlay[0].endswith("qemu-img") and overlay[-1] == "OVERLAY-0.qcow2"
    assert any("OVERLAY-0.qcow2" in part for part in boot)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert plan.to_json()["schema"] == 1


def test_stopping_ends_the_run(tmp_path: Path) -> None:
    need_tool("qemu-system-x86_64")
    disk = boot_sector_disk(tmp_path / "s.raw", SILENT_LISTING)
    make_bundle(tmp_path / "silent", disk, qemu_img=need_tool("qemu-img"))
    cancel = threading.Event()
    launcher = QemuLauncher(tmp_path / "silent", accelerator="tcg", cancel=cancel)
    launcher.start()
    launcher.stop()
    launcher.start()
    threading.Timer(0.5, cancel.set).start()
    with pytest.raises(Cancelled):
        launcher.wait(60)


def test_a_bundle_that_lacks_a_file_is_not_created(bundle: Path) -> None:
    next(bundle.glob("*.vhd")).unlink()
    with pytest.raises(SourceError):
        QemuLauncher(bundle).create()
