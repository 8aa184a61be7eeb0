"""Conversions over a network that is slow in two ways: every request waits, and all of them share a rate.

``python -m tests.benchmarks.network serve FILE`` serves one file on this computer, with ranges, each answer 50 ms
late and all bytes together at 100 MB/s, and prints its address. What ours is held to is the slower of its two halves,
the download alone (curl) and the conversion of the local file: done at once they should take little more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.benchmarks import installed
from tests.benchmarks.cases import Case
from tests.benchmarks.contenders import OURS
from tests.benchmarks.measure import Contender, Run, rounds

PREFIX = "http, "
LATENCY = 0.05
RATE = 100e6
SLICE = 128 << 10
SLOWER_HALF = "max(download, own)"
DOWNLOAD = "curl"
CONVERT = "imagekit, local"
IN_TURN = "curl, then qemu-img"
GOALS = {SLOWER_HALF: 1 / 1.1, DOWNLOAD: 0, CONVERT: 0, IN_TURN: 1.1}
QEMU_FORMATS = {"vhd": "vpc,subformat=dynamic,force_size=on", "vhdx": "vhdx,subformat=dynamic"}
CHECKED = "--checksum"

CASES = [
    Case(f"{PREFIX}qcow2 zlib → vhdx", "zlib.qcow2", "vhdx", GOALS, rounds=3, peak=128, quick=True),
    Case(f"{PREFIX}qcow2 zlib → vhdx, sha256", "zlib.qcow2", "vhdx", GOALS, (CHECKED,), rounds=3, peak=128),
    Case(f"{PREFIX}qcow2 plain → vhd", "plain.qcow2", "vhd", GOALS, rounds=3, peak=128),
]


def is_over_network(case: Case) -> bool:
    return case.name.startswith(PREFIX)


def measured(case: Case, source: Path, folder: Path, count: int, said: Callable[[str], None]) -> dict[str, list[Run]]:
    """All contenders of a case, in turn, and the slower half of each round."""
    if shutil.which("curl") is None:
        sys.exit("curl is needed: apt-get install curl")
    with served(source) as url:
        runs = rounds(_contenders(case, source, url, folder), count, said)
    halves = zip(runs[DOWNLOAD], runs[CONVERT], strict=True)
    slower = [max(pair, key=lambda run: run.wall) for pair in halves]
    return {OURS: runs[OURS], SLOWER_HALF: slower, **runs}


def _contenders(case: Case, source: Path, url: str, folder: Path) -> list[Contender]:
    imagekit = installed.command()
    ours, theirs, fetched = (folder / f"{name}.{case.target}" for name in ("ours", "theirs", "fetched"))
    convert = (imagekit, "convert", "-q", "--no-sync")
    options: tuple[str, ...] = ()
    if CHECKED in case.options:
        options = (CHECKED, "sha256:" + _digest(source))
    kind, *stated = QEMU_FORMATS[case.target].split(",")
    told = (kind, "-o", ",".join(stated), str(fetched), str(theirs))
    script = 'curl -sf "$0" -o "$4" && qemu-img convert -m 16 -W -O "$@" && rm "$4"'
    return [
        Contender(OURS, (*convert, *options, url, str(ours)), ours),
        Contender(DOWNLOAD, ("curl", "-sf", url, "-o", str(fetched)), fetched),
        Contender(CONVERT, (*convert, *options, str(source), str(ours)), ours),
        Contender(IN_TURN, ("sh", "-c", script, url, *told), theirs),
    ]


def _digest(path: Path) -> str:
    done = subprocess.run(["sha256sum", str(path)], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()[0].removeprefix("\\")


# --- the server ------------------------------------------------------------------------------------------------


@contextmanager
def served(file: Path) -> Iterator[str]:
    """The address of the file, while a process of its own serves it."""
    command = [sys.executable, "-m", "tests.benchmarks.network", "serve", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


class Wire:
    """What all connections share: so many bytes a second, and no more."""

    def __init__(self, rate: float = RATE) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = 0.0

    def take(self, count: int) -> None:
        """Return when that many bytes have their turn."""
        with self._lock:
            start = max(self._free, time.monotonic())
            self._free = start + count / self._rate
        time.sleep(max(0.0, start - time.monotonic()))


def serve(path: Path, *, latency: float = LATENCY, rate: float = RATE) -> None:
    if sys.platform == "win32":
        sys.exit("the benchmark needs Linux")
    size, wire = path.stat().st_size, Wire(rate)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(latency)
            start, end = 0, size
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                first, last = asked.removeprefix("bytes=").split("-")
                start, end = int(first), min(int(last) + 1, size)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.flush()
            with path.open("rb") as file:
                while start < end:
                    wire.take(min(SLICE, end - start))
                    sent = os.sendfile(self.connection.fileno(), file.fileno(), start, min(SLICE, end - start))
                    start += sent

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is no error of the server's."""

    with Server(("127.0.0.1", 0), Handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/{path.name}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[2]))
