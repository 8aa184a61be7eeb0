"""Lint for guest metadata: what a guest would trip over, before it boots.

`judge` takes a spec or a tree of files (rendered, or read back from anybody's medium) and what is known of the guest
and of the machine. Each finding has the code of a rule of `RULES`, which says why it matters and what to do. The
traps are those of cloud-init (22.4 of Debian 12 and newer ones), cloudbase-init, Ignition, coreos-cloudinit and
afterburn, on Hyper-V.

Findings quote no user data, no key and no password. What a legal value of a spec is, the model has checked before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from imagekit.cloudinit import lint_layout, lint_network, lint_userdata
from imagekit.cloudinit.lint_rules import RULES, Problem, Severity
from imagekit.cloudinit.model import GUEST_PROFILES, GuestProfile, Spec
from imagekit.cloudinit.render import Rendering
from imagekit.cloudinit.tree import MetadataTree
from imagekit.errors import InvalidSpec, UsageError


class NicLike(Protocol):
    """An adapter of a machine."""

    @property
    def mac(self) -> str: ...


class MachineLike(Protocol):
    """What has to be known of the machine; machine.json's is one."""

    @property
    def uuid(self) -> object: ...

    @property
    def nics(self) -> Collection[NicLike]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the guest would trip over; ``where`` is a file of the tree, with a place in it if known."""

    rule: str
    severity: Severity
    message: str
    where: str
    why: str
    fix: str

    def to_json(self) -> dict[str, str]:
        return {
            "rule": self.rule,
            "severity": self.severity,
            "message": self.message,
            "where": self.where,
            "why": self.why,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        return f"{self.where}: {self.message}: {self.why} [{self.rule}; {self.fix}]"


def judge(
    subject: Spec | MetadataTree,
    *,
    guest: GuestProfile | None = None,
    machine: MachineLike | None = None,
    rendering: Rendering | None = None,
) -> list[Finding]:
    """What is wrong, errors first.

    A spec is judged by what is rendered of it, for its own ``guest`` unless one is named; a tree for ``linux`` then.
    Without a ``machine`` nothing is said about its adapters. Raises InvalidSpec for a spec that cannot be rendered.
    """
    if guest is not None and guest not in GUEST_PROFILES:
        raise UsageError(f"guest {guest!r}", hint=f"choose one of {', '.join(GUEST_PROFILES)}")
    if isinstance(subject, Spec):
        guest = guest or subject.guest
        tree = (rendering or Rendering()).render(subject)
    else:
        tree = subject
    profile: GuestProfile = guest or "linux"
    findings = [_finding(problem, profile) for problem in _problems(tree, profile, machine)]
    kept = dict.fromkeys(finding for finding in findings if finding is not None)
    return sorted(kept, key=lambda finding: finding.severity != "error")


def _problems(tree: MetadataTree, guest: GuestProfile, machine: MachineLike | None) -> Iterator[Problem]:
    view = lint_layout.view_of(tree, guest)
    macs = None if machine is None else frozenset(nic.mac.lower() for nic in machine.nics)
    yield from lint_layout.problems(tree, view, None if machine is None else str(machine.uuid))
    yield from lint_network.problems(view.network_path, view.network, macs, guest=guest)
    if view.user_data is not None:
        yield from lint_userdata.problems(view.user_data_path, view.user_data, guest)


def _finding(problem: Problem, guest: GuestProfile) -> Finding | None:
    rule = RULES[problem.rule]
    if rule.guests is not None and guest not in rule.guests:
        return None
    severity: Severity = "error" if guest in rule.errors_for else rule.severity
    return Finding(problem.rule, severity, problem.message, problem.where, rule.why, rule.fix)


def enforce(findings: Iterable[Finding], *, strict: bool = False) -> tuple[str, ...]:
    """The warnings, as text. Raises InvalidSpec that lists the errors; with ``strict`` warnings are errors too."""
    found = list(findings)
    errors = [finding for finding in found if strict or finding.severity == "error"]
    if errors:
        count = "one thing" if len(errors) == 1 else f"{len(errors)} things"
        listed = "\n".join(f"  {finding}" for finding in errors)
        raise InvalidSpec(
            f"the guest would not accept its metadata, for {count}:\n{listed}",
            hint="mend the spec" if not strict else "mend the spec, or leave out --strict",
        )
    return tuple(str(finding) for finding in found)
