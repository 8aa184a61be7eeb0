"""VMDK, one file: what other programs write is read, and what contradicts itself is not."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vmdk_images
from fixtures.vmdk_images import Recipe, Vmdk, cowd, hosted, qemu_stream, sesparse, stream
from imagekit.errors import CorruptImage, ImagekitError, InvalidImage, UnsupportedFeature
from imagekit.formats.base import Extent, Reference
from imagekit.formats.files import MemoryFile
from imagekit.formats.vmdk import FORMAT
from tests.disks import assert_extents_agree, content, cut, md5, noise, read_or_error, text
from tests.samples import sample, sample_facts
from tests.vmdk_recipes import facts, recipes, small, sparse

KiB, MiB, TiB = 1 << 10, 1 << 20, 1 << 40
GRAIN = 8 * KiB
THREE = {2: noise(GRAIN, 1), 0: text(GRAIN, 2), 5: noise(GRAIN, 3)}
RECIPE = Recipe(size=7 * GRAIN, grains=THREE)

MAKERS: dict[str, Callable[[Recipe], Vmdk]] = {"hosted": hosted, "stream": stream, "qemu": qemu_stream}
ALL_MAKERS: dict[str, Callable[[Recipe], Vmdk]] = {**MAKERS, "cowd": cowd, "sesparse": sesparse}


def every_layout(recipe: Recipe) -> list[Vmdk]:
    return [hosted(recipe), stream(recipe), qemu_stream(recipe)]


# --- reading ---------------------------------------------------------------------------------------------------


@given(recipes())
def test_a_guest_reads_what_the_grains_hold_and_extents_agree(recipe: Recipe) -> None:
    for image in every_layout(recipe):
        file = MemoryFile(image.data)
        assert_extents_agree(FORMAT.open(file), file, recipe.content())
        assert FORMAT.check(file) == []


@given(recipes(), st.data())
def test_any_part_of_the_disk_reads_as_it_does_within_the_whole(recipe: Recipe, data: st.DataObject) -> None:
    expected = recipe.content()
    image = sparse(data.draw(st.sampled_from(every_layout(recipe))).data)
    whole = list(image.extents())
    for _ in range(6):
        start = data.draw(st.integers(0, len(expected)))
        length = data.draw(st.integers(0, 20 * KiB))
        assert image.pread(start, length) == expected[start : start + length]
        assert list(image.extents(start, length)) == cut(whole, start, start + length)


@given(recipes(table_entries=(16,), zeros=False))
@settings(max_examples=40)
def test_a_cowd_file_is_read(recipe: Recipe) -> None:
    file = MemoryFile(cowd(recipe).data)
    assert_extents_agree(FORMAT.open(file), file, recipe.content())
    assert FORMAT.check(file) == []


@given(recipes(grain_sectors=(8,), table_entries=(16,)))
@settings(max_examples=40)
def test_an_sesparse_file_is_read(recipe: Recipe) -> None:
    file = MemoryFile(sesparse(recipe).data)
    assert_extents_agree(FORMAT.open(file), file, recipe.content())
    assert FORMAT.check(file) == []


def test_the_sparse_files_of_esx_have_tables_of_4096_grains() -> None:
    recipe = Recipe(size=4098 * 4096, grains={4097: noise(4096), 4095: text(4096)}, grain_sectors=8)
    for made in (cowd(recipe), sesparse(recipe)):
        assert len(made.tables) == 2
        assert content(sparse(made.data)) == recipe.content()


def test_grains_that_lie_side_by_side_are_one_extent_however_many() -> None:
    """Tables are looked through in pages of 512 entries; a number's lower bits wrap at 4096 grains."""
    numbers = range(300, 5000)
    recipe = Recipe(size=5000 * 4096, grains={at: at.to_bytes(4, "little") * 1024 for at in numbers}, grain_sectors=8)
    for made in (hosted(recipe), cowd(recipe), sesparse(recipe)):
        image = sparse(made.data)
        assert [(one.start // 4096, one.length // 4096, one.offset) for one in image.extents()] == [
            (0, 300, None),
            (300, 4700, made.grains[300]),
        ]
        assert content(image) == recipe.content()
    assert [(one.length // 4096, one.data) for one in sparse(stream(recipe).data).extents()] == [
        (300, False),
        (4700, True),
    ]


def test_grains_are_data_at_their_offset_and_the_rest_is_not_there() -> None:
    made = hosted(dataclasses.replace(RECIPE, grains={**THREE, 3: None}, version=2))
    extents = [
        Extent(0, GRAIN, data=True, zero=False, offset=made.grains[0]),
        Extent(GRAIN, GRAIN, data=False, zero=True, present=False),
        Extent(2 * GRAIN, GRAIN, data=True, zero=False, offset=made.grains[2]),
        Extent(3 * GRAIN, GRAIN, data=False, zero=True, present=True),
        Extent(4 * GRAIN, GRAIN, data=False, zero=True, present=False),
        Extent(5 * GRAIN, GRAIN, data=True, zero=False, offset=made.grains[5]),
        Extent(6 * GRAIN, GRAIN, data=False, zero=True, present=False),
    ]
    assert list(sparse(made.data).extents()) == extents
    assert [(one.data, one.compressed, one.offset) for one in sparse(stream(RECIPE).data).extents()] == [
        (True, True, None),
        (False, False, None),
        (True, True, None),
        (False, False, None),
        (True, True, None),
        (False, False, None),
    ]


def test_a_table_entry_of_one_is_zero_only_where_the_flag_says_so() -> None:
    made = hosted(RECIPE)
    poked = made.poked(made.entry(1), 1).poked(made.entry(1, redundant=True), 1)
    with pytest.raises(CorruptImage, match="grain 1 should lie at 0x200"):
        content(sparse(poked.data))
    flagged = poked.poked(8, 3 | vmdk_images.ZERO_GRAINS)
    assert content(sparse(flagged.data)) == RECIPE.content()


def test_a_grain_that_does_not_compress_may_be_longer_than_itself() -> None:
    made = stream(RECIPE)
    assert made.number(made.grains[2] + 8) > GRAIN
    assert content(sparse(made.data)) == RECIPE.content()


def test_the_last_grain_may_be_compressed_whole() -> None:
    """QEMU compresses what the disk has of it, VMware all of it."""
    recipe = Recipe(size=GRAIN + 512, grains={1: text(512)})
    for made in (stream(recipe), qemu_stream(recipe)):
        assert content(sparse(made.data)) == recipe.content()


@pytest.mark.parametrize("tables_last", [False, True])
def test_where_the_tables_of_a_stream_lie_does_not_matter(tables_last: bool) -> None:
    recipe = Recipe(size=40 * GRAIN, grains={at: noise(GRAIN, at) for at in (39, 0, 7)}, table_entries=4)
    assert content(sparse(stream(recipe, tables_last=tables_last).data)) == recipe.content()


def test_many_neighbours_are_read_at_once_and_in_any_order() -> None:
    order = [*range(60, 30, -1), *range(30)]
    recipe = Recipe(size=61 * GRAIN, grains={at: noise(GRAIN, at) for at in order})
    for made in every_layout(recipe):
        image = sparse(made.data)
        assert content(image) == recipe.content()
        assert image.pread(29 * GRAIN + 100, 3 * GRAIN) == recipe.content()[29 * GRAIN + 100 :][: 3 * GRAIN]


def test_a_huge_disk_costs_what_is_in_it() -> None:
    """62 TiB: the directory alone has two million entries; nobody reads them all, and holes are one step."""
    size = 62 * TiB
    recipe = Recipe(size=size, grain_sectors=128, redundant=False, text=b"")
    directory = MemoryFile()
    tables = size // (512 * 64 * KiB)
    table = 4 + tables * 4 // 512
    head = vmdk_images.header(recipe, flags=1, directory=4, redundant=0, overhead=table + 4)
    directory.pwrite(0, head)
    directory.pwrite(4 * 512 + (tables - 1) * 4, struct.pack("<I", table))
    directory.pwrite(table * 512 + 511 * 4, struct.pack("<I", table + 4))
    directory.pwrite((table + 4) * 512, noise(64 * KiB))
    image = FORMAT.open(directory)
    assert list(image.extents()) == [
        Extent(0, size - 64 * KiB, data=False, zero=True, present=False),
        Extent(size - 64 * KiB, 64 * KiB, data=True, zero=False, offset=(table + 4) * 512),
    ]
    assert image.pread(size - 64 * KiB, 64 * KiB) == noise(64 * KiB)


# --- what info says --------------------------------------------------------------------------------------------


def test_info_says_what_header_and_descriptor_say() -> None:
    info = sparse(hosted(RECIPE).data).info()
    assert (info.format, info.subformat, info.virtual_size) == ("vmdk", "monolithicSparse", 7 * GRAIN)
    assert (info.block_size, info.references, info.facts) == (GRAIN, (), ())
    assert info.features == {
        "extent-type": "hosted sparse",
        "version": 1,
        "compressed": False,
        "markers": False,
        "zero-grains": False,
        "redundant-directory": True,
        "unclean-shutdown": False,
        "create-type": "monolithicSparse",
        "cid": "1a2b3c4d",
        "adapter-type": "lsilogic",
        "hardware-version": "4",
    }
    assert sparse(stream(RECIPE).data).info().subformat == "streamOptimized"
    assert sparse(cowd(RECIPE).data).info().subformat == "COWD"
    assert sparse(sesparse(Recipe(size=GRAIN)).data).info().features == {"extent-type": "SESparse"}


def test_an_image_that_was_not_closed_is_told_and_read() -> None:
    made = hosted(dataclasses.replace(RECIPE, unclean=1))
    assert facts(made.data) == ["unclean-shutdown"]
    assert content(sparse(made.data)) == RECIPE.content()


@pytest.mark.parametrize("text", [b"", b"\0"], ids=["no place for it", "an empty place"])
def test_a_file_without_a_descriptor_may_be_a_part_of_a_disk(text: bytes) -> None:
    made = hosted(dataclasses.replace(RECIPE, text=text))
    assert facts(made.data) == ["no-descriptor"]
    assert content(sparse(made.data)) == RECIPE.content()


@pytest.mark.parametrize("maker", [cowd, sesparse])
def test_esx_sparse_files_alone_are_parts_of_a_disk(maker: type) -> None:
    assert facts(maker(RECIPE).data) == ["no-descriptor"]


# --- two meanings ----------------------------------------------------------------------------------------------


def with_text(create_type: str, *extents: str, **options: str) -> bytes:
    return hosted(dataclasses.replace(RECIPE, text=vmdk_images.descriptor(create_type, *extents, **options))).data


OWN = f'RW {7 * GRAIN // 512} SPARSE "test.vmdk"'


@pytest.mark.parametrize(
    ("extents", "kind"),
    [
        ([OWN.replace("test", "/etc/passwd")], "monolithicSparse"),
        ([OWN.replace("test", "../other")], "monolithicSparse"),
        ([OWN.replace("test", "C:\\\\disks\\\\other")], "monolithicSparse"),
        ([OWN.replace("test", "\\\\\\\\.\\\\PhysicalDrive0")], "monolithicSparse"),
        ([OWN.replace("test", "nbd:host")], "monolithicSparse"),
        (['RW 112 FLAT "other.raw" 0'], "monolithicSparse"),
        ([OWN, 'RW 8 FLAT "other.raw" 0'], "monolithicSparse"),
        ([], "monolithicSparse"),
        ([OWN], "monolithicFlat"),
        ([OWN], "twoGbMaxExtentSparse"),
    ],
    ids=["absolute", "relative", "drive", "device", "URL", "flat", "two", "none", "flat type", "split type"],
)
def test_a_descriptor_inside_that_is_not_about_its_file_is_told_and_never_followed(
    extents: list[str], kind: str
) -> None:
    data = with_text(kind, *extents)
    assert facts(data) == ["embedded-extent"]
    assert content(sparse(data)) == RECIPE.content()


def test_a_descriptor_inside_may_name_the_file_as_it_was_called_once() -> None:
    assert facts(with_text("streamOptimized", OWN.replace("test", "generated-stream"))) == []


def test_a_descriptor_that_says_another_size_is_told() -> None:
    data = with_text("monolithicSparse", 'RW 8 SPARSE "test.vmdk"')
    assert facts(data) == ["descriptor-size-differs"]
    assert sparse(data).virtual_size == 7 * GRAIN


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"parent": "12345678"}, ""),
        ({"more": 'parentFileNameHint="base.vmdk"'}, "base.vmdk"),
        ({"parent": "12345678", "more": 'parentFileNameHint="/vm/base.vmdk"'}, "/vm/base.vmdk"),
    ],
    ids=["id", "name", "both"],
)
def test_a_delta_disk_is_described_and_not_read(options: dict[str, str], name: str) -> None:
    """Read alone it would give zeros where the parent's data is."""
    image = sparse(with_text("monolithicSparse", OWN, **options))
    assert image.info().references == (Reference("parent-file", name, "vmdk"),)
    for read in (lambda: list(image.extents()), lambda: content(image)):
        with pytest.raises(UnsupportedFeature, match="a delta disk"):
            read()


@pytest.mark.parametrize("entry", [0, 1, 5])
def test_two_directories_that_differ_are_told_and_not_read(entry: int) -> None:
    made = hosted(RECIPE)
    value = made.number(made.entry(2))
    poked = made.poked(made.entry(entry, redundant=True), value)
    assert facts(poked.data) == ["grain-directories-differ"]
    with pytest.raises(CorruptImage, match=f"leads to something else for grain {entry}"):
        content(sparse(poked.data))


def test_a_table_that_only_the_redundant_directory_has_counts_as_well() -> None:
    """A hole in the primary directory is skipped in one step, but not past such a table."""
    recipe = small(100_000 * 512, {99_999: noise(512)})
    made = hosted(recipe)
    table = made.recipe.tables - 1
    poked = made.poked(made.directory + table * 4, 0)
    assert facts(poked.data) == ["grain-directories-differ"]
    with pytest.raises(CorruptImage, match="leads to something else for grain 99999"):
        list(sparse(poked.data).extents())


def test_what_info_does_not_get_to_is_compared_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagekit.formats.vmdk_sparse.COMPARE_BYTES", 1)
    made = hosted(small(100_000 * 512, {99_999: noise(512)}))
    poked = made.poked(made.entry(99_998, redundant=True), made.number(made.entry(99_999)))
    assert facts(poked.data) == []
    assert sparse(poked.data).pread(0, 512) == bytes(512)
    with pytest.raises(CorruptImage, match="leads to something else for grain 99998"):
        content(sparse(poked.data))


def test_a_redundant_directory_without_its_flag_is_nothing() -> None:
    made = hosted(RECIPE)
    poked = made.poked(made.entry(0, redundant=True), 9).poked(8, 1)
    assert facts(poked.data) == []
    assert content(sparse(poked.data)) == RECIPE.content()


def test_unknown_flags_that_matter_are_told_and_not_read() -> None:
    made = hosted(dataclasses.replace(RECIPE, more_flags=0x40000))
    assert facts(made.data) == ["unknown-feature"]
    with pytest.raises(UnsupportedFeature, match="unknown VMDK flags 0x40000"):
        content(sparse(made.data))
    harmless = hosted(dataclasses.replace(RECIPE, more_flags=0x8))
    assert content(sparse(harmless.data)) == RECIPE.content()


@pytest.mark.parametrize(
    "field",
    [{"size": 8 * GRAIN}, {"text": b""}, {"text_sectors": 3}, {"grain_sectors": 8}, {"version": 3}],
    ids=str,
)
def test_a_footer_that_differs_from_the_header_is_damage(field: dict[str, int]) -> None:
    made = stream(RECIPE, footer=dataclasses.replace(RECIPE, **field))  # type: ignore[arg-type]
    with pytest.raises(CorruptImage, match="the footer describes another disk"):
        sparse(made.data)


@pytest.mark.parametrize(
    ("cut_off", "patch"),
    [(512, b""), (1, b""), (512, bytes(8) + b"\1" + bytes(503)), (1536, vmdk_images.marker(1, kind=2))],
    ids=["no end", "a byte", "another end", "no footer marker"],
)
def test_a_stream_that_does_not_end_in_its_footer_is_damage(cut_off: int, patch: bytes) -> None:
    data = stream(RECIPE).data
    broken = data[: len(data) - cut_off] + patch + (data[len(data) - cut_off + len(patch) :] if patch else b"")
    with pytest.raises(CorruptImage, match="does not end in a footer"):
        sparse(broken)


def test_a_footer_that_refers_to_a_footer_is_damage() -> None:
    data = bytearray(stream(RECIPE).data)
    data[len(data) - 1024 + 56 : len(data) - 1024 + 64] = b"\xff" * 8
    with pytest.raises(CorruptImage, match="does not say where the grain directory is"):
        sparse(bytes(data))


# --- pointers and streams that lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("sector", [0, 2, 4, 1 << 20, 0xFFFFFFFF], ids=hex)
@pytest.mark.parametrize("maker", [hosted, qemu_stream], ids=["plain", "compressed"])
def test_a_grain_on_metadata_or_outside_is_damage(maker: type, sector: int) -> None:
    made = maker(dataclasses.replace(RECIPE, redundant=False))
    poked = made.poked(made.entry(2), sector)
    if sector == 0:
        assert content(sparse(poked.data))[2 * GRAIN : 3 * GRAIN] == bytes(GRAIN)
        return
    with pytest.raises(CorruptImage, match="grain 2 should lie at") as caught:
        content(sparse(poked.data))
    assert caught.value.offset == made.entry(2)


@pytest.mark.parametrize("sector", [1, 3, 1 << 20, 0xFFFFFFFF], ids=hex)
def test_a_table_on_metadata_or_outside_is_damage(sector: int) -> None:
    made = hosted(dataclasses.replace(RECIPE, redundant=False))
    with pytest.raises(CorruptImage, match="grain table 0 should lie at") as caught:
        content(sparse(made.poked(made.directory, sector).data))
    assert caught.value.offset == made.directory


STREAMS = {
    "bomb": (zlib.compress(bytes(4 * MiB)), "more than its grain of 8192 bytes"),
    "short": (zlib.compress(bytes(GRAIN - 1)), "holds 8191 bytes, the grain has 8192"),
    "garbage": (noise(GRAIN), "zlib stream is damaged"),
    "raw deflate": (zlib.compress(text(GRAIN))[2:-4], "zlib stream is damaged"),
    "cut": (zlib.compress(text(GRAIN))[:-5], "zlib stream is not complete"),
    "checksum": (zlib.compress(text(GRAIN))[:-1] + b"?", "zlib stream is damaged"),
    "nothing": (b"", "a compressed grain of 0 bytes"),
    "too long": (noise(2 * GRAIN + 1), "a compressed grain of 16385 bytes"),
}


@pytest.mark.parametrize(("packed", "message"), STREAMS.values(), ids=STREAMS)
def test_a_stream_that_is_not_its_grain_is_damage(packed: bytes, message: str) -> None:
    made = qemu_stream(RECIPE, streams={2: packed})
    with pytest.raises(CorruptImage, match=message) as caught:
        content(sparse(made.data))
    assert caught.value.offset == made.grains[2]
    assert "grain 2" in str(caught.value)


def test_bytes_behind_the_stream_of_a_grain_are_padding() -> None:
    made = stream(RECIPE, streams={2: zlib.compress(THREE[2]) + b"padding"})
    assert content(sparse(made.data)) == RECIPE.content()


def test_a_marker_of_another_grain_is_damage() -> None:
    made = stream(RECIPE)
    with pytest.raises(CorruptImage, match="grain 2: the marker is of sector 16, expected 32"):
        content(sparse(made.poked(made.grains[2], 16, 8).data))


def test_two_grains_in_one_compressed_place_cannot_be() -> None:
    made = qemu_stream(dataclasses.replace(RECIPE, redundant=False))
    poked = made.poked(made.entry(1), made.number(made.entry(0)))
    with pytest.raises(CorruptImage, match="grain 1: the marker is of sector 0"):
        content(sparse(poked.data))


@pytest.mark.parametrize(
    ("grain", "message"),
    [
        (vmdk_images.sesparse_entry(vmdk_images.SE_HOLE, 4096), "means nothing"),
        (vmdk_images.sesparse_entry(4), "means nothing"),
        (vmdk_images.sesparse_entry(vmdk_images.SE_DATA, 9), "grain 1 should lie at"),
        (vmdk_images.sesparse_entry(vmdk_images.SE_DATA, (1 << 60) - 1), "grain 1 should lie at"),
    ],
    ids=["a hole with a place", "an unknown kind", "behind", "far behind"],
)
def test_an_sesparse_entry_that_cannot_be_is_damage(grain: int, message: str) -> None:
    made = sesparse(Recipe(size=4 * GRAIN, grains={0: noise(4096)}), entries={1: grain})
    with pytest.raises(CorruptImage, match=message):
        content(sparse(made.data))


def test_an_sesparse_directory_entry_must_be_marked_as_one() -> None:
    made = sesparse(Recipe(size=4 * GRAIN, grains={0: noise(4096)}))
    with pytest.raises(CorruptImage, match="directory entry 0 is 0x2000000000000000"):
        content(sparse(made.poked(made.directory, 0x20000000 << 32, 8).data))


def test_an_sesparse_file_with_writes_in_its_journal_is_not_read() -> None:
    with pytest.raises(UnsupportedFeature, match="journal holds writes") as caught:
        sparse(sesparse(RECIPE, replay=1).data)
    assert caught.value.exit_code == 12


# --- any damage ------------------------------------------------------------------------------------------------

TINY = small(5 * 512, {1: noise(512, 1), 0: text(512, 2), 4: noise(512, 3)})


@pytest.mark.parametrize("kind", ALL_MAKERS)
def test_an_image_cut_anywhere_is_an_error_or_the_same_content(kind: str) -> None:
    """Never zeros where there was data."""
    recipe = TINY if kind in MAKERS else Recipe(5 * 4096, {1: noise(4096), 4: text(4096)}, grain_sectors=8)
    made = ALL_MAKERS[kind](recipe)
    expected = recipe.content()
    assert content(sparse(made.data)) == expected
    lengths = sorted({*range(0, len(made.data), 512), *range(1, len(made.data), 97)})
    read = [read_or_error("vmdk", made.data[:length]) for length in lengths]
    assert all(isinstance(one, ImagekitError) or one == expected for one in read)
    padding = len(made.data) - max(made.grains.values()) if kind == "qemu" else 0
    whole = [length for length, one in zip(lengths, read, strict=True) if one == expected]
    assert all(length > len(made.data) - padding for length in whole)


def test_the_last_grain_may_end_where_the_disk_ends() -> None:
    recipe = Recipe(size=GRAIN + 1024, grains={1: noise(1024)}, redundant=False)
    data = hosted(recipe).data
    short = data[: len(data) - GRAIN + 1024]
    assert content(sparse(short)) == recipe.content()
    with pytest.raises(CorruptImage, match="grain 1 should lie at"):
        content(sparse(short[:-1]))


@pytest.mark.parametrize("kind", ALL_MAKERS)
@given(data=st.data())
@settings(max_examples=80)
def test_any_flipped_bits_give_other_content_or_a_typed_error(kind: str, data: st.DataObject) -> None:
    made = ALL_MAKERS[kind](TINY)
    broken = bytearray(made.data)
    places = (
        st.integers(0, 80)
        | st.integers(512, 800)
        | st.sampled_from(
            [made.directory, made.redundant, *made.tables.values(), *made.grains.values(), len(broken) - 1024 + 56]
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(places) + data.draw(st.integers(0, 12))
        broken[at % len(broken)] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    try:
        image = FORMAT.open(MemoryFile(bytes(broken)))
        image.info()
        list(image.ranges())
        if image.virtual_size <= 1 << 24:
            content(image)
        FORMAT.check(MemoryFile(bytes(broken)))
    except ImagekitError:
        return


@given(
    st.binary(max_size=600),
    st.sampled_from([b"KDMV", b"COWD", b"\xbe\xba\xfe\xca\0\0\0\0", b"# Disk DescriptorFile\n"]),
)
def test_a_magic_and_anything_behind_it_is_that_format_or_an_error(data: bytes, magic: bytes) -> None:
    file = MemoryFile(magic + data)
    assert FORMAT.probe(file) is not None
    try:
        FORMAT.open(file).info()
    except ImagekitError:
        return


# --- recognising -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"KDMV", "VMDK sparse header at 0"),
        (b"COWD", "VMDK COWD header at 0"),
        (b"\xbe\xba\xfe\xca\0\0\0\0", "VMDK SESparse header at 0"),
        (b"\xbe\xba\xfe\xca\1\0\0\0", None),
        (b"\xbe\xba\xfe\xca", None),
        (b"# Disk DescriptorFile", "VMDK descriptor"),
        (b"\xef\xbb\xbf# Disk DescriptorFile\n", "VMDK descriptor"),
        (b"\r\n \t\n# DISK descriptorfile\r\n", "VMDK descriptor"),
        (b"#comment\n" * 500 + b"# Disk DescriptorFile\n", "VMDK descriptor"),
        (b"#comment\n" * 500 + b"version=1\n", "VMDK descriptor"),
        (b"version=3\r\n", "VMDK descriptor"),
        (b"Version = 1", "VMDK descriptor"),
        (b"#!/bin/sh\necho\n# Disk DescriptorFile\n", None),
        (b"#comment\n" * 500, None),
        (b"#", None),
        (b"KDM", None),
        (b"", None),
        (bytes(4096), None),
        (noise(4096), None),
    ],
)
def test_a_vmdk_is_known_by_its_magic_or_its_text(data: bytes, found: str | None) -> None:
    assert FORMAT.probe(MemoryFile(data)) == found


def test_what_is_no_vmdk_is_an_error() -> None:
    with pytest.raises(InvalidImage, match="no VMDK"):
        FORMAT.open(MemoryFile(bytes(4096)))


def test_ranges_are_all_that_the_file_holds() -> None:
    for made in every_layout(dataclasses.replace(RECIPE, grains={2: noise(GRAIN), 5: text(GRAIN)})):
        ranges = sorted((one.offset, one.length) for one in sparse(made.data).ranges())
        ends = [offset + length for offset, length in ranges]
        assert all(end <= start for end, (start, _) in zip(ends, ranges[1:], strict=False))
        assert len(made.data) - ends[-1] < 512


@pytest.mark.parametrize("name", ["ext2.vmdk", "image.vmdk", "vmdk-monolith.img"])
def test_a_real_image_reads_as_other_readers_read_it(name: str) -> None:
    data = sample(name).read_bytes()
    assert md5(content(sparse(data))) == sample_facts(name).content_md5
    assert facts(data) == []
    assert FORMAT.check(MemoryFile(data)) == []


def test_a_fuzzed_header_is_refused_by_its_bounds_too() -> None:
    """A capacity of 2^60 sectors; the newline test, which is damaged as well, is repaired first."""
    data = bytearray(sample("afl9.vmdk").read_bytes())
    with pytest.raises(CorruptImage, match="transferred as text"):
        sparse(bytes(data))
    data[73:77] = b"\n \r\n"
    with pytest.raises((CorruptImage, InvalidImage)) as caught:
        sparse(bytes(data))
    assert caught.value.exit_code == 11
