"""Passwords: made, hashed for Linux, encrypted for who asked.

Hashes are SHA-512 crypt (crypt(5), method 6), by libpass. Encryption is Nova's: base64 of RSA with PKCS#1 v1.5
padding to an ``ssh-rsa`` key, as ``nova get-password`` and ``openssl pkeyutl -decrypt`` read it; it needs the extra
``crypto``.

Secrets are arguments and results only: nothing here writes, prints or puts one into a message.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import string

from imagekit.errors import UnsupportedFeature, UsageError

LENGTH = 20
"""Characters of a password that is made: about 118 bits."""
ROUNDS = 100_000
"""Of SHA-512 crypt; a guest takes a fraction of a second for a log-in, and the default of 5000 is from 2007."""
_SALT = string.ascii_letters + string.digits + "./"
_MAX_RSA_LENGTH = 1020
"""Characters that Nova keeps of an encrypted password."""


def generate_password(length: int = LENGTH) -> str:
    """A new password of letters and digits, at least one of each kind, as Windows asks for."""
    alphabet = string.ascii_letters + string.digits
    while True:
        text = "".join(secrets.choice(alphabet) for _ in range(length))
        if any(c.islower() for c in text) and any(c.isupper() for c in text) and any(c.isdigit() for c in text):
            return text


def hash_password(password: str, *, uuid: str) -> str:
    """What belongs into /etc/shadow. The salt derives from the guest, so the same input gives the same drive."""
    from passlib.hash import sha512_crypt  # a quarter of a second to import, and rarely needed

    digest = hashlib.sha256(f"imagekit password salt {uuid.lower()}".encode()).digest()
    salt = "".join(_SALT[byte % 64] for byte in digest[:16])
    hashed: str = sha512_crypt.using(rounds=ROUNDS, salt=salt).hash(password)
    return hashed


def encrypt_password(password: str, ssh_keys: tuple[str, ...]) -> str:
    """The password for the owner of the first ``ssh-rsa`` key; raises UsageError when there is none."""
    key = next((key for key in ssh_keys if key.startswith("ssh-rsa ")), None)
    if key is None:
        kinds = ", ".join(sorted({key.split()[0] for key in ssh_keys})) or "no key"
        raise UsageError(
            f"a password can be encrypted for an ssh-rsa key only, and there is {kinds}",
            hint="add an RSA key (ssh-keygen -t rsa -b 4096), or have the password written to a file of your own",
        )
    try:
        from cryptography.hazmat.primitives.asymmetric import padding, rsa
        from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    except ImportError:
        raise UnsupportedFeature(
            "encrypting a password needs the package cryptography", hint="pip install 'imagekit[crypto]'"
        ) from None
    public = load_ssh_public_key(" ".join(key.split()[:2]).encode())
    if not isinstance(public, rsa.RSAPublicKey):
        raise UsageError("the ssh-rsa key is none that can encrypt")
    encrypted = base64.b64encode(public.encrypt(password.encode(), padding.PKCS1v15())).decode()
    if len(encrypted) > _MAX_RSA_LENGTH:
        raise UsageError(
            f"what an RSA key of {public.key_size} bits encrypts is longer than Nova's {_MAX_RSA_LENGTH} characters",
            hint="use a key of 4096 bits",
        )
    return encrypted
