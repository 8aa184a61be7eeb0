"""Reads the text of a spec, YAML or JSON, into plain values, and remembers the line of every field.

YAML scalars follow YAML 1.2 (core schema) with fewer types: only ``null``, ``true``, ``false`` and whole
numbers without leading zeros are anything but text. So ``secure_boot: off``, ``mac: 12:34:56:00:00:01``
and ``role: 1.10`` stay what was written; YAML 1.1 would make them false, a base-60 number and 1.1. Keys
given twice are refused.

Nothing of the text is ever quoted in an error: it may hold a password.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from imagekit.errors import InvalidSpec, SourceError

MAX_SPEC_SIZE = 1 << 20
"""Bytes of a spec file; user data inside it is at most 64 KiB."""

MAX_NESTING = 256
"""Lists and mappings in one another, in brackets."""

FieldPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class SpecText:
    """The values of a spec and, for YAML, the line (from 1) on which each field starts."""

    values: Mapping[str, object]
    lines: Mapping[FieldPath, int] = field(default_factory=dict)


def read_spec_file(path: Path) -> SpecText:
    """Read and parse; a name that ends in ``.json`` is JSON, everything else YAML.

    Raises SourceError when the file cannot be read, InvalidSpec when its text is not a mapping of fields.
    """
    text = read_regular_file(path, limit=MAX_SPEC_SIZE)
    try:
        parse = _parse_json if path.suffix.lower() == ".json" else parse_yaml
        return parse(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidSpec(f"not UTF-8 text: byte {error.start}", path=path) from None
    except RecursionError:
        raise InvalidSpec("nested too deep", path=path) from None
    except InvalidSpec as error:
        raise InvalidSpec(error.message, hint=error.hint, path=path) from None


def read_regular_file(path: Path, *, limit: int) -> bytes:
    """All bytes of a file of at most ``limit`` bytes. Raises SourceError."""
    try:
        if not path.is_file():  # a FIFO or a terminal would wait for ever
            reason = "not a regular file" if path.exists() else "no such file"
            raise SourceError(reason, path=path)
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", path=path) from error
    if len(content) > limit:
        raise SourceError(f"larger than {limit} bytes, the most that is read here", path=path)
    return content


class _CoreLoader(yaml.SafeLoader):
    """Composes nodes with the implicit types of the module's docstring; `_Builder` makes values of them."""

    # An empty table drops the resolvers of YAML 1.1; PyYAML looks them up by a scalar's first character.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_TAG = "tag:yaml.org,2002:"
_CoreLoader.add_implicit_resolver(f"{_TAG}null", re.compile(r"^(?:~|null|Null|NULL|)$"), [*"~nN", ""])
_CoreLoader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_CoreLoader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^-?(?:0|[1-9][0-9]*)$"), [*"-0123456789"])


def parse_yaml(text: str) -> SpecText:
    """The fields of a YAML mapping. Raises InvalidSpec."""
    if nesting(text) > MAX_NESTING:
        raise InvalidSpec("nested too deep")
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        # PyYAML quotes names of aliases and tags, and an unquoted password may look like one.
        problem = re.sub(r"'(?!<)[^']{2,}'", "(not shown)", error.problem or "unreadable")
        hint = "text that begins with * & ! % @ or a back-quote needs quotes"
        raise InvalidSpec(f"not valid YAML{where}: {problem}", hint=hint) from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise InvalidSpec(f"not valid YAML: {getattr(error, 'reason', 'unreadable')}") from None
    builder = _Builder()
    return SpecText(_fields(None if node is None else builder.value(node, ())), builder.lines)


def load_yaml(text: str) -> Any:
    """The values of YAML that a stranger may have written. Raises yaml.YAMLError, ValueError, RecursionError."""
    if nesting(text) > MAX_NESTING:
        raise RecursionError("nested too deep")
    return yaml.safe_load(text)


def nesting(text: str) -> int:
    """How many brackets are open at once, at most; those inside of quotes count too.

    PyYAML takes the square of their number for them.
    """
    most = depth = 0
    for sign in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if sign in "[{" else max(0, depth - 1)
        most = max(most, depth)
    return most


class _Builder:
    """Makes plain values of YAML nodes, once each: aliases can neither multiply nor contain themselves."""

    def __init__(self) -> None:
        self.lines: dict[FieldPath, int] = {}
        self._done: dict[yaml.Node, object] = {}
        self._open: set[yaml.Node] = set()

    def value(self, node: yaml.Node, path: FieldPath) -> object:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node in self._open:
            raise _at(node, "an alias to something that contains it")
        if node not in self._done:
            self._open.add(node)
            self._done[node] = self._build(node, path)
            self._open.remove(node)
        return self._done[node]

    def _build(self, node: yaml.Node, path: FieldPath) -> object:
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        raise _at(node, "a YAML tag that means nothing in a spec")

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise _at(key_node, "a field name that is not text: put it in quotes")
            if key in result:
                raise _at(key_node, f"field {key!r} is given twice")
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*path, key))
        return result


def _scalar(node: yaml.ScalarNode) -> str | int | bool | None:
    text: str = node.value
    if node.tag == f"{_TAG}str":
        return text
    if node.tag == f"{_TAG}null":
        return None
    if node.tag == f"{_TAG}bool":
        return text.lower() == "true"
    if node.tag == f"{_TAG}int":
        try:
            return int(text)
        except ValueError:  # thousands of digits, or !!int on something else
            raise _at(node, "a number that cannot be read") from None
    raise _at(node, "a YAML tag that means nothing in a spec")


def _at(node: yaml.Node, problem: str) -> InvalidSpec:
    return InvalidSpec(f"line {node.start_mark.line + 1}: {problem}")


def _parse_json(text: str) -> SpecText:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key, value in pairs:
            if key in result:
                raise InvalidSpec(f"field {key!r} is given twice")
            result[key] = value
        return result

    try:
        return SpecText(_fields(json.loads(text, object_pairs_hook=once)))
    except json.JSONDecodeError as error:
        raise InvalidSpec(f"not valid JSON, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError:
        raise InvalidSpec("not valid JSON: a number too long to read") from None


def _fields(values: object) -> Mapping[str, object]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "a single value"
        raise InvalidSpec(f"the spec is {found}, expected fields such as 'name: web1'")
    return values
