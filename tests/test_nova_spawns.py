"""Fifty spawns of one image from four processes: one conversion, and right roots whoever is killed meanwhile."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import imagekit
from imagekit.cache import ImageCache
from imagekit.formats.base import GiB, MiB
from tests.disks import noise

pytestmark = pytest.mark.slow

IMAGE = "0b2a7b1e-6c1e-4f39-9f4c-4d6f2f3a1f00"
SHARES = ((0, 13), (13, 13), (26, 12), (38, 12))
KILLS = 6
SEED = 8

SPAWN = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from imagekit.cache import ImageCache
from imagekit.errors import TargetError, ToolError
from imagekit.nova import prepare_root

folder, image, source, out, first, count = sys.argv[1:]
cache = ImageCache(folder)

def one(number):
    path = Path(out, f"root{number}.vhdx")
    if path.exists():  # made before this process was killed and started again
        return
    for attempt in range(10):
        try:
            prepare_root(cache, image, source, path, size=1 << 30)
            return
        except TargetError:
            if path.exists():  # the last act of a child whose parent was killed: complete, as every file
                return
            raise
        except ToolError as error:  # as the driver does: once more
            print(error, file=sys.stderr)
    sys.exit(f"{path.name}: not made in ten attempts")

with ThreadPoolExecutor(4) as pool:
    list(pool.map(one, range(int(first), int(first) + int(count))))
"""


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(noise(48 * MiB) + bytes(16 * MiB))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    return path


def spawn(folder: Path, raw: Path, out: Path, share: tuple[int, int]) -> subprocess.Popen[bytes]:
    arguments: list[str | Path] = [folder, IMAGE, raw, out, str(share[0]), str(share[1])]
    return subprocess.Popen([sys.executable, "-c", SPAWN, *arguments], stderr=subprocess.PIPE)


def assert_all_right(folder: Path, raw: Path, out: Path) -> None:
    """One entry without anything half made beside it, and fifty roots that read as the image does."""
    (entry,) = ImageCache(folder).entries()
    assert imagekit.compare(entry.path, raw).same
    assert [one.name for one in folder.iterdir() if re.search(r"\.(part|download)$", one.name)] == []
    roots = sorted(out.glob("root*.vhdx"))
    assert len(roots) == 50
    for root in roots:
        assert imagekit.info(root).info.virtual_size == GiB
    for root in roots[::7]:
        assert imagekit.compare(root, raw, follow_references=True).same


def test_fifty_spawns_from_four_processes_share_one_conversion(folder: Path, raw: Path, tmp_path: Path) -> None:
    processes = [spawn(folder, raw, tmp_path, share) for share in SHARES]
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
    (entry,) = ImageCache(folder).entries()
    assert entry.hits == 49  # all but the one that made it
    assert_all_right(folder, raw, tmp_path)


def children(parents: set[int]) -> Iterator[int]:
    """The processes that those started, and what these started."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, parent = int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1])
            if parent in parents:
                yield pid
                yield from children({pid})


def test_whoever_does_the_work_may_be_killed_at_any_moment(folder: Path, raw: Path, tmp_path: Path) -> None:
    """Children that convert and create, and those that they have confined; the first kills hit the conversion."""
    if sys.platform == "win32":
        pytest.skip("needs /proc")
    chance = random.Random(SEED)
    processes = [spawn(folder, raw, tmp_path, share) for share in SHARES]
    killed = 0
    while killed < KILLS and any(process.poll() is None for process in processes):
        time.sleep(chance.uniform(0, 0.8))
        found = sorted(children({process.pid for process in processes}))
        if found:
            with suppress(ProcessLookupError):
                os.kill(chance.choice(found), signal.SIGKILL)
                killed += 1
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert killed == KILLS
    assert_all_right(folder, raw, tmp_path)


def test_a_process_that_spawns_may_be_killed_and_started_again(folder: Path, raw: Path, tmp_path: Path) -> None:
    """Its children end with it, so nobody waits for a lock that a dead process holds."""
    if sys.platform == "win32":
        pytest.skip("there a child outlives its parent")
    chance = random.Random(SEED)
    running = {share: spawn(folder, raw, tmp_path, share) for share in SHARES}
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.2, 1.0))
        share = chance.choice(SHARES)
        running[share].kill()
        running[share].communicate()
        running[share] = spawn(folder, raw, tmp_path, share)
    for process in running.values():
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert_all_right(folder, raw, tmp_path)
