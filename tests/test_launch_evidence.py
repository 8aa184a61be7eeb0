"""What a machine prints is read for what it means, in whatever pieces it comes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.launch.evidence import MAX_LINE, MAX_QUOTE, Reader, escape, plain
from imagekit.launch.result import STAGES, Stage

DEBIAN = b"""\
SeaBIOS (version 1.16.2-debian-1.16.2-1)\r
Booting from Hard Disk...\r
\x1b[H\x1b[JGRUB: starting vmlinuz-6.1.0-56-cloud-amd64\r
\r[    0.000000] Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)\r
Welcome to \x1b[1mDebian GNU/Linux 12 (bookworm)\x1b[0m!\r
[   28.4] cloud-init[250]: Cloud-init v. 22.4.2 running 'init-local' at Sun, 22 Nov 2026 10:48:01 +0000.\r
web1 login: [   39.8] cloud-init[453]: Cloud-init v. 22.4.2 finished at Sun, 22 Nov 2026 10:49:46 +0000. \
Datasource DataSourceConfigDrive [net,ver=2][source=/dev/sr0].  Up 159.74 seconds\r
"""


def read(data: bytes, **options: str) -> Reader:
    reader = Reader(**options)
    reader.feed(data, 1.0)
    reader.pause(2.0)
    return reader


def test_a_whole_boot_is_read_stage_by_stage() -> None:
    found = Reader().feed(DEBIAN, 1.0)
    assert [item.stage for item in found] == [
        "firmware",
        "bootloader",
        "kernel",
        "init",
        "cloud-init",
        "datasource",
        "finished",
    ]
    assert found[3].line == "Welcome to Debian GNU/Linux 12 (bookworm)!"
    assert not any(item.failure for item in found)


@given(st.lists(st.integers(0, len(DEBIAN)), max_size=20))
def test_the_pieces_the_text_comes_in_make_no_difference(cuts: list[int]) -> None:
    reader = Reader()
    edges = [0, *sorted(cuts), len(DEBIAN)]
    found = [item for a, b in itertools.pairwise(edges) for item in reader.feed(DEBIAN[a:b], 1.0)]
    assert found == Reader().feed(DEBIAN, 1.0)


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("SeaBIOS (version rel-1.16.3-0)", "firmware"),
        ("Welcome to GRUB!", "bootloader"),
        ("SYSLINUX 6.04 EDD", "bootloader"),
        ("imagekit tiny guest: boot sector running", "bootloader"),
        ('\x1b[2J\x1b[01;01H\x1b[=3hBdsDxe: starting Boot0001 "UEFI QEMU QEMU HARDDISK "', "firmware"),
        ("imagekit tiny guest: EFI application running", "bootloader"),
        ("EFI stub: UEFI Secure Boot is enabled.", "bootloader"),
        ("[    0.000000] secureboot: Secure boot enabled", "kernel"),
        ("[    0.000000] Linux version 5.14.0-427.el9.x86_64", "kernel"),
        ("FreeBSD 14.1-RELEASE (GENERIC) releng/14.1", "kernel"),
        ("INIT: version 3.06 booting", "init"),
        ("web1 login: ", "login"),
        ("IMAGEKIT-BOOT-OK", "marker"),
    ],
)
def test_a_line_shows_its_stage(line: str, stage: Stage) -> None:
    assert read(line.encode() + b"\n").stage == stage


@pytest.mark.parametrize(
    "line",
    [
        "Welcome to CentOS Stream 9 dracut-057-53.git20240104.el9 (Initramfs)!",
        "Booting from Hard Disk...",
        "Last login: Sun Nov 22 10:00:00 UTC 2026",
        "Datasource DataSourceNone.  Up 10 seconds",
        "loading /boot/Linux version file",
        'BdsDxe: failed to load Boot0002 "UEFI Misc Device" from PciRoot(0x0): Not Found',
    ],
)
def test_a_line_that_only_looks_like_progress_shows_none(line: str) -> None:
    assert read(line.encode() + b"\n").stage == "started"


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("No bootable device.", "firmware"),
        ('BdsDxe: failed to load Boot0001 "UEFI QEMU" from PciRoot(0x0)/Scsi(0x0,0x0): Access Denied', "firmware"),
        ("BdsDxe: No bootable option or device was found.", "firmware"),
        ("UEFI Interactive Shell v2.2", "firmware"),
        ("|Verification failed: (0x1A) Security Violation|", "bootloader"),
        ("error: bad shim signature.", "bootloader"),
        ("error: /vmlinuz has invalid signature.", "bootloader"),
        ("Missing operating system", "bootloader"),
        ("grub rescue> ", "bootloader"),
        ("grub> ", "bootloader"),
        ("BOOTMGR is missing", "bootloader"),
        ("[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)", "kernel"),
        ("ALERT!  LABEL=root does not exist.  Dropping to a shell!", "kernel"),
        ("(initramfs) ", "kernel"),
        ('You are in emergency mode. After logging in, type "journalctl -xb"', "init"),
    ],
)
def test_a_hopeless_line_is_a_failure_at_its_stage(line: str, stage: Stage) -> None:
    reader = read(line.encode())
    assert reader.failed
    assert reader.stage == stage


def test_a_prompt_counts_without_a_newline_but_only_after_a_pause() -> None:
    reader = Reader()
    assert reader.feed(b"web1 login: ", 1.0) == []
    (found,) = reader.pause(1.5)
    assert (found.stage, found.second) == ("login", 1.5)


def test_an_early_stage_after_a_late_one_does_not_turn_the_clock_back() -> None:
    reader = read(b"Welcome to Debian GNU/Linux 12 (bookworm)!\nGRUB\n")
    assert reader.stage == "init"
    assert reader.reached("kernel") and not reader.reached("login")


def test_the_callers_marker_replaces_ours() -> None:
    reader = read(b"IMAGEKIT-BOOT-OK\n", marker="a+b")
    assert reader.stage == "started"
    assert read(b"it says a+b here\n", marker="a+b").seen == {"marker"}


def test_a_line_is_evidence_once_however_often_it_comes() -> None:
    assert len(Reader().feed(b"GRUB\n" * 1000, 1.0)) == 1


def test_an_endless_line_is_judged_and_not_kept() -> None:
    reader = Reader()
    reader.feed(b"x" * (10 * MAX_LINE) + b"Linux version 6", 1.0)
    assert len(reader._tail) <= MAX_LINE
    (found,) = reader.feed(b".1\n", 1.0)
    assert len(found.line) <= MAX_QUOTE


def test_the_screen_is_evidence_too_and_says_so() -> None:
    (found,) = Reader().screen(["", "Missing operating system"], 3.0)
    assert (found.source, found.failure) == ("screen", True)


def test_what_a_guest_prints_cannot_move_the_readers_cursor() -> None:
    assert plain(b"\x1b[2J\x1b]0;title\x07a\x08b\x9b\xff\x1b\r") == "a\\x08b\\x9b\\xff\\x1b"
    assert escape("a\u202eb\x1b[1m") == "a\\u202eb\\x1b[1m"


@given(st.binary(max_size=300))
def test_any_line_becomes_printable(line: bytes) -> None:
    assert plain(line).isprintable()


def test_the_stages_are_all_in_the_order_of_a_boot() -> None:
    assert STAGES.index("kernel") < STAGES.index("init") < STAGES.index("cloud-init") < STAGES.index("finished")
    assert set(STAGES) == set(Stage.__args__)  # type: ignore[attr-defined]
