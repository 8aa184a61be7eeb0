"""What the hardware takes for the bare work, without a converter: the floor of a conversion.

``python -m tests.benchmarks.limits inflate QCOW2``    all clusters decoded by libdeflate on all cores
``python -m tests.benchmarks.limits write QCOW2 OUT``  as many bytes as those clusters hold, written from one buffer
``python -m tests.benchmarks.limits both QCOW2 OUT``   one after the other
``python -m tests.benchmarks.limits read FILE``        the whole file by preadv into one buffer that is used again

Each prints the seconds that the work itself took, without the start of the interpreter and the reading of tables.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

PIECE = 2 << 20
READ_PIECE = 128 << 10


def _clusters(path: str) -> tuple[int, list[tuple[int, int]], int]:
    """(cluster size, places of the compressed clusters, bytes of the plain ones)."""
    from imagekit.formats.files import LocalFile
    from imagekit.formats.qcow2 import FORMAT
    from imagekit.formats.qcow2_l2 import COMPRESSED, PLAIN

    image = FORMAT.open(LocalFile.open_source(path))
    with image:
        places: list[tuple[int, int]] = []
        plain = 0
        for run in image._runs(0, image.virtual_size):
            if run.kind == COMPRESSED:
                places += image.compressed_spans(run.entries)
            elif run.kind == PLAIN:
                plain += run.length
        return image.header.cluster_size, places, plain


def inflate(path: str) -> float:
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    import deflate

    cluster, places, _ = _clusters(path)
    fd = os.open(path, os.O_RDONLY)
    cores = len(os.sched_getaffinity(0))
    edges = [len(places) * part // cores for part in range(cores + 1)]

    def work(part: list[tuple[int, int]]) -> None:
        if sys.platform == "win32":
            raise RuntimeError("not there on Windows")
        for offset, length in part:
            deflate.deflate_decompress(os.pread(fd, length, offset), cluster)

    parts = [places[one:other] for one, other in pairwise(edges)]
    return _timed(lambda: _at_once(work, parts))


def write(path: str, out: str) -> float:
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    cluster, places, plain = _clusters(path)
    total = len(places) * cluster + plain
    data = memoryview(os.urandom(PIECE))
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def work() -> None:
        for at in range(0, total, PIECE):
            os.pwritev(fd, [data[: min(PIECE, total - at)]], at)

    return _timed(work)


def both(path: str, out: str) -> float:
    return inflate(path) + write(path, out)


def read(path: str) -> float:
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    buffer = bytearray(READ_PIECE)

    def work() -> None:
        for at in range(0, size, READ_PIECE):
            os.preadv(fd, [buffer], at)

    return _timed(work)


def _timed(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _at_once(work: Callable[[Any], None], parts: list[Any]) -> None:
    threads = [threading.Thread(target=work, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("the benchmark needs Linux")
    from imagekit.workers import keep_freed_memory

    keep_freed_memory()
    works: dict[str, Callable[..., float]] = {"inflate": inflate, "write": write, "both": both, "read": read}
    print(works[sys.argv[1]](*sys.argv[2:]))
