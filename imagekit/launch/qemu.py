"""The rehearsal behind the protocol of launchers: QEMU as the place where a machine is started.

A rehearsal is one run that ends by itself, so ``start`` begins it in a thread and ``wait`` waits for its verdict.
The machine's disks are throw-away overlays: there is nothing to make before and nothing left to delete, except the
records (console log and screenshot).
"""

from __future__ import annotations

import os
import shlex
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

from imagekit.errors import UsageError
from imagekit.launch.launcher import LaunchPlan, PlannedStep
from imagekit.launch.ovmf import find_firmware
from imagekit.launch.qemu_command import BLOCK_DRIVERS, check_supported, qemu_args, stand_ins, with_adapters
from imagekit.launch.qemu_process import find_program
from imagekit.launch.rehearsal import CONSOLE_NAME, SCREEN_NAME, TICK_SECONDS, kvm_usable, rehearse
from imagekit.launch.result import BootResult
from imagekit.machine import FILE_NAME, Machine

OVERLAY = "OVERLAY-{}.qcow2"
VARIABLES = "VARIABLES.fd"
CONTROL = "socket,fd=CONTROL"
"""Places of a run's own temporary files in a plan."""


class QemuLauncher:
    """Rehearses the bundle at ``bundle``; ``options`` are those of :func:`imagekit.launch.rehearsal.rehearse`."""

    def __init__(
        self, bundle: str | os.PathLike[str], *, cancel: threading.Event | None = None, **options: Any
    ) -> None:
        folder = Path(bundle)
        self._folder = folder.parent if folder.name == FILE_NAME else folder
        self._options = options
        self._caller = cancel
        self._cancel = threading.Event()
        self._run: Future[BootResult] | None = None

    def plan(self) -> LaunchPlan:
        """The commands of the first attempt, with the names of temporary files in capitals."""
        machine = self._machine()
        steps, files = [], []
        for index, medium in enumerate(machine.media):
            file = self._folder / medium.path
            if medium.kind == "disk":
                overlay = OVERLAY.format(index)
                options = ("-q", "-f", "qcow2", "-b", str(file), "-F", BLOCK_DRIVERS[medium.format])
                steps.append(
                    PlannedStep(
                        "overlay",
                        f"a throw-away layer over {medium.path}, which stays as it is",
                        command=(find_program("qemu-img"), "create", *options, overlay),
                    )
                )
                file = Path(overlay)
            files.append(file)
        steps.append(
            PlannedStep("boot", "start the machine and watch it", command=tuple(self._command(machine, files)))
        )
        return LaunchPlan("qemu", "this computer", tuple(steps), tuple(stand_ins(machine)))

    def create(self) -> None:
        """Check that the bundle is whole and that QEMU can stand in for it."""
        machine = self._machine()
        machine.check_media(self._folder)
        find_program("qemu-system-x86_64")

    def start(self) -> None:
        self._begin(self._options.get("timeout", 300.0))

    def wait(self, timeout: float) -> BootResult:
        """The verdict; ``timeout`` counts from here when the machine was not started before."""
        run = self._run or self._begin(timeout)
        try:
            # In steps, so that Ctrl-C is noticed on every platform.
            while not wait_for([run], timeout=TICK_SECONDS).done:
                if self._caller is not None and self._caller.is_set():
                    self._cancel.set()
        except BaseException:
            self.stop()
            raise
        return run.result()

    def stop(self) -> None:
        """End the rehearsal; its verdict is lost."""
        self._cancel.set()
        if self._run is not None:
            wait_for([self._run])
            self._run = None

    def delete(self) -> None:
        """Remove the records of the last rehearsal."""
        if self._run is not None and not self._run.done():
            raise UsageError("the rehearsal is still running", hint="stop it first")
        out = Path(self._options.get("out") or self._folder)
        for name in (CONSOLE_NAME, SCREEN_NAME):
            (out / name).unlink(missing_ok=True)

    def _machine(self) -> Machine:
        machine = with_adapters(Machine.load(self._folder), self._options.get("nic", "auto"))
        check_supported(machine)
        return machine

    def _begin(self, timeout: float) -> Future[BootResult]:
        if self._run is None:
            self._cancel.clear()
            options = self._options | {"timeout": timeout, "cancel": self._cancel}
            pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="imagekit-launch")
            self._run = pool.submit(rehearse, self._folder, **options)
            pool.shutdown(wait=False)
        return self._run

    def _command(self, machine: Machine, files: list[Path]) -> list[str]:
        program = find_program("qemu-system-x86_64")
        firmware = None
        if machine.firmware == "uefi":
            firmware = find_firmware(program, secure_boot=machine.secure_boot != "off")
            firmware = firmware.with_variables(Path(VARIABLES))
        wanted = self._options.get("accelerator", "auto")
        return qemu_args(
            machine,
            program=program,
            files=files,
            control=CONTROL,
            accelerator="kvm" if wanted == "kvm" or (wanted == "auto" and kvm_usable()) else "tcg",
            firmware=firmware,
            allow_network=self._options.get("allow_network", False),
        )


def show_command(command: tuple[str, ...]) -> str:
    """A command as one would type it in a shell."""
    return shlex.join(command)
