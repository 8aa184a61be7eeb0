"""Proxies of the environment: who is asked through one, what it is told, and what nobody is told."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from imagekit.cli.app import run
from imagekit.errors import SourceError, UsageError
from imagekit.remote.arriving import PIECE
from imagekit.remote.file import RemoteFile
from imagekit.remote.http import HttpOptions
from imagekit.remote.proxies import proxy_for
from tests.disks import noise
from tests.oracles import need_tool
from tests.servers import Quiet, running
from tests.web import serve

CONTENT = noise(2 * PIECE + 99, 7)
QUICK = HttpOptions(timeout=2.0, retries=1, pause=0.01)


class Through:
    """A proxy on this computer that leads every name to one port, and what it was asked."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.asked: list[str] = []
        self.authorizations: set[str] = set()
        self.address = ""
        self.refuses = False


@contextmanager
def proxy(port: int) -> Iterator[Through]:
    seen = Through(port)

    class Handler(Quiet):
        def note(self) -> bool:
            seen.asked.append(f"{self.command} {self.path}")
            seen.authorizations.add(self.headers.get("Proxy-Authorization", ""))
            if seen.refuses:
                self.send_error(407)
            return not seen.refuses

        def do_GET(self) -> None:
            if not self.note():
                return
            asked = urlsplit(self.path)
            assert self.headers["Host"] == asked.netloc
            connection = http.client.HTTPConnection("127.0.0.1", seen.port)
            connection.request("GET", asked.path, headers={"Range": self.headers.get("Range", "")})
            answer = connection.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name in ("Content-Range", "ETag"):
                self.send_header(name, answer.headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            connection.close()

        def do_CONNECT(self) -> None:
            if not self.note():
                return
            with socket.create_connection(("127.0.0.1", seen.port)) as there:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=pump, args=(there, self.connection))
                back.start()
                pump(self.connection, there)
                back.join()
            self.close_connection = True

    with running(Handler) as address:
        seen.address = address
        yield seen


def pump(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy but those that a test names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_an_address_is_asked_for_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(CONTENT) as site, proxy(int(site.address.rpartition(":")[2])) as through:
        monkeypatch.setenv("http_proxy", f"http://me:s%40crt@{through.address}")
        with RemoteFile.open("http://images.example:8080/a/image.qcow2", QUICK) as file:
            assert file.pread(0, file.size) == CONTENT
    assert set(through.asked) == {"GET http://images.example:8080/a/image.qcow2"}
    assert through.authorizations == {"Basic bWU6c0BjcnQ="}
    assert {headers.get("Proxy-Authorization") for headers in site.headers} == {None}


def test_https_goes_through_a_tunnel_to_the_host_that_is_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [need_tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9"]
    command += ["-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate, key)
    trusting = HttpOptions(timeout=2.0, retries=1, pause=0.01, context=ssl.create_default_context(cafile=certificate))
    with serve(CONTENT, tls=served) as site, proxy(int(site.address.rpartition(":")[2])) as through:
        monkeypatch.setenv("https_proxy", f"http://me@{through.address}")
        with RemoteFile.open("https://images.example/image.qcow2", trusting) as file:
            assert file.pread(0, file.size) == CONTENT
        assert set(through.asked) == {"CONNECT images.example:443"}
        assert through.authorizations == {"Basic bWU6"}
        with pytest.raises(SourceError, match="certificate"):
            RemoteFile.open("https://other.example/image.qcow2", trusting)


def test_what_a_proxy_refuses_is_an_error_that_keeps_the_password(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with proxy(9) as through:
        through.refuses = True
        monkeypatch.setenv("https_proxy", f"http://me:secret@{through.address}")
        code = run(["info", "https://images.example/a.qcow2", "--no-confined", "--http-timeout", "0.2"])
    assert code == 10
    said = capsys.readouterr()
    assert "407" in said.err
    assert "secret" not in said.out + said.err


@pytest.mark.parametrize(
    ("address", "settings", "host"),
    [
        ("http://images.example/a", {"http_proxy": "proxy:3128"}, "proxy"),
        ("http://images.example/a", {"https_proxy": "http://proxy:3128"}, None),
        ("https://images.example/a", {"https_proxy": "http://proxy:3128/"}, "proxy"),
        ("https://images.example/a", {"all_proxy": "http://proxy:3128"}, "proxy"),
        ("http://images.example/a", {"http_proxy": "http://proxy:3128", "no_proxy": ".example"}, None),
        ("http://images.example/a", {"http_proxy": "http://proxy:3128", "no_proxy": "*"}, None),
        ("http://images.example:81/a", {"http_proxy": "http://proxy:3128", "no_proxy": "images.example:81"}, None),
        ("http://images.example/a", {"http_proxy": "http://proxy:3128", "no_proxy": "other.example"}, "proxy"),
        ("http://localhost/a", {"all_proxy": "http://proxy:3128"}, None),
        ("http://127.0.0.1:8000/a", {"http_proxy": "http://proxy:3128"}, None),
        ("http://[::1]/a", {"http_proxy": "http://proxy:3128"}, None),
        ("http://images.example/a", {}, None),
    ],
)
def test_the_environment_says_who_is_asked_through_which(
    monkeypatch: pytest.MonkeyPatch, address: str, settings: dict[str, str], host: str | None
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = proxy_for(urlsplit(address))
    assert (None if found is None else (found.host, found.port)) == (None if host is None else (host, 3128))


@pytest.mark.parametrize(
    "stated", ["socks5://me:secret@proxy:1080", "https://me:secret@proxy", "http://", "http://a:b"]
)
def test_a_proxy_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, stated: str) -> None:
    monkeypatch.setenv("http_proxy", stated)
    with pytest.raises(UsageError, match="cannot be used") as caught:
        proxy_for(urlsplit("http://images.example/"))
    assert "secret" not in str(caught.value)


def test_credentials_of_a_proxy_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    found = proxy_for(urlsplit("http://images.example/"))
    assert found is not None
    assert "Basic" in str(found.headers)
    assert "Basic" not in repr(found)
