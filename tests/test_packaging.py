"""What gets installed: wheel and sdist, built from a copy of the repository, hold all of it and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import imagekit

ROOT = Path(__file__).parents[1]
DIST = f"imagekit-{imagekit.__version__}"
INSTALLED_AS = {"imagekit": "imagekit", "formats": "imagekit/formats", "cloudinit": "imagekit/cloudinit"}
SHIPPED_AS_SOURCE = ("imagekit", "formats", "cloudinit", "tests", "fixtures", "scripts", "requirements")


def repository_files() -> list[str]:
    """What is committed, or would be: a new module counts before its commit."""
    git = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    options = ["--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run([*git, *options], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: nothing to compare with")
    names = sorted(set(done.stdout.split("\0")) - {""})
    return [name for name in names if os.path.lexists(ROOT / name)]


@pytest.fixture(scope="module")
def files() -> list[str]:
    return repository_files()


@pytest.fixture(scope="module")
def dist(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and the wheel, the wheel built from the unpacked sdist as pip would."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in files:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    # In the copy: a folder build/ in the checkout, as `pip install .` leaves it, would be taken for the program.
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    if "No module named build" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("the package build is not installed: pip install -r requirements/dev.txt")
    if done.returncode != 0:
        pytest.fail(f"python -m build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}", pytrace=False)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: Path, files: list[str]) -> None:
    """Among them data files and py.typed; at the top lies imagekit alone, neither formats nor cloudinit."""
    expected = set()
    for name in files:
        folder, _, inside = name.partition("/")
        if folder in INSTALLED_AS and not (ROOT / name).is_symlink():
            expected.add(f"{INSTALLED_AS[folder]}/{inside}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.startswith(f"{DIST}.dist-info/")}
    assert found == expected


def test_the_wheel_carries_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert f"{DIST}.dist-info/licenses/LICENSE" in archive.namelist()
        commands = archive.read(f"{DIST}.dist-info/entry_points.txt").decode()
    assert "imagekit = imagekit.cli:program" in commands
    assert "imagekit = imagekit.glance_plugin:get_flow" in commands.partition("[glance.image_import.plugins]")[2]


def test_the_sdist_holds_the_sources_with_tests_and_fixtures(dist: Path, files: list[str]) -> None:
    expected = {
        f"{DIST}/{name}"
        for name in files
        if name.split("/")[0] in SHIPPED_AS_SOURCE and not (ROOT / name).is_symlink()
    }
    with tarfile.open(dist / f"{DIST}.tar.gz") as archive:
        missing = expected - set(archive.getnames())
    assert missing == set()


def test_an_installed_wheel_leaves_the_names_formats_and_cloudinit_to_others(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, str(wheel)], check=True)
    code = (
        "import importlib.util as util, imagekit, imagekit.formats, imagekit.cloudinit\n"
        "print(imagekit.cloudinit.__file__)\n"
        "print(util.find_spec('formats'), util.find_spec('cloudinit'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(site / "imagekit/cloudinit/__init__.py"), "None None"]
