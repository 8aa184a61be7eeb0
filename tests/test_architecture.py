"""The shape of the code, where a linter does not see it.

Who may import whom is not asked here: import-linter does that, in ``make lint``.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("imagekit", "formats", "cloudinit")

HEAVY = ("dataclasses", "pydantic", "typer", "rich", "yaml", "pycdlib", "qemu", "deflate", "backports", "asyncio")
"""What `import imagekit` must not load: each costs tens of milliseconds that `--version` would pay."""

ONE_SYSTEM_ONLY = frozenset({"fcntl", "grp", "msvcrt", "pty", "pwd", "resource", "termios", "tty", "winreg"})

LONGEST_MODULE = 600


def modules() -> list[Path]:
    """Every module of ours, each once: imagekit/formats and imagekit/cloudinit are links to folders."""
    found = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return sorted(path.relative_to(ROOT) for path in found)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in modules():
        yield path, ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported_unconditionally(tree: ast.Module) -> set[str]:
    """The modules a module names at its top level, outside of any ``if`` or ``try``."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def python(code: str, *, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_the_checks_below_see_every_room() -> None:
    """A folder that moved would make every other test of this file pass on nothing."""
    assert {path.parts[0] for path in modules()} == set(FOLDERS)


def test_importing_imagekit_loads_nothing_heavy() -> None:
    code = f"import imagekit, sys; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = python(code)
    assert (done.stdout.strip(), done.stderr) == ("", "")


@pytest.mark.parametrize("folder", ["formats", "cloudinit"])
def test_a_room_imported_by_its_folder_name_says_how_to_import_it(folder: str) -> None:
    """At the top level the name would shadow, or be shadowed by, somebody else's package."""
    done = python(f"import {folder}")
    assert done.returncode == 1
    assert f"ImportError: this folder installs inside imagekit: import it as imagekit.{folder}" in done.stderr


@pytest.mark.parametrize("folder", ["formats", "cloudinit"])
def test_a_room_has_no_sub_packages(folder: str) -> None:
    """The list of packages in pyproject.toml is explicit: a sub-package would be missing from the wheel."""
    assert [path for path in modules() if path.parts[0] == folder and len(path.parts) > 2] == []


def test_no_module_has_outgrown_its_idea() -> None:
    sizes = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {str(path): lines for path, lines in sizes.items() if lines > LONGEST_MODULE} == {}


def test_every_module_says_what_it_is() -> None:
    assert [str(path) for path, tree in trees() if not ast.get_docstring(tree)] == []


def test_what_one_system_lacks_is_imported_under_a_condition() -> None:
    """mypy's stubs hold fcntl on every platform, so ``--platform win32`` does not see this."""
    found = {str(path): imported_unconditionally(tree) & ONE_SYSTEM_ONLY for path, tree in trees()}
    assert {path: names for path, names in found.items() if names} == {}
