"""Manifests of a batch: which images become which files, and how.

A manifest is a list of items in YAML, JSON, JSON Lines or CSV, or simply a folder or a glob of images. An item has a
``source`` and, if it likes, a ``target`` and any option of a conversion; options given with the command are the
defaults. Everything is checked before the first image is opened, and what is wrong is said with its line.

    - source: images/debian.qcow2
      target: debian.vhdx
      size: 20G
"""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path, PurePath, PureWindowsPath
from types import MappingProxyType
from typing import Any

from imagekit import policy
from imagekit.batch.tasks import is_elsewhere
from imagekit.errors import ImagekitError, InvalidSpec, SourceError, UsageError
from imagekit.formats import registry
from imagekit.formats.base import GiB, KiB, MiB, TiB
from imagekit.plan import ConvertOptions
from imagekit.profiles import apply_profile
from imagekit.records import dataclass, field
from imagekit.remote.addresses import Access

MAX_SIZE = 256 * MiB
"""Bytes of a manifest."""
MAX_ITEMS = 1_000_000
DEFAULT_NAME = "{stem}{suffix}"
_BARE = (".qcow2", ".raw", ".img", ".vmdk", ".vdi", ".vhd", ".vhdx")
SUFFIXES = (*_BARE, *(one + packed for one in _BARE for packed in (".gz", ".xz", ".bz2", ".zst", ".zip")), ".ova")
"""What is taken for an image in a folder."""
OUR_NAMES = ("journal.sqlite", "report.html", "report.json")
"""What a run writes into its folder besides the targets."""

_SIZE = re.compile(r"(\d+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,]*")
_UNITS = {"": 1, "k": KiB, "m": MiB, "g": GiB, "t": TiB}
_SIZES = ("size", "block_size", "sector_size", "align")
_FLAGS = ("fix_gpt", "preallocate", "follow_references", "ignore_parent_id", "sync")
_NUMBERS = ("jobs", "timestamp")
_NOT_HERE = ("overwrite", "dry_run", "parent", "minimum_size", "identifier", "map_cells", "stated_format")
OPTIONS = frozenset(one.name for one in fields(ConvertOptions)) - frozenset(_NOT_HERE) | {"id", "profile"}


@dataclass(frozen=True, slots=True)
class Item:
    """One conversion: its place in the manifest, and the keywords of :func:`imagekit.convert`."""

    number: int
    source: str
    target: str
    """Relative to the run's folder, with forward slashes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    line: int | None = None


def load(
    manifest: str, defaults: Mapping[str, Any], *, name: str = DEFAULT_NAME, kind: str | None = None
) -> list[Item]:
    """The items of a manifest file, of a folder, or of a glob; checked, in the order written.

    ``defaults`` are options for items that say nothing else; ``name`` is the template of target names, with the
    fields ``stem``, ``suffix``, ``name``, ``format`` and ``number``. Raises InvalidSpec with the line of a mistake.
    """
    path = Path(manifest)
    if path.is_dir():
        rows: Iterable[tuple[int | None, Mapping[str, Any]]] = ((None, {"source": str(one)}) for one in _images(path))
        base = Path()
    elif any(character in manifest for character in "*?["):
        rows = ((None, {"source": one}) for one in sorted(glob.glob(manifest, recursive=True)))  # noqa: PTH207 - a text, not a folder's
        base = Path()
    else:
        rows, base = _rows(path, kind), path.parent
    return _checked(rows, base, defaults, name, manifest)


def from_glance(query: str, defaults: Mapping[str, Any], access: Access, *, name: str = DEFAULT_NAME) -> list[Item]:
    """The active images of Glance that ``query`` chooses: its filters, ``disk_format=qcow2 visibility=public``.

    ``{stem}`` and ``{name}`` of the template are the image's name there, ``{id}`` its id.
    """
    filters = [("status", "active")]
    for part in query.replace("&", " ").split():
        key, sign, value = part.partition("=")
        if not (key and sign):
            raise UsageError(f"--from-glance {part!r} is no filter", hint="--from-glance 'disk_format=qcow2'")
        filters.append((key, value))
    images = list(islice(access.glance().listed(filters), MAX_ITEMS + 1))
    rows = [(None, {"source": image.label}) for image in images]
    return _checked(rows, Path(), defaults, name, f"glance:{query}", {one.label: one.name for one in images})


def _checked(
    rows: Iterable[tuple[int | None, Mapping[str, Any]]],
    base: Path,
    defaults: Mapping[str, Any],
    name: str,
    manifest: str,
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[Item]:
    """The items of the rows. ``names`` are those of sources whose address is none."""
    _check_template(name)
    items: list[Item] = []
    taken: dict[str, Item] = {}
    folders: dict[str, Item] = {}
    for number, (line, row) in enumerate(rows, start=1):
        if number > MAX_ITEMS:
            raise InvalidSpec(f"more than {MAX_ITEMS} items", path=manifest, hint="make it several runs")
        try:
            item = _item(number, line, row, base, defaults, name, names)
        except ImagekitError as error:
            where = f"line {line}: " if line is not None else ""
            raise InvalidSpec(f"{where}item {number}: {error.message}", hint=error.hint, path=manifest) from None
        other = taken.setdefault(item.target.lower(), item)
        for above in PurePath(item.target.lower()).parents[:-1]:
            folders.setdefault(above.as_posix(), item)
        if other is not item:
            raise _clash(item, f"its target {item.target!r} is that of", other, manifest)
        items.append(item)
    for name in taken.keys() & folders.keys():
        raise _clash(taken[name], f"its target {name!r} is a folder to", folders[name], manifest)
    if not items:
        raise InvalidSpec(
            "no image in it", path=manifest, hint=f"a folder's images are called *{', *'.join(_BARE)}, …"
        )
    return items


def _clash(item: Item, what: str, other: Item, manifest: str) -> InvalidSpec:
    where = f"line {item.line}: " if item.line is not None else ""
    there = f"the item on line {other.line}" if other.line is not None else f"item {other.number}"
    return InvalidSpec(
        f"{where}item {item.number}: {what} {there} ({other.source}) too",
        hint="give one of them another target, or use --name '{number}-{stem}{suffix}'"
        + (" (or '{stem}-{id}{suffix}')" if item.source.startswith("glance:") else ""),
        path=manifest,
    )


def _images(folder: Path) -> Iterator[Path]:
    yield from sorted(one for one in folder.iterdir() if one.is_file() and one.name.lower().endswith(SUFFIXES))


def _rows(path: Path, kind: str | None) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    kind = (kind or path.suffix[1:]).lower()
    try:
        if path.stat().st_size > MAX_SIZE:
            raise SourceError(f"larger than {MAX_SIZE} bytes, the most that is read here", path=path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"not UTF-8 text: byte {error.start}", path=path) from None
    readers = {"csv": _csv, "jsonl": _json_lines, "json": _json, "yaml": _yaml, "yml": _yaml}
    if kind not in readers:
        raise UsageError(f"{path.name} is no manifest by its name", hint="call it NAME.yaml, .json, .jsonl or .csv")
    try:
        yield from readers[kind](text)
    except InvalidSpec as error:
        raise InvalidSpec(error.message, hint=error.hint, path=path) from None


def _csv(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise InvalidSpec(f"line {reader.line_num}: more cells than the first line names")
            yield reader.line_num, {str(key): value for key, value in row.items() if value not in ("", None)}
    except csv.Error as error:
        raise InvalidSpec(f"line {reader.line_num}: {error}") from None


def _json_lines(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, one in enumerate(text.splitlines(), start=1):
        if one.strip():
            try:
                row = json.loads(one)
            except (ValueError, RecursionError) as error:
                raise InvalidSpec(f"line {line}: {error}") from None
            yield line, _mapping(row, line)


def _json(text: str) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    try:
        rows = _listed(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InvalidSpec(str(error)) from None
    # It is a list, or an object with nothing but one: each item is read once more, for where it begins.
    decoder, place, line, seen = json.JSONDecoder(), text.index("[") + 1, 1, 0
    for row in rows:
        place = _BETWEEN.match(text, place).end()  # type: ignore[union-attr]
        line, seen = line + text.count("\n", seen, place), place
        yield line, _mapping(row, line)
        _, place = decoder.raw_decode(text, place)


def _yaml(text: str) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        node = yaml.compose(text, Loader=loader)
        rows = yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InvalidSpec(f"line {mark.line + 1 if mark else '?'}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidSpec(f"no YAML: {error}") from None
    if isinstance(node, yaml.MappingNode):
        node = next((value for key, value in node.value if key.value == "items"), None)
    lines = [one.start_mark.line + 1 for one in node.value] if isinstance(node, yaml.SequenceNode) else []
    for number, row in enumerate(_listed(rows)):
        line = lines[number] if number < len(lines) else None
        yield line, _mapping(row, line)


def _listed(rows: Any) -> list[Any]:
    if isinstance(rows, dict) and set(rows) == {"items"}:
        rows = rows["items"]
    if not isinstance(rows, list):
        raise InvalidSpec("not a list of items", hint="- source: debian.qcow2")
    return rows


def _mapping(row: Any, line: int | None) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"source": row}
    if not isinstance(row, dict):
        where = f"line {line}: " if line is not None else ""
        raise InvalidSpec(f"{where}an item is a source, or a mapping with one", hint="- source: debian.qcow2")
    return row


def _item(
    number: int,
    line: int | None,
    row: Mapping[str, Any],
    base: Path,
    defaults: Mapping[str, Any],
    name: str,
    names: Mapping[str, str],
) -> Item:
    row = {str(key).replace("-", "_"): value for key, value in row.items()}
    source = row.pop("source", None)
    target = row.pop("target", None)
    if not isinstance(source, str) or not source:
        raise InvalidSpec("no source", hint="source: debian.qcow2")
    if unknown := sorted(set(row) - OPTIONS):
        raise InvalidSpec(
            f"unknown: {', '.join(unknown)}", hint=f"known: source, target, {', '.join(sorted(OPTIONS))}"
        )
    options = {**defaults, **{key: _value(key, value) for key, value in row.items()}}
    # Also what only shows when an option is used: a profile, a level of verification, a rule.
    asked = _asked(options)
    if target is None:
        target = _named(name, number, source, names.get(source), asked)
    return Item(number, source if is_elsewhere(source) else str(base / source), _relative(target), options, line)


def _value(key: str, value: Any) -> Any:
    """A cell of CSV is text; in YAML and JSON a size may be one too."""
    if key in _SIZES and isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise InvalidSpec(f"{key}: {value!r} is not a size", hint="20G, 512MiB or bytes")
        return int(match[1]) * _UNITS[match[2].lower()]
    if key in _FLAGS and isinstance(value, str):
        if value.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise InvalidSpec(f"{key}: {value!r} is neither true nor false")
        return value.lower() in ("true", "yes", "1")
    if key in _NUMBERS and isinstance(value, str):
        if not value.isascii() or not value.isdigit():
            raise InvalidSpec(f"{key}: {value!r} is not a whole number")
        return int(value)
    if key == "allow":
        return value.split() if isinstance(value, str) else list(value)
    return value


def _asked(options: Mapping[str, Any]) -> ConvertOptions:
    values = {key: value for key, value in options.items() if key not in ("profile", "id")}
    values["allow"] = policy.check_allowed(values.get("allow", ()))
    try:
        asked = ConvertOptions(**values)
    except TypeError as error:
        raise InvalidSpec(str(error)) from None
    return apply_profile(options["profile"], asked) if options.get("profile") else asked


def _named(name: str, number: int, source: str, called: str | None, asked: ConvertOptions) -> str:
    if asked.target_format is None:
        raise InvalidSpec("neither a target nor a format", hint="target: NAME.vhdx, or -O vhdx, or --for hyperv")
    chosen = registry.find(asked.target_format)
    identifier = source.rsplit(":", 1)[-1] if ":" in source[2:] else ""
    file = PurePath(identifier or source).name if called is None else re.sub(r"[\\/:\0]", "_", called) or identifier
    stem = file.split(".")[0] if file.lower().endswith(SUFFIXES) else PurePath(file).stem
    return name.format(
        stem=stem, name=file, suffix=chosen.suffixes[0], format=chosen.name, number=number, id=identifier
    )


def _check_template(name: str) -> None:
    known = {"stem", "name", "suffix", "format", "number", "id"}
    try:
        used = {one for _, one, _, _ in string.Formatter().parse(name) if one is not None}
    except ValueError as error:
        raise UsageError(f"--name {name!r}: {error}") from None
    if unknown := sorted(used - known):
        raise UsageError(
            f"--name {name!r} has no field {', '.join(unknown)}", hint=f"fields: {', '.join(sorted(known))}"
        )


def _relative(target: Any) -> str:
    """A path below the run's folder, and nowhere else."""
    if not isinstance(target, str) or not target:
        raise InvalidSpec("the target is not a name")
    path = PureWindowsPath(target)  # knows both kinds of separators, and drives
    if path.drive or path.root or ".." in path.parts or "\0" in target or not path.parts:
        raise InvalidSpec(f"the target {target!r} is not below the run's folder", hint="target: NAME.vhdx")
    if path.parts[0].lower().removeprefix(".").startswith(OUR_NAMES):
        raise InvalidSpec(f"the target {target!r} has the name of what the run itself writes", hint="another name")
    return "/".join(path.parts)
