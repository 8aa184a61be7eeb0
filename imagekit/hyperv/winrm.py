"""The host is another computer: WinRM, PowerShell Remoting Protocol, by pypsrp (extra ``winrm``).

HTTPS unless asked otherwise; plain HTTP only with an authentication that encrypts every message itself (NTLM,
Kerberos, CredSSP), and then it must. A script travels as it is shipped, its parameters as parameters: CLIXML knows
no quoting, so any text arrives as it was. Nothing is retried here.

Follows MS-PSRP and MS-WSMV as far as pypsrp does. Tested against an endpoint on this computer that speaks the
protocol; not against Windows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

from imagekit.errors import ToolError, UsageError
from imagekit.hyperv.credentials import Credentials
from imagekit.hyperv.transport import Answer, LoginFailed, TransportError
from imagekit.records import dataclass

Auth = Literal["negotiate", "ntlm", "kerberos", "credssp", "certificate", "basic"]
AUTHS: tuple[Auth, ...] = get_args(Auth)
ENCRYPTING: frozenset[Auth] = frozenset(("negotiate", "ntlm", "kerberos", "credssp"))
"""These can seal every message, so that HTTP will do."""
HTTP_PORT, HTTPS_PORT = 5985, 5986
POLL_SECONDS = 10
CONNECT_SECONDS = 30

WHY_HTTP = (
    "HTTP with message encryption: Windows Server 2008 R2 speaks no TLS newer than 1.0 unless it was taught to, and "
    "current OpenSSL refuses that; every message is sealed by the authentication instead"
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how a host listens; ``port`` None is the usual one."""

    host: str
    port: int | None = None
    tls: bool = True
    auth: Auth = "negotiate"
    user: str | None = None
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""
    certificate: Path | None = None
    certificate_key: Path | None = None
    configuration: str = "Microsoft.PowerShell"
    """The session configuration: another one for a JEA endpoint."""
    delegate: bool = False
    """Let the host act as us towards a third computer (Kerberos); CredSSP always does."""

    def __post_init__(self) -> None:
        if self.auth not in AUTHS:
            raise UsageError(f"authentication {self.auth!r}", hint=f"choose one of {', '.join(AUTHS)}")
        if not self.tls and self.auth not in ENCRYPTING:
            raise UsageError(
                f"authentication {self.auth} over HTTP would send everything in the clear",
                hint=f"use HTTPS, or one that encrypts messages: {', '.join(sorted(ENCRYPTING))}",
            )
        if self.auth == "certificate" and (self.certificate is None or self.certificate_key is None):
            raise UsageError("authentication by certificate needs a certificate and its key")

    @property
    def url(self) -> str:
        scheme, usual = ("https", HTTPS_PORT) if self.tls else ("http", HTTP_PORT)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port or usual}/wsman"

    @property
    def needs_password(self) -> bool:
        """Whether the authentication cannot do with what the system knows about us."""
        return self.auth in ("ntlm", "credssp", "basic")


def parse_endpoint(text: str, **settings: Any) -> Endpoint:
    """The endpoint of ``hyperv://[USER@]HOST[:PORT]``; port 5985 or ``hyperv+http`` is HTTP with sealed messages."""
    parts = urlsplit(text if "://" in text else f"hyperv://{text}")
    if parts.scheme not in ("hyperv", "hyperv+http", "hyperv+https") or parts.path.strip("/") or parts.query:
        raise UsageError(f"{text!r} names no host", hint="write hyperv://HOST or hyperv://HOST:5985")
    if parts.password is not None:
        raise UsageError(
            "a password in the name of a host is seen by every user of this computer",
            hint="use the environment, a file or the keyring: README, 'Hyper-V'",
        )
    try:
        port = parts.port
    except ValueError:
        raise UsageError(f"{text!r} has no valid port") from None
    if not parts.hostname:
        raise UsageError(f"{text!r} names no host", hint="write hyperv://HOST")
    tls = parts.scheme == "hyperv+https" or (parts.scheme == "hyperv" and port != HTTP_PORT)
    user = unquote(parts.username) if parts.username else None
    return Endpoint(parts.hostname, port, tls, user=user, **settings)


class WinrmTransport:
    """One connection to a host, opened when it is first needed and again after it broke."""

    def __init__(self, endpoint: Endpoint, credentials: Credentials) -> None:
        _need_pypsrp()
        self._endpoint = endpoint
        self._credentials = credentials
        self._wsman: Any = None
        self._pool: Any = None

    @property
    def target(self) -> str:
        return self._endpoint.host

    @property
    def hops(self) -> bool:
        return self._endpoint.auth == "credssp" or self._endpoint.delegate

    def run(self, script: str, parameters: Mapping[str, str], *, timeout: float) -> Answer:
        from pypsrp.complex_objects import PSInvocationState
        from pypsrp.powershell import PowerShell

        deadline = time.monotonic() + timeout
        with self._explained():
            shell = PowerShell(self._opened())
            shell.add_script(script)
            for name, value in parameters.items():
                shell.add_parameter(name, value)
            shell.begin_invoke()
            while shell.state == PSInvocationState.RUNNING:
                left = deadline - time.monotonic()
                if left <= 0:
                    self._abandon(shell)
                    raise TransportError(
                        f"{self.target} did not answer within {timeout:g} s",
                        hint="what it did is unknown: look at the host, or run the command again",
                    )
                shell.poll_invoke(timeout=max(1, min(POLL_SECONDS, round(left))))
            errors = tuple(str(error) for error in shell.streams.error)
            text = "\n".join(str(item) for item in shell.output)
            if shell.state != PSInvocationState.COMPLETED and not text.strip():
                raise TransportError(
                    f"the script was ended by {self.target}: {'; '.join(errors)[:300] or 'no reason'}"
                )
            return Answer(text, errors)

    def close(self) -> None:
        pool, wsman, self._pool, self._wsman = self._pool, self._wsman, None, None
        with contextlib.suppress(Exception):
            if pool is not None:
                pool.close()
        with contextlib.suppress(Exception):
            if wsman is not None:
                wsman.close()

    def _opened(self) -> Any:
        if self._pool is None:
            from pypsrp.powershell import RunspacePool
            from pypsrp.wsman import WSMan

            self._wsman = WSMan(self._endpoint.host, **self._settings())
            pool = RunspacePool(self._wsman, configuration_name=self._endpoint.configuration)
            pool.open()
            self._pool = pool
        return self._pool

    def _settings(self) -> dict[str, Any]:
        endpoint, known = self._endpoint, self._credentials
        settings: dict[str, Any] = {
            "port": endpoint.port,
            "ssl": endpoint.tls,
            "auth": endpoint.auth,
            "username": known.user,
            "password": known.password,
            # Over TLS the channel is bound to the authentication; over HTTP every message must be sealed.
            "encryption": "auto" if endpoint.tls else "always",
            "cert_validation": str(endpoint.ca_file) if endpoint.ca_file else True,
            "connection_timeout": CONNECT_SECONDS,
            "operation_timeout": POLL_SECONDS,
            "read_timeout": POLL_SECONDS + 10,
            "reconnection_retries": 0,
            "negotiate_delegate": endpoint.delegate,
        }
        if endpoint.auth == "certificate":
            settings["certificate_pem"] = str(endpoint.certificate)
            settings["certificate_key_pem"] = str(endpoint.certificate_key)
        return settings

    def _abandon(self, shell: Any) -> None:
        with contextlib.suppress(Exception):
            shell.stop()
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Everything that goes wrong below becomes a TransportError; the connection is not used again."""
        try:
            yield
        except ToolError:
            raise
        except Exception as error:
            self.close()
            raise _explain(error, self._endpoint) from error
        except BaseException:  # Ctrl-C within a message: what follows needs another connection
            self.close()
            raise


def _explain(error: Exception, endpoint: Endpoint) -> TransportError:
    from pypsrp.exceptions import AuthenticationError, WinRMTransportError, WSManFaultError
    from requests import exceptions as http

    where = endpoint.url
    if isinstance(error, AuthenticationError):
        return LoginFailed(
            f"{where} refuses the login ({endpoint.auth})",
            hint="check user (DOMAIN\\user or user@realm), password, and that the account may use WinRM",
        )
    if isinstance(error, http.SSLError):
        return TransportError(f"no TLS connection to {where}: {_innermost(error)}", hint=_tls_hint(str(error)))
    if isinstance(error, http.ConnectTimeout | http.ReadTimeout):
        return TransportError(
            f"{where} did not answer in time", hint="is WinRM on (winrm quickconfig), is the port open?"
        )
    if isinstance(error, http.ConnectionError):
        return TransportError(
            f"the connection to {where} failed: {_innermost(error)}",
            hint="is WinRM on (winrm quickconfig), is the port open? HTTPS is port 5986, HTTP 5985",
        )
    if isinstance(error, WSManFaultError):
        reason = " ".join(str(error.reason or "no reason").split())
        return TransportError(f"{where} refuses: {reason} (code {error.code})")
    if isinstance(error, WinRMTransportError):
        return TransportError(f"{where} answered with HTTP {error.code}")
    if isinstance(error, ValueError | ImportError) and "auth" in str(error).lower():
        return LoginFailed(f"{where}: {error}", hint=_credssp_hint(error))
    # A broken fragment, a message that is no XML, a state that cannot be: each library below has its own.
    return TransportError(f"the answer of {where} cannot be understood ({type(error).__name__}: {str(error)[:200]})")


def _innermost(error: BaseException) -> str:
    """The cause at the bottom; those above it repeat it in long."""
    seen = 0
    while seen < 10:
        reason = getattr(error, "reason", None)
        below = error.__cause__ or error.__context__ or (reason if isinstance(reason, BaseException) else None)
        if not isinstance(below, BaseException):
            break
        error, seen = below, seen + 1
    return " ".join(str(error).split())[:200] or type(error).__name__


def _tls_hint(text: str) -> str:
    if "PROTOCOL" in text.upper() or "EOF" in text.upper():
        return "for Windows Server 2008 R2 name port 5985: " + WHY_HTTP
    return "give the host's certificate, or its CA's, with --ca-file"


def _credssp_hint(error: Exception) -> str | None:
    return "pip install requests-credssp" if "credssp" in str(error).lower() else None


def _need_pypsrp() -> None:
    try:
        import pypsrp.powershell  # noqa: F401
    except ImportError:
        raise ToolError(
            "another computer is reached by WinRM, which needs the package pypsrp",
            hint="pip install 'imagekit[winrm]'",
        ) from None
