"""The tiny guest's disk is what its own code will look for."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from imagekit.launch import tiny_guest
from imagekit.launch.tiny_guest import (
    LOAD_ADDRESS,
    MIB,
    SECTOR,
    TINY_GUEST_SIZE,
    assemble,
    disk_pieces,
    marked_sector,
    write_tiny_guest,
)
from tests.oracles import need_tool


def test_the_disk_has_a_boot_signature_and_one_active_partition(tmp_path: Path) -> None:
    disk = tmp_path / "tiny.raw"
    write_tiny_guest(disk)
    data = disk.read_bytes()
    assert len(data) == TINY_GUEST_SIZE
    assert data[510:512] == b"\x55\xaa"
    start, length = struct.unpack_from("<II", data, 446 + 8)
    assert (data[446], start * SECTOR, (start + length) * SECTOR) == (0x80, MIB, TINY_GUEST_SIZE)
    assert not any(data[462:510])


def test_the_disk_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tiny_guest(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_disk_takes_little_room(tmp_path: Path) -> None:
    disk = tmp_path / "tiny.raw"
    write_tiny_guest(disk)
    blocks = getattr(disk.stat(), "st_blocks", None)
    if blocks is None:
        pytest.skip("this system does not tell how much room a file takes")
    assert blocks * 512 < MIB


def test_a_larger_disk_has_its_last_sector_marked() -> None:
    pieces = disk_pieces(4 << 30)
    last = (4 << 30) - SECTOR
    assert pieces[last] == marked_sector(last // SECTOR)
    assert sorted(pieces) == [0, 3 * MIB, 37 * MIB, last]


@pytest.mark.parametrize("size", [0, MIB, TINY_GUEST_SIZE - MIB, TINY_GUEST_SIZE + 512, 1 << 42])
def test_a_size_the_code_cannot_address_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(ValueError, match="whole MiB"):
        write_tiny_guest(tmp_path / "tiny.raw", size=size)
    assert not (tmp_path / "tiny.raw").exists()


def test_a_marked_sector_begins_with_its_number_and_adds_up_to_zero() -> None:
    for lba in (1, 6144, 0xFFFFFFFF):
        sector = marked_sector(lba)
        assert len(sector) == SECTOR
        assert struct.unpack_from("<I", sector) == (lba,)
        assert sum(struct.unpack("<256H", sector)) & 0xFFFF == 0


def test_references_are_resolved_forward_and_back() -> None:
    listing = """
    back:
        EB ~on           ; jmp on
        E8 >back         ; call back
        BE =text         ; mov si, text
    on:
        pad 16
    text:
        "a\\r"
    """
    code = assemble(listing, origin=0x100)
    assert code[:8].hex(" ") == "eb 06 e8 fb ff be 10 01"
    assert code[8:] == bytes(8) + b"a\r\0"


@pytest.mark.parametrize("listing", ["EB ~nowhere", "a:\n pad 200\n EB ~a", "00 00\n pad 1"])
def test_a_listing_that_cannot_be_put_together_fails(listing: str) -> None:
    with pytest.raises((KeyError, struct.error, ValueError)):
        assemble(listing, origin=0)


@pytest.mark.oracle
def test_every_instruction_is_what_the_words_beside_its_bytes_say(tmp_path: Path) -> None:
    """objdump reads the bytes of each line back: one instruction, of the same name, and of the same length."""
    objdump = need_tool("objdump")
    code = assemble(tiny_guest._LISTING + tiny_guest._places_listing({}), origin=LOAD_ADDRESS)
    (tmp_path / "code").write_bytes(code)
    dump = subprocess.run(
        [objdump, "-D", "-b", "binary", "-m", "i8086", "-M", "intel", "--insn-width=8", str(tmp_path / "code")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    seen = {int(at, 16): text for at, text in re.findall(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(.+)$", dump, re.M)}
    instructions = list(written_instructions())
    assert len(instructions) > 150
    for at, words in instructions:
        assert names(seen[at]) == names(words), f"at {at:#x}"


def written_instructions() -> list[tuple[int, str]]:
    """Offset and words of every instruction of the listing."""
    at, found = 0, []
    for line in tiny_guest._LISTING.splitlines():
        source, _, words = (line.strip(), "", "") if '"' in line else line.strip().partition(";")
        if words:
            found.append((at, words.strip().split("  ")[0]))  # a remark may follow
        if source.startswith("pad"):
            at = int(source.split()[1])
        elif '"' in source:
            at += len(source.strip('"').encode().decode("unicode_escape")) + 1
        elif not source.endswith(":"):
            at += sum(2 if token[0] in "=>" else 1 for token in source.split())
    return found


def names(words: str) -> tuple[object, ...]:
    """The instruction's name (one for synonyms) and its registers in order, as either notation has them."""
    if string := re.match(r"(rep[ez]? )?(lods|outs|ins|cmps)([bw]?)\b(.*)", words):
        width = string[3] or ("b" if "BYTE" in string[4] else "w")
        return (bool(string[1]), string[2], width)
    mnemonic, _, operands = words.partition(" ")
    if mnemonic[0] == "j" or mnemonic in ("call", "loop"):
        return ({"jc": "jb", "jz": "je", "jnz": "jne"}.get(mnemonic, mnemonic),)
    registers = re.findall(r"\b(?:e?[abcd]x|[abcd][lh]|[sd]i|sp|[dse]s(?!:))\b", operands)
    return (mnemonic, *registers)
