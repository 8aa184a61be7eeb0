"""An HTTP server on this computer that serves one image, and misbehaves on request: the ways of real networks.

A fault is given the number of the request (from 0) and decides about that one answer.
"""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.servers import Quiet, running


@dataclass
class Answer:
    """What would be sent; a fault changes it. ``cut`` ends the connection after that many bytes of the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut: int | None = None
    stall: float = 0.0
    """Seconds of silence, after the bytes of ``cut``."""
    drip: float = 0.0
    """Seconds before each kilobyte."""


Fault = Callable[[int, Answer], None]


@dataclass
class Site:
    """The server, seen from a test."""

    content: bytes
    fault: Fault | None = None
    ranges: bool = True
    etag: str | None = '"one"'
    latency: float = 0.0
    tls: ssl.SSLContext | None = None
    address: str = ""
    requests: list[str] = field(default_factory=list)
    """The Range header of each request, in order."""

    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    other: dict[str, bytes] = field(default_factory=dict)
    """Other paths, and what they hold."""

    sent: int = 0

    @property
    def url(self) -> str:
        return f"{self.address}/image.qcow2"


@contextmanager
def serve(content: bytes, **options: Any) -> Iterator[Site]:
    site = Site(content, **options)
    lock = threading.Lock()

    class Handler(Quiet):
        def do_GET(self) -> None:
            with lock:
                number = len(site.requests)
                site.requests.append(self.headers.get("Range", ""))
                site.paths.append(self.path)
                site.headers.append(dict(self.headers))
            if site.latency:
                time.sleep(site.latency)
            answer = self.honest()
            if site.fault is not None:
                site.fault(number, answer)
            self.send(answer)

        def honest(self) -> Answer:
            content = site.other.get(self.path, site.content)
            headers = {"ETag": site.etag} if site.etag else {}
            asked = self.headers.get("Range", "")
            if not (site.ranges and asked.startswith("bytes=")):
                return Answer(200, headers, content)
            first, last = (int(one) for one in asked.removeprefix("bytes=").split("-"))
            if first >= len(content):
                return Answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            body = content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
            return Answer(206, headers, body)

        def send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            site.sent += len(answer.body[: answer.cut])  # before the client can have them
            try:
                if answer.drip:
                    for at in range(0, len(answer.body), 1024):
                        time.sleep(answer.drip)
                        self.wfile.write(answer.body[at : at + 1024])
                self.wfile.write(answer.body[: answer.cut] if not answer.drip else b"")
                self.wfile.flush()
                if answer.cut is not None:
                    time.sleep(answer.stall)
                    self.close_connection = True
                    self.connection.shutdown(2)
            except OSError:
                self.close_connection = True

    with running(Handler, tls=site.tls) as address:
        site.address = f"http://{address}"
        yield site


# --- faults ----------------------------------------------------------------------------------------------------


def only(numbers: range, fault: Callable[[Answer], None]) -> Fault:
    """The fault, in those requests only."""

    def some(number: int, answer: Answer) -> None:
        if number in numbers:
            fault(answer)

    return some


def drops(after: int, *, stall: float = 0.0) -> Callable[[Answer], None]:
    def fault(answer: Answer) -> None:
        answer.cut, answer.stall = min(after, len(answer.body)), stall

    return fault


def answers(status: int, **headers: str) -> Callable[[Answer], None]:
    """Another status, without a body."""

    def fault(answer: Answer) -> None:
        answer.status, answer.body = status, b""
        answer.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    return fault


def states(**headers: str) -> Callable[[Answer], None]:
    """Other headers; an empty one is left out."""

    def fault(answer: Answer) -> None:
        answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}

    return fault


def compresses(answer: Answer) -> None:
    answer.body = gzip.compress(answer.body)
    answer.headers["Content-Encoding"] = "gzip"
