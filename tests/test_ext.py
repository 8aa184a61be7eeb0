"""Our reader of ext file systems against debugfs, on file systems that mke2fs made."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imagekit.contents.ext import Ext, ExtError
from imagekit.sources import Reading, open_source
from tests.ext_disks import LENGTH, UUID, make_ext
from tests.oracles import need_tool

KINDS = {
    "ext4": ("ext4",),
    "ext4-1k": ("ext4", "-b", "1024"),
    "ext4-32bit": ("ext4", "-O", "^64bit,^metadata_csum"),
    "ext3": ("ext3",),
    "ext2": ("ext2", "-b", "1024", "-I", "128"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / "etc").mkdir()
    (root / "etc" / "fstab").write_text("LABEL=root / ext4 defaults 0 1\n")
    (root / "many").mkdir()
    for number in range(700):
        (root / "many" / f"a rather long name of a file {number:04}").write_bytes(b"%d" % number)
    (root / "large").write_bytes(os.urandom(5_000_001))
    with (root / "holes").open("wb") as file:
        for place in (0, 3_000_000, 700_000):
            file.seek(place)
            file.write(b"x" * 5000)
    (root / "link").symlink_to("/etc/fstab")
    (root / "etc" / "up").symlink_to("../many/../large")
    (root / "long").symlink_to("./" * 60 + "large")
    (root / "loop").symlink_to("loop")
    return root


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_files_links_and_folders_are_as_debugfs_has_them(tree: Path, tmp_path: Path, kind: str) -> None:
    disk = make_ext(tree, tmp_path / "disk.raw", *KINDS[kind][1:], kind=KINDS[kind][0])
    debugfs = need_tool("debugfs")
    with open_source(disk, Reading(declared="raw")) as source:
        ext = Ext(source.image, 0, LENGTH)
        assert (str(ext.uuid), ext.label) == (UUID, "root")
        for name in ("etc/fstab", "large", "holes", "many/a rather long name of a file 0699"):
            told = subprocess.run([debugfs, "-R", f'cat "/{name}"', str(disk)], capture_output=True, check=True)
            assert ext.read(f"/{name}", LENGTH) == told.stdout == (tree / name).read_bytes()
        assert ext.names("/many") == sorted(path.name for path in (tree / "many").iterdir())
        assert ext.read("/link", 100) == (tree / "etc" / "fstab").read_bytes()
        assert ext.read("/etc/up", LENGTH) == ext.read("/long", LENGTH) == (tree / "large").read_bytes()
        assert ext.find("/none") is None
        assert ext.find("/etc/fstab/more") is None
        with pytest.raises(ExtError, match="links"):
            ext.find("/loop")
        with pytest.raises(ExtError, match="more than 100"):
            ext.read("/large", 100)


def test_what_is_no_ext_file_system_is_said(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with open_source(disk, Reading(declared="raw")) as source, pytest.raises(ExtError, match="no ext"):
        Ext(source.image, 0, 1 << 20)


@pytest.mark.oracle
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_ends_in_its_error_and_soon(small: bytes, tmp_path: Path, data: st.DataObject) -> None:
    disk = bytearray(small)
    places = st.one_of(st.integers(1024, 16384), st.integers(0, 4 << 20))
    for _ in range(data.draw(st.integers(1, 20))):
        at = data.draw(places)
        disk[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path = tmp_path / "damaged.raw"
    path.write_bytes(disk)
    with open_source(path, Reading(declared="raw")) as source:
        try:
            ext = Ext(source.image, 0, len(disk))
            for name in ("/etc/fstab", "/link", "/many/x"):
                ext.read(name, 1 << 20)
        except ExtError as error:
            assert str(error)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    (folder / "tree" / "etc").mkdir(parents=True)
    (folder / "tree" / "etc" / "fstab").write_text("a\n" * 3000)
    (folder / "tree" / "link").symlink_to("/etc/fstab")
    return make_ext(folder / "tree", folder / "disk.raw").read_bytes()[: 8 << 20]
