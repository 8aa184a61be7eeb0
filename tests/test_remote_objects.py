"""Objects in stores that fsspec reads: an S3-compatible server on this computer, and a store that misbehaves."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imagekit.cli.app import run
from imagekit.errors import ImagekitError, SourceError, ToolError, UsageError
from imagekit.remote import addresses
from imagekit.remote.arriving import PIECE
from imagekit.remote.file import RemoteFile
from imagekit.remote.http import HttpOptions
from imagekit.remote.objects import StoredObject, check_address
from tests.disks import noise
from tests.oracles import need_venv
from tests.test_remote import IDENTIFIER, image

QUICK = HttpOptions(retries=2, pause=0.01)
CONTENT = noise(2 * PIECE + 99, 1)
SECRET = "wJalrXUtnFEMI-secret"

_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


# --- a store that misbehaves ------------------------------------------------------------------------------------


class Handle:
    """An open object of the store below."""

    def __init__(self, store: Store, details: dict[str, Any]) -> None:
        self.store, self.details, self.at = store, details, 0

    def seek(self, offset: int) -> None:
        self.at = offset

    def read(self, length: int) -> bytes:
        self.store.reads += 1
        error = self.store.errors.pop(0) if self.store.errors else None
        if error is not None:
            raise error
        return CONTENT[self.at : self.at + length - self.store.short]


class Store:
    """As much of a file system of fsspec as is used."""

    def __init__(self, errors: list[Exception] | None = None, short: int = 0) -> None:
        self.errors, self.short, self.reads, self.etags = errors or [], short, 0, ["one"]

    def info(self, _: str) -> dict[str, Any]:
        etag = self.etags.pop(0) if len(self.etags) > 1 else self.etags[0]
        return {"type": "file", "size": len(CONTENT), "ETag": etag}

    def open(self, path: str, mode: str, **_: object) -> Handle:
        return Handle(self, self.info(path))


class FileExpired(OSError):
    """Named as s3fs names its own."""


def fetched(store: Store) -> bytes:
    origin = StoredObject("s3://bucket/image", QUICK, None, store, "bucket/image")
    with RemoteFile.of(origin) as file:
        return file.pread(0, file.size)


def test_what_fails_once_is_asked_for_again() -> None:
    assert fetched(Store([OSError(5, f"no luck with {SECRET}"), TimeoutError()])) == CONTENT


REFUSED: dict[str, tuple[Store, type[ImagekitError], str]] = {
    "fails for ever": (Store([OSError(5, SECRET)] * 9), SourceError, r"OSError, error 5 \(3 attempts\)"),
    "another ETag": (Store([FileExpired(SECRET)]), SourceError, "changed while it was read"),
    "gone": (Store([FileNotFoundError(SECRET)]), SourceError, "no such object"),
    "forbidden": (Store([PermissionError(SECRET)]), SourceError, "may not be read"),
    "cannot": (Store([NotImplementedError(SECRET)]), ToolError, "cannot do it"),
    "short for ever": (Store(short=1), SourceError, "bytes came"),
}


@pytest.mark.parametrize(("store", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_another_object_is_an_error_of_ours(
    store: Store, kind: type[ImagekitError], message: str
) -> None:
    """Without the text of the library's error, which may hold anything."""
    with pytest.raises(kind, match=message) as caught:
        fetched(store)
    assert SECRET not in str(caught.value)


def test_an_object_that_is_replaced_between_two_handles_is_refused() -> None:
    store = Store()
    store.etags = ["one", "one", "two"]
    with pytest.raises(SourceError, match="ETag was one, is two"):
        fetched(store)


def test_an_address_with_a_secret_or_a_chain_is_a_usage_error() -> None:
    for url in (f"s3://key:{SECRET}@bucket/x", "s3://bucket", "s3://a/b::file:///etc/passwd", "s3://bucket/"):
        with pytest.raises(UsageError) as caught:
            check_address(url)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("scheme", ["file", "local", "memory", "simplecache", "zip", "github", "reference", "dir"])
def test_what_does_not_lead_over_a_network_to_one_service_is_not_read(scheme: str) -> None:
    with pytest.raises(UsageError, match="is not read"):
        addresses.is_remote(f"{scheme}://etc/passwd")


# --- S3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[http.client.HTTPConnection]:
    """moto's S3, with an image in a bucket."""
    command = [str(need_venv("moto")), "-c", _SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        port = next(int(line) for line in server.stdout if line.strip().isdigit())
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            assert request(connection, "PUT", "/images") == 200
            assert request(connection, "PUT", "/images/a/image.qcow2", image()) == 200
            assert request(connection, "PUT", "/images/large", image() + noise(9 << 20)) == 200
            yield connection
        finally:
            connection.close()
            server.stdin.close()


def request(connection: http.client.HTTPConnection, method: str, path: str, body: bytes | str = b"") -> int:
    connection.request(method, path, body)
    with connection.getresponse() as answer:
        answer.read()
        return answer.status


def imagekit(s3: http.client.HTTPConnection, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("s3fs")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
        "AWS_ENDPOINT_URL": f"http://{s3.host}:{s3.port}",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-m", "imagekit", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.oracle
def test_a_conversion_from_s3_gives_the_bytes_of_a_local_one(tmp_path: Path, s3: http.client.HTTPConnection) -> None:
    (tmp_path / "local.qcow2").write_bytes(image())
    target, local = tmp_path / "disk.vhdx", tmp_path / "local.vhdx"
    done = imagekit(s3, "convert", "s3://images/a/image.qcow2", str(target), "--id", IDENTIFIER)
    assert done.returncode == 0, done.stderr
    assert "read over the network while it was fetched" in done.stderr
    assert run(["convert", str(tmp_path / "local.qcow2"), str(local), "--id", IDENTIFIER]) == 0
    assert target.read_bytes() == local.read_bytes()


@pytest.mark.slow
@pytest.mark.oracle
def test_info_of_an_object_reads_it_confined(s3: http.client.HTTPConnection) -> None:
    done = imagekit(s3, "info", "s3://images/large", "--output", "json")
    found = json.loads(done.stdout)
    assert (found["format"], found["file-size"]) == ("qcow2", len(image()) + (9 << 20))
    assert "limits" in found["confinement"]


@pytest.mark.slow
@pytest.mark.oracle
def test_errors_of_s3_have_our_exit_codes_and_show_no_secret(
    no_leftovers: Path, s3: http.client.HTTPConnection
) -> None:
    target = str(no_leftovers / "disk.vhdx")
    wrong = "sha256:" + "0" * 64
    for arguments, code, said in (
        (("s3://images/none", target), 10, "no such object"),
        (("s3://nowhere/x", target), 10, ""),
        (("s3://images/large", target, "--checksum", wrong), 15, "was expected"),
    ):
        done = imagekit(s3, "convert", *arguments)
        assert (done.returncode, said in done.stderr) == (code, True), done.stderr
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.oracle
def test_credentials_that_do_not_count_are_said_to(s3: http.client.HTTPConnection) -> None:
    """moto asks for signatures once it is told to."""
    assert request(s3, "POST", "/moto-api/reset-auth", "0") == 200
    try:
        done = imagekit(s3, "info", "s3://images/large")
    finally:
        request(s3, "POST", "/moto-api/reset-auth", "1000000")
    assert done.returncode == 10, done.stderr
    assert "may not be read" in done.stderr
    assert SECRET not in done.stdout + done.stderr
