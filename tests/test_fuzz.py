"""Seeded fuzzing of all that reads images: only our own errors, in little memory and time, nothing else opened.

The cases are the same in every run. Those of tests/test_fuzz_structures.py are made by hypothesis.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from fixtures.hostile import corpus
from imagekit.formats.base import MiB
from imagekit.formats.files import MemoryFile
from tests.fuzz.seeds import Seed, seeds
from tests.fuzz.target import MAGICS, TestOneInput, Wrong, look
from tests.hostile_runs import INTERNAL, Opened, convert, limited, run, watched

SECONDS = 1.0
FAST = 150
"""Cases that are run each time."""

MANY = 120
"""Cases of each seed that go through the command line."""

EVERY = pytest.mark.parametrize("seed", seeds(), ids=[seed.name for seed in seeds()])
PACKED = {name: one for name, one in corpus().items() if one.verdict == "sound" and one.kind == "sound"}
PACKED = {name: one for name, one in PACKED.items() if name not in {seed.name for seed in seeds()}}


def judge(label: str, file: MemoryFile) -> str:
    """What became of it; fails with the name of the case."""
    started = time.process_time()
    try:
        became = look(file)
    except Exception as error:
        pytest.fail(f"{label}: {type(error).__name__}: {error}")
    assert time.process_time() - started < SECONDS, label
    return became


def test_there_are_cases_enough() -> None:
    assert sum(seed.cases for seed in seeds()) >= 20_000
    assert len(seeds()) >= 20
    assert len(PACKED) >= 7


@EVERY
def test_a_seed_is_taken_as_it_is(seed: Seed) -> None:
    """And stays so when its checksums are made anew: else nothing behind them would be reached."""
    data = bytearray(seed.data)
    seed.mend(data)
    assert data == seed.data
    assert judge(seed.name, MemoryFile(data)) in {"vhd", "vhdx", "qcow2", "vmdk", "vdi", "raw"}


def test_some_damage_of_every_seed_does_no_harm() -> None:
    for seed in seeds():
        if len(seed.data) > MiB:
            continue
        for label, data in list(seed.random())[: FAST // len(seeds()) + 3]:
            judge(label, MemoryFile(data))


def test_what_must_not_happen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer that finds nothing must be one that could."""
    monkeypatch.setattr("imagekit.formats.registry.probe", lambda file: [])
    with pytest.raises(Wrong, match="taken for raw"):
        TestOneInput(MAGICS[0] + bytes(1020))
    monkeypatch.setattr("imagekit.formats.registry.probe", lambda file: int(file.data))
    with pytest.raises(ValueError, match="invalid literal"):
        TestOneInput(b"x")


@pytest.mark.slow
@EVERY
def test_damage_to_any_structure_does_no_harm(seed: Seed) -> None:
    """Every byte of the headers and the first entries of the tables, with right checksums."""
    file = MemoryFile(seed.data)
    became: Counter[str] = Counter()
    with limited(64 * MiB), watched() as opened:
        for label in seed.swept(file.data):
            became[judge(label, file)] += 1
    assert opened == []
    assert became.total() == seed.cases - len(list(seed.random()))


@pytest.mark.slow
@EVERY
def test_damage_anywhere_does_no_harm(seed: Seed) -> None:
    with limited(64 * MiB + 2 * len(seed.data)), watched() as opened:
        for label, data in seed.random():
            judge(label, MemoryFile(data))
    assert opened == []


@pytest.mark.slow
@EVERY
def test_damage_does_no_harm_on_the_command_line_either(seed: Seed, tmp_path: Path) -> None:
    suffix = corpus()[seed.name].suffix
    for label, data in list(seed.random())[: MANY // 4 if len(seed.data) > MiB else MANY]:
        _assert_harmless(label, data, tmp_path / f"image{suffix}", tmp_path / "target.raw")


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_damage_to_what_is_packed_does_no_harm(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seed, chance = PACKED[name].made().bytes(), random.Random(name)
    for number in range(MANY):
        data = bytearray(seed)
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(min(len(data), 2048))] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
        if number % 4 == 3:
            del data[chance.randrange(len(data)) :]
        path = tmp_path / f"image{PACKED[name].suffix}"
        _assert_harmless(f"{name} {number}", bytes(data), path, tmp_path / "target.raw")


def _assert_harmless(label: str, data: bytes, path: Path, target: Path) -> None:
    """Either there is a target and 0, or there is nothing and an error that an image can cause."""
    path.write_bytes(data)
    ran = convert(path, target)
    assert ran.code != INTERNAL, f"{label}: {ran.stderr}"
    assert ran.code in {0, 2, 11, 12, 13, 14}, f"{label}: {ran.stderr}"
    assert target.exists() == (ran.code == 0), label
    assert ran.seconds < SECONDS, label
    ours = {one for one in ran.opened if Path(one.path) in (target, path.parent) or ".imagekit" in one.path}
    assert {one for one in ran.opened if one not in ours} <= {Opened("read", str(path))}, label
    target.unlink(missing_ok=True)
    assert [one.name for one in path.parent.iterdir()] == [path.name], label
    assert run("info", path).code in {0, 11, 12, 13}, label
