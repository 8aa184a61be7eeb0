"""The hostile corpus: images that lie are refused, or their damage is found, and nothing else happens.

What is expected of each image is in the corpus (fixtures/hostile), which knows nothing of imagekit. Each goes
through the command line as a user's file would; what a command opens is watched by an audit hook of Python.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fixtures import vmdk_images
from fixtures.hostile import CLASSES, Hostile, corpus, vmdk
from fixtures.hostile.__main__ import BEGIN, README, table, write
from imagekit import policy
from imagekit.errors import TargetError
from imagekit.formats.base import MiB
from tests.hostile_runs import INTERNAL, ROOT, Opened, Ran, convert, given, limit, limited, run

CORPUS = corpus()
LIGHT = {name: one for name, one in CORPUS.items() if not one.heavy}
SOUND = {name: one for name, one in LIGHT.items() if one.verdict == "sound"}
REFUSED = {name: one for name, one in LIGHT.items() if one.verdict == "refused"}
TOLERATED = {name: one for name, one in LIGHT.items() if one.verdict == "tolerated"}
NOTED = {name: one for name, one in LIGHT.items() if one.verdict == "noted"}

SECONDS = 1.0
"""Of processors, for one command."""

SEEN_WHEN_READ = ("l_output", "l_memory_plan")
"""What a conversion would write and plan; a look does neither."""

LOOKED = {0, 11, 12, 13}
"""Exit codes of commands that only look."""


@pytest.fixture(autouse=True)
def _memory_of_this_machine() -> Iterator[None]:
    """What an image makes a reader ask for must not be had from whoever runs the tests."""
    with limited(512 * MiB):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture
def image(request: pytest.FixtureRequest, folder: Path) -> Iterator[Path]:
    """The entry's file."""
    entry: Hostile = request.getfixturevalue("entry")
    path = entry.made().write(folder / f"{entry.name}{entry.suffix}")
    yield path
    path.unlink()


@pytest.fixture
def out(folder: Path) -> Iterator[Path]:
    """A folder for targets; empty again afterwards."""
    made = folder / "out"
    made.mkdir()
    yield made
    for left in made.iterdir():
        left.unlink()
    made.rmdir()


def entries(chosen: dict[str, Hostile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", chosen.values(), ids=chosen)


def assert_contained(ran: Ran, image: Path, out: Path | None = None, *, seconds: float = SECONDS) -> None:
    """Nothing but the image was opened, to be read; it took no time, broke nothing and controlled no terminal."""
    assert ran.code != INTERNAL
    assert "Traceback" not in ran.stderr
    packed = image.name.startswith(("w_", "s_"))
    assert {one for one in ran.opened if not _is_ours(one, out, packed)} <= {Opened("read", str(image))}
    assert ran.seconds < seconds
    assert [one for one in ran.printed if not one.isprintable() and one != "\n"] == []


def _is_ours(opened: Opened, out: Path | None, packed: bool) -> bool:
    """The target; for what is packed also a file without a name among the temporary ones."""
    path = Path(opened.path)
    nameless = path == Path(tempfile.gettempdir()) or path.name.startswith(".imagekit-")
    return (out is not None and path.is_relative_to(out)) or (packed and opened.how == "write" and nameless)


# --- the corpus ------------------------------------------------------------------------------------------------


def test_the_corpus_has_lies_of_every_format_every_class_and_every_verdict() -> None:
    assert len(CORPUS) >= 600
    assert {name[0] for name in CORPUS} == set("vxqmdpnwsl")
    assert {one.kind for one in CORPUS.values()} == set(CLASSES)
    for letter in "vxqmdw":
        assert len([name for name in REFUSED if name.startswith(letter)]) > 40


def test_every_rule_of_the_corpus_is_one_of_the_policy() -> None:
    assert {one.rule for one in CORPUS.values() if one.rule} <= set(policy.RULES)
    refusing = {one.rule for one in CORPUS.values() if one.rule and one.verdict == "refused"}
    assert {policy.RULES[rule].severity for rule in refusing} == {policy.Severity.REFUSE}


def test_the_corpus_uses_nothing_of_what_it_is_to_test() -> None:
    for path in [*(ROOT / "fixtures" / "hostile").iterdir(), *(ROOT / "fixtures").glob("*_images.py")]:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert [name for name in names if name.partition(".")[0] == "imagekit"] == [], path


def test_its_documentation_is_what_is_generated() -> None:
    """Renew it: python -m fixtures.hostile --readme."""
    assert README.read_text(encoding="utf-8").split(BEGIN)[1] == "\n" + table()


@pytest.mark.slow
def test_it_can_be_written_to_a_folder_for_other_readers_and_is_the_same_each_time(tmp_path: Path) -> None:
    assert write(tmp_path / "corpus") == len(CORPUS)
    described = json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert {one["file"] for one in described} == {f"{one.name}{one.suffix}" for one in CORPUS.values()}
    assert len(list((tmp_path / "corpus").iterdir())) == len(CORPUS) + 1
    again = corpus()
    for name, entry in LIGHT.items():
        assert entry.made() == again[name].made()


# --- controls --------------------------------------------------------------------------------------------------


@entries(SOUND)
def test_a_sound_image_is_read_and_no_rule_refuses_it(entry: Hostile, image: Path, out: Path) -> None:
    """Else a refusal would say nothing about the lie."""
    ran = convert(image, out / "target.raw")
    assert ran.code == 0, ran.stderr
    assert_contained(ran, image, out)
    looked = run("info", image, "--output", "json")
    assert looked.code == 0
    rules = {one["rule"] for one in looked.json()["findings"]}
    assert rules <= {"wrapped"}


@pytest.mark.parametrize("make", [vmdk_images.cowd, vmdk_images.sesparse], ids=["cowd", "sesparse"])
def test_the_parts_that_lies_are_put_in_are_sound(
    make: Callable[[vmdk_images.Recipe], vmdk_images.Vmdk], tmp_path: Path
) -> None:
    path = tmp_path / "sound.vmdk"
    path.write_bytes(make(vmdk.recipe()).data)
    assert convert(path, tmp_path / "out.raw", "--allow", "no-descriptor").code == 0
    assert run("check", path).code == 0


# --- refused ---------------------------------------------------------------------------------------------------


@entries(REFUSED)
def test_nothing_is_made_of_it(entry: Hostile, image: Path, out: Path) -> None:
    _assert_refused(entry, image, out, out / "target.raw")


def _assert_refused(entry: Hostile, image: Path, out: Path, target: Path, *, seconds: float = SECONDS) -> None:
    ran = convert(image, target, *given(entry))
    assert ran.code in entry.codes, ran.stderr
    assert str(target if ran.code == TargetError.exit_code else image) in ran.stderr
    assert re.search(entry.says, ran.stderr), ran.stderr
    if entry.rule:
        assert f"refused by rule {entry.rule}" in ran.stderr
    assert list(out.iterdir()) == []
    assert_contained(ran, image, out, seconds=seconds)


@pytest.mark.slow
@entries(REFUSED)
def test_nothing_else_is_made_of_it_either(entry: Hostile, image: Path, out: Path) -> None:
    _assert_refused(entry, image, out, out / "target.vhdx")


@pytest.mark.slow
@entries({name: one for name, one in CORPUS.items() if one.heavy})
def test_a_bomb_is_given_up_at_the_limit(entry: Hostile, image: Path, out: Path) -> None:
    """The limit is 256 MiB of data more than a small file may unpack to: it is written, and gone again."""
    _assert_refused(entry, image, out, out / "target.raw", seconds=20)


@entries(
    {
        name: one
        for name, one in REFUSED.items()
        if one.rule and one.kind not in ("bombs", "contents") and not one.name.startswith(SEEN_WHEN_READ)
    }
)
def test_info_names_the_rule_that_refuses_it(entry: Hostile, image: Path) -> None:
    """Where the image can be looked at; one that two formats claim may be neither, an archive not be opened."""
    ran = run("info", image, "--deep", "--output", "json", *limit(entry))
    assert ran.code in LOOKED
    if ran.code:
        assert entry.rule == "ambiguous" or entry.name.startswith("w_")
        return
    assert (entry.rule, "refuse") in {(one["rule"], one["severity"]) for one in ran.json()["findings"]}


ONE_OF_EACH = {(one.suffix, min(one.codes), one.rule): name for name, one in REFUSED.items()}


@pytest.mark.slow
@entries({name: REFUSED[name] for name in ONE_OF_EACH.values()})
def test_a_refusal_in_json_has_a_code_a_kind_and_a_message(entry: Hostile, image: Path, out: Path) -> None:
    ran = convert(image, out / "target.vhd", "--output", "json", *given(entry))
    said = json.loads(ran.stderr.splitlines()[-1])
    assert (said["message_type"], said["code"]) == ("exit_error", ran.code)
    assert ran.code in entry.codes
    assert said["kind"].isidentifier()
    assert str(image) in said["message"]
    assert ran.stdout == ""


@pytest.mark.slow
@entries(LIGHT)
def test_looking_at_it_does_no_harm(entry: Hostile, image: Path) -> None:
    for command in ("info", "map", "check"):
        allowed_rule = ("--allow", entry.allow) if command == "map" and entry.allow else ()
        ran = run(command, image, *allowed_rule)
        allowed = LOOKED if command != "map" else {0, *entry.codes}
        assert ran.code in allowed, ran.stderr
        assert_contained(ran, image)


# --- what is found ---------------------------------------------------------------------------------------------


@entries(TOLERATED)
def test_check_finds_what_no_guest_would_notice(entry: Hostile, image: Path, out: Path) -> None:
    ran = run("check", image)
    assert ran.code in entry.codes
    assert re.search(entry.says, ran.stdout), ran.stdout
    converted = convert(image, out / "target.raw")
    assert_contained(converted, image, out)
    assert converted.code == 0, converted.stderr
    assert re.search(entry.says, converted.stderr), "the conversion says so, too"
    looked = run("info", image, "--deep", "--output", "json").json()["findings"]
    assert [one["severity"] for one in looked if re.search(entry.says, one["message"])] == ["warn"]


@entries({name: one for name, one in REFUSED.items() if one.rule in policy.PROBLEMS.values()})
def test_check_finds_what_the_tables_say_wrong(entry: Hostile, image: Path) -> None:
    """What a pass over all tables refuses is damage to a check, too."""
    assert run("check", image).code == 11


@entries(NOTED)
def test_what_is_odd_and_certain_is_read_with_a_finding(entry: Hostile, image: Path, out: Path) -> None:
    ran = convert(image, out / "target.raw")
    assert ran.code == 0, ran.stderr
    assert_contained(ran, image, out)
    assert [one.name for one in out.iterdir()] == ["target.raw"]
    looked = run("info", image, "--output", "json")
    assert_contained(looked, image)
    found = looked.json()["findings"]
    if entry.rule is None:
        assert found == []
        return
    assert [one["severity"] for one in found if one["rule"] == entry.rule] in (["warn"], ["note"])
    assert any(re.search(entry.says, one["message"]) for one in found)


# --- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what it should on Linux only")
def test_the_whole_corpus_is_taken_in_64_mib() -> None:
    code = [sys.executable, "-m", "tests.hostile_runs", "--json"]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(CORPUS)
    assert {name: one["failed"] for name, one in found.items() if one["failed"]} == {}
    assert [name for name, one in found.items() if one["made"] and CORPUS[name].verdict == "refused"] == []
    assert [name for name, one in found.items() if one["peak"] >= 64 * MiB] == []
