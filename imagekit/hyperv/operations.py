"""Which script does an operation on which kind of host, and how it is told its parameters.

Scripts are constant files of this package: ``NAME.ps1`` in PowerShell 3 for Windows Server 2012 and later, told JSON;
``NAME.v1.ps1`` in PowerShell 2 for 2008 R2, which has no JSON, told by lines of ``key=base64``. ``probe.ps1`` runs on
both. What an operation takes and gives: :mod:`imagekit.hyperv.contract`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from imagekit.errors import UnsupportedFeature

PLAN_ONLY = (
    "Windows Server 2008 R2: these scripts were parsed and checked against recorded facts, never run; a host takes "
    "them once `imagekit hyperv selftest` has passed there"
)


@dataclass(frozen=True, slots=True)
class Request:
    """A script, its name, and its parameters as text."""

    script_name: str
    script: str
    text: str


def request(operation: str, family: str | None, parameters: Mapping[str, Any]) -> Request:
    """What to run for ``operation`` on a host of ``family``; None: not known yet, which only the probe may ask."""
    old = family == "2008r2"
    name = f"{operation}.v1.ps1" if old and operation != "probe" else f"{operation}.ps1"
    path = files(__package__).joinpath("scripts", name)
    if not path.is_file():
        raise UnsupportedFeature(f"{operation} is not supported on a host of the kind {family or 'unknown'}")
    text = "".join(_lines(parameters)) if old else json.dumps(parameters)
    return Request(name, path.read_text(encoding="utf-8"), text)


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
