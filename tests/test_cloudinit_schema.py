"""cloud-init's own schema check is asked where cloud-init is installed, and hands on no value; elsewhere silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imagekit.cloudinit import cloud_init_schema
from imagekit.cloudinit.cloud_init_schema import SchemaProblem, schema_problems
from imagekit.cloudinit.lint import judge
from imagekit.cloudinit.model import parse_spec
from tests.cloudinit_specs import FULL, KEY, UUID
from tests.oracles import cloud_init

BAD = b"""\
#cloud-config
packages: [nginx]
chpasswd:
  expire: hunter2-secret
runcmd: hunter2-secret
users: [{gecos: x}]
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> None:
    """Put a program cloud-init on the PATH, whose Python is the shell script ``python``."""
    interpreter = folder / "python3"
    interpreter.write_text(f"#!/bin/sh\n{python}\n", encoding="utf-8")
    program = folder / "cloud-init"
    program.write_text(f"#!{interpreter}\n", encoding="utf-8")
    for file in (interpreter, program):
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's cloud-init, as if installed."""
    packages = cloud_init.packages()
    install(tmp_path, monkeypatch, f'shift; PYTHONPATH="{packages}" exec /usr/bin/python3 "$@"')


@pytest.mark.oracle
@pytest.mark.usefixtures("real")
def test_the_schema_s_objections_are_told_without_the_values() -> None:
    found = {problem.setting: problem.message for problem in schema_problems(BAD)}
    assert found["chpasswd.expire"] == "it is not of type 'boolean'"
    assert found["runcmd"] == "it is not of type 'array'"
    assert found["users.0"] == "it is not valid under any of the given schemas"
    assert "hunter2" not in str(found)


@pytest.mark.oracle
@pytest.mark.usefixtures("real")
def test_lint_warns_of_them_at_the_line_of_the_setting() -> None:
    found = judge(parse_spec({"name": "a", "uuid": UUID, "ssh_keys": [KEY], "user_data": BAD}))
    by_rule = [
        (finding.severity, finding.where.rpartition("/")[2])
        for finding in found
        if finding.rule == "cloud-config-schema"
    ]
    assert by_rule == [("warning", f"user_data, line {line}") for line in (3, 5, 6)]
    assert "hunter2" not in json.dumps([finding.to_json() for finding in found])


@pytest.mark.oracle
@pytest.mark.usefixtures("real")
def test_what_we_write_ourselves_fits_the_schema() -> None:
    values = {**FULL, "guest": "debian12", "hyperv_tools": True, "files": [{"path": "/etc/motd", "content": "x"}]}
    assert "cloud-config-schema" not in {finding.rule for finding in judge(parse_spec(values))}


@pytest.mark.parametrize(
    "python",
    ["exit 77", "exit 1", "kill -9 $$", "echo broken", "echo '[[1]]'", "echo '{}'", "exec sleep 60"],
)
def test_a_cloud_init_that_gives_no_answer_is_as_if_there_were_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    monkeypatch.setattr(cloud_init_schema, "SECONDS", 1)
    install(tmp_path, monkeypatch, f"PATH=/usr/bin:/bin; {python}")
    assert list(schema_problems(BAD)) == []


def test_a_python_without_cloud_init_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, f"echo asked >> {tmp_path}/count; exit 77")
    for _ in range(3):
        assert list(schema_problems(BAD)) == []
    assert (tmp_path / "count").read_text() == "asked\n"


def test_the_text_goes_through_a_pipe_and_not_through_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'PATH=/usr/bin:/bin; cat > {tmp_path}/stdin; echo "$*" > {tmp_path}/arguments; echo []'
    install(tmp_path, monkeypatch, script)
    assert list(schema_problems(BAD)) == []
    assert (tmp_path / "stdin").read_bytes() == BAD
    assert "hunter2" not in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("'a is not of type b, hunter2' is not of type 'array'", "it is not of type 'array'"),
        ("'hunter2' is not one of ['a', 'b']", "it is not one of ['a', 'b']"),
        ("'hunter2' does not match '^[0-9]+$'", "it does not match '^[0-9]+$'"),
        ("['hunter2'] is too short", "it is too short"),
        ("'name' is a required property", "'name' is a required property"),
        (
            "Additional properties are not allowed ('pakages' was unexpected)",
            "Additional properties are not allowed ('pakages' was unexpected)",
        ),
        ("False schema does not allow 'hunter2'", "it is not as the schema has it"),
    ],
)
def test_no_value_is_left_in_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, told: str
) -> None:
    (tmp_path / "answer").write_text(json.dumps([["a.0", message]]), encoding="utf-8")
    install(tmp_path, monkeypatch, f"/bin/cat {tmp_path}/answer")
    assert list(schema_problems(BAD)) == [SchemaProblem("a.0", told)]
