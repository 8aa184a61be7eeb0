"""Structures that say anything at all, with right checksums: numbers chosen by hypothesis, where no seed would lead.

Hypothesis prefers the ends of ranges and what is near to numbers that mean something; what it finds it makes small.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.hostile import qcow2, vdi, vhd, vhdx, vmdk
from fixtures.qcow2_images import Plain, Recipe, make
from fixtures.vhd_images import Footer
from fixtures.vhdx_images import BAT, FILE_PARAMETERS, METADATA, VIRTUAL_SIZE, Item, MiB, Region
from fixtures.vhdx_logs import Data, Entry, Zeros
from imagekit.formats.files import MemoryFile
from tests.test_fuzz import judge

pytestmark = pytest.mark.slow

EXAMPLES = settings(max_examples=150)
KNOWN = [
    0,
    1,
    2,
    3,
    4,
    7,
    16,
    63,
    64,
    511,
    512,
    513,
    1024,
    1536,
    2048,
    4096,
    65536,
    1 << 20,
    1 << 21,
    3 << 20,
    1 << 30,
]


def number(bits: int) -> st.SearchStrategy[int]:
    """Of that many bits: anything, and above all what is near to ends, powers of two and usual places."""
    near = st.sampled_from([*KNOWN, *(1 << at for at in range(bits)), (1 << bits) - 1])
    moved = st.builds(lambda one, by: (one + by) % (1 << bits), near, st.integers(-2, 2))
    return st.one_of(moved, st.integers(0, (1 << bits) - 1))


U8, U16, U32, U64 = number(8), number(16), number(32), number(64)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


@given(
    footer=some(
        size=U64,
        original_size=U64,
        geometry=st.tuples(U16, U8, U8),
        disk_type=st.one_of(st.sampled_from([2, 3, 4]), U32),
        data_offset=U64,
        version=U32,
        creator=st.sampled_from([b"vpc ", b"tap\0", b"\x1b[2J"]),
    )
)
@EXAMPLES
def test_any_vhd_footer(footer: dict[str, Any]) -> None:
    judge(f"footer {footer}", MemoryFile(vhd.with_footer(**footer)))


@given(
    header=some(entries=U32, block_size=U32, bat_offset=U64),
    size=st.one_of(st.just(vhd.SIZE), U64.map(lambda size: size & ~511)),
    bat=st.lists(U32, max_size=4),
)
@EXAMPLES
def test_any_vhd_header_and_bat(header: dict[str, Any], size: int, bat: list[int]) -> None:
    data = bytearray(vhd.with_header(**header))
    footer = Footer(size=size).bytes()
    data[:512] = data[-512:] = footer
    data[1536 : 1536 + 4 * len(bat)] = struct.pack(f">{len(bat)}I", *bat)
    judge(f"size {size}, header {header}, BAT {bat}", MemoryFile(data))


@given(
    parameters=st.none() | st.tuples(U32, U32),
    size=st.none() | U64,
    entries=st.dictionaries(st.integers(0, 4), U64, max_size=3),
)
@EXAMPLES
def test_any_vhdx_metadata_and_bat(
    parameters: tuple[int, int] | None, size: int | None, entries: dict[int, int]
) -> None:
    items = {}
    if parameters is not None:
        items[FILE_PARAMETERS] = Item(data=struct.pack("<II", *parameters), flags=4)
    if size is not None:
        items[VIRTUAL_SIZE] = Item(data=struct.pack("<Q", size), flags=6)
    made = vhdx.image(items=items, entries=entries)
    judge(f"parameters {parameters}, size {size}, entries {entries}", MemoryFile(made.bytes()))


@given(bat=st.tuples(U64, U32), metadata=st.tuples(U64, U32), count=st.none() | U32)
@EXAMPLES
def test_any_vhdx_regions(bat: tuple[int, int], metadata: tuple[int, int], count: int | None) -> None:
    places = [
        (at // MiB * MiB, length // MiB * MiB) if length % 2 else (at, length) for at, length in (bat, metadata)
    ]
    made = vhdx.with_regions(Region(BAT, *places[0]), Region(METADATA, *places[1]), count=count)
    judge(f"regions {places}, count {count}", MemoryFile(made.bytes()))


PAGES = st.builds(lambda at: Data(offset=at, data=b"\xa5" * 4096), U64)
ZEROS = st.builds(lambda at, length: Zeros(offset=at, length=length), U64, U64)


@given(
    descriptors=st.lists(st.one_of(PAGES, ZEROS), max_size=4),
    fields=some(tail=U32, flushed=U64, last=U64, length=U32, count=U32),
)
@EXAMPLES
def test_any_vhdx_log(descriptors: list[Data | Zeros], fields: dict[str, Any]) -> None:
    made = vhdx.with_run(Entry(sequence=1, descriptors=descriptors, **fields))
    judge(f"log {descriptors}, {fields}", MemoryFile(made.bytes()))


QCOW2_FIELDS = [(8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
QCOW2_FIELDS += [(72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)]


@given(
    header=st.dictionaries(st.sampled_from(QCOW2_FIELDS), U64, max_size=3),
    l1=st.none() | U64,
    l2=st.dictionaries(st.integers(0, 15), U64, max_size=3),
    bits=st.sampled_from([9, 12, 16]),
)
@EXAMPLES
def test_any_qcow2(header: dict[tuple[int, int], int], l1: int | None, l2: dict[int, int], bits: int) -> None:
    made = (
        qcow2.sound() if bits == 12 else make(Recipe(size=16 << bits, cluster_bits=bits, clusters={0: _plain(bits)}))
    )
    for cluster, entry in l2.items():
        made = made.poked(made.l2_entry(cluster), entry)
    if l1 is not None:
        made = made.poked(made.l1_entry(0), l1)
    for (at, width), value in header.items():
        made = made.poked(at, value % (1 << 8 * width), width)
    judge(f"header {header}, L1 {l1}, L2 {l2}", MemoryFile(made.data))


def _plain(bits: int) -> Any:
    return Plain(b"\xa1" * (1 << bits))


VMDK_FIELDS = [vmdk.VERSION, vmdk.FLAGS, vmdk.CAPACITY, vmdk.GRAIN_SIZE, vmdk.DESCRIPTOR_AT, vmdk.DESCRIPTOR_SIZE]
VMDK_FIELDS += [vmdk.TABLE_ENTRIES, vmdk.REDUNDANT_AT, vmdk.DIRECTORY_AT, vmdk.OVERHEAD, vmdk.COMPRESSION]


@given(
    header=st.dictionaries(st.sampled_from(VMDK_FIELDS), U64, max_size=3),
    grains=st.dictionaries(st.integers(0, 7), U32, max_size=3),
)
@EXAMPLES
def test_any_vmdk(header: dict[tuple[int, int], int], grains: dict[int, int]) -> None:
    made = vmdk.sound()
    for grain, sector in grains.items():
        made = made.poked(made.entry(grain), sector, 4).poked(made.entry(grain, redundant=True), sector, 4)
    for (at, width), value in header.items():
        made = made.poked(at, value % (1 << 8 * width), width)
    judge(f"header {header}, grains {grains}", MemoryFile(made.data))


@given(
    text=st.text(max_size=200), lines=st.lists(st.sampled_from(["RW 8 FLAT", "createType=", "CID=", '"a" 0', "\0"]))
)
@EXAMPLES
def test_any_vmdk_descriptor(text: str, lines: list[str]) -> None:
    for data in (vmdk.with_text((text + "\n".join(lines)).encode()), vmdk.flat(text.replace("\0", ""))):
        judge(f"descriptor {text!r} {lines}", MemoryFile(data))


@given(header=st.dictionaries(st.sampled_from(range(64, 400, 4)), U32, max_size=4), blocks=st.lists(U32, max_size=4))
@EXAMPLES
def test_any_vdi(header: dict[int, int], blocks: list[int]) -> None:
    data = bytearray(vdi.with_map(*blocks))
    for at, value in header.items():
        data[at : at + 4] = value.to_bytes(4, "little")
    judge(f"header {header}, map {blocks}", MemoryFile(data))
