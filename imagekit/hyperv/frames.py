"""How a script's result comes back: base64 between two marks that carry a nonce of this call.

A host prints more than it is asked for: progress, warnings, the banner of a profile, in whatever code page it has.
So the result is one ASCII text between marks that nothing else can contain, and what lies outside them is not looked
at. Text without a whole frame is a failure of the transport, never an empty result.

    ---imagekit NONCE begin---
    base64 of UTF-8 JSON, lines of any length
    ---imagekit NONCE end---
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from typing import Any

from imagekit.hyperv.transport import TransportError

MAX_RESULT = 8 << 20
"""Bytes of a result; the largest, a host's self-test, has some ten thousand."""
MAX_DEPTH = 32
SHOWN = 300


def make_nonce() -> str:
    """What marks the frame of one call: 128 random bits, in hexadecimal."""
    return secrets.token_hex(16)


def marks(nonce: str) -> tuple[str, str]:
    """The lines before and after a result."""
    return f"---imagekit {nonce} begin---", f"---imagekit {nonce} end---"


def frame(value: object, nonce: str) -> str:
    """The text a script prints for ``value``; what hosts of our tests answer with."""
    begin, end = marks(nonce)
    text = base64.b64encode(json.dumps(value).encode()).decode()
    return f"{begin}\n{text}\n{end}\n"


def unframe(text: str, nonce: str) -> dict[str, Any]:
    """The result within ``text``. Raises TransportError when it is not there whole, exactly once."""
    begin, end = marks(nonce)
    before, found, rest = text.partition(begin)
    if not found:
        raise TransportError(f"the host answered without a result{_said(before)}", hint=_HINT)
    body, found, after = rest.partition(end)
    if not found:
        raise TransportError("the host's answer ends in the middle of the result", hint=_HINT)
    if begin in body or begin in after:
        raise TransportError("the host answered with two results", hint=_HINT)
    packed = "".join(body.split())
    if len(packed) > MAX_RESULT * 4 // 3 + 4:
        raise TransportError(f"the host's result is larger than {MAX_RESULT} bytes")
    try:
        value = json.loads(base64.b64decode(packed.encode("ascii"), validate=True).decode("utf-8-sig"))
    except (binascii.Error, UnicodeError, ValueError, RecursionError) as error:
        raise TransportError(f"the host's result cannot be read: {error}", hint=_HINT) from None
    if not isinstance(value, dict) or _depth(value) > MAX_DEPTH:
        raise TransportError("the host's result is not an object of the kind expected", hint=_HINT)
    return value


_HINT = "nothing is known about what the host did: ask again, every step may be repeated"


def _said(text: str) -> str:
    """What came instead, shortened and escaped."""
    words = " ".join(text.split())[:SHOWN]
    shown = "".join(one if one.isprintable() else "?" for one in words)
    return f"; it said: {shown}" if shown else ""


def _depth(value: object, level: int = 1) -> int:
    if level > MAX_DEPTH or not isinstance(value, dict | list):
        return level
    inner = value.values() if isinstance(value, dict) else value
    return max((_depth(one, level + 1) for one in inner), default=level)
