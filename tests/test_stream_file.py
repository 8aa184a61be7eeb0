"""Images from a pipe: the same disk, the same verdict and the same errors as from a file."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imagekit.cli.app import run
from imagekit.errors import Cancelled
from imagekit.progress import Control
from imagekit.remote.arriving import PIECE
from imagekit.remote.stream import StreamFile
from tests.disks import noise
from tests.test_remote import IDENTIFIER, SIZE, image

COMMAND = [sys.executable, "-m", "imagekit"]


def piped(data: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], input=data, capture_output=True)


def feed(data: bytes, *, pause: float = 0.0, step: int = 100_000) -> tuple[int, threading.Thread]:
    """The reading end of a pipe that brings the data."""
    out, into = os.pipe()

    def write() -> None:
        with os.fdopen(into, "wb") as pipe:
            for at in range(0, len(data), step):
                pipe.write(data[at : at + step])
                pipe.flush()
                time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    return out, thread


def test_bytes_are_there_as_soon_as_they_came() -> None:
    out, into = os.pipe()
    with StreamFile(out) as file:
        os.close(out)
        os.write(into, b"first")
        assert file.pread(1, 3) == b"irs"
        assert file.size_so_far == 5
        os.write(into, b" second")
        os.close(into)
        assert (file.size, file.pread(0, 100), file.pread(100, 5)) == (12, b"first second", b"")


def test_all_bytes_arrive_and_zeros_take_no_room() -> None:
    data = noise(PIECE + 77, 1) + bytes(20 * PIECE) + noise(5, 2) + bytes(3)
    out, thread = feed(data, step=1 << 20)
    digest = hashlib.sha256()
    with StreamFile(out) as file:
        os.close(out)
        file.complete(digest)
        assert (file.size, file.pread(0, file.size)) == (len(data), data)
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
        assert file.again().allocated_size < 3 * PIECE
    thread.join()


def test_a_reader_that_waits_for_a_pipe_is_cancelled_soon() -> None:
    out, into = os.pipe()
    cancel = threading.Event()
    with StreamFile(out, control=Control(None, cancel)) as file:
        os.close(out)
        threading.Timer(0.2, cancel.set).start()
        began = time.monotonic()
        with pytest.raises(Cancelled):
            file.pread(0, 1)
        assert time.monotonic() - began < 0.6
    os.close(into)


FORMS: dict[str, Callable[[bytes], bytes]] = {"as it is": bytes, "gzip": gzip.compress, "xz": lzma.compress}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_conversion_from_a_pipe_gives_the_bytes_of_one_from_a_file(
    tmp_path: Path, form: Callable[[bytes], bytes]
) -> None:
    local = tmp_path / "local"
    local.write_bytes(form(image()))
    assert run(["convert", str(local), str(tmp_path / "local.vhdx"), "--id", IDENTIFIER]) == 0
    done = piped(local.read_bytes(), "convert", "-", str(tmp_path / "piped.vhdx"), "--id", IDENTIFIER)
    assert done.returncode == 0, done.stderr
    assert b"through the pipe" in done.stderr
    assert (tmp_path / "piped.vhdx").read_bytes() == (tmp_path / "local.vhdx").read_bytes()


def test_a_packed_image_is_unpacked_before_the_pipe_has_ended(tmp_path: Path) -> None:
    """Of 64 MiB of zeros all but the last bytes can be unpacked when the packed file is not complete yet."""
    from imagekit.progress import Progress
    from imagekit.wrappers import unwrap

    packed = gzip.compress(bytes(64 << 20) + noise(1 << 20))
    out, into = os.pipe()
    os.write(into, packed[:60_000])  # a pipe takes that much
    seen = threading.Event()

    def told(progress: Progress) -> None:
        if progress.phase == "unpack":
            seen.set()

    def end() -> None:
        assert seen.wait(20)
        with os.fdopen(into, "wb") as pipe:
            pipe.write(packed[60_000:])

    thread = threading.Thread(target=end)
    thread.start()
    with StreamFile(out) as file, unwrap.unwrap(file, folder=tmp_path, control=Control(told)) as inside:
        os.close(out)
        assert inside.file.size == 65 << 20
    thread.join()
    assert seen.is_set()


def test_a_file_that_is_redirected_is_read_as_itself(tmp_path: Path) -> None:
    (tmp_path / "image.qcow2").write_bytes(image())
    with (tmp_path / "image.qcow2").open("rb") as redirected:
        done = subprocess.run(
            [*COMMAND, "convert", "-", str(tmp_path / "d.vhd")], stdin=redirected, capture_output=True
        )
    assert done.returncode == 0, done.stderr
    assert b"pipe" not in done.stderr
    assert run(["compare", str(tmp_path / "image.qcow2"), str(tmp_path / "d.vhd")]) == 0


def test_info_check_and_prepare_take_a_pipe(tmp_path: Path) -> None:
    found = piped(image(), "info", "-", "--output", "json")
    assert f'"virtual-size": {SIZE}'.encode() in found.stdout.replace(b"\n", b" ")
    assert piped(image(), "check", "-").returncode == 0
    assert piped(image(), "info", "-", "--confined").returncode == 0
    made = piped(image(), "prepare", "-", "--out", str(tmp_path / "web"), "--name", "web")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "web" / "web.vhd").exists()


BAD = {
    "nothing": (b"", 11),
    "cut": (image()[:-70_000], 11),
    "cut while packed": (gzip.compress(image())[:-9], 11),
    "a backing file": (b"QFI\xfb\0\0\0\3" + (112).to_bytes(8, "big") + (4).to_bytes(4, "big"), 11),
}


@pytest.mark.parametrize(("data", "code"), BAD.values(), ids=BAD)
def test_the_verdict_is_that_on_a_file(no_leftovers: Path, data: bytes, code: int) -> None:
    done = piped(data, "convert", "-", str(no_leftovers / "disk.vhdx"))
    assert done.returncode == code, done.stderr


def test_a_checksum_counts_for_a_pipe(no_leftovers: Path, tmp_path: Path) -> None:
    right = hashlib.sha256(image()).hexdigest()
    wrong = hashlib.sha256(b"other").hexdigest()
    target = str(no_leftovers / "disk.vhdx")
    assert piped(image(), "convert", "-", target, "--checksum", f"sha256:{wrong}").returncode == 15
    good = piped(image(), "convert", "-", str(tmp_path / "good.vhdx"), "--checksum", f"sha256:{right}")
    assert good.returncode == 0, good.stderr


def test_limits_hold_for_a_pipe(no_leftovers: Path) -> None:
    done = piped(image(), "convert", "-", str(no_leftovers / "disk.vhdx"), "--limit-virtual-size", "1M")
    assert done.returncode == 13
