"""When a rehearsal is over, and what it proved: the policy, with the clock passed in.

A rehearsal ends soon after decisive evidence, when the guest stops, or at its timeout. Under KVM it may
also turn out that the processor does not really run the guest: a nested KVM can stop with an internal error
or hang right after the boot loader. Then the caller starts again without KVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from imagekit.launch.evidence import Reader
from imagekit.launch.result import Evidence, Verdict
from imagekit.records import dataclass, field

SETTLE_SECONDS = 1.0
"""After decisive evidence: lets the line be finished and the screen be drawn."""
PAUSE_SECONDS = 0.5
"""Console text without a newline is judged when nothing follows it for this long."""
LOGIN_GRACE_SECONDS = 30.0
"""A login prompt may come before cloud-init speaks; after this long the guest does not use cloud-init."""
SILENCE_SECONDS = 25.0
"""Under KVM, before the kernel speaks: no new text and no new picture for this long is taken for a hang."""

Ending = Literal["settled", "powered-off", "reset", "timeout", "accelerator"]


@dataclass(slots=True)
class Watch:
    """Follows one run from ``started`` (seconds on the caller's clock) and says when and why it ends."""

    reader: Reader
    started: float
    timeout: float
    waits_for_marker: bool
    has_config_drive: bool
    may_blame_kvm: bool
    trouble: str = ""
    """Why the accelerator is to blame, when it is."""

    _life: float = 0.0
    _decided: float | None = None
    _login: float | None = None
    _stopped: Ending | None = None
    _paused: bool = True
    _pictures: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._life = self.started

    def console(self, data: bytes, now: float) -> list[Evidence]:
        """Bytes arrived on the console."""
        self._life = now
        self._paused = False
        return self._note(self.reader.feed(data, now), now)

    def screen(self, picture: bytes, lines: Sequence[str], now: float) -> list[Evidence]:
        """The display shows ``lines``; ``picture`` is a digest of what it looks like."""
        if picture not in self._pictures:
            # A blinking cursor alternates between two pictures: only one never seen is a sign of life.
            self._pictures.add(picture)
            self._life = now
        return self._note(self.reader.screen(lines, now), now)

    def tick(self, now: float) -> list[Evidence]:
        """Time passed."""
        if self._paused or now - self._life < PAUSE_SECONDS:
            return []
        self._paused = True
        return self._note(self.reader.pause(now), now)

    def stopped(self, status: str, reason: str) -> None:
        """QEMU stopped the machine: its run state, and the reason of the SHUTDOWN event if there was one."""
        if status == "internal-error":
            self.trouble = "KVM stopped with an internal error"
            self._stopped = "accelerator"
        else:
            self._stopped = "reset" if reason in ("guest-reset", "guest-panic") else "powered-off"

    def finish(self, now: float) -> list[Evidence]:
        """QEMU is gone and its last word read: a line cut off counts as a whole one."""
        return self._note(self.reader.pause(now), now)

    def ending(self, now: float) -> Ending | None:
        """Why the run is over at ``now``, or None while it goes on."""
        if self._decided is not None and (self._stopped or now - self._decided >= SETTLE_SECONDS):
            return "settled"
        if self._stopped is not None:
            return self._blame("reset the machine early") if self._stopped == "reset" else self._stopped
        if self._login is not None and self._without_cloud_init(now - self._login):
            return "settled"
        if now - self.started >= self.timeout:
            return "timeout"
        if self._suspicious() and now - self._life >= SILENCE_SECONDS:
            self.trouble = f"nothing was printed or drawn for {SILENCE_SECONDS:.0f} s under KVM"
            return "accelerator"
        return None

    def verdict(self, ending: Ending) -> Verdict:
        """What the run proved, given why it ended."""
        reader = self.reader
        if reader.failed:
            return "no-boot"
        if self.waits_for_marker:
            if "marker" in reader.seen:
                return "booted"
            return "timeout" if ending == "timeout" else "no-boot"
        if reader.reached("login"):
            return "booted"
        if not reader.reached("kernel"):
            return "unknown"  # a system that never prints where we can read looks the same as none
        if ending == "timeout":
            return "timeout"
        return "booted" if reader.reached("init") else "no-boot"

    def _note(self, found: list[Evidence], now: float) -> list[Evidence]:
        for item in found:
            done = item.stage == "marker" or (item.stage == "finished" and not self.waits_for_marker)
            if self._decided is None and (done or item.failure):
                self._decided = now
            elif item.stage == "login":
                self._login = now
        return found

    def _without_cloud_init(self, since_login: float) -> bool:
        if self.waits_for_marker or self.reader.seen & {"cloud-init", "datasource"}:
            return False
        return since_login >= (LOGIN_GRACE_SECONDS if self.has_config_drive else SETTLE_SECONDS)

    def _suspicious(self) -> bool:
        return self.may_blame_kvm and not self.reader.reached("kernel") and not self.reader.failed

    def _blame(self, what: str) -> Ending:
        if self._suspicious():
            self.trouble = f"the guest {what} under KVM"
            return "accelerator"
        return "reset"
