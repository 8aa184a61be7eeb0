"""Which proxy leads to a host: what the environment says, as curl and Python's own library read it.

``http_proxy``, ``https_proxy``, ``all_proxy``, and ``no_proxy`` for what is reached without; on Windows and macOS
also the system's settings (not run here). HTTPS goes through a tunnel (RFC 9110, section 9.3.6), so the proxy sees
the host's name and nothing else. This computer itself is never asked for through a proxy.

Not here: SOCKS, proxies that are spoken to by TLS, authentication other than Basic, automatic configuration.
"""

from __future__ import annotations

import re
from base64 import b64encode
from urllib.parse import SplitResult, unquote, urlsplit

from imagekit.errors import UsageError
from imagekit.records import dataclass, field

DEFAULT_PORT = 1080
"""curl's."""

_HERE = re.compile(r"localhost|127(\.\d{1,3}){3}|::1", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where it listens, and what it wants to be told before it helps."""

    host: str
    port: int
    headers: dict[str, str] = field(default_factory=dict, repr=False)


def proxy_for(parts: SplitResult) -> Proxy | None:
    """The proxy for an address, None where it is asked for directly. UsageError for one that cannot be used."""
    host = parts.hostname or ""
    if _HERE.fullmatch(host):
        return None
    from urllib.request import getproxies, proxy_bypass

    found = getproxies()
    stated = found.get(parts.scheme) or found.get("all")
    if not stated or proxy_bypass(host if parts.port is None else f"{host}:{parts.port}"):
        return None
    return _understood(stated)


def _understood(stated: str) -> Proxy:
    try:
        parts = urlsplit(stated if "://" in stated else f"http://{stated}")
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "http" or not host:
        # What is stated may hold a password.
        raise UsageError(
            f"the proxy that the environment names cannot be used (scheme {parts.scheme or 'none'!r})",
            hint="http://HOST:PORT in http_proxy and https_proxy, or the host in no_proxy",
        )
    headers = {}
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers = {"Proxy-Authorization": f"Basic {b64encode(secret).decode()}"}
    return Proxy(host, port or DEFAULT_PORT, headers)
