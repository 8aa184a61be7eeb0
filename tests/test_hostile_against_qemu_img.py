"""The hostile corpus through imagekit and through qemu-img: what one takes and the other refuses, with the reasons.

What both refuse, or only imagekit refuses, is what its rules are for. What only qemu-img refuses needs a reason here.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fixtures.hostile import Hostile, corpus
from tests.hostile_runs import convert, given
from tests.oracles import need_tool

DRIVERS = {".vhd": "vpc", ".vhdx": "vhdx", ".qcow2": "qcow2", ".vmdk": "vmdk", ".vdi": "vdi"}
ENTRIES = {name: one for name, one in corpus().items() if one.suffix in DRIVERS or name[0] == "p"}
PATIENCE = 10
"""Seconds; an address that nobody has takes longer to be given up."""

SMALL_BLOCKS = "A VDI with blocks of 64 KiB, as its format allows: the corpus has few bytes to spare."

ONLY_QEMU_IMG_REFUSES = {
    **dict.fromkeys(("d_count", "d_creator", "d_free", "s_vdi"), SMALL_BLOCKS),
    "s_vhdx_4096": "A VHDX with logical sectors of 4096 bytes, as its format allows.",
    "v_fixed_vhd": "The footer at the end says that the disk is fixed: what looks like one at 0 is the guest's.",
    "v_nohead": "Without the copy at the start the footer at the end counts: a finding.",
    "x_badregcrc_one": "One of two region tables has a right checksum, and counts: a finding.",
    "x_blk_state7": "Without a parent there is nothing that a partly present block could show: check says so.",
    "x_log_waits": "The log is replayed in memory, without writing to the file.",
}


def _qemu_img_takes(entry: Hostile, path: Path) -> bool:
    limits = [need_tool("prlimit"), f"--as={4 << 30}", f"--cpu={PATIENCE}"]
    command = [need_tool("qemu-img"), "convert", "-n", "-f", DRIVERS.get(entry.suffix, "raw")]
    try:
        done = subprocess.run(
            [*limits, *command, "-O", "null-co", str(path), "null-co://"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=PATIENCE,
            cwd=path.parent,
        )
    except subprocess.TimeoutExpired:
        return entry.kind != "references"  # it was reading on
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.oracle
def test_what_only_qemu_img_refuses_has_a_reason(tmp_path: Path) -> None:
    only_theirs, both = set(), Counter[tuple[bool, bool]]()
    for name, entry in ENTRIES.items():
        path = entry.made().write(tmp_path / f"{name}{entry.suffix}")
        ours = convert(path, tmp_path / "target.raw", *given(entry)).code == 0
        (tmp_path / "target.raw").unlink(missing_ok=True)
        theirs = _qemu_img_takes(entry, path)
        path.unlink()
        both[ours, theirs] += 1
        if ours and not theirs:
            only_theirs.add(name)
    print({f"imagekit {ours}, qemu-img {theirs}": count for (ours, theirs), count in sorted(both.items())})
    print(sorted(only_theirs))
    assert sorted(only_theirs - set(ONLY_QEMU_IMG_REFUSES)) == []
    assert both[False, False] > 200
