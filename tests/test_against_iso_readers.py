"""Our media in the hands of other ISO 9660 readers, and other programs' media in ours."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from imagekit.cloudinit.configdrive import config_drive_tree
from imagekit.cloudinit.iso import read_iso, write_iso
from imagekit.cloudinit.model import parse_spec
from tests.cloudinit_specs import FULL
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

TREE = {
    **config_drive_tree(parse_spec(FULL)),
    "empty": b"",
    "also-empty": b"",
    "one-sector": b"s" * 2048,
    "sector-and-a-byte": b"t" * 2049,
    "large.bin": hashlib.shake_128(b"large").digest(3_000_000),
    "meta-data": b"hyphen",
    "meta_data": b"underscore",
    "Grüße/日本語.txt": "ünï".encode(),
    "a/b/c/d/e/f/g/deep": b"eight levels",
    "n" * 64: b"longest name",
}
ASCII_TREE = {path: content for path, content in TREE.items() if path.isascii()}


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("medium") / "drive.iso"
    path.write_bytes(write_iso(TREE, label="config-2"))
    return path


def run(*command: str, cwd: Path | None = None) -> bytes:
    # C.UTF-8, because some readers turn names into the locale's characters.
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def modes_below(folder: Path) -> set[tuple[bool, int]]:
    return {(p.is_dir(), p.stat().st_mode & 0o7777) for p in folder.rglob("*")}


def test_xorriso_extracts_every_file(medium: Path, tmp_path: Path) -> None:
    run(need_tool("xorriso"), "-osirrox", "on", "-indev", str(medium), "-extract", "/", str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == TREE
    assert modes_below(tmp_path / "out") == {(True, 0o555), (False, 0o444)}


def test_xorriso_sees_modes_owner_and_no_complaint(medium: Path) -> None:
    """Rock Ridge: folders 0555, files 0444, all owned by root."""
    listing = run(need_tool("xorriso"), "-abort_on", "WARNING", "-indev", str(medium), "-find", "/", "-exec", "lsdl")
    rows = [line.split(None, 4)[:4] for line in listing.decode().splitlines()]
    assert len(rows) > len(TREE)
    assert {(row[0], row[2], row[3]) for row in rows} == {("dr-xr-xr-x", "0", "0"), ("-r--r--r--", "0", "0")}


@pytest.mark.parametrize("option", [[], ["--options", "!rockridge"]], ids=["rock-ridge", "joliet"])
def test_bsdtar_extracts_every_file(medium: Path, tmp_path: Path, option: list[str]) -> None:
    run(need_tool("bsdtar"), *option, "-xf", str(medium), cwd=tmp_path)
    assert files_below(tmp_path) == TREE


def test_7z_extracts_every_file(medium: Path, tmp_path: Path) -> None:
    """7z prefers the Joliet names."""
    run(need_tool("7z"), "x", "-y", f"-o{tmp_path}", str(medium))
    assert files_below(tmp_path) == TREE


@pytest.mark.parametrize("view", ["-R", "-J"], ids=["rock-ridge", "joliet"])
def test_isoinfo_reads_every_file(medium: Path, view: str) -> None:
    """Its Joliet names are in the locale's characters, so only ASCII ones can be asked for."""
    isoinfo = need_tool("isoinfo")
    listed = run(isoinfo, view, "-f", "-i", str(medium)).decode(errors="replace").splitlines()
    assert {f"/{path}" for path in ASCII_TREE} <= set(listed)
    for path, content in ASCII_TREE.items():
        assert run(isoinfo, view, "-i", str(medium), "-x", f"/{path}") == content


def test_isoinfo_finds_plain_names_within_level_3(medium: Path) -> None:
    listed = run(need_tool("isoinfo"), "-f", "-i", str(medium)).decode("ascii").splitlines()
    assert [
        path for path in listed if not re.fullmatch(r"(/[A-Z0-9_]{1,31})*(/[A-Z0-9_]+\.[A-Z0-9_]*;1)?", path)
    ] == []


def test_blkid_sees_the_label_and_the_type(medium: Path) -> None:
    answer = run(need_tool("blkid"), "-p", "-o", "export", str(medium)).decode().splitlines()
    assert {"LABEL=config-2", "TYPE=iso9660"} <= set(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ASCII files of the tree, for other programs to make media of."""
    folder = tmp_path_factory.mktemp("folder")
    for path, content in ASCII_TREE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_genisoimage_writes_and_we_read(folder: Path, tmp_path: Path) -> None:
    """With the options that Nova gives it."""
    out = tmp_path / "out.iso"
    options = ["-ldots", "-allow-lowercase", "-allow-multidot", "-l", "-quiet", "-J", "-r", "-V", "config-2"]
    run(need_tool("genisoimage"), "-o", str(out), *options, str(folder))
    content = read_iso(out.read_bytes())
    assert (content.label, content.joliet_label) == ("config-2", "config-2")
    assert (content.tree, content.joliet) == (ASCII_TREE, ASCII_TREE)


@pytest.mark.parametrize("names", ["-R", "-J", "-RJ"])
def test_xorriso_writes_and_we_read(folder: Path, tmp_path: Path, names: str) -> None:
    out = tmp_path / "out.iso"
    views = [f"-{view}" for view in names[1:]]
    run(need_tool("xorriso"), "-as", "mkisofs", *views, "-V", "config-2", "-o", str(out), str(folder))
    content = read_iso(out.read_bytes())
    assert content.label == "config-2"
    assert content.rock_ridge or "R" not in names
    assert content.tree == ASCII_TREE
    assert content.joliet == (ASCII_TREE if "J" in names else None)
