"""Signatures of checksum lists: OpenPGP, verified by gpgv against a keyring that the caller names.

A list is signed in itself (clearsigned: only what is inside the signature counts) or by a file beside it, named like
the list with ``.gpg``, ``.sign``, ``.asc`` or ``.sig`` behind. At least one signature must be good, by a key of the
keyring that is neither expired nor revoked, and none may be bad. gpgv runs confined, on open files, without a home.

Not here: trust between keys, key servers, other kinds of signatures.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from imagekit.errors import SourceError, ToolError, UsageError, VerificationFailed
from imagekit.formats.base import GiB, KiB, MiB
from imagekit.formats.files import LocalFile, nameless
from imagekit.tool_process import Finished, ToolLimits, run

BESIDE = (".gpg", ".sign", ".asc", ".sig")
CLEARSIGNED = b"-----BEGIN PGP SIGNED MESSAGE-----"
MOST_SIGNED = 256 * KiB
MOST_KEYS = 16 * MiB
LIMITS = ToolLimits(memory=GiB, cpu_seconds=60, seconds=120.0)
_ARMOR = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)
_STATUS = "[GNUPG:] "
_BAD = ("BADSIG", "EXPSIG", "EXPKEYSIG", "REVKEYSIG")


def verified(data: bytes, place: str, read: Callable[[str], bytes], keyring: str) -> bytes:
    """The part of a list that is signed; VerificationFailed where nothing good is."""
    program = shutil.which("gpgv")
    if program is None:
        raise ToolError("a signature needs gpgv, which is not installed", hint="apt-get install gpgv")
    keys = _keys(keyring)
    if len(data) > MOST_SIGNED:
        raise SourceError(f"has {len(data)} bytes, too much for a signed list", path=place)
    if data.lstrip().startswith(CLEARSIGNED):
        done = _gpgv(program, keys, data)
        _judge(done, place, keyring)
        return done.stdout
    signature = _beside(place, read)
    _judge(_gpgv(program, keys, signature, data), place, keyring)
    return data


def _beside(place: str, read: Callable[[str], bytes]) -> bytes:
    for suffix in BESIDE:
        try:
            return read(with_suffix(place, suffix))
        except SourceError:
            continue
    raise VerificationFailed(
        f"is not signed, and no signature is beside it ({', '.join(BESIDE)})",
        path=place,
        hint="leave out --keyring where you know the list to be good",
    )


def with_suffix(place: str, suffix: str) -> str:
    """The name of the file beside a path or an address."""
    if "://" not in place:
        return place + suffix
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=parts.path + suffix))


def _keys(keyring: str) -> bytes:
    """The keyring as gpgv reads it: binary."""
    with LocalFile.open_source(keyring) as file:
        if file.size > MOST_KEYS:
            raise UsageError(f"has {file.size} bytes, too much for a keyring", path=keyring)
        data = file.pread(0, file.size)
    blocks = _ARMOR.findall(data)
    try:
        return b"".join(map(_dearmored, blocks)) if blocks else data
    except (binascii.Error, ValueError):
        raise UsageError("the keyring's armor is damaged", path=keyring) from None


def _dearmored(block: bytes) -> bytes:
    """The bytes in an ASCII armor (RFC 9580, 6.2): behind the headers and an empty line, before the checksum."""
    lines = [line.strip() for line in block.splitlines()]
    body = lines[lines.index(b"") + 1 :] if b"" in lines else lines
    return base64.b64decode(b"".join(line for line in body if not line.startswith(b"=")), validate=True)


def _gpgv(program: str, keys: bytes, *files: bytes) -> Finished:
    """Run it on the keyring and what it is to verify; status lines come on stderr, what is signed on stdout."""
    folder = Path(tempfile.gettempdir())
    opened = [nameless(folder, "gpgv's") for _ in range(1 + len(files))]
    try:
        names, descriptors = [], []
        for file, data in zip(opened, (keys, *files), strict=True):
            file.pwrite(0, data)
            descriptor = file.fileno()
            assert descriptor is not None
            descriptors.append(descriptor)
            names.append(f"/proc/self/fd/{descriptor}")
        output = ("--output", "-") if len(files) == 1 else ()
        command = (program, "--homedir", "/nonexistent", "--status-fd", "2", "--weak-digest", "SHA1", *output)
        return run((*command, "--keyring", *names), limits=LIMITS, read_fds=descriptors)
    finally:
        for file in opened:
            file.close()


def _judge(done: Finished, place: str, keyring: str) -> None:
    said = [
        line[len(_STATUS) :].split()
        for line in done.stderr.decode(errors="replace").splitlines()
        if line.startswith(_STATUS)
    ]
    words = {line[0] for line in said if line}
    if bad := sorted(words & set(_BAD)):
        raise VerificationFailed(f"has a signature that does not count ({', '.join(bad)})", path=place)
    if not {"GOODSIG", "VALIDSIG"} <= words:
        why = (
            "by no key of the keyring"
            if "NO_PUBKEY" in words
            else done.last_words or f"gpgv ended with {done.returncode}"
        )
        raise VerificationFailed(
            f"has no good signature: {why}",
            path=place,
            hint=f"see which keys are in {keyring}, and who signed the list",
        )
