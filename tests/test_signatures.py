"""Signed lists of checksums: keys and signatures are made by gpg, and judged by gpgv."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from imagekit.cli.app import run
from imagekit.errors import SourceError, ToolError, VerificationFailed
from imagekit.remote.signatures import BESIDE, MOST_SIGNED, verified, with_suffix
from tests.oracles import need_tool
from tests.test_remote import image
from tests.web import serve

LIST = f"{hashlib.sha256(image()).hexdigest()}  image.qcow2\n"
OTHER = f"{'0' * 64}  image.qcow2\n"


class Signer:
    """A home of gpg with one key, and its public half in a file."""

    def __init__(self, home: Path, name: str) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        self.gpg("--passphrase", "", "--quick-generate-key", f"{name} <{name}@example.org>", "ed25519", "sign")
        self.keyring, self.armored = home / "keys.gpg", home / "keys.asc"
        self.keyring.write_bytes(self.gpg("--export"))
        self.armored.write_bytes(self.gpg("--armor", "--export"))

    def gpg(self, *arguments: str, data: bytes = b"") -> bytes:
        command = [need_tool("gpg"), "--batch", "--quiet", "--homedir", str(self.home), *arguments]
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout

    def end(self) -> None:
        subprocess.run([need_tool("gpgconf"), "--homedir", str(self.home), "--kill", "all"], check=False)


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Signer, Signer]]:
    need_tool("gpgv")
    folder = tmp_path_factory.mktemp("gpg")
    both = Signer(folder / "a", "publisher"), Signer(folder / "b", "stranger")
    yield both
    for one in both:
        one.end()


def detached(signer: Signer, *options: str) -> bytes:
    return signer.gpg(*options, "--detach-sign", data=LIST.encode())


@pytest.mark.oracle
@pytest.mark.parametrize("suffix", [".gpg", ".sign", ".asc", ".sig"])
def test_a_list_with_a_good_signature_beside_it_counts(signers: tuple[Signer, Signer], suffix: str) -> None:
    publisher, _ = signers
    signature = detached(publisher, *(["--armor"] if suffix == ".asc" else []))

    def read(place: str) -> bytes:
        if place != f"https://host/SHA256SUMS{suffix}?x=1":
            raise SourceError("no such file", path=place)
        return signature

    for keyring in (publisher.keyring, publisher.armored):
        assert verified(LIST.encode(), "https://host/SHA256SUMS?x=1", read, str(keyring)) == LIST.encode()


@pytest.mark.oracle
def test_of_a_clearsigned_list_only_what_is_signed_counts(signers: tuple[Signer, Signer]) -> None:
    publisher, _ = signers
    signed = publisher.gpg("--clear-sign", data=LIST.encode())
    around = signed + OTHER.encode()
    assert verified(signed, "x", bytes.fromhex, str(publisher.keyring)) == LIST.encode()
    with suppress(VerificationFailed):  # which is as good
        assert OTHER.encode() not in verified(around, "x", bytes.fromhex, str(publisher.keyring))


@pytest.mark.oracle
def test_what_is_not_signed_by_a_key_of_the_keyring_is_refused(signers: tuple[Signer, Signer]) -> None:
    publisher, stranger = signers
    good, keyring = detached(publisher), str(publisher.keyring)
    for data, signature, said in (
        (OTHER.encode(), good, "BADSIG"),
        (LIST.encode(), detached(stranger), "by no key of the keyring"),
        (LIST.encode(), good[:-5], "no good signature"),
        (LIST.encode(), b"", "no good signature"),
        (publisher.gpg("--clear-sign", data=LIST.encode()).replace(b"image", b"other"), b"", "BADSIG"),
        (stranger.gpg("--clear-sign", data=LIST.encode()), b"", "by no key"),
    ):
        with pytest.raises(VerificationFailed, match=said):
            verified(data, "SHA256SUMS", {f"SHA256SUMS{suffix}": signature for suffix in BESIDE}.__getitem__, keyring)


@pytest.mark.oracle
def test_a_key_that_expired_does_not_count(signers: tuple[Signer, Signer], tmp_path: Path) -> None:
    home = tmp_path / "c"
    home.mkdir(mode=0o700)
    old = Signer.__new__(Signer)
    old.home = home
    then = ("--faked-system-time", "20200101T000000")
    old.gpg(*then, "--passphrase", "", "--quick-generate-key", "old <old@example.org>", "ed25519", "sign", "1y")
    (home / "keys.gpg").write_bytes(old.gpg("--export"))
    signature = detached(old, *then)
    old.end()
    with pytest.raises(VerificationFailed, match="EXPKEYSIG"):
        verified(LIST.encode(), "SHA256SUMS", lambda _: signature, str(home / "keys.gpg"))


def test_a_list_without_a_signature_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tool("gpgv")
    (tmp_path / "keys").write_bytes(b"")

    def read(place: str) -> bytes:
        raise SourceError("no such file", path=place)

    with pytest.raises(VerificationFailed, match="not signed"):
        verified(LIST.encode(), "SHA256SUMS", read, str(tmp_path / "keys"))
    with pytest.raises(SourceError, match="too much"):
        verified(bytes(MOST_SIGNED + 1), "SHA256SUMS", read, str(tmp_path / "keys"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="gpgv"):
        verified(LIST.encode(), "SHA256SUMS", read, str(tmp_path / "keys"))


def test_the_signature_of_an_address_is_named_like_its_path() -> None:
    assert with_suffix("https://host/a/SHA256SUMS?key=1", ".gpg") == "https://host/a/SHA256SUMS.gpg?key=1"
    assert with_suffix("a/SHA256SUMS", ".sig") == "a/SHA256SUMS.sig"


@pytest.mark.oracle
def test_the_command_line_takes_a_keyring(
    tmp_path: Path, no_leftovers: Path, signers: tuple[Signer, Signer], capsys: pytest.CaptureFixture[str]
) -> None:
    publisher, stranger = signers
    with serve(image()) as site:
        site.other["/SHA256SUMS"] = LIST.encode()
        site.other["/SHA256SUMS.gpg"] = detached(publisher)
        asked = ["--checksum", f"{site.address}/SHA256SUMS", "--keyring"]
        good, bad = str(publisher.armored), str(stranger.keyring)
        assert run(["convert", site.url, str(tmp_path / "disk.vhdx"), *asked, good]) == 0
        assert run(["convert", site.url, str(no_leftovers / "disk.vhdx"), *asked, bad]) == 15
        assert run(["info", site.url, "--keyring", good]) == 2
        assert run(["info", site.url, "--checksum", f"sha256:{'0' * 64}", "--keyring", good]) == 2
    capsys.readouterr()
