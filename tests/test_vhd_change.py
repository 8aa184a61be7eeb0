"""VHDs changed in place: the size, the parent, and what is left when that is cut short."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures import vhd_images
from imagekit import changes
from imagekit.errors import CorruptImage, UnsupportedFeature
from imagekit.formats.base import Barrier, Change, ParentLink, Reference, Write, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.formats.vhd import FORMAT, VhdImage
from imagekit.formats.vhd_header import MAX_SIZE, DynamicHeader, Footer, batmap, geometry
from tests.disks import IDENTIFIER, content, convert, noise
from tests.samples import sample
from tests.vhd_chains import assert_survives, changed, empty, on_zeros

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KiB
NOISE = noise(2 * MiB, 99)


def resized(data: bytes, size: int) -> bytes:
    return changed(data, FORMAT.resize(MemoryFile(data), size))


def footer_of(data: bytes) -> Footer:
    return Footer.parse(data[-512:])


def on_noise(data: bytes) -> VhdImage:
    """A disk on a parent that is larger than it and full of data."""
    return FORMAT.open(MemoryFile(data), resolver=lambda _: RawImage(MemoryFile(NOISE), 2 * MiB))


# --- fixed disks -----------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([0, 512, 1024, 5120]), st.sampled_from([511, 512]))
def test_a_fixed_disk_of_any_size_gets_any_other(old: int, new: int, junk: int, footer_length: int) -> None:
    """Also with something between its data and its footer, which must not become data."""
    kept = noise(min(old, new) * 512)
    before, after = kept.ljust(old * 512, b"\0"), kept.ljust(new * 512, b"\0")
    footer = vhd_images.Footer(size=old * 512, disk_type=2)
    data = vhd_images.fixed(before + b"\xdd" * junk, footer, footer_length=footer_length)
    end = assert_survives(data, FORMAT.resize(MemoryFile(data), new * 512), [before, after])
    if old != new:
        assert end == after + end[-512:]
        assert footer_of(end).original_size == footer_of(end).current_size == new * 512


def test_a_fixed_disk_with_data_behind_the_new_end_keeps_its_size() -> None:
    data = vhd_images.fixed(bytes(8 * 512) + b"\1" + bytes(511))
    assert len(resized(vhd_images.fixed(bytes(9 * 512)), 8 * 512)) == 9 * 512
    with pytest.raises(UnsupportedFeature, match="there is data behind 4096, which would be lost"):
        FORMAT.resize(MemoryFile(data), 8 * 512)


def test_a_fixed_disk_grows_by_a_hole() -> None:
    """Nothing is written over the new part but where the footer was."""
    data = vhd_images.fixed(noise(4096))
    steps = list(FORMAT.resize(MemoryFile(data), 40 * MiB))
    assert sum(len(one.data) for one in steps if isinstance(one, Write)) <= 3 * 512


# --- dynamic disks ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Disk:
    """A file and what it reads as; shown by how it was made."""

    data: bytes = dataclasses.field(repr=False)
    content: bytes = dataclasses.field(repr=False)
    block: int
    how: object


@st.composite
def dynamic_disks(draw: st.DrawFn) -> Disk:
    """Packed and aligned disks, with few and with spare entries, of odd ends."""
    block = draw(st.sampled_from([512, BLOCK, 16 * KiB]))
    numbers = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
    size = max(numbers) * block + draw(st.integers(1, block // 512)) * 512
    blocks = {number: noise(block, number) for number in numbers}
    expected = vhd_images.dynamic_content(size, blocks, block_size=block)
    if block >= BLOCK and draw(st.booleans()):
        options = WriterOptions(IDENTIFIER, block_size=block)
        data = bytes(convert(MemoryFile(expected), "raw", "vhd", options=options).data)
        return Disk(data, expected, block, (size, numbers, "aligned"))
    spare, gap = draw(st.sampled_from([0, 3, 200])), draw(st.sampled_from([0, 512]))
    data = vhd_images.dynamic(size, blocks, block_size=block, spare_entries=spare, gap=gap)
    return Disk(data, expected, block, (size, numbers, spare, gap))


@given(dynamic_disks(), st.integers(1, 700))
@settings(max_examples=40)
def test_a_dynamic_disk_of_any_shape_grows(disk: Disk, by: int) -> None:
    """The rest of its last block too, where another program may have left anything."""
    size = len(disk.content) + by * 1024
    steps = FORMAT.resize(MemoryFile(disk.data), size)
    end = assert_survives(disk.data, steps, [disk.content, disk.content.ljust(size, b"\0")])
    footer = footer_of(end)
    assert end[:512] == end[-512:]
    assert footer.original_size == footer.current_size == size
    assert (footer.cylinders, footer.heads, footer.sectors) == geometry(size)


def test_a_table_that_outgrows_its_room_moves_the_blocks_behind_it() -> None:
    """128 entries fill a sector: the 129th needs the place of the first block."""
    blocks = {3: noise(BLOCK, 3), 0: noise(BLOCK), 100: noise(BLOCK, 1)}
    data = vhd_images.dynamic(128 * BLOCK, blocks, block_size=BLOCK)
    before = vhd_images.dynamic_content(128 * BLOCK, blocks, block_size=BLOCK)
    end = assert_survives(data, FORMAT.resize(MemoryFile(data), 129 * BLOCK), [before, before + bytes(BLOCK)])
    assert DynamicHeader.parse(end[512:1536]).max_entries == 129
    old, new = (struct.unpack(">101I", one[1536 : 1536 + 404]) for one in (data, end))
    assert new[3] > max(old[:1] + old[100:])  # the first in the file
    assert (new[0], new[100]) == (old[0], old[100])


def test_a_disk_laid_out_on_4_kib_stays_so() -> None:
    """The first block moves to where Windows would put the next one, and the footer follows it."""
    options = WriterOptions(IDENTIFIER, block_size=512 * KiB)
    disk = noise(2 * MiB)
    data = bytes(convert(MemoryFile(disk), "raw", "vhd", options=options).data)
    end = resized(data, 2000 * 512 * KiB)
    image = on_zeros(end)
    assert image.pread(0, 2 * MiB) == disk
    offsets = [one.offset for one in image.extents() if one.offset is not None]
    assert offsets
    assert all(offset % 4096 == 0 for offset in offsets)
    assert len(end) % 4096 == 0
    assert len(data) + 512 * KiB + 4096 == len(end)


def test_a_short_last_block_is_filled_up_when_it_is_to_be_seen() -> None:
    """Old QEMU ended the file where the disk ends; the footer's bytes must not become the guest's."""
    size = 2 * BLOCK - 1024
    data = vhd_images.dynamic(size, {1: noise(BLOCK)}, block_size=BLOCK)
    short = data[: -512 - 1024] + data[-512:]
    before = bytes(BLOCK) + noise(BLOCK)[: BLOCK - 1024]
    assert_survives(short, FORMAT.resize(MemoryFile(short), 3 * BLOCK), [before, before.ljust(3 * BLOCK, b"\0")])


def test_entries_behind_the_end_do_not_come_to_life() -> None:
    data = bytearray(vhd_images.dynamic(2 * BLOCK, {1: noise(BLOCK)}, block_size=BLOCK, spare_entries=10))
    data[1536 + 8 : 1536 + 12] = data[1536 + 4 : 1536 + 8]
    before = bytes(BLOCK) + noise(BLOCK)
    assert content(on_zeros(resized(bytes(data), 4 * BLOCK))) == before.ljust(4 * BLOCK, b"\0")


@given(dynamic_disks(), st.integers(1, 60))
@settings(max_examples=40)
def test_a_dynamic_disk_loses_zeros_and_nothing_else(disk: Disk, sectors: int) -> None:
    data, before = disk.data, disk.content
    size = sectors * 512
    if size >= len(before):
        return
    if any(before[size:]):
        with pytest.raises(UnsupportedFeature, match=f"there is data behind {size}"):
            FORMAT.resize(MemoryFile(data), size)
        return
    assert_survives(data, FORMAT.resize(MemoryFile(data), size), [before, before[:size]])


def test_a_disk_that_shrank_and_grows_again_has_zeros_there() -> None:
    blocks = {0: noise(BLOCK), 1: bytes(BLOCK), 2: bytes(BLOCK)}
    data = vhd_images.dynamic(3 * BLOCK, blocks, block_size=BLOCK)
    small = assert_survives(
        data, FORMAT.resize(MemoryFile(data), BLOCK), [noise(BLOCK) + bytes(2 * BLOCK), noise(BLOCK)]
    )
    assert [one.present for one in on_zeros(resized(small, 3 * BLOCK)).extents()] == [True, False]


def test_to_the_size_it_has_a_disk_takes_no_step() -> None:
    data = vhd_images.dynamic(3 * BLOCK, {}, block_size=BLOCK)
    assert list(FORMAT.resize(MemoryFile(data), 3 * BLOCK)) == []


@pytest.mark.parametrize("creator", [b"vpc ", b"qemu"])
@pytest.mark.parametrize("size", [4 * MiB, 3 * MiB])
def test_a_disk_whose_geometry_counts_has_the_size_asked_for_afterwards(creator: bytes, size: int) -> None:
    """No geometry gives 4 MiB: Windows' code makes every reader take the size itself."""
    footer = vhd_images.Footer(size=4 * MiB, creator=creator, geometry=(120, 4, 17))
    data = vhd_images.dynamic(4 * MiB, {0: noise(2 * MiB)}, footer=footer)
    assert on_zeros(data).virtual_size == 120 * 4 * 17 * 512
    image = on_zeros(resized(data, size))
    assert image.virtual_size == size
    assert content(image) == noise(2 * MiB).ljust(size, b"\0")
    assert image.footer.creator_app == b"win "


def test_the_largest_size_is_2040_gib() -> None:
    data = vhd_images.dynamic(3 * MiB, {0: noise(2 * MiB)})
    assert on_zeros(resized(data, MAX_SIZE)).virtual_size == MAX_SIZE
    with pytest.raises(UnsupportedFeature, match="at most 2040 GiB") as caught:
        FORMAT.resize(MemoryFile(data), MAX_SIZE + 512)
    assert "VHDX" in (caught.value.hint or "")


@pytest.mark.parametrize("size", [0, -512, 513, 4097])
def test_a_size_that_is_no_disk_is_refused(size: int) -> None:
    with pytest.raises(UnsupportedFeature, match="no whole number of sectors"):
        FORMAT.resize(MemoryFile(vhd_images.fixed(bytes(4096))), size)


def test_small_blocks_are_too_small_for_a_large_disk() -> None:
    data = vhd_images.dynamic(4096, {}, block_size=512)
    with pytest.raises(UnsupportedFeature, match="blocks of 512 bytes are too small"):
        FORMAT.resize(MemoryFile(data), 2000 * GiB)


def test_a_file_does_not_outgrow_its_addresses() -> None:
    """A differencing disk takes room for all it grows by, and blocks lie in the first 2 TiB."""
    options = WriterOptions(IDENTIFIER, "differencing", 256 * KiB, parent=LINK)
    data = bytes(empty(4 * MiB, options).data)
    with pytest.raises(UnsupportedFeature, match="a VHD's blocks lie in the first 2 TiB"):
        FORMAT.resize(MemoryFile(data), MAX_SIZE)


def test_a_header_in_the_way_of_the_table_is_not_moved() -> None:
    footer = vhd_images.Footer(size=4 * BLOCK, data_offset=2048).bytes()
    header = vhd_images.dynamic_header(entries=4, block_size=BLOCK)
    data = footer + bytes(1024) + b"\xff" * 512 + header + footer
    with pytest.raises(
        UnsupportedFeature, match="the dynamic header lies at 0x800, where the longer table has to be"
    ):
        FORMAT.resize(MemoryFile(data), 200 * BLOCK)
    assert on_zeros(resized(data, 100 * BLOCK)).virtual_size == 100 * BLOCK


@pytest.mark.parametrize("kind", ["overlap", "footers-differ", "saved"])
def test_a_disk_that_is_damaged_or_in_use_is_not_changed(kind: str) -> None:
    footer = vhd_images.Footer(size=3 * BLOCK, saved_state=kind == "saved")
    head = dataclasses.replace(footer, size=2 * BLOCK).bytes() if kind == "footers-differ" else None
    blocks = {0: noise(BLOCK), 1: noise(BLOCK, 1)}
    data = bytearray(vhd_images.dynamic(3 * BLOCK, blocks, block_size=BLOCK, footer=footer, head=head))
    if kind == "overlap":
        data[1540:1544] = data[1536:1540]
    match = "belongs to a saved machine" if kind == "saved" else "a damaged disk is not changed"
    with pytest.raises((CorruptImage, UnsupportedFeature), match=match):
        FORMAT.resize(MemoryFile(data), 9 * BLOCK)


@pytest.mark.parametrize("what", ["no copy", "a flag differs", "no footer", "a cut footer"])
def test_what_is_wrong_with_the_footers_is_mended_on_the_way(what: str) -> None:
    footer = vhd_images.Footer(size=3 * BLOCK)
    head = {"no copy": bytes(512), "a flag differs": dataclasses.replace(footer, hidden=1).bytes()}.get(what)
    tail = {"no footer": b"", "a cut footer": footer.bytes()[:100]}.get(what)
    data = vhd_images.dynamic(3 * BLOCK, {1: noise(BLOCK)}, block_size=BLOCK, footer=footer, head=head, tail=tail)
    before = content(on_zeros(data))
    end = changed(data, FORMAT.resize(MemoryFile(data), 9 * BLOCK))
    assert FORMAT.check(MemoryFile(end)) == []
    assert content(on_zeros(end)) == before.ljust(9 * BLOCK, b"\0")


def test_a_windows_disk_grows_to_what_windows_would_have_made() -> None:
    """Empty, 40 MiB made 1 GiB: the same table, footer and length as a new one of 1 GiB."""
    old, new = (sample(name).read_bytes() for name in ("win8.vhd", "win8.1-1GB.vhd"))
    end = resized(old, 1 * GiB)
    assert end[1536:-512] == new[1536:-512]
    assert DynamicHeader.parse(end[512:1536]) == DynamicHeader.parse(new[512:1536])
    same = dataclasses.replace(footer_of(end), unique_id=bytes(16), timestamp=0)
    assert same == dataclasses.replace(footer_of(new), unique_id=bytes(16), timestamp=0)


# --- XenServer's -----------------------------------------------------------------------------------------------


def xen_disk(size: int = 6 * MiB) -> bytes:
    options = WriterOptions(IDENTIFIER, creator="tap")
    return bytes(convert(MemoryFile(noise(2 * MiB).ljust(size, b"\0")), "raw", "vhd", options=options).data)


@pytest.mark.parametrize("size", [200 * MiB, 300 * MiB, 2 * MiB])
def test_the_map_of_a_xenserver_disk_goes_where_it_is_looked_for(size: int) -> None:
    """Right behind the table, and saying nothing, which is always true; 128 entries fill the sector there is."""
    end = resized(xen_disk(), size)
    entries = DynamicHeader.parse(end[512:1536]).max_entries
    at = 1536 + -(-entries * 4 // 512) * 512
    assert end[at : at + 1024] == batmap(at, entries)
    image = on_zeros(end)
    assert (image.virtual_size, image.pread(0, 6 * MiB)) == (size, noise(2 * MiB).ljust(min(size, 6 * MiB), b"\0"))
    assert not any(one.present for one in image.extents(2 * MiB))
    assert footer_of(end).creator_app == b"tap\0"
    assert FORMAT.check(MemoryFile(end)) == []


def test_a_xenserver_disk_ends_on_2_mib() -> None:
    with pytest.raises(UnsupportedFeature, match="XenServer would not see the end") as caught:
        FORMAT.resize(MemoryFile(xen_disk()), 7 * MiB)
    assert caught.value.hint == f"choose {8 * MiB}"


# --- differencing disks ----------------------------------------------------------------------------------------


@st.composite
def children(draw: st.DrawFn) -> Disk:
    """Differencing disks, some sectors of which were written; their content on a parent of noise."""
    block = draw(st.sampled_from([512, BLOCK, 16 * KiB]))
    size = draw(st.integers(1, 10 * block // 512)) * 512
    creator = {"creator": b"tap\0", "creator_version": 1} if draw(st.booleans()) else {}
    footer = vhd_images.Footer(size=size, disk_type=4, **creator)  # type: ignore[arg-type]
    data = vhd_images.differencing(size, "parent.vhd", block_size=block, footer=footer)
    places = draw(st.lists(st.integers(0, size // 512 - 1), max_size=8))
    writes = [(at * 512, noise(512, at)) for at in places]
    for at, written in writes:
        data = vhd_images.write(data, at, written)
    return Disk(data, vhd_images.overlaid(NOISE, size, writes), block, (size, places, creator))


@given(children(), st.integers(1, 60))
@settings(max_examples=25)
def test_a_differencing_disk_grows_by_zeros_and_not_by_its_parent(disk: Disk, by: int) -> None:
    """Here the parent is larger and full of data: none of it may show."""
    data, before = disk.data, disk.content
    size = len(before) + by * 1024
    if footer_of(data).creator_app == b"tap\0":
        with pytest.raises(UnsupportedFeature, match="XenServer"):
            FORMAT.resize(MemoryFile(data), size + (512 if size % (2 * MiB) == 0 else 0))
        return
    steps = FORMAT.resize(MemoryFile(data), size)
    assert_survives(data, steps, [before, before.ljust(size, b"\0")], look=on_noise)


def test_parent_locators_make_room_for_a_longer_table() -> None:
    """They are in the way as blocks are; the parent is found all the same, after every step."""
    data = vhd_images.differencing(128 * BLOCK, "parent.vhd", block_size=BLOCK)
    data = vhd_images.write(data, 0, noise(BLOCK, 5))
    before = vhd_images.overlaid(NOISE, 128 * BLOCK, [(0, noise(BLOCK, 5))])
    names = on_noise(data).info().references[0].names

    def look(state: bytes) -> VhdImage:
        image = on_noise(state)
        assert image.info().references[0].names == names
        return image

    steps = FORMAT.resize(MemoryFile(data), 400 * BLOCK)
    assert_survives(data, steps, [before, before.ljust(400 * BLOCK, b"\0")], look=look)


def test_a_differencing_disk_does_not_become_smaller() -> None:
    data = vhd_images.differencing(4 * BLOCK, "parent.vhd", block_size=BLOCK)
    with pytest.raises(UnsupportedFeature, match="what its parent holds there would be lost"):
        FORMAT.resize(MemoryFile(data), BLOCK)


# --- another parent --------------------------------------------------------------------------------------------

LINK = ParentLink(b"n" * 16, 4 * MiB, ".\\new.vhd", "D:\\disks\\new.vhd")
LONG = ParentLink(b"n" * 16, 4 * MiB, "..\\" + "long\\" * 500 + "new.vhd", "D:\\" + "long\\" * 6000 + "new.vhd")


@pytest.mark.parametrize("link", [LINK, LONG, dataclasses.replace(LINK, absolute=None)], ids=["short", "long", "one"])
@pytest.mark.parametrize("spare", [0, 512])
def test_another_parent_is_named_and_the_old_one_until_then(link: ParentLink, spare: int) -> None:
    """After every step the disk names one of the two, whole: names and identity belong together."""
    data = vhd_images.differencing(4 * MiB, "old.vhd", block_size=64 * KiB, spare_entries=spare)
    data = vhd_images.write(data, 0, noise(1024))
    allowed: set[Reference] = {on_zeros(data).info().references[0]}
    after = changed(data, FORMAT.rebase(MemoryFile(data), link))
    (new,) = on_zeros(after).info().references
    assert new.names[: 2 if link.absolute else 1] == tuple(filter(None, (link.relative, link.absolute)))
    assert new.identities == (link.identity,)
    allowed.add(new)

    def look(state: bytes) -> VhdImage:
        image = on_zeros(state)
        assert image.info().references[0] in allowed
        return image

    before = content(on_zeros(data))
    end = assert_survives(data, FORMAT.rebase(MemoryFile(data), link), [before], look=look)
    assert on_zeros(end).info().references[0] == new
    assert len(end) == len(data) if link is not LONG else len(end) > len(data)


def test_names_that_fit_stay_where_windows_put_them() -> None:
    data = sample("win8-child.vhd").read_bytes()
    link = ParentLink(b"n" * 16, 40 * MiB, ".\\new.vhd", "D:\\new.vhd")
    end = changed(data, FORMAT.rebase(MemoryFile(data), link))
    header = DynamicHeader.parse(end[512:1536])
    assert [(one.code, one.offset, one.space) for one in header.locators[:2]] == [
        (b"W2ku", 0x1000, 0x1000),
        (b"W2ru", 0x3000, 0x10000),
    ]
    assert header.parent_name.decode("utf-16-be").rstrip("\0") == "D:\\new.vhd"
    assert end[0x1000:0x1100].rstrip(b"\0") == "D:\\new.vhd".encode("utf-16-le").rstrip(b"\0")
    assert len(end) == len(data)
    assert end[-512:] == data[-512:]


def test_a_new_parent_is_named_to_xenserver_as_it_likes_it() -> None:
    footer = vhd_images.Footer(size=4 * MiB, disk_type=4, creator=b"tap\0", creator_version=0x00010003)
    data = vhd_images.differencing(4 * MiB, "old.vhd", footer=footer)
    image = on_zeros(changed(data, FORMAT.rebase(MemoryFile(data), LINK)))
    assert image.dynamic is not None
    assert [one.code for one in image.dynamic.locators[:3]] == [b"MacX", b"W2ru", bytes(4)]
    assert image.info().references[0].names == (".\\new.vhd", "./new.vhd", "new.vhd")


def test_only_a_differencing_disk_has_a_parent() -> None:
    for data in (vhd_images.dynamic(4 * MiB, {}), vhd_images.fixed(bytes(4096))):
        with pytest.raises(UnsupportedFeature, match="not a differencing disk"):
            FORMAT.rebase(MemoryFile(data), LINK)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (dataclasses.replace(LINK, identity=b"short"), "must be a VHD"),
        (dataclasses.replace(LINK, virtual_size=5 * MiB), "Windows opens a differencing VHD only where both"),
        (dataclasses.replace(LINK, relative=""), "a parent's name of 0 bytes"),
        (dataclasses.replace(LINK, relative="x" * 40000), "a parent's name of 80000 bytes"),
        (dataclasses.replace(LINK, absolute="C:\\\udcff"), "cannot be written as Unicode"),
    ],
    ids=["identity", "larger", "empty", "long", "surrogate"],
)
def test_a_parent_that_cannot_be_named_is_refused(link: ParentLink, message: str) -> None:
    data = vhd_images.differencing(4 * MiB, "old.vhd")
    with pytest.raises(UnsupportedFeature, match=message):
        FORMAT.rebase(MemoryFile(data), link)


# --- what every change keeps to --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grow", "move", "shrink", "rebase", "differencing"])
def test_at_no_time_do_two_footers_disagree_or_does_a_guests_byte_stand_last(kind: str) -> None:
    """The one would be refused, the other might be taken for a footer."""
    fake = vhd_images.Footer(size=512, disk_type=2).bytes()
    blocks = {0: fake * 8, 5: bytes(BLOCK)}
    data = vhd_images.dynamic(8 * BLOCK, blocks, block_size=BLOCK)
    size = {"grow": 100, "move": 1000, "shrink": 4, "differencing": 300}.get(kind, 0) * BLOCK
    steps: list[Change]
    if kind in ("rebase", "differencing"):
        data = vhd_images.write(vhd_images.differencing(8 * BLOCK, "p.vhd", block_size=BLOCK), 0, fake)
    link = dataclasses.replace(LINK, virtual_size=8 * BLOCK)
    file = MemoryFile(data)
    steps = list(FORMAT.rebase(file, link) if kind == "rebase" else FORMAT.resize(file, size))
    states = [changed(data, steps[:count]) for count in range(len(steps) + 1)]
    for state in states:
        assert state[-512:] != fake
        assert {fact.code for fact in on_zeros(state).info().facts} <= {"footer-missing"}
    assert isinstance(steps[-1], Barrier)


def test_steps_decided_beforehand_and_on_the_way_are_the_same() -> None:
    """A caller may take each step as it comes, or list them first."""
    blocks = {number: noise(BLOCK, number) for number in range(6)}
    data = vhd_images.dynamic(120 * BLOCK + 512, blocks, block_size=BLOCK)
    listed = list(FORMAT.resize(MemoryFile(data), 2000 * BLOCK))
    file, taken = MemoryFile(data), []
    for step in FORMAT.resize(file, 2000 * BLOCK):
        changes.apply([step], file)
        taken.append(step)
    assert taken == listed


def test_the_identity_stays() -> None:
    """Children know the disk by it."""
    footer = vhd_images.Footer(size=4 * MiB, unique_id=uuid.UUID(int=5).bytes)
    data = vhd_images.dynamic(4 * MiB, {}, footer=footer)
    for size in (2 * MiB, 40 * MiB):
        assert on_zeros(resized(data, size)).identity == uuid.UUID(int=5).bytes


def test_ranges_of_a_changed_disk_do_not_overlap() -> None:
    blocks = {number: noise(BLOCK, number) for number in range(6)}
    data = vhd_images.dynamic(120 * BLOCK + 512, blocks, block_size=BLOCK)
    ranges = sorted((one.offset, one.length) for one in on_zeros(resized(data, 2000 * BLOCK)).ranges())
    assert all(one[0] + one[1] <= other[0] for one, other in itertools.pairwise(ranges))
