"""What every test gets: none of the caller's settings, a real file system, steady hypothesis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Other machines are slower than the deadline of a property; CI must fail twice on the same input.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "developer")

_TESTS_OWN = {"IMAGEKIT_SAMPLES", "IMAGEKIT_NO_APT"}
_CHANGES_OUTPUT = {"SOURCE_DATE_EPOCH", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES"}


def pytest_configure(config: pytest.Config) -> None:
    """Keep temporary images off a /tmp that is memory."""
    if "TMPDIR" not in os.environ and _is_memory(tempfile.gettempdir()) and Path("/var/tmp").is_dir():
        os.environ["TMPDIR"] = tempfile.tempdir = "/var/tmp"


def _is_memory(folder: str) -> bool:
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(fields[1:3] == [folder, "tmpfs"] for fields in map(str.split, mounts))


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_caller() -> Iterator[None]:
    """Neither IMAGEKIT_… options nor what changes times and colours reach a test from outside."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in _CHANGES_OUTPUT or (name.startswith("IMAGEKIT_") and name not in _TESTS_OWN):
                patch.delenv(name)
        yield


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for targets that must not come to be: the test fails if anything is left in it."""
    folder = tmp_path / "no-leftovers"
    folder.mkdir()
    yield folder
    assert sorted(folder.iterdir()) == []
