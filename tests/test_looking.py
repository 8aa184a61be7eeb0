"""A look into the guest's disk tells the same in a confined process, which is where a remote image is looked into."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

import imagekit
from fixtures.efi_disks import ESP, UEFI_CA, Fat, gpt_disk, loader
from imagekit import bundle as bundle_module
from imagekit.api import readiness
from imagekit.contents.firmware import Loader
from imagekit.contents.looking import Seen, as_seen, seen_message
from imagekit.contents.readiness import Check, Readiness
from imagekit.errors import UnsupportedFeature
from tests.ext_disks import make_disk, make_ext
from tests.test_readiness import GOOD, system
from tests.test_remote import IDENTIFIER
from tests.web import serve

SEEN = Seen(Loader(True, "why", "linux", True), Readiness((1, 2), (Check("boot", "ok", "it does"),)))


@pytest.fixture
def efi() -> bytes:
    return gpt_disk([(ESP, Fat({"EFI/BOOT/BOOTX64.EFI": loader(signers=[UEFI_CA])}, bits=12).volume())])


def test_what_a_look_saw_goes_there_and_back() -> None:
    assert as_seen(seen_message(SEEN)) == SEEN


@pytest.mark.parametrize(
    "change", [{"loader": [1, "x", "mac", 0]}, {"checks": [["x", "good", "y"]]}, {"loader": []}, {"checks": 5}]
)
def test_what_makes_no_sense_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        as_seen(seen_message(SEEN) | change)


def test_a_remote_guest_is_looked_into_confined_with_the_same_answers(tmp_path: Path) -> None:
    tree = system(tmp_path, initramfs=gzip.compress(GOOD))
    disk = make_disk(make_ext(tree, tmp_path / "fs.raw"), tmp_path / "disk.raw")
    with serve(disk.read_bytes()) as site:
        assert readiness(site.url, format="raw") == readiness(disk, format="raw")
        assert readiness(disk, format="raw", confined=True) == readiness(disk, format="raw")


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "staged"])
def test_a_bundle_of_a_remote_image_is_made_without_reading_it_in_this_process(
    tmp_path: Path, efi: bytes, ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local.raw").write_bytes(efi)
    uuid: dict[str, Any] = {"uuid": IDENTIFIER, "source_format": "raw", "name": "web"}
    local = imagekit.prepare(tmp_path / "local.raw", out=tmp_path / "local", **uuid)
    monkeypatch.setattr(bundle_module, "open_source", None)  # nobody calls it
    with serve(efi, ranges=ranges) as site:
        bundle = imagekit.prepare(site.url, out=tmp_path / "web", **uuid)
        assert site.sent == len(efi)
    assert "limits" in bundle.report.confinement
    assert (bundle.machine.generation, bundle.choice, bundle.readiness) == (2, local.choice, local.readiness)
    assert bundle.machine.media == local.machine.media


def test_strict_counts_for_a_remote_image(tmp_path: Path, no_leftovers: Path) -> None:
    with serve(bytes(4 << 20)) as site, pytest.raises(UnsupportedFeature, match="not ready"):
        imagekit.prepare(site.url, out=no_leftovers / "web", source_format="raw", strict=True, media="none")
