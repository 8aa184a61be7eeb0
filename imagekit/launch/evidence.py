"""From what a machine prints to how far it came: a table of known lines, and a reader that applies it.

Pure: no clock, no process, no file. The caller says at which second bytes arrived. Every rule fires once,
at its first line, so evidence is bounded whatever the guest prints. What it prints is untrusted: escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from imagekit.launch.result import STAGES, Evidence, Source, Stage
from imagekit.records import dataclass

MAX_LINE = 4096
"""Longer lines are judged in pieces of this many bytes."""
MAX_QUOTE = 300

DEFAULT_MARKER = "IMAGEKIT-BOOT-OK"
"""What our own small guest prints when everything it checked is right."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A line that shows a stage; ``failure``: after this line nothing good comes any more."""

    stage: Stage
    pattern: re.Pattern[str]
    failure: bool = False


def _rules(stage: Stage, *patterns: str, failure: bool = False) -> tuple[Rule, ...]:
    return tuple(Rule(stage, re.compile(pattern), failure) for pattern in patterns)


RULES: tuple[Rule, ...] = (
    *_rules("firmware", r"^SeaBIOS \(version", r"^UEFI firmware|^BdsDxe: (?:loading|starting)"),
    *_rules(
        "bootloader",
        r"\bGRUB\b",
        r"^(?:ISO|SYS|EXT|PXE)LINUX \d",
        r"^LILO \d",
        r"systemd-boot",
        r"^imagekit tiny guest: (?:boot sector|EFI application)",
    ),
    # Proof that Secure Boot was on, said on the way to the kernel or by the kernel.
    *_rules("bootloader", r"^EFI stub: UEFI Secure Boot is enabled"),
    *_rules("kernel", r"\bsecureboot: Secure boot enabled"),
    *_rules(
        "kernel",
        r"\bLinux version \d",
        r"^(?:FreeBSD|OpenBSD|NetBSD) \d",
        r"SAC>|Computer is booting, SAC started",  # Windows with Emergency Management Services
    ),
    *_rules(
        "init",
        # dracut runs a systemd of its own before the root file system is there: that one does not count.
        r"^Welcome to (?!GRUB)(?!.*(?:dracut|[Ii]nitramfs)).+!$",
        r"^INIT: version \d",
        r"OpenRC .*is starting up",
    ),
    *_rules("cloud-init", r"Cloud-init v\. \S+ running"),
    *_rules("datasource", r"\bDatasource DataSource(?!None\b)\w+"),
    *_rules("login", r"\blogin:\s*$"),
    *_rules("finished", r"Cloud-init v\. \S+ finished at"),
    *_rules(
        "firmware",
        r"^No bootable device",
        r"^FATAL: No bootable medium",
        r"^BdsDxe: failed to load Boot.*: (?:Access Denied|Security Violation)",  # Secure Boot, of the first loader
        r"^BdsDxe: No bootable option or device was found",
        r"^UEFI Interactive Shell",
        failure=True,
    ),
    *_rules(
        "bootloader",
        r"^Missing operating system",
        r"^Error loading operating system",
        r"^Invalid partition table",
        r"^Operating [Ss]ystem not found",
        r"^(?:NTLDR|BOOTMGR) is missing",
        r"^grub(?: rescue)?> *$",  # a prompt: nobody is there to type
        # Secure Boot again: shim about the boot loader, the boot loader about the kernel.
        r"Verification failed: \(0x1A\) Security Violation",
        r"^error: (?:bad shim signature|.* has invalid signature)",
        r"^imagekit tiny guest: FAILED",
        failure=True,
    ),
    *_rules(
        "kernel",
        r"Kernel panic - not syncing",
        r"ALERT!.*Dropping to a shell",
        r"^\(initramfs\) *$",
        r"^dracut:/#",
        r"^mountroot> *$",
        failure=True,
    ),
    *_rules("init", r"^You are in (?:emergency|rescue) mode", failure=True),
)

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


class Reader:
    """Reads a console, keeps the furthest stage and whether a decisive failure was seen.

    ``marker`` is a text whose line is the proof the caller waits for.
    """

    def __init__(self, *, marker: str = DEFAULT_MARKER) -> None:
        self._rules = [*RULES, Rule("marker", re.compile(re.escape(marker)))]
        self._tail = b""
        self.stage: Stage = "started"
        self.failed = False
        self.seen: set[Stage] = set()

    def feed(self, data: bytes, second: float) -> list[Evidence]:
        """Take the next bytes of the console; returns what they show."""
        found: list[Evidence] = []
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            for at in range(0, len(line), MAX_LINE):
                found += self._judge(plain(line[at : at + MAX_LINE]), "console", second)
        while len(self._tail) > MAX_LINE:
            found += self._judge(plain(self._tail[:MAX_LINE]), "console", second)
            self._tail = self._tail[MAX_LINE:]
        return found

    def pause(self, second: float) -> list[Evidence]:
        """Judge the line begun so far, because nothing followed it: a prompt waits without a newline."""
        return list(self._judge(plain(self._tail), "console", second))

    def screen(self, lines: Sequence[str], second: float) -> list[Evidence]:
        """Judge the lines of the display."""
        return [found for line in lines for found in self._judge(escape(line), "screen", second)]

    def reached(self, stage: Stage) -> bool:
        """Whether the machine came at least this far."""
        return STAGES.index(self.stage) >= STAGES.index(stage)

    def _judge(self, line: str, source: Source, second: float) -> Iterator[Evidence]:
        for rule in [rule for rule in self._rules if rule.pattern.search(line)]:
            self._rules.remove(rule)
            self.seen.add(rule.stage)
            self.failed |= rule.failure
            if not self.reached(rule.stage):
                self.stage = rule.stage
            yield Evidence(round(second, 1), rule.stage, source, line[:MAX_QUOTE], rule.failure)


def plain(line: bytes) -> str:
    """A console line as readable text: terminal sequences dropped, everything else unprintable escaped."""
    text = line.strip(b"\r").decode("utf-8", errors="backslashreplace")
    return escape(_ESCAPE_SEQUENCE.sub("", text))


def escape(text: str) -> str:
    """``text`` with control and other unprintable characters as ``\\x1b``-like escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text)
