"""The real Glance 33: images from it and to it, its refusals, and our import plugin inside it.

tests/oracles/glance.py starts it, once for all tests here. What a test uploads has a name of its own.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import imagekit
from fixtures.qcow2_images import Plain, Recipe, make
from imagekit.cli.app import run
from imagekit.formats.base import GiB, MiB
from imagekit.launch.tiny_guest import write_tiny_guest
from imagekit.progress import Progress
from tests.disks import noise
from tests.oracles import need_tool
from tests.oracles.glance import RealGlance, real_glance

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

PATTERN = noise(65536, 7)


@pytest.fixture(scope="module")
def glance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealGlance]:
    with real_glance(tmp_path_factory.mktemp("glance")) as started:
        yield started


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny guest, as qemu-img compresses it."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_guest(folder / "tiny.raw")
    command = [need_tool("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*command, folder / "tiny.raw", folder / "tiny.qcow2"], check=True)
    return folder / "tiny.qcow2"


def cli(glance: RealGlance, *arguments: str | Path) -> int:
    return run([*map(str, arguments), "--glance-url", glance.url, "--no-sync"])


def test_an_image_becomes_a_bundle_that_boots(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By id and by name, with its least of disk and memory; the guest itself checks its disk and finds its drive."""
    need_tool("qemu-system-x86_64")
    stated = {"hw_machine_type": "hyperv-gen1", "min_disk": 1, "min_ram": 2100, "os_secure_boot": "disabled"}
    made = glance.upload(tiny.read_bytes(), name="boots", disk_format="qcow2", **stated)
    bundle = tmp_path / "bundle"
    assert cli(glance, "prepare", f"glance:{made}", "--out", bundle, "--output", "json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["reasons"]["generation"] == "Glance states hw_machine_type=hyperv-gen1"
    assert (said["machine"]["name"], said["machine"]["memory"]) == ("boots", 2100 * MiB)
    assert said["conversion"]["target"]["virtual-size"] == GiB
    result = imagekit.boot(bundle, accelerator="tcg", timeout=120)
    assert result.verdict == "booted"
    assert cli(glance, "convert", "glance:boots", tmp_path / "boots.vhdx") == 0


def test_what_is_sent_to_glance_comes_back_the_same(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every format that Glance takes; the properties that a look at the disk gave; protected at the end."""
    for target in ("vhd", "vhdx", "qcow2", "raw"):
        path = tmp_path / f"tiny.{target}"
        imagekit.convert(tiny, path, sync=False)
        upload = ["upload", path, f"glance:sent-{target}", "-f", target, "--protected", "--output", "json"]
        assert run([*map(str, upload), "--glance-url", glance.url]) == 0
        made = json.loads(capsys.readouterr().out)
        stated = glance.show(made["id"])
        assert (stated["status"], stated["disk_format"], stated["protected"]) == ("active", target, True)
        assert (stated["hw_machine_type"], stated["min_disk"]) == ("hyperv-gen1", 1)
        assert stated["os_hash_value"] == made["digest"]["value"]
        assert glance.stored(made["id"]) == path.read_bytes()
        assert run(["compare", f"glance:sent-{target}", str(tiny), "--glance-url", glance.url]) == 0
        capsys.readouterr()


def test_convert_uploads_in_one_go(glance: RealGlance, tiny: Path, tmp_path: Path) -> None:
    assert cli(glance, "convert", tiny, "--upload", "glance:in-one-go", "--property", "os_distro=tiny") == 0
    assert cli(glance, "convert", "glance:in-one-go", tmp_path / "back.raw") == 0
    assert run(["compare", str(tmp_path / "back.raw"), str(tiny), "-f", "raw"]) == 0


def test_a_fixed_vhd_is_refused_by_glance_as_we_say(
    glance: RealGlance, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours says so beforehand; tried all the same, Glance answers 415 and no image is left."""
    path, before = tmp_path / "fixed.vhd", glance.ids()
    imagekit.convert(tiny, path, subformat="fixed", sync=False)
    at = ["--glance-url", glance.url]
    assert run(["upload", str(path), "glance:fixed", *at]) == 12
    assert "415" in capsys.readouterr().err
    assert run(["upload", str(path), "glance:fixed", "--disk-format", "vhd", *at]) == 16
    assert "Glance answered 415" in capsys.readouterr().err
    assert glance.ids() == before
    assert run(["upload", str(path), "glance:fixed", "--disk-format", "raw", *at]) == 0
    assert run(["info", "glance:fixed", "-f", "vhd", *at]) == 0


def test_bytes_that_are_not_those_of_the_hash_end_with_15(
    glance: RealGlance, tiny: Path, no_leftovers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit flips in the store, behind Glance's back."""
    made = glance.upload(tiny.read_bytes(), name="flipped", disk_format="qcow2")
    stored = glance.folder / "images" / made
    data = bytearray(stored.read_bytes())
    data[-1000] ^= 1
    stored.write_bytes(data)
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == 15
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == 15
    assert "its sha512 is" in capsys.readouterr().err


def test_an_image_deleted_while_it_is_fetched_ends_with_10(glance: RealGlance, no_leftovers: Path) -> None:
    """The first answer of the file deletes the image, whose other ranges are then gone."""
    data = make(Recipe(size=64 * MiB, clusters={number: Plain(PATTERN) for number in range(1000)})).data
    made = glance.upload(data, name="deleted", disk_format="qcow2")
    deleted = threading.Event()

    def told(progress: Progress) -> None:
        if progress.phase == "download" and progress.done and not deleted.is_set():
            deleted.set()
            assert glance.call("DELETE", f"/v2/images/{made}")[0] == 204

    with pytest.raises(imagekit.ImagekitError) as caught:
        imagekit.convert(f"glance:{made}", no_leftovers / "disk.vhdx", glance_url=glance.url, progress=told)
    assert deleted.is_set()
    assert caught.value.exit_code == 10, caught.value


@pytest.mark.parametrize("stated", ["raw", "iso"])
def test_content_in_another_format_than_stated_is_refused(
    glance: RealGlance, tiny: Path, no_leftovers: Path, stated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Glance takes a qcow2 for raw; we do not (13). What is stated to be no disk is not even fetched (12)."""
    data = tiny.read_bytes() if stated == "raw" else bytes(32769) + b"CD001" + bytes(60000)
    made = glance.upload(data, name=f"wrong-{stated}", disk_format=stated)
    expected = {"raw": 13, "iso": 12}[stated]
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == expected
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == expected
    if stated == "raw":
        assert "format-mismatch" in capsys.readouterr().err


def bomb() -> bytes:
    """A qcow2 of 2 MiB that claims 8 GiB of data, all of it in one cluster."""
    tables = 8 * GiB // 65536 // 8192
    made = make(Recipe(size=8 * GiB, clusters={number * 8192: Plain(PATTERN) for number in range(tables)}))
    data, entry = bytearray(made.data), made.data[made.l2_entry(0) :][:8]
    for number in range(tables):
        at = made.l2_entry(number * 8192)
        data[at : at + 65536] = entry * 8192
    return bytes(data)


def test_a_bomb_ends_with_13(glance: RealGlance, no_leftovers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = glance.upload(bomb(), name="bomb", disk_format="qcow2")
    assert glance.show(made)["virtual_size"] == 8 * GiB
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "disk.vhdx") == 13
    assert cli(glance, "prepare", f"glance:{made}", "--out", no_leftovers / "bundle") == 13
    said = capsys.readouterr().err
    assert "amplification" in said
    assert cli(glance, "convert", f"glance:{made}", no_leftovers / "a.vhdx", "--limit-virtual-size", "1G") == 13
