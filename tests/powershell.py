"""What our PowerShell scripts say, as a grammar that is not ours reads them; and what each host knows, as facts.

The grammar (tree-sitter-powershell) runs in an environment of its own and answers in JSON: errors, the commands
with their named parameters and the `Test-Parameter` questions before them, the WMI properties set with their types.
It is a grammar, not PowerShell: that a script parses does not say that it runs.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tests.oracles import need_venv

FACTS = Path(__file__).parents[1] / "fixtures" / "hyperv" / "capabilities.json"
VERSIONS = ("2012", "2012r2", "2016", "2019", "2022", "2025")
COMMON = frozenset(("erroraction", "errorvariable", "verbose", "debug", "warningaction", "outvariable", "whatif"))

_READ = r"""
import json, re, sys
from tree_sitter import Language, Parser
import tree_sitter_powershell
parser = Parser(Language(tree_sitter_powershell.language()))

def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)

def text(node):
    return node.text.decode()

def arguments(command):
    elements = [child for child in command.children if child.type == "command_elements"]
    return [one for group in elements for one in group.children if one.type != "command_argument_sep"]

def name(command):
    return next((text(child) for child in command.children if child.type == "command_name"), None)

def guards(command):
    found, node = [], command
    while node.parent is not None:
        parent = node.parent
        if parent.type in ("if_statement", "elseif_clause") and node.type == "statement_block":
            before = parent.children[: [child.id for child in parent.children].index(node.id)]
            for condition in before:
                if condition.type != "pipeline":
                    continue
                for asked in walk(condition):
                    if asked.type == "command" and name(asked) == "Test-Parameter":
                        found.append([text(one).strip("'") for one in arguments(asked)])
        node = parent
    return found

def cast(entry):
    value = text(entry).split("=", 1)[1].strip()
    kind = re.match(r"\[([a-z0-9]+(?:\[\])?)\]", value)
    return kind.group(1) if kind else None

def read(path):
    tree = parser.parse(open(path, "rb").read()).root_node
    wrong = [n for n in walk(tree) if n.type == "ERROR" or n.is_missing or n.type == "command_name" and not n.text]
    errors = [f"line {n.start_point[0] + 1}: {text(n)[:60]}" for n in wrong]
    commands, sets = [], []
    for node in walk(tree):
        if node.type != "command" or name(node) is None:
            continue
        given = arguments(node)
        named = [text(one).lstrip("-") for one in given if one.type == "command_parameter"]
        commands.append({
            "name": name(node), "named": named, "guards": guards(node), "line": node.start_point[0] + 1,
            "first": given[0].type if given else None, "texts": [text(one) for one in given],
            "values": [text(one).strip("'") for one in given if text(one).startswith("'")],
        })
        if name(node) == "Set-Properties":
            entries = [one for one in walk(node) if one.type == "hash_entry"]
            for entry in entries:
                key = text(entry.children[0]).strip("'")
                sets.append({"class": text(given[1]).strip("'"), "property": key, "type": cast(entry)})
    functions = [text(child) for n in walk(tree) if n.type == "function_statement"
                 for child in n.children if child.type == "function_name"]
    strings = [text(n).strip("'") for n in walk(tree) if n.type == "string_literal"]
    return {"errors": errors, "commands": commands, "sets": sets, "functions": functions, "strings": strings}

print(json.dumps({path: read(path) for path in sys.argv[1:]}))
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command in a script: its named parameters, and the questions (command, parameter) that come before it."""

    name: str
    named: tuple[str, ...]
    guards: tuple[tuple[str, str], ...]
    line: int
    first: str | None
    texts: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def cmdlet(self) -> str:
        return self.name.rpartition("\\")[2]


@dataclass(frozen=True, slots=True)
class Script:
    """A script as the grammar reads it."""

    name: str
    errors: tuple[str, ...]
    commands: tuple[Command, ...]
    sets: tuple[tuple[str, str, str | None], ...]
    functions: tuple[str, ...]
    strings: tuple[str, ...]


def read_scripts(paths: Iterable[Path]) -> dict[str, Script]:
    """The scripts by name."""
    names = [str(path) for path in paths]
    done = subprocess.run(
        [str(need_venv("powershell")), "-c", _READ, *names], capture_output=True, text=True, check=True
    )
    return {Path(path).name: _script(Path(path).name, facts) for path, facts in json.loads(done.stdout).items()}


def _script(name: str, facts: dict[str, Any]) -> Script:
    commands = tuple(
        Command(
            one["name"],
            tuple(one["named"]),
            tuple((guard[0], guard[1]) for guard in one["guards"]),
            one["line"],
            one["first"],
            tuple(one["texts"]),
            tuple(one["values"]),
        )
        for one in facts["commands"]
    )
    sets = tuple((one["class"], one["property"], one["type"]) for one in facts["sets"])
    return Script(name, tuple(facts["errors"]), commands, sets, tuple(facts["functions"]), tuple(facts["strings"]))


@functools.cache
def shipped() -> dict[str, Script]:
    """Every script of the package."""
    folder = Path(str(files("imagekit.hyperv").joinpath("scripts")))
    return read_scripts(sorted(folder.glob("*.ps1")))


@functools.cache
def facts() -> dict[str, Any]:
    """What hosts know."""
    known: dict[str, Any] = json.loads(FACTS.read_text(encoding="ascii"))
    return known


@functools.cache
def parameters(cmdlet: str, version: str) -> frozenset[str] | None:
    """The parameters, aliases too and all in lower case, of a Hyper-V cmdlet on a version; None: it is not there.

    2016 is what its documentation and the recording of a real host agree on, where the recording has the cmdlet.
    """
    entry = facts()["cmdlets"].get(cmdlet)
    digit = str(VERSIONS.index(version) + 1)
    if entry is None or digit not in entry["in"]:
        return None
    recorded = version == "2016" and "r" in entry["in"]
    found: set[str] = set()
    for where, names in entry.items():
        if where != "in" and digit in where and (not recorded or "r" in where):
            found.update(name for one in names.split() for name in one.lower().split("|"))
    return frozenset(found)


def has(guard: tuple[str, str], version: str) -> bool:
    """Whether `Test-Parameter` with these two would say yes on this version."""
    known = parameters(guard[0].rpartition("\\")[2], version)
    return known is not None and guard[1].lower() in known
