"""OVA: a tar archive with a machine's description (.ovf), its disk, and perhaps a manifest of digests (.mf).

Follows DMTF DSP0243, "Open Virtualization Format Specification" 1.1 and 2.1: clauses 5 (package), 7.1 (references)
and 9.1 (disks). Only what leads to the disk is read from the description; the machine it describes is not.

Design notes
- The XML is untrusted: a document type is refused, so there are no entities to expand or fetch. Elements count only
  at their place and in the namespace of the root, for descriptions carry sections of other makers.
- A file is referred to by the plain name of a member. Anything else (a path, a URL) names something outside.
- The manifest's digests are checked over all members it lists, the disk's while it is unpacked.

Not here: signatures (.cert), disks in chunks, more than one disk, OVF packages that are folders.
"""

from __future__ import annotations

import hashlib
import re
import xml.parsers.expat
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote

from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import Fact, File, MiB
from imagekit.progress import Control
from imagekit.records import dataclass, field
from imagekit.wrappers.parts import ZEROS, Member, Part, WrapperLimits, leads_elsewhere, over_limit, without_gaps

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_OVF = 4 * MiB
"""Licences are part of the description, some in several languages."""
MAX_MANIFEST = 1 * MiB
MAX_DEPTH = 64
DIGESTS = {"SHA1": "sha1", "SHA224": "sha224", "SHA256": "sha256", "SHA384": "sha384", "SHA512": "sha512"}
COMPRESSIONS = {"": None, "identity": None, "gzip": "gzip"}

_MANIFEST_LINE = re.compile(rb"([A-Za-z0-9-]+)\s*\((.+)\)\s*=\s*([0-9A-Fa-f]+)")

FILE = ("Envelope", "References", "File")
DISKS = (("Envelope", "DiskSection", "Disk"), ("Envelope", "Section", "Disk"))
"""The second is how OVF 0.9 writes it."""


@dataclass(frozen=True, slots=True)
class Ova:
    """The one disk of a package. ``packed`` is how the package says that the disk is compressed."""

    disk: Member
    packed: str | None
    facts: tuple[Fact, ...]


@dataclass(slots=True)
class _Description:
    """What the .ovf says: the attributes of its File and Disk elements."""

    files: list[dict[str, str]] = field(default_factory=list)
    disks: list[dict[str, str]] = field(default_factory=list)


def is_ovf_name(name: str) -> bool:
    """Whether a member of that name is a package's description: it lies at the root."""
    return _at_root(name, ".ovf")


def _at_root(name: str, suffix: str) -> bool:
    return name.lower().endswith(suffix) and "/" not in name and not name.startswith("._")  # as macOS litters


def open_ova(file: File, members: Sequence[Member], limits: WrapperLimits, control: Control) -> Ova:
    """Find the disk, and check the manifest over everything else."""
    by_name = {one.name: one for one in members}
    ovf = _only(".ovf", members, file)
    assert ovf is not None  # that there is one made the archive an OVA
    description = _describe(_small(ovf, MAX_OVF, file), file)
    disk, attributes = _disk(description, by_name, file)
    facts = []
    if _only(".cert", members, file) is not None:
        facts.append(Fact("ova-signature", "the package is signed; the signature is not checked"))
    manifest = _only(".mf", members, file)
    if manifest is not None:
        digests = _manifest(_small(manifest, MAX_MANIFEST, file), file)
        if disk.name not in digests:
            facts.append(Fact("ova-manifest-incomplete", f"the manifest {manifest.name!r} does not list the disk"))
        for name, stated in digests.items():
            if name not in by_name:
                raise CorruptImage(
                    f"the manifest lists {name!r}, which is not in the package",
                    hint="the package is incomplete; fetch it again",
                    path=file.name,
                )
            checked = partial(_checked, by_name[name], stated, file)
            if name == disk.name:
                disk = Member(disk.name, disk.size, checked)
            else:
                for _ in checked():
                    control.check()
    return Ova(disk, COMPRESSIONS[attributes.get("compression", "")], tuple(facts))


def _only(suffix: str, members: Sequence[Member], file: File) -> Member | None:
    """The member with that suffix at the root of the package, if there is one."""
    found = [one for one in members if _at_root(one.name, suffix)]
    if len(found) > 1:
        names = ", ".join(repr(one.name) for one in found[:4])
        raise UnsupportedFeature(
            f"the package holds more than one {suffix} file: {names}", path=file.name, hint="unpack it by hand"
        )
    return found[0] if found else None


def _small(member: Member, most: int, file: File) -> bytes:
    """All bytes of a member that is to be understood as a whole."""
    if member.size > most:
        raise over_limit(
            f"{member.name!r} has {member.size} bytes, at most {most} are read",
            path=file.name,
            hint="unpack it by hand",
        )
    return b"".join(without_gaps(member.parts(), member.size))


# --- the description -------------------------------------------------------------------------------------------


class _Reader:
    """Takes the File and Disk elements out of the XML as it is parsed."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._path: list[str] = []
        self._namespace = ""
        self.found = _Description()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        namespace, _, name = tag.rpartition(" ")
        if not self._path:
            self._namespace = namespace
            if name != "Envelope":
                raise self.damaged(f"the description's root is {name[:40]!r}, expected 'Envelope'")
        if len(self._path) == MAX_DEPTH:
            raise self.damaged(f"the description nests more than {MAX_DEPTH} elements")
        self._path.append(name if namespace == self._namespace else "")
        path = tuple(self._path)
        if path == FILE:
            self.found.files.append(self._own(attributes))
        elif path in DISKS:
            self.found.disks.append(self._own(attributes))

    def end(self, _: str) -> None:
        self._path.pop()

    def _own(self, attributes: dict[str, str]) -> dict[str, str]:
        """Attributes of the root's namespace, or of none, by their plain names."""
        own: dict[str, str] = {}
        for key, value in attributes.items():
            namespace, _, name = key.rpartition(" ")
            if namespace in ("", self._namespace) and own.setdefault(name, value) != value:
                raise self.damaged(f"the attribute {name[:40]!r} is given twice, and differently")
        return own

    def damaged(self, message: str) -> CorruptImage:
        return CorruptImage(
            message, hint="the package is damaged, or no OVF package; fetch it again", path=self._file.name
        )

    def refuse(self, *_: object) -> None:
        raise leads_elsewhere("the description has a document type or entities", path=self._file.name)


def _describe(text: bytes, file: File) -> _Description:
    reader = _Reader(file)
    parser = xml.parsers.expat.ParserCreate(namespace_separator=" ")
    parser.SetParamEntityParsing(xml.parsers.expat.XML_PARAM_ENTITY_PARSING_NEVER)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.StartDoctypeDeclHandler = reader.refuse
    parser.EntityDeclHandler = reader.refuse
    parser.ExternalEntityRefHandler = reader.refuse  # type: ignore[assignment]
    try:
        parser.Parse(text, True)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as error:  # the latter two: encodings
        raise reader.damaged(f"the description is no XML: {error}") from None
    return reader.found


def _disk(description: _Description, by_name: dict[str, Member], file: File) -> tuple[Member, dict[str, str]]:
    """The one disk with content, and the attributes of its File element."""
    files: dict[str, dict[str, str]] = {}
    for attributes in description.files:
        _check_plain(attributes.get("href", ""), file)
        if files.setdefault(attributes.get("id", ""), attributes) is not attributes:
            raise _inconsistent(f"two files have the id {attributes.get('id', '')!r}", file)
    disks = [disk for disk in description.disks if "fileRef" in disk]
    if len(disks) != 1:
        names = ", ".join(repr(files.get(disk["fileRef"], {}).get("href", "?")) for disk in disks[:8])
        found = f"{len(disks)} disks: {names}" if disks else "no disk with content"
        raise UnsupportedFeature(
            f"the machine of the package has {found}; exactly one is converted",
            path=file.name,
            hint="unpack it with tar, and convert each disk by its own name",
        )
    if "parentRef" in disks[0]:
        raise UnsupportedFeature("the disk of the package is based on another one", path=file.name)
    attributes = files.get(disks[0]["fileRef"], {})
    href = attributes.get("href")
    if href is None:
        raise _inconsistent(f"the disk refers to a file {disks[0]['fileRef']!r} that is not listed", file)
    if attributes.get("chunkSize"):
        raise UnsupportedFeature("the disk is in chunks", path=file.name, hint="join them: ovftool does")
    if attributes.get("compression", "") not in COMPRESSIONS:
        raise UnsupportedFeature(f"the disk is packed with {attributes['compression']!r}", path=file.name)
    member = by_name.get(href) or by_name.get(unquote(href))
    if member is None:
        raise _inconsistent(f"the disk {href!r} is not in the package", file)
    size = attributes.get("size", "")
    if size and (not size.isdecimal() or len(size) > 20 or int(size) != member.size):
        raise _inconsistent(f"the disk {href!r} has {member.size} bytes, the description says {size[:40]!r}", file)
    return member, attributes


def _inconsistent(message: str, file: File) -> CorruptImage:
    return CorruptImage(message, hint="the package is incomplete or damaged; fetch it again", path=file.name)


def _check_plain(href: str, file: File) -> None:
    """Refuse a reference to anything but a member at the root of the package."""
    name = unquote(href)
    # A colon makes a URL's scheme, a Windows drive or a stream of another file.
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise leads_elsewhere(f"the description refers to {href[:200]!r}", path=file.name)


# --- the manifest ----------------------------------------------------------------------------------------------


def _manifest(text: bytes, file: File) -> dict[str, list[tuple[str, str]]]:
    """For each name: (algorithm, digest in small hex) as the manifest lists them."""
    found: dict[str, list[tuple[str, str]]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _MANIFEST_LINE.fullmatch(line.strip())
        if match is None:
            raise CorruptImage(
                f"line {number} of the manifest is {line[:80]!r}, expected 'SHA256(NAME)= DIGEST'", path=file.name
            )
        algorithm, name, digest = (one.decode("utf-8", "backslashreplace") for one in match.groups())
        if algorithm.upper() not in DIGESTS:
            raise UnsupportedFeature(
                f"the manifest uses {algorithm!r}; known are {', '.join(DIGESTS)}", path=file.name
            )
        found.setdefault(name.removeprefix("./"), []).append((DIGESTS[algorithm.upper()], digest.lower()))
    return found


def _checked(member: Member, stated: list[tuple[str, str]], file: File) -> Iterator[Part]:
    """The member's parts; CorruptImage at the end when a digest is not the one stated."""
    hashes = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm, _ in stated}
    done = 0
    for offset, piece in member.parts():
        _hash_zeros(hashes, offset - done)
        for one in hashes.values():
            one.update(piece)
        done = offset + len(piece)
        yield offset, piece
    _hash_zeros(hashes, member.size - done)
    for algorithm, digest in stated:
        found = hashes[algorithm].hexdigest()
        if found != digest:
            raise CorruptImage(
                f"{member.name!r} has the {algorithm.upper()} {found}, the manifest says {digest}",
                hint="the package is damaged or was changed; fetch it again",
                path=file.name,
            )


def _hash_zeros(hashes: dict[str, _Hash], length: int) -> None:
    while length > 0:
        for one in hashes.values():
            one.update(ZEROS[:length])
        length -= len(ZEROS)
