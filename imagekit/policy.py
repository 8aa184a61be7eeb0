"""The safety policy: a table of named rules, judged on facts that formats and sources report.

Nothing here reads an image. A rule has a stable code, a one-line reason and a severity; some can be allowed by the
caller with ``--allow CODE``. Every command asks here before it reads a guest's byte, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

from imagekit.errors import UnsafeImage, UsageError
from imagekit.formats.base import JSON, ImageInfo, Problem
from imagekit.formats.registry import Claim, find, suffix_format
from imagekit.limits import Limits, shown
from imagekit.records import dataclass


class Severity(str, Enum):
    REFUSE = "refuse"
    WARN = "warn"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    code: str
    severity: Severity
    reason: str
    hint: str | None = None
    allowable: bool = False


RULES: dict[str, Rule] = {
    rule.code: rule
    for rule in (
        Rule(
            "backing-file",
            Severity.REFUSE,
            "an image must not decide which other file of this machine is read",
            hint="where its origin is trusted: --follow-references",
        ),
        Rule(
            "data-file",
            Severity.REFUSE,
            "an image must not decide which other file of this machine is read",
            hint="where its origin is trusted: --follow-references",
        ),
        Rule(
            "parent-file",
            Severity.REFUSE,
            "an image must not decide which other file of this machine is read",
            hint="where its origin is trusted: --follow-references",
        ),
        Rule(
            "extent-file",
            Severity.REFUSE,
            "an image must not decide which other file of this machine is read",
            hint="where its origin is trusted: --follow-references",
        ),
        Rule(
            "reference-protocol",
            Severity.REFUSE,
            "a reference followed must be the name of a file, never an address or a set of options",
            hint="fetch what it names and make it one file first",
        ),
        Rule(
            "reference-format",
            Severity.REFUSE,
            "the image does not say which format its backing file has, and raw would be a guess",
            hint="say it in the image: qemu-img rebase -u -F FORMAT -b FILE IMAGE",
            allowable=True,
        ),
        Rule(
            "parent-id",
            Severity.REFUSE,
            "a child on another parent is neither of two disks",
            hint="--ignore-parent-id where you know that this parent is right",
        ),
        Rule(
            "parent-size",
            Severity.REFUSE,
            "a parent that was resized no longer fits its children",
            hint="--ignore-parent-id where you know that this parent is right",
        ),
        Rule("parent-smaller", Severity.NOTE, "a child that was grown: what its parent does not have is zero"),
        Rule(
            "ambiguous",
            Severity.REFUSE,
            "a file that is two formats at once means something else to the next program",
            hint="ask who made it; -f raw takes the bytes as they are",
        ),
        Rule(
            "format-mismatch",
            Severity.REFUSE,
            "the content is not in the format it was declared to be",
            hint="leave out -f to use the format found, or ask who made it",
        ),
        Rule(
            "name-mismatch",
            Severity.REFUSE,
            "a disk cut short loses the footer that it is known by, and would pass for raw",
            hint="fetch it again and compare its checksum; -f raw takes the bytes as they are",
        ),
        Rule(
            "in-use",
            Severity.REFUSE,
            "another program may be writing to the image: what is read would be neither old nor new",
            hint="stop the machine first, or copy a snapshot; -U reads all the same",
            allowable=True,
        ),
        Rule(
            "unknown-feature",
            Severity.REFUSE,
            "a feature that must be understood to read the image is not",
            hint="a newer imagekit may know it",
        ),
        Rule(
            "encrypted",
            Severity.REFUSE,
            "the data is encrypted",
            hint="decrypt it first: qemu-img convert --object secret,id=s,file=PASSPHRASE "
            "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=IMAGE -O raw OUT",
        ),
        Rule(
            "corrupt-bit",
            Severity.REFUSE,
            "a program that wrote the image found it damaged",
            hint="run imagekit check IMAGE, repair it with qemu-img check -r, or fetch it again",
            allowable=True,
        ),
        Rule(
            "external-qemu-img",
            Severity.REFUSE,
            "qemu-img would parse, or write, what imagekit cannot check",
            hint="where its origin is trusted: --allow external-qemu-img, with -f or -O",
            allowable=True,
        ),
        Rule(
            "wrapper-limit",
            Severity.REFUSE,
            "what a small file unpacks to must not fill this machine",
            hint="unpack it by hand where its origin is trusted",
        ),
        Rule(
            "wrapper-reference",
            Severity.REFUSE,
            "a package must not decide which other file of this machine is read",
            hint="unpack it by hand where its origin is trusted",
        ),
        Rule("limit-virtual-size", Severity.REFUSE, "a disk larger than was ever meant to be read"),
        Rule("limit-output-bytes", Severity.REFUSE, "what a small file becomes must not fill this machine"),
        Rule("limit-metadata-memory", Severity.REFUSE, "what an image says must not fill this machine's memory"),
        Rule("limit-seconds", Severity.REFUSE, "an image must not keep this machine busy for ever"),
        Rule(
            "overlap",
            Severity.REFUSE,
            "what lies on something else in the file is two things at once",
            hint="run imagekit check IMAGE, and ask who made it; --allow overlap reads it all the same",
            allowable=True,
        ),
        Rule(
            "outside-file",
            Severity.REFUSE,
            "a table that says where there is nothing may lead another program anywhere",
            hint="a file cut short looks like that too: fetch it again and compare its checksum; "
            "--allow outside-file reads it all the same",
            allowable=True,
        ),
        Rule(
            "unchecked",
            Severity.REFUSE,
            "what no check could go through may hide anything",
            hint="where its origin is trusted: --allow unchecked",
            allowable=True,
        ),
        Rule(
            "amplification",
            Severity.REFUSE,
            "a disk whose clusters share their places is larger than anybody has room for",
            hint="where its origin is trusted: --allow amplification",
            allowable=True,
        ),
        Rule(
            "structure",
            Severity.WARN,
            "a check finds damage in the structure; what a guest reads is looked at when it is read",
        ),
        Rule("confined-crash", Severity.REFUSE, "what makes a program crash may do worse to the next"),
        Rule(
            "redirect",
            Severity.REFUSE,
            "a server must not decide which other host is asked",
            hint="where you know that host: --redirect-host HOST",
        ),
        Rule("remote-size", Severity.REFUSE, "what a server states must not fill this machine"),
        Rule("downloaded", Severity.NOTE, "the image comes over the network while it is read"),
        Rule("checksum", Severity.NOTE, "the file is the one that its checksum is about"),
        Rule("weak-checksum", Severity.WARN, "another file can be made to have the same"),
        Rule("no-checksum", Severity.WARN, "nothing says that the bytes are those that were uploaded"),
        Rule("staged", Severity.NOTE, "all of the image was fetched before it was read"),
        Rule("resumed", Severity.NOTE, "a part of the image was there from an interrupted run"),
        Rule("not-kept", Severity.NOTE, "what is interrupted would be fetched from its start again"),
        Rule("wrapped", Severity.NOTE, "the image was packed; what is inside counts"),
        Rule("ova-signature", Severity.NOTE, "the package is signed; nobody checked by whom"),
        Rule("ova-manifest-incomplete", Severity.WARN, "the disk has no checksum of its own in the package"),
        Rule("headers-differ", Severity.REFUSE, "two programs would see two different disks"),
        Rule("region-tables-differ", Severity.REFUSE, "two programs would see two different disks"),
        Rule("parent-locator-unused", Severity.REFUSE, "two programs would see two different disks"),
        Rule("grain-directories-differ", Severity.REFUSE, "two programs would see two different disks"),
        Rule(
            "embedded-extent", Severity.REFUSE, "the descriptor inside the image is about other data than the image's"
        ),
        Rule("descriptor-size-differs", Severity.REFUSE, "two programs would see two different disks"),
        Rule("descriptor-hidden-text", Severity.REFUSE, "text that one program reads and another does not"),
        Rule("descriptor-repeated-key", Severity.REFUSE, "two programs would see two different disks"),
        Rule(
            "descriptor-unknown-key",
            Severity.REFUSE,
            "a key that may change what the image means",
            hint="--allow descriptor-unknown-key where you know that it does not",
            allowable=True,
        ),
        Rule(
            "no-descriptor",
            Severity.REFUSE,
            "a part of a disk is not a disk",
            hint="give the descriptor, with --follow-references; --allow no-descriptor reads the part alone",
            allowable=True,
        ),
        Rule("parent-locator-damaged", Severity.WARN, "the other names of the parent count"),
        Rule("parent-unnamed", Severity.WARN, "nothing says where the parent is"),
        Rule("unclean-shutdown", Severity.WARN, "the last writer did not close the image"),
        Rule("header-invalid", Severity.WARN, "the other header counts"),
        Rule("region-table-invalid", Severity.WARN, "the other region table counts"),
        Rule("snapshot-table", Severity.WARN, "the disk as it is now is not affected"),
        Rule("log-replayed", Severity.WARN, "the disk was not closed cleanly; its log was replayed, in memory"),
        Rule("footers-differ", Severity.REFUSE, "two programs would see two different disks"),
        Rule("original-size-larger", Severity.REFUSE, "no program makes a VHD smaller: the sizes contradict"),
        Rule("original-size-differs", Severity.NOTE, "the disk was resized; the current size counts"),
        Rule("footers-differ-slightly", Severity.WARN, "the footer at the end counts"),
        Rule("footer-missing", Severity.WARN, "the copy at the start of the file counts"),
        Rule("footer-copy-missing", Severity.WARN, "the footer at the end of the file counts"),
        Rule("dirty", Severity.WARN, "the last writer did not close the image; guest data is not affected"),
        Rule("declared-raw", Severity.NOTE, "the bytes are taken as they are because the caller said raw"),
    )
}


REFERENCES = frozenset(("backing-file", "data-file", "parent-file", "extent-file"))
"""The rules that a caller who follows references has answered already."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that applies, with what was found."""

    rule: str
    message: str
    severity: Severity
    offset: int | None = None

    def to_json(self) -> dict[str, JSON]:
        return {"rule": self.rule, "message": self.message, "severity": self.severity.value}


def finding(code: str, message: str, offset: int | None = None) -> Finding:
    # A format from elsewhere may state facts that no rule is about: they are shown, and refuse nothing.
    severity = RULES[code].severity if code in RULES else Severity.WARN
    return Finding(code, message, severity, offset)


def judge_claims(claims: list[Claim], declared: str | None, *, name: str = "") -> Iterator[Finding]:
    """What the formats' claims on a file of that name mean, before any of them opens it."""
    found = ", ".join(f"{claim.format} ({claim.found})" for claim in claims)
    if declared is not None:
        wanted = find(declared).name
        if wanted == "raw":
            if claims:
                yield finding("declared-raw", f"declared raw; the content looks like {found}")
            return
        if claims and wanted not in {claim.format for claim in claims}:
            yield finding("format-mismatch", f"declared {wanted}, found {found}")
            return
    if not claims and declared is None and (meant := suffix_format(name)) not in (None, "raw"):
        yield finding("name-mismatch", f"named as {meant}, but nothing of {meant} is in it")
    if len(claims) > 1:
        yield finding("ambiguous", f"the file is claimed by more than one format: {found}")


def judge_info(info: ImageInfo) -> Iterator[Finding]:
    """What an opened image says about itself."""
    for reference in info.references:
        name = f" {reference.name!r}" if reference.name else ""
        yield finding(reference.kind, f"the image refers to another file:{name}")
    for fact in info.facts:
        yield finding(fact.code, fact.message, fact.offset)


def judge_limits(info: ImageInfo, limits: Limits) -> Iterator[Finding]:
    """Whether an opened image is more than the caller lets in."""
    for name, value, what in (
        ("virtual_size", info.virtual_size, "the disk has"),
        ("metadata_memory", info.table_memory, "its tables take"),
    ):
        most: int = getattr(limits, name)
        if value > most:
            yield finding(f"limit-{shown(name)}", f"{what} {value} bytes, at most {most} are allowed")


PROBLEMS = {
    "overlap": "overlap",
    "aliased": "amplification",
    **dict.fromkeys(("outside", "unaligned", "too-large", "bat-entry"), "outside-file"),
}
"""What a check of the structure finds, by its code, and the rule that refuses it.

Where a guest reads, reading refuses a pointer out of the file first; the rule is for the tables that no guest needs.
Wrong refcounts are none of this: they harm nobody who only reads."""


def judge_structure(problems: Iterable[Problem]) -> Iterator[Finding]:
    """What a pass over all of an image's tables found: the first of each kind. Leaks only waste room."""
    told = set[str]()
    for problem in problems:
        stated = problem.code in RULES and problem.code not in PROBLEMS  # by the headers, as a fact
        if problem.leak or stated or problem.code in told or problem.code == "more":
            continue
        told.add(problem.code)
        rule = PROBLEMS.get(problem.code, "structure")
        yield finding(rule, f"{problem.message} [{problem.code}]", problem.offset)


def judge_chain(size: int, sizes: Iterable[int]) -> Iterator[Finding]:
    """What the virtual sizes of an image and of those it refers to say."""
    for below in sizes:
        if below < size:
            yield finding("parent-smaller", f"the disk has {size} bytes, the one below it {below}")


def judge_use(*, held_for_writing: bool) -> Iterator[Finding]:
    """Whether another program works on the file."""
    if held_for_writing:
        yield finding("in-use", "QEMU has the image open for writing")


def check_allowed(codes: Iterable[str]) -> frozenset[str]:
    """The codes a caller allows; UsageError for one that does not exist or cannot be allowed."""
    allowed = frozenset(codes)
    known = sorted(code for code, rule in RULES.items() if rule.allowable)
    for code in sorted(allowed - set(known)):
        what = "cannot be allowed" if code in RULES else "is not a rule"
        raise UsageError(f"{code!r} {what}", hint=f"rules that can be allowed: {', '.join(known)}")
    return allowed


def enforce(findings: Iterable[Finding], *, allow: frozenset[str] = frozenset(), path: str | None = None) -> None:
    """Raise UnsafeImage for the first finding that refuses and is not allowed."""
    for finding in findings:
        if finding.severity is Severity.REFUSE and finding.rule not in allow:
            rule = RULES[finding.rule]
            raise UnsafeImage(
                f"refused by rule {finding.rule}: {finding.message} — {rule.reason}",
                rule=finding.rule,
                hint=rule.hint,
                path=path,
                offset=finding.offset,
            )
