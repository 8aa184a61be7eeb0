"""When a rehearsal ends and what it proved, with a clock that the test holds."""

from __future__ import annotations

import pytest

from imagekit.launch.evidence import Reader
from imagekit.launch.watch import LOGIN_GRACE_SECONDS, SETTLE_SECONDS, SILENCE_SECONDS, Watch

SEABIOS = b"SeaBIOS (version 1.16.2)\nBooting from Hard Disk...\n"
KERNEL = SEABIOS + b"[    0.000000] Linux version 6.1.0\n"
INIT = KERNEL + b"Welcome to Debian GNU/Linux 12 (bookworm)!\n"
CLOUD_INIT = INIT + b"cloud-init[1]: Cloud-init v. 22.4.2 running 'init' at now\n"
FINISHED = CLOUD_INIT + b"cloud-init[2]: Cloud-init v. 22.4.2 finished at now. Datasource DataSourceConfigDrive\n"


def watch(
    console: bytes = b"",
    *,
    started: float = 0.0,
    timeout: float = 100.0,
    marker: str | None = None,
    config_drive: bool = True,
    kvm: bool = False,
) -> Watch:
    """A watch that has read ``console`` at its start."""
    reader = Reader(marker=marker or "IMAGEKIT-BOOT-OK")
    result = Watch(
        reader=reader,
        started=started,
        timeout=timeout,
        waits_for_marker=marker is not None,
        has_config_drive=config_drive,
        may_blame_kvm=kvm,
    )
    if console:
        result.console(console, started)
    return result


def test_a_quiet_guest_is_waited_for_until_the_timeout() -> None:
    quiet = watch(SEABIOS, started=5.0)
    assert quiet.ending(104.9) is None
    assert quiet.ending(105.0) == "timeout"


@pytest.mark.parametrize("proof", [b"IMAGEKIT-BOOT-OK\n", b"No bootable device.\n", FINISHED])
def test_decisive_evidence_ends_the_run_after_a_moment(proof: bytes) -> None:
    decided = watch(proof)
    assert decided.ending(SETTLE_SECONDS - 0.1) is None
    assert decided.ending(SETTLE_SECONDS) == "settled"


def test_with_the_machine_off_there_is_nothing_to_settle() -> None:
    decided = watch(b"IMAGEKIT-BOOT-OK\n")
    decided.stopped("shutdown", "guest-shutdown")
    assert decided.ending(0.1) == "settled"


def test_a_login_prompt_is_the_end_where_no_cloud_init_is_expected() -> None:
    prompt = watch(INIT, config_drive=False)
    prompt.console(b"web1 login: ", 10.0)
    prompt.tick(11.0)
    assert prompt.ending(11.0) is None
    assert prompt.ending(11.0 + SETTLE_SECONDS) == "settled"


def test_with_a_config_drive_cloud_init_has_time_to_speak_after_the_login_prompt() -> None:
    prompt = watch(INIT)
    prompt.console(b"web1 login: ", 10.0)
    prompt.tick(11.0)
    assert prompt.ending(10.0 + LOGIN_GRACE_SECONDS) is None
    assert prompt.ending(11.0 + LOGIN_GRACE_SECONDS) == "settled"


def test_once_cloud_init_spoke_its_last_word_is_waited_for() -> None:
    prompt = watch(CLOUD_INIT)
    prompt.console(b"web1 login: ", 1.0)
    prompt.tick(2.0)
    assert prompt.ending(99.0) is None
    prompt.console(FINISHED, 99.0)
    assert prompt.ending(99.0 + SETTLE_SECONDS) == "settled"


def test_a_marker_is_waited_for_past_everything_else() -> None:
    waiting = watch(FINISHED, marker="PROOF")
    waiting.console(b"web1 login: ", 1.0)
    waiting.tick(2.0)
    assert waiting.ending(99.0) is None
    waiting.console(b"PROOF\n", 99.0)
    assert waiting.ending(99.0 + SETTLE_SECONDS) == "settled"
    assert waiting.verdict("settled") == "booted"


@pytest.mark.parametrize(
    ("console", "ending", "verdict"),
    [
        (FINISHED, "settled", "booted"),
        (INIT + b"web1 login: ", "timeout", "booted"),
        (INIT, "powered-off", "booted"),
        (INIT, "timeout", "timeout"),
        (KERNEL, "timeout", "timeout"),
        (KERNEL, "reset", "no-boot"),
        (SEABIOS, "timeout", "unknown"),
        (SEABIOS, "powered-off", "unknown"),
        (b"", "timeout", "unknown"),
        (b"No bootable device.\n", "settled", "no-boot"),
        (INIT + b"Kernel panic - not syncing\n", "settled", "no-boot"),
    ],
)
def test_the_verdict_follows_from_stage_and_ending(console: bytes, ending: str, verdict: str) -> None:
    seen = watch(console)
    seen.tick(1.0)
    assert seen.verdict(ending) == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize(("ending", "verdict"), [("timeout", "timeout"), ("powered-off", "no-boot")])
def test_without_its_marker_no_run_is_booted_or_unknown(ending: str, verdict: str) -> None:
    for console in (SEABIOS, FINISHED):
        assert watch(console, marker="PROOF").verdict(ending) == verdict  # type: ignore[arg-type]


def test_silence_under_kvm_before_the_kernel_is_kvms_fault() -> None:
    silent = watch(SEABIOS, kvm=True)
    assert silent.ending(SILENCE_SECONDS - 0.1) is None
    assert silent.ending(SILENCE_SECONDS) == "accelerator"
    assert "KVM" in silent.trouble


def test_silence_is_only_blamed_on_kvm() -> None:
    assert watch(SEABIOS).ending(SILENCE_SECONDS) is None


def test_a_kernel_may_be_silent() -> None:
    assert watch(KERNEL, kvm=True).ending(SILENCE_SECONDS) is None


def test_a_new_picture_is_a_sign_of_life_and_a_blinking_cursor_is_none() -> None:
    silent = watch(SEABIOS, kvm=True)
    for second in range(10):
        silent.screen(b"cursor" if second % 2 else b"no cursor", [], float(second))
    assert silent.ending(1.0 + SILENCE_SECONDS) == "accelerator"
    silent.screen(b"logo", [], 20.0)
    assert silent.ending(1.0 + SILENCE_SECONDS) is None


def test_text_that_keeps_coming_is_a_sign_of_life() -> None:
    alive = watch(SEABIOS, kvm=True)
    alive.console(b".", SILENCE_SECONDS - 1)
    assert alive.ending(SILENCE_SECONDS + 1) is None


def test_an_internal_error_is_kvms_fault_at_any_stage() -> None:
    broken = watch(INIT, kvm=True)
    broken.stopped("internal-error", "")
    assert broken.ending(3.0) == "accelerator"
    assert "internal error" in broken.trouble


def test_an_early_reset_is_blamed_on_kvm_and_a_late_one_is_not() -> None:
    early, late, emulated = watch(SEABIOS, kvm=True), watch(KERNEL, kvm=True), watch(SEABIOS)
    for one in (early, late, emulated):
        one.stopped("shutdown", "guest-reset")
    assert [one.ending(3.0) for one in (early, late, emulated)] == ["accelerator", "reset", "reset"]


def test_a_line_cut_off_by_the_end_of_the_machine_still_counts() -> None:
    cut = watch(marker="PROOF")
    cut.console(b"PROOF", 1.0)
    cut.stopped("shutdown", "guest-shutdown")
    (found,) = cut.finish(1.2)
    assert found.stage == "marker"
    assert cut.verdict("powered-off") == "booted"
