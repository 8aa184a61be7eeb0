"""A conversion from end to end: what comes out, and what never does, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import vhd_images
from fixtures.qcow2_images import Cluster, Compressed, Plain, Recipe, Zero, make
from imagekit import conversion
from imagekit.conversion import convert_image
from imagekit.errors import (
    Cancelled,
    CorruptImage,
    ImagekitError,
    InvalidImage,
    SourceError,
    TargetError,
    UnknownFormat,
    UnsafeImage,
    UnsupportedFeature,
    UsageError,
    VerificationFailed,
)
from imagekit.formats import registry
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.plan import ConvertOptions
from imagekit.progress import Control, Progress
from imagekit.sources import Reading, open_source
from tests.disks import IDENTIFIER, content, md5, noise, text
from tests.folders import read_only, small
from tests.samples import sample, sample_facts
from tests.timing import assert_within

KiB, MiB = 1 << 10, 1 << 20
K64 = 64 * KiB
QUICK = ConvertOptions(sync=False, identifier=IDENTIFIER)
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")

CLUSTERS: dict[int, Cluster] = {
    0: Compressed(text(K64)),
    1: Plain(noise(K64)),
    40: Plain(noise(K64, 1)),
    41: Zero(noise(K64)),
    100: Compressed(text(K64, 2)),
}
RECIPE = Recipe(size=8 * MiB - 512, clusters=CLUSTERS)
DISK = RECIPE.content()
QCOW2 = make(RECIPE).data


def options(**changes: object) -> ConvertOptions:
    return ConvertOptions(**({"sync": False, "identifier": IDENTIFIER} | changes))  # type: ignore[arg-type]


def written(folder: Path, data: bytes, name: str = "source.qcow2") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def read(path: Path, declared: str | None = None) -> bytes:
    """The content of an image as a guest sees it, by way of everything a user goes through."""
    with open_source(path, Reading(declared=declared)) as source:
        return content(source.image)


# --- what comes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_a_disk_goes_from_qcow2_to_vhd_to_raw_and_back_unchanged(subformat: str, tmp_path: Path) -> None:
    source = written(tmp_path, QCOW2)
    vhd, raw, again = tmp_path / "a.vhd", tmp_path / "b.raw", tmp_path / "c.vhd"
    convert_image(source, vhd, options(subformat=subformat, verify="content"))
    convert_image(vhd, raw, options(verify="content"))
    convert_image(raw, again, options(subformat=subformat, verify="content"))
    assert {md5(read(vhd)), md5(raw.read_bytes()), md5(read(again))} == {md5(DISK)}
    assert vhd.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("name", ["ext2.qcow2", "image.qcow2", "ntfs-dynamic.vhd", "ext2.vhd", "fat-parent.vhd"])
def test_a_real_image_has_the_content_that_other_readers_agree_on(name: str, tmp_path: Path) -> None:
    """Read as it is, and after conversion to VHD, dynamic and fixed, and to raw."""
    expected = sample_facts(name).content_md5
    assert md5(read(sample(name))) == expected
    for target, subformat in (("dynamic.vhd", "dynamic"), ("fixed.vhd", "fixed"), ("flat.raw", None)):
        convert_image(sample(name), tmp_path / target, options(subformat=subformat))
        assert md5(read(tmp_path / target)) == expected


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("win8.vhd", 41943040),
        ("win8.1-1GB.vhd", 1073741824),
        ("qemu.vhd", 41953280),
        ("vbox.vhd", 41943040),
        ("xapi.vhd", 41943040),
        ("hyperv2012r2-dynamic.vhd", 136365211648),
        ("virtualpc-dynamic.vhd", 136363130880),
    ],
)
def test_a_real_empty_disk_has_the_size_its_maker_meant_and_no_blocks(name: str, size: int, tmp_path: Path) -> None:
    report = convert_image(sample(name), tmp_path / "target.vhd", options())
    assert (report.virtual_size, report.data_bytes) == (size, 0)
    with open_source(tmp_path / "target.vhd") as source:
        assert [(one.start, one.length, one.data) for one in source.image.extents()] == [(0, size, False)]


def test_the_report_says_what_happened(tmp_path: Path) -> None:
    source, target = written(tmp_path, QCOW2), tmp_path / "target.vhd"
    report = convert_image(source, target, options(size=16 * MiB))
    assert report.source_format == "qcow2"
    assert report.source_virtual_size == 8 * MiB - 512
    assert (report.target, report.target_format, report.subformat) == (str(target), "vhd", "dynamic")
    assert (report.virtual_size, report.target_size) == (16 * MiB, target.stat().st_size)
    assert report.data_bytes == 4 * K64
    assert (report.identifier, report.verified) == (str(IDENTIFIER), "structure")
    assert report.notes == (f"disk grown from {8 * MiB - 512} to {16 * MiB} bytes",)
    assert report.to_json()["schema"] == 1
    assert read(target) == DISK.ljust(16 * MiB, b"\0")


def test_the_same_input_gives_the_same_bytes_and_another_id_another_disk(tmp_path: Path) -> None:
    source = written(tmp_path, QCOW2)
    for name, more in (
        ("a", {}),
        ("b", {"jobs": 4}),
        ("c", {"identifier": uuid.UUID(int=1)}),
        ("d", {"timestamp": 2**30}),
    ):
        convert_image(source, tmp_path / f"{name}.vhd", options(**more))
    a, b, c, d = ((tmp_path / f"{name}.vhd").read_bytes() for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    one = convert_image(source, tmp_path / "e.vhd", options(identifier=None))
    other = convert_image(source, tmp_path / "f.vhd", options(identifier=None))
    assert one.identifier != other.identifier


@posix_only
def test_a_sparse_and_a_dense_copy_give_the_same_bytes(tmp_path: Path) -> None:
    dense, sparse = written(tmp_path, DISK, "dense.raw"), tmp_path / "sparse.raw"
    with sparse.open("wb") as out:
        for at in range(0, len(DISK), K64):
            if any(DISK[at : at + K64]):
                out.seek(at)
                out.write(DISK[at : at + K64])
        out.truncate(len(DISK))
    for source in (dense, sparse):
        convert_image(source, source.with_suffix(".vhd"), QUICK)
    assert dense.with_suffix(".vhd").read_bytes() == sparse.with_suffix(".vhd").read_bytes()


@posix_only
@pytest.mark.parametrize("way", ["nameless", "part"])
def test_both_ways_of_writing_give_the_same_file(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "part":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    folder = tmp_path / "out"
    folder.mkdir()
    convert_image(written(tmp_path, QCOW2), folder / "target.vhd", options(sync=True))
    assert read(folder / "target.vhd") == DISK
    assert [path.name for path in folder.iterdir()] == ["target.vhd"]


def test_the_format_to_write_is_what_is_asked_for_else_the_suffix(tmp_path: Path) -> None:
    source = written(tmp_path, QCOW2)
    assert convert_image(source, tmp_path / "a.vhd", QUICK).target_format == "vhd"
    assert convert_image(source, tmp_path / "b", options(target_format="vpc")).target_format == "vhd"
    assert convert_image(source, tmp_path / "c.vhd", options(target_format="raw")).target_format == "raw"
    assert (tmp_path / "c.vhd").read_bytes() == DISK
    with pytest.raises(UsageError, match="does not say which format to write"):
        convert_image(source, tmp_path / "d", QUICK)
    with pytest.raises(UnsupportedFeature, match="does not write vmdk"):
        convert_image(source, tmp_path / "d.vmdk", QUICK)
    with pytest.raises(UnsupportedFeature, match="'floppy'"):
        convert_image(source, tmp_path / "d", options(target_format="floppy"))


def test_a_dry_run_tells_the_size_and_writes_nothing(tmp_path: Path, no_leftovers: Path) -> None:
    source = written(tmp_path, QCOW2)
    told = convert_image(source, no_leftovers / "target.vhd", options(dry_run=True))
    assert told.verified == "not written"
    done = convert_image(source, tmp_path / "target.vhd", QUICK)
    assert told.target_size == done.target_size == (tmp_path / "target.vhd").stat().st_size
    assert told.data_bytes >= done.data_bytes


@posix_only
@pytest.mark.parametrize("name", ["out.vhd", "out.vhdx", "out.raw"])
def test_a_fixed_disk_with_holes_inside_its_blocks_passes_its_own_verification(name: str, tmp_path: Path) -> None:
    source = tmp_path / "sparse.raw"
    with source.open("wb") as out:
        for at in (0, 5 * K64, 17 * K64, 90 * K64):
            out.seek(at)
            out.write(noise(K64, at))
        out.truncate(8 * MiB)
    subformat = None if name == "out.raw" else "fixed"
    convert_image(source, tmp_path / name, options(subformat=subformat, verify="content"))
    assert read(tmp_path / name) == source.read_bytes()


@posix_only
def test_a_preallocated_disk_takes_its_room_and_has_the_same_bytes(tmp_path: Path) -> None:
    source = written(tmp_path, QCOW2)
    for name, preallocate in (("thin.vhd", False), ("thick.vhd", True)):
        convert_image(source, tmp_path / name, options(subformat="fixed", preallocate=preallocate))
    thin, thick = tmp_path / "thin.vhd", tmp_path / "thick.vhd"
    assert thin.read_bytes() == thick.read_bytes()
    with LocalFile.open_source(thick) as file:
        assert file.allocated_size >= file.size


@pytest.mark.parametrize("level", ["none", "structure", "content"])
def test_the_report_names_the_level_that_was_verified(level: str, tmp_path: Path) -> None:
    assert convert_image(written(tmp_path, QCOW2), tmp_path / "a.vhd", options(verify=level)).verified == level


# --- sources that are refused ----------------------------------------------------------------------------------


def _fixed(size: int) -> bytes:
    return vhd_images.fixed(noise(4096), vhd_images.Footer(size=size, disk_type=2))


BAD: list[tuple[str, bytes, str | None, type[ImagekitError], int, str]] = [
    ("empty", b"", None, UnknownFormat, 11, "the file is empty"),
    ("empty, declared", b"", "raw", UnknownFormat, 11, "the file is empty"),
    ("a qcow2 magic", b"QFI\xfb", None, InvalidImage, 11, "no qcow2 header"),
    ("qcow1", b"QFI\xfb\0\0\0\1" + bytes(4096), None, UnsupportedFeature, 12, "qcow version 1"),
    ("a vhdx identifier", b"vhdxfile" + bytes(4096), None, InvalidImage, 11, "no VHDX header"),
    ("vmdk", b"KDMV" + bytes(4096), None, UnsupportedFeature, 12, "VMDK version 0"),
    ("vmdk text", b"# Disk DescriptorFile\n" * 40, None, InvalidImage, 11, "descriptor"),
    ("vdi", bytes(64) + b"\x7f\x10\xda\xbe" * 99, None, UnsupportedFeature, 12, "VDI version"),
    ("qed", b"QED\0" + bytes(4096), None, UnsupportedFeature, 12, "this is a qed image"),
    ("qed", b"QED\0" + bytes(4096), None, UnsupportedFeature, 12, "this is a qed image"),
    ("luks", b"LUKS\xba\xbe\0\2" + bytes(4096), None, UnsupportedFeature, 12, "this is a luks image"),
    ("qcow2 cut in a table", QCOW2[: 3 * K64], None, CorruptImage, 11, "L1 table ends at"),
    ("qcow2 cut in the data", QCOW2[: 7 * K64], None, CorruptImage, 11, "behind the file's end"),
    ("vhd with bad footers", b"conectix" + bytes(4096), None, CorruptImage, 11, "footer's checksum"),
    ("fixed vhd too short", _fixed(8192), None, CorruptImage, 11, "a fixed disk of 8192 bytes"),
    ("fixed vhd without footer", noise(4096), "vhd", InvalidImage, 11, "no VHD footer"),
    ("noise as qcow2", noise(4096), "qcow2", InvalidImage, 11, "no qcow2 header"),
    ("qcow2 as vhd", QCOW2, "vhd", UnsafeImage, 13, "rule format-mismatch"),
    ("qcow2 and vhd", QCOW2 + _fixed(4096)[-512:], None, UnsafeImage, 13, "rule ambiguous"),
    ("backing file", make(Recipe(size=K64, backing="b")).data, None, UnsafeImage, 13, "rule backing-file"),
    ("data file", make(Recipe(size=K64, data_file="d")).data, None, UnsafeImage, 13, "rule data-file"),
    ("differencing", vhd_images.differencing(1 << 22, "p.vhd"), None, UnsafeImage, 13, "rule parent-file"),
    ("corrupt bit", make(Recipe(size=K64, incompatible=2)).data, None, UnsafeImage, 13, "rule corrupt-bit"),
    ("no bytes", make(Recipe(size=0)).data, None, UsageError, 2, "no bytes at all"),
]


@pytest.mark.parametrize(
    ("data", "declared", "kind", "code", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD]
)
def test_a_bad_source_is_refused_in_words_and_nothing_is_left(
    data: bytes,
    declared: str | None,
    kind: type[ImagekitError],
    code: int,
    message: str,
    tmp_path: Path,
    no_leftovers: Path,
) -> None:
    source = written(tmp_path, data, "source")
    before = source.stat()
    with pytest.raises(kind, match=message) as caught:
        convert_image(source, no_leftovers / "target.vhd", options(source_format=declared))
    assert caught.value.exit_code == code
    assert str(source) in str(caught.value)
    after = source.stat()
    assert (after.st_mtime_ns, after.st_size, source.read_bytes()) == (before.st_mtime_ns, before.st_size, data)


def test_a_missing_source_is_a_source_error(tmp_path: Path, no_leftovers: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        convert_image(tmp_path / "missing.qcow2", no_leftovers / "target.vhd", QUICK)


@posix_only
def test_a_folder_and_a_fifo_are_no_sources(tmp_path: Path, no_leftovers: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(SourceError, match="not an image"):
            convert_image(path, no_leftovers / "target.vhd", QUICK)


@pytest.mark.parametrize("fraction", range(1, 20))
def test_a_truncated_image_is_an_error_or_the_whole_disk_and_never_zeros(
    fraction: int, tmp_path: Path, no_leftovers: Path
) -> None:
    """Cut at many points, also with the format declared; the whole disk only when no byte of it is missing."""
    dynamic = vhd_images.dynamic(6 * MiB, {1: noise(2 * MiB), 0: noise(MiB, 1)})
    fixed = vhd_images.fixed(noise(MiB))
    for data, expected, declared in (
        (QCOW2, DISK, None),
        (dynamic, vhd_images.dynamic_content(6 * MiB, {1: noise(2 * MiB), 0: noise(MiB, 1)}), "vhd"),
        (fixed, noise(MiB), "vhd"),
    ):
        source = written(tmp_path, data[: len(data) * fraction // 20], "cut")
        target = no_leftovers / "target.raw"
        try:
            convert_image(source, target, options(source_format=declared, verify="content"))
        except (CorruptImage, InvalidImage):
            assert not target.exists()
        else:
            assert target.read_bytes() == expected
            target.unlink()


def test_a_target_that_cannot_hold_the_disk_is_refused(tmp_path: Path, no_leftovers: Path) -> None:
    source = written(tmp_path, make(Recipe(size=2041 << 30, cluster_bits=21)).data)
    with pytest.raises(UnsupportedFeature, match="at most 2040 GiB"):
        convert_image(source, no_leftovers / "target.vhd", QUICK)
    with pytest.raises(UsageError, match="smaller than the disk"):
        convert_image(written(tmp_path, QCOW2), no_leftovers / "target.vhd", options(size=MiB))


# --- a source that changes -------------------------------------------------------------------------------------


def _touch_first_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\0")


def _replace_by_a_copy(path: Path) -> None:
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


@posix_only
@pytest.mark.parametrize("phase", ["plan", "copy", "verify"])
@pytest.mark.parametrize(
    "change",
    [
        _touch_first_byte,
        lambda path: os.truncate(path, 4096),
        lambda path: os.truncate(path, 99 * MiB),
        _replace_by_a_copy,
    ],
    ids=["written to", "cut", "grown", "replaced"],
)
def test_a_source_that_changes_while_it_is_read_is_an_error(
    change: Callable[[Path], None], phase: str, tmp_path: Path, no_leftovers: Path
) -> None:
    source = written(tmp_path, noise(9 * MiB), "source.raw")
    os.utime(source, (1, 1))
    changed: list[str] = []

    def meddle(progress: Progress) -> None:
        if progress.phase == phase and not changed:
            changed.append(phase)
            change(source)

    with pytest.raises((SourceError, CorruptImage, VerificationFailed)):
        convert_image(source, no_leftovers / "target.vhd", options(verify="content", jobs=1), control=Control(meddle))
    assert changed


# --- targets that are refused ----------------------------------------------------------------------------------


def test_an_existing_target_is_left_alone_and_replaced_only_when_told(tmp_path: Path) -> None:
    source, target = written(tmp_path, QCOW2), written(tmp_path, b"old", "target.vhd")
    with pytest.raises(TargetError, match="exists already"):
        convert_image(source, target, QUICK)
    assert target.read_bytes() == b"old"
    convert_image(source, target, options(overwrite=True))
    assert read(target) == DISK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.qcow2", "target.vhd"]


def test_an_old_target_survives_a_conversion_that_fails(tmp_path: Path) -> None:
    source, target = written(tmp_path, QCOW2[: 7 * K64]), written(tmp_path, b"old", "target.vhd")
    with pytest.raises(CorruptImage):
        convert_image(source, target, options(overwrite=True))
    assert target.read_bytes() == b"old"


@posix_only
@pytest.mark.parametrize("kind", ["symlink", "fifo", "device", "folder", "no folder"])
def test_a_target_that_is_no_regular_file_is_refused_before_the_source_is_opened(kind: str, tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    target = tmp_path / "target.vhd"
    if kind == "symlink":
        target.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "device":
        target = Path("/dev/null")
    elif kind == "folder":
        target.mkdir()
    else:
        target = tmp_path / "missing" / "target.vhd"
    with pytest.raises(TargetError) as caught:
        convert_image(tmp_path / "no such source", target, options(target_format="vhd", overwrite=True))
    assert caught.value.exit_code == 14
    assert not (tmp_path / "elsewhere").exists()


@posix_only
@pytest.mark.parametrize("how", ["same", "hard link", "symlink"])
def test_the_source_is_never_its_own_target(how: str, tmp_path: Path) -> None:
    source = written(tmp_path, noise(K64), "image.raw")
    target = source if how == "same" else tmp_path / "target.raw"
    if how == "hard link":
        target.hardlink_to(source)
    elif how == "symlink":
        target.symlink_to(source)
    with pytest.raises(UsageError, match="target and source are the same file") as caught:
        convert_image(source, target, options(overwrite=True))
    assert caught.value.exit_code == 2
    assert source.read_bytes() == noise(K64)


@posix_only
def test_a_read_only_folder_is_a_target_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    source = written(tmp_path, QCOW2)
    with read_only(folder), pytest.raises(TargetError, match="cannot be created") as caught:
        convert_image(source, folder / "target.vhd", QUICK)
    assert caught.value.exit_code == 14


@posix_only
@pytest.mark.parametrize("noticed", ["beforehand", "on the way"])
@pytest.mark.parametrize("preallocate", [False, True], ids=["", "preallocated"])
def test_a_full_file_system_is_a_target_error_and_nothing_is_left(
    noticed: str, *, preallocate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may fill it between the look at what is free and the last write."""
    folder = tmp_path / "folder"
    folder.mkdir()
    source = written(tmp_path, noise(3 * MiB), "source.raw")
    if noticed == "on the way":
        monkeypatch.setattr(conversion, "check_space", lambda *_: None)
    with small(folder, MiB):
        with pytest.raises(TargetError) as caught:
            convert_image(source, folder / "target.vhd", options(preallocate=preallocate))
        assert list(folder.iterdir()) == []
    assert ("no space: " if noticed == "beforehand" else "No space left on device") in str(caught.value)
    assert caught.value.exit_code == 14


@posix_only
def test_a_limit_on_file_sizes_is_a_target_error_and_nothing_is_left(tmp_path: Path, no_leftovers: Path) -> None:
    source = written(tmp_path, noise(3 * MiB), "source.raw")
    code = f"""
import resource, signal
from imagekit.conversion import convert_image
from imagekit.errors import TargetError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    convert_image({str(source)!r}, {str(no_leftovers / "target.vhd")!r})
except TargetError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ("File too large" in done.stdout, done.stderr) == (True, "")


# --- what is written wrongly -----------------------------------------------------------------------------------


def _short_write(real: Callable[..., int]) -> Callable[..., int]:
    """Says it wrote everything, and drops the second half of one large buffer."""
    done: list[int] = []

    def pwritev(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        length = sum(len(buffer) for buffer in buffers)
        if length > 100_000 and not done:
            done.append(1)
            real(descriptor, [buffers[-1][: len(buffers[-1]) // 2]], offset + length - len(buffers[-1]))
            return length
        return real(descriptor, buffers, offset)

    return pwritev


@posix_only
def test_data_that_did_not_reach_the_target_is_found_by_comparing_contents(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "win32":
        pytest.skip("POSIX")
    clusters = {at: Compressed(text(K64, at)) for at in range(64)}
    source = written(tmp_path, make(Recipe(size=4 * MiB, clusters=clusters)).data)
    monkeypatch.setattr(os, "pwritev", _short_write(os.pwritev))
    with pytest.raises(VerificationFailed, match="the content differs at guest offset") as caught:
        convert_image(source, no_leftovers / "target.vhd", options(verify="content", jobs=1))
    assert caught.value.exit_code == 15


@posix_only
def test_a_target_that_lost_its_metadata_is_found_by_reading_it_again(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalFile.pwrite

    def forgetful(self: LocalFile, offset: int, *buffers: bytes | bytearray | memoryview) -> None:
        if offset != 1536:  # the BAT
            real(self, offset, *buffers)

    monkeypatch.setattr(LocalFile, "pwrite", forgetful)
    with pytest.raises((VerificationFailed, CorruptImage)):
        convert_image(written(tmp_path, QCOW2), no_leftovers / "target.vhd", QUICK)


# --- stopped ---------------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("way", ["nameless", "part"])
@pytest.mark.parametrize("phase", ["plan", "copy", "verify", "sync"])
def test_a_conversion_that_is_cancelled_stops_soon_and_leaves_nothing(
    phase: str, way: str, tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "part":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    source = written(tmp_path, noise(MiB) * 64, "source.raw")

    def stopped() -> float:
        cancel, asked = threading.Event(), list[float]()

        def ask(progress: Progress) -> None:
            if progress.phase == phase and not asked:
                asked.append(time.monotonic())
                cancel.set()

        control = Control(ask, cancel)
        with pytest.raises(Cancelled) as caught:
            convert_image(source, no_leftovers / "target.vhd", options(verify="content"), control=control)
        assert caught.value.exit_code == 130
        assert list(no_leftovers.iterdir()) == []
        return time.monotonic() - asked[0]

    assert_within(0.25, stopped)


def test_cancelled_before_it_began_nothing_is_begun(tmp_path: Path, no_leftovers: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        convert_image(written(tmp_path, QCOW2), no_leftovers / "t.vhd", QUICK, control=Control(cancel=cancel))


def test_a_wish_to_stop_that_comes_after_the_end_changes_nothing(tmp_path: Path) -> None:
    cancel = threading.Event()
    report = convert_image(written(tmp_path, QCOW2), tmp_path / "t.vhd", QUICK, control=Control(cancel=cancel))
    cancel.set()
    assert read(Path(report.target)) == DISK


KILLED = """
import sys
from imagekit.conversion import convert_image
from imagekit.plan import ConvertOptions
from imagekit.progress import Control
import os
source, target, way = sys.argv[1:]
if way == "part":
    del os.O_TMPFILE
print("ready", flush=True)
def tell(progress):
    print(progress.phase, flush=True)
convert_image(source, target, ConvertOptions(verify="content"), control=Control(tell))
print("done", flush=True)
"""


def killed(source: Path, target: Path, way: str, stop: Callable[[subprocess.Popen[str]], None]) -> None:
    """Run a conversion in a process of its own and kill it when ``stop`` returns."""
    command = [sys.executable, "-c", KILLED, str(source), str(target), way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            stop(process)
        finally:
            process.kill()


def assert_whole_or_absent(target: Path, way: str, disk: bytes) -> None:
    names = [path.name for path in target.parent.iterdir()]
    if target.exists():
        assert read(target) == disk
        names.remove(target.name)
    assert all(way == "part" and name.endswith(".part") for name in names)


@posix_only
@pytest.mark.parametrize("way", ["nameless", "part"])
@pytest.mark.parametrize("phase", ["plan", "copy", "verify", "sync"])
def test_killed_in_any_phase_there_is_no_target_and_the_next_run_makes_it(
    phase: str, way: str, tmp_path: Path
) -> None:
    source = written(tmp_path, QCOW2)
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "target.vhd"

    def stop(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == phase:
                return

    killed(source, target, way, stop)
    assert_whole_or_absent(target, way, DISK)
    convert_image(source, target, options(overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["target.vhd"]
    assert read(target) == DISK


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("way", ["nameless", "part"])
def test_killed_at_any_moment_the_target_is_whole_or_absent(way: str, tmp_path: Path) -> None:
    disk = b"".join(noise(MiB, seed) for seed in range(48))
    source = written(tmp_path, disk, "source.raw")
    target = tmp_path / "out" / "target.vhd"
    for number in range(40):
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()

        def stop(process: subprocess.Popen[str], moment: float = number * 0.012) -> None:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(moment)

        killed(source, target, way, stop)
        assert_whole_or_absent(target, way, disk)


# --- two at once -----------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("way", ["nameless", "part"])
def test_of_two_runs_for_one_target_one_wins_and_the_file_is_whole(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "part":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    folder = tmp_path / "out"
    folder.mkdir()
    disks = [noise(5 * MiB, seed) for seed in range(4)]
    sources = [written(tmp_path, disk, f"{number}.raw") for number, disk in enumerate(disks)]
    start, won, lost = threading.Barrier(len(sources)), list[int](), list[TargetError]()

    def run(number: int) -> None:
        start.wait()
        try:
            convert_image(sources[number], folder / "target.vhd", QUICK)
            won.append(number)
        except TargetError as error:
            lost.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(sources))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 3)
    assert read(folder / "target.vhd") == disks[won[0]]
    assert [path.name for path in folder.iterdir()] == ["target.vhd"]


def test_one_source_may_be_read_by_many_at_once(tmp_path: Path) -> None:
    source = written(tmp_path, QCOW2)
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            convert_image(source, tmp_path / f"{number}.vhd", QUICK)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len({hashlib.sha256((tmp_path / f"{number}.vhd").read_bytes()).hexdigest() for number in range(6)}) == 1


def test_reading_errors_of_the_disk_below_are_source_errors(
    tmp_path: Path, no_leftovers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO in the middle: an error with its place, not a hole."""
    if sys.platform != "linux":
        pytest.skip("preadv")
    source = written(tmp_path, QCOW2)
    real = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 6 * K64:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(SourceError, match="cannot be read: Input/output error") as caught:
        convert_image(source, no_leftovers / "target.vhd", QUICK)
    assert caught.value.exit_code == 10
    assert registry.find("qcow2").open(MemoryFile(QCOW2)).pread(0, 512) == DISK[:512]
