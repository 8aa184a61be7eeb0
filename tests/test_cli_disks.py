"""Chains, new disks and changes in place, as scripts see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imagekit import api
from imagekit.cli.app import run
from imagekit.formats.base import GiB, MiB
from tests.disks import noise

BASE = noise(2 * MiB, 1) + bytes(3 * MiB) + noise(1024, 2)
CHILD = BASE[:MiB] + noise(5 * 512, 3) + BASE[MiB + 5 * 512 :]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two raw disks."""
    (tmp_path / "base.raw").write_bytes(BASE)
    (tmp_path / "child.raw").write_bytes(CHILD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that exits 0; returns its document."""

    def answer(*command: str) -> Any:
        code = run([*command, "--output", "json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    return answer


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that fails; returns its exit code and what it said."""

    def answer(*command: str) -> tuple[int, str]:
        code = run(list(command))
        out = capsys.readouterr()
        assert out.out == ""
        return code, out.err

    return answer


@pytest.mark.parametrize("fmt", ["vhd", "vhdx"])
def test_a_chain_from_its_making_to_its_merge(fmt: str, folder: Path, said: Any, refused: Any) -> None:
    base, child = f"base.{fmt}", f"child.{fmt}"
    said("convert", "base.raw", base, "--no-sync")
    made = said("convert", "child.raw", child, "--parent", base, "--verify", "content", "--no-sync")
    assert made["target"]["subformat"] == "differencing"
    info = said("info", child)
    assert (info["backing-filename"][-len(base) :], info["findings"][0]["rule"]) == (base, "parent-file")

    assert said("info", child, "--follow-references")["chain"] == [
        {"filename": base, "format": fmt, "virtual-size": len(BASE)}
    ]

    code, words = refused("convert", child, "x.raw")
    assert (code, "hint: where its origin is trusted: --follow-references" in words) == (13, True)
    assert said("compare", child, "child.raw", "--follow-references", "--strict")["same"] is True
    extents = said("map", child, "--follow-references")
    assert {extent["depth"] for extent in extents} == {0, 1}

    (folder / "moved").mkdir()
    Path(base).rename(f"moved/{base}")
    assert refused("map", child, "--follow-references")[0] == 10
    assert said("rebase", child, "--parent", f"moved/{base}")["backing-filename"] == f"moved/{base}"
    merged = said("merge", child, "one.raw", "--follow-references", "--no-sync")
    assert (merged["verified"], (folder / "one.raw").read_bytes() == CHILD) == ("content", True)
    into = said("merge", child, "--into-parent", "--follow-references")
    assert into["filename"].endswith(f"moved/{base}")
    assert said("compare", f"moved/{base}", "child.raw", "--strict")["same"] is True


def test_create_resize_and_check(folder: Path, said: Any) -> None:
    made = said("create", "new.vhdx", "20G", "--sector-size", "4096", "--no-sync")
    assert (made["virtual-size"], made["format"], made["subformat"]) == (20 * GiB, "vhdx", "dynamic")
    assert said("info", "new.vhdx")["features"]["logical-sector-size"] == 4096
    grown = said("resize", "new.vhdx", "21474840576")
    assert (grown["old-virtual-size"], grown["virtual-size"]) == (20 * GiB, 20 * GiB + 4096)
    assert said("check", "new.vhdx")["sound"] is True
    child = said("create", "child.vhdx", "--parent", "new.vhdx", "--no-sync")
    assert child["virtual-size"] == 20 * GiB + 4096


@pytest.mark.parametrize(("option", "kind"), [([], "zlib"), (["-o", "compression_type=zstd"], "zstd")])
def test_a_snapshot_goes_back_to_glance_as_compressed_qcow2(
    option: list[str], kind: str, folder: Path, said: Any
) -> None:
    said("convert", "base.raw", "base.vhdx", "--no-sync")
    report = said("convert", "base.vhdx", "back.qcow2", "-c", *option, "--verify", "content", "--no-sync")
    assert report["target"]["size"] == (folder / "back.qcow2").stat().st_size
    assert said("info", "back.qcow2")["features"]["compression-type"] == kind
    assert said("compare", "back.qcow2", "base.raw", "--strict")["same"] is True


def test_measure_tells_the_size_for_a_profile(folder: Path, said: Any) -> None:
    measured = said("measure", "base.raw", "--for", "azure")
    said("convert", "base.raw", "azure.vhd", "--for", "azure", "--no-sync")
    assert measured["required"] == (folder / "azure.vhd").stat().st_size == 6 * MiB + 512


BAD_INPUT = {
    "no size": (["create", "x.vhdx"], 2),
    "a size that is none": (["create", "x.vhdx", "much"], 2),
    "merge to nowhere": (["merge", "base.raw"], 2),
    "merge to two places": (["merge", "base.raw", "x.raw", "--into-parent"], 2),
    "merge without leave": (["merge", "base.raw", "--into-parent"], 2),
    "no chain to merge": (["merge", "base.raw", "--into-parent", "--follow-references"], 12),
    "a map that is none": (["info", "base.raw", "--parent-map", "C:"], 2),
    "no snapshots in raw": (["convert", "base.raw", "x.vhd", "--snapshot", "s"], 12),
    "no choice of size in raw": (["convert", "base.raw", "x.vhd", "--size-from", "chs"], 12),
    "an unknown size": (["convert", "base.raw", "x.vhd", "--size-from", "file"], 2),
    "no sectors of 4096 in VHD": (["convert", "base.raw", "x.vhd", "--sector-size", "4096"], 12),
    "an odd sector size": (["convert", "base.raw", "x.vhdx", "--sector-size", "1000"], 12),
    "compressed VHD": (["convert", "base.raw", "x.vhd", "-c"], 12),
    "an unknown profile": (["convert", "base.raw", "--for", "aws"], 2),
    "neither target nor profile": (["convert", "base.raw"], 2),
    "a raw parent": (["create", "x.vhdx", "--parent", "base.raw"], 2),
    "an odd alignment": (["convert", "base.raw", "x.vhd", "--align", "1000"], 2),
    "a format only qemu-img writes": (["convert", "base.raw", "x", "-O", "vdi"], 13),
    "resize without a disk": (["resize", "none.vhd", "1G"], 10),
    "rebase of no child": (["rebase", "base.raw", "--parent", "child.raw"], 2),
}


@pytest.mark.parametrize(("arguments", "code"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_has_its_exit_code_and_changes_nothing(
    arguments: list[str], code: int, folder: Path, refused: Any
) -> None:
    found, words = refused(*arguments)
    assert (found, words.startswith("imagekit: ")) == (code, True), words
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"base.raw": BASE, "child.raw": CHILD}


def test_following_references_is_not_taken_from_the_environment(folder: Path) -> None:
    env = {**os.environ, "IMAGEKIT_FOLLOW_REFERENCES": "1"}
    for command in (
        ["convert", "base.raw", "base.vhdx", "--no-sync"],
        ["create", "child.vhdx", "--parent", "base.vhdx", "--no-sync"],
    ):
        subprocess.run([sys.executable, "-m", "imagekit", *command], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "imagekit", "convert", "child.vhdx", "x.raw"], env=env)
    assert done.returncode == 13


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["merge", "c.vhdx", "--into-parent", "--follow-references"], "with --ignore-parent-id"),
        (["resize", "c.vhdx", "1G"], "run it again"),
        (["rebase", "c.vhdx", "--parent", "p.vhdx"], "run it again"),
        (["create", "c.vhdx", "1G"], "nothing is left behind"),
    ],
    ids=["merge", "resize", "rebase", "create"],
)
def test_an_interrupted_command_says_what_is_left(
    command: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, command[0], interrupted)
    assert run(command) == 130
    assert words in capsys.readouterr().err


def test_quiet_says_nothing_of_what_was_done_but_what_was_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (
        ("create", "one.vhdx", "64M"),
        ("resize", "one.vhdx", "128M"),
        ("convert", "one.vhdx", "two.vhd"),
    ):
        assert run([*command, "-q"]) == 0
        assert capsys.readouterr() == ("", "")
    assert run(["info", "two.vhd", "-q"]) == 0
    assert "128 MiB" in capsys.readouterr().out
    assert run(["convert", "one.vhdx", "three.vhd", "-q", "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"]["filename"] == "three.vhd"


def test_info_says_what_the_caller_has_answered_by_following(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", "base.raw", "base.vhdx", "-q"]) == 0
    assert run(["create", "child.vhdx", "--parent", "base.vhdx", "-q"]) == 0
    for option, word in ((), "refuse"), (("--follow-references",), "allowed"):
        assert run(["info", "child.vhdx", *option]) == 0
        assert f"\n{word}: the image refers to another file" in capsys.readouterr().out
