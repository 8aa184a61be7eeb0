"""The report of a batch: ``report.json`` for programs, ``report.html`` for people.

The page is one file that needs nothing else: no script, no network, readable in light and dark, on paper, and by a
screen reader. Text that comes from images or manifests is escaped like everything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagekit import pictures
from imagekit.batch.journal import DONE, FAILED, Row
from imagekit.formats.base import JSON
from imagekit.publish import write_file
from imagekit.report import SCHEMA

JSON_NAME, HTML_NAME = "report.json", "report.html"
PICTURES = 500
"""Images whose pictures the page shows; the JSON has all of them."""
ROWS = 5000


@dataclass(slots=True)
class Totals:
    """Sums over a batch; sizes in bytes."""

    items: int = 0
    done: int = 0
    failed: int = 0
    waiting: int = 0
    source_bytes: int = 0
    target_bytes: int = 0
    data_bytes: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        self.items += 1
        if row.state == FAILED:
            self.failed += 1
        elif row.state != DONE:
            self.waiting += 1
        else:
            self.done += 1
            report = row.result["report"]
            self.source_bytes += report["source"]["size"]
            self.target_bytes += report["target"]["size"]
            self.data_bytes += report["data-bytes"]
        self.seconds += row.seconds
        for phase, seconds in row.result.get("phases", {}).items():
            self.phases[phase] = self.phases.get(phase, 0.0) + seconds

    def to_json(self) -> dict[str, JSON]:
        return {
            "items": self.items,
            "done": self.done,
            "failed": self.failed,
            "waiting": self.waiting,
            "source-bytes": self.source_bytes,
            "target-bytes": self.target_bytes,
            "data-bytes": self.data_bytes,
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(seconds, 3) for phase, seconds in self.phases.items()},
        }


def write_reports(rows: Iterable[Row], folder: Path, *, title: str) -> Totals:
    """Write both reports into the folder; the old ones are replaced."""
    totals = Totals()
    shown: list[Row] = []
    lines: list[str] = []
    for row in rows:
        totals.add(row)
        lines.append(json.dumps(_document(row)))
        if len(shown) < ROWS:
            shown.append(row)
    head = json.dumps({"schema": SCHEMA, "title": title, "totals": totals.to_json()})
    text = head[:-1] + ', "items": [\n' + ",\n".join(lines) + "\n]}\n"
    write_file(folder / JSON_NAME, text.encode(), overwrite=True, sync=False)
    write_file(folder / HTML_NAME, "".join(_page(title, totals, shown)).encode(), overwrite=True, sync=False)
    return totals


def _document(row: Row) -> dict[str, Any]:
    return {
        "number": row.item.number,
        "source": row.item.source,
        "target": row.item.target,
        "options": dict(row.item.options),
        "state": row.state,
        "attempts": row.attempts,
        "seconds": round(row.seconds, 3),
        **{key: value for key, value in row.result.items() if key != "ok"},
    }


# --- the page --------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d1d9e0; --card: #f6f8fa;
  --good: #1a7f37; --bad: #c62828; --wait: #8a6100; --t0: #e4e8ec; --t1: #c3dafc; --t2: #8bb9f7; --t3: #4a8fea;
  --t4: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --paper: #0d1117; --line: #30363d;
  --card: #161b22; --good: #4cc064; --bad: #ff7b72; --wait: #e3b341; --t0: #22272e; --t1: #1c3a63; --t2: #24558f;
  --t3: #3d7fd6; --t4: #79b0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { margin: 0 0 1rem; color: var(--soft); }
dl.sums { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 0; }
dl.sums div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .45rem .5rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.file { overflow-wrap: anywhere; min-width: 12rem; } td small { color: var(--soft); display: block; }
.done { color: var(--good); } .failed { color: var(--bad); } .waiting, .running { color: var(--wait); }
svg.map { display: block; width: 100%; min-width: 12rem; height: 12px; margin: .15rem 0; border-radius: 3px; }
.t0 { fill: var(--t0); } .t1 { fill: var(--t1); } .t2 { fill: var(--t2); } .t3 { fill: var(--t3); }
.t4 { fill: var(--t4); }
ul.failures { padding-left: 1.1rem; } ul.failures li { margin: .35rem 0; overflow-wrap: anywhere; }
.key { display: flex; gap: 1rem; flex-wrap: wrap; color: var(--soft); font-size: .85rem; margin: .25rem 0 .5rem; }
.key svg { width: 14px; height: 12px; vertical-align: -1px; margin-right: .3rem; }
.wide { overflow-x: auto; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } tr { break-inside: avoid; }
  svg.map, .key svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def _page(title: str, totals: Totals, rows: Sequence[Row]) -> Iterator[str]:
    state = "all done" if totals.done == totals.items else f"{totals.done} of {totals.items} done"
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<title>{pictures.shown(title)}: {state}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    yield f"<h1>{pictures.shown(title)}</h1>\n<p class=lead>{state}"
    yield f", {totals.failed} failed</p>\n" if totals.failed else "</p>\n"
    yield from _sums(totals)
    yield from _failures([row for row in rows if row.state == FAILED])
    yield from _table(totals, rows)
    yield "</main>\n</body>\n</html>\n"


def _sums(totals: Totals) -> Iterator[str]:
    saved = totals.source_bytes - totals.target_bytes
    cells = [
        ("images", f"{totals.items}"),
        ("done", f"{totals.done}"),
        ("failed", f"{totals.failed}"),
        ("went in", _size(totals.source_bytes)),
        ("came out", _size(totals.target_bytes)),
        ("saved" if saved >= 0 else "grew by", _size(abs(saved))),
        ("guest data", _size(totals.data_bytes)),
        *((f"time: {phase}", _seconds(seconds)) for phase, seconds in totals.phases.items()),
    ]
    yield "<dl class=sums>\n"
    for name, value in cells:
        yield f"<div><dt>{pictures.shown(name)}</dt><dd>{pictures.shown(value)}</dd></div>\n"
    yield "</dl>\n"


def _failures(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "<h2>What failed</h2>\n<ul class=failures>\n"
    for row in rows:
        error = row.result.get("error", {})
        hint = f" <small>hint: {pictures.shown(error['hint'])}</small>" if error.get("hint") else ""
        message = pictures.shown(error.get("message", "no reason is known"))
        yield f"<li><b>{pictures.shown(row.item.source)}</b>: {message}"
        kind, code = pictures.shown(error.get("kind", "")), pictures.shown(error.get("code", "?"))
        yield f" <small>{kind}, exit code {code}</small>{hint}</li>\n"
    yield "</ul>\n"


def _table(totals: Totals, rows: Sequence[Row]) -> Iterator[str]:
    yield "<h2>Images</h2>\n"
    yield from _key()
    yield "<div class=wide><table>\n<thead><tr><th scope=col class=number>#</th><th scope=col>image</th>"
    yield "<th scope=col>state</th><th scope=col class=number>in</th><th scope=col class=number>out</th>"
    yield "<th scope=col class=number>time</th><th scope=col>where the data lies (source, target)</th></tr></thead>\n"
    yield "<tbody>\n"
    for place, row in enumerate(rows):
        yield from _row(row, drawn=place < PICTURES)
    yield "</tbody></table></div>\n"
    if totals.items > len(rows):
        yield f"<p class=lead>{totals.items - len(rows)} more are in {JSON_NAME}.</p>\n"


def _row(row: Row, *, drawn: bool) -> Iterator[str]:
    report = row.result.get("report")
    yield f"<tr><td class=number>{row.item.number}</td><td class=file>{pictures.shown(row.item.source)}"
    yield f"<small>{pictures.shown(row.item.target)}</small>"
    for note in (report or {}).get("notes", ()):
        yield f"<small>note: {pictures.shown(note)}</small>"
    yield f"</td><td class={row.state}>{row.state}</td>"
    if report is None:
        yield "<td></td><td></td>"
    else:
        for side in (report["source"], report["target"]):
            yield f"<td class=number>{_size(side['size'])}<small>{pictures.shown(side['format'])}</small></td>"
    yield f"<td class=number>{_seconds(row.seconds)}</td><td>"
    for side, cells in row.result.get("maps", {}).items() if drawn else ():
        yield pictures.strip(cells, f"{side}: where {row.item.target} holds data")
    yield "</td></tr>\n"


def _key() -> Iterator[str]:
    yield "<div class=key>"
    for number, words in enumerate(pictures.tone_names()):
        swatch = f'<svg viewBox="0 0 1 1" aria-hidden=true><rect class=t{number} width=1 height=1 /></svg>'
        yield f"<span>{swatch}{words}</span>"
    yield "</div>\n"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
