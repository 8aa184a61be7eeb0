"""Encoders: what readers with less memory than ours can decode too."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagekit.formats.base import Buffer
from imagekit.formats.decoders import Decoder, raw_inflater, unzstd
from imagekit.formats.encoders import DEFLATE_WINDOW_LOG, Encoder, deflate_raw, zstd
from tests.disks import noise, text

UNIT = 1 << 16

each_codec = pytest.mark.parametrize(
    ("encode", "decode"), [(deflate_raw, raw_inflater()), (zstd, unzstd)], ids=["deflate", "zstd"]
)


def far_matches(length: int) -> bytes:
    """What repeats only at distances that a small window does not reach, and at some that it does."""
    chance = random.Random(1)
    out = bytearray(chance.randbytes(6000))
    while len(out) < length:
        back = chance.choice([100, 4000, 4096, 5000, 6000])
        start = max(0, len(out) - back)
        out += out[start : start + chance.randint(10, 300)]
    return bytes(out[:length])


UNITS = {
    "noise": noise(UNIT),
    "text": text(UNIT),
    "zeros": bytes(UNIT),
    "far": far_matches(UNIT),
    "2 MiB": far_matches(1 << 21),
    "a byte": b"x",
    "nothing": b"",
}


@each_codec
@pytest.mark.parametrize("data", UNITS.values(), ids=UNITS)
def test_what_is_encoded_decodes_to_itself(encode: Encoder, decode: Decoder, data: bytes) -> None:
    assert decode(encode(data), len(data)) == data


@each_codec
@given(st.binary(max_size=3000), st.integers(1, 40))
def test_any_bytes_decode_to_themselves(encode: Encoder, decode: Decoder, data: bytes, times: int) -> None:
    assert decode(encode(data * times), len(data) * times) == data * times


@pytest.mark.parametrize("data", UNITS.values(), ids=UNITS)
def test_a_deflate_stream_needs_no_more_than_the_window_that_readers_keep(data: bytes) -> None:
    """zlib refuses a match from further back than the window it was told."""
    reader = zlib.decompressobj(-DEFLATE_WINDOW_LOG)
    assert reader.decompress(deflate_raw(data)) == data
    assert (reader.eof, reader.unused_data) == (True, b"")


def test_a_larger_window_would_not_do() -> None:
    """The test above can fail: the same data with zlib's usual window is refused."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    stream = packer.compress(UNITS["far"]) + packer.flush()
    with pytest.raises(zlib.error, match="too far back"):
        zlib.decompressobj(-DEFLATE_WINDOW_LOG).decompress(stream)


@each_codec
def test_what_compresses_gets_smaller(encode: Encoder, decode: Decoder) -> None:
    assert len(encode(text(UNIT))) < UNIT // 20
    assert len(encode(bytes(UNIT))) < 100


@each_codec
def test_the_same_bytes_come_out_in_any_thread_and_from_any_buffer(encode: Encoder, decode: Decoder) -> None:
    data = far_matches(UNIT)
    expected = encode(data)
    found: list[bytes] = []

    def work(buffer: Buffer) -> Callable[[], None]:
        return lambda: found.append(encode(buffer))

    threads = [threading.Thread(target=work(kind(data))) for kind in (bytes, bytearray, memoryview) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 9
