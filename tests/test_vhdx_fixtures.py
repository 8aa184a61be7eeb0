"""The VHDX that other tests are made of: where Windows' own files have the same content, they have the same bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fixtures import vhdx_images as made
from fixtures.vhdx_images import FULL, PARTIAL, Block, Header, Recipe, Region, RegionTable, make
from fixtures.vhdx_logs import Data, Entry, Run, Zeros, log
from tests.disks import md5, noise
from tests.samples import sample, sample_facts

KiB, MiB = 1 << 10, 1 << 20


def test_the_checksum_is_castagnolis() -> None:
    """The check value of the catalogue, and RFC 3720's vectors."""
    assert made.crc32c(b"123456789") == 0xE3069283
    assert made.crc32c(bytes(32)) == 0x8A9136AA
    assert made.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("length", [1, 7, 4096, 65536, 65539])
def test_zeros_at_the_end_count_for_the_checksum(length: int) -> None:
    """They are taken in strides; one of them by hand is the reference."""
    data = noise(9, length)
    crc = made.crc32c(data) ^ 0xFFFFFFFF
    for _ in range(length):
        crc = _one_zero(crc)
    assert made.crc32c(data + bytes(length)) == crc ^ 0xFFFFFFFF


def _one_zero(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


# --- against Windows' files --------------------------------------------------------------------------------------


def header_of(data: bytes, at: int) -> Header:
    _, _, sequence, file_write, data_write, log_guid, log_version, version, length, offset = struct.unpack_from(
        "<4sIQ16s16s16sHHIQ", data, at
    )
    return Header(
        sequence=sequence,
        file_write=file_write,
        data_write=data_write,
        log_guid=log_guid,
        log_version=log_version,
        version=version,
        log_length=length,
        log_offset=offset,
    )


def windows_recipe(data: bytes, *patches: tuple[int, bytes], **fields: object) -> Recipe:
    """What a file of Windows 10 names in ways that a recipe does not decide."""
    creator = data[8:520].decode("utf-16-le").rstrip("\0")
    # Behind the last entry of the metadata table it stands a second time; the count does not include that.
    end = 2 * MiB + 32 + 32 * data[2 * MiB + 10]
    return Recipe(
        creator=creator,
        disk_id=data[2 * MiB + 0x10018 :][:16],
        headers=(header_of(data, 0x10000), header_of(data, 0x20000)),
        log=data[MiB : 2 * MiB],
        patches=[(end, data[end - 32 : end]), *patches],
        **fields,  # type: ignore[arg-type]
    )


def locator_pairs(item: bytes) -> list[tuple[str, str]]:
    count = struct.unpack_from("<H", item, 18)[0]
    pairs = []
    for key, value, key_length, value_length in struct.iter_unpack("<IIHH", item[20 : 20 + 12 * count]):
        texts = item[key : key + key_length], item[value : value + value_length]
        pairs.append((texts[0].decode("utf-16-le"), texts[1].decode("utf-16-le")))
    return pairs


def test_a_fixed_disk_of_windows_is_made_byte_by_byte() -> None:
    data = sample("fat-parent.vhdx").read_bytes()
    blocks = {number: Block(data=data[(4 + 2 * number) * MiB :][: 2 * MiB]) for number in range(2)}
    recipe = windows_recipe(data, size=4 * MiB, block_size=2 * MiB, fixed=True, blocks=blocks)
    assert make(recipe).bytes() == data
    assert md5(made.content(recipe)) == sample_facts("fat-parent.vhdx").content_md5


def test_a_differencing_disk_of_windows_is_made_byte_by_byte() -> None:
    data = sample("fat-differential.vhdx").read_bytes()
    bits = data[4 * MiB : 5 * MiB]
    present = frozenset(at for at in range(4096) if bits[at >> 3] >> (at & 7) & 1)
    # Bits of blocks behind the disk's end are set, as far as their page of 4 KiB goes.
    recipe = windows_recipe(
        data,
        (4 * MiB + 1024, b"\xff" * 3072),
        size=4 * MiB,
        block_size=2 * MiB,
        blocks={0: Block(state=PARTIAL, data=data[5 * MiB : 7 * MiB], present=present)},
        parent=locator_pairs(data[2 * MiB + 0x10028 :][:674]),
    )
    assert make(recipe).bytes() == data
    below = sample("fat-parent.vhdx").read_bytes()[4 * MiB :]
    assert md5(made.content(recipe, below)) == sample_facts("fat-differential.vhdx").content_md5


def test_the_keys_of_a_parent_are_those_of_windows_in_its_order() -> None:
    pairs = locator_pairs(sample("fat-differential.vhdx").read_bytes()[2 * MiB + 0x10028 :][:674])
    ours = made.linked_to(bytes(16))
    assert [key for key, _ in pairs] == [key for key, _ in ours]
    assert dict(pairs)["parent_linkage2"] == dict(ours)["parent_linkage2"]
    assert dict(pairs)["relative_path"] == ".\\fat-parent.vhdx"


def log_of(path: Path) -> tuple[bytes, bytes]:
    """The log of a file, and the GUID that its entries need."""
    with path.open("rb") as file:
        data = file.read(2 * MiB)
    headers = [header_of(data, at) for at in made.HEADERS_AT]
    current = max(headers, key=lambda header: header.sequence)
    return data[current.log_offset :][: current.log_length], current.log_guid


def test_the_log_entries_of_windows_are_made_byte_by_byte() -> None:
    """Taken apart by hand and put together again, one with no descriptors among them."""
    ring, log_guid = log_of(sample("vhdx-log-replay.vhdx"))
    found = []
    for at in range(0, len(ring), 4 * KiB):
        signature, _, length, tail, sequence, count, _, guid, flushed, last = struct.unpack_from(
            "<4sIIIQII16sQQ", ring, at
        )
        if signature != b"loge" or guid != log_guid:
            continue
        descriptors: list[Data | Zeros] = []
        sectors = at + -(-(64 + 32 * count) // 4096) * 4096
        for number in range(count):
            kind, trailing, leading, offset, _ = struct.unpack_from("<4s4s8sQQ", ring, at + 64 + 32 * number)
            if kind == b"zero":
                descriptors.append(Zeros(offset=offset, length=int.from_bytes(leading, "little")))
                continue
            payload = ring[sectors + 8 : sectors + 4092]
            descriptors.append(Data(offset=offset, data=leading + payload + trailing))
            sectors += 4096
        entry = Entry(
            sequence=sequence, descriptors=descriptors, tail=tail, flushed=flushed, last=last, log_guid=guid
        )
        assert entry.bytes() == ring[at : at + length]
        found.append(count)
    assert len(found) == 5
    assert 0 in found


# --- what is not in any of Windows' files ------------------------------------------------------------------------


def test_checksums_are_right_unless_told_otherwise() -> None:
    good, bad = Header(sequence=3).bytes(), Header(sequence=3, crc_off_by=1).bytes()
    assert [at for at in range(4096) if good[at] != bad[at]] in ([4], [4, 5], [4, 5, 6], [4, 5, 6, 7])
    assert made.with_crc(good) == made.with_crc(bad) == good


def test_the_layouts_differ_in_where_and_in_which_order_regions_are() -> None:
    recipes = {layout: Recipe(size=3 * MiB, layout=layout) for layout in ("windows", "qemu", "disk2vhd")}
    lines = {layout: made.region_lines(recipe) for layout, recipe in recipes.items()}
    assert lines["windows"] == [Region(made.BAT, 3 * MiB), Region(made.METADATA, 2 * MiB)]
    assert lines["qemu"] == [Region(made.BAT, 2 * MiB, flags=0), Region(made.METADATA, 3 * MiB, flags=0)]
    assert lines["disk2vhd"] == lines["windows"][::-1]
    assert [make(recipe).size for recipe in recipes.values()] == [4 * MiB, 8 * MiB, 4 * MiB + 512]
    assert make(recipes["qemu"]).bytes()[2 * MiB :][:24] == struct.pack("<3Q", 2, 2, 2)


def test_sector_bitmaps_come_after_each_chunk_of_the_bat() -> None:
    """With 256 MiB blocks every sixteen blocks have one."""
    recipe = Recipe(
        size=40 * 256 * MiB,
        block_size=256 * MiB,
        blocks={number: Block(state=PARTIAL, present=frozenset({3}), data=b"x") for number in (15, 16, 39)},
        parent=made.linked_to(bytes(16)),
    )
    assert (recipe.chunk_ratio, recipe.bat_entries) == (16, 3 * 17)
    pieces = dict(make(recipe).pieces)
    bat = {at - 3 * MiB: entry for at, entry in pieces.items() if 3 * MiB <= at < 4 * MiB}
    assert [at // 8 for at in bat] == [16, 15, 33, 17, 50, 41]
    bits = [pieces[struct.unpack("<Q", bat[index * 8])[0] & ~0xFFFFF] for index in (16, 33, 50)]
    assert [piece.index(8) for piece in bits] == [15 * 65536, 0, 7 * 65536]


def test_an_entry_wraps_around_the_ring_and_a_later_run_lies_over_an_earlier_one() -> None:
    entry = Entry(sequence=4, descriptors=[Data(offset=5 * MiB, data=noise(4096))])
    ring = log(Run(MiB - 4 * KiB, [entry]), file_size=8 * MiB)
    whole = entry.bytes(start=MiB - 4 * KiB, file_size=8 * MiB)
    assert (ring[-4096:], ring[:4096], any(ring[4096:-4096])) == (whole[:4096], whole[4096:], False)
    over = log(Run(MiB - 4 * KiB, [entry]), Run(0, [Entry(sequence=9)]), file_size=8 * MiB)
    assert over[:4096] == Entry(sequence=9).bytes(file_size=8 * MiB)


def test_a_region_table_can_say_anything() -> None:
    table = RegionTable(regions=[Region(made.UNKNOWN, 9 * MiB, 5, 1)], count=2048, signature=b"nope").bytes()
    assert table[:4] == b"nope"
    assert struct.unpack_from("<II", table, 8) == (2048, 0)
    assert table[16:48] == made.UNKNOWN + struct.pack("<QII", 9 * MiB, 5, 1)


def test_a_large_file_is_written_with_holes(tmp_path: Path) -> None:
    recipe = Recipe(size=1 << 40, block_size=256 * MiB, blocks={4000: Block(data=b"far")})
    path = make(recipe).write(tmp_path / "far.vhdx")
    assert path.stat().st_size == 4 * MiB + 256 * MiB
    with path.open("rb") as file:
        file.seek(3 * MiB + recipe.entry_of(4000) * 8)
        assert struct.unpack("<Q", file.read(8)) == (4 * MiB | FULL,)
        file.seek(4 * MiB)
        assert file.read(4) == b"far\0"
