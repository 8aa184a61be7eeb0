"""What the benchmarks measure is what a user has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the benchmarks need Linux")
def test_the_benchmarks_measure_an_installation_and_make_it_once(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "from tests.benchmarks import installed; print(installed.command())"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    root = Path(__file__).parents[1]
    made = [subprocess.run(ask, check=True, stdout=-1, text=True, cwd=root, env=environment).stdout for _ in range(2)]
    program = Path(made[0].strip())
    assert made[0] == made[1]
    assert subprocess.run([program, "--version"], check=True, stdout=-1).stdout == b"imagekit 0.1.0\n"
    look = "import imagekit, sys; print(imagekit.__file__); print([one for one in sys.modules if 'editable' in one])"
    seen = subprocess.run([program.with_name("python"), "-c", look], check=True, stdout=-1, text=True, cwd=tmp_path)
    assert seen.stdout.splitlines()[0].startswith(str(tmp_path))
    assert seen.stdout.splitlines()[1] == "[]"
