"""The host is this computer: powershell.exe as a child process.

Nothing of ours is on its command line but a tiny constant bootstrap; script and data come through standard input,
each line a name, a colon and base64 of UTF-8. So no limit on the length of a command line, no code page and no
quoting is met, and no data shows in a list of processes.

The text of the bootstrap and what it does were not run on Windows; the pipe to the child, time-outs and the decoding
are tested with a stand-in for powershell.exe.
"""

from __future__ import annotations

import base64
import ntpath
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files

from imagekit.errors import ToolError
from imagekit.hyperv.transport import Answer, TransportError

BOOTSTRAP = "bootstrap.ps1"
OPTIONS = ("-NoLogo", "-NoProfile", "-NonInteractive", "-ExecutionPolicy", "Bypass", "-OutputFormat", "Text")
if sys.platform == "win32":
    _HIDDEN = subprocess.CREATE_NO_WINDOW
else:
    _HIDDEN = 0
MAX_TEXT = 32 << 20
"""Bytes kept of what the script prints."""


class LocalTransport:
    """Runs scripts on this computer. ``program`` starts PowerShell; None finds the one Windows comes with."""

    hops = True

    def __init__(self, program: Sequence[str] | None = None) -> None:
        self._program = tuple(program) if program is not None else (find_powershell(),)

    @property
    def target(self) -> str:
        return "this computer"

    def run(self, script: str, parameters: Mapping[str, str], *, timeout: float) -> Answer:
        lines = [_line("script", script), *(_line(name, value) for name, value in parameters.items())]
        try:
            done = subprocess.run(
                [*self._program, *OPTIONS, "-EncodedCommand", encoded_bootstrap()],
                input="".join(lines).encode("ascii"),
                capture_output=True,
                timeout=timeout,
                creationflags=_HIDDEN,
            )
        except subprocess.TimeoutExpired:
            raise TransportError(
                f"PowerShell did not answer within {timeout:g} s and was stopped",
                hint="what it did is unknown: look at the host, or run the command again",
            ) from None
        except OSError as error:
            raise TransportError(f"PowerShell cannot be started: {error.strerror or error}") from error
        # The frame is ASCII; what else is printed has the code page of the console.
        text = done.stdout[:MAX_TEXT].decode("ascii", "replace")
        errors = tuple(filter(None, done.stderr[:MAX_TEXT].decode("utf-8", "replace").strip().split("\n")))
        if done.returncode != 0 and not text.strip():
            said = f": {errors[0].strip()[:300]}" if errors else ""
            raise TransportError(f"PowerShell ended with {done.returncode} and no answer{said}")
        return Answer(text, errors)

    def close(self) -> None:
        """There is nothing to end: every call has a process of its own."""


def find_powershell() -> str:
    """The powershell.exe that Windows comes with, by its full path: what is in the current folder never counts."""
    root = os.environ.get("SYSTEMROOT")
    if sys.platform != "win32" or root is None:
        raise ToolError(
            "this computer is no Hyper-V host: it is not Windows",
            hint="name the host: --on hyperv://HOST, or `imagekit hyperv … --host HOST`",
        )
    # A 32-bit Python sees System32 as SysWOW64, whose PowerShell has no Hyper-V module.
    for folder in ("Sysnative", "System32"):
        path = ntpath.join(root, folder, "WindowsPowerShell", "v1.0", "powershell.exe")
        if shutil.which(path):
            return path
    raise ToolError("powershell.exe was not found", path=root)


def bootstrap() -> str:
    """The constant script that reads another from standard input."""
    return files(__package__).joinpath("scripts", BOOTSTRAP).read_text(encoding="ascii")


def encoded_bootstrap() -> str:
    """The bootstrap as ``-EncodedCommand`` takes it: base64 of UTF-16LE."""
    return base64.b64encode(bootstrap().encode("utf-16-le")).decode()


def _line(name: str, value: str) -> str:
    return f"{name}:{base64.b64encode(value.encode()).decode()}\n"
