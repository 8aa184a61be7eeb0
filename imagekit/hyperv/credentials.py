"""Who we are to a host: from the environment, a file, the keyring, or asked for on a terminal.

Never from the command line, which every user of a computer can read. Off a terminal nothing is ever asked.
"""

from __future__ import annotations

import getpass
import os
import stat
import sys
from pathlib import Path
from typing import Any

from imagekit.errors import SourceError, UsageError
from imagekit.records import dataclass, field

USER, PASSWORD, FILE = "IMAGEKIT_HYPERV_USER", "IMAGEKIT_HYPERV_PASSWORD", "IMAGEKIT_HYPERV_CREDENTIALS"
KEYRING_SERVICE = "imagekit-hyperv"
MAX_FILE = 64 << 10

_HOW = f"set {USER} and {PASSWORD}, name a file with --credentials (or {FILE}), or keep it in the keyring"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A name and its password; None leaves it to the system (a Kerberos ticket, the user logged in)."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    origin: str = "the system"
    """Where they came from, for messages."""


def find_credentials(
    host: str,
    *,
    user: str | None = None,
    file: str | os.PathLike[str] | None = None,
    needed: bool = True,
    may_ask: bool | None = None,
) -> Credentials:
    """The credentials for ``host``; ``user`` is a name that is known already.

    With ``needed`` a password must be found; without, the system's own identity will do. ``may_ask`` None asks
    when both standard input and the terminal's output are one. Raises UsageError when there is none.
    """
    name = user or os.environ.get(USER) or None
    password = os.environ.get(PASSWORD)
    if password:
        return _complete(name, password, "the environment")
    path = file or os.environ.get(FILE)
    if path:
        return _from_file(Path(path), name)
    kept = _from_keyring(host, name)
    if kept is not None:
        return kept
    if not needed:
        return Credentials(name)
    return _ask(host, name, may_ask)


def _complete(user: str | None, password: str, origin: str) -> Credentials:
    if not user:
        raise UsageError(f"{origin} has a password but no user name", hint=f"set {USER}, or write it before the host")
    return Credentials(user, password, origin)


def _from_file(path: Path, user: str | None) -> Credentials:
    """Two lines: ``user=NAME`` and ``password=…``; the rest of a line is the value, as it stands."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise SourceError("not a regular file", path=path)
            if os.name == "posix" and status.st_mode & 0o077:
                raise SourceError("others may read these credentials", hint=f"chmod 600 {path}", path=path)
            data = file.read(MAX_FILE)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror or error}", path=path) from error
    fields = {}
    for line in data.decode("utf-8", "replace").lstrip("\ufeff").splitlines():
        key, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            fields[key.strip().lower()] = value
    password = fields.get("password")
    if not password:
        # The file's text is never quoted: it may be the password itself.
        raise UsageError("no line password=… in the file of credentials", path=path)
    return _complete(user or fields.get("user", "").strip() or None, password, f"the file {path}")


def _from_keyring(host: str, user: str | None) -> Credentials | None:
    """What ``keyring set imagekit-hyperv:HOST USER`` has kept; None without the package or an entry."""
    try:
        import keyring
    except ImportError:
        return None
    service = f"{KEYRING_SERVICE}:{host}"
    try:
        found: Any = keyring.get_credential(service, user)
    except Exception:  # a locked or missing store: every backend has errors of its own
        return None
    if found is None or not found.password:
        return None
    return Credentials(found.username or user, found.password, "the keyring")


def _ask(host: str, user: str | None, may_ask: bool | None) -> Credentials:
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if not (terminal if may_ask is None else may_ask):
        raise UsageError(f"no credentials for {host}", hint=_HOW)
    if user is None:
        print(f"user for {host}: ", end="", file=sys.stderr, flush=True)
        user = sys.stdin.readline().strip()
    password = getpass.getpass(f"password of {user} on {host}: ")
    if not user or not password:
        raise UsageError(f"no credentials for {host}", hint=_HOW)
    return Credentials(user, password, "the terminal")
