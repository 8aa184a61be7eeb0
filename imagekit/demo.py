"""The tour: from a cloud image to a booted guest on input that it makes itself, in less than a minute.

The guest is the tiny one of imagekit.launch.tiny_guest: a boot sector that reads the disk all over, finds the config
drive and says so. Everything else is what a user would do, through the same functions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from imagekit import api
from imagekit.bundle import Bundle
from imagekit.errors import BootFailed, ImagekitError, TargetError, ToolError
from imagekit.launch.evidence import DEFAULT_MARKER
from imagekit.launch.result import BootResult
from imagekit.launch.tiny_guest import write_tiny_guest
from imagekit.qemu_img import find_qemu_img
from imagekit.records import dataclass
from imagekit.report import SCHEMA

IMAGE = "tiny-guest.qcow2"
TIMEOUT = 40.0
GREETING = "imagekit tiny guest"
"""How the guest's first line begins."""
USER_DATA = "#cloud-config\nruncmd: [echo hello from the config drive]\n"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the tour made."""

    folder: Path
    bundle: Bundle
    boot: BootResult

    def to_json(self) -> dict[str, object]:
        return {
            "schema": SCHEMA,
            "folder": os.fspath(self.folder),
            "bundle": self.bundle.to_json(),
            "boot": self.boot.to_json(),
        }


def run_demo(out: Path, *, say: Callable[[str], None]) -> DemoResult:
    """Make image, bundle and boot in the new folder ``out``; ``say`` gets a line a step.

    Raises TargetError when the folder exists, ToolError without QEMU, BootFailed when the guest does not boot.
    """
    try:
        out.mkdir()
    except FileExistsError:
        raise TargetError("exists already", path=out, hint="remove it, or choose another with --out") from None
    except OSError as error:
        raise TargetError(f"cannot be created: {error.strerror}", path=out) from error
    try:
        return _tour(out, _Narrator(say))
    except ImagekitError as error:
        if not isinstance(error, BootFailed):  # then there is something to look at
            shutil.rmtree(out, ignore_errors=True)
        raise


class _Narrator:
    """Says each step with the time it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self._since = time.monotonic()

    def step(self, number: int, text: str) -> None:
        now = time.monotonic()
        self.say(f"{number}. {text}  [{now - self._since:.1f} s]")
        self._since = now


def _tour(out: Path, narrator: _Narrator) -> DemoResult:
    image = out / IMAGE
    _make_image(image)
    found = api.info(image)
    narrator.step(1, f"made {image}: a bootable {found.info.format} of {image.stat().st_size} bytes, compressed")
    bundle = api.prepare(image, out / "bundle", name="demo", user_data=USER_DATA)
    report = bundle.report
    narrator.step(
        2,
        f"converted it to {report.target}: {report.target_format} {report.subformat}, disk of "
        f"{report.virtual_size} bytes, every byte compared; for generation {bundle.choice.generation}: "
        f"{bundle.choice.generation_reason}",
    )
    narrator.step(3, f"built {bundle.path / bundle.machine.media[1].path}: the config drive of {bundle.machine.uuid}")
    result = api.boot(bundle, timeout=TIMEOUT, marker=DEFAULT_MARKER)
    for line in _guest_lines(result):
        narrator.say(f"   the guest: {line}")
    narrator.step(4, f"booted both in QEMU ({result.accelerator}): verdict {result.verdict}")
    if not result.accepted(accept_unknown=False):
        raise BootFailed(f"verdict {result.verdict}, at stage {result.stage}", path=bundle.path)
    return DemoResult(out, bundle, result)


def _guest_lines(result: BootResult) -> list[str]:
    """What the guest itself said, without the firmware before it."""
    if result.console is None:
        return []
    lines = [line.strip() for line in result.console.read_text("utf-8", "replace").splitlines()]
    first = next((at for at, line in enumerate(lines) if GREETING in line), len(lines))
    return [line for line in lines[first:] if line and line.isprintable()]


def _make_image(image: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="imagekit-demo-") as scratch:
        raw = Path(scratch) / "tiny-guest.raw"
        write_tiny_guest(raw)
        command = [find_qemu_img(), "convert", "-f", "raw", "-O", "qcow2", "-c", str(raw), str(image)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise ToolError(f"qemu-img convert failed: {done.stderr.strip()}", path=image)
