"""The images that are converted, each made once and kept in the tests' cache.

The disk is an ext4 with files of this system, most of it empty, as cloud images are; qemu-img turns it into the
formats. Others are what costs time or memory in ways of its own: explicit zeros, noise, a terabyte with a little data
here and there, tables without data.

``python -m tests.benchmarks.corpus DATA DISK KIND…`` (bytes) makes them and prints the paths as JSON: in a process of
its own, because a child's peak memory counts from its parent's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.cache import cache_dir, locked

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
FOLDERS = ("/usr/lib", "/usr/bin", "/usr/share", "/usr/local", "/opt")
PIECE = 4 * MIB

# Made from the ext4 disk by qemu-img: format and options.
CONVERTED = {
    "zlib.qcow2": ("qcow2", "-c"),
    "zstd.qcow2": ("qcow2", "-c", "-o", "compression_type=zstd"),
    "plain.qcow2": ("qcow2",),
    "extended.qcow2": ("qcow2", "-o", "extended_l2=on,cluster_size=128k"),
    "stream.vmdk": ("vmdk", "-o", "subformat=streamOptimized"),
    "dynamic.vhd": ("vpc", "-o", "subformat=dynamic,force_size=on"),
    "dynamic.vhdx": ("vhdx", "-o", "subformat=dynamic"),
}
SCATTERED_PLACES = 4000
NOISE_SHARE = 4
DENSE_CLUSTER_BITS = 16


def make(kind: str, data: int, disk: int) -> Path:
    """The path of one image; ``data`` bytes of files on a disk of ``disk`` bytes, or what goes with such a size."""
    folder = cache_dir("benchmarks")
    path = folder / f"{data // MIB}-{disk // MIB}-{kind}"
    if kind in CONVERTED:
        make("disk.raw", data, disk)
    elif kind == "noise.qcow2":
        make("noise.raw", data, disk)
    with locked(folder / f"{path.name}.lock"):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            part.unlink(missing_ok=True)
            _build(kind, part, data, disk)
            part.replace(path)
    return path


def _build(kind: str, part: Path, data: int, disk: int) -> None:
    if kind in CONVERTED:
        _convert(make("disk.raw", data, disk), part, *CONVERTED[kind])
    elif kind == "noise.qcow2":
        # qemu-img leaves clusters as they are that do not become smaller.
        _convert(make("noise.raw", data, disk), part, "qcow2", "-c")
    elif kind == "empty.vhdx":
        create = ("qemu-img", "create", "-q", "-f", "vhdx", str(part), "64T")
        subprocess.run(create, check=True)
    else:
        builders: dict[str, Callable[[Path, int, int], None]] = {
            "disk.raw": _disk,
            "noise.raw": _noise,
            "zeros.raw": _zeros,
            "scattered.raw": _scattered,
            "dense.qcow2": _dense,
        }
        builders[kind](part, data, disk)


def _convert(source: Path, part: Path, target: str, *options: str) -> None:
    command = ["qemu-img", "convert", "-f", "raw", "-O", target, *options, str(source), str(part)]
    subprocess.run(command, check=True)


def _disk(part: Path, data: int, disk: int) -> None:
    """An ext4 with ``data`` bytes of files."""
    stage = part.with_name(f"{part.name}.files")
    shutil.rmtree(stage, ignore_errors=True)
    left = data
    for path in _files():
        size = path.stat().st_size
        if size > left:
            continue
        copy = stage / path.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        left -= size
        if left < 64 << 10:
            break
    with part.open("wb") as file:
        file.truncate(disk)
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(stage), str(part)], check=True, env=environment)
    shutil.rmtree(stage)


def _files() -> Iterator[Path]:
    """Regular files of this system, in one order."""
    for top in FOLDERS:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if not path.is_symlink() and path.is_file() and os.access(path, os.R_OK):
                    yield path


def _noise(part: Path, data: int, disk: int) -> None:
    chance = random.Random(2010)
    with part.open("wb") as file:
        for _ in range(data // NOISE_SHARE // PIECE):
            file.write(chance.randbytes(PIECE))


def _zeros(part: Path, data: int, disk: int) -> None:
    """Zeros that are there, not a hole."""
    with part.open("wb") as file:
        for _ in range(2 * data // PIECE):
            file.write(bytes(PIECE))


def _scattered(part: Path, data: int, disk: int) -> None:
    """A terabyte with a few KiB here and there."""
    chance = random.Random(2010)
    with part.open("wb") as file:
        file.truncate(TIB)
        for _ in range(SCATTERED_PLACES):
            file.seek(chance.randrange(TIB // 4096) * 4096)
            file.write(chance.randbytes(4096 * chance.randint(1, 4)))
        file.truncate(TIB)


def _dense(part: Path, data: int, disk: int) -> None:
    """A qcow2 of 8192 times ``data`` bytes (16 TiB for 2 GiB) whose clusters all have an entry: the zero flag."""
    cluster = 1 << DENSE_CLUSTER_BITS
    tables = data // cluster
    l1_clusters = -(-tables * 8 // cluster)
    first = (1 + l1_clusters) * cluster
    size = tables * (cluster // 8) * cluster
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,
        0,
        DENSE_CLUSTER_BITS,
        size,
        0,
        tables,
        cluster,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
    table = struct.pack(">Q", 1) * (cluster // 8)
    with part.open("wb") as file:
        file.write(header.ljust(cluster, b"\0"))
        pointers = [first + number * cluster | 1 << 63 for number in range(tables)]
        file.write(struct.pack(f">{tables}Q", *pointers).ljust(l1_clusters * cluster, b"\0"))
        for _ in range(tables):
            file.write(table)


if __name__ == "__main__":
    made = {kind: str(make(kind, int(sys.argv[1]), int(sys.argv[2]))) for kind in sys.argv[3:]}
    print(json.dumps(made))
