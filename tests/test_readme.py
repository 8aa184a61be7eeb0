"""README is what newcomers try: its examples are run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from imagekit.errors import EXIT_CODES
from imagekit.policy import RULES
from tests.oracles import need_tool

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder with the files that the examples name; the tiny guest stands in for debian.qcow2."""
    from imagekit.launch.tiny_guest import write_tiny_guest

    write_tiny_guest(tmp_path / "tiny.raw")
    subprocess.run(
        [need_tool("qemu-img"), "convert", "-c", "-f", "raw", "-O", "qcow2", "tiny.raw", "debian.qcow2"],
        cwd=tmp_path,
        check=True,
    )
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJxyVoQ1q0OQ8qVjv4KgB6xg4yWbQ3vJb8sBv0mO4mXk me@example"
    (tmp_path / "id_ed25519.pub").write_text(key + "\n")
    (tmp_path / "user-data.yaml").write_text("#cloud-config\n")
    spec = next(block for block in blocks("yaml") if block.startswith("# web1.yaml"))
    (tmp_path / "web1.yaml").write_text(spec)
    (tmp_path / "cache").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "debian.qcow2").write_bytes((tmp_path / "debian.qcow2").read_bytes())
    (tmp_path / "instances" / "web3").mkdir(parents=True)
    return tmp_path


@pytest.mark.oracle
def test_every_command_of_the_readme_succeeds(workshop: Path) -> None:
    need_tool("qemu-system-x86_64")
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 10
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "imagekit"
        done = subprocess.run(
            [sys.executable, "-m", "imagekit", *arguments], cwd=workshop, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), line


@pytest.mark.oracle
def test_the_python_example_runs(workshop: Path) -> None:
    need_tool("qemu-system-x86_64")
    example = next(block for block in blocks("python") if "imagekit.boot" in block)
    done = subprocess.run([sys.executable, "-c", example], cwd=workshop, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "booted" in done.stdout.splitlines()[-1]


@pytest.mark.oracle
def test_the_compute_drivers_example_runs(workshop: Path) -> None:
    example = next(block for block in blocks("python") if "prepare_root" in block)
    done = subprocess.run([sys.executable, "-c", example], cwd=workshop, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(20 << 30), "scsi", "1", "qcow2"]


def test_the_exit_codes_are_those_of_the_program() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \|$", README, re.MULTILINE)
    assert [(int(code), meaning) for code, meaning in rows] == list(EXIT_CODES)


def test_the_rules_named_exist_and_refuse() -> None:
    section = README.split("## What it refuses")[1].split("## ")[0]
    named = {
        code for row in re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for code in re.findall("`([^`]+)`", row)
    }
    assert named == {code for code, rule in RULES.items() if rule.severity.value == "refuse"}
