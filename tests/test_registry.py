"""Finding formats: both ends of a file, every format, and a new one by adding a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagekit.formats
from fixtures import qcow2_images, vdi_images, vhd_images, vmdk_images
from imagekit.conversion import convert_image
from imagekit.errors import UnknownFormat, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.files import MemoryFile
from imagekit.formats.registry import NAMED_ONLY, Claim, by_suffix, choose, find, formats, probe
from imagekit.plan import ConvertOptions
from imagekit.qemu_img import EXTERNAL_SOURCES
from imagekit.sources import open_source
from tests.disks import content, noise
from tests.samples import sample

QCOW2 = qcow2_images.make(qcow2_images.Recipe(size=1 << 20, cluster_bits=9)).data


def claims(data: bytes) -> list[str]:
    return [claim.format for claim in probe(MemoryFile(data))]


def test_the_formats_of_this_package_are_found_without_a_list_of_them() -> None:
    assert {"raw", "qcow2", "vhd", "vhdx"} <= set(formats())
    assert list(formats()) == sorted(formats())


def test_a_format_is_found_by_name_and_by_alias_in_any_case() -> None:
    assert find("VHD") is find("vpc") is formats()["vhd"]
    with pytest.raises(UnsupportedFeature, match="'floppy'") as caught:
        find("floppy")
    assert caught.value.hint is not None
    assert "qcow2" in caught.value.hint


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.vhd", "vhd"),
        ("A.VHD", "vhd"),
        ("x.y.qcow2", "qcow2"),
        ("z.vhdx", "vhdx"),
        ("snapshot.avhdx", "vhdx"),
        ("d.img", "raw"),
        ("dir.vhd/plain", None),
        ("", None),
    ],
)
def test_a_suffix_says_what_to_write(path: str, name: str | None) -> None:
    found = by_suffix(path)
    assert (found.name if found else None) == name


# --- what a file is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (QCOW2, ["qcow2"]),
        (vhd_images.dynamic(4096, {}, block_size=4096), ["vhd"]),
        (vhd_images.fixed(bytes(4096)), ["vhd"]),
        (vhd_images.fixed(bytes(4096), footer_length=511), ["vhd"]),
        (bytes(4096), []),
        (noise(4096), []),
        (b"", []),
        (b"Q", []),
        (b"conectix", ["vhd"]),
        (b"vhdxfile", ["vhdx"]),
        (b"QFI\xfb", ["qcow2"]),
        (vmdk_images.hosted(vmdk_images.Recipe(size=8192)).data, ["vmdk"]),
        (b"COWD", ["vmdk"]),
        (b"\xbe\xba\xfe\xca\0\0\0\0", ["vmdk"]),
        (vmdk_images.descriptor("monolithicFlat", 'RW 8 FLAT "a" 0'), ["vmdk"]),
        (vdi_images.make(vdi_images.Recipe(size=8192)).data, ["vdi"]),
        (b"# Disk DescriptorFile\n".ljust(64, b"#") + b"\x7f\x10\xda\xbe", ["vdi", "vmdk"]),
    ],
    ids=[
        "qcow2",
        "dynamic",
        "fixed",
        "511",
        "zeros",
        "noise",
        "empty",
        "a byte",
        "a cookie",
        "an identifier",
        "a magic",
        "vmdk",
        "COWD",
        "SESparse",
        "vmdk text",
        "vdi",
        "vdi in a vmdk text",
    ],
)
def test_every_format_is_asked_about_both_ends(data: bytes, expected: list[str]) -> None:
    assert claims(data) == expected


@pytest.mark.parametrize(("name", "offset", "magic"), NAMED_ONLY, ids=[f"{one[0]}-{one[2]!r}" for one in NAMED_ONLY])
def test_a_format_known_by_name_only_is_never_raw(name: str, offset: int, magic: bytes) -> None:
    file = MemoryFile(bytes(offset) + magic + bytes(1000))
    assert [claim.format for claim in probe(file)] == [name]
    if name not in formats():
        with pytest.raises(UnsupportedFeature, match=f"this is a {name} image") as caught:
            choose(file, probe(file))
        assert caught.value.hint is not None
        assert "-f raw" in caught.value.hint
        assert (f"-f {name} --allow external-qemu-img" in caught.value.hint) == (name in EXTERNAL_SOURCES)


def test_a_file_that_is_two_things_has_two_answers() -> None:
    """The start says one format, the end another: the policy refuses it, nobody picks."""
    assert claims(QCOW2 + vhd_images.Footer(size=512, disk_type=2).bytes()) == ["qcow2", "vhd"]
    assert claims(vhd_images.fixed(b"vhdxfile" + bytes(504))) == ["vhd", "vhdx"]
    assert claims(vhd_images.fixed(b"QED\0" + bytes(508))) == ["vhd", "qed"]


@pytest.mark.parametrize("length", [*range(1, 140), 511, 512, 513, 1023, 1024, 4096])
def test_what_starts_like_a_format_is_that_format_at_any_length(length: int) -> None:
    """A verdict that depends on how much of the file there is could be steered."""
    for data, name in ((QCOW2, "qcow2"), (vhd_images.dynamic(1 << 20, {}), "vhd")):
        found = claims(data[:length].ljust(length, b"\0"))
        magic = 4 if name == "qcow2" else 8
        assert found == ([name] if length >= magic else [])


def test_raw_is_what_nothing_else_claims_or_what_the_caller_says() -> None:
    zeros = MemoryFile(bytes(512))
    assert choose(zeros, []).name == "raw"
    file = MemoryFile(QCOW2)
    assert choose(file, probe(file)).name == "qcow2"
    assert choose(file, probe(file), "raw").name == "raw"
    assert choose(zeros, [], "vpc").name == "vhd"


def test_an_empty_file_is_no_image_whatever_the_caller_says() -> None:
    for declared in (None, "raw", "qcow2"):
        with pytest.raises(UnknownFormat, match="the file is empty"):
            choose(MemoryFile(), [], declared)


def test_a_declared_format_must_exist() -> None:
    with pytest.raises(UnsupportedFeature):
        choose(MemoryFile(bytes(512)), [], "floppy")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ext2.qcow2", ["qcow2"]),
        ("image.qcow", ["qcow2"]),
        ("fat-parent.vhd", ["vhd"]),
        ("win8-child.vhd", ["vhd"]),
        ("ext2.vhdx", ["vhdx"]),
        ("image.vmdk", ["vmdk"]),
        ("afl9.vmdk", ["vmdk"]),
        ("vmdk-monolith.img", ["vmdk"]),
        ("afl5.img", ["vhd"]),
    ],
)
def test_real_images_are_recognised_whatever_their_names(name: str, expected: list[str]) -> None:
    assert claims(sample(name).read_bytes()) == expected


# --- a format is a file ----------------------------------------------------------------------------------------

TOY = '''
"""The toy format: the guest's bytes, then eight bytes that say so."""

from imagekit.errors import CorruptImage
from imagekit.formats.base import DiskFormat, DiskImage, Fact, ImageInfo, Range, clip
from imagekit.formats.raw import FlatWriter, flat_extents, read_flat

TRAILER = b"TOY-DISK"


class ToyImage(DiskImage):
    def __init__(self, file):
        self.file = file
        self.virtual_size = file.size - len(TRAILER)
        if file.pread(self.virtual_size, 8) != TRAILER:
            raise CorruptImage("no toy trailer")

    def info(self):
        facts = (Fact("toy-is-small", "may be swallowed"),) if self.virtual_size < 4096 else ()
        return ImageInfo("toy", self.virtual_size, facts=facts)

    def extents(self, start=0, length=None):
        return flat_extents(self.file, *clip(start, length, self.virtual_size))

    def pread_into(self, offset, buffer):
        read_flat(self.file, offset, buffer)

    def ranges(self):
        yield Range(0, self.file.size, "data")

    def close(self):
        self.file.close()


class ToyFormat(DiskFormat):
    name = "toy"
    suffixes = (".toy",)
    subformats = ("wooden",)

    def probe(self, file):
        return "toy trailer" if file.pread(file.size - 8, 8) == TRAILER else None

    def open(self, file, *, resolver=None, options=None):
        return ToyImage(file)

    def writer(self, virtual_size, options):
        return FlatWriter(virtual_size, TRAILER)


FORMAT = ToyFormat()
'''


@pytest.fixture
def toy_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A format module in a folder that the package looks into: the same as a new file in formats/."""
    folder = tmp_path / "formats"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    monkeypatch.setattr(imagekit.formats, "__path__", [*imagekit.formats.__path__, str(folder)])
    formats.cache_clear()
    yield
    formats.cache_clear()
    sys.modules.pop("imagekit.formats.toy", None)
    vars(imagekit.formats).pop("toy", None)


@pytest.mark.usefixtures("toy_format")
class TestANewFormat:
    def test_it_is_found_by_name_by_suffix_and_by_content(self) -> None:
        assert find("toy").name == "toy"
        found = by_suffix("horse.toy")
        assert found is not None
        assert found.name == "toy"
        assert probe(MemoryFile(bytes(512) + b"TOY-DISK")) == [Claim("toy", "toy trailer")]

    def test_it_is_opened_and_judged_like_any_other(self, tmp_path: Path) -> None:
        """Also a fact that no rule is about: it is shown, and refuses nothing."""
        path = tmp_path / "horse.img"
        path.write_bytes(noise(1024) + b"TOY-DISK")
        with open_source(path) as source:
            assert source.format == "toy"
            assert source.image.virtual_size == 1024
            assert [(one.rule, one.severity.value) for one in source.findings] == [("toy-is-small", "warn")]

    def test_it_is_converted_from_and_to(self, tmp_path: Path) -> None:
        source = tmp_path / "horse.toy"
        source.write_bytes(noise(3 << 20) + b"TOY-DISK")
        report = convert_image(source, tmp_path / "horse.vhd", ConvertOptions(sync=False))
        assert (report.source_format, report.target_format) == ("toy", "vhd")
        back = convert_image(
            tmp_path / "horse.vhd", tmp_path / "back.toy", ConvertOptions(sync=False, verify="content")
        )
        assert (back.target_format, back.subformat) == ("toy", "wooden")
        assert (tmp_path / "back.toy").read_bytes() == source.read_bytes()

    def test_it_takes_part_in_ambiguity(self) -> None:
        assert claims(QCOW2 + b"TOY-DISK") == ["qcow2", "toy"]


def test_a_format_may_come_from_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point group; one of this package's own names is not replaced by it."""
    raw, vhd = formats()["raw"], formats()["vhd"]
    monkeypatch.setattr(registry, "_third_party", lambda: [("other", raw), ("vhd", raw)])
    formats.cache_clear()
    try:
        assert formats()["other"] is raw
        assert formats()["vhd"] is vhd
    finally:
        formats.cache_clear()


def test_the_content_of_what_was_chosen_is_what_the_format_says() -> None:
    disk = noise(4096)
    file = MemoryFile(vhd_images.fixed(disk))
    assert content(choose(file, probe(file)).open(file)) == disk
    assert content(choose(file, probe(file), "raw").open(file)) == bytes(file.data)


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])
def test_a_distribution_that_declares_a_format_is_noticed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """importlib.metadata is loaded only then."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "missing")])
    assert not registry._is_declared("imagekit.formats")
    folder = tmp_path / f"toy-1.0.{kind}"
    folder.mkdir()
    (folder / "entry_points.txt").write_text("[console_scripts]\ntoy = toy:main\n")
    assert not registry._is_declared("imagekit.formats")
    (folder / "entry_points.txt").write_text("[imagekit.formats]\ntoy = toy:FORMAT\n")
    assert registry._is_declared("imagekit.formats")


def test_a_file_on_the_path_may_declare_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages.zip").write_bytes(b"PK")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages.zip")])
    assert registry._is_declared("imagekit.formats")
