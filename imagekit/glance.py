"""Images in OpenStack's image service, Glance (Image API v2): found, judged by what is stated about them, fetched.

Without Keystone an endpoint is all that is needed (``--glance-url``); else openstacksdk (extra ``glance``) finds the
endpoint and the token, from clouds.yaml or ``OS_…`` variables, and nothing but those two is taken from it: bytes come
through imagekit.remote_http like any other's.

What Glance states about an image is what its uploader said, except size and hashes of an image that is ``active``.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from imagekit.checksums import LENGTHS, Checksum
from imagekit.errors import SourceError, ToolError, UnsupportedFeature, UsageError
from imagekit.formats.base import MiB
from imagekit.remote_http import USER_AGENT, check_url

PREFIX = "glance:"
MAX_ANSWER = 8 * MiB
FORMATS = {"qcow2": "qcow2", "raw": "raw", "vhd": "vhd", "vhdx": "vhdx", "vmdk": "vmdk", "vdi": "vdi"}
"""disk_format and our name of it; ami, aki, ari and iso are no disks of ours."""
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)


@dataclass(frozen=True, slots=True)
class GlanceImage:
    """What Glance states about an image."""

    id: str
    name: str
    status: str
    disk_format: str | None
    container_format: str | None
    size: int | None
    min_disk: int
    """GiB."""

    checksum: Checksum | None
    """The strongest that is stated and that we can compute."""

    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{PREFIX}{self.id}"

    @property
    def format(self) -> str | None:
        """The format its content must have."""
        return FORMATS.get(self.disk_format or "")

    @classmethod
    def parse(cls, values: Any) -> GlanceImage:
        try:
            return cls(
                id=str(values["id"]),
                name=str(values.get("name") or ""),
                status=str(values["status"]),
                disk_format=values.get("disk_format"),
                container_format=values.get("container_format"),
                size=None if values.get("size") is None else int(values["size"]),
                min_disk=int(values.get("min_disk") or 0),
                checksum=_checksum(values) if values["status"] == "active" else None,
                properties={key: value for key, value in values.items() if isinstance(value, str)},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ToolError(f"Glance describes an image in a way that is not known: {error!r}") from None

    def check_readable(self) -> None:
        """Refuse what cannot be fetched, or is no disk."""
        if self.status != "active":
            raise SourceError(f"the image is {self.status}, not active", path=self.label)
        if self.container_format not in ("bare", "ova", "compressed"):
            raise UnsupportedFeature(f"container format {self.container_format}", path=self.label)
        if self.format is None:
            raise UnsupportedFeature(
                f"disk format {self.disk_format}", path=self.label, hint=f"read from Glance: {', '.join(FORMATS)}"
            )


def _checksum(values: Mapping[str, Any]) -> Checksum | None:
    algorithm, value = values.get("os_hash_algo"), values.get("os_hash_value")
    if algorithm and value and str(algorithm).lower().replace("-", "") in LENGTHS:
        return Checksum.of(str(algorithm), str(value))
    return Checksum.of("md5", str(values["checksum"])) if values.get("checksum") else None


@dataclass(frozen=True, slots=True)
class Glance:
    """One image service: its address without the version, and how to show who we are."""

    url: str
    headers: Callable[[], Mapping[str, str]] = dict
    timeout: float = 30.0
    context: ssl.SSLContext | None = None

    @classmethod
    def at(cls, url: str, *, timeout: float = 30.0) -> Glance:
        """The service at an address, asked without a token."""
        check_url(url)
        return cls(re.sub(r"(/v2(\.\d+)?)?/*$", "", url), timeout=timeout)

    @classmethod
    def of_cloud(cls, cloud: str | None, *, timeout: float = 30.0) -> Glance:
        """The service of a cloud that openstacksdk knows: clouds.yaml, or the environment."""
        try:
            import openstack
        except ImportError:
            raise UsageError(
                "Glance through Keystone needs openstacksdk", hint="pip install 'imagekit[glance]', or --glance-url"
            ) from None
        try:
            connection = openstack.connect(cloud=cloud)
            endpoint = str(connection.image.get_endpoint())
            session = connection.session
        except Exception as error:  # keystoneauth's and the SDK's have no base class in common
            raise ToolError(f"no way to Glance: {error}", hint="see clouds.yaml, or set OS_CLOUD") from None
        found = cls.at(endpoint, timeout=timeout)
        return replace(found, headers=lambda: session.get_auth_headers() or {}, context=_context(session))

    def find(self, name: str) -> GlanceImage:
        """The image of that id, or the one image of that name."""
        if _UUID.fullmatch(name):
            return GlanceImage.parse(self.call("GET", f"/v2/images/{name.lower()}"))
        listed = self.call("GET", "/v2/images?" + urlencode({"name": name, "limit": 20}))
        images = [GlanceImage.parse(one) for one in listed.get("images", ())]
        if not images:
            raise SourceError("there is no such image in Glance", path=PREFIX + name)
        if len(images) > 1:
            ids = ", ".join(image.id for image in images)
            raise SourceError(f"more than one image has that name: {ids}", path=PREFIX + name, hint="give the id")
        return images[0]

    def address(self, image: GlanceImage) -> str:
        """Where the image's bytes are."""
        return f"{self.url}/v2/images/{quote(image.id)}/file"

    def call(self, method: str, path: str, values: Mapping[str, Any] | None = None) -> Any:
        """One request with JSON in and out; SourceError for what is not there, else ToolError."""
        body = None if values is None else json.dumps(values).encode()
        sent = {} if body is None else {"Content-Type": "application/json"}
        parts = urlsplit(self.url)
        connection = self._connection(parts.hostname or "", parts.port, secure=parts.scheme == "https")
        try:
            connection.request(method, parts.path + path, body, {"User-Agent": USER_AGENT, **sent, **self.headers()})
            response = connection.getresponse()
            text = response.read(MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise ToolError(f"Glance does not answer: {error}", path=self.url, hint="check the address") from error
        finally:
            connection.close()
        if response.status == 404:
            raise SourceError("there is no such image in Glance", path=PREFIX + path.rpartition("/")[2])
        if not 200 <= response.status < 300:
            raise ToolError(f"Glance answered {response.status} {response.reason}{_reason(text)}", path=self.url)
        try:
            return json.loads(text) if text else {}
        except ValueError:
            raise ToolError("Glance answered with something that is no JSON", path=self.url) from None

    def _connection(self, host: str, port: int | None, *, secure: bool) -> http.client.HTTPConnection:
        if not secure:
            return http.client.HTTPConnection(host, port, timeout=self.timeout)
        context = self.context or ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=self.timeout, context=context)


def _reason(text: bytes) -> str:
    """The reason in an answer that is HTML."""
    bare = re.sub(r"<head>.*?</head>|<[^>]+>", " ", text.decode("utf-8", "replace"), flags=re.DOTALL)
    words = " ".join(bare.split())
    return f": {words[:300]}" if words else ""


def _context(session: Any) -> ssl.SSLContext | None:
    """The SDK's idea of which certificates count."""
    verify = getattr(session, "verify", True)
    if isinstance(verify, str):
        return ssl.create_default_context(cafile=verify)
    if verify is False:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    return None
