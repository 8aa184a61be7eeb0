"""A disk like those that cloud images hold: real files with room between them, most of it empty.

``python -m tests.benchmarks.corpus DATA DISK`` (bytes) makes it and prints the paths as JSON: in a process of its
own, because a child's peak memory counts from its parent's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cache import cache_dir, locked

MIB = 1 << 20
GIB = 1 << 30
FOLDERS = ("/usr/lib", "/usr/bin", "/usr/share", "/usr/local", "/opt")
STEP = 64 * MIB


def make_corpus(data: int, disk: int) -> dict[str, Path]:
    """Paths of the raw disk and its qcow2 forms: ``data`` bytes of real files on a disk of ``disk`` bytes."""
    folder = cache_dir("benchmarks")
    name = f"disk-{data // MIB}-{disk // MIB}"
    paths = {kind: folder / f"{name}.{kind}" for kind in ("raw", "zlib.qcow2", "plain.qcow2")}
    with locked(folder / name):
        if not paths["raw"].exists():
            part = folder / f"{name}.part"
            _fill(part, data, disk)
            part.replace(paths["raw"])
        for kind, options in (("zlib.qcow2", ["-c"]), ("plain.qcow2", [])):
            if not paths[kind].exists():
                part = folder / f"{name}.{kind}.part"
                command = ["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", str(paths["raw"]), str(part)]
                subprocess.run(command, check=True)
                part.replace(paths[kind])
    return paths


def _fill(path: Path, data: int, disk: int) -> None:
    """Pieces of file content at places in ascending order, with gaps that the seed decides."""
    gaps = random.Random(2010)
    pieces = -(-data // STEP)
    room = disk - data
    edges = sorted(gaps.randrange(room // 4096) * 4096 for _ in range(pieces))
    content = _content()
    with path.open("wb") as file:
        file.truncate(disk)
        for number, gap in enumerate(edges):
            file.seek(number * STEP + gap)
            left = min(STEP, data - number * STEP)
            while left:
                block = next(content)[:left]
                file.write(block)
                left -= len(block)


def _content() -> Iterator[bytes]:
    """Blocks of the files of this system, again from the start when they are used up."""
    while True:
        for top in FOLDERS:
            for folder, _, names in sorted(os.walk(top)):
                for name in sorted(names):
                    path = Path(folder, name)
                    if path.is_symlink() or not path.is_file():
                        continue
                    with path.open("rb") as file:
                        while block := file.read(4 * MIB):
                            yield block


if __name__ == "__main__":
    made = make_corpus(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps({kind: str(path) for kind, path in made.items()}))
