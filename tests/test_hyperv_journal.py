"""What was made where survives a crash at any byte, and is nobody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagekit.errors import InvalidSpec, SourceError, TargetError
from imagekit.hyperv.journal import Journal


def journal(path: Path, *, host: str = "h", uuid: str = "u", run: str = "r1") -> Journal:
    return Journal(path, host=host, uuid=uuid, run=run)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_what_was_made_is_present_until_it_is_gone(path: Path) -> None:
    with journal(path) as one:
        one.begin("folder", "D:\\a")
        one.made("folder", "D:\\a")
        one.begin("file", "D:\\a\\b")
        one.gone("file", "D:\\a\\b")
        one.begin("file", "D:\\a\\c")
    with journal(path, run="r2") as two:
        assert [(entry.kind, entry.what, entry.state) for entry in two.present()] == [
            ("file", "D:\\a\\c", "begun"),
            ("folder", "D:\\a", "made"),
        ]
        assert two.names("folder", "d:\\A") and not two.names("file", "D:\\a\\b")
        assert two.present(this_run=True) == []


def test_machines_are_undone_before_files_and_files_before_folders(path: Path) -> None:
    with journal(path) as one:
        for kind, what in (("folder", "f"), ("file", "1"), ("machine", "m"), ("file", "2"), ("folder", "f")):
            one.begin(kind, what)  # type: ignore[arg-type]
        assert [entry.what for entry in one.present()] == ["m", "2", "1", "f"]


def test_other_hosts_and_machines_in_the_same_file_are_left_alone(path: Path) -> None:
    for host, uuid in (("h1", "u"), ("h2", "u"), ("h1", "v")):
        with journal(path, host=host, uuid=uuid) as one:
            assert one.present() == []
            one.begin("machine", uuid)


def test_a_journal_cut_at_any_byte_still_opens_and_goes_on(path: Path) -> None:
    with journal(path) as one:
        one.begin("file", "first")
        one.made("file", "first")
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        with journal(path, run="r2") as two:
            assert two.names("file", "first") is (end >= first - 1)
            two.begin("file", "second")
        with journal(path) as three:
            assert three.names("file", "second")
            assert three.names("file", "first") is (end >= first - 1)


def test_a_damaged_journal_is_not_guessed_about(path: Path) -> None:
    for text in ('{"host": 1}', "rubbish", '{"host": "h", "uuid": "u", "kind": "x"}', "[]"):
        path.write_text(text + "\n")
        with pytest.raises(InvalidSpec, match="line 1 is no entry"):
            journal(path)


def test_one_run_at_a_time(path: Path) -> None:
    with journal(path), pytest.raises(SourceError, match="another run"):
        journal(path)


def test_a_journal_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be written"):
        journal(tmp_path / "none" / "journal")
