"""powershell.exe on this computer: what goes through its standard input, and what becomes of what it prints.

A Python program stands in for PowerShell: it knows the constant bootstrap by its bytes and does in Python what the
bootstrap says, so this proves the pipe and not the script, which was never run on Windows.
"""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

import pytest

from imagekit.errors import ToolError
from imagekit.hyperv.frames import make_nonce, unframe
from imagekit.hyperv.local import LocalTransport, bootstrap, encoded_bootstrap, find_powershell
from imagekit.hyperv.transport import TransportError
from tests.test_hyperv_winrm import HOSTILE

STAND_IN = """
import base64, json, sys, time
from pathlib import Path
mode, command = sys.argv[1], sys.argv[-1]
assert sys.argv[-2] == "-EncodedCommand" and len(" ".join(sys.argv)) < 4000
assert base64.b64decode(command).decode("utf-16-le") == Path(sys.argv[2]).read_text()
values = {}
for line in sys.stdin.buffer:
    name, _, packed = line.decode("ascii").strip().partition(":")
    values[name] = base64.b64decode(packed).decode()
script, nonce = values.pop("script"), values["Nonce"]
if mode == "silent":
    time.sleep(30)
if mode == "dies":
    sys.stderr.buffer.write("Zugriff verweigert\\n".encode("cp850"))
    sys.exit(1)
sys.stdout.buffer.write("Grüße vom Profil\\r\\n".encode("cp850"))
text = base64.b64encode(json.dumps({"got": values["Data"], "script": script}).encode()).decode()
wrapped = "\\r\\n".join(text[at:at + 79] for at in range(0, len(text), 79))
sys.stdout.buffer.write(f"---imagekit {nonce} begin---\\r\\n{wrapped}\\r\\n---imagekit {nonce} end---\\r\\n".encode())
sys.stderr.buffer.write(b"a warning\\n")
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """The command of the stand-in, without its mode."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "bootstrap").write_text(bootstrap())
    return [sys.executable, str(tmp_path / "stand_in.py")]


def transport(program: list[str], mode: str = "answers") -> LocalTransport:
    return LocalTransport([*program, mode, str(Path(program[1]).parent / "bootstrap")])


def test_hostile_text_arrives_as_it_was(program: list[str]) -> None:
    for text in [*HOSTILE, "ü'\"\n" * 100_000]:
        nonce = make_nonce()
        answer = transport(program).run("param($Data)\n'ü'", {"Data": text, "Nonce": nonce}, timeout=30)
        value = unframe(answer.text, nonce)
        assert value == {"got": text, "script": "param($Data)\n'ü'"}
        assert answer.errors == ("a warning",)


def test_the_bootstrap_is_short_enough_for_a_command_line() -> None:
    assert len(encoded_bootstrap()) < 3000
    assert base64.b64decode(encoded_bootstrap()).decode("utf-16-le") == bootstrap()


def test_a_powershell_that_does_not_answer_is_stopped(program: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"within 0\.5 s"):
        transport(program, "silent").run("", {"Nonce": "n", "Data": ""}, timeout=0.5)
    assert time.monotonic() - began < 10


def test_a_powershell_that_dies_says_why(program: list[str]) -> None:
    with pytest.raises(TransportError, match="ended with 1 and no answer: Zugriff verweigert"):
        transport(program, "dies").run("", {"Nonce": "n", "Data": ""}, timeout=30)


def test_a_powershell_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="cannot be started"):
        LocalTransport([str(tmp_path / "none.exe")]).run("", {}, timeout=1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows may well be a host")
def test_a_computer_that_is_not_windows_is_no_host() -> None:
    with pytest.raises(ToolError, match="not Windows") as caught:
        find_powershell()
    assert caught.value.hint is not None and "hyperv://HOST" in caught.value.hint
