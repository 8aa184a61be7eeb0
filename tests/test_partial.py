"""Downloads that are interrupted and go on in the next run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import imagekit
from imagekit.errors import SourceError, TargetError, VerificationFailed
from imagekit.remote.arriving import PIECE
from imagekit.remote.http import Version
from imagekit.remote.partial import Keeping
from tests.disks import noise
from tests.test_remote import IDENTIFIER, image
from tests.web import Answer, Site, answers, only, serve

CONTENT = image() + noise(20 * PIECE)
RIGHT = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


def convert(site: Site, folder: Path, target: Path, **options: Any) -> Any:
    asked: dict[str, Any] = {"checksum": RIGHT, "partial_dir": str(folder), "identifier": IDENTIFIER, **options}
    return imagekit.convert(site.url, target, **asked)


def refuses_later(answer: Answer) -> None:
    time.sleep(0.5)  # so that what was asked for before is there
    answers(404)(answer)


def interrupted(site: Site, folder: Path, target: Path) -> None:
    """A run that ends when the server refuses more than the first piece and one run of pieces."""
    site.fault = only(range(2, 999), refuses_later)
    with pytest.raises(SourceError):
        convert(site, folder, target)
    site.fault = None
    site.sent = 0


@pytest.mark.parametrize("confined", [True, False])
def test_what_came_is_not_fetched_again(tmp_path: Path, no_leftovers: Path, confined: bool) -> None:
    kept, target = tmp_path / "kept", tmp_path / "disk.vhdx"
    with serve(CONTENT) as site:
        interrupted(site, kept, no_leftovers / "disk.vhdx")
        assert {one.suffix for one in kept.iterdir()} == {".part", ".have"}
        report = convert(site, kept, target, confined=confined)
        assert PIECE < site.sent < len(CONTENT)
        imagekit.convert(site.url, tmp_path / "whole.vhdx", identifier=IDENTIFIER)
    assert any("from an interrupted run" in note for note in report.notes)
    assert target.read_bytes() == (tmp_path / "whole.vhdx").read_bytes()
    assert list(kept.iterdir()) == []


def test_what_was_kept_and_is_wrong_is_found_out_and_deleted(tmp_path: Path, no_leftovers: Path) -> None:
    kept = tmp_path / "kept"
    with serve(CONTENT) as site:
        interrupted(site, kept, no_leftovers / "disk.vhdx")
        part = next(kept.glob("*.part"))
        piece = part.with_suffix(".have").read_bytes().index(b"\1", 1)  # the first one is always fetched
        with part.open("r+b") as file:
            file.seek(piece * PIECE + 5)
            file.write(b"damage")
        with pytest.raises(VerificationFailed) as caught:
            convert(site, kept, no_leftovers / "disk.vhdx")
        assert "run it again" in str(caught.value.hint)
        assert list(kept.iterdir()) == []
        convert(site, kept, tmp_path / "disk.vhdx")


def test_another_version_or_checksum_begins_anew(tmp_path: Path, no_leftovers: Path) -> None:
    kept = tmp_path / "kept"
    with serve(CONTENT) as site:
        interrupted(site, kept, no_leftovers / "disk.vhdx")
        site.etag = '"two"'
        convert(site, kept, tmp_path / "disk.vhdx")
        assert site.sent == len(CONTENT)


def have(kept: Path) -> int:
    """Pieces noted besides the first."""
    return sum(one.read_bytes().count(b"\1", 1) for one in kept.glob("*.have"))


def test_killing_a_run_leaves_what_the_next_one_goes_on_with(tmp_path: Path) -> None:
    kept, target = tmp_path / "kept", tmp_path / "disk.vhdx"
    with serve(CONTENT, latency=0.1) as site:
        command = [sys.executable, "-m", "imagekit", "convert", site.url, str(target)]
        command += ["--checksum", RIGHT, "--partial-dir", str(kept)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 30
            while not have(kept) and time.monotonic() < deadline:
                time.sleep(0.01)
            process.kill()
        assert not target.exists()
        site.sent = 0
        report = convert(site, kept, target)
        assert site.sent < len(CONTENT)
    assert any("from an interrupted run" in note for note in report.notes)


def test_without_a_checksum_nothing_is_kept_and_it_is_said(tmp_path: Path) -> None:
    with serve(CONTENT) as site:
        report = convert(site, tmp_path / "kept", tmp_path / "disk.vhdx", checksum=None)
    assert any("needs a checksum" in note for note in report.notes)
    assert not (tmp_path / "kept").exists()


def test_one_run_at_a_time_has_what_is_kept(tmp_path: Path) -> None:
    keeping, version = Keeping(tmp_path, "sha256:00"), Version(5 * PIECE)
    first = keeping.open("x", version)
    assert first is not None
    assert keeping.open("x", version) is None
    assert keeping.open("y", version) is not None
    first.note(3)
    first.close()
    again = keeping.open("x", version)
    assert again is not None and again.pieces == []  # the bytes themselves were never written
    again.close()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with serve(CONTENT) as site, pytest.raises(TargetError, match="nothing can be kept"):
        convert(site, tmp_path / "file" / "below", tmp_path / "disk.vhdx")
