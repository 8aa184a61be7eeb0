"""The report of a batch, as a browser shows it: in light and dark, narrow, on paper, read out."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagekit.batch import report
from imagekit.batch.journal import DONE, FAILED, WAITING, Row
from imagekit.batch.manifest import Item
from tests.oracles import chromium

GiB = 1 << 30


def row(number: int, state: str = DONE, **result: Any) -> Row:
    """A row as a run leaves it; sizes, times and maps depend on the number."""
    name = f"server-{number:03}"
    item = Item(number, f"/srv/images/2026-11/release-{number % 7}/{name}.qcow2", f"{name}.vhdx")
    if state == WAITING:
        return Row(item, state)
    size = (number * 37 % 97 + 1) * GiB // 40
    phases = {"open": 0.05, "plan": 0.2, "copy": size / 4e8, "verify": size / 8e8, "sync": 0.3, "hash": size / 9e8}
    cells = [(place * number * 7919) % 101 if place < 20 + number % 130 else 0 for place in range(160)]
    made: dict[str, Any] = {
        "ok": True,
        "report": {
            "source": {"size": size // 3, "format": "qcow2", "virtual-size": 4 * size},
            "target": {
                "size": size,
                "format": "vhdx",
                "subformat": "dynamic",
                "virtual-size": 4 * size,
                "id": "8f2a6d5c-9d3e-4a54-8d4e-0f9b8d1f1c11",
            },
            "data-bytes": size,
            "verified": "content",
            "confinement": ["limits", "landlock 4", "seccomp"],
            "notes": ["the size was rounded up to 4096 bytes"] if number % 3 == 0 else [],
        },
        "digest": f"{number:064x}",
        "phases": phases,
        "maps": {"source": cells, "target": cells[::-1]},
    }
    if state == FAILED:
        made = {
            "ok": False,
            "error": {
                "code": 13,
                "kind": "UnsafeImage",
                "message": f"{item.source}: refused by rule backing-file: it names /etc/passwd",
                "hint": "--follow-references reads it, where its origin is trusted",
            },
        }
    started = 1_795_000_000.0 + number
    return Row(item, state, 1 + number % 11 // 10, started, started + sum(phases.values()), made | result)


def rows(count: int) -> Iterator[Row]:
    for number in range(1, count + 1):
        yield row(number, FAILED if number % 20 == 3 else WAITING if number % 50 == 49 else DONE)


@pytest.fixture(params=[3, 200])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[int, Path]:
    report.write_reports(rows(request.param), tmp_path, title="imagekit batch <images> & more")
    return request.param, tmp_path / report.HTML_NAME


_INTRUDER = """
    window.refused = []; window.intruder = document.createElement("img");
    document.addEventListener("securitypolicyviolation", event => refused.push(event.blockedURI));
    intruder.src = "http://127.0.0.1:9/x"; document.body.append(intruder);
"""
"""A picture that is not in the page, as if a name had not been escaped."""


def wait_for_refusal(page: chromium.Page) -> None:
    deadline = time.monotonic() + 10
    while page.run("refused") != ["http://127.0.0.1:9/x"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.oracle
def test_a_browser_shows_it_to_everybody(written: tuple[int, Path]) -> None:
    count, path = written
    shots: dict[str, bytes] = {}
    papers: dict[str, str] = {}
    with chromium.browser() as browser:
        for scheme in ("light", "dark"):
            page = chromium.load(browser, path, scheme=scheme)
            assert page.requests == [path.resolve().as_uri()], "it asks for nothing but itself"
            assert page.overflow() <= 0
            contrasts = page.contrasts()
            assert len(contrasts) > 10 * count
            assert min(contrasts)[0] >= 4.5, min(contrasts)
            shots[scheme] = page.screenshot()
            assert page.run(_INTRUDER) is None
            wait_for_refusal(page)
            page.run("intruder.remove()")
            papers[scheme] = page.run("getComputedStyle(document.body).backgroundColor")
        narrow = chromium.load(browser, path, width=390)
        assert narrow.overflow() <= 0, "on a telephone only the tables scroll"
        check_structure(page, count)
        check_paper(page.pdf(), count)
    assert shots["light"] != shots["dark"]
    assert papers == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}


def check_structure(page: chromium.Page, count: int) -> None:
    """What a screen reader gets."""
    nodes = page.nodes()
    headings = [name for role, name in nodes if role == "heading"]
    assert headings == ["imagekit batch <images> & more", "What failed", "Where the time went", "Images"]
    columns = [name for role, name in nodes if role == "columnheader"]
    assert columns[-8:] == [
        *("#", "image, target", "state", "file read", "disk", "file written", "time", "where the data lies")
    ]
    assert sum(role == "rowheader" and ".qcow2" in name for role, name in nodes) >= count
    pictures = [name for role, name in nodes if role in ("image", "img") and "where it holds data" in name]
    done = sum(one.state == DONE for one in rows(count))
    assert len(pictures) == 2 * done
    assert re.fullmatch(r"source of server-001\.vhdx: where it holds data, \d+ percent of it", pictures[0])
    assert [name for role, name in nodes if role in ("image", "img") and not name] == []
    assert page.run("document.documentElement.lang") == "en"
    assert page.run("[...document.querySelectorAll('a')].every(a => document.querySelector(a.getAttribute('href')))")


def check_paper(pdf: bytes, count: int) -> None:
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf)) or len(re.findall(rb"/Type\s*/Page\b", inflated(pdf)))
    assert pdf.startswith(b"%PDF")
    assert 1 <= pages <= 2 + count // 8


def inflated(pdf: bytes) -> bytes:
    """The streams of objects in it, unpacked."""
    out = b""
    for found in re.finditer(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            out += zlib.decompressobj().decompress(found[1])
        except zlib.error:
            continue
    return out


def test_many_items_are_written_in_one_pass(tmp_path: Path) -> None:
    """The page has its first rows and says where the others are; failures beyond them are on it."""
    many = [row(number) for number in range(1, report.ROWS + 3)]
    many[-1] = row(len(many), FAILED)
    totals = report.write_reports(iter(many), tmp_path, title="many")
    page = (tmp_path / report.HTML_NAME).read_text()
    assert (totals.items, totals.failed) == (report.ROWS + 2, 1)
    assert f"server-{len(many):03}.qcow2" in page
    assert "2 more images are in report.json" in page
