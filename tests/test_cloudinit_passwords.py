"""Passwords: hashes that crypt(5) makes too, encryption that openssl undoes."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from imagekit.cloudinit import passwords
from imagekit.cloudinit.passwords import encrypt_password, generate_password, hash_password
from imagekit.errors import UsageError
from tests.cloudinit_specs import KEY, UUID
from tests.oracles import need_tool


def test_a_password_has_letters_of_both_cases_and_digits_and_is_never_the_same() -> None:
    made = {generate_password() for _ in range(50)}
    assert len(made) == 50
    for text in made:
        assert len(text) == 20 and text.isalnum()
        assert any(map(str.islower, text)) and any(map(str.isupper, text)) and any(map(str.isdigit, text))


def test_the_same_guest_and_password_give_the_same_hash_and_others_another() -> None:
    other = "11111111-2222-3333-4444-555555555555"
    assert hash_password("a", uuid=UUID) == hash_password("a", uuid=UUID.upper())
    assert len({hash_password("a", uuid=UUID), hash_password("a", uuid=other), hash_password("b", uuid=UUID)}) == 3


@pytest.mark.oracle
def test_openssl_makes_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """openssl knows no rounds but the default."""
    monkeypatch.setattr(passwords, "ROUNDS", 5000)
    ours = hash_password("correct horse", uuid=UUID)
    salt = ours.split("$")[2]
    command = [need_tool("openssl"), "passwd", "-6", "-stdin", "-salt", salt]
    done = subprocess.run(command, input="correct horse\n", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ours


@pytest.mark.oracle
def test_openssl_decrypts_what_was_encrypted_for_the_key(tmp_path: Path) -> None:
    ssh_keygen, openssl = need_tool("ssh-keygen"), need_tool("openssl")
    private = tmp_path / "id_rsa"
    subprocess.run(
        [ssh_keygen, "-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-C", "me", "-f", private], check=True
    )
    key = private.with_suffix(".pub").read_text().strip()
    encrypted = encrypt_password("correct horse", (KEY, key))
    command = [openssl, "pkeyutl", "-decrypt", "-inkey", str(private), "-pkeyopt", "rsa_padding_mode:pkcs1"]
    done = subprocess.run(command, input=base64.b64decode(encrypted), capture_output=True, check=True)
    assert done.stdout == b"correct horse"


def test_other_keys_cannot_encrypt() -> None:
    with pytest.raises(UsageError, match="ssh-rsa key only, and there is ssh-ed25519") as caught:
        encrypt_password("correct horse", (KEY,))
    assert "correct horse" not in str(caught.value) + str(caught.value.hint)
