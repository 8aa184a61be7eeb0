"""Files over HTTP: what a network, or a server, does wrong is mended or refused, and never a short file."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagekit.errors import Cancelled, SourceError, UnsafeImage, UsageError
from imagekit.formats.files import LocalFile
from imagekit.progress import Control
from imagekit.remote.arriving import PIECE, Arriving
from imagekit.remote.file import RemoteFile
from imagekit.remote.http import HttpOptions, shown
from imagekit.remote.stream import StreamFile
from tests.disks import noise
from tests.web import Answer, Site, answers, compresses, drops, only, serve, states

CONTENT = noise(3 * PIECE + 12345, 1)
QUICK = HttpOptions(timeout=0.5, retries=3, pause=0.01)
LATER = range(1, 1000)
ALWAYS = range(1000)


def fetched(site: Site, options: HttpOptions = QUICK, **more: Any) -> bytes:
    with RemoteFile.open(site.url, options, **more) as file:
        return file.pread(0, file.size)


def test_whatever_reads_a_local_file_waits_for_a_remote_one() -> None:
    """A way to read that LocalFile gains, and that would see the parts not fetched yet, must be thought of here."""
    harmless = {"open_source", "open_for_change", "pwrite", "truncate", "preallocate", "flush"}
    harmless |= {"size_so_far"}
    ways = {name for name in vars(LocalFile) if not name.startswith("_")} - harmless
    assert ways - set(vars(Arriving)) - set(vars(RemoteFile)) == set()
    assert ways - set(vars(Arriving)) - set(vars(StreamFile)) == set()


def test_all_bytes_arrive_from_a_server_with_ranges() -> None:
    with serve(CONTENT) as site:
        assert fetched(site) == CONTENT
        assert site.sent == len(CONTENT)


def test_only_what_is_read_is_fetched() -> None:
    content = noise(40 * PIECE, 2)
    with serve(content) as site, RemoteFile.open(site.url, QUICK) as file:
        assert file.pread(30 * PIECE + 5, 100) == content[30 * PIECE + 5 :][:100]
        assert file.pread(len(content) - 7, 100) == content[-7:]
        assert file.fileno() is None
        assert site.sent == 3 * PIECE


def test_a_byte_that_is_read_twice_is_fetched_once() -> None:
    with serve(CONTENT) as site, RemoteFile.open(site.url, QUICK) as file:
        assert file.pread(0, len(CONTENT)) == file.pread(0, len(CONTENT)) == CONTENT
        assert site.sent == len(CONTENT)


def test_a_reader_that_goes_forward_finds_its_bytes_there_already() -> None:
    content = noise(30 * PIECE, 3)
    with serve(content, latency=0.02) as site, RemoteFile.open(site.url, QUICK) as file:
        for at in range(0, 4 * PIECE, PIECE):
            file.pread(at, PIECE)
        deadline = time.monotonic() + 10
        while file.fetched < len(content) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.fetched == len(content)
        assert len(site.requests) < 15


def test_threads_share_a_file() -> None:
    content = noise(12 * PIECE, 4)
    wrong: list[int] = []
    with serve(content, latency=0.005) as site, RemoteFile.open(site.url, QUICK) as file:

        def read(start: int) -> None:
            for at in range(start, len(content), 3 * 100_000):
                if file.pread(at, 100_000) != content[at : at + 100_000]:
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(number * 100_000,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (wrong, site.sent) == ([], len(content))


def test_completing_feeds_digests_in_order_and_gives_a_descriptor() -> None:
    content = noise(9 * PIECE + 1, 5)
    digest = hashlib.sha256()
    with serve(content) as site, RemoteFile.open(site.url, QUICK) as file:
        file.pread(7 * PIECE, 10)
        file.complete(digest)
        assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
        assert file.fileno() is not None
        assert site.sent == len(content)


def test_a_server_without_ranges_is_staged_when_it_is_opened() -> None:
    with serve(CONTENT, ranges=False) as site, RemoteFile.open(site.url, QUICK) as file:
        assert (file.ranges, file.fetched) == (False, len(CONTENT))
        assert file.pread(0, file.size) == CONTENT
        assert len(site.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_is_empty(ranges: bool) -> None:
    with serve(b"", ranges=ranges) as site, RemoteFile.open(site.url, QUICK) as file:
        assert (file.size, file.pread(0, 10)) == (0, b"")
        file.complete()


# --- the network ----------------------------------------------------------------------------------------------


MENDED: dict[str, Any] = {
    "drops in the first answer": only(range(1), drops(100_000)),
    "drops in a later answer": only(range(1, 2), drops(300_000)),
    "drops every time, after progress": only(ALWAYS, drops(200_000)),
    "drops at once, twice": only(range(1, 3), drops(0)),
    "stalls": only(range(1, 2), drops(1000, stall=1.5)),
    "500, then well": only(range(2), answers(500)),
    "503 with Retry-After": only(range(1, 3), answers(503, Retry_After="0")),
    "429": only(range(1, 2), answers(429)),
}


@pytest.mark.parametrize("fault", MENDED.values(), ids=MENDED)
def test_what_stops_is_resumed_where_it_stopped(fault: Callable[[int, Answer], None]) -> None:
    with serve(CONTENT, fault=fault) as site:
        assert fetched(site) == CONTENT
        assert len(site.requests) >= 2


def test_without_ranges_a_drop_starts_again_from_the_beginning() -> None:
    with serve(CONTENT, ranges=False, fault=only(range(2), drops(500_000))) as site:
        assert fetched(site) == CONTENT
        assert len(site.requests) == 3


def changes_size(answer: Answer) -> None:
    answer.headers["Content-Range"] = answer.headers["Content-Range"].split("/")[0] + f"/{len(CONTENT) + 1}"


def sends_all(answer: Answer) -> None:
    answer.status, answer.body = 200, CONTENT
    del answer.headers["Content-Range"]


def shifts(answer: Answer) -> None:
    start, end = answer.headers["Content-Range"][6:].split("/")[0].split("-")
    answer.headers["Content-Range"] = f"bytes {int(start) + 1}-{int(end)}/{len(CONTENT)}"
    answer.body = answer.body[1:]


REFUSED: dict[str, tuple[Any, str]] = {
    "200 to a range": (only(LATER, sends_all), "answered 200"),
    "another size": (only(LATER, changes_size), "changed while it was read: size"),
    "another ETag": (only(LATER, states(ETag='"two"')), "changed while it was read: ETag"),
    "no ETag any more": (only(LATER, states(ETag="")), "changed while it was read: ETag"),
    "a Last-Modified": (only(LATER, states(Last_Modified="today")), "changed while it was read: Last-Modified"),
    "gzip": (only(LATER, compresses), "Content-Encoding 'gzip'"),
    "gzip at once": (only(ALWAYS, compresses), "Content-Encoding 'gzip'"),
    "transfer coding": (only(LATER, states(Transfer_Encoding="gzip, chunked")), "Transfer-Encoding"),
    "another range": (only(LATER, shifts), "the server answered with"),
    "no Content-Range": (only(LATER, states(Content_Range="")), "Content-Range ''"),
    "shorter than it says": (only(LATER, states(Content_Length="17")), "Content-Length 17 of a range"),
    "no number": (only(LATER, states(Content_Length="1e6")), "Content-Length is not one whole number"),
    "416": (only(LATER, answers(416, Content_Range="bytes */5")), "no byte"),
    "404": (only(LATER, answers(404)), "answered 404"),
    "401": (only(ALWAYS, answers(401)), "answered 401"),
    "500 for ever": (only(LATER, answers(500)), r"500 Internal Server Error \(4 attempts\)"),
    "drops for ever": (only(LATER, drops(10)), "bytes early"),
    "stalls for ever": (only(LATER, drops(10, stall=0.8)), "time-out"),
    "redirects for ever": (only(ALWAYS, answers(302, Location="/again")), "more than 5 redirects"),
    "redirects to nowhere": (only(ALWAYS, answers(302)), "more than 5 redirects"),
}


@pytest.mark.parametrize(("fault", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_another_file_is_refused(fault: Any, message: str) -> None:
    with serve(CONTENT, fault=fault) as site, pytest.raises(SourceError, match=message) as caught:
        fetched(site)
    assert caught.value.path == site.url


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (only(ALWAYS, states(Content_Length=str(len(CONTENT) + 1))), "no ranges to go on with"),
        (only(ALWAYS, drops(1000)), "no ranges to go on with"),
        (only(ALWAYS, compresses), "Content-Encoding"),
    ],
    ids=["longer than it says", "drops", "gzip"],
)
def test_without_ranges_what_is_not_whole_is_refused(fault: Any, message: str) -> None:
    with serve(CONTENT, ranges=False, fault=fault) as site, pytest.raises(SourceError, match=message):
        fetched(site)


def test_an_answer_without_a_length_is_refused() -> None:
    with (
        serve(CONTENT, ranges=False, fault=only(ALWAYS, states(Content_Length=""))) as site,
        pytest.raises(SourceError, match="without Content-Length"),
    ):
        fetched(site)


def test_a_size_other_than_the_one_expected_is_refused() -> None:
    with serve(CONTENT) as site, pytest.raises(SourceError, match="5 were expected"):
        fetched(site, expected=5)


def test_a_size_beyond_all_bounds_is_refused_before_room_is_made_for_it() -> None:
    huge = states(Content_Range=f"bytes 0-{PIECE - 1}/{1 << 62}")
    with serve(CONTENT, fault=only(ALWAYS, huge)) as site, pytest.raises(UnsafeImage) as caught:
        fetched(site)
    assert caught.value.rule == "remote-size"


def test_nobody_listening_is_said(tmp_path: Path) -> None:
    with serve(b"") as site:
        pass
    with pytest.raises(SourceError, match=r"refused \(4 attempts\)"):
        fetched(site)


def test_a_reader_that_waits_is_cancelled_soon() -> None:
    cancel = threading.Event()
    patient = HttpOptions(timeout=30)
    with (
        serve(CONTENT, fault=only(LATER, drops(10, stall=1.0))) as site,
        RemoteFile.open(site.url, patient, control=Control(None, cancel)) as file,
    ):
        threading.Timer(0.2, cancel.set).start()
        began = time.monotonic()
        with pytest.raises(Cancelled):
            file.pread(2 * PIECE, 10)
        assert time.monotonic() - began < 0.6


# --- where a redirect may lead ---------------------------------------------------------------------------------


def test_a_redirect_on_the_same_host_is_followed() -> None:
    def moved(_: int, answer: Answer) -> None:
        if not site.headers[-1].get("Moved") and len(site.requests) == 1:
            answers(302, Location="/elsewhere?signature=1")(answer)

    with serve(CONTENT, fault=moved) as site:
        assert fetched(site) == CONTENT


def test_a_redirect_to_another_host_needs_leave_and_gets_no_credentials() -> None:
    with serve(CONTENT) as there, serve(b"") as here:
        here.fault = only(ALWAYS, answers(302, Location=there.url))
        secret = {"X-Auth-Token": "token"}
        with pytest.raises(UnsafeImage, match="another host") as caught:
            fetched(here, HttpOptions(headers=lambda: secret))
        assert (caught.value.rule, there.requests) == ("redirect", [])
        allowed = HttpOptions(redirect_hosts=("127.*",), headers=lambda: secret)
        assert fetched(here, allowed) == CONTENT
        assert here.headers[0]["X-Auth-Token"] == "token"
        assert not any("X-Auth-Token" in headers for headers in there.headers)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://u:p@127.0.0.1/", "http://:80/"])
def test_a_redirect_to_what_is_no_http_address_is_refused(target: str) -> None:
    with serve(b"", fault=only(ALWAYS, answers(302, Location=target))) as site, pytest.raises(UnsafeImage):
        fetched(site, HttpOptions(redirect_hosts=("*",)))


@pytest.mark.parametrize("url", ["ftp://host/x", "http:///x", "http://h/a b", "http://h:x/", "http://h/\r\nX: 1"])
def test_what_is_no_address_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError):
        RemoteFile.open(url)


def test_secrets_of_an_address_are_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        RemoteFile.open("http://user:secret@host/x")
    assert "secret" not in str(caught.value)
    assert shown("https://user:secret@host/a/b?signature=secret#secret") == "https://host/a/b"
