"""Against the packers people use: what they pack is unpacked to the same bytes, sparse or not."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from imagekit.errors import UnsupportedFeature
from imagekit.formats.files import LocalFile
from imagekit.wrappers.unwrap import unwrap
from tests.disks import md5, noise, text
from tests.oracles import need_tool

pytestmark = pytest.mark.oracle

KiB, MiB = 1 << 10, 1 << 20
SIZE = 10 * MiB
PIECES = [
    (0, noise(700)),
    *((MiB + n * 64 * KiB, text(4096, n)) for n in range(60)),
    (SIZE - 3 * MiB, noise(256 * KiB)),
]
"""Data at the start, in more pieces than one block of a sparse map holds, and a hole at the end."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "disk.raw"
    with path.open("wb") as out:
        for offset, data in PIECES:
            out.seek(offset)
            out.write(data)
        out.truncate(SIZE)
    return path


def run(command: str, folder: Path) -> None:
    """A command line with the first word looked up, in the folder of the disk."""
    program, *arguments = shlex.split(command)
    subprocess.run([need_tool(program), *arguments], cwd=folder, check=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("command", "packed", "chain"),
    [
        ("gzip -kf disk.raw", "disk.raw.gz", "gzip"),
        ("xz -kf -0 disk.raw", "disk.raw.xz", "xz"),
        ("xz -kf -0 --check=none --block-size=1MiB disk.raw", "disk.raw.xz", "xz"),
        ("xz -kf -T2 -6 --block-size=2MiB disk.raw", "disk.raw.xz", "xz"),
        ("bzip2 -kf -1 disk.raw", "disk.raw.bz2", "bzip2"),
        ("zstd -qkf disk.raw", "disk.raw.zst", "zstd"),
        ("zstd -qkf --ultra -22 disk.raw", "disk.raw.zst", "zstd"),
        ("zstd -qkf -T2 --long=27 disk.raw", "disk.raw.zst", "zstd"),
        ("zstd -qkf --format=gzip disk.raw", "disk.raw.gz", "gzip"),
        ("zip -q out.zip disk.raw", "out.zip", "zip"),
        ("zip -q -0 out.zip disk.raw", "out.zip", "zip"),
        ("zip -q -fz out.zip disk.raw", "out.zip", "zip"),
        ("7z a -bso0 -mx=1 -tzip out.zip disk.raw", "out.zip", "zip"),
        ("7z a -bso0 -mx=1 -tgzip out.gz disk.raw", "out.gz", "gzip"),
        ("7z a -bso0 -mx=1 -tbzip2 out.bz2 disk.raw", "out.bz2", "bzip2"),
        ("7z a -bso0 -mx=1 -txz out.xz disk.raw", "out.xz", "xz"),
        ("7z a -bso0 -ttar out.tar disk.raw", "out.tar", "tar"),
        ("tar -cf out.tar disk.raw", "out.tar", "tar"),
        ("tar --format=ustar -cf out.tar ./disk.raw", "out.tar", "tar"),
        ("tar --format=oldgnu -Sczf out.tar.gz disk.raw", "out.tar.gz", "gzip tar"),
        ("tar --format=posix -Scf out.tar disk.raw", "out.tar", "tar"),
        ("tar --format=posix -SJcf out.tar.xz disk.raw", "out.tar.xz", "xz tar"),
        ("bsdtar -cf out.tar disk.raw", "out.tar", "tar"),
        ("bsdtar --format=gnutar -cf out.tar disk.raw", "out.tar", "tar"),
        ("bsdtar --zstd -cf out.tar.zst disk.raw", "out.tar.zst", "zstd tar"),
        ("bsdtar --format=zip -cf out.zip disk.raw", "out.zip", "zip"),
    ],
)
def test_what_it_packs_comes_out(command: str, packed: str, chain: str, disk: Path) -> None:
    path = disk.with_name(packed)
    path.unlink(missing_ok=True)
    try:
        run(command, disk.parent)
        with LocalFile.open_source(path) as file, unwrap(file, folder=disk.parent) as inner:
            assert inner.chain == tuple(chain.split())
            assert md5(inner.file.pread(0, inner.file.size)) == md5(disk.read_bytes())
            assert inner.file.allocated_size <= sum(len(data) for _, data in PIECES) + 300 * KiB
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("form", ["oldgnu", "posix"])
def test_a_sparse_disk_stays_sparse_in_the_archive(form: str, disk: Path) -> None:
    """So that the tests above are about sparse members at all."""
    path = disk.with_name("sparse.tar")
    run(f"tar --format={form} -Scf sparse.tar disk.raw", disk.parent)
    assert path.stat().st_size < SIZE // 2
    with LocalFile.open_source(disk) as file:
        assert file.allocated_size < SIZE // 2
    path.unlink()


def test_an_encrypted_zip_is_named(disk: Path) -> None:
    path = disk.with_name("secret.zip")
    run("zip -q -P password secret.zip disk.raw", disk.parent)
    with LocalFile.open_source(path) as file, pytest.raises(UnsupportedFeature, match="is encrypted"):
        unwrap(file)
