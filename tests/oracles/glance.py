"""A real Glance 33 on this computer: gunicorn, SQLite, one folder as its store, no Keystone.

Glance's own pipeline for trusted front ends runs; what stands in for keystonemiddleware is a few lines of WSGI: no
token is the project ``open``, a token that the test wrote to ``tokens.json`` is the project it says there, another
one is 401. imagekit itself is installed beside Glance, from a wheel of this checkout, so that Glance finds the import
plugin the way it finds all of them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.oracles import need_venv

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("imagekit", "formats", "cloudinit")
START = 180.0
"""Seconds that a busy machine may take until Glance answers."""

_PASTE = """
[composite:glance-api-trusted]
paste.composite_factory = glance.api:root_app_factory
/: api

[composite:api]
paste.composite_factory = glance.api:pipeline_factory
trusted = versionnegotiation context rootapp

[composite:rootapp]
paste.composite_factory = glance.api:root_app_factory
/: apiversions
/v2: apiv2app

[app:apiversions]
paste.app_factory = glance.api.versions:create_resource

[app:apiv2app]
paste.app_factory = glance.api.v2.router:API.factory

[filter:versionnegotiation]
paste.filter_factory = glance.api.middleware.version_negotiation:VersionNegotiationFilter.factory

[filter:context]
paste.filter_factory = glance.api.middleware.context:ContextMiddleware.factory
"""

_API = """
[DEFAULT]
log_dir = {folder}/log
log_file = glance-api.log
enabled_backends = fs:file
enabled_import_methods = [glance-direct,web-download]
worker_self_reference_url = {url}

[database]
connection = sqlite:///{folder}/glance.sqlite?timeout=60&isolation_level=IMMEDIATE

[glance_store]
default_backend = fs

[fs]
filesystem_store_datadir = {folder}/images

[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging

[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks

[oslo_messaging_notifications]
driver = noop

[task]
work_dir = {folder}/tasks

[oslo_policy]
policy_file = {folder}/etc/policy.yaml

[paste_deploy]
config_file = {folder}/etc/glance-api-paste.ini
flavor = trusted
"""

_IMPORT = """
[image_import_opts]
image_import_plugins = [{plugins}]

[import_filtering_opts]
allowed_hosts = [127.0.0.1]
allowed_ports = []
disallowed_ports = []

{more}
"""

_APP = """
import json, os
from pathlib import Path
from glance.wsgi.api import application as glance

TOKENS = Path(os.environ["OS_GLANCE_CONFIG_DIR"]) / "tokens.json"

def application(environ, start_response):
    token, project = environ.get("HTTP_X_AUTH_TOKEN"), "open"
    if token is not None:
        project = json.loads(TOKENS.read_text()).get(token)
    if project is None:
        start_response("401 Unauthorized", [("Content-Length", "0")])
        return [b""]
    environ["HTTP_X_IDENTITY_STATUS"] = "Confirmed"
    environ["HTTP_X_USER_ID"] = environ["HTTP_X_PROJECT_ID"] = project
    environ["HTTP_X_ROLES"] = "member,reader"
    return glance(environ, start_response)
"""


@dataclass(frozen=True, slots=True)
class RealGlance:
    """One that runs; ``folder`` holds all it has."""

    url: str
    folder: Path
    python: Path

    def call(
        self, method: str, path: str, body: bytes | None = None, *, kind: str = "application/json"
    ) -> tuple[int, Any]:
        """One request: the status and the JSON, or what else came as text."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text) if text else None
        except ValueError:
            return response.status, text.decode(errors="replace")

    def create(self, **values: Any) -> str:
        """A queued image's id."""
        status, made = self.call("POST", "/v2/images", json.dumps({"container_format": "bare", **values}).encode())
        assert status == 201, made
        return str(made["id"])

    def upload(self, data: bytes, **values: Any) -> str:
        """An active image's id."""
        made = self.create(**values)
        status, text = self.call("PUT", f"/v2/images/{made}/file", data, kind="application/octet-stream")
        assert status == 204, text
        return made

    def show(self, image: str) -> dict[str, Any]:
        status, values = self.call("GET", f"/v2/images/{image}")
        assert status == 200, values
        assert isinstance(values, dict)
        return values

    def begin_import(self, image: str, *, staged: bytes | None = None, uri: str | None = None) -> None:
        """Hand over bytes (glance-direct), or where they are (web-download), and have Glance import them."""
        if staged is not None:
            path = f"/v2/images/{image}/stage"
            assert self.call("PUT", path, staged, kind="application/octet-stream")[0] == 204
        method = {"name": "glance-direct"} if uri is None else {"name": "web-download", "uri": uri}
        status, text = self.call("POST", f"/v2/images/{image}/import", json.dumps({"method": method}).encode())
        assert status == 202, text

    def imported(self, image: str) -> dict[str, Any]:
        """The image when its last import is over, well or not.

        Glance's database is asked: a question for tasks writes to it, and SQLite would refuse the import's next step.
        """
        query = "SELECT status FROM tasks WHERE image_id = ? ORDER BY created_at"
        deadline = time.monotonic() + START
        while time.monotonic() < deadline:
            with contextlib.closing(sqlite3.connect(f"file:{self.folder}/glance.sqlite?mode=ro", uri=True)) as opened:
                states = [state for (state,) in opened.execute(query, (image,))]
            if states and all(state in ("success", "failure") for state in states):
                return self.show(image)
            time.sleep(0.2)
        pytest.fail(f"the import does not end: {self.log()[-3000:]}")

    def stored(self, image: str) -> bytes:
        """The bytes, from the store itself."""
        return (self.folder / "images" / image).read_bytes()

    def ids(self) -> set[str]:
        """All images of the project ``open``."""
        return {one["id"] for one in self.call("GET", "/v2/images?limit=1000")[1]["images"]}

    def admit(self, tokens: Mapping[str, str]) -> None:
        """Say which tokens are whose project."""
        (self.folder / "etc" / "tokens.json").write_text(json.dumps(dict(tokens)))

    def log(self) -> str:
        return (self.folder / "log" / "glance-api.log").read_text(errors="replace")


@contextlib.contextmanager
def real_glance(folder: Path, *, plugins: tuple[str, ...] = (), settings: str = "") -> Iterator[RealGlance]:
    """Start one in a new folder, wait until it answers, stop it at the end. ``settings`` are about the plugins."""
    python = need_venv("glance", python="3.11")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    glance = RealGlance(f"http://127.0.0.1:{port}", folder, python)
    site = _installed(folder)
    _write_config(glance, plugins, settings)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("OS_")},
        "OS_GLANCE_CONFIG_DIR": str(folder / "etc"),
        "PYTHONPATH": os.pathsep.join([str(site), str(folder / "etc")]),
        "XDG_CACHE_HOME": str(folder / "cache"),  # where stevedore keeps what entry points there are
    }
    config = ["--config-file", str(folder / "etc" / "glance-api.conf")]
    sync = [str(python.with_name("glance-manage")), *config, "db_sync"]
    done = subprocess.run(sync, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with contextlib.closing(sqlite3.connect(folder / "glance.sqlite")) as database:
        database.execute("PRAGMA journal_mode=WAL")  # readers and the import's writer do not wait for each other
    serve = [str(python.with_name("gunicorn")), "--bind", f"127.0.0.1:{port}", "--workers", "1"]
    serve += ["--worker-class", "gthread", "--threads", "8", "--no-control-socket", "application:application"]
    with (folder / "log" / "gunicorn.log").open("wb") as log:
        process = subprocess.Popen(serve, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        _wait(glance, process)
        yield glance
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _write_config(glance: RealGlance, plugins: tuple[str, ...], settings: str) -> None:
    for name in ("etc", "images", "staging", "tasks", "log", "cache"):
        (glance.folder / name).mkdir(parents=True, exist_ok=True)
    named = ",".join(f"'{name}'" for name in plugins)
    files = {
        "glance-api.conf": _API.format(folder=glance.folder, url=glance.url),
        "glance-api-paste.ini": _PASTE,
        "glance-image-import.conf": _IMPORT.format(plugins=named, more=settings),
        "policy.yaml": "{}\n",
        "tokens.json": "{}\n",
        "application.py": _APP,
    }
    for name, text in files.items():
        (glance.folder / "etc" / name).write_text(text)


def _installed(folder: Path) -> Path:
    """A folder with imagekit as pip installs it, entry points and all."""
    copy, site = folder / "checkout", folder / "site"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(site), str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return site


def _wait(glance: RealGlance, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            if glance.call("GET", "/v2/images")[0] == 200:
                return
        time.sleep(0.2)
    pytest.fail(f"Glance did not answer: {(glance.folder / 'log' / 'gunicorn.log').read_text()[-3000:]}")
