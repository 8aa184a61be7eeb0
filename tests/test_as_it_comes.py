"""A source that still arrives is copied meanwhile: the same target, sooner, and nothing that the limits forbid."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest

from imagekit.conversion import convert_image
from imagekit.errors import SourceError, TargetError, UnsafeImage
from imagekit.formats.base import MiB, WriterOptions
from imagekit.formats.files import MemoryFile
from imagekit.formats.raw import RawImage
from imagekit.limits import Limits
from imagekit.plan import ConvertOptions, FoundBlocks, draft_plan
from imagekit.progress import Control, Progress
from imagekit.remote.arriving import PIECE, Arriving, Digest
from imagekit.remote.file import BURST, RemoteFile, _Bursts
from tests.disks import noise
from tests.folders import small
from tests.web import serve

IDENTIFIER = uuid.UUID(int=2010)
SIZE = 24 * MiB
GUEST = (
    b"".join(noise(MiB, at) if at % 5 in (0, 3) else bytes(MiB) for at in range(23))
    + noise(MiB - 4096, 99)
    + bytes(4096)
)


class Held(Arriving):
    """A local file, one piece of which is not there before somebody lets it come."""

    missing = range(SIZE - 4 * MiB, SIZE - 4 * MiB + PIECE)

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDONLY), str(path))
        self.come = threading.Event()
        self.waited = False

    def __enter__(self) -> Held:
        return self

    def need(self, offset: int, length: int) -> None:
        if offset < self.missing.stop and offset + length > self.missing.start and not self.come.is_set():
            self.waited = True
            if not self.come.wait(30):
                raise SourceError("the rest never came", path=self.name)

    def complete(self, *digests: Digest, control: Control | None = None) -> None:
        self.need(0, self.size)

    @property
    def all_here(self) -> bool:
        return self.come.is_set()

    def here_from(self, offset: int) -> int:
        return self.size if self.all_here or offset >= self.missing.stop else self.missing.start


def options(**more: object) -> ConvertOptions:
    return ConvertOptions(identifier=IDENTIFIER, sync=False, jobs=2, **more)  # type: ignore[arg-type]


def stored(folder: Path, kind: str) -> Path:
    """The guest's disk in a file of that format."""
    raw = folder / "guest.raw"
    raw.write_bytes(GUEST)
    if kind == "raw":
        return raw
    made = folder / f"guest.{kind.split()[0]}"
    compression = "zlib" if kind.endswith("zlib") else None
    convert_image(raw, made, options(compression=compression))
    return made


@pytest.mark.parametrize("target", ["vhd", "vhdx", "raw", "qcow2"])
@pytest.mark.parametrize("kind", ["raw", "qcow2", "qcow2 zlib", "vhdx"])
def test_the_target_is_that_of_a_local_source(tmp_path: Path, kind: str, target: str) -> None:
    source = stored(tmp_path, kind)
    asked = options(verify="content", source_format=kind.split()[0])
    expected = convert_image(source, tmp_path / f"local.{target}", asked)
    with serve(source.read_bytes()) as site:
        report = convert_image(site.url, tmp_path / f"remote.{target}", asked)
    assert (tmp_path / f"remote.{target}").read_bytes() == (tmp_path / f"local.{target}").read_bytes()
    assert (report.data_bytes, report.target_size) == (expected.data_bytes, expected.target_size)


def test_what_is_encoded_is_planned_first(tmp_path: Path) -> None:
    source = stored(tmp_path, "raw")
    asked = options(compression="zlib", source_format="raw")
    convert_image(source, tmp_path / "local.qcow2", asked)
    with serve(source.read_bytes()) as site:
        convert_image(site.url, tmp_path / "remote.qcow2", asked)
    assert (tmp_path / "remote.qcow2").read_bytes() == (tmp_path / "local.qcow2").read_bytes()


def test_a_draft_whose_blocks_were_not_all_found_is_no_plan() -> None:
    image = RawImage(MemoryFile(GUEST), SIZE)
    draft = draft_plan(image, "raw", "vhd", WriterOptions(IDENTIFIER), SIZE)
    found = FoundBlocks(image, draft, Limits(), Control())
    next(iter(found))
    with pytest.raises(RuntimeError, match="not all found"):
        found.plan()


def test_bytes_that_come_one_by_one_take_one_write(tmp_path: Path) -> None:
    written: list[tuple[int, bytes]] = []
    bursts = _Bursts(PIECE, PIECE + BURST + 3, lambda at, data: written.append((at, bytes(data))))
    content = noise(BURST + 3)
    for byte in range(len(content)):
        bursts.add(content[byte : byte + 1])
    assert written == [(PIECE, content[:BURST]), (PIECE + BURST, content[BURST:])]


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_copying_begins_before_the_last_bytes_arrive(tmp_path: Path, subformat: str) -> None:
    raw = stored(tmp_path, "raw")
    convert_image(raw, tmp_path / "local.vhd", options(subformat=subformat))
    told: list[Progress] = []
    with Held(raw) as file:

        def tell(progress: Progress) -> None:
            told.append(progress)
            if progress.phase == "copy" and progress.done >= 8 * MiB:
                file.come.set()

        convert_image(
            file, tmp_path / "held.vhd", options(subformat=subformat, confined=False), control=Control(tell)
        )
        assert file.waited
    assert (tmp_path / "held.vhd").read_bytes() == (tmp_path / "local.vhd").read_bytes()
    copies = [one for one in told if one.phase == "copy"]
    assert [one.done for one in copies] == sorted(one.done for one in copies)
    assert (copies[-1].done, copies[-1].total) == (SIZE, SIZE)
    assert not any(one.phase == "plan" for one in told)


def test_a_dry_run_waits_for_all_of_it(tmp_path: Path) -> None:
    raw = stored(tmp_path, "raw")
    expected = convert_image(raw, tmp_path / "local.vhd", options(dry_run=True))
    with Held(raw) as file:
        file.come.set()
        report = convert_image(file, tmp_path / "held.vhd", options(dry_run=True, confined=False))
    assert report.target_size == expected.target_size
    assert not (tmp_path / "held.vhd").exists()


@pytest.mark.parametrize("confined", [False, True])
def test_more_output_than_is_allowed_is_refused_on_the_way(tmp_path: Path, confined: bool) -> None:
    with serve(GUEST) as site, pytest.raises(UnsafeImage) as caught:
        limits = Limits(output_bytes=4 * MiB)
        convert_image(site.url, tmp_path / "disk.vhd", options(limits=limits, confined=confined, source_format="raw"))
    assert caught.value.rule == "limit-output-bytes"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("room", [14 * MiB, 30 * MiB])
def test_a_disk_that_is_full_on_the_way_is_said_and_left_empty(tmp_path: Path, room: int, confined: bool) -> None:
    """The target shares the room with what comes: less than both take, or than what comes alone.

    Where all of it is here before the plan is made, the plan says so.
    """
    with small(tmp_path, room), serve(GUEST) as site:
        with pytest.raises(TargetError, match=r"cannot be written: No space left|no space:") as caught:
            convert_image(site.url, tmp_path / "disk.raw", options(confined=confined, source_format="raw"))
        assert caught.value.hint and "room" in caught.value.hint
        assert list(tmp_path.iterdir()) == []
        assert shutil.disk_usage(tmp_path).free > room - MiB


def test_more_runs_than_fit_into_memory_are_refused_on_the_way(tmp_path: Path) -> None:
    raw = stored(tmp_path, "raw")
    limits = Limits(metadata_memory=256)
    with Held(raw) as file, pytest.raises(UnsafeImage) as caught:
        file.missing = range(0)
        convert_image(file, tmp_path / "disk.vhd", options(limits=limits, confined=False, source_format="raw"))
    assert caught.value.rule == "limit-metadata-memory"
    assert not (tmp_path / "disk.vhd").exists()


def test_a_part_that_is_wanted_comes_and_no_more(tmp_path: Path) -> None:
    content = noise(9 * PIECE, 5)
    with serve(content) as site, RemoteFile.open(site.url, folder=tmp_path) as file:
        file.want(3 * PIECE)
        deadline = time.monotonic() + 30
        while file.here_from(0) < 3 * PIECE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (file.here_from(0), file.fetched) == (3 * PIECE, 3 * PIECE)
        file.want(PIECE)
        assert file.pread(0, 3 * PIECE) == content[: 3 * PIECE]
        assert file.fetched == 3 * PIECE


def test_what_will_be_read_is_fetched_while_nobody_waits(tmp_path: Path) -> None:
    content = noise(5 * PIECE + 777, 4)
    with serve(content) as site, RemoteFile.open(site.url, folder=tmp_path) as file:
        file.want_all()
        deadline = threading.Event()
        for _ in range(1000):
            if file.all_here:
                break
            deadline.wait(0.01)
        assert file.all_here
        assert file.pread_here(0, len(content)) == content


def test_what_comes_is_written_in_aligned_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []
    store = RemoteFile._store

    def noted(self: RemoteFile, at: int, data: bytearray) -> None:
        store(self, at, data)
        written.append((at, len(data)))

    monkeypatch.setattr(RemoteFile, "_store", noted)
    content = noise(3 * PIECE + 4321, 5)
    with serve(content) as site, RemoteFile.open(site.url, folder=tmp_path) as file:
        assert file.pread(0, file.size) == content
    assert sum(length for _, length in written) == len(content)
    assert all(at % BURST == 0 for at, _ in written)
    assert all(length == BURST or at + length == len(content) for at, length in written)
