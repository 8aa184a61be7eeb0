"""A small stand-in for Keystone (Identity API v3): passwords and application credentials for tokens, and a catalog.

It hands out a new token for each login, which the test then makes known to Glance.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.servers import Quiet, running

USER, PASSWORD, PROJECT = "alice", "correct horse battery", "web"
CREDENTIAL, SECRET = "21dced0fd20347869b93710d2b98aae0", "a-secret-of-an-application"


@dataclass
class Keystone:
    """The service, seen from a test."""

    url: str
    image_url: str
    issued: Callable[[str], None]
    """Told each token that was handed out."""

    logins: list[str] = field(default_factory=list)
    """The method of each login that succeeded."""

    lifetime: str = "2099-01-01T00:00:00.000000Z"

    def token(self) -> dict[str, Any]:
        endpoint = {"interface": "public", "region": "one", "region_id": "one", "url": self.image_url, "id": "e1"}
        return {
            "methods": ["password"],
            "expires_at": self.lifetime,
            "issued_at": "2026-01-01T00:00:00.000000Z",
            "user": {"id": "u1", "name": USER, "domain": {"id": "default", "name": "Default"}},
            "project": {"id": PROJECT, "name": PROJECT, "domain": {"id": "default", "name": "Default"}},
            "roles": [{"id": "r1", "name": "member"}],
            "catalog": [{"type": "image", "name": "glance", "id": "s1", "endpoints": [endpoint]}],
        }


def _method(identity: Any) -> str | None:
    """How somebody logged in; None for who did not."""
    (method,) = identity["methods"]
    given = identity[method]
    known = {
        "password": lambda: (given["user"]["name"], given["user"]["password"]) == (USER, PASSWORD),
        "application_credential": lambda: (given["id"], given["secret"]) == (CREDENTIAL, SECRET),
    }
    return str(method) if method in known and known[method]() else None


@contextmanager
def keystone(image_url: str, issued: Callable[[str], None]) -> Iterator[Keystone]:
    """One whose catalog names the image service at ``image_url``."""

    class Handler(Quiet):
        def _answer(self, status: int, body: object, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            fixed = {"Content-Type": "application/json", "Content-Length": str(len(data))}
            for name, value in (fixed | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            version = {"id": "v3.14", "status": "stable", "links": [{"rel": "self", "href": f"{service.url}/"}]}
            if self.path.rstrip("/").endswith("/v3"):
                self._answer(200, {"version": version})
            else:
                self._answer(300, {"versions": {"values": [version]}})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            method = _method(asked["auth"]["identity"])
            if method is None:
                self._answer(401, {"error": {"code": 401, "title": "Unauthorized", "message": "not you"}})
                return
            token = uuid.uuid4().hex
            service.logins.append(method)
            service.issued(token)
            self._answer(201, {"token": service.token()}, X_Subject_Token=token)

    with running(Handler) as address:
        service = Keystone(f"http://{address}/v3", image_url, issued)
        yield service
