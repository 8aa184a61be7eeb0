"""Images in OpenStack's image service, Glance (Image API v2): found, judged by what is stated about them, sent.

Without Keystone an endpoint is all that is needed (``--glance-url``); else openstacksdk (extra ``glance``) logs in,
from clouds.yaml or ``OS_…`` variables, and its session asks all questions. Bytes go by HTTP of our own in both
directions, since they are counted and come in ranges (imagekit.remote.http), with the session's token, and the
certificates that it trusts and shows.

What Glance states about an image is what its uploader said, except size and hashes of an image that is ``active``.
"""

from __future__ import annotations

import http.client
import json
import re
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import quote, urlencode, urlsplit

from imagekit.errors import SourceError, ToolError, UnsupportedFeature, UsageError
from imagekit.formats.base import KiB, MiB
from imagekit.records import dataclass, field
from imagekit.remote.checksums import LENGTHS, Checksum
from imagekit.remote.http import USER_AGENT, check_url

PREFIX = "glance:"
PAGE, MOST_PAGES = 500, 2000
"""Images of a page that is asked for, and how many pages a list may have."""
MAX_ANSWER = 8 * MiB
PATCH = "application/openstack-images-v2.1-json-patch"
STORING = 600.0
"""Seconds that Glance may take, at least, to put what it got into its store."""
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

    min_ram: int
    """MiB."""

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
                min_ram=int(values.get("min_ram") or 0),
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


Answer: TypeAlias = tuple[int, str, bytes]
"""Status, the reason that goes with it, and the body, none of it longer than MAX_ANSWER."""


@dataclass(frozen=True, slots=True)
class Glance:
    """One image service: its address without the version, and how to show who we are."""

    url: str
    headers: Callable[[], Mapping[str, str]] = dict
    timeout: float = 30.0
    context: ssl.SSLContext | None = None
    session: Any = None
    """keystoneauth's, which asks the questions; None: nobody has to log in."""

    @classmethod
    def at(cls, url: str, *, timeout: float = 30.0) -> Glance:
        """The service at an address, asked without a token."""
        return cls(_base(url), timeout=timeout)

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
            connection = openstack.connect(cloud=cloud, app_name=USER_AGENT)
            session = connection.session
            session.get_auth_headers()  # who cannot log in is told so, not that nothing was found
            endpoint = connection.image.get_endpoint()
        except Exception as error:  # keystoneauth's and the SDK's have no base class in common
            hint = "see clouds.yaml and --os-cloud, or set OS_CLOUD or OS_AUTH_URL and its like"
            raise ToolError(f"no way to Glance: {error}", hint=hint) from None
        if endpoint is None:
            raise ToolError(
                "the cloud's catalog names no image service", hint="image_endpoint_override in clouds.yaml"
            )

        def headers() -> Mapping[str, str]:
            return dict(session.get_auth_headers() or {})

        return cls(_base(str(endpoint)), headers, timeout, context_of(session), session)

    def find(self, name: str) -> GlanceImage:
        """The image of that id, or the one image of that name."""
        if is_id(name):
            return self.show(name)
        images = self.named(name)
        if not images:
            raise SourceError("there is no such image in Glance", path=PREFIX + name)
        if len(images) > 1:
            ids = ", ".join(image.id for image in images)
            raise SourceError(f"more than one image has that name: {ids}", path=PREFIX + name, hint="give the id")
        return images[0]

    def show(self, identifier: str) -> GlanceImage:
        """The image of that id, as it is now."""
        return GlanceImage.parse(self.call("GET", f"/v2/images/{quote(identifier.lower())}"))

    def named(self, name: str) -> list[GlanceImage]:
        """The images of that name, the first of them at least."""
        return self._images(self.call("GET", "/v2/images?" + urlencode({"name": name, "limit": 20})))

    def _images(self, answer: Mapping[str, Any]) -> list[GlanceImage]:
        images = answer.get("images", ())
        if not isinstance(images, list | tuple):
            raise ToolError("Glance lists images in a way that is not known", path=self.url)
        return [GlanceImage.parse(one) for one in images]

    def listed(self, filters: Sequence[tuple[str, str]]) -> Iterator[GlanceImage]:
        """The images that Glance's own filters choose, the oldest first, page by page."""
        path: Any = "/v2/images?" + urlencode([*filters, ("sort", "created_at:asc"), ("limit", str(PAGE))])
        for _ in range(MOST_PAGES):
            answer = self.call("GET", path)
            yield from self._images(answer)
            path = answer.get("next")
            if path is None:
                return
            if not isinstance(path, str) or not path.startswith("/v2/images?"):
                break
        raise ToolError("Glance lists images without an end", path=self.url)

    def address(self, image: GlanceImage) -> str:
        """Where the image's bytes are."""
        return f"{self.url}/v2/images/{quote(image.id)}/file"

    def create(self, values: Mapping[str, Any]) -> GlanceImage:
        """A new image, without bytes yet."""
        return GlanceImage.parse(self.call("POST", "/v2/images", values))

    def change(self, image: GlanceImage, values: Mapping[str, Any]) -> None:
        """Give it other values."""
        patch = [{"op": "replace", "path": f"/{name}", "value": value} for name, value in values.items()]
        self.call("PATCH", f"/v2/images/{quote(image.id)}", patch, kind=PATCH)

    def delete(self, image: GlanceImage) -> None:
        """Remove it, whatever state it is in; one that is gone already is fine."""
        with suppress(SourceError):
            self.call("DELETE", f"/v2/images/{quote(image.id)}")

    def send(self, image: GlanceImage, pieces: Iterable[bytes], size: int) -> None:
        """Give it its bytes, exactly ``size`` of them."""
        connection = self._connection(max(self.timeout, STORING))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size), **self._own_headers()}
        try:
            broken: OSError | None = None
            try:
                connection.request("PUT", urlsplit(self.address(image)).path, pieces, headers)
            except OSError as error:
                broken = error  # Glance hangs up on what it refuses, but says why first
            answer = _read(connection, self.url, broken)
        finally:
            connection.close()
        self._judged(answer, image.id)

    def call(self, method: str, path: str, values: Any = None, *, kind: str = "application/json") -> Any:
        """One request with JSON in and out; SourceError for what is not there, else ToolError."""
        body = None if values is None else json.dumps(values).encode()
        headers = {} if body is None else {"Content-Type": kind}
        ask = self._ask_directly if self.session is None else self._ask_by_session
        text = self._judged(ask(method, path, body, headers), path.rpartition("/")[2])
        try:
            found = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            raise ToolError("Glance answered with something that is no JSON", path=self.url) from None
        if not isinstance(found, dict):
            raise ToolError("Glance answered with JSON that is no object", path=self.url)
        return found

    def _judged(self, answer: Answer, about: str) -> bytes:
        status, reason, text = answer
        if status == 404:
            raise SourceError("there is no such image in Glance", path=PREFIX + about)
        if not 200 <= status < 300:
            hint = {401: "log in: clouds.yaml, --os-cloud", 403: "ask who runs the cloud for the right to do that"}
            said = f"Glance answered {status} {reason}{_reason(text)}"
            raise ToolError(said, path=self.url, hint=hint.get(status))
        return text

    def _ask_directly(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        connection = self._connection(self.timeout)
        try:
            connection.request(method, urlsplit(self.url).path + path, body, {**headers, **self._own_headers()})
            return _read(connection, self.url)
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(self.url, error) from error
        finally:
            connection.close()

    def _ask_by_session(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        try:
            response = self.session.request(
                self.url + path,
                method,
                data=body,
                headers=dict(headers),
                raise_exc=False,
                redirect=False,
                stream=True,
                timeout=self.timeout,
            )
            with response:
                text = b"".join(_bounded(response.iter_content(64 * KiB)))
            return int(response.status_code), str(response.reason), text
        except Exception as error:  # requests' and keystoneauth's
            raise _no_answer(self.url, error) from None

    def _own_headers(self) -> Mapping[str, str]:
        return {"User-Agent": USER_AGENT, **self.headers()}

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme != "https":
            return http.client.HTTPConnection(host, parts.port, timeout=timeout)
        context = self.context or ssl.create_default_context()
        return http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)


def is_id(name: str) -> bool:
    """Whether it looks like the id of an image."""
    return _UUID.fullmatch(name) is not None


def _base(url: str) -> str:
    check_url(url)
    return re.sub(r"(/v2(\.\d+)?)?/*$", "", url)


def _read(connection: http.client.HTTPConnection, url: str, broken: OSError | None = None) -> Answer:
    """The answer; ``broken`` is what went wrong while the request was sent."""
    try:
        response = connection.getresponse()
        return response.status, response.reason, response.read(MAX_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise _no_answer(url, broken or error) from error


def _no_answer(url: str, error: BaseException) -> ToolError:
    return ToolError(f"Glance does not answer: {error}", path=url, hint="check the address, and try again")


def _bounded(pieces: Iterable[bytes]) -> Iterable[bytes]:
    left = MAX_ANSWER
    for piece in pieces:
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


def _reason(text: bytes) -> str:
    """The reason in an answer that is HTML."""
    bare = re.sub(r"<head>.*?</head>|<[^>]+>", " ", text.decode("utf-8", "replace"), flags=re.DOTALL)
    words = " ".join(bare.split())
    return f": {words[:300]}" if words else ""


def context_of(session: Any) -> ssl.SSLContext | None:
    """The session's idea of which certificates count, and the one that it shows itself."""
    verify, own = getattr(session, "verify", True), getattr(session, "cert", None)
    if verify is True and own is None:
        return None
    try:
        context = ssl.create_default_context(cafile=verify if isinstance(verify, str) else None)
        if verify is False:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if own is not None:
            context.load_cert_chain(*((own,) if isinstance(own, str) else own))
    except OSError as error:
        raise ToolError(f"a certificate of the cloud's settings cannot be read: {error}") from None
    return context
