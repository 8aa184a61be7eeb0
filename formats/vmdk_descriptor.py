"""The text that describes a VMDK: its kind, its parent, and the extents that make up the disk.

It is a file of its own, with the data in others, or lies inside a sparse file and describes that. What VMware,
VirtualBox and QEMU write is understood; the rest of it is not skipped but said, since another program may take it
for what this one does not see: a key twice, an unknown key, text behind the end, lines hidden in lines.

    # Disk DescriptorFile
    version=1
    CID=fffffffe
    parentCID=ffffffff
    createType="monolithicFlat"
    RW 8192 FLAT "disk-flat.vmdk" 0
    ddb.adapterType = "lsilogic"

Names are text in the encoding that the descriptor names. Nothing here opens them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from imagekit.errors import InvalidImage
from imagekit.formats.base import SECTOR, Fact, KiB, Reference
from imagekit.records import dataclass, field

MAX_DESCRIPTOR = 64 * KiB
NO_PARENT = 0xFFFFFFFF
BOM = codecs.BOM_UTF8

FLAT_TYPES = frozenset({"FLAT", "VMFS"})
SPARSE_TYPES = frozenset({"SPARSE", "VMFSSPARSE", "SESPARSE"})
DEVICE_TYPES = frozenset({"VMFSRDM", "VMFSRAW"})
EMBEDDED_KINDS = frozenset({"monolithicsparse", "streamoptimized"})
"""Kinds of disks that are one file, and have their descriptor inside."""

MAX_EXTENT = 1 << 53
"""Sectors."""

# What may stand before "=", in lower case. ``ddb.`` and what follows is VMware's database of the virtual hardware.
_KEYS = frozenset(
    {
        "version",
        "encoding",
        "cid",
        "parentcid",
        "isnativesnapshot",
        "createtype",
        "parentfilenamehint",
        "changetrackpath",
    }
)
_VERSIONS = frozenset({"1", "2", "3", "4"})

_PAIR = re.compile(r"([A-Za-z][\w.\-]*(?: +[\w.\-]+)*)\s*=\s*(.*)")
_EXTENT = re.compile(
    r"(RW|RDONLY|NOACCESS)[ \t]+(\d{1,20})[ \t]+([A-Za-z0-9]+)"
    r'(?:[ \t]+"([^"]*)")?(?:[ \t]+(\d{1,20}))?',
    re.IGNORECASE | re.ASCII,
)
_ACCESS = re.compile(r"(?:RW|RDONLY|NOACCESS)\b", re.IGNORECASE)
_SIGNATURE = re.compile(rb"#[ \t]*disk[ \t]*descriptorfile")
_VERSION = re.compile(rb"version[ \t]*=[ \t]*[\"']?[0-9]")
_CID = re.compile(r"[0-9A-Fa-f]{1,8}")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

# Python has codecs that are no character sets, so a name from a file is looked up here only.
_CODE_PAGES = frozenset({"874", "932", "936", "949", "950", *(str(page) for page in range(1250, 1259))})
_CHARSETS = {
    "utf8": "utf-8",
    "usascii": "ascii",
    "shiftjis": "cp932",
    "gbk": "gbk",
    "gb2312": "gbk",
    "gb18030": "gb18030",
    "big5": "big5",
    "eucjp": "euc_jp",
    "euckr": "euc_kr",
}


@dataclass(frozen=True, slots=True)
class ExtentLine:
    """One line of the disk: so many sectors of one type, from a file or of zeros."""

    access: str
    sectors: int
    type: str
    name: str = ""
    offset: int = 0
    """Sectors; where the disk's bytes begin in a flat file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.sectors * SECTOR

    def reference(self) -> Reference | None:
        """The file that the line names, as what it is to be opened."""
        if self.type == "ZERO":
            return None
        return Reference("extent-file", self.name, "vmdk" if self.type in SPARSE_TYPES else "raw")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a descriptor says, and what was odd about it."""

    create_type: str
    extents: tuple[ExtentLine, ...]
    version: str = "1"
    cid: int | None = None
    parent_cid: int = NO_PARENT
    parent_name: str | None = None
    encoding: str | None = None
    database: dict[str, str] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()

    @classmethod
    def parse(cls, data: bytes, *, offset: int = 0) -> Descriptor:
        """From the bytes of the file or of the place kept for it. ``offset`` is where they lie, for messages."""
        if len(data) > MAX_DESCRIPTOR:
            raise InvalidImage(f"a descriptor of {len(data)} bytes, at most {MAX_DESCRIPTOR} are read", offset=offset)
        return _Parser(data, offset).descriptor()

    @classmethod
    def embedded(cls, data: bytes, *, offset: int) -> Descriptor | None:
        """From the place kept for it inside a sparse file; None where it is empty, as in a part of a larger disk."""
        return cls.parse(data, offset=offset) if data.count(0) != len(data) else None

    @property
    def size(self) -> int:
        """Bytes of all extents together."""
        return sum(one.size for one in self.extents)

    def parent(self) -> Reference | None:
        """The disk that this one is the difference to."""
        if self.parent_cid == NO_PARENT and self.parent_name is None:
            return None
        return Reference("parent-file", self.parent_name or "", "vmdk")

    def embedded_facts(self, virtual_size: int) -> Iterator[Fact]:
        """What is odd when this lies inside the sparse file that it should describe, of so many bytes."""
        wrong = None
        if self.create_type.lower() not in EMBEDDED_KINDS:
            wrong = f"is of a disk of another kind ({self.create_type!r})"
        elif len(self.extents) != 1 or self.extents[0].type != "SPARSE":
            wrong = f"lists other data ({', '.join(one.type for one in self.extents[:5]) or 'nothing at all'})"
        elif not is_plain_name(self.extents[0].name):
            wrong = f"names a file elsewhere ({self.extents[0].name!r})"
        if wrong is not None:
            yield Fact("embedded-extent", f"the file holds the data itself, but the descriptor in it {wrong}")
        elif self.size != virtual_size:
            yield Fact(
                "descriptor-size-differs",
                f"the descriptor says {self.size} bytes, the header {virtual_size}",
            )


def is_plain_name(name: str) -> bool:
    """Whether a name can only be that of a file in the same folder."""
    return name not in ("", ".", "..") and not any(one in '/\\:|<>"?*' or ord(one) < 32 for one in name)


def looks_like_descriptor(head: bytes) -> bool:
    """Whether a file that starts like this is a descriptor: its first line says so, or the first that is no comment.

    QEMU takes a file for one by ``version=`` alone, so that counts as well.
    """
    for line in head.removeprefix(BOM).split(b"\n"):
        text = line.strip(b" \t\r\v\f").lower()
        if _SIGNATURE.match(text):
            return True
        if text and not text.startswith(b"#"):
            return _VERSION.match(text) is not None
    return False


def codec(name: str | None) -> str | None:
    """Python's name of a character set, None for one that is not known."""
    if name is None:
        return "utf-8"
    plain = re.sub(r"[-_ ]", "", name.lower())
    if plain in _CHARSETS:
        return _CHARSETS[plain]
    if plain.startswith("windows") and plain[7:] in _CODE_PAGES:
        return f"cp{plain[7:]}"
    if plain.startswith("iso8859") and plain[7:] in {"1", "2", "3", "4", "5", "6", "7", "8", "9", "13", "15"}:
        return f"iso8859-{plain[7:]}"
    return None


class _Parser:
    """Goes through the lines once. Bytes are characters until the encoding is known: no character set listed above
    uses the bytes of a line end or a quote within another character."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._at = offset
        self._facts: list[Fact] = []
        self._pairs: dict[str, str] = {}
        self._database: dict[str, str] = {}
        self._lines: list[re.Match[str]] = []
        text, _, behind = data.removeprefix(BOM).partition(b"\0")
        if behind.strip(b"\0"):
            self._fact("descriptor-hidden-text", "there is more behind the end of the descriptor's text")
        for line in text.decode("latin-1").split("\n"):
            self._line(line.strip(" \t\r"))

    def _fact(self, code: str, message: str) -> None:
        if not any(one.code == code for one in self._facts):
            self._facts.append(Fact(code, message, self._at))

    def _invalid(self, message: str) -> InvalidImage:
        return InvalidImage(message, offset=self._at)

    def _line(self, line: str) -> None:
        if _CONTROL.search(line):
            self._fact("descriptor-hidden-text", f"control characters within a line: {line[:60]!r}")
        if not line or line.startswith("#"):
            return
        if _ACCESS.match(line):
            extent = _EXTENT.fullmatch(line)
            if extent is None:
                raise self._invalid(f"an extent line that cannot be understood: {line[:100]!r}")
            self._lines.append(extent)
            return
        pair = _PAIR.fullmatch(line)
        if pair is None:
            raise self._invalid(f"a descriptor line that cannot be understood: {line[:100]!r}")
        self._pair(pair[1].lower(), pair[2].strip())

    def _pair(self, key: str, value: str) -> None:
        if key.startswith("ddb."):
            self._database[key] = value.strip('"')
            return
        if value.startswith('"') or value.endswith('"'):
            if len(value) < 2 or not (value.startswith('"') and value.endswith('"')) or '"' in value[1:-1]:
                raise self._invalid(f"the quotes of the descriptor's {key} do not match: {value[:100]!r}")
            value = value[1:-1]
        if key not in _KEYS:
            self._fact("descriptor-unknown-key", f"the descriptor says {key!r}, which imagekit does not know")
        elif key in self._pairs:
            self._fact("descriptor-repeated-key", f"the descriptor says {key!r} twice")
        self._pairs.setdefault(key, value)

    # --- what the lines mean ---------------------------------------------------------------------------------

    def descriptor(self) -> Descriptor:
        pairs = self._pairs
        if "createtype" not in pairs:
            raise self._invalid("the descriptor has no createType")
        version, encoding = pairs.get("version", "1"), pairs.get("encoding")
        if version not in _VERSIONS:
            self._fact("unknown-feature", f"descriptor version {version[:20]!r}")
        charset = codec(encoding)
        parent = pairs.get("parentfilenamehint")
        parent_cid = self._cid("parentcid")
        return Descriptor(
            create_type=pairs["createtype"],
            extents=tuple(self._extent(one, charset) for one in self._lines),
            version=version,
            cid=self._cid("cid"),
            parent_cid=NO_PARENT if parent_cid is None else parent_cid,
            parent_name=None if parent is None else _decoded(parent, charset),
            encoding=encoding,
            database=self._database,
            facts=tuple(self._facts),
        )

    def _cid(self, key: str) -> int | None:
        value = self._pairs.get(key)
        if value is None:
            return None
        if not _CID.fullmatch(value):
            raise self._invalid(f"the descriptor's {key} is {value[:40]!r}, expected up to 8 hexadecimal digits")
        return int(value, 16)

    def _extent(self, found: re.Match[str], charset: str | None) -> ExtentLine:
        access, sectors, kind, name, offset = found.groups()
        kind, line = kind.upper(), found[0][:100]
        named = kind in FLAT_TYPES | SPARSE_TYPES | DEVICE_TYPES
        if not named and kind != "ZERO":
            raise self._invalid(f"an extent of unknown type {kind!r}: {line!r}")
        if named != bool(name):
            raise self._invalid(f"an extent of type {kind} {'without' if named else 'with'} a file name: {line!r}")
        # Where a flat file's bytes begin: said for FLAT, the start for VMFS. The others have tables.
        if (offset is None and kind == "FLAT") or (offset is not None and kind not in FLAT_TYPES):
            raise self._invalid(f"an extent of type {kind} {'with' if offset else 'without'} an offset: {line!r}")
        if not 0 < int(sectors) <= MAX_EXTENT or int(offset or 0) > MAX_EXTENT:
            raise self._invalid(f"an extent of an impossible size: {line!r}")
        return ExtentLine(access.upper(), int(sectors), kind, _decoded(name or "", charset), int(offset or 0))


def _decoded(text: str, charset: str | None) -> str:
    return text.encode("latin-1").decode(charset or "utf-8", "backslashreplace")
