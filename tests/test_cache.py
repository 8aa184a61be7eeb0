"""The image cache: one conversion an image, whole images only, and nothing removed that somebody needs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import imagekit
from imagekit.cache import Entry, ImageCache, Target
from imagekit.errors import SourceError, UnsafeImage, UsageError, VerificationFailed
from imagekit.formats.base import MiB
from imagekit.formats.files import LocalFile
from imagekit.locks import held
from tests.disks import noise
from tests.here import Here

IMAGE = "0b2a7b1e-6c1e-4f39-9f4c-4d6f2f3a1f00"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(noise(3 * MiB) + bytes(5 * MiB))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    return path


def names(folder: Path) -> list[str]:
    """What lies there besides locks."""
    return sorted(one.name for one in folder.iterdir() if not one.name.endswith(".lock"))


def test_an_image_is_converted_once_and_found_again(raw: Path, folder: Path) -> None:
    child = Here()
    cache = ImageCache(folder, child=child)
    first = cache.get(IMAGE, raw)
    second = cache.get(IMAGE, raw)
    assert child.tasks == ["convert"]
    assert (first.made, second.made) == (True, False)
    assert (first.path, first.virtual_size, second.hits) == (second.path, 8 * MiB, 1)
    assert imagekit.compare(raw, first.path).same
    assert names(folder) == [first.path.name, f"{first.path.name}.json"]


def test_another_digest_or_target_is_another_entry(raw: Path, folder: Path) -> None:
    cache = ImageCache(folder, child=Here())
    digest = f"sha256:{hashlib.sha256(raw.read_bytes()).hexdigest()}"
    found = {
        cache.get(IMAGE, raw).path,
        cache.get(IMAGE, raw, digest=digest).path,
        cache.get(IMAGE, raw, target=Target("vhd")).path,
        cache.get(IMAGE, raw, target=Target("vhdx", block_size=2 * MiB)).path,
    }
    assert len(found) == 4


def test_an_image_is_fetched_only_when_it_is_needed_and_its_download_goes(raw: Path, folder: Path) -> None:
    fetched: list[Path] = []

    def fetch(path: Path) -> None:
        fetched.append(path)
        path.write_bytes(raw.read_bytes())

    cache = ImageCache(folder, child=Here())
    entry = cache.get(IMAGE, fetch)
    cache.get(IMAGE, fetch)
    assert len(fetched) == 1
    assert not fetched[0].exists()
    assert imagekit.compare(raw, entry.path).same


def test_a_wrong_digest_adds_nothing(raw: Path, folder: Path) -> None:
    with pytest.raises(VerificationFailed, match="was expected"):
        ImageCache(folder, child=Here()).get(IMAGE, raw, digest="sha256:" + "0" * 64)
    assert names(folder) == []


def test_a_refused_image_adds_nothing(tmp_path: Path, folder: Path) -> None:
    evil = tmp_path / "evil.vhd"
    evil.write_bytes(bytes(MiB))
    with pytest.raises(UnsafeImage):
        ImageCache(folder, child=Here()).get(IMAGE, evil)
    with pytest.raises(SourceError):
        ImageCache(folder, child=Here()).get(IMAGE, tmp_path / "nothing")
    assert names(folder) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 200, "a\nb"])
def test_an_id_that_is_no_name_is_refused(raw: Path, folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="image's id"):
        ImageCache(folder, child=Here()).get(name, raw)


def test_a_killed_download_is_removed_by_the_next(raw: Path, folder: Path) -> None:
    cache = ImageCache(folder, child=Here())
    entry = cache.get(IMAGE, raw)
    entry.path.unlink()
    left = folder / f".{entry.path.name}.0123abcd.download"
    left.write_bytes(b"half")
    other = folder / f".{entry.path.name}x.0123abcd.download"
    other.write_bytes(b"another image's")
    cache.get(IMAGE, raw)
    assert not left.exists()
    assert other.exists()


def test_an_entry_without_its_notes_is_read_from_itself(raw: Path, folder: Path) -> None:
    """As a crash between the two leaves it, or compute-hyperv makes it."""
    cache = ImageCache(folder, child=Here())
    entry = cache.get(IMAGE, raw)
    (folder / f"{entry.path.name}.json").write_text("{not json")
    again = cache.get(IMAGE, raw)
    assert (again.made, again.virtual_size) == (False, 8 * MiB)


@pytest.mark.parametrize("kind", ["vhd", "vhdx"])
def test_a_resized_copy_is_made_once_and_reads_the_same(raw: Path, folder: Path, kind: Any) -> None:
    child = Here()
    cache = ImageCache(folder, child=child)
    entry = cache.get(IMAGE, raw, target=Target(kind))
    first = cache.resized(entry, 16 * MiB)
    second = cache.resized(entry, 16 * MiB)
    assert child.tasks == ["convert", "convert"]
    assert first.path == second.path != entry.path
    assert first.virtual_size == 16 * MiB
    assert imagekit.compare(raw, first.path).same
    assert cache.resized(entry, entry.virtual_size).path == entry.path
    with pytest.raises(UsageError, match="cut it off"):
        cache.resized(entry, MiB)


def test_threads_that_ask_at_once_share_one_conversion(raw: Path, folder: Path) -> None:
    child = Here()
    cache = ImageCache(folder, child=child)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: cache.get(IMAGE, raw), range(12)))
    assert child.tasks == ["convert"]
    assert len({entry.path for entry in found}) == 1
    assert sorted(entry.hits for entry in found) == list(range(12))


_ASK = """
import sys
from pathlib import Path
from imagekit.cache import ImageCache
folder, source, image = sys.argv[1:]
def fetch(path):
    with open(Path(folder).parent / "fetched", "ab") as log:
        log.write(b"1")
    path.write_bytes(Path(source).read_bytes())
entry = ImageCache(folder).get(image, fetch)
print(entry.path, entry.virtual_size)
"""


def asking(folder: Path, raw: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _ASK, str(folder), str(raw), IMAGE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_processes_that_ask_at_once_share_one_conversion(raw: Path, folder: Path, tmp_path: Path) -> None:
    processes = [asking(folder, raw) for _ in range(4)]
    said = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(said) == 1
    assert (tmp_path / "fetched").read_bytes() == b"1"


@pytest.mark.slow
def test_whoever_is_killed_whenever_the_rest_gets_a_whole_image(raw: Path, folder: Path, tmp_path: Path) -> None:
    """8 rounds: four ask, one is killed at a random moment, the others must all get the image."""
    chance = random.Random(8)
    for _ in range(8):
        processes = [asking(folder, raw) for _ in range(4)]
        time.sleep(chance.uniform(0, 1.2))
        victim = chance.choice(processes)
        victim.kill()
        for process in processes:
            out, error = process.communicate()
            assert process is victim or (process.returncode == 0 and str(8 * MiB).encode() in out), error
        (entry,) = ImageCache(folder, child=Here()).entries()
        assert imagekit.compare(raw, entry.path).same
        assert [name for name in names(folder) if name.endswith((".download", ".part"))] == []
        for one in folder.iterdir():
            one.unlink()


class TestPrune:
    def aged(self, entry: Entry, seconds: float) -> None:
        notes = entry.path.with_name(f"{entry.path.name}.json")
        known = json.loads(notes.read_bytes())
        known["used"] -= seconds
        notes.write_text(json.dumps(known))

    def test_what_nobody_used_for_long_goes_and_the_rest_stays(self, raw: Path, folder: Path) -> None:
        cache = ImageCache(folder, child=Here())
        old, new = cache.get("old", raw), cache.get("new", raw)
        self.aged(old, 1000)
        done = cache.prune(unused_for=500)
        assert done.removed == (old.path,)
        assert done.freed > 3 * MiB
        assert [entry.path for entry in cache.entries()] == [new.path]

    def test_beyond_the_size_the_least_used_goes_first(self, raw: Path, folder: Path) -> None:
        cache = ImageCache(folder, child=Here())
        entries = [cache.get(f"image{number}", raw) for number in range(3)]
        for age, entry in zip((300, 200, 100), entries, strict=True):
            self.aged(entry, age)
        assert cache.prune(max_bytes=9 * MiB, dry_run=True).removed == (entries[0].path,)
        assert entries[0].path.exists()
        assert cache.prune(max_bytes=9 * MiB).removed == (entries[0].path,)

    def test_one_that_is_worked_with_stays(self, raw: Path, folder: Path) -> None:
        cache = ImageCache(folder, child=Here())
        entry = cache.get(IMAGE, raw)
        self.aged(entry, 1000)
        with held(folder / f".{entry.path.name}.lock"):
            done = cache.prune(unused_for=0)
        assert done.removed == ()
        assert done.kept == ((entry.path, "another process works with it"),)

    def test_one_with_children_stays_wherever_they_lie(self, raw: Path, folder: Path, tmp_path: Path) -> None:
        instances = tmp_path / "instances"
        (instances / "web1").mkdir(parents=True)
        cache = ImageCache(folder, instances=(instances,), child=Here())
        entry = cache.get(IMAGE, raw)
        child = instances / "web1" / "root.vhdx"
        imagekit.create(child, parent=str(entry.path))
        self.aged(entry, 10000)
        done = cache.prune(unused_for=0)
        assert done.removed == ()
        assert "root.vhdx is built on it" in done.kept[0][1]
        child.unlink()
        assert cache.prune(unused_for=0).removed == (entry.path,)

    def test_a_child_that_names_its_parent_by_another_path_keeps_it(
        self, raw: Path, folder: Path, tmp_path: Path
    ) -> None:
        """As one does that was made on the host and is looked at through a share."""
        instances = tmp_path / "instances"
        cache = ImageCache(folder, instances=(instances,), child=Here())
        entry = cache.get(IMAGE, raw)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / entry.path.name).write_bytes(entry.path.read_bytes())
        imagekit.create(elsewhere / "root.vhdx", parent=str(elsewhere / entry.path.name))
        (instances / "web1").mkdir(parents=True)
        (elsewhere / "root.vhdx").rename(instances / "web1" / "root.vhdx")
        (elsewhere / entry.path.name).unlink()
        self.aged(entry, 10000)
        assert "root.vhdx is built on it" in cache.prune(unused_for=0).kept[0][1]

    def test_what_cannot_be_looked_at_keeps_all(
        self, raw: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder that is not mounted; a disk that a running machine has open."""
        instances = tmp_path / "instances"
        cache = ImageCache(folder, instances=(instances,), child=Here())
        entry = cache.get(IMAGE, raw)
        self.aged(entry, 10000)
        assert f"{instances} cannot be read" in cache.prune(unused_for=0).kept[0][1]
        instances.mkdir()
        (instances / "root.vhdx").write_bytes(b"open elsewhere")
        opened = LocalFile.open_source

        def in_use(path: Any, **options: Any) -> LocalFile:
            if Path(path).name == "root.vhdx":
                raise SourceError("in use by another program", path=path)
            return opened(path, **options)

        monkeypatch.setattr(LocalFile, "open_source", in_use)
        assert "root.vhdx cannot be read, and may be built on it" in cache.prune(unused_for=0).kept[0][1]
        monkeypatch.undo()
        assert cache.prune(unused_for=0).removed == (entry.path,)  # what is no disk has no parent

    def test_a_user_that_was_named_keeps_it_until_it_is_gone(self, raw: Path, folder: Path, tmp_path: Path) -> None:
        user = tmp_path / "elsewhere.vhdx"
        cache = ImageCache(folder, child=Here())
        entry = cache.get(IMAGE, raw, user=user)
        self.aged(entry, 1000)
        assert "promised" in cache.prune(unused_for=500).kept[0][1]
        user.write_bytes(b"in use")
        self.aged(entry, 10000)
        assert "built on it" in cache.prune(unused_for=500).kept[0][1]
        user.unlink()
        assert cache.prune(unused_for=500).removed == (entry.path,)

    def test_a_foreign_file_is_none_of_ours(self, folder: Path) -> None:
        (folder / "notes.vhdx").write_bytes(b"hello")
        (folder / "readme.txt").write_bytes(b"hello")
        cache = ImageCache(folder, child=Here())
        assert cache.entries() == []
        assert cache.prune(unused_for=0).removed == ()


class TestSharedWithNova:
    def test_what_the_driver_used_meanwhile_is_in_use(self, raw: Path, folder: Path) -> None:
        """It tells by the file's time, and knows no notes."""
        cache = ImageCache(folder, shared_with_nova=True, child=Here())
        entry = cache.get(IMAGE, raw)
        TestPrune().aged(entry, 1000)
        assert cache.prune(unused_for=500).removed == ()
        os.utime(entry.path, (1, 1))
        assert cache.prune(unused_for=500).removed == (entry.path,)

    def test_names_are_those_of_compute_hyperv(self, raw: Path, folder: Path) -> None:
        cache = ImageCache(folder, shared_with_nova=True, child=Here())
        entry = cache.get(IMAGE, raw, target=Target("vhd"))
        copy = cache.resized(entry, 16 * MiB, label="1")
        assert entry.path.name == f"{IMAGE}.vhd"
        assert copy.path.name == f"{IMAGE}_1.vhd"
        locks = {one.name for one in folder.iterdir() if one.name.endswith(".lock")}
        assert locks == {f"nova-{IMAGE}-cache.lock", f"nova-{IMAGE}_1.vhd-cache.lock"}

    def test_it_waits_for_whoever_holds_the_same_lock(self, raw: Path, folder: Path) -> None:
        """Another process holds it in the way that oslo.concurrency does: fasteners on the same file."""
        holder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import fasteners, sys, time\n"
                "lock = fasteners.InterProcessLock(sys.argv[1])\n"
                "lock.acquire(); print('held', flush=True); sys.stdin.read(); lock.release()",
                str(folder / f"nova-{IMAGE}-cache.lock"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        found: list[Entry] = []
        asker = threading.Thread(
            target=lambda: found.append(ImageCache(folder, shared_with_nova=True, child=Here()).get(IMAGE, raw))
        )
        asker.start()
        asker.join(0.6)
        assert asker.is_alive()
        assert names(folder) == []
        holder.stdin.close()
        asker.join(20)
        holder.wait()
        holder.stdout.close()
        assert [entry.made for entry in found] == [True]


def test_the_time_of_use_shows_on_the_file(raw: Path, folder: Path) -> None:
    """compute-hyperv ages by it."""
    cache = ImageCache(folder, child=Here())
    entry = cache.get(IMAGE, raw)
    os.utime(entry.path, (1, 1))
    cache.touch(entry)
    assert entry.path.stat().st_mtime > 1e9
