"""What Windows is asked about a file by FSCTL: where it holds data, and to share its clusters with another one.

Follows Microsoft's documentation of FSCTL_QUERY_ALLOCATED_RANGES (sparse files on NTFS and ReFS),
FSCTL_GET_INTEGRITY_INFORMATION and FSCTL_DUPLICATE_EXTENTS_TO_FILE (block cloning, ReFS only). The structures and the
loops around the calls are plain functions, tested everywhere. *The calls themselves are type-checked but were not run
on Windows.*

Block cloning wants offsets on whole clusters, less than 4 GiB a call, and a target that has its length already; a
sparse source wants a sparse target. Whatever it refuses is copied through a buffer instead.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

# CTL_CODE(FILE_DEVICE_FILE_SYSTEM, function, method, access)
QUERY_ALLOCATED_RANGES = 0x000940CF
GET_INTEGRITY_INFORMATION = 0x0009027C
DUPLICATE_EXTENTS_TO_FILE = 0x00098344
ERROR_MORE_DATA = 234

ALLOCATED_RANGE = struct.Struct("<qq")
"""FILE_ALLOCATED_RANGE_BUFFER: FileOffset, Length; the question, and each item of the answer."""

DUPLICATE_EXTENTS = struct.Struct("<Qqqq")
"""DUPLICATE_EXTENTS_DATA of 64-bit Windows: FileHandle, SourceFileOffset, TargetFileOffset, ByteCount."""

INTEGRITY_INFORMATION = struct.Struct("<HHLLL")
"""ChecksumAlgorithm, Reserved, Flags, ChecksumChunkSizeInBytes, ClusterSizeInBytes."""

RANGES_AT_ONCE = 1024
CLONE_STEP = 1 << 31

Query: TypeAlias = Callable[[bytes], tuple[bytes, bool]]
"""FSCTL_QUERY_ALLOCATED_RANGES: (answer, whether there is more)."""


def allocated_ranges(query: Query, offset: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is allocated between the two, in order."""
    while offset < end:
        answer, more = query(ALLOCATED_RANGE.pack(offset, end - offset))
        after = offset
        for start, length in ALLOCATED_RANGE.iter_unpack(answer[: len(answer) // ALLOCATED_RANGE.size * 16]):
            low, high = max(start, after), min(start + length, end)
            if low < high:
                yield low, high - low
                after = high
        if not more:
            return
        if after == offset:
            yield offset, end - offset  # more, and nothing new: it cannot tell
            return
        offset = after


def clone_steps(offset: int, target_offset: int, length: int, cluster: int) -> Iterator[tuple[int, int, int]]:
    """(offset, target offset, count) of the calls that share whole clusters; none where the offsets forbid it."""
    if cluster <= 0 or offset % cluster or target_offset % cluster:
        return
    whole = length // cluster * cluster
    for done in range(0, whole, CLONE_STEP):
        yield offset + done, target_offset + done, min(CLONE_STEP, whole - done)


if sys.platform == "win32":
    import ctypes
    import msvcrt
    from ctypes import wintypes

    _KERNEL32 = ctypes.WinDLL("kernel32", use_last_error=True)

    def _control(fd: int, code: int, question: bytes, room: int) -> tuple[bytes, int]:
        """(answer, error code) of DeviceIoControl; the error is 0 when it worked."""
        answer, returned = ctypes.create_string_buffer(max(room, 1)), wintypes.DWORD()
        handle = wintypes.HANDLE(msvcrt.get_osfhandle(fd))
        done = _KERNEL32.DeviceIoControl(
            handle, wintypes.DWORD(code), question, len(question), answer, room, ctypes.byref(returned), None
        )
        return answer.raw[: returned.value], 0 if done else ctypes.get_last_error()

    def data_ranges(fd: int, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """What may hold data; all of it where the file system cannot tell."""

        def query(question: bytes) -> tuple[bytes, bool]:
            answer, error = _control(fd, QUERY_ALLOCATED_RANGES, question, RANGES_AT_ONCE * ALLOCATED_RANGE.size)
            return (answer, error == ERROR_MORE_DATA) if error in (0, ERROR_MORE_DATA) else (question, False)

        return allocated_ranges(query, offset, end)

    def clone(source: int, offset: int, target: int, target_offset: int, length: int) -> int:
        """Share clusters between two files of one ReFS volume; returns the bytes done, 0 when it cannot."""
        answer, error = _control(target, GET_INTEGRITY_INFORMATION, b"", INTEGRITY_INFORMATION.size)
        if error or len(answer) < INTEGRITY_INFORMATION.size:
            return 0  # no ReFS
        cluster, done = INTEGRITY_INFORMATION.unpack(answer)[4], 0
        handle = msvcrt.get_osfhandle(source)
        for at, to, count in clone_steps(offset, target_offset, length, cluster):
            _, error = _control(target, DUPLICATE_EXTENTS_TO_FILE, DUPLICATE_EXTENTS.pack(handle, at, to, count), 0)
            if error:
                break
            done += count
        return done
