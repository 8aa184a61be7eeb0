"""OVA: the one disk that the description leads to, digests, and descriptions that lead elsewhere."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.tar_archives import END, gnu_sparse, member
from imagekit.errors import CorruptImage, ImagekitError, UnsafeImage, UnsupportedFeature
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.progress import SILENT
from imagekit.wrappers.ova import MAX_OVF, open_ova
from imagekit.wrappers.parts import Member
from imagekit.wrappers.unwrap import DEFAULT_LIMITS, WrapperLimits, detect, unwrap
from tests.disks import noise, text

KiB, MiB = 1 << 10, 1 << 20
DISK = noise(5000) + bytes(20_000)
NAMESPACES = {
    "1": "http://schemas.dmtf.org/ovf/envelope/1",
    "2": "http://schemas.dmtf.org/ovf/envelope/2",
    "vmware": "http://www.vmware.com/schema/ovf/1/envelope",
}
FILE = f'<File ovf:href="disk1.vmdk" ovf:id="file1" ovf:size="{len(DISK)}"/>'
DISK_ELEMENT = (
    '<Disk ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30" ovf:diskId="d1" ovf:fileRef="file1"/>'
)


def ovf(
    files: str = FILE, disks: str = DISK_ELEMENT, *, version: str = "1", before: str = "", more: str = ""
) -> bytes:
    """A description as ovftool and VirtualBox write them: what leads to the disk, and some that does not."""
    return f"""<?xml version="1.0" encoding="UTF-8"?>{before}
<Envelope xmlns="{NAMESPACES[version]}" xmlns:ovf="{NAMESPACES[version]}"
          xmlns:vbox="http://www.virtualbox.org/ovf/machine">
  <References>{files}</References>
  <DiskSection><Info>Disks</Info>{disks}</DiskSection>
  <VirtualSystem ovf:id="web"><Info>A machine</Info>
    <vbox:Machine><vbox:Disk fileRef="other"/><File ovf:href="/not/a/reference"/></vbox:Machine>{more}
  </VirtualSystem>
</Envelope>""".encode()


def manifest(*lines: tuple[str, str, bytes], template: str = "{algorithm}({name})= {digest}\n") -> bytes:
    return "".join(
        template.format(algorithm=algorithm, name=name, digest=hashlib.new(algorithm, data).hexdigest())
        for algorithm, name, data in lines
    ).encode()


def archive(*members: tuple[str, bytes]) -> bytes:
    return b"".join(member(name.encode(), data) for name, data in members) + END


def package(description: bytes | None = None, *more: tuple[str, bytes]) -> bytes:
    return archive(("web.ovf", description or ovf()), *more, ("disk1.vmdk", DISK))


@pytest.fixture
def ova(tmp_path: Path) -> Path:
    return tmp_path / "web.ova"


def chosen(path: Path, data: bytes, limits: WrapperLimits = DEFAULT_LIMITS) -> tuple[str, bytes, list[str]]:
    """Name and bytes of the disk, and the codes of the facts."""
    path.write_bytes(data)
    with LocalFile.open_source(path) as file, unwrap(file, limits=limits) as inner:
        assert inner.chain[0] == "ova"
        return inner.name, inner.file.pread(0, inner.file.size), [fact.code for fact in inner.facts]


# --- the disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", NAMESPACES)
def test_the_disk_of_the_description_is_it(version: str, ova: Path) -> None:
    data = package(ovf(version=version), ("other.vmdk", b"not in the description"))
    assert chosen(ova, data) == ("disk1.vmdk", DISK, [])


def test_the_description_may_stand_anywhere_and_be_named_from_the_folder(ova: Path) -> None:
    """As Vagrant packs VirtualBox machines."""
    files = [("./disk1.vmdk", DISK), ("./Vagrantfile", b"x"), ("./box.ovf", ovf())]
    assert detect(MemoryFile(archive(*files))) == "tar"
    assert chosen(ova, archive(*files)) == ("disk1.vmdk", DISK, [])


def test_attributes_may_be_without_a_namespace_and_sections_of_the_old_kind(ova: Path) -> None:
    description = (
        b'<ovf:Envelope xmlns:ovf="http://www.vmware.com/schema/ovf/1/envelope"><ovf:References>'
        b'<ovf:File href="disk1.vmdk" id="a"/></ovf:References>'
        b'<ovf:Section><ovf:Disk fileRef="a"/></ovf:Section></ovf:Envelope>'
    )
    assert chosen(ova, package(description)) == ("disk1.vmdk", DISK, [])


def test_a_name_may_be_escaped_as_in_a_url(ova: Path) -> None:
    files = '<File ovf:href="my%20disk.vmdk" ovf:id="file1"/>'
    data = archive(("web.ovf", ovf(files)), ("my disk.vmdk", DISK))
    assert chosen(ova, data)[0] == "my disk.vmdk"


def test_an_empty_disk_beside_it_does_not_count(ova: Path) -> None:
    disks = DISK_ELEMENT + '<Disk ovf:capacity="5" ovf:diskId="scratch"/>'
    assert chosen(ova, package(ovf(disks=disks)))[0] == "disk1.vmdk"


@pytest.mark.parametrize("said", ['ovf:compression="gzip"', ""], ids=["as described", "by content"])
def test_a_packed_disk_is_unpacked(said: str, ova: Path) -> None:
    files = f'<File ovf:href="disk1.vmdk.gz" ovf:id="file1" {said}/>'
    data = archive(("web.ovf", ovf(files)), ("disk1.vmdk.gz", gzip.compress(DISK)))
    assert chosen(ova, data) == ("disk1.vmdk", DISK, [])


def test_a_disk_described_as_packed_that_is_not_is_refused(ova: Path) -> None:
    files = '<File ovf:href="disk1.vmdk" ovf:id="file1" ovf:compression="gzip"/>'
    with pytest.raises(CorruptImage, match="described as packed with gzip, and is not"):
        chosen(ova, package(ovf(files)))


def test_a_packed_package_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "web.ova.gz"
    path.write_bytes(gzip.compress(package()))
    with LocalFile.open_source(path) as file, unwrap(file) as inner:
        assert (inner.chain, inner.name) == (("gzip", "ova"), "disk1.vmdk")


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "href",
    [
        "/etc/passwd",
        "../disk1.vmdk",
        "folder/disk1.vmdk",
        "folder\\disk1.vmdk",
        "http://example.com/disk1.vmdk",
        "file:disk1.vmdk",
        "C:disk1.vmdk",
        "..",
        "",
        "..%2Fdisk1.vmdk",
        "%2fetc%2fpasswd",
    ],
)
@pytest.mark.parametrize("of_the_disk", [True, False], ids=["the disk's", "another's"])
def test_a_reference_that_leads_out_of_the_package_is_refused(href: str, of_the_disk: bool, ova: Path) -> None:
    files = f'<File ovf:href="{href}" ovf:id="{"file1" if of_the_disk else "file2"}"/>'
    data = package(ovf(files if of_the_disk else FILE + files), (href or "x", DISK))
    with pytest.raises(UnsafeImage, match="the description refers to") as caught:
        chosen(ova, data)
    assert caught.value.rule == "wrapper-reference"


@pytest.mark.parametrize(
    "before",
    [
        "<!DOCTYPE Envelope>",
        '<!DOCTYPE Envelope SYSTEM "file:///etc/passwd">',
        '<!DOCTYPE Envelope [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE Envelope [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
        '<!DOCTYPE Envelope [<!ENTITY % x SYSTEM "http://example.com/x"> %x;]>',
    ],
    ids=["bare", "system", "entity", "laughs", "parameter"],
)
def test_a_document_type_is_refused(before: str, ova: Path) -> None:
    with pytest.raises(UnsafeImage, match="document type or entities") as caught:
        chosen(ova, package(ovf(before=before)))
    assert caught.value.rule == "wrapper-reference"


def test_two_disks_are_refused_by_their_names(ova: Path) -> None:
    files = FILE + '<File ovf:href="data.vmdk" ovf:id="file2"/>'
    disks = DISK_ELEMENT + '<Disk ovf:diskId="d2" ovf:fileRef="file2"/>'
    with pytest.raises(UnsupportedFeature, match=r"2 disks: 'disk1\.vmdk', 'data\.vmdk'"):
        chosen(ova, package(ovf(files, disks), ("data.vmdk", b"x")))


@pytest.mark.parametrize(
    ("files", "disks", "message"),
    [
        (FILE, "", "no disk with content"),
        (FILE, '<Disk ovf:diskId="d1" ovf:fileRef="file1" ovf:parentRef="d0"/>', "based on another one"),
        (FILE.replace("/>", ' ovf:chunkSize="1000"/>'), DISK_ELEMENT, "in chunks"),
        (FILE.replace("/>", ' ovf:compression="bzip2"/>'), DISK_ELEMENT, "packed with 'bzip2'"),
    ],
    ids=["none", "parent", "chunks", "compression"],
)
def test_what_is_not_read_is_said(files: str, disks: str, message: str, ova: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=message):
        chosen(ova, package(ovf(files, disks)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("", "refers to a file 'file1' that is not listed"),
        ('<File ovf:href="missing.vmdk" ovf:id="file1"/>', r"'missing\.vmdk' is not in the package"),
        (FILE + FILE, "two files have the id 'file1'"),
        (FILE.replace("25000", "25001"), "has 25000 bytes, the description says '25001'"),
        (FILE.replace("25000", "many"), "the description says 'many'"),
        (FILE.replace('ovf:id="file1"', 'ovf:id="file1" id="file2"'), "given twice, and differently"),
    ],
    ids=["not listed", "missing", "twice", "size", "no size", "two ids"],
)
def test_a_description_that_contradicts_itself_or_the_package_is_refused(files: str, message: str, ova: Path) -> None:
    with pytest.raises(CorruptImage, match=message):
        chosen(ova, package(ovf(files)))


@pytest.mark.parametrize(
    "description",
    [
        b"",
        b"no xml",
        b"<Envelope>",
        b"<a/>",
        ovf()[:-3],
        ovf() + b"<x/>",
        ovf().replace(b"UTF-8", b"klingon"),
        ovf().replace(b"UTF-8", b"gb18030"),
        ovf().replace(b"UTF-8", b"hex"),
        ovf(more="<x>" * 100 + "</x>" * 100),
        b"\xff\xfe" + b"<\0",
    ],
    ids=["empty", "text", "open", "root", "cut", "two", "encoding", "multi-byte", "codec", "deep", "utf-16"],
)
def test_a_description_that_is_none_is_refused(description: bytes, ova: Path) -> None:
    with pytest.raises(CorruptImage):
        chosen(ova, archive(("web.ovf", description), ("disk1.vmdk", DISK)))


def test_a_description_of_any_length_is_not_read(ova: Path) -> None:
    with pytest.raises(UnsafeImage, match="bytes, at most") as caught:
        chosen(ova, package(ovf(more="x" * MAX_OVF)))
    assert caught.value.rule == "wrapper-limit"


def test_two_descriptions_are_refused(ova: Path) -> None:
    with pytest.raises(UnsupportedFeature, match=r"more than one \.ovf file"):
        chosen(ova, package(None, ("other.ovf", ovf())))


@given(at=st.integers(0, len(ovf()) - 1), value=st.sampled_from(b"<>&\"' /:\0\xff"))
def test_any_damage_to_the_description_is_read_or_refused(at: int, value: int) -> None:
    description = bytearray(ovf())
    description[at] = value
    members = [
        Member(name, len(data), lambda data=data: iter([(0, data)]))  # type: ignore[misc]
        for name, data in (("web.ovf", bytes(description)), ("disk1.vmdk", DISK))
    ]
    try:
        assert open_ova(MemoryFile(), members, DEFAULT_LIMITS, SILENT).disk.name == "disk1.vmdk"
    except ImagekitError as error:
        assert type(error) in (CorruptImage, UnsupportedFeature, UnsafeImage)


# --- the manifest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["SHA1", "SHA256", "SHA384", "SHA512"])
@pytest.mark.parametrize(
    "template", ["{algorithm}({name})= {digest}\n", "{algorithm} ({name}) = {digest}\r\n\n"], ids=["ovftool", "loose"]
)
def test_right_digests_are_accepted(algorithm: str, template: str, ova: Path) -> None:
    lines = manifest((algorithm, "web.ovf", ovf()), (algorithm, "disk1.vmdk", DISK), template=template)
    assert chosen(ova, package(None, ("web.mf", lines))) == ("disk1.vmdk", DISK, [])


@pytest.mark.parametrize("wrong", ["web.ovf", "disk1.vmdk", "nvram"])
def test_a_wrong_digest_of_any_member_is_refused(wrong: str, ova: Path) -> None:
    content = {"web.ovf": ovf(), "disk1.vmdk": DISK, "nvram": text(2 * MiB + 3)}
    lines = manifest(*(("SHA256", name, data + b"!" * (name == wrong)) for name, data in content.items()))
    data = archive(*content.items(), ("web.mf", lines))
    with pytest.raises(CorruptImage, match=f"'{wrong}' has the SHA256"):
        chosen(ova, data)


def test_digests_are_of_all_bytes_of_a_sparse_disk_too(ova: Path) -> None:
    pieces = [(4096, noise(3000)), (3 * MiB, b"x")]
    disk = bytearray(4 * MiB)
    for offset, data in pieces:
        disk[offset : offset + len(data)] = data
    files = '<File ovf:href="disk1.vmdk" ovf:id="file1"/>'
    for content, right in ((bytes(disk), True), (bytes(disk)[:-1], False)):
        head = archive(("web.ovf", ovf(files)), ("web.mf", manifest(("SHA1", "disk1.vmdk", content))))
        whole = head[: -len(END)] + gnu_sparse(b"disk1.vmdk", len(disk), pieces) + END
        if right:
            assert chosen(ova, whole)[1] == disk
        else:
            with pytest.raises(CorruptImage, match="has the SHA1"):
                chosen(ova, whole)


def test_two_digests_of_one_member_are_both_checked(ova: Path) -> None:
    lines = manifest(("SHA256", "disk1.vmdk", DISK), ("SHA1", "disk1.vmdk", DISK + b"!"))
    with pytest.raises(CorruptImage, match="has the SHA1"):
        chosen(ova, package(None, ("web.mf", lines)))


def test_a_member_that_the_manifest_lists_must_be_there(ova: Path) -> None:
    with pytest.raises(CorruptImage, match=r"lists 'disk2\.vmdk', which is not in the package"):
        chosen(ova, package(None, ("web.mf", manifest(("SHA1", "disk2.vmdk", b"")))))


def test_a_manifest_without_the_disk_is_a_finding(ova: Path) -> None:
    data = package(None, ("web.mf", manifest(("SHA1", "web.ovf", ovf()))))
    assert chosen(ova, data)[2] == ["ova-manifest-incomplete"]


def test_a_signature_is_a_finding(ova: Path) -> None:
    lines = manifest(("SHA1", "web.ovf", ovf()), ("SHA1", "disk1.vmdk", DISK))
    assert chosen(ova, package(None, ("web.mf", lines), ("web.cert", b"x")))[2] == ["ova-signature"]


@pytest.mark.parametrize(
    "line", ["SHA1 web.ovf", "SHA1(web.ovf)=", "SHA1(web.ovf)= xyz", "(web.ovf)= 00", "\0\xff"], ids=repr
)
def test_a_line_that_is_no_digest_is_refused(line: str, ova: Path) -> None:
    with pytest.raises(CorruptImage, match="line 2 of the manifest"):
        chosen(ova, package(None, ("web.mf", b"\n" + line.encode("latin-1"))))


def test_an_unknown_digest_is_named(ova: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="uses 'MD5'"):
        chosen(ova, package(None, ("web.mf", b"MD5(disk1.vmdk)= 00")))
