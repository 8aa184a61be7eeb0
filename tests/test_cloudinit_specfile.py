"""The text of a spec: what YAML and JSON come to, and what is refused with its line but not its content."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from imagekit.cloudinit.specfile import MAX_SPEC_SIZE, SpecText, read_spec_file
from imagekit.errors import InvalidSpec, SourceError


def read(tmp_path: Path, text: str | bytes, *, name: str = "spec.yaml") -> SpecText:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_spec_file(path)


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("off", "off"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("12:34:56:00:00:01", "12:34:56:00:00:01"),
        ("1.10", "1.10"),
        ("1e3", "1e3"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("001560000001", "001560000001"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("0", 0),
        ("-12", -12),
        ("1500", 1500),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1500'", "1500"),
        ("!!str 1500", "1500"),
    ],
)
def test_a_scalar_is_what_it_looks_like(tmp_path: Path, scalar: str, value: object) -> None:
    read_value = read(tmp_path, f"a: {scalar}\n").values["a"]
    assert (type(read_value), read_value) == (type(value), value)


def test_every_field_has_its_line(tmp_path: Path) -> None:
    lines = read(tmp_path, "# comment\nname: a\nnetwork:\n  links:\n    - id: x\n      mac: y\n").lines
    assert lines[("name",)] == 2
    assert lines[("network",)] == 3
    assert lines[("network", "links", 0)] == 5
    assert lines[("network", "links", 0, "mac")] == 6


def test_json_is_read_by_its_suffix(tmp_path: Path) -> None:
    """A tab is white space in JSON, but no indentation in YAML."""
    assert read(tmp_path, '{\n\t"name": "a\\/b", "n": 12}', name="spec.JSON").values == {
        "name": "a/b",
        "n": 12,
    }


def test_json_is_yaml_too(tmp_path: Path) -> None:
    assert read(tmp_path, '{"name": "a", "n": [1, null, true]}').values == {"name": "a", "n": [1, None, True]}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_a_file_without_fields_is_no_error(tmp_path: Path, text: str) -> None:
    """Flags may give every field."""
    assert read(tmp_path, text).values == {}


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeffname: a").values == {"name": "a"}


def test_an_alias_repeats_what_it_names(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &x {b: 1}\nc: *x\n").values == {"a": {"b": 1}, "c": {"b": 1}}


def test_aliases_that_multiply_cost_nothing(tmp_path: Path) -> None:
    """Thirty levels of ten aliases each would be 10^30 values if each were built again."""
    text = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 31))
    assert len(read(tmp_path, text).values) == 31


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nname: b\n", "line 2: field 'name' is given twice"),
        ("machine:\n  cpus: 1\n  cpus: 2\n", "line 3: field 'cpus' is given twice"),
        ("a: [1\n", "not valid YAML, line 2, column 1"),
        ("a: b: c\n", "not valid YAML, line 1, column 5"),
        ("\ta: b\n", "not valid YAML, line 1, column 1"),
        ("- a\n", "the spec is a list, expected fields"),
        ("just text\n", "the spec is a single value, expected fields"),
        ("12: a\n", "line 1: a field name that is not text"),
        ("? [a]\n: b\n", "line 1: a field name that is not text"),
        ("a: 1\n---\nb: 2\n", "not valid YAML, line 2, column 1"),
        ("a: !!python/object:os.system x\n", "line 1: a YAML tag that means nothing"),
        ("a: !!set {b}\n", "line 1: a YAML tag that means nothing"),
        ("a: !!timestamp b\n", "line 1: a YAML tag that means nothing"),
        ("a: !!int b\n", "line 1: a number that cannot be read"),
        ("a: &x [*x]\n", "line 1: an alias to something that contains it"),
        ("a: " + "9" * 5000, "a number that cannot be read"),
        ("a: \x01\n", "not valid YAML"),
        ("a: " + "[" * 5000, "nested too deep"),
        (b"a: \xff\n", "not UTF-8 text: byte 3"),
    ],
)
def test_yaml_that_is_no_spec_is_refused(tmp_path: Path, text: str | bytes, problem: str) -> None:
    if sys.version_info < (3, 11) and "999" in str(text):
        pytest.skip("this Python reads numbers of any length")
    with pytest.raises(InvalidSpec, match=problem) as caught:
        read(tmp_path, text)
    assert caught.value.path == str(tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "field 'a' is given twice"),
        ('{"a": {"b": 1, "b": 2}}', "field 'b' is given twice"),
        ('{"a": 1,\n}', "not valid JSON, line"),
        ("", "not valid JSON, line 1"),
        ("[1]", "the spec is a list"),
        ("[" * 100000, "nested too deep"),
    ],
)
def test_json_that_is_no_spec_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(InvalidSpec, match=problem):
        read(tmp_path, text, name="spec.json")


@pytest.mark.parametrize(
    "text",
    [
        "password: *hunter2\n",
        "password: !hunter2 x\n",
        "password: 'hunter2\n",
        "password: @hunter2\n",
        "password: hunter2: x\n",
        "password: hunter2\npassword: hunter2\n",
        "password: &hunter2 a\nb: &hunter2 c\nd: *hunter3\n",
    ],
)
def test_an_error_shows_nothing_of_a_password(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read(tmp_path, text)
    assert "hunter" not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"


def test_a_missing_spec_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_spec_file(tmp_path / "none.yaml")


def test_a_folder_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a regular file"):
        read_spec_file(tmp_path)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no FIFOs on Windows")
    else:
        os.mkfifo(tmp_path / "spec.yaml")
    with pytest.raises(SourceError, match="not a regular file"):
        read_spec_file(tmp_path / "spec.yaml")


def test_a_file_too_large_for_a_spec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=f"larger than {MAX_SPEC_SIZE} bytes"):
        read(tmp_path, b"#" * (MAX_SPEC_SIZE + 1))
