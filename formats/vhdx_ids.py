"""Ids that derive from others: RFC 4122's version 5, as ``uuid.uuid5`` makes them, without loading OpenSSL for it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from hashlib import sha1
else:
    try:
        from _sha1 import sha1
    except ImportError:  # a Python that has OpenSSL's alone
        from hashlib import sha1


def uuid5(namespace: UUID, name: str) -> UUID:
    """The id of that name in the namespace, always the same one."""
    digest = sha1(namespace.bytes + name.encode(), usedforsecurity=False).digest()
    return UUID(bytes=digest[:16], version=5)
