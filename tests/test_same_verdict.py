"""One verdict for one image: by its path, open already, from an address, packed, confined, and however it is read.

And for every length that it can be cut to: what begins like a format is that format or refused, and never raw.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imagekit
from fixtures.hostile import Hostile, corpus
from imagekit.errors import ImagekitError, UnsafeImage
from imagekit.formats import files
from imagekit.formats.base import KiB, MiB
from imagekit.formats.files import LocalFile
from imagekit.remote.stream import StreamFile
from imagekit.sources import Reading, open_source
from tests.disks import noise
from tests.fuzz.seeds import seeds
from tests.web import serve

SMALL = {
    name: one
    for name, one in corpus().items()
    if not one.heavy and one.limit is None and one.allow is None and one.made().size <= MiB
}
PACKED = (".gz", ".xz", ".zip", ".tar", ".ova")
BARE = {name: one for name, one in SMALL.items() if name[0] not in "wn" and not one.suffix.endswith(PACKED)}
"""Neither packed already nor judged by their names."""

ONE_OF_EACH = {(one.suffix, one.verdict, min(one.codes), one.rule): one for one in BARE.values()}
CHUNKS = (1, 7, 512, 4 * KiB, 64 * KiB)

Verdict = tuple[str, ...]


def verdict(source: str | Path | LocalFile) -> Verdict:
    """What became of it: opened as what, or refused by what. All tables are looked at."""
    try:
        with open_source(source, Reading(deep=True)) as opened:
            for _ in opened.image.extents():
                pass
            return "read", opened.format, str(opened.image.virtual_size)
    except UnsafeImage as error:
        return "refused", error.rule or ""
    except ImagekitError as error:
        return "refused", type(error).__name__


def piped(data: bytes, step: int = 64 * KiB) -> LocalFile:
    """The bytes as they come from another program, so many at a time."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            for at in range(0, len(data), step):
                pipe.write(data[at : at + step])

    threading.Thread(target=write).start()
    file = StreamFile(reading)
    os.close(reading)
    return file


def written(entry: Hostile, folder: Path) -> Path:
    return entry.made().write(folder / f"{entry.name}{entry.suffix}")


# --- however it is read ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_pieces() -> Iterator[Callable[[int], None]]:
    """Reads give at most so many bytes, as those of network file systems and pipes may."""
    most, whole, parts = [0], files._pread, files._pread_into

    def pread(fd: int, offset: int, length: int) -> bytes:
        return whole(fd, offset, min(length, most[0] or length))

    def pread_into(fd: int, offset: int, buffer: memoryview) -> int:
        return parts(fd, offset, buffer[: most[0] or len(buffer)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_pread", pread)
        patch.setattr(files, "_pread_into", pread_into)
        yield lambda size: most.__setitem__(0, size)


@given(entry=st.sampled_from(list(BARE.values())), chunk=st.sampled_from(CHUNKS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_does_not_depend_on_how_much_a_read_gives(
    in_pieces: Callable[[int], None], tmp_path: Path, entry: Hostile, chunk: int
) -> None:
    path = written(entry, tmp_path)
    in_pieces(0)
    expected = verdict(path)
    in_pieces(chunk)
    try:
        assert verdict(path) == expected
    finally:
        in_pieces(0)


@given(entry=st.sampled_from(list(BARE.values())))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_does_not_depend_on_how_the_image_comes(tmp_path: Path, entry: Hostile) -> None:
    assert_same_by_every_way(entry, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("entry", BARE.values(), ids=BARE)
def test_it_does_not_depend_on_how_any_image_comes(tmp_path: Path, entry: Hostile) -> None:
    assert_same_by_every_way(entry, tmp_path)


def assert_same_by_every_way(entry: Hostile, folder: Path) -> None:
    path = written(entry, folder)
    expected = verdict(path)
    assert verdict(LocalFile.open_source(path)) == expected
    packed = folder / f"{path.name}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    assert verdict(packed) == expected, "packed with gzip"
    if expected[1] != "name-mismatch":  # a pipe promises nothing
        assert verdict(piped(path.read_bytes())) == expected, "through a pipe"
    for ranges in (True, False):
        with serve(path.read_bytes()) as site:
            site.ranges = ranges
            address = f"{site.url.rpartition('/')[0]}/{path.name}"
            assert verdict(address) == expected, f"over HTTP, ranges: {ranges}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is confined")
@pytest.mark.parametrize("entry", ONE_OF_EACH.values(), ids=[one.name for one in ONE_OF_EACH.values()])
def test_it_does_not_depend_on_whether_it_is_confined(tmp_path: Path, entry: Hostile) -> None:
    path = written(entry, tmp_path)
    became = list[tuple[str | bytes | None, ...]]()
    for confined in (False, True):
        try:
            imagekit.convert(path, tmp_path / f"{confined}.raw", confined=confined, sync=False)
            became.append(("read", (tmp_path / f"{confined}.raw").read_bytes()))
        except UnsafeImage as error:
            became.append(("refused", error.rule, str(error)))
        except ImagekitError as error:
            became.append(("refused", type(error).__name__, str(error)))
    assert became[0] == became[1]


@given(entry=st.sampled_from(list(BARE.values())), step=st.sampled_from((512, 1000, 4 * KiB, 64 * KiB)))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_does_not_depend_on_how_a_pipe_is_filled(tmp_path: Path, entry: Hostile, step: int) -> None:
    path = written(entry, tmp_path)
    expected = verdict(path)
    if expected[1] != "name-mismatch":
        assert verdict(piped(path.read_bytes(), step)) == expected


def test_a_pipe_with_a_name_is_no_image(tmp_path: Path) -> None:
    """It cannot be read twice, and is nobody's standard input."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFO")
    os.mkfifo(tmp_path / "disk.qcow2")
    assert verdict(tmp_path / "disk.qcow2") == ("refused", "SourceError")


# --- cut anywhere ----------------------------------------------------------------------------------------------

WHOLE_MAGIC = {"qcow2": 4, "vhd": 8, "vhdx": 8, "vmdk": 4, "vdi": 24}
"""Bytes after which an image is known as one."""

CUT = {seed.name: seed.data for seed in seeds()}


def _lengths(data: bytes, magic: int) -> Iterator[int]:
    """Every length of a header, then steps that no structure has for its size."""
    yield from range(magic, min(len(data), 600))
    yield from range(600, len(data), max(97, len(data) // 150))
    yield from range(len(data) - 3, len(data))


def _format(data: bytes) -> str | None:
    heads = {
        b"QFI\xfb": "qcow2",
        b"conectix": "vhd",
        b"vhdxfile": "vhdx",
        b"KDMV": "vmdk",
        b"COWD": "vmdk",
        b"<<< ": "vdi",
    }
    return next((name for head, name in heads.items() if data.startswith(head)), None)


@pytest.mark.parametrize("name", [name for name, data in CUT.items() if _format(data)])
def test_what_begins_like_an_image_is_never_raw_however_short_it_is(name: str, tmp_path: Path) -> None:
    data, path, seen = CUT[name], tmp_path / "image", set[str]()
    expected = _format(data)
    assert expected is not None
    path.write_bytes(data)
    for length in sorted(set(_lengths(data, WHOLE_MAGIC[expected])), reverse=True):
        os.truncate(path, length)
        became = verdict(path)
        assert became[0] == "refused" or became[1] == expected, f"{length} bytes: {became}"
        seen.add(became[0])
    assert "refused" in seen


def _zipped(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disk.qcow2", data)
    return out.getvalue()


def _tarred(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        member = tarfile.TarInfo("disk.qcow2")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": partial(gzip.compress, mtime=0),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zip": _zipped,
    "tar": _tarred,
}


@pytest.mark.parametrize("packer", PACKERS)
def test_what_is_packed_and_cut_short_is_never_raw(packer: str, tmp_path: Path) -> None:
    """A tar may lose its end, which is only zeros: then it is read as what it holds."""
    path, data = tmp_path / "image", PACKERS[packer](CUT["s_qcow2_zlib"] + noise(3000))
    path.write_bytes(data)
    assert verdict(path)[:2] == ("read", "qcow2")
    for length in sorted({*range(262, 700, 5), *range(700, len(data), max(97, len(data) // 60))}, reverse=True):
        os.truncate(path, length)
        became = verdict(path)
        assert became[0] == "refused" or (packer == "tar" and became[1] == "qcow2"), f"{length} bytes: {became}"
