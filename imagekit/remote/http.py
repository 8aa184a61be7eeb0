"""Bytes of a resource over HTTP and HTTPS (RFC 9110), counted: ranges, resume, redirects within bounds.

A :class:`Resource` fetches ranges of one representation and refuses everything that would make it two: a whole answer
to a range, another size, another ETag or Last-Modified, content or transfer codings that change the bytes. What
drops or stalls is resumed where it stopped; an answer without a length is no answer.

Only the standard library. Not here: cookies, authentication other than by headers the caller passes; which proxy to
use is what imagekit.remote.proxies finds.
"""

from __future__ import annotations

import fnmatch
import http.client
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from imagekit.errors import SourceError, UnsafeImage, UsageError
from imagekit.formats.base import KiB
from imagekit.remote.proxies import Proxy, proxy_for

SCHEMES = ("http", "https")
READ = 256 * KiB
MAX_REDIRECTS = 5
REDIRECTS = frozenset((301, 302, 303, 307, 308))
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Answers that say: not now."""
PROGRESS = 64 * KiB
"""What an attempt must bring to count as progress: a server that drops after every byte is given up."""
SLOWEST = 4 * KiB
"""Bytes a second below which, after the time-out, a connection counts as stalled."""
USER_AGENT = "imagekit"


Exchange: TypeAlias = tuple[http.client.HTTPResponse, http.client.HTTPConnection]


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How far a fetch may go. ``timeout`` is in seconds, for connecting and for silence."""

    redirect_hosts: tuple[str, ...] = ()
    """Hosts, or patterns such as ``*.example.org``, that a redirect may lead to besides the host itself."""

    timeout: float = 30.0
    retries: int = 5
    """Attempts in a row that bring nothing, after which it fails."""

    pause: float = 0.5
    """Seconds before the first retry; doubled each time."""

    headers: Callable[[], Mapping[str, str]] = dict
    """Sent to the host of the first address only; asked anew for each request, since tokens expire."""

    context: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """Which representation it is: all ranges must be of the same."""

    size: int
    etag: str | None = None
    modified: str | None = None

    def differences(self, other: Version) -> list[str]:
        pairs = zip(("size", "ETag", "Last-Modified"), self._parts(), other._parts(), strict=True)
        return [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]

    def _parts(self) -> tuple[object, object, object]:
        return self.size, self.etag, self.modified


def check_url(url: str) -> SplitResult:
    """The parts of an address that may be fetched."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{shown(url)} is not an address: {error}") from None
    if parts.scheme not in SCHEMES or not host or re.search(r"[\x00-\x20\x7f]", url):
        raise UsageError(f"{shown(url)} is not an address to fetch from", hint="http://HOST/… or https://HOST/…")
    if parts.username is not None or parts.password is not None:
        raise UsageError("credentials in an address end up in logs", hint="leave out what stands before the @")
    return parts


def shown(url: str) -> str:
    """The address without what may be secret: its query, its credentials."""
    bare = url.split("#", 1)[0].split("?", 1)[0]
    scheme, separator, rest = bare.partition("://")
    authority, slash, path = rest.partition("/")
    return scheme + separator + authority.rpartition("@")[2] + slash + path


class Dropped(Exception):
    """A connection ended or stalled before its answer did; worth another attempt."""

    def __init__(self, why: str, *, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class Connections:
    """One open connection a thread and host, kept between requests; closing it wakes up who reads from one."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._own = threading.local()
        self._lock = threading.Lock()
        self._all: list[http.client.HTTPConnection] = []
        self._proxies: dict[tuple[str, str], Proxy | None] = {}
        self.closed = threading.Event()

    def get(self, parts: SplitResult) -> http.client.HTTPConnection:
        key = (parts.scheme, parts.netloc)
        mine: dict[tuple[str, str], http.client.HTTPConnection] = self._own.__dict__.setdefault("open", {})
        if key not in mine:
            mine[key] = self._new(parts)
            with self._lock:
                self._all.append(mine[key])
        with self._lock:
            if self.closed.is_set():
                raise SourceError("closed while it was fetched", path=parts.netloc)
        return mine[key]

    def _new(self, parts: SplitResult) -> http.client.HTTPConnection:
        proxy = self.proxy(parts)
        host, port = (parts.hostname or "", parts.port) if proxy is None else (proxy.host, proxy.port)
        timeout = self._options.timeout
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        context = self._options.context or ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        if proxy is not None:
            connection.set_tunnel(parts.hostname or "", parts.port, headers=proxy.headers)
        return connection

    def proxy(self, parts: SplitResult) -> Proxy | None:
        """The proxy that leads to that host; looked for once."""
        key = (parts.scheme, parts.netloc)
        if key not in self._proxies:
            self._proxies[key] = proxy_for(parts)
        return self._proxies[key]

    def target(self, parts: SplitResult) -> tuple[str, Mapping[str, str]]:
        """What a request asks its connection for, and the headers that a proxy needs besides."""
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = self.proxy(parts)
        if proxy is None or parts.scheme == "https":
            return path, {}
        return f"{parts.scheme}://{parts.netloc}{path}", proxy.headers

    def close(self) -> None:
        with self._lock:
            self.closed.set()
            opened, self._all = self._all, []
        for connection in opened:
            with suppress(OSError, AttributeError):
                connection.sock.shutdown(2)
            connection.close()


@dataclass(slots=True)
class Resource:
    """What one address leads to. Safe to share between threads."""

    url: str
    options: HttpOptions = field(default_factory=HttpOptions)
    version: Version | None = None
    """Set by the first answer."""

    label: str = ""
    """What it is called in messages; without one, the address."""

    def __post_init__(self) -> None:
        check_url(self.url)
        self.connections = Connections(self.options)

    connections: Connections = field(init=False, repr=False)

    @property
    def name(self) -> str:
        return self.label or shown(self.url)

    def close(self) -> None:
        self.connections.close()

    # --- what is fetched ---------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, length: int) -> Iterator[Answer]:
        """The first answer: the first ``length`` bytes, or all of it from a server without ranges."""
        attempts = Attempts(self.name, self.options, self.connections.closed)
        while True:
            try:
                answer = self._get(0, length)
                break
            except Dropped as error:
                attempts.failed(error)
        self.version = answer.version
        try:
            yield answer
        finally:
            answer.close()

    def fetch(self, offset: int, length: int, sink: Callable[[int, bytes], None]) -> None:
        """Give the bytes of a range to ``sink``, in order, each once, resuming as often as it takes."""
        end, attempts = offset + length, Attempts(self.name, self.options, self.connections.closed)
        while offset < end:
            began = offset
            try:
                with self._range(offset, end - offset) as answer:
                    for piece in answer.pieces():
                        sink(offset, piece)
                        offset += len(piece)
            except Dropped as error:
                attempts.failed(error, progress=offset - began)

    def _range(self, offset: int, length: int) -> Answer:
        answer = self._get(offset, length)
        try:
            if not answer.partial:
                raise self.refused("the server answered 200, all of it, to the request for a range")
            assert self.version is not None
            if changes := self.version.differences(answer.version):
                raise self.refused(f"changed while it was read: {'; '.join(changes)}")
        except BaseException:
            answer.close()
            raise
        return answer

    def _get(self, offset: int, length: int) -> Answer:
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        response, connection = self._followed("GET", headers)
        try:
            return Answer.judged(self, response, connection, offset, length)
        except BaseException:
            response.close()  # which has the socket, where the connection was to end with it
            connection.close()
            raise

    def _followed(self, method: str, headers: Mapping[str, str]) -> Exchange:
        url, first = self.url, urlsplit(self.url)
        for _ in range(MAX_REDIRECTS + 1):
            parts = urlsplit(url)
            own = self.options.headers() if parts.netloc == first.netloc and parts.scheme == first.scheme else {}
            response, connection = self._request(parts, method, {"User-Agent": USER_AGENT, **headers, **own})
            if response.status not in REDIRECTS:
                return response, connection
            target = response.getheader("Location") or ""
            response.close()
            connection.close()
            url = self._redirected(url, target)
        raise self.refused(f"more than {MAX_REDIRECTS} redirects")

    def _redirected(self, url: str, target: str) -> str:
        """Where a redirect leads, if it may: an image server must not choose which host of ours is asked."""
        new = urljoin(url, target)
        try:
            old, parts = urlsplit(url), check_url(new)
        except UsageError:
            raise self._redirect_refused(f"a redirect to {shown(new)!r}") from None
        if old.scheme == "https" and parts.scheme != "https":
            raise self._redirect_refused(f"a redirect from https to {shown(new)}")
        first = urlsplit(self.url)
        known = parts.hostname == first.hostname and (parts.port == first.port or parts.port is None)
        if not known and not any(fnmatch.fnmatch(parts.hostname or "", one) for one in self.options.redirect_hosts):
            raise self._redirect_refused(f"a redirect to another host, {parts.netloc}")
        return new

    def _redirect_refused(self, what: str) -> UnsafeImage:
        return UnsafeImage(
            f"refused by rule redirect: {what} — a server must not decide which other host is asked",
            rule="redirect",
            path=self.name,
            hint="where you know that host: --redirect-host HOST",
        )

    def _request(self, parts: SplitResult, method: str, headers: Mapping[str, str]) -> Exchange:
        connection = self.connections.get(parts)
        target, more = self.connections.target(parts)
        try:
            connection.request(method, target, headers={**headers, **more})
            response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise self.refused(f"the server's certificate: {error.verify_message}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise Dropped(_why(error)) from error
        if self.connections.closed.is_set():  # meanwhile: it may have been opened anew
            response.close()
            connection.close()
            raise self.refused("closed while it was fetched")
        return response, connection

    def refused(self, message: str, *, hint: str | None = None) -> SourceError:
        return SourceError(message, path=self.name, hint=hint or "fetch it with another program and compare")


class Attempts:
    """Counts attempts that brought nothing, and waits longer and longer between them, unless ``closed``."""

    def __init__(self, name: str, options: HttpOptions, closed: threading.Event) -> None:
        self._name = name
        self._options = options
        self._closed = closed
        self._failed = 0

    def failed(self, error: Dropped, *, progress: int = 0) -> None:
        self._failed = 1 if progress >= PROGRESS else self._failed + 1
        options = self._options
        if self._failed > options.retries:
            raise SourceError(
                f"cannot be fetched: {error} ({self._failed} attempts)", path=self._name, hint="try again later"
            ) from error
        wait = max(error.wait, options.pause * 2 ** (self._failed - 1))
        self._closed.wait(min(wait, options.timeout))


@dataclass(slots=True)
class Answer:
    """An answer whose head was believed: what is left is to count its bytes."""

    resource: Resource
    response: http.client.HTTPResponse
    connection: http.client.HTTPConnection
    partial: bool
    length: int | None
    """Bytes that must come; None: chunks, whose last one says so."""

    version: Version
    whole: bool = False
    """Whether all of it was read."""

    @classmethod
    def judged(
        cls,
        resource: Resource,
        response: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        offset: int,
        length: int,
    ) -> Answer:
        """What the head of the answer to the request for a range promises, or the refusal of it."""
        status = response.status
        if status in RETRIED:
            raise Dropped(f"{status} {response.reason}", wait=_retry_after(response))
        if status == 416:
            return cls._beyond(resource, response, connection, offset)
        if status not in (200, 206):
            hint = {401: "credentials are needed", 403: "it may not be read", 404: "check the address"}.get(status)
            raise resource.refused(f"the server answered {status} {response.reason}", hint=hint)
        for header in ("Content-Encoding", "Transfer-Encoding"):
            coding = (response.getheader(header) or "identity").strip().lower()
            if coding != "identity" and (header, coding) != ("Transfer-Encoding", "chunked"):
                raise resource.refused(f"{header} {coding!r}: the bytes that come are not those of the image")
        stated = _length(resource, response)
        tags = response.getheader("ETag"), response.getheader("Last-Modified")
        if status == 200:
            if stated is None and not response.chunked:
                raise resource.refused("an answer without Content-Length: nobody could tell when it is complete")
            return cls(
                resource, response, connection, False, stated, Version(-1 if stated is None else stated, *tags)
            )
        start, end, total = _content_range(resource, response)
        if start != offset or not start <= end < min(offset + length, total):
            asked = f"{offset}-{offset + length - 1}"
            raise resource.refused(f"asked for bytes {asked}, the server answered with {start}-{end}/{total}")
        if stated is not None and stated != end + 1 - start:
            raise resource.refused(f"Content-Length {stated} of a range of {end + 1 - start} bytes")
        return cls(resource, response, connection, True, end + 1 - start, Version(total, *tags))

    @classmethod
    def _beyond(
        cls,
        resource: Resource,
        response: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        offset: int,
    ) -> Answer:
        """416: what was asked for is not there; of an empty file nothing is."""
        total = (response.getheader("Content-Range") or "").strip()
        if offset == 0 and total == "bytes */0":
            return cls(resource, response, connection, True, 0, Version(0))
        raise resource.refused(f"the server has no byte {offset} (416, {total or 'without a size'})")

    def pieces(self) -> Iterator[bytes]:
        """The body; Dropped when it ends, or stalls, before all of it came."""
        left, started, got = self.length, time.monotonic(), 0
        while left is None or left > 0:
            try:
                piece = self.response.read1(READ if left is None else min(READ, left))
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                raise Dropped(_why(error)) from error
            if not piece:
                if left is None:
                    break
                raise Dropped(f"the connection ended {left} bytes early")
            got += len(piece)
            left = None if left is None else left - len(piece)
            yield piece
            if time.monotonic() - started > self.resource.options.timeout + got / SLOWEST:
                raise Dropped(f"less than {SLOWEST} bytes a second")
        self.whole = True

    def close(self) -> None:
        self.response.close()
        if not self.whole:  # what is left of it would be taken for the next answer
            self.connection.close()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _length(resource: Resource, response: http.client.HTTPResponse) -> int | None:
    texts = {text.strip() for text in response.headers.get_all("Content-Length") or ()}
    if not texts:
        return None
    text = texts.pop()
    if texts or not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise resource.refused("Content-Length is not one whole number")
    return int(text)


_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


def _content_range(resource: Resource, response: http.client.HTTPResponse) -> tuple[int, int, int]:
    text = (response.getheader("Content-Range") or "").strip()
    found = _RANGE.fullmatch(text)
    if found is None:
        raise resource.refused(f"the answer to a range has Content-Range {text!r}")
    start, end, total = map(int, found.groups())
    return start, end, total


def _retry_after(response: http.client.HTTPResponse) -> float:
    text = (response.getheader("Retry-After") or "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 5 else 0.0


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "time-out"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
