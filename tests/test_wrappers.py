"""Unwrapping: what goes in comes out, whatever is damaged or asks for too much is refused, nothing is left behind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import sys
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures import qcow2_images, tar_archives, vhd_images
from imagekit.errors import (
    Cancelled,
    CorruptImage,
    ImagekitError,
    TargetError,
    UnknownFormat,
    UnsafeImage,
    UnsupportedFeature,
)
from imagekit.formats.files import LocalFile, MemoryFile
from imagekit.formats.registry import NAMED_ONLY
from imagekit.progress import Control, Progress
from imagekit.wrappers.parts import BLOCK, data_runs, is_disk_name
from imagekit.wrappers.unwrap import DEFAULT_LIMITS, WrapperLimits, detect, unwrap
from tests.disks import noise, text

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KiB, MiB = 1 << 10, 1 << 20
DISK = noise(5000) + bytes(70_000) + text(9000) + bytes(3000)
SMALL = WrapperLimits(ratio_from=1 * MiB, zero_ratio_from=8 * MiB, zero_ratio=200, ratio=100)

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "xz": lzma.compress,
    "bzip2": bz2.compress,
    "zstd": lambda data: zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}),
}
SUFFIXES = {"gzip": ".gz", "xz": ".xz", "bzip2": ".bz2", "zstd": ".zst"}
every_packer = pytest.mark.parametrize("kind", PACKERS)


def tar(**members: bytes) -> bytes:
    return b"".join(tar_archives.member(name.encode(), data) for name, data in members.items()) + tar_archives.END


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.fixture
def wrapped(tmp_path: Path) -> Callable[..., LocalFile]:
    """An open file with these bytes."""

    def make(data: bytes, name: str = "disk.raw.gz") -> LocalFile:
        path = tmp_path / name
        path.write_bytes(data)
        return LocalFile.open_source(path)

    return make


def unwrapped(file: LocalFile, limits: WrapperLimits = DEFAULT_LIMITS) -> bytes:
    with file, unwrap(file, limits=limits) as inner:
        return inner.file.pread(0, inner.file.size)


def outcome(data: bytes, folder: Path) -> bytes | None:
    """What comes out, or None when the file is refused as it should be."""
    path = folder / "file"
    path.write_bytes(data)
    try:
        return unwrapped(LocalFile.open_source(path))
    except (CorruptImage, UnknownFormat, UnsupportedFeature, UnsafeImage):
        return None


# --- packed files ----------------------------------------------------------------------------------------------


@every_packer
def test_a_packed_disk_comes_out_as_it_went_in(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    with wrapped(PACKERS[kind](DISK), "web.qcow2" + SUFFIXES[kind]) as file, unwrap(file) as inner:
        assert (inner.chain, inner.name) == ((kind,), "web.qcow2")
        assert inner.file.pread(0, len(DISK) + 1) == DISK


@every_packer
def test_streams_one_after_the_other_are_one_file(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    streams = [DISK[:4000], b"", DISK[4000:4001], DISK[4001:]]
    assert unwrapped(wrapped(b"".join(map(PACKERS[kind], streams)))) == DISK


@every_packer
def test_more_than_one_piece_comes_out_in_order(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    data = noise(300 * KiB) + text(MiB) + bytes(MiB + 5)
    assert unwrapped(wrapped(PACKERS[kind](data))) == data


@every_packer
@pytest.mark.parametrize("zeros", [1, 511, 2 * MiB])
def test_zeros_behind_the_end_are_padding(kind: str, zeros: int, wrapped: Callable[..., LocalFile]) -> None:
    assert unwrapped(wrapped(PACKERS[kind](DISK) + bytes(zeros))) == DISK


@every_packer
@pytest.mark.parametrize("behind", [b"x", bytes(3) + b"PK", bytes(2 * MiB) + b"\1"], ids=["byte", "word", "far"])
def test_anything_else_behind_the_end_is_refused(kind: str, behind: bytes, wrapped: Callable[..., LocalFile]) -> None:
    packed = PACKERS[kind](DISK)
    with pytest.raises(CorruptImage, match="that are none follow") as caught:
        unwrapped(wrapped(packed + behind))
    assert caught.value.offset == len(packed) + len(behind) - len(behind.lstrip(b"\0"))


def test_xz_streams_may_have_padding_between_them(wrapped: Callable[..., LocalFile]) -> None:
    assert unwrapped(wrapped(lzma.compress(DISK) + bytes(8) + lzma.compress(DISK))) == DISK * 2


@every_packer
def test_every_cut_is_noticed(kind: str, tmp_path: Path) -> None:
    packed = PACKERS[kind](text(2000))
    for length in range(len(packed)):
        assert outcome(packed[:length], tmp_path) is None


@every_packer
def test_a_changed_byte_is_noticed_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    packed = PACKERS[kind](text(2000) + noise(50))
    for at in range(len(packed)):
        for flip in (0x01, 0x80, 0xFF):
            changed = bytearray(packed)
            changed[at] ^= flip
            assert outcome(bytes(changed), tmp_path) in (None, text(2000) + noise(50))


@every_packer
@given(behind=st.binary(max_size=200))
def test_noise_behind_a_magic_is_refused_and_nothing_worse(kind: str, behind: bytes) -> None:
    packed = PACKERS[kind](b"")[:6] + behind
    with tempfile.TemporaryFile() as made, LocalFile(os.dup(made.fileno()), "noise") as file:
        file.pwrite(0, packed)
        try:
            unwrap(file).close()
        except ImagekitError as error:
            assert type(error) in (CorruptImage, UnknownFormat, UnsafeImage)


def test_an_empty_packed_file_is_an_empty_file(wrapped: Callable[..., LocalFile]) -> None:
    assert unwrapped(wrapped(gzip.compress(b""))) == b""


def test_zstd_frames_that_are_to_be_skipped_are(wrapped: Callable[..., LocalFile]) -> None:
    """Parallel packers put their index into such frames, some of them first."""
    skipped = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    file = wrapped(skipped + zstd.compress(DISK) + skipped + zstd.compress(DISK))
    assert detect(file) == "zstd"
    assert unwrapped(file) == DISK * 2


def test_the_same_frames_before_something_else_are_not_zstd() -> None:
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    assert detect(MemoryFile(skipped + b"\x04\x22\x4d\x18 is lz4")) is None


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("disk.vhd.GZ", "disk.vhd"),
        ("disk.tgz", "disk.tar"),
        ("disk", "disk"),
        (".gz", ".gz"),
        ("disk.qcow2", "disk.qcow2"),
    ],
)
def test_the_packer_s_suffix_is_taken_off_the_name(name: str, inner: str, wrapped: Callable[..., LocalFile]) -> None:
    with wrapped(gzip.compress(DISK), name) as file, unwrap(file) as found:
        assert found.name == inner
        assert found.file.name == f"{file.name}!{inner}"


# --- one in another --------------------------------------------------------------------------------------------


@every_packer
def test_a_packed_tar_is_opened_to_the_disk(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    with wrapped(PACKERS[kind](tar(**{"disk.raw": DISK}))) as file, unwrap(file) as inner:
        assert (inner.chain, inner.name) == ((kind, "tar"), "disk.raw")
        assert inner.file.pread(0, inner.file.size) == DISK


def test_a_packed_disk_in_a_zip_is_opened(wrapped: Callable[..., LocalFile]) -> None:
    with wrapped(zipped(**{"a/disk.vhd.xz": lzma.compress(DISK), "a/readme": b"me"})) as file:
        with unwrap(file) as inner:
            assert (inner.chain, inner.name) == (("zip", "xz"), "disk.vhd")
        assert file.pread(0, 2) == b"PK"  # the source stays open


def test_a_third_wrapper_is_refused(wrapped: Callable[..., LocalFile], tmp_path: Path) -> None:
    three = gzip.compress(tar(**{"disk.raw.gz": gzip.compress(DISK)}))
    with pytest.raises(UnsafeImage, match="gzip inside tar inside gzip: at most 2") as caught:
        unwrapped(wrapped(three))
    assert caught.value.rule == "wrapper-limit"
    assert unwrapped(wrapped(three), WrapperLimits(nesting=3)) == DISK


def test_packing_again_and_again_does_not_multiply_the_ratio(wrapped: Callable[..., LocalFile]) -> None:
    """What one layer unpacks to is measured by what was sent, not by the layer before it."""
    bomb = gzip.compress(gzip.compress(b"A" * (64 * MiB)))
    assert len(bomb) < 4 * KiB
    with pytest.raises(UnsafeImage, match="bytes of data, at most 100 to one"):
        unwrapped(wrapped(bomb), SMALL)


# --- limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_a_disk_of_zeros_is_no_bomb_however_well_it_packs(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    limits = WrapperLimits(ratio_from=0, zero_ratio_from=0)
    data = bytes(24 * MiB)
    with wrapped(PACKERS[kind](data)) as file, unwrap(file, limits=limits) as inner:
        assert inner.file.size == len(data)
        assert inner.file.allocated_size == 0


@every_packer
def test_data_beyond_its_ratio_is_refused(kind: str, wrapped: Callable[..., LocalFile]) -> None:
    file = wrapped(PACKERS[kind](b"A" * (8 * MiB)))
    with pytest.raises(UnsafeImage, match="bytes of data, at most 100 to one") as caught:
        unwrapped(file, SMALL)
    assert caught.value.rule == "wrapper-limit"


def test_one_byte_in_a_block_counts_as_the_block_it_fills(wrapped: Callable[..., LocalFile]) -> None:
    bomb = (b"A" + bytes(BLOCK - 1)) * (8 * MiB // BLOCK)
    with pytest.raises(UnsafeImage, match="bytes of data"):
        unwrapped(wrapped(gzip.compress(bomb)), SMALL)


def test_zeros_beyond_their_own_ratio_are_refused(wrapped: Callable[..., LocalFile]) -> None:
    """They fill no medium, but take their time: bzip2 packs them a million to one."""
    with pytest.raises(UnsafeImage, match=r"more than \d+ bytes, at most 200 to one"):
        unwrapped(wrapped(bz2.compress(bytes(24 * MiB))), WrapperLimits(zero_ratio_from=8 * MiB - 1, zero_ratio=200))


def test_a_size_beyond_the_limit_is_refused_before_it_is_written(
    wrapped: Callable[..., LocalFile],
) -> None:
    limits = WrapperLimits(size=len(DISK) - 1)
    for data in (gzip.compress(DISK), tar(disk=DISK), zipped(disk=DISK)):
        with pytest.raises(UnsafeImage, match=f"at most {len(DISK) - 1} are allowed") as caught:
            unwrapped(wrapped(data), limits)
        assert caught.value.rule == "wrapper-limit"
        assert unwrapped(wrapped(data), WrapperLimits(size=len(DISK))) == DISK


def test_streams_that_hold_next_to_nothing_are_limited(wrapped: Callable[..., LocalFile]) -> None:
    with pytest.raises(UnsafeImage, match="gzip streams that hold") as caught:
        unwrapped(wrapped(gzip.compress(b"x") * 1100))
    assert caught.value.rule == "wrapper-limit"
    assert len(unwrapped(wrapped(gzip.compress(noise(2048)) * 1100))) == 2048 * 1100


def test_an_xz_dictionary_beyond_the_limit_is_refused(wrapped: Callable[..., LocalFile]) -> None:
    packed = lzma.compress(DISK, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 300 * MiB}])
    with pytest.raises(UnsafeImage, match="more memory to unpack than 256 MiB") as caught:
        unwrapped(wrapped(packed))
    assert caught.value.rule == "wrapper-limit"


def test_a_zstd_window_beyond_the_limit_is_refused(wrapped: Callable[..., LocalFile]) -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    packed = compressor.compress(text(300 * KiB)) + compressor.flush()
    with pytest.raises(UnsafeImage, match="more memory") as caught:
        unwrapped(wrapped(packed))
    assert caught.value.rule == "wrapper-limit"
    assert unwrapped(wrapped(packed), WrapperLimits(memory=512 * MiB)) == text(300 * KiB)


def test_room_that_is_to_stay_free_does(wrapped: Callable[..., LocalFile]) -> None:
    with pytest.raises(TargetError, match="no space to unpack"):
        unwrapped(wrapped(gzip.compress(DISK)), WrapperLimits(reserve=1 << 60))


def test_memory_does_not_follow_the_size(wrapped: Callable[..., LocalFile]) -> None:
    file = wrapped(gzip.compress(bytes(32 * MiB) + noise(2 * MiB)))
    tracemalloc.start()
    try:
        with file, unwrap(file):
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * MiB


# --- the file it is unpacked to --------------------------------------------------------------------------------


@given(
    offset=st.integers(0, 3 * BLOCK),
    runs=st.lists(st.tuples(st.integers(1, 90_000), st.booleans()), max_size=8),
)
def test_runs_of_data_leave_out_blocks_of_zeros_and_nothing_else(offset: int, runs: list[tuple[int, bool]]) -> None:
    piece = b"".join((b"\1" if data else b"\0") * length for length, data in runs)
    found = list(data_runs(offset, piece))
    assert found == sorted(found)
    kept = bytearray(len(piece))
    for start, end in found:
        assert start < end
        kept[start:end] = piece[start:end]
        block = piece[start : start + BLOCK - (offset + start) % BLOCK]
        assert any(block[: end - start])
    assert kept == piece
    blocks = sum(
        any(piece[max(at - offset, 0) : max(at + BLOCK - offset, 0)]) for at in range(0, offset + len(piece), BLOCK)
    )
    assert sum(-(-(offset + end) // BLOCK) - (offset + start) // BLOCK for start, end in found) == blocks


def test_zeros_take_no_room(wrapped: Callable[..., LocalFile]) -> None:
    data = noise(64 * KiB) + bytes(4 * MiB) + noise(64 * KiB) + bytes(4 * MiB)
    with wrapped(gzip.compress(data)) as file, unwrap(file) as inner:
        assert inner.file.size == len(data)
        assert inner.file.allocated_size <= 160 * KiB


@pytest.mark.skipif(sys.platform == "win32", reason="there it has a name while it is open")
def test_it_has_no_name_and_nobody_else_can_read_it(wrapped: Callable[..., LocalFile], no_leftovers: Path) -> None:
    with wrapped(gzip.compress(DISK)) as file, unwrap(file, folder=no_leftovers) as inner:
        assert list(no_leftovers.iterdir()) == []
        descriptor = inner.file.fileno()
        assert descriptor is not None
        assert stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600


def test_a_folder_that_is_not_there_is_the_target_s_fault(wrapped: Callable[..., LocalFile], tmp_path: Path) -> None:
    with wrapped(gzip.compress(DISK)) as file, pytest.raises(TargetError, match="no temporary file"):
        unwrap(file, folder=tmp_path / "missing")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(DISK, mtime=0)[:-9],
        gzip.compress(tar(disk=DISK)[:-1024], mtime=0),
        gzip.compress(gzip.compress(b"A" * MiB, mtime=0), mtime=0),
    ],
    ids=["cut", "cut inside", "bomb"],
)
def test_no_descriptor_is_left_when_it_fails(data: bytes, wrapped: Callable[..., LocalFile]) -> None:
    limits = WrapperLimits(ratio_from=0, ratio=1)
    with wrapped(data) as file:
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises((CorruptImage, UnsafeImage)):
            unwrap(file, limits=limits)
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- control ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [gzip.compress(bytes(40 * MiB), mtime=0), tar(disk=noise(MiB) * 40), zipped(disk=bytes(40 * MiB))],
    ids=["gzip", "tar", "zip"],
)
def test_progress_goes_up_to_the_total(data: bytes, wrapped: Callable[..., LocalFile]) -> None:
    seen: list[Progress] = []
    with wrapped(data) as file:
        unwrap(file, control=Control(seen.append)).close()
    assert {one.phase for one in seen} == {"unpack"}
    assert len(seen) >= 3
    assert seen == sorted(seen, key=lambda one: one.done)
    assert seen[-1].done == seen[-1].total == max(one.total for one in seen)


def test_a_wish_to_stop_is_heard(wrapped: Callable[..., LocalFile], no_leftovers: Path) -> None:
    stop = threading.Event()

    def on_progress(progress: Progress) -> None:
        stop.set()

    with wrapped(gzip.compress(bytes(64 * MiB))) as file, pytest.raises(Cancelled):
        unwrap(file, folder=no_leftovers, control=Control(on_progress, stop))


# --- what is a wrapper -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (gzip.compress(b"", mtime=0), "gzip"),
        (lzma.compress(b""), "xz"),
        (bz2.compress(b""), "bzip2"),
        (bz2.compress(b"x"), "bzip2"),
        (zstd.compress(b""), "zstd"),
        (zipped(), "zip"),
        (zipped(disk=b"x"), "zip"),
        (b"PK\x07\x08" + zipped(disk=b"x"), "zip"),
        (tar(disk=b"x"), "tar"),
        (tar(**{"web.ovf": b"x"}), "ova"),
        (tar(**{"./web.OVF": b"x"}), "ova"),
        (tar(**{"disk.vmdk": b"", "web.ovf": b"x"}), "tar"),
    ],
)
def test_a_wrapper_is_known_by_its_content(data: bytes, kind: str) -> None:
    assert detect(MemoryFile(data, "disk.raw")) == kind


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x1f\x8b",
        b"\x1f\x8b\x00" + bytes(600),
        b"BZh0" + b"1AY&SY",
        b"BZh9 and some text" + bytes(600),
        b"\xfd7zXY" + bytes(600),
        bytes(257) + b"ustar\x0000" + bytes(300),
        tar_archives.header(b"disk", checksum_off_by=1) + bytes(1024),
        bytes(1024) + gzip.compress(b"x"),
    ],
    ids=["empty", "short", "method", "level", "text", "xz", "no checksum", "checksum", "not at 0"],
)
def test_what_only_looks_like_one_is_none(data: bytes) -> None:
    assert detect(MemoryFile(data, "disk.gz")) is None


def test_a_disk_image_is_never_taken_for_a_wrapper() -> None:
    images = [
        qcow2_images.make(qcow2_images.Recipe(size=MiB, clusters={0: qcow2_images.Plain(gzip.compress(DISK))})).data,
        vhd_images.Footer(size=MiB).bytes() + bytes(MiB),
        bytes(MiB) + vhd_images.Footer(size=MiB, disk_type=2).bytes(),
        *(bytes(offset) + magic + noise(600) for _, offset, magic in NAMED_ONLY),
        noise(510) + b"\x55\xaa" + noise(9000),
    ]
    assert [detect(MemoryFile(image)) for image in images] == [None] * len(images)


def test_a_file_that_is_a_wrapper_and_a_disk_image_is_refused(wrapped: Callable[..., LocalFile]) -> None:
    """A tar's first bytes are a name: one that is a qcow2's header."""
    image = qcow2_images.make(qcow2_images.Recipe(size=MiB)).data
    polyglot = tar_archives.member(image[:100].rstrip(b"\0"), DISK) + tar_archives.END
    assert detect(MemoryFile(polyglot)) == "tar"
    with pytest.raises(UnsafeImage, match="the file is tar, and a disk image: qcow2") as caught:
        unwrapped(wrapped(polyglot))
    assert caught.value.rule == "ambiguous"


def test_a_packed_disk_image_in_which_a_wrapper_hides_is_refused_too(wrapped: Callable[..., LocalFile]) -> None:
    image = qcow2_images.make(qcow2_images.Recipe(size=MiB)).data
    polyglot = tar_archives.member(image[:100].rstrip(b"\0"), DISK) + tar_archives.END
    with pytest.raises(UnsafeImage) as caught:
        unwrapped(wrapped(gzip.compress(polyglot)))
    assert caught.value.rule == "ambiguous"


def test_what_is_no_wrapper_is_said_to_be_none(wrapped: Callable[..., LocalFile]) -> None:
    with wrapped(DISK) as file, pytest.raises(UnknownFormat, match="no archive and not packed"):
        unwrap(file)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("disk.vhd", True),
        ("a/b/DISK.QCOW2", True),
        ("a\\b\\disk.vhdx", True),
        ("disk.raw.xz", True),
        ("web.ova", True),
        ("web.ova.gz", True),
        ("readme.txt", False),
        ("readme.txt.gz", False),
        ("vhd", False),
        ("disk.vhd/readme", False),
    ],
)
def test_a_disk_is_known_among_others_by_its_suffix(name: str, is_one: bool) -> None:
    assert is_disk_name(name) is is_one


def test_any_bytes_make_a_decision_and_nothing_worse(tmp_path: Path) -> None:
    """Parts of archives in any order and damaged anywhere: an answer or an error of ours, always."""
    random_source = random.Random(7)
    seeds = [packer(DISK) for packer in PACKERS.values()]
    seeds += [tar(**{"web.ovf": b"<x/>", "disk.vmdk": DISK}), zipped(disk=DISK, other=b"x"), tar(disk=DISK)]
    for _ in range(300):
        data = bytearray(random_source.choice(seeds))
        for _ in range(random_source.randint(1, 8)):
            at = random_source.randrange(len(data))
            data[at] = random_source.choice([0, 1, 0x7F, 0x80, 0xFF])
        outcome(bytes(data[: random_source.randint(1, len(data))]), tmp_path)
