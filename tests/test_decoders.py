"""Decoders yield exactly the length asked for, or an error: never less, never zeros, never more memory."""

from __future__ import annotations

import sys
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.errors import CorruptImage
from imagekit.formats.base import Buffer
from imagekit.formats.decoders import Decoder, inflate_raw_zlib, raw_inflater, unzstd
from tests.disks import noise, text

if sys.version_info >= (3, 14):
    from compression import zstd as _zstd
else:
    from backports import zstd as _zstd

zstd: Any = _zstd
UNIT = 65536


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    return packer.compress(data) + packer.flush()


def zstd_frame(data: bytes) -> bytes:
    packed: bytes = zstd.compress(data)
    return packed


Encoder = Callable[[bytes], bytes]


def without(*modules: str) -> Decoder:
    """The inflater that is chosen where these modules are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module, None)
        return raw_inflater.__wrapped__()


by_libdeflate, by_isal, by_zlib = without(), without("deflate"), without("deflate", "isal")
INFLATERS = (by_libdeflate, by_isal, by_zlib)
CODECS = [
    pytest.param(by_libdeflate, deflate, id="libdeflate"),
    pytest.param(by_isal, deflate, id="isal"),
    pytest.param(by_zlib, deflate, id="zlib"),
    pytest.param(unzstd, zstd_frame, id="zstd"),
]
each_decoder = pytest.mark.parametrize(("decode", "encode"), CODECS)


def test_the_fastest_inflater_that_is_installed_is_chosen_once() -> None:
    """libdeflate, else ISA-L, else zlib; all three are installed for the tests."""
    assert [decode.__name__ for decode in INFLATERS] == [
        "inflate_raw_libdeflate",
        "inflate_raw_isal",
        "inflate_raw_zlib",
    ]
    assert by_zlib is inflate_raw_zlib
    assert raw_inflater() is raw_inflater()


@each_decoder
@pytest.mark.parametrize(
    "data", [noise(UNIT), text(UNIT), bytes(UNIT), b"x"], ids=["noise", "text", "zeros", "a byte"]
)
def test_a_unit_comes_back_as_it_was(decode: Decoder, encode: Encoder, data: bytes) -> None:
    assert decode(encode(data), len(data)) == data


@each_decoder
def test_each_decoder_yields_exactly_the_length_asked_for_or_an_error(decode: Decoder, encode: Encoder) -> None:
    """One byte less and one byte more than the stream holds are both damage, whatever the content."""
    for data in (noise(UNIT), text(UNIT), bytes(UNIT)):
        stream = encode(data)
        with pytest.raises(CorruptImage, match=f"{UNIT + 1} bytes expected, only {UNIT} found"):
            decode(stream, UNIT + 1)
        with pytest.raises(CorruptImage, match=f"{UNIT - 1} bytes expected, more found"):
            decode(stream, UNIT - 1)


@each_decoder
def test_junk_behind_the_stream_is_ignored(decode: Decoder, encode: Encoder) -> None:
    """Streams are padded to sectors, and the rest of the last sector may hold anything."""
    for junk in (bytes(511), noise(511), encode(b"another")):
        assert decode(encode(text(UNIT)) + junk, UNIT) == text(UNIT)


@each_decoder
def test_a_stream_cut_before_its_unit_is_complete_is_damage(decode: Decoder, encode: Encoder) -> None:
    """Cut anywhere: either the whole unit is there, or an error. Never a part, never zeros instead."""
    data = text(2000) + noise(500)
    stream = encode(data)
    complete = 0
    for length in range(len(stream)):
        try:
            out = decode(stream[:length], len(data))
        except CorruptImage:
            continue
        assert out == data
        complete += 1
    assert complete < 20


def test_a_deflate_stream_that_lacks_only_its_end_is_taken() -> None:
    """The whole unit came out before the stream stopped: QEMU reads such clusters, so they exist."""
    data = noise(UNIT)
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    endless = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
    for decode in INFLATERS:
        assert decode(endless, UNIT) == data


@each_decoder
def test_an_empty_stream_is_damage(decode: Decoder, encode: Encoder) -> None:
    with pytest.raises(CorruptImage):
        decode(b"", UNIT)


@each_decoder
def test_bytes_that_are_no_stream_are_damage(decode: Decoder, encode: Encoder) -> None:
    with pytest.raises(CorruptImage):
        decode(b"\xff" * 512, UNIT)


@each_decoder
@given(at=st.integers(0, 400), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_the_length(decode: Decoder, encode: Encoder, at: int, bit: int) -> None:
    """There is no checksum in these streams: the content may differ, but it is a whole unit or an error."""
    stream = bytearray(encode(text(3000) + noise(300)))
    stream[at % len(stream)] ^= 1 << bit
    try:
        out = decode(stream, 3300)
    except CorruptImage:
        return
    assert len(out) == 3300


@given(st.binary(max_size=200), st.integers(1, 600))
def test_all_inflaters_agree_on_any_bytes(stream: bytes, length: int) -> None:
    def outcome(decode: Decoder) -> bytes | None:
        try:
            return bytes(decode(stream, length))
        except CorruptImage:
            return None

    assert len({outcome(decode) for decode in INFLATERS}) == 1


@each_decoder
def test_a_stream_that_would_go_on_a_hundred_times_longer_costs_one_unit(decode: Decoder, encode: Encoder) -> None:
    """A decompression bomb is refused after one unit and a byte."""
    bomb = encode(bytes(100 * UNIT))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptImage):
            decode(bomb, UNIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * UNIT


@each_decoder
def test_any_kind_of_buffer_is_taken(decode: Decoder, encode: Encoder) -> None:
    stream = encode(text(UNIT))
    buffers: list[Buffer] = [stream, bytearray(stream), memoryview(bytes(7) + stream)[7:]]
    for buffer in buffers:
        assert decode(buffer, UNIT) == text(UNIT)


# --- zstd alone ------------------------------------------------------------------------------------------------


def test_a_unit_may_be_spread_over_zstd_frames() -> None:
    frames = zstd_frame(text(1000, 1)) + zstd_frame(b"") + zstd_frame(noise(500)) + zstd_frame(text(7, 2))
    assert unzstd(frames, 1507) == text(1000, 1) + noise(500) + text(7, 2)
    with pytest.raises(CorruptImage, match="1508 bytes expected, only 1507 found"):
        unzstd(frames, 1508)
    with pytest.raises(CorruptImage, match="1502 bytes expected, more found"):
        unzstd(frames, 1502)


def test_frames_without_end_that_hold_nothing_are_damage() -> None:
    with pytest.raises(CorruptImage, match="1507 bytes expected, only 0 found"):
        unzstd(zstd_frame(b"") * 5000, 1507)


def test_a_zstd_frame_with_a_wrong_checksum_is_damage() -> None:
    frame = bytearray(zstd.compress(text(UNIT), options={zstd.CompressionParameter.checksum_flag: 1}))
    assert unzstd(bytes(frame), UNIT) == text(UNIT)
    frame[-1] ^= 1
    with pytest.raises(CorruptImage, match="damaged"):
        unzstd(frame, UNIT)


def test_a_zstd_window_larger_than_any_cluster_needs_is_refused() -> None:
    """The window is memory that the image asks for, in every thread."""
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    frame = packer.compress(noise(UNIT)) + packer.flush()
    with pytest.raises(CorruptImage, match="damaged"):
        unzstd(frame, UNIT)
