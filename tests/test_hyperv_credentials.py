"""Where credentials come from, in which order, and that they show nowhere."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from imagekit.errors import SourceError, UsageError
from imagekit.hyperv import credentials
from imagekit.hyperv.credentials import Credentials, find_credentials

SECRET = "hunter2 = ü"


@pytest.fixture(autouse=True)
def no_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "credentials"
    path.write_text(f"# of the lab\nuser = LAB\\admin\npassword={SECRET}\n", encoding="utf-8")
    path.chmod(0o600)
    return path


def keyring(monkeypatch: pytest.MonkeyPatch, entries: dict[str, tuple[str, str]]) -> None:
    def get_credential(service: str, user: str | None) -> SimpleNamespace | None:
        found = entries.get(service)
        return SimpleNamespace(username=found[0], password=found[1]) if found else None

    monkeypatch.setitem(sys.modules, "keyring", SimpleNamespace(get_credential=get_credential))


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv(credentials.USER, "me")
    monkeypatch.setenv(credentials.PASSWORD, "from the environment")
    assert find_credentials("h", file=file) == Credentials("me", "from the environment", "the environment")


def test_a_file_holds_a_name_and_a_password_to_the_end_of_its_line(file: Path) -> None:
    found = find_credentials("h", file=file)
    assert (found.user, found.password) == ("LAB\\admin", SECRET)


def test_a_name_given_with_the_host_wins(file: Path) -> None:
    assert find_credentials("h", user="other", file=file).user == "other"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_others_may_read_is_refused(file: Path) -> None:
    file.chmod(0o640)
    with pytest.raises(SourceError, match="others may read"):
        find_credentials("h", file=file)


def test_a_file_without_a_password_is_refused_and_not_quoted(file: Path) -> None:
    file.write_text(SECRET)
    with pytest.raises(UsageError) as caught:
        find_credentials("h", file=file)
    assert "hunter2" not in f"{caught.value} {caught.value.hint}"


def test_the_keyring_is_asked_for_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    keyring(monkeypatch, {"imagekit-hyperv:host1": ("admin", SECRET)})
    assert find_credentials("host1").password == SECRET
    assert find_credentials("host2", needed=False) == Credentials()


def test_off_a_terminal_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("admin\nsecret\n"))
    with pytest.raises(UsageError, match="no credentials for host1") as caught:
        find_credentials("host1")
    assert credentials.PASSWORD in (caught.value.hint or "")


def test_on_a_terminal_it_is_asked_and_the_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("admin\n"))
    monkeypatch.setattr("getpass.getpass", lambda prompt: SECRET)
    assert find_credentials("host1", may_ask=True) == Credentials("admin", SECRET, "the terminal")
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err


def test_a_password_never_shows() -> None:
    assert "hunter2" not in repr(Credentials("me", SECRET)) + str(Credentials("me", SECRET))
