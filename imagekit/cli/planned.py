"""Commands and options of the contract that do not work yet: they answer exit 12, not "no such option"."""

from __future__ import annotations

COMMANDS: frozenset[str] = frozenset()
OPTIONS: dict[str, frozenset[str]] = {}
