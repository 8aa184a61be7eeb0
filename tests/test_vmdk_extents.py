"""VMDKs of several files: read through the resolver only, each file as what the text says that it is."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.vmdk_images import Recipe, cowd, descriptor, hosted, sesparse
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats import registry
from imagekit.formats.base import DiskImage, Extent, Reference, Resolver
from imagekit.formats.files import MemoryFile
from imagekit.formats.vmdk import FORMAT
from imagekit.formats.vmdk_extents import DescriptorImage
from tests.disks import assert_extents_agree, content, cut, noise, text

KiB = 1 << 10
GRAIN = 8 * KiB


class Folder:
    """A resolver that finds files by their names, and notes what it was asked for."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.asked: list[Reference] = []

    def __call__(self, reference: Reference) -> DiskImage:
        self.asked.append(reference)
        file = MemoryFile(self.files[reference.name], name=reference.name)
        return registry.find(reference.format or "raw").open(file, resolver=self)


def disk(kind: str, *lines: str, resolver: Resolver | None = None, more: str = "") -> DescriptorImage:
    image = FORMAT.open(MemoryFile(descriptor(kind, *lines, more=more)), resolver=resolver)
    assert isinstance(image, DescriptorImage)
    return image


A, B = noise(3 * GRAIN, 1), text(2 * GRAIN, 2)
FLAT_A, FLAT_B = 'RW 48 FLAT "a" 0', 'RW 32 FLAT "b" 0'


# --- reading ---------------------------------------------------------------------------------------------------


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[str], dict[str, bytes], bytes]:
    """(extent lines, files, content) of disks in up to six parts of any type."""
    lines, files, expected = [], {}, b""
    for at in range(draw(st.integers(1, 6))):
        sectors, name = draw(st.integers(1, 40)), f"part-{at}"
        part = draw(st.sampled_from([noise(sectors * 512, at), bytes(sectors * 512)]))
        kind = draw(st.sampled_from(["FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE", "ZERO"]))
        recipe = Recipe(size=len(part), grains={0: part[:4096]}, grain_sectors=8, text=b"")
        if kind == "FLAT":
            before = draw(st.integers(0, 9))
            lines.append(f'RW {sectors} FLAT "{name}" {before}')
            files[name] = noise(before * 512, 99) + part + noise(draw(st.integers(0, 99)), 98)
        elif kind == "ZERO":
            lines.append(f"RW {sectors} ZERO")
            part = bytes(len(part))
        else:
            lines.append(f'{draw(st.sampled_from(["RW", "RDONLY"]))} {sectors} {kind} "{name}"')
            if kind != "VMFS":
                part = part[:4096].ljust(len(part), b"\0")
            makers = {"SPARSE": hosted, "VMFSSPARSE": cowd, "SESPARSE": sesparse}
            files[name] = makers[kind](recipe).data if kind in makers else part
        expected += part
    return lines, files, expected


@given(mixtures(), st.data())
def test_a_disk_is_its_extents_one_after_the_other(
    mixture: tuple[list[str], dict[str, bytes], bytes], data: st.DataObject
) -> None:
    lines, files, expected = mixture
    image = disk("vmfsSparse", *lines, resolver=Folder(files))
    whole = assert_extents_agree(image, image.file, expected)
    assert all(extent.file is not None for extent in whole if extent.offset is not None)
    for _ in range(5):
        start, length = data.draw(st.integers(0, len(expected))), data.draw(st.integers(0, 20 * KiB))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


def test_nothing_is_opened_before_it_is_read_and_nothing_twice() -> None:
    folder = Folder({"a": A + B})
    image = disk("monolithicFlat", FLAT_A, 'RW 32 FLAT "a" 48', resolver=folder)
    image.info()
    assert folder.asked == []
    assert content(image) == A + B
    assert folder.asked == [Reference("extent-file", "a", "raw")]
    image.close()


def test_what_a_sparse_extent_has_not_is_not_there_and_a_zero_extent_is() -> None:
    recipe = Recipe(size=2 * GRAIN, grains={1: noise(GRAIN)}, text=b"")
    lines = (f'RW {2 * GRAIN // 512} SPARSE "s"', "RW 16 ZERO")
    part = hosted(recipe).data
    image = disk("twoGbMaxExtentSparse", *lines, resolver=Folder({"s": part}))
    assert list(image.extents()) == [
        Extent(0, GRAIN, data=False, zero=True, present=False),
        Extent(GRAIN, GRAIN, data=True, zero=False, offset=part.index(noise(GRAIN))),
        Extent(2 * GRAIN, 16 * 512, data=False, zero=True, present=True),
    ]


def test_info_says_what_the_text_says() -> None:
    info = disk("twoGbMaxExtentFlat", FLAT_A, FLAT_B, "RW 8 ZERO").info()
    assert (info.format, info.subformat, info.virtual_size, info.block_size) == (
        "vmdk",
        "twoGbMaxExtentFlat",
        5 * GRAIN + 4096,
        None,
    )
    assert info.references == (Reference("extent-file", "a", "raw"), Reference("extent-file", "b", "raw"))
    assert info.features["extents"] == 3
    assert FORMAT.check(MemoryFile(descriptor("monolithicFlat", FLAT_A))) == []


# --- refusing --------------------------------------------------------------------------------------------------


def test_without_a_resolver_no_extent_is_opened() -> None:
    image = disk("monolithicFlat", 'RW 8 FLAT "/etc/passwd" 0')
    assert image.info().references == (Reference("extent-file", "/etc/passwd", "raw"),)
    for read in (lambda: content(image), lambda: list(image.extents())):
        with pytest.raises(UnsupportedFeature, match="needs its extent file '/etc/passwd'"):
            read()


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("fullDevice", 'RW 8 FLAT "/dev/sda" 0', "a VMDK of the kind 'fullDevice'"),
        ("custom", FLAT_A, "a VMDK of the kind 'custom'"),
        ("monolithicSparse", 'RW 48 SPARSE "a"', "a VMDK of the kind 'monolithicSparse'"),
        ("vmfs", 'RW 8 VMFSRDM "a"', "an extent of type VMFSRDM is a device"),
        ("vmfs", 'RW 8 VMFSRAW "a"', "an extent of type VMFSRAW is a device"),
        ("monolithicFlat", 'NOACCESS 48 FLAT "a" 0', "the extent 'a' is marked as not accessible"),
        ("monolithicFlat", "NOACCESS 48 ZERO", "the extent 'ZERO' is marked as not accessible"),
    ],
)
def test_what_is_no_plain_file_is_described_and_not_read(kind: str, line: str, message: str) -> None:
    folder = Folder({"a": A})
    image = disk(kind, line, resolver=folder)
    assert image.info().subformat == kind
    for read in (lambda: content(image), lambda: list(image.extents())):
        with pytest.raises(UnsupportedFeature, match=message):
            read()
    assert folder.asked == []


def test_a_delta_disk_is_described_and_not_read() -> None:
    folder = Folder({"a": A})
    image = disk("vmfsSparse", FLAT_A, resolver=folder, more='parentFileNameHint="base.vmdk"')
    assert image.info().references[-1] == Reference("parent-file", "base.vmdk", "vmdk")
    with pytest.raises(UnsupportedFeature, match="a delta disk"):
        content(image)
    assert folder.asked == []


def test_a_sparse_extent_that_is_a_delta_is_not_read_either() -> None:
    text = descriptor("monolithicSparse", 'RW 48 SPARSE "s"', parent="12345678")
    part = hosted(Recipe(size=3 * GRAIN, text=text)).data
    image = disk("twoGbMaxExtentSparse", 'RW 48 SPARSE "s"', resolver=Folder({"s": part}))
    with pytest.raises(UnsupportedFeature, match="a delta disk"):
        content(image)


SPARSE = hosted(Recipe(size=3 * GRAIN, grains={0: noise(GRAIN)}, text=b"")).data


@pytest.mark.parametrize(
    ("kind", "line", "file", "error", "message"),
    [
        ("monolithicFlat", FLAT_A, A[:-1], CorruptImage, "'a' holds 24575 bytes, 24576 expected"),
        ("monolithicFlat", 'RW 47 FLAT "a" 2', A, CorruptImage, "'a' holds 24576 bytes, 25088 expected"),
        ("monolithicFlat", FLAT_A, b"", CorruptImage, "'a' holds 0 bytes"),
        ("vmfs", 'RW 49 VMFS "a"', A, CorruptImage, "'a' holds 24576 bytes"),
        ("vmfsSparse", 'RW 47 SPARSE "a"', SPARSE, CorruptImage, "holds 24576 bytes of the disk, 24064 expected"),
        ("vmfsSparse", 'RW 49 SPARSE "a"', SPARSE, CorruptImage, "holds 24576 bytes of the disk, 25088 expected"),
        ("vmfsSparse", 'RW 48 SPARSE "a"', A, InvalidImage, "no VMDK"),
        ("vmfsSparse", 'RW 48 SPARSE "a"', SPARSE[:-GRAIN], CorruptImage, "grain 0 should lie at"),
    ],
)
def test_an_extent_that_is_not_what_the_text_says_is_damage(
    kind: str, line: str, file: bytes, error: type[ImagekitError], message: str
) -> None:
    image = disk(kind, line, resolver=Folder({"a": file}))
    with pytest.raises(error, match=message):
        content(image)
    with pytest.raises(error, match=message):
        list(image.extents())


def test_a_text_whose_extent_is_a_text_leads_nowhere() -> None:
    """It could be the same one again, for ever."""
    inner = descriptor("twoGbMaxExtentSparse", 'RW 48 SPARSE "a"')
    image = disk("twoGbMaxExtentSparse", 'RW 48 SPARSE "a"', resolver=Folder({"a": inner}))
    with pytest.raises(InvalidImage, match="'a' is not a sparse VMDK file"):
        content(image)


def test_a_flat_extent_is_bytes_whatever_is_in_them() -> None:
    image = disk("monolithicFlat", f'RW {len(SPARSE) // 512} FLAT "a" 0', resolver=Folder({"a": SPARSE}))
    assert content(image) == SPARSE


@pytest.mark.parametrize("lines", [[], ['RW 9007199254740992 FLAT "a" 0'] * 2], ids=["no extents", "too many bytes"])
def test_a_disk_has_a_size(lines: list[str]) -> None:
    with pytest.raises(InvalidImage, match=r"extents of \d+ bytes, expected 1 to"):
        disk("monolithicFlat", *lines)


def test_a_text_that_goes_on_behind_64_kib_is_no_descriptor() -> None:
    data = descriptor("monolithicFlat", FLAT_A)
    with pytest.raises(InvalidImage, match="a descriptor of 65537 bytes"):
        FORMAT.open(MemoryFile(data.ljust(100_000, b"\0")))
    assert FORMAT.open(MemoryFile(data.ljust(65536, b"\0"))).virtual_size == 3 * GRAIN


def test_a_text_cut_anywhere_is_an_error_or_says_the_same() -> None:
    data = descriptor("monolithicFlat", FLAT_A)
    for length in range(len(data)):
        try:
            image = FORMAT.open(MemoryFile(data[:length]), resolver=Folder({"a": A}))
        except ImagekitError:
            continue
        assert content(image) == A


def test_facts_of_the_text_are_facts_of_the_disk() -> None:
    data = descriptor("monolithicFlat", FLAT_A) + b"\0more"
    assert [one.code for one in FORMAT.open(MemoryFile(data)).info().facts] == ["descriptor-hidden-text"]
    assert [one.code for one in FORMAT.check(MemoryFile(data))] == ["descriptor-hidden-text"]


def test_any_part_may_be_read_by_several_threads() -> None:
    parts = {f"p{at}": noise(4096, at) for at in range(8)}
    folder = Folder(parts)
    image = disk("monolithicFlat", *(f'RW 8 FLAT "{name}" 0' for name in parts), resolver=folder)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda at: image.pread(at * 512, 512), range(64)))
    assert b"".join(read) == b"".join(parts.values())
    assert len(folder.asked) == len(parts)


def test_one_file_may_be_at_several_places_of_the_disk() -> None:
    recipe = Recipe(size=GRAIN, grains={0: noise(GRAIN)}, text=b"")
    lines = [f'RW {GRAIN // 512} SPARSE "s"'] * 3
    image = disk("twoGbMaxExtentSparse", *lines, resolver=Folder({"s": hosted(recipe).data}))
    assert content(image) == noise(GRAIN) * 3
