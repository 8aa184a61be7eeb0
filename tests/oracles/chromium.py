"""Headless Chromium, asked what it makes of a page: over a pipe, in the words of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.oracles import need_tool

# Chromium reads commands from descriptor 3 and answers on 4; what it is given may have other numbers.
_WITH_PIPES = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for here, there in zip(high, (3, 4)):
    os.dup2(here, there)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60.0

# Text by text: its colour against the nearest background that is not transparent, as WCAG 2 counts.
_CONTRASTS = """
(() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126*x + 0.7152*y + 0.0722*z; };
  const behind = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c[3] > 0) return c; } return [255, 255, 255, 1]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT); const found = [];
  while (walker.nextNode()) { const node = walker.currentNode, parent = node.parentElement;
    if (!node.data.trim() || !parent.getClientRects().length || parent.closest('svg')) continue;
    const a = light(parse(getComputedStyle(parent).color)), b = light(behind(parent));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.data.trim().slice(0, 40)]); }
  return found; })()
"""


class Page:
    """One page, loaded."""

    def __init__(self, browser: _Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.requests: list[str] = []
        """Every address that the page asked for."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript there."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def contrasts(self) -> list[tuple[float, str]]:
        """For each text that is seen: its contrast, and how it begins."""
        return [(float(ratio), str(text)) for ratio, text in self.run(_CONTRASTS)]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        found = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        return base64.b64decode(found["data"])

    def nodes(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader gets."""
        tree = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (str(one["role"]["value"]), str(one.get("name", {}).get("value", "")))
            for one in tree
            if not one.get("ignored") and "role" in one
        ]


class _Browser:
    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0)
        self._pending = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.hear()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def hear(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            piece = self._answers.read(1 << 16)
            if not piece:
                raise AssertionError("Chromium has ended")
            self._pending += piece
        line, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        self._commands.close()
        self._answers.close()


@contextmanager
def browser() -> Iterator[_Browser]:
    """A Chromium of its own; skips where there is none."""
    chromium = need_tool("chromium")
    from_us, to_chromium = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PIPES, str(from_us[0]), str(to_chromium[1]), chromium, *options],
            pass_fds=(from_us[0], to_chromium[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us[0])
        os.close(to_chromium[1])
        made = _Browser(from_us[1], to_chromium[0])
        try:
            yield made
        finally:
            made.close()  # it ends with its pipe
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def load(browser: _Browser, path: Path, *, scheme: str = "light", width: int = 1280, height: int = 900) -> Page:
    """The file, loaded in a window of that size by somebody who likes it ``light`` or ``dark``."""
    target = browser.call("Target.createTarget", {"url": "about:blank"})["targetId"]
    session = str(browser.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"])
    page = Page(browser, session)
    for domain in ("Page", "Network", "Runtime", "Accessibility"):
        page.call(f"{domain}.enable")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    browser.events.clear()
    page.call("Page.navigate", url=path.resolve().as_uri())
    deadline = time.monotonic() + SECONDS
    while not any(one["method"] == "Page.loadEventFired" for one in browser.events):
        assert time.monotonic() < deadline, "the page does not load"
        browser.hear()
    page.run("1")  # what it asked for on the way has been heard then
    page.requests = [
        str(one["params"]["request"]["url"])
        for one in browser.events
        if one["method"] == "Network.requestWillBeSent" and one.get("sessionId") == session
    ]
    return page
