"""Objects in stores that fsspec reads (``s3://`` and its like, extra ``remote``), as ranges of one version.

The store's library has the network, the retries of its protocol and the credentials (its environment variables and
files, never the address). What counts here as elsewhere: every byte of a range, one size, one ETag or time of change,
and an error of ours, without the text of a library's that may hold what it was called with.

Not here: chains of file systems (``a::b``), and whatever is not over a network: there is no ``file://``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from imagekit.errors import ImagekitError, SourceError, ToolError, UsageError
from imagekit.records import dataclass, field
from imagekit.remote.http import Attempts, Dropped, HttpOptions, Version, shown

SCHEMES = frozenset(
    ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "obs", "b2", "sftp", "smb", "webhdfs")
)
"""Protocols of fsspec that lead over a network, each to one host or service."""
CREDENTIALS = "credentials come from the environment or the files of the store's own tools (AWS_…, ~/.aws)"
EXPIRED = "FileExpired"
"""What s3fs raises where an object has another ETag than when it was opened."""


def check_address(url: str) -> None:
    """UsageError for an address with a secret in it, or one that leads through several file systems."""
    if "::" in url:
        raise UsageError(f"{shown(url)} leads through several file systems", hint="give the object's own address")
    parts = urlsplit(url)
    if parts.password is not None:
        raise UsageError("credentials in an address end up in logs", hint=CREDENTIALS)
    if not parts.netloc or not parts.path.strip("/"):
        raise UsageError(f"{shown(url)} names no object", hint=f"{parts.scheme}://BUCKET/NAME")


@dataclass(slots=True)
class StoredObject:
    """One object. Safe to share between threads, each of which has a handle of its own."""

    url: str
    options: HttpOptions = field(default_factory=HttpOptions)
    version: Version | None = None
    _system: Any = None
    _path: str = ""
    _own: threading.local = field(default_factory=threading.local, repr=False)
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self) -> None:
        check_address(self.url)

    @property
    def name(self) -> str:
        return shown(self.url)

    @contextmanager
    def opened(self, length: int) -> Iterator[First]:
        """The first bytes, and what there is."""
        self.version = self._retried(self._look)
        first = min(length, self.version.size)
        yield First(self, self.version, first)

    def fetch(self, offset: int, length: int, sink: Callable[[int, bytes], None]) -> None:
        """Give the bytes of a range to ``sink``."""
        sink(offset, self._retried(lambda: self._read(offset, length)))

    def close(self) -> None:
        self._closed.set()

    # --- the library -------------------------------------------------------------------------------------------

    def _retried(self, call: Callable[[], Any]) -> Any:
        attempts = Attempts(self.name, self.options, self._closed)
        while True:
            try:
                return call()
            except ImagekitError:
                raise
            except Dropped as error:
                attempts.failed(error)
            except Exception as error:  # no base class is common to all stores
                attempts.failed(self._understood(error))

    def _look(self) -> Version:
        if self._system is None:
            self._system, self._path = self._connected()
        with suppress(AttributeError):
            self._system.invalidate_cache(self._path)
        return _version(self._system.info(self._path), self.name)

    def _connected(self) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError:
            raise _missing("fsspec") from None
        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise _missing(error.name or "a package") from None
        return system, path

    def _read(self, offset: int, length: int) -> bytes:
        if self._closed.is_set():
            raise SourceError("closed while it was fetched", path=self.name)
        handle = getattr(self._own, "handle", None)
        if handle is None:
            handle = self._own.handle = self._system.open(self._path, "rb", cache_type="none")
            details = getattr(handle, "details", None)
            assert self.version is not None
            if isinstance(details, dict) and (changes := self.version.differences(_version(details, self.name))):
                raise self._changed("; ".join(changes))
        try:
            handle.seek(offset)
            data = bytes(handle.read(length))
        except BaseException:
            self._own.handle = None
            raise
        if len(data) != length:
            self._own.handle = None
            raise Dropped(f"{len(data)} of {length} bytes came")
        return data

    def _understood(self, error: Exception) -> Dropped:
        """Worth another attempt, or raised as an error of ours."""
        kind = type(error).__name__
        if kind == EXPIRED:
            raise self._changed("another ETag") from None
        if isinstance(error, FileNotFoundError):
            raise SourceError("there is no such object", path=self.name, hint="check the address") from None
        if isinstance(error, PermissionError) or "Credential" in kind or "Auth" in kind:
            raise SourceError(f"may not be read ({kind})", path=self.name, hint=CREDENTIALS) from None
        if isinstance(error, (TypeError, ValueError, NotImplementedError)):
            raise ToolError(f"the store's library cannot do it ({kind})", path=self.name) from None
        return Dropped(kind if not isinstance(error, OSError) or not error.errno else f"{kind}, error {error.errno}")

    def _changed(self, how: str) -> SourceError:
        return SourceError(
            f"changed while it was read: {how}", path=self.name, hint="try again when it stays the same"
        )


@dataclass(frozen=True, slots=True)
class First:
    """The first piece, in the form of an answer over HTTP."""

    origin: StoredObject
    version: Version
    length: int
    partial: bool = True

    def pieces(self) -> Iterator[bytes]:
        if self.length:
            got: list[bytes] = []
            self.origin.fetch(0, self.length, lambda _, data: got.append(data))
            yield from got


def _version(info: dict[str, Any], name: str) -> Version:
    if info.get("type") == "directory" or not isinstance(info.get("size"), int):
        raise SourceError("is no object with a size", path=name, hint="name one object, not a folder")
    etag, modified = info.get("ETag") or info.get("etag"), info.get("LastModified") or info.get("mtime")
    return Version(info["size"], etag and str(etag), modified and str(modified))


def _missing(package: str) -> UsageError:
    hint = "pip install 'imagekit[remote]'" if package in ("fsspec", "s3fs") else "install what fsspec needs for it"
    return UsageError(f"this address needs {package}", hint=hint)
