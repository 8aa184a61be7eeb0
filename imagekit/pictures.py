"""Pictures of where a disk holds data: a row of parts, each as dark as it is full; drawn as SVG.

The batch's report shows a strip a disk, ``imagekit map --output svg`` one disk as a document of its own. Both are
drawn here, from the same cells, for light and dark, with words for who does not see them.

Not here: the extents (formats).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from imagekit.formats.base import Extent

MOST_CELLS = 4096
LEVELS = (0, 1, 25, 50, 75)
"""From how many percent of data on a part of a disk is drawn in the next stronger tone."""

LIGHT = ("#e4e8ec", "#b6d2fb", "#7fb1f5", "#4a8fea", "#1f5fbf")
DARK = ("#2b323b", "#1c3a63", "#24609f", "#3d87e0", "#8ec0ff")
"""A tone a level: the fuller, the further from the paper."""

COLUMNS, ROWS = 64, 16
_CELL, _GAP, _MARGIN, _HEAD, _FOOT = 12, 2, 16, 58, 40


def occupancy(extents: Iterable[Extent], size: int, cells: int) -> tuple[int, ...]:
    """How full each of ``cells`` equal parts of a disk is with data, in percent; a part with any has at least 1."""
    size = max(1, size)
    held = [0] * cells
    for extent in extents:
        if not extent.data:
            continue
        first, last = extent.start * cells // size, (extent.end - 1) * cells // size
        for cell in range(first, min(last, cells - 1) + 1):
            low, high = cell * size // cells, (cell + 1) * size // cells
            held[cell] += min(extent.end, high) - max(extent.start, low)
    return tuple(min(100, -(-one * 100 * cells // size)) for one in held)


def tone(percent: int) -> int:
    """Which of the tones a part is drawn in."""
    return sum(1 for low in LEVELS[1:] if percent >= low)


def tone_names() -> Iterator[str]:
    """What each tone means, in words."""
    for low, high in zip(LEVELS, (*LEVELS[1:], 101), strict=True):
        yield "no data" if low == 0 else f"{low} to {high - 1} % data"


def tone_style(tones: Sequence[str] = LIGHT) -> str:
    """The rules that colour them."""
    return " ".join(f".t{number} {{ fill: {colour}; }}" for number, colour in enumerate(tones))


def strip(cells: Sequence[int], label: str) -> str:
    """A strip as wide as the disk, to stand in a page that has :func:`tone_style`; empty without cells."""
    if not cells:
        return ""
    full = round(sum(cells) / len(cells))
    words = shown(f"{label}, {full} percent of it")
    return (
        f'<svg class="map" role="img" viewBox="0 0 {len(cells)} 1" preserveAspectRatio="none" '
        f'aria-label="{words}"><title>{words}</title>{"".join(_runs(cells, 0, 0, 1, 1))}</svg>'
    )


def document(cells: Sequence[int], title: str, facts: Mapping[str, str]) -> str:
    """One disk as an SVG of its own: parts in rows, from the disk's start at the top left to its end."""
    columns = min(COLUMNS, len(cells))
    step = _CELL + _GAP
    rows = -(-len(cells) // columns)
    width = max(columns * step - _GAP, 620) + 2 * _MARGIN
    height = _HEAD + rows * step + _FOOT
    said = "; ".join(f"{name}: {value}" for name, value in facts.items())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title desc" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">\n',
        f'<title id="title">{shown(title)}</title>\n<desc id="desc">{shown(said)}</desc>\n',
        f"<style>{_document_style()}</style>\n",
        f'<rect class="paper" width="{width}" height="{height}"/>\n',
        f'<text class="head" x="{_MARGIN}" y="24">{shown(_cut(title, width // 9))}</text>\n',
        f'<text x="{_MARGIN}" y="44">{shown(_cut(said, width // 6))}</text>\n',
    ]
    for row in range(rows):
        part = cells[row * columns : (row + 1) * columns]
        for column, percent in enumerate(part):
            x, y = _MARGIN + column * step, _HEAD + row * step
            parts.append(f'<rect class="t{tone(percent)}" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}"/>')
        parts.append("\n")
    y = _HEAD + rows * step + 16
    for number, words in enumerate(tone_names()):
        x = _MARGIN + number * 120
        parts.append(f'<rect class="t{number}" x="{x}" y="{y - 10}" width="{_CELL}" height="{_CELL}"/>')
        parts.append(f'<text x="{x + _CELL + 5}" y="{y}">{words}</text>\n')
    return "".join(parts) + "</svg>\n"


def _document_style() -> str:
    return (
        "text { font: 12px system-ui, sans-serif; fill: #4d5761; } .head { font-size: 15px; font-weight: 600; "
        f"fill: #1b1f24; }} .paper {{ fill: #ffffff; }} {tone_style()} "
        "@media (prefers-color-scheme: dark) { text { fill: #aab4be; } .head { fill: #e6edf3; } "
        f".paper {{ fill: #0d1117; }} {tone_style(DARK)} }}"
    )


def _runs(cells: Sequence[int], x: int, y: int, width: int, height: int) -> Iterator[str]:
    """Neighbours of one tone are one rectangle."""
    start, tones = 0, [tone(percent) for percent in cells]
    for end in range(1, len(tones) + 1):
        if end == len(tones) or tones[end] != tones[start]:
            yield (
                f'<rect class="t{tones[start]}" x="{x + start * width}" y="{y}" width="{(end - start) * width}" '
                f'height="{height}"/>'
            )
            start = end


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: object) -> str:
    """Escaped for HTML and SVG, control characters and direction marks too: names come from strangers."""
    from html import escape

    return escape("".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(value)))
