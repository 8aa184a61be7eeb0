"""Sizes and times as people write and read them: 20G is 20 GiB is 20·2^30 bytes, 2h is 7200 seconds."""

from __future__ import annotations

import re

from imagekit.errors import UsageError

_SIZE = re.compile(r"(\d{1,20})(?:\.(\d{1,6}))?\s*(?:([kmgtpe])(?:i?b)?|b)?", re.IGNORECASE)
_UNITS = "kmgtpe"


def parse_size(text: str) -> int:
    """Bytes of a text such as ``20G``, ``1.5GiB`` or ``4096``; UsageError when it is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint="write it like 20G, 512MiB or 1073741824")
    whole, fraction, unit = match[1], match[2] or "", match[3]
    factor = 1 << (10 * (_UNITS.index(unit.lower()) + 1)) if unit else 1
    divisor: int = 10 ** len(fraction)
    value, rest = divmod(int(whole + fraction) * factor, divisor)
    if rest:
        raise UsageError(f"{text!r} is not a whole number of bytes", hint="write it in a smaller unit")
    return value


def parse_seconds(text: str) -> int:
    """Seconds of a text such as ``90``, ``10m`` or ``2h``; UsageError when it is none."""
    match = re.fullmatch(r"(\d{1,12})\s*([smh]?)", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"{text!r} is not a time", hint="write it like 90, 10m or 2h")
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def show_size(size: int) -> str:
    """``10 GiB (10737418240 bytes)``; the bytes alone below 1 KiB."""
    return f"{short_size(size)} ({size} bytes)" if size >= 1024 else f"{size} bytes"


def short_size(size: float) -> str:
    """At most four digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
