"""Where images come from: a path or an address (imagekit.remote). Opened once, judged, watched until the end.

A :class:`Source` holds the one open file; the format is chosen once, from that file, and never probed again. With
the caller's leave (:class:`~imagekit.references.Following`) the files it refers to are opened with it, each judged
like the first, down to the end of the chain: what is missing or wrong there is said before anything is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

from imagekit import policy
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, SourceError, UnsafeImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import AS_IS, DiskFormat, DiskImage, File, OpenOptions, Reference, Resolver
from imagekit.formats.files import FileIdentity, LocalFile, nameless
from imagekit.limits import DEFAULT as DEFAULT_LIMITS
from imagekit.limits import Limits
from imagekit.progress import SILENT, Control
from imagekit.records import dataclass, replace
from imagekit.references import MAX_DEPTH, Following, check_identity, find
from imagekit.remote import addresses


@dataclass(frozen=True, slots=True)
class Source:
    """An open, recognised image file, and the files it refers to."""

    file: LocalFile
    """Where the image's bytes lie: the file itself, or a nameless one that it was unpacked to."""

    format: str
    image: DiskImage
    findings: tuple[policy.Finding, ...]
    original: LocalFile
    """The file the caller named; the same as ``file`` unless it was packed."""

    identity: FileIdentity
    """Of ``original``, when it was opened."""

    chain: tuple[Source, ...] = ()
    """What the image refers to, in its own order; each has a chain of its own."""

    wrappers: tuple[str, ...] = ()
    """What it was packed with, the outermost first."""

    opened: addresses.Opened | None = None
    """How ``original`` was opened, with the proof that may be pending."""

    @property
    def depth(self) -> int:
        """Images in its longest chain, itself included."""
        return 1 + max((source.depth for source in self.chain), default=0)

    def below(self) -> Iterator[Source]:
        """All that lies below, each before what it refers to itself."""
        for source in self.chain:
            yield source
            yield from source.below()

    def check_unchanged(self) -> None:
        """SourceError when one of the files changed since it was opened, and whatever its checksum says."""
        if self.opened is not None and self.opened.proof is not None:
            self.opened.proof.settle()
        changed = self.identity.differences(self.original.identity)
        if changed:
            raise SourceError(
                f"changed while it was read ({', '.join(changed)})",
                path=self.original.name,
                hint="stop what writes to it, or convert a snapshot",
            )
        for source in self.chain:
            source.check_unchanged()

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()
        self.image.close()
        self.original.close()
        for source in self.chain:
            source.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Opener:
    """How the files are opened that an image needs besides its own. A confined process asks for them instead."""

    def scratch(self, folder: Path | None, name: str) -> LocalFile:
        """A new file that only its descriptor leads to, for what has to be unpacked."""
        if folder is None:
            import tempfile  # and with it, what makes random names

            folder = Path(tempfile.gettempdir())
        return nameless(folder, name)

    def referred(self, reference: Reference, origin: LocalFile, following: Following) -> Iterator[LocalFile]:
        """The files that a reference of the image in ``origin`` may mean, the likeliest first; to be closed."""
        for path in find(reference, Path(origin.name), following):
            yield LocalFile.open_source(path)


OPENER = Opener()
EXTENTS_LOOKED_AT = 1 << 20
"""For damage, in an image that is refused anyway."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How to open a source: what the caller declares, allows and wants to see.

    ``allow`` None reports the findings and refuses nothing (``info``). ``following`` None follows no reference.
    """

    declared: str | None = None
    allow: frozenset[str] | None = frozenset()
    following: Following | None = None
    view: OpenOptions = AS_IS
    scratch: Path | None = None
    """Folder for what has to be unpacked; None: the system's for temporary files."""

    limits: Limits = DEFAULT_LIMITS
    opener: Opener = OPENER
    deep: bool = False
    """Also look at all tables: what lies on something else, leads out of the file, or is there more than once."""
    access: addresses.Access = addresses.NO_ACCESS
    """How a source that is an address may be reached."""

    stated: str | None = None
    """The format that a service says the image has."""

    later: bool = False
    """Whether the caller settles (:meth:`Source.check_unchanged`) before anything comes of the source: a checksum
    is computed meanwhile then, not before."""

    whole: bool = False
    """Whether all of the source will be read if it is sound: then it is fetched while its tables are looked at."""

    def enforce(self, findings: list[policy.Finding], file: LocalFile) -> None:
        if self.allow is not None:
            answered = policy.REFERENCES if self.following is not None else frozenset()
            policy.enforce(findings, allow=self.allow | answered, path=file.name)


def open_source(
    path: str | os.PathLike[str] | LocalFile, reading: Reading | None = None, *, control: Control = SILENT
) -> Source:
    """Open, unpack if need be, recognise and judge. A file that is open already belongs to the source from now on."""
    reading = reading or Reading()
    if isinstance(path, LocalFile):
        opened = addresses.Opened(path, (), path.identity)
    else:
        opened = addresses.open_named(
            path,
            reading.access,
            folder=reading.scratch,
            following=reading.following is not None,
            later=reading.later,
            control=control,
        )
    try:
        with opened.blamed():
            source = _recognised(opened.file, reading, control)
        _check_stated(source, reading, opened.format or reading.stated)
    except BaseException:
        opened.close()
        raise
    findings = (*opened.findings, *source.findings)
    return replace(source, identity=opened.identity, findings=findings, opened=opened)


def _check_stated(source: Source, reading: Reading, stated: str | None) -> None:
    """Content and what a service says of it must agree, also where that is raw: the next reader may believe it."""
    if stated is not None and reading.declared is None and source.format != stated and reading.allow is not None:
        raise UnsafeImage(
            f"refused by rule format-mismatch: stated to be {stated}, found {source.format} — "
            "the content is not in the format it was declared to be",
            rule="format-mismatch",
            path=source.original.name,
            hint=f"-f {source.format} reads it as what it is, where its origin is trusted",
        )


def _recognised(file: LocalFile, reading: Reading, control: Control) -> Source:
    name = reading.declared
    if name is not None and not registry.is_known(name) and _read_by_qemu_img(name):
        addresses.complete(file)
        return _through_qemu_img(file, name, reading, control)
    # Bytes declared raw are taken as they are, whatever they look like.
    if name != "raw" and _is_packed(file):
        return _unpacked(file, reading, control)
    return _judged(file, reading, control)


def _is_packed(file: LocalFile) -> bool:
    """Whether imagekit.wrappers.unwrap knows what it is packed with. That module is loaded only where it may."""
    head = file.pread(0, 262)
    if head[:2] not in _PACKED and head[1:4] != _ZSTD_SKIPPABLE and head[257:] != b"ustar":
        return False
    from imagekit.wrappers import unwrap

    return unwrap.detect(file) is not None


_PACKED = (b"\x1f\x8b", b"\xfd7", b"BZ", b"PK", b"\x28\xb5")
"""How gzip, xz, bzip2, zip and zstd begin."""
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"
"""Behind the first byte of a frame that is to be passed over."""


def _read_by_qemu_img(name: str) -> bool:
    from imagekit import qemu_img

    return name in qemu_img.EXTERNAL_SOURCES


def _unpacked(file: LocalFile, reading: Reading, control: Control) -> Source:
    from imagekit.wrappers import unwrap

    identity = file.identity
    with located(file):
        inside = unwrap.unwrap(file, make=lambda name: reading.opener.scratch(reading.scratch, name), control=control)
    try:
        source = _judged(inside.file, reading, control)
    except BaseException:
        inside.close()
        raise
    note = policy.finding("wrapped", f"{inside.name!r} was unpacked ({', '.join(inside.chain)})")
    findings = [note, *(policy.finding(fact.code, fact.message) for fact in inside.facts), *source.findings]
    return replace(source, original=file, identity=identity, wrappers=inside.chain, findings=tuple(findings))


def _through_qemu_img(file: LocalFile, name: str, reading: Reading, control: Control) -> Source:
    """An image in a format that only qemu-img reads, as the raw disk that it makes of it."""
    from imagekit import qemu_img

    identity = file.identity
    findings = [
        *policy.judge_use(held_for_writing=file.held_for_writing),
        policy.finding("external-qemu-img", f"{name} is read by qemu-img only"),
    ]
    # Running qemu-img is not something to report and do all the same: it needs leave, also for a look.
    policy.enforce(findings, allow=reading.allow or frozenset(), path=file.name)
    raw = qemu_img.open_external(file, name, folder=reading.scratch, control=control)
    try:
        image = registry.find("raw").open(raw)
    except BaseException:
        raw.close()
        raise
    return Source(raw, "raw", image, tuple(findings), file, identity, wrappers=(f"qemu-img -f {name}",))


def _judged(file: LocalFile, reading: Reading, control: Control, above: tuple[FileIdentity, ...] = ()) -> Source:
    identity = file.identity
    _check_chain(file, identity, above)
    claims = registry.probe(file)
    name = file.name if file.size else ""  # that a file is empty is said below, whatever its name promises
    findings = [
        *policy.judge_use(held_for_writing=file.held_for_writing),
        *policy.judge_claims(claims, reading.declared, name=name),
    ]
    reading.enforce(findings, file)
    chosen = registry.choose(file, claims, reading.declared)
    _check_view(chosen, reading.view)
    with located(file):
        image = chosen.open(file, options=reading.view)
        stated = image.info()
    references = stated.references
    findings += policy.judge_info(stated)
    findings += policy.judge_limits(stated, reading.limits)
    reading.enforce(findings, file)
    if reading.whole:
        addresses.want_all(file)
    if reading.deep:
        findings += _structure(chosen, file, image, control, refuse=reading.allow is not None)
        reading.enforce(findings, file)
    chain: tuple[Source, ...] = ()
    if reading.following is not None and references:
        chain = _follow(references, file, reading, control, (*above, identity))
        with located(file):
            image = chosen.open(file, resolver=_resolver(references, chain), options=reading.view)
        findings += [_about(finding, source) for source in chain for finding in source.findings]
        pairs = zip(references, chain, strict=True)
        below = [source.image.virtual_size for one, source in pairs if one.kind in ("backing-file", "parent-file")]
        findings += policy.judge_chain(image.virtual_size, below)
    return Source(file, chosen.name, image, tuple(findings), file, identity, chain)


def _structure(
    chosen: DiskFormat, file: LocalFile, image: DiskImage, control: Control, *, refuse: bool
) -> list[policy.Finding]:
    """What the format's own check says of the whole file. That it cannot say anything is a finding as well."""
    if type(chosen).check is DiskFormat.check:
        return []  # it has no tables
    try:
        with located(file):
            found = list(policy.judge_structure(chosen.check(cast("File", _Watched(file, control)))))
    except (CorruptImage, InvalidImage, UnsupportedFeature) as error:
        found = [policy.finding("unchecked", error.message, error.offset)]
    if all(one.severity is not policy.Severity.REFUSE for one in found):
        return found
    # Damage that a guest would meet is damage first, and no matter of policy.
    damage = _damage_to_a_guest(file, image)
    if damage is None:
        return found
    if refuse:
        raise damage
    return [
        *(one for one in found if one.rule != "unchecked"),
        policy.finding("structure", damage.message, damage.offset),
    ]


class _Watched:
    """The open file, for as long as the caller wants it to be read."""

    def __init__(self, file: LocalFile, control: Control) -> None:
        self._file, self._control = file, control

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def pread(self, offset: int, length: int) -> bytes:
        self._control.check()
        return self._file.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        self._control.check()
        return self._file.pread_into(offset, buffer)


def _damage_to_a_guest(file: LocalFile, image: DiskImage) -> ImagekitError | None:
    """What reading the image's own tables ends with."""
    try:
        with located(file):
            for _ in islice(image.extents(), EXTENTS_LOOKED_AT):
                pass
    except UnsupportedFeature as error:
        return None if image.info().references else error  # what it refers to is not open yet
    except (CorruptImage, InvalidImage) as error:
        return error
    return None


def _check_chain(file: LocalFile, identity: FileIdentity, above: tuple[FileIdentity, ...]) -> None:
    if any((one.device, one.inode) == (identity.device, identity.inode) for one in above):
        raise CorruptImage(
            "the chain of images leads back to itself", path=file.name, hint="give the child its parent"
        )
    if len(above) >= MAX_DEPTH:
        raise chain_too_long(file.name)


def chain_too_long(name: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"a chain of more than {MAX_DEPTH} images", path=name, hint="merge some of them first")


def _check_view(chosen: DiskFormat, view: OpenOptions) -> None:
    for option in ("snapshot", "size_from"):
        if getattr(view, option) is not None and option not in chosen.reads:
            raise UnsupportedFeature(f"{chosen.name} images have no choice of {option.replace('_', ' ')}")


def _follow(
    references: tuple[Reference, ...],
    file: LocalFile,
    reading: Reading,
    control: Control,
    above: tuple[FileIdentity, ...],
) -> tuple[Source, ...]:
    opened: list[Source] = []
    try:
        for reference in references:
            opened.append(_open_reference(reference, file, reading, control, above))
    except BaseException:
        for source in opened:
            source.close()
        raise
    return tuple(opened)


def _open_reference(
    reference: Reference, origin: LocalFile, reading: Reading, control: Control, above: tuple[FileIdentity, ...]
) -> Source:
    """The first file that the names lead to and that is the one meant."""
    assert reading.following is not None
    allow = reading.allow
    if allow is not None and reference.kind == "extent-file":
        allow |= {"no-descriptor"}  # an extent is a part, and is opened as one
    below = replace(reading, declared=reference.format, view=AS_IS, allow=allow)
    refused: ImagekitError | None = None
    for file in reading.opener.referred(reference, origin, reading.following):
        source = _open_below(file, below, control, above)
        try:
            if (
                reference.format is None
                and source.format == "raw"
                and "reference-format" not in (reading.allow or ())
            ):
                policy.enforce([policy.finding("reference-format", f"{reference.name!r} has no known format")])
            check_identity(reference, source.image, Path(file.name), ignore=reading.following.ignore_parent_id)
        except UnsafeImage as error:
            source.close()
            refused = refused or error
            continue
        return source
    assert refused is not None
    raise refused


def _open_below(file: LocalFile, reading: Reading, control: Control, above: tuple[FileIdentity, ...]) -> Source:
    try:
        return _judged(file, reading, control, above)
    except BaseException:
        file.close()
        raise


def _resolver(references: tuple[Reference, ...], chain: tuple[Source, ...]) -> Resolver:
    opened = dict(zip(references, chain, strict=True))

    def resolve(reference: Reference) -> DiskImage:
        return opened[reference].image

    return resolve


def _about(finding: policy.Finding, source: Source) -> policy.Finding:
    return replace(finding, message=f"{source.file.name}: {finding.message}", offset=None)


@contextmanager
def located(file: File) -> Iterator[None]:
    """Give errors of a parser the name of the file they are about."""
    try:
        yield
    except ImagekitError as error:
        error.path = error.path or file.name
        raise
