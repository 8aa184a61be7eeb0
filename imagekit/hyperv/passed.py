"""Which hosts have passed a self-test asked from this computer: a small file in the user's own state folder."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

MAX_STATE = 1 << 20


def has_passed(target: str, family: str) -> bool:
    """Whether a self-test passed on this host, asked from this computer."""
    return _state().get(target) == family


def remember_passed(target: str, family: str) -> None:
    """Write it down; without a place to write it is asked for again."""
    path = _state_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(_state() | {target: family}, sort_keys=True), encoding="utf-8")
        part.replace(path)


def _state() -> dict[str, str]:
    try:
        with _state_file().open("rb") as file:
            state = json.loads(file.read(MAX_STATE))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _state_file() -> Path:
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "imagekit" / "hyperv-selftest.json"
