"""A batch: what a manifest means, what survives a stop, what a report says."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import imagekit
from imagekit import pictures
from imagekit.batch import journal, manifest, runner
from imagekit.batch.crew import Workforce
from imagekit.batch.manifest import Item
from imagekit.digests import file_digest
from imagekit.errors import InvalidSpec, TargetError, UsageError
from imagekit.formats.base import GiB, MiB
from tests.disks import noise

OK = {"ok": True, "digest": "d", "report": {}, "phases": {}, "maps": {}}


def peak_memory() -> int:
    """The most that this process has had at once, in bytes."""
    if sys.platform == "win32":
        raise RuntimeError("not counted on Windows")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


class TestManifest:
    YAML = "- source: a.qcow2\n  size: 20G\n- source: sub/b.raw\n  target: deep/c.vhd\n  fix-gpt: true\n"
    JSON = '[{"source": "a.qcow2", "size": "20G"}, {"source": "sub/b.raw", "target": "deep/c.vhd", "fix-gpt": true}]'
    LINES = (
        '{"source": "a.qcow2", "size": "20G"}\n\n{"source": "sub/b.raw", "target": "deep/c.vhd", "fix_gpt": true}\n'
    )
    CSV = "source,target,size,fix_gpt\na.qcow2,,20G,\nsub/b.raw,deep/c.vhd,,true\n"

    @pytest.mark.parametrize(
        ("name", "text"), [("m.yaml", YAML), ("m.json", JSON), ("m.jsonl", LINES), ("m.csv", CSV)]
    )
    def test_every_form_says_the_same(self, tmp_path: Path, name: str, text: str) -> None:
        first, second = manifest.load(write(tmp_path / name, text), {"target_format": "vhdx", "verify": "structure"})
        assert (first.source, first.target) == (str(tmp_path / "a.qcow2"), "a.vhdx")
        assert first.options == {"target_format": "vhdx", "verify": "structure", "size": 20 * GiB}
        assert (second.source, second.target) == (str(tmp_path / "sub/b.raw"), "deep/c.vhd")
        assert second.options["fix_gpt"] is True

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("m.yaml", "- source: a.raw\n- sauce: b.raw\n", "line 2: item 2: no source"),
            ("m.yaml", "- source: a.raw\n  colour: red\n", "line 1: item 1: unknown: colour"),
            ("m.yaml", "- source: [\n", "line 2: "),
            (
                "m.yaml",
                "- source: a.raw\n- source: x/A.raw\n",
                "line 2: item 2: its target 'A.vhdx' is that of the item on line 1",
            ),
            ("m.yaml", "- source: a.raw\n  target: ../b.vhdx\n", "not below the run's folder"),
            ("m.yaml", "- source: a.raw\n  target: 'C:\\b.vhdx'\n", "not below the run's folder"),
            ("m.csv", "source,size\na.raw,20X\n", "line 2: item 1: size: '20X' is not a size"),
            ("m.csv", "source\na.raw,b,c\n", "line 2: more cells"),
            ("m.jsonl", '{"source": "a.raw"}\n{"source"\n', "line 2: "),
            ("m.json", "{}", "not a list"),
            (
                "m.json",
                '[\n{"source": "a.raw"},\n\n{"source": "b.raw", "sise": 1}\n]',
                "line 4: item 2: unknown: sise",
            ),
            ("m.json", '{"items": [\n"a.raw", "x/a.raw"]}', "line 2: item 2: its target"),
            ("m.yaml", "- source: a.raw\n  target: report.json\n", "the name of what the run itself writes"),
            (
                "m.yaml",
                "- {source: a.raw, target: a.vhd}\n- {source: b.raw, target: a.vhd/b.vhd}\n",
                "line 1: item 1: its target 'a.vhd' is a folder to the item on line 2",
            ),
            ("m.yaml", "[]", "no image in it"),
            ("m.yaml", "- source: a.raw\n  verify: maybe\n", "verify 'maybe'"),
            ("m.yaml", "- source: a.raw\n  allow: [no-such-rule]\n", "is not a rule"),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, tmp_path: Path, name: str, text: str, said: str) -> None:
        with pytest.raises(InvalidSpec) as caught:
            manifest.load(write(tmp_path / name, text), {"target_format": "vhdx"})
        assert said in caught.value.message

    def test_a_folder_and_a_glob_are_manifests(self, tmp_path: Path) -> None:
        for name in ("b.qcow2", "a.vmdk", "notes.txt", "c.raw.gz"):
            (tmp_path / name).touch()
        found = manifest.load(str(tmp_path), {"target_format": "vhd"})
        assert [item.target for item in found] == ["a.vhd", "b.vhd", "c.vhd"]
        (one,) = manifest.load(str(tmp_path / "*.qcow2"), {"profile": "hyperv"}, name="{number}-{name}{suffix}")
        assert one.target == "1-b.qcow2.vhdx"

    def test_a_template_with_a_field_nobody_knows_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.raw").touch()
        with pytest.raises(UsageError, match="has no field colour"):
            manifest.load(str(tmp_path), {"target_format": "vhd"}, name="{colour}")

    @pytest.mark.slow
    def test_a_hundred_thousand_lines_cost_little(self, tmp_path: Path) -> None:
        """The scheduler's own cost an item, with a converter that does nothing; memory for names, not for results."""
        before = peak_memory()
        lines = "\n".join(f"images/{number}.raw,{number}.vhdx" for number in range(100_000))
        started = time.monotonic()
        items = manifest.load(write(tmp_path / "m.csv", f"source,target\n{lines}\n"), {})
        loaded = time.monotonic()
        with journal.opened(tmp_path) as book, ThreadPoolExecutor(2) as pool:
            book.enter(items)
            summary = runner.run(book, tmp_path, Workforce(pool, lambda task, item: OK, 2))
        spent = time.monotonic() - loaded
        print(f"read {loaded - started:.1f} s, run {spent:.1f} s, {spent * 10:.0f} µs an item")
        assert (len(items), summary.done) == (100_000, 100_000)
        assert peak_memory() - before < 300 * MiB


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.raw").write_bytes(noise(MiB * (number + 1), number) + bytes(3 * MiB))
    (folder / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    return folder


def execute(images: Path, out: Path, *options: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(out), "-O", "vhdx", *options]
    return subprocess.run(command, capture_output=True, text=True, **more)


def targets(out: Path) -> dict[str, str]:
    return {one.name: file_digest(one) for one in sorted(out.glob("*.vhdx"))}


def test_some_fail_and_the_rest_is_done(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = execute(images, out, "--output", "json")
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert (found["done"], found["failed"]) == (3, 1)
    for number in range(3):
        assert imagekit.compare(images / f"{number}.raw", out / f"{number}.vhdx").same
    assert "bad.qcow2" in done.stderr
    again = json.loads(execute(images, out, "--output", "json", "--resume").stdout)
    assert (again["done"], again["skipped"], again["failed"]) == (0, 3, 1)


def test_a_folder_with_a_run_needs_resume_and_a_target_that_changed_is_made_again(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    execute(images, out)
    before = targets(out)
    refused = execute(images, out)
    assert (refused.returncode, "--resume" in refused.stderr) == (2, True)
    (out / "1.vhdx").write_bytes(b"damaged")
    (out / "2.vhdx").unlink()
    found = json.loads(execute(images, out, "--resume", "--output", "json").stdout)
    assert (found["done"], found["skipped"]) == (2, 1)
    assert targets(out) == before


def test_the_folder_of_the_images_is_no_place_for_targets(images: Path) -> None:
    refused = execute(images, images)
    assert (refused.returncode, "folder of the images too" in refused.stderr) == (2, True)
    assert not (images / "journal.sqlite").exists()


def test_what_failed_is_done_again_when_asked_to(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    execute(images, out)
    (images / "bad.qcow2").unlink()
    imagekit.convert(images / "0.raw", images / "bad.qcow2", compression="zlib")
    assert execute(images, out, "--resume").returncode == 3
    assert execute(images, out, "--retry-failed").returncode == 0
    assert imagekit.compare(images / "0.raw", out / "bad.vhdx").same


def test_two_runs_on_one_folder_exclude_each_other(tmp_path: Path) -> None:
    with journal.opened(tmp_path):
        blocked: list[BaseException] = []

        def other() -> None:
            try:
                with journal.opened(tmp_path):
                    pass
            except TargetError as error:
                blocked.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(blocked) == 1


def test_ctrl_c_leaves_whole_images_and_resume_makes_the_rest(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(out), "-O", "vhdx", "--jobs", "1"],
        stderr=subprocess.PIPE,
    )
    while not list(out.glob("*.vhdx")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode in (130, 3)
    assert execute(images, out, "--resume").returncode == 3
    reference = tmp_path / "reference"
    execute(images, reference)
    assert targets(out) == targets(reference)


def journalled(out: Path) -> dict[str, tuple[str, int]]:
    """State and attempts of each item."""
    if not (out / "journal.sqlite").exists():
        return {}
    with closing(sqlite3.connect(out / "journal.sqlite")) as book:
        try:
            rows = book.execute("SELECT target, state, attempts FROM items").fetchall()
        except sqlite3.OperationalError:  # killed before there was a table
            return {}
    return {target: (state, attempts) for target, state, attempts in rows}


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_the_files_are_those_of_a_quiet_run(images: Path, tmp_path: Path) -> None:
    for number in range(3, 24):
        (images / f"{number}.raw").write_bytes(noise(MiB * (number % 5 + 1), number) + bytes(3 * MiB))
    started = time.monotonic()
    execute(images, tmp_path / "reference", "--jobs", "2")
    whole = time.monotonic() - started
    reference = targets(tmp_path / "reference")
    chance = random.Random(10)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(out), "-O", "vhdx"]
    kills = [0]
    before: dict[str, tuple[str, int]] = {}
    while sum(kills) < 20 or kills[-1]:  # the last series goes to its end
        process = subprocess.Popen(
            [*command, "--resume", "--jobs", "2"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(None if sum(kills) >= 20 else chance.uniform(0, whole * 0.7))
        process.kill()
        code = process.wait()
        found = journalled(out)
        done = {target: one for target, one in before.items() if one[0] == journal.DONE}
        assert {target: found.get(target) for target in done} == done, "what was proven done is not done again"
        at_work = [target for target, (state, _) in found.items() if state == journal.RUNNING]
        assert len(at_work) <= 3, "a kill repeats two at work, and one handed out"
        before = found
        if code == -9:
            kills[-1] += 1
            continue
        assert code == 3
        assert targets(out) == reference
        assert [one.name for one in out.iterdir() if one.name.endswith(".part")] == []
        kills.append(0)
        before = {}
        shutil.rmtree(out)
    print(f"kills in each series: {kills[:-1]}")


class Reading(HTMLParser):
    """What a reader of the page gets: its text, its links and its pictures' names."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.loads: list[str] = []
        self.pictures: list[str] = []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.loads += [str(known[key]) for key in ("src", "href") if key in known]
        if tag == "svg" and known.get("role") == "img":
            self.pictures.append(str(known["aria-label"]))


def test_the_report_shows_everything_and_loads_nothing(images: Path, tmp_path: Path) -> None:
    evil = images / "<img src=x onerror=alert(1)>.qcow2"
    evil.write_bytes(b"QFI\xfb" + bytes(100))
    out = tmp_path / "out"
    execute(images, out)
    html = (out / "report.html").read_text()
    page = Reading()
    page.feed(html)
    assert [one for one in page.loads if not one.startswith("#item-")] == []
    assert "<img" not in html
    assert "<img src=x onerror=alert(1)>.qcow2" in page.text
    assert "3 of 5 done, 2 failed" in page.text
    assert sum("where it holds data" in one for one in page.pictures) == 6
    found = json.loads((out / "report.json").read_text())
    assert found["totals"]["done"] == 3
    assert {item["state"] for item in found["items"]} == {"done", "failed"}
    (first,) = [item for item in found["items"] if item["target"] == "0.vhdx"]
    assert first["digest"] == file_digest(out / "0.vhdx")
    assert first["maps"]["source"][0] == 100
    assert first["maps"]["target"][-1] == 0


def test_a_picture_is_dark_where_the_data_is() -> None:
    drawn = pictures.strip([0, 0, 60, 100], "x")
    assert drawn.count("<rect") == 3
    assert '<rect class="t0" x="0" y="0" width="2"' in drawn
    assert '<rect class="t4" x="3" y="0" width="1"' in drawn
    assert pictures.strip([], "x") == ""


def test_an_executor_that_loses_an_item_does_not_lose_the_others(tmp_path: Path) -> None:
    def do(task: Any, item: Item) -> dict[str, Any]:
        if item.number == 2 and not task.get("measure"):
            raise RuntimeError("the worker died")
        return OK

    items = [Item(number, f"{number}.raw", f"{number}.vhdx") for number in (1, 2, 3)]
    with journal.opened(tmp_path) as book, ThreadPoolExecutor(1) as pool:
        book.enter(items)
        summary = runner.run(book, tmp_path, Workforce(pool, do, 1))
        states = {row.item.number: row.state for row in book.rows()}
    assert (summary.done, summary.failed) == (2, 1)
    assert states == {1: journal.DONE, 2: journal.FAILED, 3: journal.DONE}


def test_what_does_not_fit_is_said_before_the_first_byte(tmp_path: Path) -> None:
    def do(task: Any, item: Item) -> dict[str, Any]:
        assert task.get("measure"), "something is converted"
        return {"ok": True, "needed": 1 << 60, "size": 1}

    items = [Item(number, f"{number}.raw", f"{number}.vhdx") for number in (1, 2, 3)]
    with journal.opened(tmp_path) as book, ThreadPoolExecutor(1) as pool:
        book.enter(items)
        with pytest.raises(TargetError, match=f"no space: {3 << 60} bytes are needed.*for 3 targets"):
            runner.run(book, tmp_path, Workforce(pool, do, 1))
        assert not book.begun(), "it can be started anew"


def test_an_image_that_cannot_be_measured_has_failed_and_is_not_tried_again(tmp_path: Path) -> None:
    asked: list[tuple[int, bool]] = []

    def do(task: Any, item: Item) -> dict[str, Any]:
        asked.append((item.number, bool(task.get("measure"))))
        return {"ok": False, "error": {"code": 11, "message": "bad"}} if item.number == 1 else OK

    items = [Item(1, "1.raw", "1.vhdx"), Item(2, "2.raw", "2.vhdx"), Item(3, "http://a/3.raw", "3.vhdx")]
    with journal.opened(tmp_path) as book, ThreadPoolExecutor(1) as pool:
        book.enter(items)
        summary = runner.run(book, tmp_path, Workforce(pool, do, 1))
    assert (summary.done, summary.failed) == (2, 1)
    # What would be fetched is not fetched twice; it may be large, so it goes first.
    assert asked == [(1, True), (2, True), (3, False), (2, False)]


def test_one_heavy_item_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    others: list[int] = []
    all_others = threading.Event()

    def do(task: Any, item: Item) -> dict[str, Any]:
        if task.get("measure"):
            return {"ok": True, "needed": 0, "size": 100 if item.number == 5 else 1}
        if item.number == 5:
            assert all_others.wait(30), "it is done by one of two, the others by the other one"
        else:
            others.append(item.number)
            if len(others) == 8:
                all_others.set()
        return OK

    items = [Item(number, f"{number}.raw", f"{number}.vhdx") for number in range(1, 10)]
    with journal.opened(tmp_path) as book, ThreadPoolExecutor(2) as pool:
        book.enter(items)
        summary = runner.run(book, tmp_path, Workforce(pool, do, 2))
    assert (summary.done, sorted(others)) == (9, [1, 2, 3, 4, 6, 7, 8, 9])


def test_a_second_ctrl_c_ends_it_at_once_and_nothing_half_is_left(images: Path, tmp_path: Path) -> None:
    (images / "large.raw").write_bytes(noise(MiB) * 300)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(out), "-O", "vhdx", "--jobs", "1"],
        stderr=subprocess.PIPE,
    )
    while not any(state == journal.RUNNING for state, _ in journalled(out).values()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    process.communicate()
    assert time.monotonic() - began < 10
    assert process.returncode == 130
    assert [one.name for one in out.iterdir() if one.suffix in (".vhdx", ".part")] == []


def test_the_largest_goes_first(images: Path, tmp_path: Path) -> None:
    order: list[str] = []

    def do(task: Any, item: Item) -> dict[str, Any]:
        if task.get("measure"):
            return {"ok": True, "needed": 1, "size": item.number}
        order.append(item.target)
        return OK

    items = manifest.load(str(images / "*.raw"), {"target_format": "vhdx"})
    with journal.opened(tmp_path) as book, ThreadPoolExecutor(1) as pool:
        book.enter(items)
        runner.run(book, tmp_path, Workforce(pool, do, 1))
    assert order == ["2.vhdx", "1.vhdx", "0.vhdx"]


def test_status_on_sigusr1(images: Path, tmp_path: Path) -> None:
    if sys.platform == "win32":
        raise RuntimeError("not there on Windows")
    process = subprocess.Popen(
        [sys.executable, "-m", "imagekit", "batch", str(images), "--out", str(tmp_path / "out"), "-O", "vhdx"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out" / "journal.sqlite").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGUSR1)
    _, said = process.communicate()
    assert process.returncode == 3
    assert "of 4 images" in said
