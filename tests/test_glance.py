"""Images in Glance: what it states of them is held against what comes, from a server that answers as it does."""

from __future__ import annotations

import hashlib
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import imagekit
from imagekit.cli.app import run
from imagekit.errors import SourceError, ToolError, UnsafeImage, UnsupportedFeature, VerificationFailed
from imagekit.glance.client import Glance, context_of
from imagekit.report import Report
from tests.oracles import need_tool
from tests.test_remote import image
from tests.web import Site, answers, only, serve

ID = "6f9c1d2e-0b1a-4c3d-8e5f-001122334455"


class FakeGlance:
    """The answers of Image API v2 about one image."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.values: dict[str, Any] = {
            "id": ID,
            "name": "debian",
            "status": "active",
            "disk_format": "qcow2",
            "container_format": "bare",
            "size": len(image()),
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(image()).hexdigest(),
            "checksum": hashlib.md5(image(), usedforsecurity=False).hexdigest(),
        }
        self.state()

    def state(self, **changes: Any) -> None:
        self.values |= changes
        self.site.other |= {
            f"/v2/images/{ID}": json.dumps(self.values).encode(),
            "/v2/images?name=debian&limit=20": json.dumps({"images": [self.values]}).encode(),
            "/v2/images?name=none&limit=20": b'{"images": []}',
            "/v2/images?name=two&limit=20": json.dumps({"images": [self.values, self.values]}).encode(),
            f"/v2/images/{ID}/file": image(),
        }

    def convert(self, target: Path, name: str = ID, **options: Any) -> Report:
        return imagekit.convert(f"glance:{name}", target, glance_url=self.site.address, **options)


@pytest.fixture
def glance() -> Iterator[FakeGlance]:
    with serve(b"", etag=None) as site:
        yield FakeGlance(site)


@pytest.mark.parametrize("name", [ID, ID.upper(), "debian"])
@pytest.mark.parametrize("confined", [False, True], ids=["", "confined"])
def test_an_image_is_found_by_id_or_name_and_is_what_its_hash_says(
    tmp_path: Path, glance: FakeGlance, name: str, confined: bool
) -> None:
    report = glance.convert(tmp_path / "disk.vhdx", name, verify="content", confined=confined)
    assert (report.source, report.source_format) == (f"glance:{ID}", "qcow2")
    assert any("sha512 of all" in note for note in report.notes)


def test_another_hash_is_refused(no_leftovers: Path, glance: FakeGlance) -> None:
    glance.state(os_hash_value="0" * 128)
    with pytest.raises(VerificationFailed):
        glance.convert(no_leftovers / "disk.vhdx")


def test_md5_is_a_fallback_and_none_is_said(tmp_path: Path, glance: FakeGlance) -> None:
    glance.state(os_hash_algo="streebog", os_hash_value="00")
    assert any("md5 proves little" in note for note in glance.convert(tmp_path / "a.vhdx").notes)
    glance.state(checksum=None)
    assert any("no checksum" in note for note in glance.convert(tmp_path / "b.vhdx").notes)
    glance.state(checksum="0" * 32)
    with pytest.raises(VerificationFailed):
        glance.convert(tmp_path / "c.vhdx")


@pytest.mark.parametrize("confined", [False, True], ids=["", "confined"])
@pytest.mark.parametrize("stated", ["raw", "vhd", "vhdx"])
def test_content_in_another_format_than_stated_is_refused(
    no_leftovers: Path, glance: FakeGlance, stated: str, confined: bool
) -> None:
    glance.state(disk_format=stated)
    with pytest.raises(UnsafeImage) as caught:
        glance.convert(no_leftovers / "disk.raw", confined=confined)
    assert caught.value.rule == "format-mismatch"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"status": "queued"}, SourceError),
        ({"disk_format": "ami"}, UnsupportedFeature),
        ({"container_format": "docker"}, UnsupportedFeature),
        ({"size": 5}, SourceError),
        ({"id": None, "status": None}, SourceError),
    ],
    ids=["queued", "ami", "docker", "size", "nothing"],
)
def test_what_cannot_be_read_is_said(
    no_leftovers: Path, glance: FakeGlance, changes: dict[str, Any], error: type[Exception]
) -> None:
    glance.state(**changes)
    with pytest.raises(error):
        glance.convert(no_leftovers / "disk.vhdx")


def test_exit_codes(glance: FakeGlance, no_leftovers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--glance-url", glance.site.address]
    assert run(["info", "glance:debian", *at]) == 0
    assert run(["info", "glance:none", *at]) == 10
    assert run(["info", "glance:two", *at]) == 10
    assert "give the id" in capsys.readouterr().err
    glance.site.fault = only(range(1000), answers(503))
    assert run(["info", "glance:debian", *at]) == ToolError.exit_code
    glance.site.fault = None

    def deleted(number: int, answer: Any) -> None:
        if glance.site.paths[-1].endswith("/file"):
            answers(404)(answer)

    glance.site.fault = deleted
    assert run(["convert", "glance:debian", str(no_leftovers / "disk.vhdx"), *at]) == 10


def test_a_batch_of_what_glance_lists(glance: FakeGlance, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Page by page, with Glance's own filters; each image hashed like any other of Glance's."""
    ask = "/v2/images?status=active&disk_format=qcow2&sort=created_at%3Aasc&limit=500"
    more = f"/v2/images?marker={ID}&limit=500"
    other = {**glance.values, "id": ID.replace("6", "7"), "name": "other/one"}
    glance.site.other |= {
        ask: json.dumps({"images": [glance.values], "next": more}).encode(),
        more: json.dumps({"images": [other]}).encode(),
        f"/v2/images/{other['id']}": json.dumps({**other, "os_hash_value": "0" * 128}).encode(),
        f"/v2/images/{other['id']}/file": image(),
    }
    command = ["batch", "--from-glance", "disk_format=qcow2", "--glance-url", glance.site.address, "-O", "vhdx"]
    assert run([*command, "--out", str(tmp_path / "out"), "--output", "json"]) == 3
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["title"] == "imagekit batch glance disk_format=qcow2"
    states = {one["target"]: (one["source"], one["state"]) for one in found["items"]}
    assert states == {
        "debian.vhdx": (f"glance:{ID}", "done"),
        "other_one.vhdx": (f"glance:{other['id']}", "failed"),
    }
    assert [path.name for path in (tmp_path / "out").glob("*.vhdx")] == ["debian.vhdx"]
    assert run([*command[:1], "--out", str(tmp_path / "out")]) == 2
    assert run([*command[:2], "qcow2", *command[3:], "--out", str(tmp_path / "new")]) == 2
    assert "is no filter" in capsys.readouterr().err


# --- openstacksdk's session, as far as a stand-in shows; tests/test_against_glance.py has the real one ------------


class Session:
    """What of keystoneauth's session is used; ``answer`` is given to each question."""

    def __init__(self, status: int = 200, body: bytes = b"{}", error: Exception | None = None) -> None:
        self.status, self.body, self.error = status, body, error
        self.asked: list[tuple[str, str, dict[str, Any]]] = []

    def request(self, url: str, method: str, **options: Any) -> Session:
        self.asked.append((method, url, options))
        if self.error is not None:
            raise self.error
        return self

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def status_code(self) -> int:
        return self.status

    reason = "Because"

    def iter_content(self, size: int) -> Iterator[bytes]:
        for start in range(0, len(self.body), size):
            yield self.body[start : start + size]


def test_questions_go_through_the_session_and_follow_no_redirect() -> None:
    values = {"id": ID, "name": "debian", "status": "queued"}
    session = Session(body=json.dumps(values).encode())
    service = Glance("http://192.0.2.1:9292", session=session)
    assert service.show(ID.upper()).status == "queued"
    ((method, url, options),) = session.asked
    assert (method, url) == ("GET", f"http://192.0.2.1:9292/v2/images/{ID}")
    assert (options["redirect"], options["raise_exc"]) == (False, False)


@pytest.mark.parametrize(
    ("session", "error", "said"),
    [
        (Session(401, b"<html><body>Who are you?</body></html>"), ToolError, "401 Because: Who are you"),
        (Session(404), SourceError, "no such image"),
        (Session(302), ToolError, "302"),
        (Session(body=b"<html>"), ToolError, "no JSON"),
        (Session(body=b"[" * (9 << 20)), ToolError, "no JSON"),
        (Session(body=b"[]"), ToolError, "no object"),
        (Session(body=b'{"images": 5}'), ToolError, "not known"),
        (Session(body=b'{"images": [5]}'), ToolError, "not known"),
        (Session(error=RuntimeError("connect")), ToolError, "does not answer: connect"),
    ],
    ids=["401", "404", "redirect", "html", "endless", "list", "number", "numbers", "down"],
)
def test_what_the_session_brings_is_judged(session: Session, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Glance("http://192.0.2.1:9292", session=session).named("debian")


def test_ranges_trust_and_show_the_certificates_of_the_session(tmp_path: Path) -> None:
    """With openssl's word for it that they were loaded."""
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    command = [need_tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "9"]
    subprocess.run([*command, "-keyout", key, "-out", own], check=True, capture_output=True)
    assert context_of(SimpleNamespace(verify=True, cert=None)) is None
    lax = context_of(SimpleNamespace(verify=False, cert=None))
    assert lax is not None
    assert lax.verify_mode == ssl.CERT_NONE
    strict = context_of(SimpleNamespace(verify=str(own), cert=(str(own), str(key))))
    assert strict is not None
    assert strict.verify_mode == ssl.CERT_REQUIRED
    assert len(strict.get_ca_certs()) == 1
    with pytest.raises(ToolError, match="certificate"):
        context_of(SimpleNamespace(verify=str(tmp_path / "missing"), cert=None))


def test_without_openstacksdk_a_cloud_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openstack", None)
    assert run(["info", "glance:debian", "--os-cloud", "mine"]) == 2
