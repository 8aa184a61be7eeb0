"""VMDK descriptors: what other programs write is understood, and nothing else is passed over in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.vmdk_images import descriptor
from imagekit.errors import ImagekitError, InvalidImage
from imagekit.formats.base import Reference
from imagekit.formats.vmdk_descriptor import (
    MAX_DESCRIPTOR,
    Descriptor,
    ExtentLine,
    codec,
    is_plain_name,
    looks_like_descriptor,
)

FLAT = 'RW 8192 FLAT "disk-flat.vmdk" 0'


def parsed(*extents: str, **options: str) -> Descriptor:
    return Descriptor.parse(descriptor("monolithicFlat", *extents, **options))


def codes(data: bytes) -> list[str]:
    return [fact.code for fact in Descriptor.parse(data).facts]


# --- what is understood ----------------------------------------------------------------------------------------


def test_a_descriptor_says_what_the_disk_consists_of() -> None:
    found = parsed(FLAT, more="encoding=windows-1252\nisNativeSnapshot=no")
    assert (found.create_type, found.version, found.cid, found.parent_cid) == (
        "monolithicFlat",
        "1",
        0x1A2B3C4D,
        0xFFFFFFFF,
    )
    assert found.extents == (ExtentLine("RW", 8192, "FLAT", "disk-flat.vmdk", 0),)
    assert (found.size, found.parent(), found.facts) == (4 << 20, None, ())
    assert found.database == {"ddb.virtualhwversion": "4", "ddb.adaptertype": "lsilogic"}


@pytest.mark.parametrize(
    ("line", "extent"),
    [
        ('RW 8192 FLAT "a b.vmdk" 63', ExtentLine("RW", 8192, "FLAT", "a b.vmdk", 63)),
        ('rdonly 1 sparse "a.vmdk"', ExtentLine("RDONLY", 1, "SPARSE", "a.vmdk")),
        ("NOACCESS\t5   ZERO", ExtentLine("NOACCESS", 5, "ZERO")),
        ("RW 5 ZERO", ExtentLine("RW", 5, "ZERO")),
        ('RW 5 VMFS "a-flat.vmdk"', ExtentLine("RW", 5, "VMFS", "a-flat.vmdk")),
        ('RW 5 VMFS "a-flat.vmdk" 0', ExtentLine("RW", 5, "VMFS", "a-flat.vmdk")),
        ('RW 5 VMFSSPARSE "a-delta.vmdk"', ExtentLine("RW", 5, "VMFSSPARSE", "a-delta.vmdk")),
        ('RW 5 SESPARSE "a-sesparse.vmdk"', ExtentLine("RW", 5, "SESPARSE", "a-sesparse.vmdk")),
        ('RW 5 VMFSRDM "a-rdm.vmdk"', ExtentLine("RW", 5, "VMFSRDM", "a-rdm.vmdk")),
        ('RW 5 FLAT "/dev/sda" 2', ExtentLine("RW", 5, "FLAT", "/dev/sda", 2)),
    ],
)
def test_every_type_of_extent_is_known(line: str, extent: ExtentLine) -> None:
    assert parsed(line).extents == (extent,)


@pytest.mark.parametrize(
    ("line", "reference"),
    [
        (FLAT, Reference("extent-file", "disk-flat.vmdk", "raw")),
        ('RW 5 VMFS "a"', Reference("extent-file", "a", "raw")),
        ('RW 5 VMFSRDM "a"', Reference("extent-file", "a", "raw")),
        ('RW 5 SPARSE "a"', Reference("extent-file", "a", "vmdk")),
        ('RW 5 SESPARSE "a"', Reference("extent-file", "a", "vmdk")),
        ("RW 5 ZERO", None),
    ],
)
def test_what_an_extent_names_is_a_reference(line: str, reference: Reference | None) -> None:
    assert parsed(line).extents[0].reference() == reference


@pytest.mark.parametrize(
    "data",
    [
        descriptor("monolithicFlat", FLAT, newline="\r\n"),
        b"\xef\xbb\xbf" + descriptor("monolithicFlat", FLAT),
        descriptor("monolithicFlat", FLAT) + bytes(900),
        descriptor("monolithicFlat", FLAT).replace(b"\nCID=", b"\n cId\t= ").replace(b"createType", b"CREATETYPE"),
        descriptor("monolithicFlat", FLAT).replace(b'"monolithicFlat"', b"monolithicFlat"),
        descriptor("monolithicFlat", FLAT).replace(b"version=1", b'version = "1"'),
    ],
    ids=["CRLF", "BOM", "padding", "case and space", "no quotes", "more quotes"],
)
def test_how_it_is_written_does_not_matter(data: bytes) -> None:
    found = Descriptor.parse(data)
    assert (found.create_type, found.cid) == ("monolithicFlat", 0x1A2B3C4D)
    assert found.extents == (ExtentLine("RW", 8192, "FLAT", "disk-flat.vmdk", 0),)
    assert found.facts == ()


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        (None, "grün.vmdk"),
        ("UTF-8", "仮想.vmdk"),
        ("windows-1252", "grün€.vmdk"),
        ("ISO-8859-1", "grün.vmdk"),
        ("Shift_JIS", "表示.vmdk"),
        ("windows-936", "虚拟.vmdk"),
        ("GBK", "虚拟.vmdk"),
        ("Big5", "功能.vmdk"),
    ],
)
def test_names_are_in_the_encoding_that_the_descriptor_names(encoding: str | None, name: str) -> None:
    """In Shift JIS and Big5 a character may hold the byte of a backslash."""
    line = f'RW 8192 FLAT "{name}" 0'.encode(codec(encoding) or "")
    more = "" if encoding is None else f'encoding="{encoding}"'
    data = descriptor("monolithicFlat", "EXTENT", more=more).replace(b"EXTENT", line)
    assert Descriptor.parse(data).extents[0].name == name


@pytest.mark.parametrize(
    "encoding", ["rot13", "zip", "unicode_escape", "idna", "punycode", "undefined", "utf-7", "x"]
)
def test_what_is_no_character_set_is_not_used_as_one(encoding: str) -> None:
    assert codec(encoding) is None
    found = parsed('RW 8192 FLAT "\\u0041%41.vmdk" 0', more=f"encoding={encoding}")
    assert found.extents[0].name == "\\u0041%41.vmdk"


def test_bytes_that_are_no_text_are_shown_as_numbers() -> None:
    data = descriptor("monolithicFlat", 'RW 8192 FLAT "EXTENT" 0').replace(b"EXTENT", b"a\xff")
    assert Descriptor.parse(data).extents[0].name == "a\\xff"


@pytest.mark.parametrize(
    ("parent", "more", "reference"),
    [
        ("ffffffff", "", None),
        ("FFFFFFFF", "", None),
        ("0", "", Reference("parent-file", "", "vmdk")),
        ("12345678", "", Reference("parent-file", "", "vmdk")),
        ("12345678", 'parentFileNameHint="b.vmdk"', Reference("parent-file", "b.vmdk", "vmdk")),
        ("ffffffff", 'parentFileNameHint="b.vmdk"', Reference("parent-file", "b.vmdk", "vmdk")),
        ("ffffffff", 'parentFileNameHint=""', Reference("parent-file", "", "vmdk")),
    ],
)
def test_either_sign_of_a_parent_is_one(parent: str, more: str, reference: Reference | None) -> None:
    assert parsed(FLAT, parent=parent, more=more).parent() == reference


# --- what another program may see differently ------------------------------------------------------------------

GOOD = descriptor("monolithicFlat", FLAT)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (GOOD, []),
        (GOOD + b"\0" + b'createType="vmfs"\n', ["descriptor-hidden-text"]),
        (GOOD + bytes(500) + b"x", ["descriptor-hidden-text"]),
        (GOOD.replace(b"# Ext", b'# \rcreateType="vmfs"\r# Ext'), ["descriptor-hidden-text"]),
        (GOOD.replace(b"# Ext", b"# \x0b\x1b[2J"), ["descriptor-hidden-text"]),
        (GOOD + b'createType="vmfs"\n', ["descriptor-repeated-key"]),
        (GOOD + b'CREATETYPE = "monolithicFlat"\n', ["descriptor-repeated-key"]),
        (GOOD + b"parentCID=ffffffff\n", ["descriptor-repeated-key"]),
        (GOOD + b'ddb.adapterType = "ide"\n', []),
        (GOOD + b'changeTrackPath="a-ctk.vmdk"\n', []),
        (GOOD + b'iofilters="vmwarevmcrypt"\n', ["descriptor-unknown-key"]),
        (GOOD + b"create type=x\n", ["descriptor-unknown-key"]),
        (GOOD.replace(b"version=1", b"version=5"), ["unknown-feature"]),
        (GOOD.replace(b"version=1", b"version=4"), []),
        (
            GOOD + b"a=1\nb=2\nCID=0\0x",
            ["descriptor-hidden-text", "descriptor-unknown-key", "descriptor-repeated-key"],
        ),
    ],
)
def test_what_is_odd_is_a_fact_and_the_first_of_two_counts(data: bytes, code: list[str]) -> None:
    assert codes(data) == code
    assert Descriptor.parse(data).create_type == "monolithicFlat"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"createType", b"# createType", "has no createType"),
        (FLAT.encode(), b'RW 8192 MAGIC "a" 0', "an extent of unknown type 'MAGIC'"),
        (FLAT.encode(), b'RW 8192 FLAT "a"', "an extent of type FLAT without an offset"),
        (FLAT.encode(), b'RW 8192 SPARSE "a" 1', "an extent of type SPARSE with an offset"),
        (FLAT.encode(), b"RW 8192 FLAT 0", "an extent of type FLAT without a file name"),
        (FLAT.encode(), b'RW 8192 FLAT "" 0', "an extent of type FLAT without a file name"),
        (FLAT.encode(), b'RW 8192 ZERO "a"', "an extent of type ZERO with a file name"),
        (FLAT.encode(), b'RW 0 FLAT "a" 0', "an extent of an impossible size"),
        (FLAT.encode(), b'RW 99999999999999999999 FLAT "a" 0', "an extent of an impossible size"),
        (FLAT.encode(), b'RW 999999999999999999999 FLAT "a" 0', "cannot be understood"),
        (FLAT.encode(), b'RW 8192 FLAT "a" 99999999999999999999', "an extent of an impossible size"),
        (FLAT.encode(), b'RW -1 FLAT "a" 0', "an extent line that cannot be understood"),
        (FLAT.encode(), b'RW 8192 FLAT "a" 0 partitionUUID x', "an extent line that cannot be understood"),
        (FLAT.encode(), b'RW 8192 FLAT "a" "b" 0', "an extent line that cannot be understood"),
        (b"CID=1a2b3c4d", b"CID=1a2b3c4d5", "cid is '1a2b3c4d5'"),
        (b"parentCID=ffffffff", b"parentCID=none", "parentcid is 'none'"),
        (b"# The Disk", b"The Disk", "a descriptor line that cannot be understood"),
        (b'"monolithicFlat"', b'"monolithicFlat', "quotes of the descriptor's createtype do not match"),
        (b'"monolithicFlat"', b'"a" "b"', "quotes of the descriptor's createtype do not match"),
    ],
)
def test_what_cannot_be_understood_is_an_error(old: bytes, new: bytes, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidImage, match=message):
        Descriptor.parse(GOOD.replace(old, new, 1))


def test_a_descriptor_has_64_kib_at_most() -> None:
    """Comments before what counts change nothing: all of it is read, or none."""
    long = GOOD.replace(b"version", b"#" * (MAX_DESCRIPTOR - len(GOOD) - 1) + b"\nversion")
    assert len(long) == MAX_DESCRIPTOR
    assert Descriptor.parse(long).extents == Descriptor.parse(GOOD).extents
    with pytest.raises(InvalidImage, match="a descriptor of 65537 bytes"):
        Descriptor.parse(long + b"#")


@given(
    st.lists(
        st.sampled_from([*GOOD.split(b"\n"), b'createType="vmfs"', b"\0", b"\r", b"RW", b'"', b"a=b"])
        | st.binary(max_size=9)
    )
)
def test_any_lines_are_understood_or_an_error(lines: list[bytes]) -> None:
    try:
        Descriptor.parse(b"\n".join(lines))
    except ImagekitError as error:
        assert error.exit_code in (11, 12)


@pytest.mark.parametrize("line", [b"a" + b" a" * 30000, b"a" + b" " * 60000, b"RW " + b"1" * 60000, b'a="' * 20000])
def test_long_lines_cost_little(line: bytes) -> None:
    """A pattern that goes back and forth would take minutes here."""
    with pytest.raises(InvalidImage):
        Descriptor.parse(line)


# --- small questions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.vmdk", "a b.vmdk", "generated-stream.vmdk", "grün-s001.vmdk", "..a"])
def test_a_plain_name_can_only_be_in_the_same_folder(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "../a", "a/b", "a\\b", "C:a", "nbd:h", "\\\\.\\PhysicalDrive0", "a\nb", "a|b"],
)
def test_any_other_name_can_lead_elsewhere(name: str) -> None:
    assert not is_plain_name(name)


def test_only_a_start_that_a_descriptor_has_looks_like_one() -> None:
    assert looks_like_descriptor(GOOD)
    assert looks_like_descriptor(b"#" * 5000 + b"\n# disk  DescriptorFile")
    assert not looks_like_descriptor(b"#" * 5000)
    assert not looks_like_descriptor(b"CID=1\nversion=1\n")
    assert not looks_like_descriptor(b"version=x")
