"""Checksums: stated, or found in the lists that publishers keep beside their images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import imagekit
from imagekit.cli.app import run
from imagekit.errors import SourceError, UnsupportedFeature, UsageError, VerificationFailed
from imagekit.remote.checksums import Checksum, from_list
from tests.disks import noise
from tests.test_remote import image
from tests.web import serve

SHA256, SHA512 = hashlib.sha256(b"it").hexdigest(), hashlib.sha512(b"it").hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()

LISTS = {
    "sha256sum": f"{OTHER}  a.qcow2\n{SHA256}  image.qcow2\n",
    "binary mark": f"{SHA256} *image.qcow2\n",
    "a folder": f"{OTHER}  ./x/a.qcow2\r\n{SHA256}  ./x/image.qcow2\r\n",
    "BSD": f"SHA256 (a.qcow2) = {OTHER}\nSHA256 (image.qcow2) = {SHA256}\n",
    "upper case": f"{SHA256.upper()}  image.qcow2\n",
    "a number alone": SHA256 + "\n",
    "twice the same": f"{SHA256}  image.qcow2\n{SHA256}  image.qcow2\n",
    "signed": f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# image.qcow2: 5 bytes\n{SHA256}  image.qcow2\n",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_a_list_says_which_checksum_a_file_has(text: str) -> None:
    assert from_list(text.encode(), "image.qcow2", where="list") == Checksum("sha256", SHA256)


def test_of_two_algorithms_the_stronger_counts() -> None:
    text = f"SHA256 (image) = {SHA256}\nSHA512 (image) = {SHA512}\nMD5 (image) = {'0' * 32}\n"
    assert from_list(text.encode(), "image", where="list") == Checksum("sha512", SHA512)


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{SHA256}  another.qcow2\n",
        f"{SHA256}  image.qcow2\n{OTHER}  image.qcow2\n",
        f"{SHA256[:-1]}  image.qcow2",
    ],
    ids=["empty", "another", "contradiction", "cut"],
)
def test_a_list_that_does_not_say_it_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        from_list(text.encode(), "image.qcow2", where="list")


@pytest.mark.parametrize(
    ("algorithm", "value", "error"),
    [
        ("crc32", "0" * 8, UnsupportedFeature),
        ("sha256", "0" * 63, UsageError),
        ("sha256", "x" * 64, UsageError),
    ],
)
def test_what_is_no_checksum_is_said(algorithm: str, value: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        Checksum.of(algorithm, value)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    path.write_bytes(image())
    return path


@pytest.mark.parametrize("confined", [False, True], ids=["", "confined"])
@pytest.mark.parametrize("ranges", [True, False, None], ids=["ranges", "staged", "local"])
def test_only_the_image_that_is_meant_is_converted(
    tmp_path: Path, no_leftovers: Path, local: Path, ranges: bool | None, confined: bool
) -> None:
    right = "sha512:" + hashlib.sha512(image()).hexdigest()
    with serve(image(), ranges=bool(ranges)) as site:
        source = local if ranges is None else site.url
        report = imagekit.convert(source, tmp_path / "disk.vhdx", checksum=right, confined=confined)
        with pytest.raises(VerificationFailed, match="was expected"):
            imagekit.convert(source, no_leftovers / "disk.vhdx", checksum=f"sha256:{OTHER}", confined=confined)
        assert site.sent <= 2 * len(image())
    assert any("sha512" in note for note in report.notes)


def test_bytes_behind_the_disk_count(no_leftovers: Path) -> None:
    """The checksum is the file's, not only of what a converter reads of it."""
    right = "sha256:" + hashlib.sha256(image()).hexdigest()
    with serve(image() + noise(3 << 20)) as site, pytest.raises(VerificationFailed):
        imagekit.convert(site.url, no_leftovers / "disk.vhdx", checksum=right)


def test_a_list_comes_from_a_file_or_an_address(
    tmp_path: Path, local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"{hashlib.sha256(image()).hexdigest()}  image.qcow2\n"
    (tmp_path / "SHA256SUMS").write_text(line)
    with serve(image()) as site:
        site.other["/SHA256SUMS"] = line.encode()
        site.other["/wrong"] = f"{OTHER}  image.qcow2\n".encode()
        site.other["/huge"] = bytes(2 << 20)
        for text, code in (
            (str(tmp_path / "SHA256SUMS"), 0),
            (f"{site.address}/SHA256SUMS", 0),
            (f"{site.address}/wrong", 15),
            (f"{site.address}/huge", 10),
            (str(tmp_path / "none"), 10),
            ("sha256:00", 2),
            ("crc32:00000000", 12),
        ):
            for source in (site.url, str(local)):
                for command in ("info", "check"):
                    assert run([command, source, "--checksum", text]) == code, (text, capsys.readouterr().err)


def test_a_weak_checksum_is_computed_and_said_to_be_weak(tmp_path: Path, local: Path) -> None:
    right = "md5:" + hashlib.md5(image(), usedforsecurity=False).hexdigest()
    report = imagekit.convert(local, tmp_path / "disk.vhdx", checksum=right)
    assert any("md5 proves little" in note for note in report.notes)
