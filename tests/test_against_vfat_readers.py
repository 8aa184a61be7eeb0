"""Our VFAT media in the hands of dosfstools, mtools, 7-Zip and util-linux."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.model import parse_spec
from imagekit.cloudinit.vfat import PARTITION_START, write_vfat
from tests.cloudinit_specs import FULL
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

TREE = {
    **config_drive_tree(parse_spec(FULL)),
    "empty": b"",
    "README.TXT": b"8.3",
    "meta-data": b"hyphen",
    "meta_data": b"underscore",
    "one-cluster": b"c" * 2048,
    "cluster-and-a-byte": b"d" * 2049,
    "exactly13char": b"a long name that ends with its entry",
    ".hidden": b"dot first",
    "a.b.c.d": b"dots",
    "n" * 255: b"longest name",
    "Grüße/日本語.txt": "ünï".encode(),
    **{f"many/file number {number}.text": b"%d" % number for number in range(150)},
}
SIZES = {"FAT12": 0, "FAT16": 12_000_000}


def run(*command: str) -> bytes:
    done = subprocess.run(command, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    return done.stdout


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module", params=SIZES)
def tree(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return {**TREE, "large.bin": hashlib.shake_128(b"large").digest(SIZES[request.param])}


@pytest.fixture(scope="module")
def volume(tree: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vfat") / "whole.img"
    path.write_bytes(write_vfat(tree))
    return path


@pytest.fixture(scope="module")
def disk(tree: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vfat") / "disk.img"
    path.write_bytes(write_vfat(tree, partitioned=True))
    return path


def test_fsck_finds_nothing_to_mend(volume: Path) -> None:
    said = run(need_tool("fsck.vfat"), "-n", "-v", str(volume)).decode()
    assert "2048 bytes per cluster" in said


@pytest.mark.parametrize("whole", [True, False], ids=["whole disk", "partition"])
def test_mtools_copies_every_file(
    volume: Path, disk: Path, tree: dict[str, bytes], tmp_path: Path, whole: bool
) -> None:
    where = str(volume) if whole else f"{disk}@@{PARTITION_START}"
    run(need_tool("mcopy"), "-s", "-n", "-i", where, "::*", str(tmp_path))
    assert files_below(tmp_path) == tree


@pytest.mark.parametrize("whole", [True, False], ids=["whole disk", "partition"])
def test_7z_extracts_every_file(
    volume: Path, disk: Path, tree: dict[str, bytes], tmp_path: Path, whole: bool
) -> None:
    """Of a partitioned disk it extracts the partition, which is a file system again."""
    if whole:
        run(need_tool("7z"), "x", "-y", f"-o{tmp_path}", str(volume))
    else:
        run(need_tool("7z"), "x", "-y", f"-o{tmp_path}", "-tmbr", str(disk))
        (inner,) = tmp_path.iterdir()
        run(need_tool("7z"), "x", "-y", f"-o{tmp_path}", str(inner))
        inner.unlink()
    assert files_below(tmp_path) == tree


def test_blkid_sees_the_label_in_both_places_and_the_type(volume: Path) -> None:
    said = run(need_tool("blkid"), "-p", "-o", "export", str(volume)).decode().splitlines()
    assert {"LABEL=config-2", "LABEL_FATBOOT=config-2", "TYPE=vfat"} <= set(said)


def test_sfdisk_and_blkid_see_one_partition_with_the_file_system(disk: Path) -> None:
    assert b"No errors detected" in run(need_tool("sfdisk"), "--verify", str(disk))
    listed = run(need_tool("sfdisk"), "--json", str(disk)).decode()
    assert '"label": "dos"' in listed and listed.count('"node"') == 1
    said = run(need_tool("blkid"), "-p", "-O", str(PARTITION_START), "-o", "export", str(disk)).decode().splitlines()
    assert {"LABEL=config-2", "TYPE=vfat"} <= set(said)
