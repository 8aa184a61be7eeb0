"""Which script does an operation on which kind of host, and how it is told its parameters.

Scripts are constant files of this package: ``NAME.ps1`` in PowerShell 3 for Windows Server 2012 and later, told JSON;
``NAME.v1.ps1`` in PowerShell 2 for 2008 R2, which has no JSON, told by lines of ``key=base64``. What is sent is that
after its common parts: ``common.ps1`` (answers and failures, in PowerShell 2) and that of the family. What an
operation takes and gives: :mod:`imagekit.hyperv.contract`.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from imagekit.errors import UnsupportedFeature
from imagekit.records import dataclass

PLAN_ONLY = (
    "Windows Server 2008 R2: these scripts were parsed and checked against recorded facts, never run; a host takes "
    "them once `imagekit hyperv selftest` has passed there"
)

EVERYWHERE = frozenset(
    (
        *("probe", "preflight", "file-info", "make-folder", "write-chunk"),
        *("publish-file", "remove-file", "remove-folder", "read-serial"),
    )
)
"""One script does for every family: it needs nothing of Hyper-V, or what the common part of the family has."""
NOT_ON_2008R2 = frozenset(("hash-disk",))


@dataclass(frozen=True, slots=True)
class Request:
    """A script, its name, and its parameters as text."""

    script_name: str
    script: str
    text: str


def request(operation: str, family: str | None, parameters: Mapping[str, Any]) -> Request:
    """What to run for ``operation`` on a host of ``family``; None: not known yet, which only the probe may ask."""
    old = family == "2008r2"
    if operation in NOT_ON_2008R2 and old:
        raise UnsupportedFeature(f"{operation} is not supported on a host of the kind {family}")
    name = f"{operation}.v1.ps1" if old and operation not in EVERYWHERE else f"{operation}.ps1"
    parts = ["common.ps1", name]
    if operation != "probe":
        parts.insert(1, "common.v1.ps1" if old else "common.v3.ps1")
    text = "".join(_lines(parameters)) if old else json.dumps(parameters)
    return Request(name, "\n".join(_read(part) for part in parts), text)


@functools.cache
def _read(name: str) -> str:
    return files(__package__).joinpath("scripts", name).read_text(encoding="ascii")


def _lines(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``key=base64`` a line; what lies deeper has its place in the key: ``nics.0.mac``."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _lines(value, f"{name}.")
        elif isinstance(value, list):
            yield from _lines({f"{name}.count": len(value)})
            for index, item in enumerate(value):
                yield from _lines(item if isinstance(item, Mapping) else {"": item}, f"{name}.{index}.")
        elif value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            yield f"{name}={base64.b64encode(text.encode()).decode()}\n"
