"""The oracle helpers themselves: a judge that is missing or broken must never look like one that agrees."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
from pathlib import Path

import pytest

from tests import oracles, samples

CONTENT = bytes(range(256)) * 4096 + bytes(3 << 20)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB of content in a fixed VHD by qemu-img, in a folder whose name needs quoting."""
    folder = tmp_path / "a, b"
    folder.mkdir()
    raw, vhd = folder / "content.raw", folder / "content.vhd"
    raw.write_bytes(CONTENT)
    options = ["-O", "vpc", "-o", "subformat=dynamic,force_size=on"]
    subprocess.run([oracles.need_tool("qemu-img"), "convert", "-f", "raw", *options, raw, vhd], check=True)
    return vhd


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_a_missing_tool_skips_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        oracles.need_tool("no-such-program")


def test_a_missing_tool_fails_the_test_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed"):
        oracles.need_tool("no-such-program")


@pytest.mark.oracle
def test_an_oracle_that_fails_fails_the_test_in_its_own_words(tmp_path: Path) -> None:
    oracles.need_tool("qemu-img")
    with pytest.raises(pytest.fail.Exception, match="No such file"):
        oracles.qemu_img_md5(tmp_path / "missing.vhd", "vpc")


@pytest.mark.oracle
def test_qemu_img_reads_the_content(image: Path) -> None:
    assert oracles.qemu_img_md5(image, "vpc", force_size_calc="current_size") == md5(CONTENT)


@pytest.mark.oracle
def test_dissect_reads_the_content(image: Path) -> None:
    """From its own environment, which the first use makes."""
    assert oracles.dissect_md5(image, "vhd") == md5(CONTENT)


@pytest.mark.oracle
def test_libvhdi_reads_the_content(image: Path) -> None:
    assert oracles.vhdi_md5(image) == md5(CONTENT)


@pytest.mark.oracle
def test_a_sample_unpacks_to_what_its_manifest_says() -> None:
    facts = samples.sample_facts("ext2.qcow2")
    path = samples.sample("ext2.qcow2")
    assert path.stat().st_size == facts.size
    assert oracles.qemu_img_md5(path, "qcow2") == facts.content_md5


def test_a_differencing_sample_lies_beside_its_parent() -> None:
    assert (samples.sample("win8-child.vhd").parent / "win8.vhd").is_file()


def test_a_sample_that_is_not_what_its_manifest_says_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged download must not be taken for a bug of ours, or hide one."""
    entry = {"file": "odd.raw.xz", "format": "raw", "size": 3, "sha256": "0" * 64}
    entry |= {"virtual_size": None, "content_md5": None, "note": ""}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    (tmp_path / "odd.raw.xz").write_bytes(lzma.compress(b"odd"))
    monkeypatch.setenv("IMAGEKIT_SAMPLES", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(pytest.fail.Exception, match="the manifest says 0000"):
        samples.sample("odd.raw")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_without_samples_the_test_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGEKIT_SAMPLES", raising=False)
    with pytest.raises(pytest.skip.Exception, match="IMAGEKIT_SAMPLES"):
        samples.sample("ext2.qcow2")
