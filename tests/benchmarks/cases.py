"""What is measured: each case is one conversion, its rivals, and the goals it is held to.

A goal is what the project asks of itself on a quiet machine with two cores: how many times as fast as a rival, what
share of its CPU time, seconds, memory. The table says which were met; no test depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20

BEST = "qemu-img -m 16 -W"
DEFAULT = "qemu-img"
CP = "cp --sparse=always"
NBDCOPY = "nbdcopy"
FLOOR = "inflate + write"
READ = "preadv"
PYTHON = "python -c pass"
STRUCTURE = "--verify structure"

CACHE_COPY = "cache copy"
"""Not a command of ours, but a call of the library."""

USUAL_PEAK = 96
HUGE_PEAK = 160
EXTRA_BLOCKS = 16


@dataclass(frozen=True)
class Case:
    """One conversion. ``rivals``: how many times as fast as each it is to be; 0 is for the record only."""

    name: str
    source: str
    """A kind of tests.benchmarks.corpus; empty for a command that takes none."""

    target: str
    """Suffix of what is written; empty when nothing is."""

    rivals: dict[str, float] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    command: str = "convert"
    cpu: float | None = None
    """At most this share of the CPU time of the best rival."""

    seconds: float | None = None
    per_block: float = 0
    """Seconds to be added for each block of 2 MiB of the disk's data."""

    peak: int = USUAL_PEAK
    """MiB."""

    extra: int | None = None
    """MiB that the target may take on the medium."""

    volume: str = "ext4"
    sync: bool = False
    rounds: int = 5
    quick: bool = False

    @property
    def fixed(self) -> bool:
        return "fixed" in self.options

    @property
    def needs(self) -> set[str]:
        """Kinds of the corpus that ours or a rival reads."""
        kinds = {self.source} if self.source else set()
        return kinds | ({"disk.raw"} if CP in self.rivals else set())


FIXED = ("--subformat", "fixed")


def _plain(source: str, name: str, target: str, *, quick: bool = False) -> list[Case]:
    """Data that needs no decoding: as fast as a copy, dynamic and fixed."""
    goals = {BEST: 1.0, DEFAULT: 1.4, CP: 0.95}
    return [
        Case(f"{name} → {target}", source, target, goals, quick=quick),
        Case(f"{name} → {target} fixed", source, target, goals, FIXED),
    ]


def _shared(volume: str) -> list[Case]:
    """File systems that let files share blocks: nothing is copied."""
    plain, raw = "plain.qcow2", "disk.raw"
    return [
        Case(
            "qcow2 plain → vhdx",
            plain,
            "vhdx",
            {BEST: 0},
            seconds=0.25,
            extra=EXTRA_BLOCKS,
            volume=volume,
            quick=True,
        ),
        Case(
            "qcow2 plain → vhd",
            plain,
            "vhd",
            {BEST: 0},
            seconds=0.25,
            per_block=1e-5,
            extra=EXTRA_BLOCKS,
            volume=volume,
        ),
        Case("raw → vhdx", raw, "vhdx", {BEST: 0}, seconds=0.25, extra=EXTRA_BLOCKS, volume=volume),
        Case("raw → vhd", raw, "vhd", seconds=0.25, per_block=1e-5, extra=EXTRA_BLOCKS, volume=volume, quick=True),
        Case(
            "vhdx → vhdx, resized",
            "dynamic.vhdx",
            "vhdx",
            options=("--size", "12G"),
            seconds=0.25,
            extra=EXTRA_BLOCKS,
            volume=volume,
        ),
        Case(
            "cache copy, resized",
            "dynamic.vhdx",
            "vhdx",
            options=(str(12 << 30),),
            command=CACHE_COPY,
            seconds=0.25,
            extra=EXTRA_BLOCKS,
            volume=volume,
        ),
        Case(
            "vhdx child → vhdx, merged",
            "child.vhdx",
            "vhdx",
            options=("--follow-references",),
            seconds=0.25,
            extra=EXTRA_BLOCKS,
            volume=volume,
        ),
    ]


CASES: list[Case] = [
    Case("imagekit --version", "", "", {PYTHON: 0.25}, command="--version", peak=32, rounds=15, quick=True),
    Case("imagekit info", "plain.qcow2", "", {PYTHON: 0.125}, command="info", peak=48, rounds=15, quick=True),
    Case("qcow2 zlib → vhd", "zlib.qcow2", "vhd", {BEST: 2.4, DEFAULT: 3.0, FLOOR: 0.87}, cpu=0.55, quick=True),
    Case("qcow2 zlib → vhdx", "zlib.qcow2", "vhdx", {BEST: 2.4, DEFAULT: 3.0, FLOOR: 0.87}, cpu=0.55),
    Case("qcow2 zlib → raw", "zlib.qcow2", "raw", {BEST: 2.4, DEFAULT: 3.0, FLOOR: 0.87, NBDCOPY: 0}, cpu=0.55),
    Case("qcow2 zlib → vhd, content", "zlib.qcow2", "vhd", {STRUCTURE: 0}, ("--verify", "content"), rounds=2),
    Case("qcow2 zstd → vhd", "zstd.qcow2", "vhd", {BEST: 1.3}, quick=True),
    Case("qcow2 zstd → vhdx", "zstd.qcow2", "vhdx", {BEST: 1.3}),
    *_plain("plain.qcow2", "qcow2 plain", "vhd", quick=True),
    *_plain("plain.qcow2", "qcow2 plain", "vhdx"),
    Case("qcow2 plain → vhdx, content", "plain.qcow2", "vhdx", {STRUCTURE: 0}, ("--verify", "content"), rounds=2),
    Case("qcow2 extended L2 → vhdx", "extended.qcow2", "vhdx", {BEST: 1.0}, rounds=3),
    *_plain("disk.raw", "raw", "vhd"),
    *_plain("disk.raw", "raw", "vhdx", quick=True),
    Case("raw → raw", "disk.raw", "raw", {BEST: 0, NBDCOPY: 0, CP: 0.95}, rounds=3),
    Case("vmdk streamOptimized → vhd", "stream.vmdk", "vhd", {BEST: 2.4}, cpu=0.55, rounds=3),
    Case("vhd → vhdx", "dynamic.vhd", "vhdx", {BEST: 1.0}, rounds=3),
    Case("vhdx → vhd", "dynamic.vhdx", "vhd", {BEST: 1.0}, rounds=3),
    Case("noise, raw → vhd", "noise.raw", "vhd", {BEST: 1.0}),
    Case("noise, qcow2 -c → vhd", "noise.qcow2", "vhd", {BEST: 1.0}),
    Case("zeros, raw → vhdx", "zeros.raw", "vhdx", {READ: 0.7}, extra=EXTRA_BLOCKS, quick=True),
    Case("1 TiB scattered, raw → vhdx", "scattered.raw", "vhdx", {BEST: 1.0}, rounds=3),
    Case("64 TiB empty, vhdx → vhdx", "empty.vhdx", "vhdx", seconds=1.0, peak=HUGE_PEAK, quick=True),
    Case("16 TiB of zero entries, qcow2 → vhdx", "dense.qcow2", "vhdx", peak=HUGE_PEAK, rounds=1, quick=True),
    Case("qcow2 zlib → vhd, fsync", "zlib.qcow2", "vhd", {BEST: 1.0}, sync=True, rounds=3),
    Case("qcow2 plain → vhdx, fsync", "plain.qcow2", "vhdx", {BEST: 1.0}, sync=True),
    *_shared("xfs"),
    Case("qcow2 zlib → vhdx", "zlib.qcow2", "vhdx", {BEST: 2.4}, volume="xfs"),
    *_shared("btrfs"),
]
