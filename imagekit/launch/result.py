"""What a boot says at its end: the verdict, how far the machine came, and the evidence for both.

The words are the contract of ``imagekit boot --output json``; fields are only ever added.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal, get_args

from imagekit.records import dataclass, field

Stage = Literal[
    "started",
    "firmware",
    "bootloader",
    "kernel",
    "init",
    "cloud-init",
    "datasource",
    "login",
    "finished",
    "marker",
]
"""How far the machine came; ``finished`` is cloud-init's own last word, ``marker`` the line waited for."""

STAGES: tuple[Stage, ...] = get_args(Stage)
"""The stages in the order in which a boot passes them."""

Verdict = Literal["booted", "no-boot", "timeout", "unknown"]
Source = Literal["console", "screen", "qemu", "host", "imagekit"]
"""Who said it: the serial port and the firmware's debug port, the text on the display, QEMU, the host, or we."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """One thing that was seen: ``line`` as printed, with control characters escaped.

    ``second`` counts from the start of the rehearsal, ``failure`` marks a line after which no boot succeeds.
    """

    second: float
    stage: Stage
    source: Source
    line: str
    failure: bool = False


@dataclass(frozen=True, slots=True)
class BootResult:
    """The outcome of a boot; ``console`` and ``screenshot`` are files, or None when there is nothing."""

    backend: Literal["qemu", "hyperv"]
    verdict: Verdict
    stage: Stage
    evidence: tuple[Evidence, ...]
    console: Path | None
    screenshot: Path | None
    seconds: float
    accelerator: Literal["kvm", "tcg"] | None
    checks: dict[str, str] = field(default_factory=dict)
    """On a Hyper-V host: running, heartbeat, address, serial, arp; each yes, no or unknown."""
    addresses: tuple[str, ...] = ()

    def accepted(self, *, accept_unknown: bool) -> bool:
        """Whether the caller may go on; ``accept_unknown`` also takes a guest that says nothing readable."""
        return self.verdict == "booted" or (accept_unknown and self.verdict == "unknown")

    def to_json(self) -> dict[str, object]:
        """The document of ``imagekit boot --output json``."""
        return {
            "schema": 1,
            "backend": self.backend,
            "verdict": self.verdict,
            "stage": self.stage,
            "evidence": [asdict(item) for item in self.evidence],
            "console": None if self.console is None else str(self.console),
            "screenshot": None if self.screenshot is None else str(self.screenshot),
            "seconds": round(self.seconds, 3),
            "accelerator": self.accelerator,
            "checks": dict(self.checks),
            "addresses": list(self.addresses),
        }
