"""A small stand-in for Glance (Image API v2): one that lets tests break every step of an upload.

It answers as Glance 33 was seen to do (tests/test_against_glance.py holds the real one); ``faults`` maps a method and
an end of a path to a status that is answered instead.
"""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.servers import Quiet, running

UNIQUE = {"checksum": None, "os_hash_algo": None, "os_hash_value": None, "size": None, "virtual_size": None}


@dataclass
class FakeService:
    """The service, seen from a test."""

    address: str = ""
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, bytes] = field(default_factory=dict)
    faults: dict[tuple[str, str], int] = field(default_factory=dict)
    stores: Callable[[bytes], bytes] = bytes
    """What becomes of bytes on their way to the store."""

    lies: dict[str, Any] = field(default_factory=dict)
    """What is stated of a stored image instead of the truth."""

    algorithm: str = "sha512"
    requests: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    deleted: threading.Event | None = None
    """Set when an image is deleted."""

    reads: int | None = None
    """Bytes of an upload that are read before it hangs up."""

    def add(self, data: bytes, **values: Any) -> str:
        """An active image."""
        identifier = str(uuid.uuid4())
        self.images[identifier] = {
            "id": identifier,
            "name": "debian",
            "container_format": "bare",
            "disk_format": "qcow2",
            "min_disk": 0,
            "min_ram": 0,
            **self._stored(data),
            **values,
        }
        self.data[identifier] = data
        return identifier

    def _stored(self, data: bytes) -> dict[str, Any]:
        return {
            "status": "active",
            "size": len(data),
            "checksum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            "os_hash_algo": self.algorithm,
            "os_hash_value": hashlib.new(self.algorithm, data).hexdigest(),
            **self.lies,
        }


@contextmanager
def fake_service() -> Iterator[FakeService]:
    service = FakeService()

    class Handler(Quiet):
        def _answer(self, status: int, body: object = None, *, raw: bytes | None = None, **headers: str) -> None:
            data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def _handle(self) -> None:
            service.requests.append(f"{self.command} {self.path}")
            service.tokens.append(self.headers.get("X-Auth-Token"))
            for (method, end), status in service.faults.items():
                if method == self.command and urlsplit(self.path).path.endswith(end):
                    self.close_connection = True
                    reason = b"<html><head><title>x</title></head><body><h1>No</h1>for a reason</body></html>"
                    self._answer(status, raw=reason, Connection="close")
                    return
            parts = urlsplit(self.path).path.removeprefix("/v2/images").strip("/").split("/")
            getattr(self, f"_{self.command.lower()}")(parts)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _get(self, parts: list[str]) -> None:
            if parts == [""]:
                name = parse_qs(urlsplit(self.path).query)["name"][0]
                self._answer(200, {"images": [one for one in service.images.values() if one["name"] == name]})
            elif parts[0] not in service.images:
                self._answer(404, raw=b"<html><body>No image found</body></html>")
            elif parts[1:] == ["file"]:
                self._file(service.data[parts[0]])
            else:
                self._answer(200, service.images[parts[0]])

        def _file(self, data: bytes) -> None:
            first, last = (int(one) for one in self.headers["Range"].removeprefix("bytes=").split("-"))
            piece = data[first : last + 1]
            stated = f"bytes {first}-{first + len(piece) - 1}/{len(data)}"
            self._answer(206, raw=piece, Content_Range=stated)

        def _post(self, _: list[str]) -> None:
            identifier = str(uuid.uuid4())
            values = {"status": "queued", "min_disk": 0, **UNIQUE, **json.loads(self._body()), "id": identifier}
            service.images[identifier] = values
            self._answer(201, values)

        def _put(self, parts: list[str]) -> None:
            if service.reads is not None:
                self.rfile.read(service.reads)
                self.close_connection = True
                self.connection.shutdown(2)
                return
            data = service.stores(self._body())
            stored = service._stored(data)
            image = service.images.get(parts[0])
            if image is None:
                self._answer(404, raw=b"<html><body>deleted meanwhile</body></html>")
                return
            service.data[parts[0]] = data
            image.update(stored)  # which brings nothing back that is deleted at this moment
            self._answer(204)

        def _patch(self, parts: list[str]) -> None:
            assert self.headers["Content-Type"] == "application/openstack-images-v2.1-json-patch"
            for one in json.loads(self._body()):
                service.images[parts[0]][one["path"].strip("/")] = one["value"]
            self._answer(200, service.images[parts[0]])

        def _delete(self, parts: list[str]) -> None:
            service.images.pop(parts[0])
            service.data.pop(parts[0], None)
            if service.deleted is not None:
                service.deleted.set()
            self._answer(204)

    with running(Handler) as address:
        service.address = f"http://{address}"
        yield service
