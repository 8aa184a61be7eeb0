"""Real images made by other people's software: not part of the repository, used where they are present.

IMAGEKIT_SAMPLES names a folder with ``manifest.json`` and one ``NAME.xz`` an image. Without it the tests that
ask for a sample are skipped. Each image is unpacked once, into the tests' cache, and checked against the
manifest.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import lzma
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cache import cache_dir

_STEP = 1 << 20

PARENTS: Mapping[str, str] = {
    "fat-differential.vhd": "fat-parent.vhd",
    "fat-differential.vhdx": "fat-parent.vhdx",
    "win8-child.vhd": "win8.vhd",
}
"""The parent of each differencing image; it is unpacked beside its child."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the manifest says about an image. ``size`` and ``sha256`` are those of the unpacked file,
    ``content_md5`` that of the whole guest content, where several readers agree on it.
    """

    name: str
    format: str
    size: int
    sha256: str
    virtual_size: int | None
    content_md5: str | None
    note: str


def need_samples() -> Path:
    """The folder of samples; skips the test when there is none."""
    folder = os.environ.get("IMAGEKIT_SAMPLES")
    if not folder:
        pytest.skip("IMAGEKIT_SAMPLES is not set: no images made by other software here")
    if not (Path(folder) / "manifest.json").is_file():
        pytest.fail(f"IMAGEKIT_SAMPLES={folder} holds no manifest.json", pytrace=False)
    return Path(folder)


def sample_facts(name: str) -> Sample:
    """What the manifest says about the image ``name`` (without ``.xz``)."""
    return _manifest(need_samples())[name]


def sample(name: str) -> Path:
    """The image ``name``, unpacked, with its parent beside it if it has one. Not to be written to."""
    folder = need_samples()
    if name in PARENTS:
        _unpack(folder, PARENTS[name])
    return _unpack(folder, name)


@functools.cache
def _manifest(folder: Path) -> dict[str, Sample]:
    entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    keys = [field.name for field in dataclasses.fields(Sample) if field.name != "name"]
    samples = (
        Sample(name=entry["file"].removesuffix(".xz"), **{key: entry[key] for key in keys}) for entry in entries
    )
    return {known.name: known for known in samples}


@functools.cache
def _unpack(folder: Path, name: str) -> Path:
    """Once a run, so that a copy which an earlier test or run damaged does not live on."""
    expected = _manifest(folder)[name].sha256
    key = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:16]
    target = cache_dir(f"samples/{key}") / name
    if target.is_file() and _sha256(target) == expected:
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        part = Path(work) / name
        with lzma.open(folder / f"{name}.xz") as packed, part.open("wb") as out:
            while piece := packed.read(_STEP):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), os.SEEK_CUR)
                else:
                    out.write(piece)
            out.truncate()
        found = _sha256(part)
        if found != expected:
            pytest.fail(f"{name}.xz unpacks to sha256 {found}, the manifest says {expected}", pytrace=False)
        part.chmod(0o444)
        part.replace(target)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_STEP):
            digest.update(piece)
    return digest.hexdigest()
