"""A batch's report for people: one HTML file that needs nothing else.

No script, no network; readable in light and dark, on paper, on a narrow screen and by a screen reader. No fact is
told by colour alone. Text that comes from images or manifests is escaped like everything else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from imagekit import pictures
from imagekit.batch.journal import DONE, FAILED, Row
from imagekit.pictures import shown

if TYPE_CHECKING:
    from imagekit.batch.report import Totals

PICTURES = 500
"""Images whose pictures the page shows."""
PHASES = ("open", "download", "unpack", "plan", "copy", "verify", "sync", "hash")
"""In the order of a conversion; others are drawn like the last one."""
MEANINGS = {
    "open": "start and open the image",
    "download": "fetch it",
    "unpack": "unpack it",
    "plan": "find where the data lies",
    "copy": "decode, copy, write",
    "verify": "read back and compare",
    "sync": "wait for the medium",
    "hash": "SHA-256 of the target",
}
ADVICE = {
    10: "see whether the file is there, whole, and used by nobody else",
    11: "the image itself is wrong: get it again from where it comes from",
    12: "imagekit info IMAGE shows what it needs",
    13: "imagekit info IMAGE shows all findings; --allow RULE where its origin is trusted",
    14: "see to room and permissions, then --retry-failed",
    15: "get the image again; if that fails too, suspect memory or disk",
    16: "see what that program or service says, then --retry-failed",
    70: "please report it",
}
"""By exit code, where an error has no hint of its own."""
MARKS = {DONE: "✓", FAILED: "✗"}


def page(title: str, totals: Totals, rows: Sequence[Row], failures: Sequence[Row]) -> Iterator[str]:
    """The page, in pieces."""
    folder = _common_folder([row.item.source for row in rows])
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<meta name="color-scheme" content="light dark">\n'
    # Names and messages come from strangers: should one ever get through unescaped, it still loads and runs nothing.
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield f"<title>{shown(title)}: {_verdict(totals)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n"
    yield f"<header>\n<h1>{shown(title)}</h1>\n"
    kind = "failed" if totals.failed else "done" if totals.done == totals.items else "waiting"
    yield f'<p class="lead"><strong class="{kind}">{_verdict(totals)}</strong>{_when(totals)}</p>\n'
    yield "</header>\n<main>\n"
    yield from _sums(totals)
    yield from _failures(failures, totals.failed, len(rows))
    yield from _phases(totals)
    yield from _table(totals, rows, folder)
    made_by = shown(version("imagekit"))
    yield f"</main>\n<footer><p>imagekit {made_by}. All of it, for programs: report.json</p></footer>\n"
    yield "</body>\n</html>\n"


def _style() -> str:
    text = files("imagekit.batch").joinpath("report.css").read_text(encoding="utf-8")
    return text.replace("/* tones */", pictures.tone_style()).replace(
        "/* dark tones */", pictures.tone_style(pictures.DARK)
    )


def _verdict(totals: Totals) -> str:
    parts = [f"{totals.done} of {totals.items} done"] if totals.done < totals.items else [f"all {totals.items} done"]
    parts += [f"{totals.failed} failed"] if totals.failed else []
    parts += [f"{totals.waiting} not yet"] if totals.waiting else []
    return ", ".join(parts)


def _when(totals: Totals) -> str:
    if totals.first is None or totals.last is None:
        return ""
    took = totals.last - totals.first
    began, ended = (time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(one)) for one in (totals.first, totals.last))
    ended = ended[11:] if began[:10] == ended[:10] else ended
    rate = f", {size(totals.data_bytes / took)}/s of guest data" if took > 1 and totals.data_bytes else ""
    return f" · {began} to {ended} UTC ({span(took)}{rate})"


def _sums(totals: Totals) -> Iterator[str]:
    cells = [
        ("images", f"{totals.items}", _count(totals)),
        ("files read", size(totals.source_bytes), ""),
        ("disks they hold", size(totals.disk_bytes), f"with {size(totals.data_bytes)} of data"),
        ("files written", size(totals.target_bytes), _change(totals.source_bytes, totals.target_bytes)),
    ]
    if totals.disk_bytes > totals.target_bytes:
        spared = totals.disk_bytes - totals.target_bytes
        cells.append(("saved", size(spared), f"{_percent(spared, totals.disk_bytes)} less than the disks in full"))
    yield '<section aria-label="Sums">\n<dl class="sums">\n'
    for name, value, more in cells:
        small = f"<small>{shown(more)}</small>" if more else ""
        yield f"<div><dt>{shown(name)}</dt><dd>{shown(value)}{small}</dd></div>\n"
    yield "</dl>\n</section>\n"


def _count(totals: Totals) -> str:
    parts = [f"{totals.done} done", f"{totals.failed} failed"]
    return ", ".join([*parts, f"{totals.waiting} waiting"] if totals.waiting else parts)


def _change(before: int, after: int) -> str:
    if not before:
        return ""
    if abs(after - before) * 100 < before:
        return "as much as was read"
    word = "less" if after < before else "more"
    if after >= 2 * before:
        return f"{after / before:.1f} times what was read"
    return f"{_percent(abs(after - before), before)} {word} than was read"


def _failures(rows: Sequence[Row], failed: int, listed: int) -> Iterator[str]:
    if not rows:
        return
    yield '<section aria-labelledby="failures">\n<h2 id="failures">What failed</h2>\n<div class="wide">\n'
    yield '<table class="failures">\n<thead><tr><th scope="col" class="number">#</th><th scope="col">image</th>'
    yield '<th scope="col">why</th><th scope="col">what to do</th></tr></thead>\n<tbody>\n'
    for row in rows:
        error = row.result.get("error") or {}
        number = row.item.number
        link = f'<a href="#item-{number}">{number}</a>' if number <= listed else f"{number}"
        name = row.item.source.rsplit("/", 1)[-1]
        code = f"{error.get('kind', '')}, exit code {error.get('code', '?')}"
        yield f'<tr><td class="number">{link}</td><th scope="row" class="file">{shown(name)}</th>'
        yield f'<td class="why">{shown(_reason(row))}<small>{shown(code)}</small></td>'
        yield f'<td class="why">{shown(error.get("hint") or ADVICE.get(error.get("code", 0), "–"))}</td></tr>\n'
    yield "</tbody>\n</table>\n</div>\n"
    if failed > len(rows):
        yield f'<p class="soft">{failed - len(rows)} more failures are in report.json.</p>\n'
    yield "</section>\n"


def _reason(row: Row, most: int = 2000) -> str:
    error = row.result.get("error") or {}
    text = str(error.get("message") or "no reason is known").removeprefix(f"{row.item.source}: ")
    return text if len(text) <= most else text[: most - 1] + "…"


def _phases(totals: Totals) -> Iterator[str]:
    whole = sum(totals.phases.values())
    if not whole:
        return
    yield '<section aria-labelledby="times">\n<h2 id="times">Where the time went</h2>\n'
    yield phase_bar(totals.phases, "big")
    yield '<div class="wide">\n<table class="phases">\n<thead><tr><th scope="col">phase</th>'
    yield '<th scope="col">what it is</th><th scope="col" class="number">time, all images</th>'
    yield '<th scope="col" class="number">share</th></tr></thead>\n'
    yield "<tbody>\n"
    for phase, seconds in _ordered(totals.phases):
        yield f'<tr><th scope="row">{_swatch(f"p{_place(phase)}")}{shown(phase)}</th>'
        yield f"<td>{shown(MEANINGS.get(phase, ''))}</td>"
        yield f'<td class="number">{span(seconds)}</td><td class="number">{_percent(seconds, whole)}</td></tr>\n'
    yield "</tbody>\n</table>\n</div>\n</section>\n"


def _table(totals: Totals, rows: Sequence[Row], folder: str) -> Iterator[str]:
    yield '<section aria-labelledby="images">\n<h2 id="images">Images</h2>\n'
    if folder:
        yield f'<p class="soft">All from <span class="path">{shown(folder)}</span></p>\n'
    yield from _key()
    yield '<div class="wide" role="region" aria-labelledby="images" tabindex="0">\n<table class="images">\n'
    yield '<thead><tr><th scope="col" class="number">#</th><th scope="col">image, target</th>'
    yield '<th scope="col">state</th>'
    yield '<th scope="col" class="number">file read</th><th scope="col" class="number">disk</th>'
    yield '<th scope="col" class="number">file written</th><th scope="col" class="number">time</th>'
    yield '<th scope="col">where the data lies</th></tr></thead>\n<tbody>\n'
    for place, row in enumerate(rows):
        yield from _row(row, folder, drawn=place < PICTURES)
    yield "</tbody>\n</table>\n</div>\n"
    if totals.items > len(rows):
        yield f'<p class="soft">{totals.items - len(rows)} more images are in report.json.</p>\n'
    yield "</section>\n"


def _row(row: Row, folder: str, *, drawn: bool) -> Iterator[str]:
    report: Mapping[str, Any] = row.result.get("report") or {}
    item = row.item
    yield f'<tr id="item-{item.number}"><td class="number">{item.number}</td>'
    yield f'<th scope="row" class="file">{shown(item.source[len(folder) :])}'
    yield f"<small>→ {shown(item.target)}</small>{_more(row, report)}</th>"
    yield f'<td class="state {shown(row.state)}">{MARKS.get(row.state, "…")} {shown(row.state)}'
    yield f"<small>{row.attempts} tries</small></td>" if row.attempts > 1 else "</td>"
    if report:
        source, target = report["source"], report["target"]
        yield f'<td class="number">{size(source["size"])}<small>{shown(source["format"])}</small></td>'
        yield f'<td class="number">{size(target["virtual-size"])}<small>{_filled(report)}</small></td>'
        kind = f"{target['format']} {target['subformat']}".removesuffix(" None")
        yield f'<td class="number">{size(target["size"])}<small>{shown(kind)}</small></td>'
    else:
        yield '<td class="number">–</td><td class="number">–</td><td class="number">–</td>'
    yield f'<td class="number">{span(row.seconds) if row.seconds >= 0.001 else "–"}'
    yield phase_bar(row.result.get("phases") or {}, "small") + '</td><td class="maps">'
    maps = row.result.get("maps") or {}
    if row.state == FAILED:
        yield shown(_reason(row, most=110))
    elif drawn:
        for side in ("source", "target"):
            if cells := maps.get(side):
                strip = pictures.strip(cells, f"{side} of {item.target}: where it holds data")
                yield f'<div class="side"><span aria-hidden="true">{side}</span>{strip}</div>'
    yield "</td></tr>\n"


def _more(row: Row, report: Mapping[str, Any]) -> str:
    """What few look for, behind a click."""
    if not report:
        return ""
    notes = [str(one) for one in report.get("notes", ())]
    facts = [
        ("verified", report["verified"]),
        ("SHA-256", row.result.get("digest", "")),
        ("disk id", report["target"]["id"]),
        ("done by", row.result.get("where", "")),
    ]
    if report.get("confinement"):
        facts.append(("read confined by", ", ".join(report["confinement"])))
    facts += [("note", one) for one in notes]
    lines = "".join(f"<li>{shown(name)}: {shown(value)}</li>" for name, value in facts if value)
    word = f"details, {len(notes)} note{'s' if len(notes) > 1 else ''}" if notes else "details"
    return f"<details><summary>{word}</summary><ul>{lines}</ul></details>"


def _filled(report: Mapping[str, Any]) -> str:
    return f"{_percent(report['data-bytes'], report['target']['virtual-size'])} data"


def _key() -> Iterator[str]:
    yield '<p class="key"><span>Each strip is a disk, from its start to its end:</span>'
    for number, words in enumerate(pictures.tone_names()):
        yield f'<span class="tone">{_swatch(f"t{number}")}{words}</span>'
    yield "</p>\n"


def _swatch(kind: str) -> str:
    return (
        f'<svg class="swatch" viewBox="0 0 1 1" aria-hidden="true"><rect class="{kind}" width="1" height="1"/></svg>'
    )


def phase_bar(phases: Mapping[str, float], kind: str) -> str:
    """The phases side by side, as long as they took; their names are read out."""
    whole = sum(phases.values())
    if whole <= 0:
        return ""
    at, parts, words = 0.0, [], []
    for phase, seconds in _ordered(phases):
        width = 1000 * seconds / whole
        parts.append(f'<rect class="p{_place(phase)}" x="{at:.1f}" width="{width:.1f}" height="1"/>')
        words.append(f"{phase} {span(seconds)}")
        at += width
    label = shown(", ".join(words))
    return (
        f'<svg class="bar {kind}" role="img" viewBox="0 0 1000 1" preserveAspectRatio="none" aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}</svg>"
    )


def _place(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _ordered(phases: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(phases.items(), key=lambda one: _place(one[0]))


def _common_folder(sources: Sequence[str]) -> str:
    """What all sources begin with, up to a slash; empty unless that says something."""
    if len(sources) < 2:
        return ""
    first, last = min(sources), max(sources)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return first[: first[:same].rfind("/") + 1]


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 9.5 or share == 0 else f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def size(bytes_: float) -> str:
    """At most four digits and a unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if bytes_ < 1024 or unit == "TiB":
            break
        bytes_ /= 1024
    return f"{bytes_:.3g} {unit}" if bytes_ < 1000 else f"{bytes_:.0f} {unit}"


def span(seconds: float) -> str:
    """``3 ms``, ``4.2 s``, ``3 min 5 s``, ``2 h 7 min``."""
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
