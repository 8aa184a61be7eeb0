"""The library's door: what `imagekit.__all__` promises."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import imagekit
from imagekit.errors import Cancelled, UnsafeImage, UsageError
from imagekit.formats.base import MiB
from imagekit.progress import Progress

UUID = "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(3 * MiB) + b"imagekit" * 1024 + bytes(5 * MiB))
    return path


def test_every_promised_name_is_there_and_the_rest_is_not() -> None:
    for name in imagekit.__all__:
        assert getattr(imagekit, name)
    with pytest.raises(AttributeError):
        imagekit.nonsense  # noqa: B018


def test_functions_stay_functions_when_everything_is_imported() -> None:
    """A submodule of the same name would take the function's place. What only Glance can import is left out."""
    code = """
import importlib, pkgutil, imagekit
for name in imagekit.__all__: getattr(imagekit, name)
for module in pkgutil.walk_packages(imagekit.__path__, "imagekit."):
    if not module.name.endswith(("__main__", "glance_plugin")): importlib.import_module(module.name)
print([name for name in imagekit.__all__ if not callable(getattr(imagekit, name))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_an_open_image_reads_as_the_guest_does(disk: Path) -> None:
    with imagekit.open_image(disk) as image:
        assert image.virtual_size == disk.stat().st_size
        assert image.pread(3 * MiB, 8) == b"imagekit"
        assert image.pread(image.virtual_size - 4, 100) == bytes(4)
        assert sum(extent.length for extent in image.extents()) == image.virtual_size


def test_a_conversion_reports_and_can_be_measured_before(disk: Path, tmp_path: Path) -> None:
    measured = imagekit.measure(disk, "vhd")
    report = imagekit.convert(disk, tmp_path / "disk.vhd", identifier=UUID, verify="content")
    assert measured["required"] == report.target_size == (tmp_path / "disk.vhd").stat().st_size
    assert (report.identifier, report.verified) == (UUID, "content")


def test_unknown_options_are_refused_by_name(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="colour"):
        imagekit.convert(disk, tmp_path / "x.vhd", colour="red")


def test_progress_comes_as_data_from_the_caller_s_thread(disk: Path, tmp_path: Path) -> None:
    seen: list[tuple[Progress, threading.Thread]] = []
    imagekit.convert(
        disk,
        tmp_path / "x.vhd",
        verify="content",
        progress=lambda event: seen.append((event, threading.current_thread())),
    )
    assert {thread for _, thread in seen} == {threading.current_thread()}
    phases = list(dict.fromkeys(event.phase for event, _ in seen))
    assert phases == ["plan", "copy", "verify", "sync"]
    last = [event for event, _ in seen if event.phase == "copy"][-1]
    assert last.done == last.total


def test_a_cancelled_conversion_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        imagekit.convert(disk, tmp_path / "x.vhd", cancel=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_cancelling_after_the_end_changes_nothing(disk: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    imagekit.convert(disk, tmp_path / "x.vhd", cancel=cancel)
    cancel.set()
    assert imagekit.compare(disk, tmp_path / "x.vhd").same


def test_check_mends_a_lost_footer_and_says_so(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    imagekit.convert(disk, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    found = imagekit.check(path)
    assert not found.sound
    assert [problem.code for problem in found.problems] == ["footer-missing"]
    mended = imagekit.check(path, repair=True)
    assert mended.sound
    assert mended.repaired
    assert path.read_bytes() == whole


def test_check_never_touches_a_sound_image(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    imagekit.convert(disk, path)
    before = path.stat()
    assert not imagekit.check(path, repair=True).repaired
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_info_works_on_what_convert_refuses(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    imagekit.convert(disk, path)
    path.write_bytes(b"QFI\xfb" + path.read_bytes()[4:])
    with pytest.raises(UnsafeImage):
        imagekit.convert(path, tmp_path / "x.raw")
    found = imagekit.info(path, format="vhd")
    assert [finding.rule for finding in found.findings if finding.severity.value == "refuse"] == ["ambiguous"]


def test_a_third_party_format_is_found_by_its_entry_point(
    disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from imagekit.formats import registry
    from imagekit.formats.base import (
        AS_IS,
        DiskFormat,
        DiskImage,
        File,
        ImageWriter,
        OpenOptions,
        Resolver,
        WriterOptions,
    )
    from imagekit.formats.raw import FlatWriter, RawImage

    class Fancy(DiskFormat):
        name = "fancy"
        suffixes = (".fancy",)
        subformats = ("fancy",)

        def probe(self, file: File) -> str | None:
            return None

        def open(self, file: File, *, resolver: Resolver | None = None, options: OpenOptions = AS_IS) -> DiskImage:
            return RawImage(file, file.size)

        def writer(self, virtual_size: int, options: WriterOptions) -> ImageWriter:
            return FlatWriter(virtual_size)

    monkeypatch.setattr(registry, "_third_party", lambda: [("fancy", Fancy())])
    registry.formats.cache_clear()
    try:
        assert imagekit.convert(disk, tmp_path / "x.fancy").target_format == "fancy"
    finally:
        registry.formats.cache_clear()
