"""The tour, and what it does when it cannot go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imagekit.demo import run_demo
from imagekit.errors import TargetError, ToolError
from tests.oracles import need_tool


@pytest.mark.oracle
def test_the_demo_boots_what_it_made_and_says_so(tmp_path: Path) -> None:
    need_tool("qemu-img")
    need_tool("qemu-system-x86_64")
    done = subprocess.run(
        [sys.executable, "-m", "imagekit", "demo", "--output", "json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["boot"]["verdict"] == "booted"
    assert "the guest: config drive found: config-2" in done.stderr
    assert (tmp_path / found["boot"]["screenshot"]).read_bytes().startswith(b"\x89PNG")


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TargetError):
        run_demo(tmp_path, say=print)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_without_qemu_it_says_what_to_install_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ToolError) as caught:
        run_demo(tmp_path / "demo", say=print)
    assert "apt-get" in (caught.value.hint or "")
    assert not (tmp_path / "demo").exists()
