"""Rehearse the boot of a bundle in QEMU, without changing the bundle.

Every disk is started through a throw-away overlay, so cloud-init's first boot is not used up. KVM is tried
where the system offers it and left for QEMU's own processor emulation (TCG) when it does not truly run the
guest. What the machine printed and the last picture on its display are kept beside the bundle, or in
``out``.

A generation 2 machine starts OVMF with a copy of its variables of its own, so that no key or boot entry
outlives the run.

That a guest boots here is necessary, not sufficient: on Hyper-V it meets other storage and network devices.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

from imagekit.errors import Cancelled, TargetError, ToolError, UsageError
from imagekit.launch.evidence import DEFAULT_MARKER, Reader
from imagekit.launch.ovmf import UefiFirmware, find_firmware
from imagekit.launch.qemu_command import (
    BLOCK_DRIVERS,
    Accelerator,
    NicChoice,
    check_supported,
    qemu_args,
    stand_ins,
    with_adapters,
)
from imagekit.launch.qemu_process import (
    Qemu,
    QemuDied,
    Screen,
    create_overlay,
    find_program,
    running,
)
from imagekit.launch.result import BootResult, Evidence, Stage, Verdict
from imagekit.launch.screen import ppm_to_png
from imagekit.launch.watch import Ending, Watch
from imagekit.machine import FILE_NAME, Machine
from imagekit.records import dataclass

CONSOLE_NAME = "rehearsal-console.log"
SCREEN_NAME = "rehearsal-screen.png"
MAX_CONSOLE = 16 << 20
MAX_MARKER = 200
TICK_SECONDS = 0.1
CLEANUP_SECONDS = 5.0
SCREEN_SECONDS = 2.0

KVM_DEVICE = Path("/dev/kvm")


def rehearse(
    bundle: str | os.PathLike[str],
    *,
    timeout: float = 300.0,
    marker: str | None = None,
    allow_network: bool = False,
    accelerator: Literal["auto", "kvm", "tcg"] = "auto",
    nic: NicChoice = "auto",
    out: str | os.PathLike[str] | None = None,
    on_event: Callable[[Evidence], None] | None = None,
    cancel: threading.Event | None = None,
) -> BootResult:
    """Boot the machine of ``bundle``, a folder with machine.json and its media, and say how far it came.

    ``timeout`` is in seconds, and counts anew when the run is restarted without KVM. ``marker`` is a text
    that the guest prints when all is well; given one, nothing less counts as booted. ``allow_network`` lets
    the guest reach the network of this computer. ``nic`` is the adapter to rehearse with.
    ``out`` is an existing folder for the console log and the
    screenshot (default: the bundle). ``on_event`` is called from another thread with each piece of evidence
    as it is found.

    Raises InvalidSpec, SourceError or CorruptImage for the bundle, UnsupportedFeature for a machine that
    QEMU cannot stand in for, ToolError when QEMU or UEFI firmware is missing or fails, TargetError for
    ``out`` or when the disk for temporary files is full, Cancelled within 250 ms after ``cancel`` is set. A
    guest that does not boot is a result, no error.
    """
    if timeout <= 0:
        raise UsageError(f"a timeout of {timeout} seconds; it must be positive")
    if marker is not None and not (marker.isprintable() and 0 < len(marker) <= MAX_MARKER):
        raise UsageError(f"the marker must be printable text of 1 to {MAX_MARKER} characters")
    folder = Path(bundle).resolve()
    if folder.name == FILE_NAME:
        folder = folder.parent
    machine = with_adapters(Machine.load(folder), nic)
    check_supported(machine)
    machine.check_media(folder)
    keep = Path(out).resolve() if out is not None else folder
    if not keep.is_dir() or not os.access(keep, os.W_OK):
        raise TargetError(
            "not a folder that can be written to", hint="name another one for the records (out)", path=keep
        )
    with _writing("temporary files"):
        temporary = tempfile.TemporaryDirectory(prefix="imagekit-boot-", ignore_cleanup_errors=True)
    with temporary as scratch:
        rehearsal = _Rehearsal(
            machine=machine,
            folder=folder,
            scratch=Path(scratch),
            timeout=timeout,
            marker=marker,
            allow_network=allow_network,
            on_event=on_event,
        )
        run = _run_in_thread(rehearsal, _accelerators(accelerator), cancel)
        return BootResult(
            backend="qemu",
            verdict=run.verdict,
            stage=run.stage,
            evidence=tuple(rehearsal.evidence),
            console=_keep(run.console, keep / CONSOLE_NAME),
            screenshot=_keep(run.screenshot, keep / SCREEN_NAME),
            seconds=rehearsal.now(),
            accelerator=run.accelerator,
        )


def kvm_usable() -> bool:
    """Whether this process may open KVM; only a run can tell whether it works."""
    return sys.platform == "linux" and os.access(KVM_DEVICE, os.R_OK | os.W_OK)


def _accelerators(wanted: Literal["auto", "kvm", "tcg"]) -> list[Accelerator]:
    if wanted == "kvm" and not kvm_usable():
        raise ToolError(
            f"{KVM_DEVICE} cannot be opened",
            hint="use accelerator tcg, or join the group kvm",
            path=KVM_DEVICE,
        )
    if wanted == "auto":
        return ["kvm", "tcg"] if kvm_usable() else ["tcg"]
    return [wanted]


def _keep(file: Path | None, target: Path) -> Path | None:
    """Put ``file`` in place of ``target``, or remove what an earlier rehearsal left there."""
    if file is None:
        target.unlink(missing_ok=True)
        return None
    part = target.with_name(target.name + ".part")
    try:
        with _writing("the record", target):
            part.write_bytes(file.read_bytes())
            part.replace(target)
    except TargetError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return target


@contextlib.contextmanager
def _writing(what: str, path: Path | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TargetError(
            f"{what} cannot be written: {error.strerror or error}",
            hint="free some space; temporary files go to the folder TMPDIR",
            path=path,
        ) from error


def _run_in_thread(
    rehearsal: _Rehearsal, accelerators: Sequence[Accelerator], cancel: threading.Event | None
) -> _Run:
    """Run in a thread with an asyncio loop of its own: the caller may have one already, or none."""
    leave = threading.Event()

    def wants_to_leave() -> bool:
        return leave.is_set() or (cancel is not None and cancel.is_set())

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="imagekit-rehearsal") as pool:
        future = pool.submit(lambda: asyncio.run(_until(wants_to_leave, rehearsal, accelerators)))
        try:
            # In steps, so that Ctrl-C is noticed on every platform.
            while not wait([future], timeout=TICK_SECONDS).done:
                pass
        except BaseException:
            leave.set()
            raise
    return future.result()


async def _until(
    wants_to_leave: Callable[[], bool], rehearsal: _Rehearsal, accelerators: Sequence[Accelerator]
) -> _Run:
    task = asyncio.ensure_future(rehearsal.run(accelerators))
    while not task.done():
        if wants_to_leave():
            # Again if need be: before Python 3.12 wait_for() may swallow it.
            task.cancel()
            while not (await asyncio.wait({task}, timeout=CLEANUP_SECONDS))[0]:
                task.cancel()
            raise Cancelled("the rehearsal was cancelled")
        await asyncio.wait({task}, timeout=TICK_SECONDS)
    return task.result()


@dataclass(frozen=True, slots=True)
class _Run:
    """What one run of QEMU came to."""

    accelerator: Accelerator
    verdict: Verdict
    stage: Stage
    ending: Ending
    trouble: str
    console: Path
    screenshot: Path | None


class _Rehearsal:
    """The attempts to run one machine, and the evidence of the last of them."""

    def __init__(
        self,
        *,
        machine: Machine,
        folder: Path,
        scratch: Path,
        timeout: float,
        marker: str | None,
        allow_network: bool,
        on_event: Callable[[Evidence], None] | None,
    ) -> None:
        self._machine = machine
        self._folder = folder
        self._scratch = scratch
        self._timeout = timeout
        self._marker = marker
        self._allow_network = allow_network
        self._on_event = on_event
        self._sandbox = sys.platform == "linux"
        self._began = time.monotonic()
        self._program = find_program("qemu-system-x86_64")
        self._image_program = find_program("qemu-img")
        self._firmware: UefiFirmware | None = None
        if machine.firmware == "uefi":
            self._firmware = find_firmware(self._program, secure_boot=machine.secure_boot != "off")
        self.evidence: list[Evidence] = []

    def now(self) -> float:
        """Seconds since the rehearsal began."""
        return time.monotonic() - self._began

    async def run(self, accelerators: Sequence[Accelerator]) -> _Run:
        """Try the accelerators in order until one truly runs the guest."""
        remaining = list(accelerators)
        while True:
            accelerator = remaining[0]
            try:
                run = await self._attempt(accelerator, last=len(remaining) == 1)
                if run.ending != "accelerator":
                    return run
                trouble = run.trouble
            except QemuDied as error:
                trouble = str(error)
                if self._sandbox and "-sandbox support" in trouble:
                    # Built without seccomp. The guest is still only QEMU's, so going on is better than not.
                    self._sandbox = False
                    continue
            del remaining[0]
            if not remaining:
                hint = "KVM does not work here: use accelerator auto or tcg" if accelerator == "kvm" else None
                raise ToolError(trouble, hint=hint, path=self._program)
            self._restart(f"{trouble}; starting again without KVM")

    def _restart(self, why: str) -> None:
        # What a broken processor showed is no evidence; what we said stays.
        self.evidence = [item for item in self.evidence if item.source == "imagekit"]
        self._note([Evidence(round(self.now(), 1), "started", "imagekit", why)])

    def _note(self, found: list[Evidence]) -> None:
        self.evidence += found
        if self._on_event is not None:
            for item in found:
                self._on_event(item)

    async def _attempt(self, accelerator: Accelerator, *, last: bool) -> _Run:
        files = await self._files(accelerator)
        firmware = self._own_firmware(accelerator)
        watch = Watch(
            reader=Reader(marker=self._marker or DEFAULT_MARKER),
            started=self.now(),
            timeout=self._timeout,
            waits_for_marker=self._marker is not None,
            # Whatever is not what the machine boots from: a config drive may be a disk as well as a DVD.
            has_config_drive=any(medium.number or medium.slot for medium in self._machine.media),
            may_blame_kvm=accelerator == "kvm" and not last,
        )

        def command(control: str) -> list[str]:
            return qemu_args(
                self._machine,
                program=self._program,
                files=files,
                control=control,
                accelerator=accelerator,
                firmware=firmware,
                allow_network=self._allow_network,
                sandbox=self._sandbox,
            )

        log = self._scratch / f"console-{accelerator}.log"
        with log.open("wb", buffering=0) as console:

            def on_console(data: bytes) -> None:
                with _writing("the console's record"):
                    console.write(data[: max(0, MAX_CONSOLE - console.tell())])
                self._note(watch.console(data, self.now()))

            async with running(command, folder=self._scratch, on_console=on_console) as qemu:
                replaced = stand_ins(self._machine, accelerator)
                start = [f"QEMU {qemu.version}, {accelerator}", *self._firmware_said(), *replaced]
                self._note([Evidence(round(self.now(), 1), "started", "imagekit", line) for line in start])
                ending, screen = await self._follow(qemu, watch)
        self._note(watch.finish(self.now()))
        picture = None
        if screen is not None:
            picture = self._scratch / "screen.png"
            with _writing("the screenshot"):
                picture.write_bytes(ppm_to_png(screen.ppm))
        verdict = watch.verdict(ending)
        return _Run(accelerator, verdict, watch.reader.stage, ending, watch.trouble, log, picture)

    async def _files(self, attempt: str) -> list[Path]:
        files = []
        for index, medium in enumerate(self._machine.media):
            file = self._folder / medium.path
            if medium.kind == "disk":
                overlay = self._scratch / f"overlay-{attempt}-{index}.qcow2"
                driver = BLOCK_DRIVERS[medium.format]
                await create_overlay(self._image_program, disk=file, driver=driver, overlay=overlay)
                file = overlay
            files.append(file)
        return files

    def _own_firmware(self, attempt: str) -> UefiFirmware | None:
        """The firmware with variables that this attempt may write to."""
        if self._firmware is None:
            return None
        own = self._scratch / f"variables-{attempt}.fd"
        with _writing("the firmware's variables"):
            shutil.copyfile(self._firmware.variables.path, own)
        return self._firmware.with_variables(own)

    def _firmware_said(self) -> list[str]:
        return [] if self._firmware is None else [f"UEFI firmware: {self._firmware.code.path}"]

    async def _follow(self, qemu: Qemu, watch: Watch) -> tuple[Ending, Screen | None]:
        """Watch the machine until the run is over; also returns the last picture of its display."""
        stopped = False
        next_screen = self.now() + SCREEN_SECONDS
        while (ending := watch.ending(self.now())) is None:
            if (state := await qemu.stopped()) is not None and not stopped:
                stopped = True
                _refuse_full_disk(state[0], self._scratch)
                watch.stopped(*state)
            self._note(watch.tick(self.now()))
            if self.now() >= next_screen:
                await self._look(qemu, watch)
                next_screen = self.now() + SCREEN_SECONDS
            await asyncio.sleep(TICK_SECONDS)
        return ending, await self._look(qemu, watch)

    async def _look(self, qemu: Qemu, watch: Watch) -> Screen | None:
        screen = await qemu.screen()
        if screen is not None:
            self._note(watch.screen(screen.digest, screen.lines, self.now()))
        return screen


def _refuse_full_disk(status: str, scratch: Path) -> None:
    if status == "io-error":
        raise TargetError(
            "the guest's writes no longer fit",
            hint="free some space, or set TMPDIR to a larger folder",
            path=scratch,
        )
