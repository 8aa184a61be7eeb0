"""The small guest for UEFI is the program that the words beside its bytes say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.uefi_guest import CODE, LISTING, uefi_application
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle


@pytest.fixture
def dump(tmp_path: Path) -> dict[int, str]:
    """Address and text of every instruction that objdump finds in the file, which it reads as PE."""
    (tmp_path / "guest.efi").write_bytes(uefi_application())
    done = subprocess.run(
        [need_tool("objdump"), "-d", "-M", "intel", "--insn-width=8", str(tmp_path / "guest.efi")],
        capture_output=True,
        text=True,
        check=True,
    )
    return {int(at, 16): text for at, text in re.findall(r"^ *([0-9a-f]+):\t[0-9a-f ]+\t(.+)$", done.stdout, re.M)}


def test_every_instruction_is_what_the_words_beside_its_bytes_say(dump: dict[int, str]) -> None:
    """One instruction of the same name and length, with the same registers and displacements."""
    instructions = list(written())
    assert len(instructions) > 80
    for at, words in instructions:
        assert parts(dump[at]) == parts(words), f"at {at:#x}: {words} is {dump[at]}"


def written() -> Iterator[tuple[int, str]]:
    """Address and words of every instruction of the listing."""
    at = CODE
    for line in LISTING.splitlines():
        source, _, words = line.strip().partition(";")
        if words:
            yield at, words.strip().split("  ")[0]  # a remark may follow
            at += sum({"~": 1, ">": 4}.get(token[0], 1) for token in source.split())


def parts(text: str) -> tuple[str, list[str]]:
    """The instruction's name and its registers and numbers in order, in either notation."""
    text = text.split("#")[0].replace("QWORD PTR", "").replace("DWORD PTR", "").replace("BYTE PTR", "")
    name, _, operands = text.partition(" ")
    if name in ("lods", "stos"):  # objdump writes out what the name implies
        return name + {"rax": "q", "al": "b", "ax": "w"}[re.findall(r"\b(?:rax|al|ax)\b", operands)[0]], []
    if name[0] == "j" or name == "loop" or (name == "call" and "[" not in operands):
        return name, []  # where to is a label here and an address there
    operands = re.sub(r"\[rip\+0x[0-9a-f]+\]", "", operands)
    return name, re.findall(r"\b(?:r[a-ds0-9][xip0-9]*d?|e[a-d]x|[a-d]l|0x[0-9a-f]+)\b", operands)
