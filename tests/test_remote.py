"""Images at an address, through the library and the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.qcow2_images import Compressed, Plain, Recipe, make
from imagekit import api
from imagekit.cli.app import run
from imagekit.errors import (
    InvalidImage,
    SourceError,
    UnsafeImage,
    UnsupportedFeature,
    UsageError,
    VerificationFailed,
)
from imagekit.limits import Limits
from imagekit.remote import addresses
from tests.disks import noise, text
from tests.web import Site, answers, drops, only, serve, states

SIZE = 8 << 20
IDENTIFIER = "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"


def image(*, seed: int = 1) -> bytes:
    """A qcow2 with some data, some of it compressed."""
    clusters = {number: Plain(noise(65536, seed + number)) for number in range(0, 100, 3)}
    return make(Recipe(size=SIZE, clusters={**clusters, 110: Compressed(text(65536))})).data


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(image()) as served:
        yield served


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "local.qcow2"
    path.write_bytes(image())
    return path


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "staged"])
@pytest.mark.parametrize("target", ["disk.vhdx", "disk.vhd", "disk.raw", "disk.qcow2"])
def test_a_conversion_from_an_address_gives_the_bytes_of_a_local_one(
    tmp_path: Path, site: Site, local: Path, target: str, ranges: bool
) -> None:
    site.ranges = ranges
    options: dict[str, Any] = {"identifier": IDENTIFIER, "verify": "content"}
    report = imagekit.convert(site.url, tmp_path / target, **options)
    imagekit.convert(local, tmp_path / f"local-{target}", **options)
    assert (tmp_path / target).read_bytes() == (tmp_path / f"local-{target}").read_bytes()
    assert (report.source, report.source_size) == (site.url, len(site.content))
    assert any("over the network" in note if ranges else "has no ranges" in note for note in report.notes)
    assert site.sent <= len(site.content)


def test_what_breaks_off_for_good_leaves_nothing(no_leftovers: Path, site: Site) -> None:
    site.fault = only(range(1, 99), answers(404))
    site.content = image() + bytes(3 << 20)
    with pytest.raises(SourceError, match="404"):
        imagekit.convert(site.url, no_leftovers / "disk.vhdx")


def test_an_image_that_changes_meanwhile_leaves_nothing(no_leftovers: Path, site: Site) -> None:
    site.fault = only(range(1, 99), states(ETag='"two"'))
    with pytest.raises(SourceError, match="changed while it was read"):
        imagekit.convert(site.url, no_leftovers / "disk.vhdx")


def test_info_reads_headers_only(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.content = image() + noise(20 << 20)
    assert run(["info", site.url, "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["virtual-size"], found["file-size"]) == ("qcow2", SIZE, len(site.content))
    assert [finding["rule"] for finding in found["findings"]] == ["downloaded"]
    assert site.sent <= 2 << 20


def test_map_measure_compare_and_check_take_an_address(
    site: Site, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["map"], ["measure", "-O", "vhdx"], ["check"]):
        assert run([*command, site.url, "--output", "json"]) == 0
        remotely = capsys.readouterr().out.replace(site.url, "X")
        assert run([*command, str(local), "--output", "json"]) == 0
        assert remotely == capsys.readouterr().out.replace(str(local), "X")
    assert run(["compare", site.url, str(local)]) == 0
    assert run(["compare", str(local), site.url]) == 0


def test_a_bundle_is_prepared_from_an_address(tmp_path: Path, site: Site) -> None:
    bundle = imagekit.prepare(site.url, out=tmp_path / "web", user_data="#cloud-config\n")
    assert bundle.machine.name == "image"
    with imagekit.open_image(tmp_path / "web" / "image.vhd") as disk:
        assert disk.pread(0, 65536) == noise(65536, 1)


def test_a_packed_image_is_unpacked_while_it_comes(tmp_path: Path) -> None:
    import gzip

    with serve(gzip.compress(image())) as site:
        report = imagekit.convert(site.url, tmp_path / "disk.raw")
    assert report.source_format == "qcow2"
    assert (tmp_path / "disk.raw").read_bytes()[:65536] == noise(65536, 1)


def test_the_target_is_named_after_the_address(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    site.other["/a%20disk.qcow2?signature=secret"] = site.content
    assert run(["convert", f"{site.address}/a%20disk.qcow2?signature=secret", "--for", "hyperv"]) == 0
    said = capsys.readouterr()
    assert (tmp_path / "a disk.vhdx").exists()
    assert "secret" not in said.out + said.err


def test_what_a_remote_image_refers_to_is_not_followed(site: Site) -> None:
    with pytest.raises(UnsupportedFeature, match="not followed"):
        imagekit.open_image(site.url, follow_references=True)


def test_a_remote_image_is_not_repaired(site: Site) -> None:
    with pytest.raises(UnsupportedFeature, match="repaired"):
        api.check(site.url, repair=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "nbd://host"])
def test_other_schemes_are_refused(url: str, no_leftovers: Path) -> None:
    with pytest.raises(UsageError, match="is not read"):
        imagekit.convert(url, no_leftovers / "disk.vhdx")


def test_a_path_that_looks_like_an_address_is_a_path(
    tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    local.rename(tmp_path / "http:" / "image")
    assert not addresses.is_remote("http://image")


def test_exit_codes_of_the_command_line(site: Site, no_leftovers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(no_leftovers / "disk.vhdx")
    quickly = ["--http-timeout", "0.3"]
    with serve(site.content) as other:
        site.fault = only(range(99), answers(302, Location=other.url.replace("127.0.0.1", "localhost")))
        assert run(["convert", site.url, target]) == 13
        assert "rule redirect" in capsys.readouterr().err
        assert run(["info", site.url, "--redirect-host", "localhost", "--redirect-host", "nowhere"]) == 0
    site.fault = only(range(99), answers(404))
    assert run(["convert", site.url, target, *quickly]) == 10
    site.fault = only(range(1, 99), drops(0))
    assert run(["convert", "ftp://host/x", target]) == 2
    assert run(["info", site.url, "--http-timeout", "0"]) == 2


def test_what_comes_from_elsewhere_is_read_confined_unless_asked_otherwise(
    tmp_path: Path, site: Site, local: Path
) -> None:
    """Nobody has to think of it; and the network stays outside."""
    report = imagekit.convert(site.url, tmp_path / "a.vhdx")
    assert "limits" in report.confinement
    assert imagekit.info(site.url).confinement == report.confinement
    assert imagekit.convert(site.url, tmp_path / "b.vhdx", confined=False).confinement == ()
    assert imagekit.convert(local, tmp_path / "c.vhdx").confinement == ()
    assert imagekit.convert(site.url, tmp_path / "d.vhdx", verify="qemu-img").confinement == ()


@pytest.mark.parametrize("confined", [True, False])
def test_a_checksum_is_taken_in_the_pass_that_copies(tmp_path: Path, site: Site, confined: bool) -> None:
    """The converter goes on while bytes that it does not need are still to be hashed; each comes once."""
    site.content = image() + noise(12 << 20)
    site.latency = 0.05
    right = hashlib.sha256(site.content).hexdigest()
    report = imagekit.convert(site.url, tmp_path / "disk.vhdx", checksum=f"sha256:{right}", confined=confined)
    assert site.sent == len(site.content)
    assert any("sha256" in note for note in report.notes)


@pytest.mark.parametrize("confined", [True, False])
def test_that_bytes_are_not_the_ones_meant_is_said_before_that_they_make_no_sense(
    no_leftovers: Path, site: Site, confined: bool
) -> None:
    damaged = bytearray(image())
    damaged[40:48] = b"\xff" * 8  # the L1 table's place
    right = hashlib.sha256(site.content).hexdigest()
    site.content = bytes(damaged)
    with pytest.raises(VerificationFailed, match="was expected"):
        imagekit.convert(site.url, no_leftovers / "disk.vhdx", checksum=f"sha256:{right}", confined=confined)
    with pytest.raises(InvalidImage):
        imagekit.convert(site.url, no_leftovers / "disk.vhdx", confined=confined)


def test_a_confined_process_gets_the_whole_file(
    tmp_path: Path, site: Site, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "disk.vhdx"
    assert run(["convert", site.url, str(target), "--confined", "--verify", "content"]) == 0
    assert run(["compare", str(target), str(local)]) == 0
    assert run(["info", site.url, "--confined"]) == 0
    assert site.url in capsys.readouterr().out


def test_the_limits_hold_for_a_remote_image(no_leftovers: Path, site: Site) -> None:
    with pytest.raises(UnsafeImage) as caught:
        imagekit.convert(site.url, no_leftovers / "disk.vhdx", limits=Limits(virtual_size=SIZE - 1))
    assert caught.value.rule == "limit-virtual-size"
