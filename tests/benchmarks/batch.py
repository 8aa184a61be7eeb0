"""``python -m tests.benchmarks.batch``: many different images in one run, against qemu-img by ``xargs -P``.

Of twenty kinds of image (format, compression, how full, how scattered) as many as asked for are made, from 1 MiB to
``--largest``, and ten that are hostile or cut short. Ours converts, verifies every byte, hashes and draws; qemu-img
converts, and, to be fair, compares in a second figure. Peak memory is that of all processes of a side together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fixtures.hostile import Hostile, corpus
from tests.benchmarks import installed

MIB = 1 << 20
FORMATS = ("qcow2", "qcow2 -c", "raw", "vpc", "vhdx", "vmdk", "vdi", "qcow2 -c -o compression_type=zstd")
FILLS = (0.9, 0.5, 0.1, 0.02)
BROKEN = 10


def sizes(count: int, largest: int, skew: float) -> list[int]:
    """From 1 MiB to ``largest`` MiB: many small ones, a few large ones."""
    chance = random.Random(count)
    found = [1, largest, *(round(largest ** chance.random() ** skew) for _ in range(count - 2))]
    return sorted(max(1, one) for one in found)[:count]


def make_raw(path: Path, size: int, fill: float, seed: int) -> None:
    """A disk of ``size`` MiB, ``fill`` of it data: half of that compresses, half does not."""
    chance = random.Random(seed)
    block = chance.randbytes(MIB // 2) + (b"All work and no play. " * (MIB // 40))[: MIB // 2]
    with path.open("wb") as file:
        file.truncate(size * MIB)
        for place in sorted(chance.sample(range(size), max(1, round(size * fill)))):
            turn = chance.randrange(MIB)
            file.seek(place * MIB)
            file.write(block[turn:] + block[:turn])


def make_images(folder: Path, count: int, largest: int, skew: float) -> None:
    """All images; the broken ones are among ``count``."""
    folder.mkdir(parents=True)
    raw = folder / ".raw"
    for number, size in enumerate(sizes(count - BROKEN, largest, skew)):
        format_, *flags = FORMATS[number % len(FORMATS)].split()
        make_raw(raw, size, FILLS[number % len(FILLS)], number)
        target = folder / f"image-{number:03}.{'vhd' if format_ == 'vpc' else format_}"
        subprocess.run(["qemu-img", "convert", "-O", format_, *flags, str(raw), str(target)], check=True)
    raw.unlink()
    whole = next(one for one in sorted(folder.glob("*.qcow2")) if one.stat().st_size > MIB // 2)
    data = whole.read_bytes()[: 4 * MIB]
    for number in range(BROKEN // 2):
        (folder / f"cut-{number}.qcow2").write_bytes(data[: len(data) * (number + 1) // 7])
    for entry in chosen_hostile():
        entry.made().write(folder / f"hostile-{entry.name}{entry.suffix}")


def chosen_hostile() -> list[Hostile]:
    """Refused ones of the published corpus, of different kinds."""
    kinds: dict[str, Hostile] = {}
    for entry in corpus().values():
        if entry.verdict == "refused" and not (entry.heavy or entry.limit or entry.made().size > 64 * MIB):
            kinds.setdefault(entry.kind, entry)
    return list(kinds.values())[: BROKEN - BROKEN // 2]


@dataclass
class Measured:
    """A side: seconds, CPU seconds, and the most memory of all its processes together, in bytes."""

    seconds: float
    cpu: float
    peak: int
    code: int
    said: str


def run(command: list[str]) -> Measured:
    before = os.times()
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.1):
            peak = max(peak, sum(private_memory(pid) for pid in family(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, errors = process.communicate()
    ended.set()
    watcher.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(time.monotonic() - began, cpu, peak, process.returncode, said or errors)


def family(pid: int) -> Iterator[int]:
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(one) for task in tasks for one in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield from family(child)


def private_memory(pid: int) -> int:
    """What the process has to itself, and its share of what it has with others."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def qemu_img(images: Path, out: Path, jobs: int, *, compare: bool) -> list[str]:
    """The shell's way, its best flags; what fails is passed over."""
    out.mkdir(exist_ok=True)
    target = f"{out}/{{}}.vhdx"
    step = f"qemu-img convert -m 16 -W -O vhdx {images}/{{}} {target}"
    if compare:
        step += f" && qemu-img compare -q {images}/{{}} {target}"
    return ["sh", "-c", f"ls {images} | xargs -P{jobs} -I{{}} sh -c '{step} || true'"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--largest", type=int, default=2048, help="MiB")
    parser.add_argument("--skew", type=float, default=3.0, help="the more, the more small ones")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="a side with this in its name")
    parser.add_argument("--keep", type=Path, help="a folder to make all of it in, and leave it")
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        images = folder / "images"
        if not images.exists():
            make_images(images, asked.images, asked.largest, asked.skew)
        subprocess.run(f"cat {images}/* > /dev/null", shell=True, check=True)
        ours = [installed.command(), "batch", str(images), "-O", "vhdx"]
        ours += ["--jobs", str(asked.jobs), "--output", "json", "--progress", "none", "--out", str(folder / "ours")]
        commands = {
            "imagekit batch": ours,
            "xargs qemu-img convert": qemu_img(images, folder / "theirs", asked.jobs, compare=False),
            "xargs qemu-img convert, compare": qemu_img(images, folder / "both", asked.jobs, compare=True),
        }
        total = sum(one.stat().st_size for one in images.iterdir())
        print(f"{len(list(images.iterdir()))} images, {total / MIB:.0f} MiB in files")
        for name, command in commands.items():
            if asked.only and asked.only not in name:
                continue
            done = run(command)
            print(
                f"{name:<32} {done.seconds:7.1f} s  {total / MIB / done.seconds:6.0f} MiB/s  CPU {done.cpu:6.1f} s  "
                f"peak {done.peak / MIB:5.0f} MiB  exit {done.code}",
                flush=True,
            )
            for made in ("theirs", "both"):
                shutil.rmtree(folder / made, ignore_errors=True)
                (folder / made).mkdir()
            if command is ours:
                found = json.loads(done.said)
                print(f"{'':<32} {found['done']} done, {found['failed']} failed")
    finally:
        if asked.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
