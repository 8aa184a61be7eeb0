"""Images made by Windows, Virtual PC, XenServer, VirtualBox, VMware and QEMU, through the command line, all of them.

The digests are those on which several readers by other people agree (the samples' manifest).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from imagekit.cli.app import run
from imagekit.formats.base import GiB, MiB
from tests.samples import sample, sample_facts


@dataclass(frozen=True, slots=True)
class Expected:
    """What ``info`` says; sizes in bytes."""

    format: str
    subformat: str
    virtual_size: int
    rules: tuple[str, ...] = ()


def expected(name: str, *facts: Any) -> Any:
    """A row of the table; the one of 10 GiB is slow to take a digest of."""
    return pytest.param(name, Expected(*facts), id=name, marks=[pytest.mark.slow] if facts[2] == 10 * GiB else [])


READABLE = [
    expected("fat-parent.vhd", "vhd", "fixed", 4 * MiB),
    expected("fat-differential.vhd", "vhd", "differencing", 4 * MiB, ("parent-file",)),
    expected("ntfs-dynamic.vhd", "vhd", "dynamic", 4 * MiB),
    expected("fat-parent.vhdx", "vhdx", "fixed", 4 * MiB),
    expected("fat-differential.vhdx", "vhdx", "differencing", 4 * MiB, ("parent-file",)),
    expected("ntfs-dynamic.vhdx", "vhdx", "dynamic", 4 * MiB),
    expected("ext2.vhdx", "vhdx", "dynamic", 4 * MiB),
    expected("ext2.qcow2", "qcow2", "v3", 4 * MiB),
    expected("ext2.vmdk", "vmdk", "monolithicSparse", 4 * MiB),
    expected("ext2.vhd", "vhd", "dynamic", 4212736),
    expected("vhdx-log-replay.vhdx", "vhdx", "dynamic", GiB, ("log-replayed",)),
    expected("swap.vhdx", "vhdx", "dynamic", 10 * GiB),
    expected("iotest-dynamic-1G.vhdx", "vhdx", "dynamic", GiB),
    expected("test-disk2vhd.vhdx", "vhdx", "dynamic", 256 * MiB),
    expected("hyperv2012r2-dynamic.vhd", "vhd", "dynamic", 136365211648),
    expected("virtualpc-dynamic.vhd", "vhd", "dynamic", 136363130880),
    expected("win8.vhd", "vhd", "dynamic", 40 * MiB),
    expected("win8.1-1GB.vhd", "vhd", "dynamic", GiB),
    expected("win8-child.vhd", "vhd", "differencing", 40 * MiB, ("parent-file",)),
    expected("xapi.vhd", "vhd", "dynamic", 40 * MiB),
    expected("vbox.vhd", "vhd", "dynamic", 40 * MiB),
    expected("qemu.vhd", "vhd", "dynamic", 41953280),
    expected("image.qcow2", "qcow2", "v2", 102400),
    expected("image.vmdk", "vmdk", "monolithicSparse", 102400),
    expected("vmdk-monolith.img", "vmdk", "monolithicSparse", 65536),
]
DIRTY = "vhdx-log-replay.vhdx"
REFUSED = {
    "image.vhd": 11,  # both checksums wrong
    "afl5.img": 11,
    "afl9.vmdk": 11,
    "image.qcow": 12,  # version 1
}


def answer(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    """The document that a command prints; it exits 0."""
    code = run([*command, "--output", "json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def digest(path: Path) -> str:
    out = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(4 * MiB)
        while count := file.readinto(buffer):
            out.update(memoryview(buffer)[:count])
    return out.hexdigest()


def is_one_hole(path: Path) -> bool:
    """Whether a file takes no room: imagekit writes no zeros."""
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, getattr(os, "SEEK_DATA", os.SEEK_END))
        except OSError as error:
            return error.errno == errno.ENXIO
    return False


@pytest.mark.parametrize(("name", "facts"), READABLE)
def test_info_says_what_a_real_image_is(name: str, facts: Expected, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "info", str(sample(name)))
    assert (said["format"], said["subformat"], said["virtual-size"]) == (
        facts.format,
        facts.subformat,
        facts.virtual_size,
    )
    assert tuple(one["rule"] for one in said["findings"] if one["severity"] != "note") == facts.rules


@pytest.mark.parametrize(("name", "facts"), READABLE)
def test_a_real_image_becomes_a_raw_disk_of_the_known_content(
    name: str, facts: Expected, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "disk.raw"
    options = ["--follow-references"] if "parent-file" in facts.rules else []
    said = answer(capsys, "convert", str(sample(name)), str(target), "-O", "raw", "--no-sync", *options)
    assert said["target"]["virtual-size"] == target.stat().st_size == facts.virtual_size
    known = sample_facts(name).content_md5
    if known is None:
        assert is_one_hole(target)  # the manifest says that it is all zero
    else:
        assert digest(target) == known


@pytest.mark.parametrize("name", [one.values[0] for one in READABLE if one.values[0] != DIRTY])
def test_the_structure_of_a_real_image_is_sound(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = answer(capsys, "check", str(sample(name)))
    assert (said["sound"], said["problems"]) == (True, [])


def test_a_dirty_log_is_found_and_replayed_by_a_repair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.vhdx"
    copy.write_bytes(sample(DIRTY).read_bytes())
    assert run(["check", str(copy)]) == 11
    assert "log" in capsys.readouterr().out
    said = answer(capsys, "check", str(copy), "--repair")
    assert (said["sound"], said["repaired"], said["problems"]) == (True, True, [])
    assert answer(capsys, "info", str(copy))["findings"] == []
    answer(capsys, "compare", str(copy), str(sample(DIRTY)), "--strict")


@pytest.mark.parametrize(("name", "code"), REFUSED.items())
def test_a_damaged_or_foreign_image_is_refused_and_nothing_is_written(
    name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["info", str(sample(name))], ["convert", str(sample(name)), str(tmp_path / "out.raw")]):
        assert run(command) == code
        assert capsys.readouterr().err.startswith(f"imagekit: {sample(name)}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "size_from", "size"),
    [
        ("virtualpc-dynamic.vhd", "current", 136365211648),
        ("virtualpc-dynamic.vhd", "chs", 136363130880),
        ("vbox.vhd", "chs", 41909760),
        ("vbox.vhd", "current", 40 * MiB),
        ("qemu.vhd", "current", 41953280),
    ],
)
def test_a_caller_can_say_which_of_a_vhds_sizes_counts(
    name: str, size_from: str, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(capsys, "info", str(sample(name)), "--size-from", size_from)["virtual-size"] == size
