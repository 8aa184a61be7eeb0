"""The faults of a network, one table: each conversion is resumed and exact, or refused and leaves nothing.

Every fault is tried on a server with ranges and on one without, in the first answer and in later ones, read in this
process and in a confined one. There is no third outcome: never a short disk, never another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import imagekit
from imagekit.errors import ImagekitError
from imagekit.remote.addresses import Access
from imagekit.remote.http import HttpOptions
from tests.disks import noise
from tests.test_remote import IDENTIFIER, image
from tests.web import Answer, Site, answers, compresses, drops, only, serve, states

IMAGE = image() + noise(3 << 20)
EVER = 1000


@dataclass(frozen=True)
class Fault:
    """What the server does in the answers of that many requests, and what becomes of it: of ranges, of a whole."""

    does: Callable[[Answer], None]
    times: int
    ranges: str
    whole: str


def slowly(answer: Answer) -> None:
    """All of it, a few bytes at a time: slower than any use."""
    answer.drip = 0.05


def longer(answer: Answer) -> None:
    """More bytes than were stated: what is behind them is not read."""
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.body += b"more"
    answer.cut = len(answer.body)


def shorter(answer: Answer) -> None:
    """Fewer bytes than are stated, and the end."""
    answer.headers["Content-Length"] = str(len(answer.body))
    answer.cut = len(answer.body) - 1


def states_less(answer: Answer) -> None:
    answer.headers["Content-Length"] = str(len(answer.body) - 7)
    answer.cut = len(answer.body)


def to_all(answer: Answer) -> None:
    """200 and everything, also to the request for a range."""
    answer.status, answer.body = 200, IMAGE
    answer.headers.pop("Content-Range", None)


def other_image(answer: Answer) -> None:
    """As many bytes of another image, and a server that does not say so."""
    answer.body = bytes(byte ^ 1 for byte in answer.body)


def another_size(answer: Answer) -> None:
    if "Content-Range" in answer.headers:
        answer.headers["Content-Range"] = answer.headers["Content-Range"].split("/")[0] + f"/{len(IMAGE) + 1}"
    else:
        answer.headers["Content-Length"] = str(len(answer.body) + 1)
        answer.cut = len(answer.body)


RESUMED, REFUSED = "resumed", "refused"
FAULTS = {
    "drops once": Fault(drops(200_000), 1, RESUMED, RESUMED),
    "drops at once, twice": Fault(drops(0), 2, RESUMED, RESUMED),
    "drops for ever": Fault(drops(10), EVER, REFUSED, REFUSED),
    "stalls once": Fault(drops(1000, stall=0.8), 1, RESUMED, RESUMED),
    "is too slow": Fault(slowly, EVER, REFUSED, REFUSED),
    "sends less than it states, once": Fault(shorter, 1, RESUMED, RESUMED),
    "sends more than it states": Fault(longer, EVER, RESUMED, RESUMED),
    "states another length": Fault(states_less, EVER, REFUSED, REFUSED),
    "states no number": Fault(states(Content_Length="many"), EVER, REFUSED, REFUSED),
    "200 to a range": Fault(to_all, EVER, REFUSED, RESUMED),
    "416": Fault(answers(416, Content_Range=f"bytes */{len(IMAGE)}"), EVER, REFUSED, REFUSED),
    "404": Fault(answers(404), EVER, REFUSED, REFUSED),
    "500 once": Fault(answers(500), 1, RESUMED, RESUMED),
    "500 for ever": Fault(answers(500), EVER, REFUSED, REFUSED),
    "a redirect loop": Fault(answers(302, Location="/image.qcow2"), EVER, REFUSED, REFUSED),
    "a redirect elsewhere": Fault(answers(302, Location="http://127.0.0.2:9/"), EVER, REFUSED, REFUSED),
    "a redirect to a file": Fault(answers(302, Location="file:///etc/passwd"), EVER, REFUSED, REFUSED),
    "gzip": Fault(compresses, EVER, REFUSED, REFUSED),
    "another ETag": Fault(states(ETag='"two"'), EVER, REFUSED, RESUMED),
    "another size": Fault(another_size, EVER, REFUSED, REFUSED),
    "another image, unsaid": Fault(other_image, EVER, REFUSED, REFUSED),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What must come out."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "image.qcow2").write_bytes(IMAGE)
    imagekit.convert(folder / "image.qcow2", folder / "disk.vhdx", identifier=IDENTIFIER)
    return (folder / "disk.vhdx").read_bytes()


@pytest.mark.parametrize("confined", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "confined"])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_the_network_is_mended_or_refused(
    no_leftovers: Path, expected: bytes, fault: Fault, ranges: bool, confined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = HttpOptions(timeout=0.4, retries=2, pause=0.01)
    monkeypatch.setattr(Access, "http", lambda _: quick)
    monkeypatch.setattr("imagekit.remote.http.SLOWEST", 64 << 10)
    digest = hashlib.sha256(IMAGE).hexdigest()
    target = no_leftovers / "disk.vhdx"
    first = 1 if ranges else 0
    with serve(IMAGE, ranges=ranges, fault=only(range(first, first + fault.times), fault.does)) as site:
        outcome = _outcome(site, target, checksum=f"sha256:{digest}", confined=confined)
    assert outcome == (fault.ranges if ranges else fault.whole)
    if outcome == RESUMED:
        assert target.read_bytes() == expected
        target.unlink()


def _outcome(site: Site, target: Path, **options: Any) -> str:
    try:
        imagekit.convert(site.url, target, identifier=IDENTIFIER, **options)
    except ImagekitError as error:
        assert error.exit_code in (10, 11, 13, 15), error
        assert error.exit_code != 11, "that it is another file is to be said first"
        return REFUSED
    return RESUMED
