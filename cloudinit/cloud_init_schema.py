"""cloud-init's own schema check of a ``#cloud-config``, where cloud-init is installed; otherwise nothing is said.

The Python that runs ``cloud-init`` (or else the system's own) loads its `cloudinit.config.schema`, in a process with
a time limit that gets the text through a pipe: no secret is in arguments or in a file. Its messages quote values;
what is handed on is the setting and the schema's own words. What the schema calls deprecated is no problem.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10
MOST = 20
"""Problems of one text that are told."""
_NOT_THERE = 77
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/nonexistent"}
_SYSTEM_PYTHON = "/usr/bin/python3"
_ASK = f"""
import json, logging, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
logging.disable(logging.CRITICAL)
try:
    import jsonschema, yaml
    from cloudinit.config.schema import SchemaValidationError, get_schema, validate_cloudconfig_schema
except ImportError:
    sys.exit({_NOT_THERE})
found = []
try:
    validate_cloudconfig_schema(yaml.safe_load(sys.stdin.buffer.read()), schema=get_schema(), strict=True)
except SchemaValidationError as error:
    found = [(str(each[0]), str(each[1])[-2000:]) for each in (error.schema_errors or ())[:{MOST}]]
print(json.dumps(found))
"""

# jsonschema puts the value first: what follows the last of these words is the schema's.
_AFTER_VALUE = re.compile(
    r".*(?P<words>(is not (of type|one of|valid under|a multiple of|a '|allowed for|valid$)"
    r"|does not (match|contain|have)|is (too|less than|greater than|valid under)"
    r"|has (non-unique|too)|should be|was expected).*)$",
    re.DOTALL,
)
_NO_VALUE = re.compile(r"'[\w -]+' is a required property|Additional properties are not allowed \(.*\)")


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    """What the schema objects to: the setting, as names and numbers with dots between, and why."""

    setting: str
    message: str


def schema_problems(text: bytes) -> Iterator[SchemaProblem]:
    """What the installed cloud-init says of a cloud-config; nothing when there is none, or it gives no answer."""
    command = _python_of_cloud_init(shutil.which("cloud-init"))
    if command is None:
        return
    try:
        done = subprocess.run(
            [*command, "-I", "-c", _ASK],
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            timeout=SECONDS,
            check=False,
        )
        if done.returncode == _NOT_THERE:
            _absent.add(command)
        answer = json.loads(done.stdout) if done.returncode == 0 else []
        found = [(str(setting), str(message)) for setting, message in answer]
    except (OSError, ValueError, subprocess.SubprocessError):
        return
    for setting, message in found:
        yield SchemaProblem(setting, _without_values(message))


_absent: set[tuple[str, ...]] = set()
"""Pythons that have no cloud-init: asked once."""


def _python_of_cloud_init(program: str | None) -> tuple[str, ...] | None:
    command = _shebang(program) if program is not None else None
    if command is None and Path(_SYSTEM_PYTHON).exists():
        command = (_SYSTEM_PYTHON,)
    return None if command in _absent else command


@functools.cache
def _shebang(program: str) -> tuple[str, ...] | None:
    """The Python, with its options, that a script is for."""
    try:
        with Path(program).open("rb") as file:
            first = file.readline(256).decode(errors="replace")
    except OSError:
        return None
    return tuple(first[2:].split()) if first.startswith("#!") and "python" in first else None


def _without_values(message: str) -> str:
    """A message of jsonschema less the value it begins with, which may be a password."""
    if _NO_VALUE.fullmatch(message):
        return message
    match = _AFTER_VALUE.match(message)
    return f"it {match['words']}" if match else "it is not as the schema has it"
