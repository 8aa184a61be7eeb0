"""The safety policy: a table of rules with stable codes, judged on facts."""

from __future__ import annotations

import re

import pytest

from imagekit.errors import UnsafeImage, UsageError
from imagekit.formats.base import Fact, ImageInfo, Reference
from imagekit.formats.registry import Claim
from imagekit.policy import (
    RULES,
    Finding,
    Severity,
    check_allowed,
    enforce,
    judge_claims,
    judge_info,
    judge_use,
)

QCOW2, VHD = Claim("qcow2", "qcow2 magic at 0"), Claim("vhd", "VHD footer in the last 512 bytes")


def rules(claims: list[Claim], declared: str | None) -> list[str]:
    return [finding.rule for finding in judge_claims(claims, declared)]


@pytest.mark.parametrize("code", sorted(RULES))
def test_every_rule_has_a_code_a_reason_and_a_way_out_if_it_refuses(code: str) -> None:
    rule = RULES[code]
    assert rule.code == code
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", code)
    assert "\n" not in rule.reason
    assert 10 < len(rule.reason) < 120
    assert rule.severity is Severity.REFUSE or not rule.allowable


@pytest.mark.parametrize(
    "code", ["backing-file", "data-file", "parent-file", "ambiguous", "format-mismatch", "in-use", "unknown-feature"]
)
def test_what_must_never_pass_unnoticed_refuses(code: str) -> None:
    assert RULES[code].severity is Severity.REFUSE


def test_only_what_is_the_callers_own_risk_can_be_allowed() -> None:
    """References and contradictions cannot be: what they lead to is not the caller's to know."""
    assert {code for code, rule in RULES.items() if rule.allowable} == {
        "in-use",
        "overlap",
        "amplification",
        "outside-file",
        "unchecked",
        "corrupt-bit",
        "reference-format",
        "external-qemu-img",
        "descriptor-unknown-key",
        "no-descriptor",
    }


# --- claims ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "declared", "expected"),
    [
        ([], None, []),
        ([QCOW2], None, []),
        ([QCOW2, VHD], None, ["ambiguous"]),
        ([], "raw", []),
        ([QCOW2], "raw", ["declared-raw"]),
        ([QCOW2, VHD], "raw", ["declared-raw"]),
        ([QCOW2], "qcow2", []),
        ([VHD], "vpc", []),
        ([QCOW2], "vhd", ["format-mismatch"]),
        ([QCOW2, VHD], "vhd", ["ambiguous"]),
        ([QCOW2, VHD], "qcow2", ["ambiguous"]),
        ([], "vhd", []),
    ],
)
def test_what_a_file_claims_to_be_is_judged_with_what_the_caller_says(
    claims: list[Claim], declared: str | None, expected: list[str]
) -> None:
    """Nothing found and a format declared: opening it will tell. Raw is always the caller's word."""
    assert rules(claims, declared) == expected


def test_a_finding_names_what_was_found() -> None:
    (finding,) = judge_claims([QCOW2, VHD], None)
    assert "qcow2 (qcow2 magic at 0), vhd (VHD footer in the last 512 bytes)" in finding.message
    (finding,) = judge_claims([QCOW2], "vpc")
    assert finding.message == "declared vhd, found qcow2 (qcow2 magic at 0)"


# --- what an image says ----------------------------------------------------------------------------------------


def test_each_reference_is_a_finding_with_the_name_quoted() -> None:
    """A name may hold anything, also what a terminal would obey."""
    info = ImageInfo(
        "qcow2",
        512,
        references=(Reference("backing-file", "\x1b]0;x\x07/etc/passwd"), Reference("data-file", "")),
    )
    backing, data = judge_info(info)
    assert (backing.rule, data.rule) == ("backing-file", "data-file")
    assert "'\\x1b]0;x\\x07/etc/passwd'" in backing.message
    assert "\x1b" not in backing.message
    assert data.message == "the image refers to another file:"


def test_facts_become_findings_with_their_place() -> None:
    info = ImageInfo("vhd", 512, facts=(Fact("footers-differ", "two disks", 512), Fact("dirty", "not closed")))
    assert list(judge_info(info)) == [
        Finding("footers-differ", "two disks", Severity.REFUSE, 512),
        Finding("dirty", "not closed", Severity.WARN, None),
    ]


def test_a_fact_that_no_rule_is_about_is_shown_and_refuses_nothing() -> None:
    info = ImageInfo("other", 512, facts=(Fact("of-another-package", "what it means, that package knows"),))
    (finding,) = judge_info(info)
    assert finding.severity is Severity.WARN
    enforce([finding])


def test_use_by_another_program_is_a_finding() -> None:
    assert [finding.rule for finding in judge_use(held_for_writing=True)] == ["in-use"]
    assert list(judge_use(held_for_writing=False)) == []


# --- enforcing -------------------------------------------------------------------------------------------------


def finding(code: str) -> Finding:
    return Finding(code, "found", RULES[code].severity, 7)


def test_the_first_that_refuses_is_raised_with_rule_reason_hint_and_place() -> None:
    findings = [finding("dirty"), finding("backing-file"), finding("encrypted")]
    with pytest.raises(UnsafeImage) as caught:
        enforce(findings, path="image.qcow2")
    error = caught.value
    assert (error.rule, error.exit_code, error.path, error.offset) == ("backing-file", 13, "image.qcow2", 7)
    assert error.hint == RULES["backing-file"].hint
    assert RULES["backing-file"].reason in str(error)


@pytest.mark.parametrize("code", sorted(code for code, rule in RULES.items() if rule.severity is not Severity.REFUSE))
def test_warnings_and_notes_refuse_nothing(code: str) -> None:
    enforce([finding(code)])


def test_what_the_caller_allows_passes_and_nothing_else() -> None:
    enforce([finding("in-use")], allow=frozenset({"in-use"}))
    with pytest.raises(UnsafeImage):
        enforce([finding("in-use"), finding("corrupt-bit")], allow=frozenset({"in-use"}))


def test_only_rules_that_can_be_allowed_can_be_asked_for() -> None:
    assert check_allowed(["in-use", "in-use"]) == frozenset({"in-use"})
    with pytest.raises(UsageError, match="'backing-file' cannot be allowed") as caught:
        check_allowed(["in-use", "backing-file"])
    assert caught.value.hint == (
        "rules that can be allowed: "
        "amplification, corrupt-bit, descriptor-unknown-key, external-qemu-img, in-use, no-descriptor, outside-file, "
        "overlap, reference-format, unchecked"
    )
    with pytest.raises(UsageError, match="'nonsense' is not a rule"):
        check_allowed(["nonsense"])


def test_a_finding_is_json() -> None:
    assert finding("in-use").to_json() == {"rule": "in-use", "message": "found", "severity": "refuse"}
