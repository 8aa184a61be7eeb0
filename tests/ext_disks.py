"""Disks with an ext file system of a folder's content, made by mke2fs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.oracles import need_tool

MIB = 1 << 20
START = 1 * MIB
LENGTH = 40 * MIB
UUID = "0f2b2a51-7a1c-4d6e-9d6b-0c1d2e3f4a5b"


def make_ext(folder: Path, out: Path, *options: str, kind: str = "ext4") -> Path:
    """A bare file system of ``LENGTH`` bytes."""
    out.write_bytes(b"")
    with out.open("r+b") as file:
        file.truncate(LENGTH)
    command = [need_tool("mke2fs"), "-q", "-F", "-t", kind, "-U", UUID, "-L", "root", *options, "-d", str(folder)]
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    return out


def make_disk(file_system: Path, out: Path, *, boot_code: bool = True) -> Path:
    """A raw disk with a master boot record and that file system as its only partition."""
    record = bytearray(512)
    if boot_code:
        record[:3] = b"\xeb\x63\x90"
    record[446:462] = (
        bytes([0x80, 0, 0, 0, 0x83, 0, 0, 0])
        + (START // 512).to_bytes(4, "little")
        + (LENGTH // 512).to_bytes(4, "little")
    )
    record[510:] = b"\x55\xaa"
    with out.open("wb") as file:
        file.write(record)
        file.seek(START)
        file.write(file_system.read_bytes())
    return out
