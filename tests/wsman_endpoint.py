"""A WinRM endpoint on this computer: WS-Management over HTTP(S), PowerShell Remoting by psrpcore.

It speaks what a Windows host speaks — Basic, or NTLM with every message sealed — and runs no PowerShell: a function
of the test answers each call, with the script and the parameters as they arrived. It can also misbehave on request:
stay silent, cut an answer short, hang up.
"""

from __future__ import annotations

import base64
import re
import socket
import ssl
import struct
import threading
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import psrpcore
import psrpcore.types
import spnego

S = "http://www.w3.org/2003/05/soap-envelope"
WSA = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
WSMAN = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
RSP = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
WST = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
FAULT = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
PWSH = "http://schemas.microsoft.com/powershell"
TIMED_OUT = 2150858793
"""The fault of an operation that took longer than the client's OperationTimeout: it asks again."""
CHUNK = 100_000
SEALED = "application/HTTP-SPNEGO-session-encrypted"

Fault = Literal["none", "silent", "truncate-xml", "truncate-fragment", "hang-up", "no-frame"]


@dataclass
class Call:
    """One pipeline as it arrived: the script's text, and its parameters by name."""

    script: str
    parameters: dict[str, str]


@dataclass
class Reply:
    """What the pipeline does: writes ``output``, then ``errors``, and ``fails`` with a reason or completes."""

    output: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    fails: str | None = None


Answering = Callable[[Call], Reply]


@dataclass
class _Shell:
    pool: Any
    ready: list[uuid.UUID] = field(default_factory=list)
    outgoing: dict[uuid.UUID | None, bytearray] = field(default_factory=dict)
    done: set[uuid.UUID] = field(default_factory=set)


class WsmanEndpoint:
    """The endpoint; a context manager that listens while it is entered."""

    def __init__(
        self,
        answering: Answering,
        *,
        auth: Literal["basic", "ntlm"] = "ntlm",
        user: str = "tester",
        password: str = "pass word",
        certificate: Path | None = None,
        fault: Fault = "none",
    ) -> None:
        self.answering, self.auth, self.user, self.password = answering, auth, user, password
        self.fault = fault
        self.hang_up = False
        """Set while a call is answered: its answer is lost with the connection."""
        self.calls: list[Call] = []
        self.wire = bytearray()
        """All bytes of all requests' bodies, as they came over the wire."""
        self.shells: dict[str, _Shell] = {}
        self.lock = threading.Lock()
        endpoint = self

        class Handler(_Handler):
            server_endpoint = endpoint

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.tls = certificate is not None
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> WsmanEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: bytes) -> tuple[int, bytes]:
        """The status and body for one SOAP message."""
        with self.lock:
            envelope = ET.fromstring(request)
            message_id = envelope.findtext(f"{{{S}}}Header/{{{WSA}}}MessageID") or ""
            action = (envelope.findtext(f"{{{S}}}Header/{{{WSA}}}Action") or "").rsplit("/", 1)[-1]
            body = envelope.find(f"{{{S}}}Body")
            assert body is not None
            answer = getattr(self, f"_{action.lower()}")(envelope, body)
        if isinstance(answer, int):
            return 500, _fault(message_id, answer)
        return 200, _envelope(message_id, answer)

    def _create(self, envelope: ET.Element, body: ET.Element) -> str:
        shell_element = body.find(f"{{{RSP}}}Shell")
        assert shell_element is not None
        shell_id = shell_element.attrib["ShellId"]
        content = shell_element.findtext(f"{{{PWSH}}}creationXml") or ""
        shell = self.shells[shell_id] = _Shell(psrpcore.ServerRunspacePool())
        self._take(shell, base64.b64decode(content))
        selector = (
            f'<w:SelectorSet xmlns:w="{WSMAN}"><w:Selector Name="ShellId">{shell_id}</w:Selector></w:SelectorSet>'
        )
        return (
            f'<t:ResourceCreated xmlns:t="{WST}"><a:ReferenceParameters xmlns:a="{WSA}">{selector}'
            f"</a:ReferenceParameters></t:ResourceCreated>"
            f'<r:Shell xmlns:r="{RSP}"><r:ShellId>{shell_id}</r:ShellId></r:Shell>'
        )

    def _command(self, envelope: ET.Element, body: ET.Element) -> str:
        shell = self._shell(envelope)
        line = body.find(f"{{{RSP}}}CommandLine")
        assert line is not None
        command = uuid.UUID(line.attrib["CommandId"])
        psrpcore.ServerPipeline(shell.pool, command)
        self._take(shell, base64.b64decode(line.findtext(f"{{{RSP}}}Arguments") or ""))
        text = str(command).upper()
        return f'<r:CommandResponse xmlns:r="{RSP}"><r:CommandId>{text}</r:CommandId></r:CommandResponse>'

    def _send(self, envelope: ET.Element, body: ET.Element) -> str:
        stream = body.find(f"{{{RSP}}}Send/{{{RSP}}}Stream")
        assert stream is not None
        self._take(self._shell(envelope), base64.b64decode(stream.text or ""))
        return f'<r:SendResponse xmlns:r="{RSP}"/>'

    def _receive(self, envelope: ET.Element, body: ET.Element) -> str | int:
        shell = self._shell(envelope)
        desired = body.find(f"{{{RSP}}}Receive/{{{RSP}}}DesiredStream")
        assert desired is not None
        text = desired.get("CommandId")
        command = uuid.UUID(text) if text else None
        if command in shell.ready:
            if self.fault == "silent":
                time.sleep(0.05)
                return TIMED_OUT
            shell.ready.remove(command)
            self._run(shell, command)
        self._drain(shell)
        waiting = shell.outgoing.setdefault(command, bytearray())
        if not waiting:
            return TIMED_OUT
        data, shell.outgoing[command] = bytes(waiting[:CHUNK]), waiting[CHUNK:]
        if command is not None and self.fault == "truncate-fragment":
            data = data[: len(data) // 2]
            shell.outgoing[command] = bytearray(b"\0" * 40)
        state = ""
        if command in shell.done and not shell.outgoing[command]:
            state = f'<r:CommandState CommandId="{text}" State="{RSP}/CommandState/Done"/>'
        stream = f'<r:Stream Name="stdout">{base64.b64encode(data).decode()}</r:Stream>'
        return f'<r:ReceiveResponse xmlns:r="{RSP}">{stream}{state}</r:ReceiveResponse>'

    def _signal(self, envelope: ET.Element, body: ET.Element) -> str:
        return f'<r:SignalResponse xmlns:r="{RSP}"/>'

    def _delete(self, envelope: ET.Element, body: ET.Element) -> str:
        self.shells.pop(self._shell_id(envelope), None)
        return ""

    def _shell_id(self, envelope: ET.Element) -> str:
        found = envelope.find(f"{{{S}}}Header/{{{WSMAN}}}SelectorSet/{{{WSMAN}}}Selector[@Name='ShellId']")
        assert found is not None and found.text is not None
        return found.text

    def _shell(self, envelope: ET.Element) -> _Shell:
        return self.shells[self._shell_id(envelope)]

    def _take(self, shell: _Shell, data: bytes) -> None:
        shell.pool.receive_data(psrpcore.PSRPPayload(data, psrpcore.StreamType.default, None))
        while (event := shell.pool.next_event()) is not None:
            if isinstance(event, psrpcore.CreatePipelineEvent):
                shell.ready.append(event.pipeline_id)

    def _run(self, shell: _Shell, command: uuid.UUID) -> None:
        pipeline = shell.pool.pipeline_table[command]
        (statement,) = pipeline.metadata.commands
        assert statement.is_script
        call = Call(statement.command_text, dict(statement.parameters))
        self.calls.append(call)
        reply = Reply(["nothing of the kind expected"]) if self.fault == "no-frame" else self.answering(call)
        pipeline.start()
        for item in reply.output:
            pipeline.write_output(item)
        for message in reply.errors:
            pipeline.write_error(psrpcore.types.NETException(Message=message))
        if reply.fails is not None:
            record = psrpcore.types.ErrorRecord(
                Exception=psrpcore.types.NETException(Message=reply.fails),
                CategoryInfo=psrpcore.types.ErrorCategoryInfo(),
            )
            pipeline._change_state(psrpcore.types.PSInvocationState.Failed, error=record)
        else:
            pipeline.complete()
        shell.done.add(command)

    def _drain(self, shell: _Shell) -> None:
        while (payload := shell.pool.data_to_send(CHUNK)) is not None:
            shell.outgoing.setdefault(payload.pipeline_id, bytearray()).extend(payload.data)


class _Handler(BaseHTTPRequestHandler):
    """One connection: NTLM authenticates connections, not requests."""

    protocol_version = "HTTP/1.1"
    server_endpoint: WsmanEndpoint
    context: Any = None

    def setup(self) -> None:
        super().setup()
        self.context = None

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        endpoint = self.server_endpoint
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with endpoint.lock:
            endpoint.wire += body
        if not self._known():
            return
        if not body:
            self._answer(200, b"")
            return
        sealed = self.headers.get("Content-Type", "").startswith("multipart/encrypted")
        if endpoint.auth == "ntlm" and not endpoint.tls and not sealed:
            self._answer(500, b"a message that is not sealed")
            return
        status, answer = endpoint.respond(self._open(body) if sealed else body)
        if endpoint.hang_up:
            endpoint.hang_up = False
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        running = any(shell.done for shell in endpoint.shells.values())
        if running and endpoint.fault == "hang-up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if running and endpoint.fault == "truncate-xml":
            answer = answer[: len(answer) // 2]
        self._answer(status, self._seal(answer) if sealed else answer, sealed=sealed)

    def _known(self) -> bool:
        endpoint = self.server_endpoint
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if endpoint.auth == "basic":
            wanted = base64.b64encode(f"{endpoint.user}:{endpoint.password}".encode()).decode()
            if scheme == "Basic" and value == wanted:
                return True
            self._answer(401, b"", challenge='Basic realm="WSMAN"')
            return False
        if not value:
            if self.context is not None and self.context.complete:
                return True
            self._answer(401, b"", challenge="Negotiate")
            return False
        if self.context is None or self.context.complete:
            self.context = spnego.server(protocol="ntlm", options=spnego.NegotiateOptions.wrapping_winrm)
        try:
            token = self.context.step(base64.b64decode(value))
        except spnego.exceptions.SpnegoError:
            self.context = None
            self._answer(401, b"", challenge="Negotiate")
            return False
        if self.context.complete:
            return True
        self._answer(401, b"", challenge=f"Negotiate {base64.b64encode(token).decode()}")
        return False

    def _open(self, body: bytes) -> bytes:
        _, _, packed = body.split(b"--Encrypted Boundary\r\n")
        packed = packed.removeprefix(b"\tContent-Type: application/octet-stream\r\n")
        packed = re.sub(rb"--Encrypted Boundary--\r\n$", b"", packed)
        (length,) = struct.unpack("<i", packed[:4])
        opened: bytes = self.context.unwrap_winrm(packed[4 : 4 + length], packed[4 + length :])
        return opened

    def _seal(self, message: bytes) -> bytes:
        header, data, padding = self.context.wrap_winrm(message)
        head = (
            "--Encrypted Boundary\r\n"
            f"\tContent-Type: {SEALED}\r\n"
            f"\tOriginalContent: type=application/soap+xml;charset=UTF-8;Length={len(message) + padding}\r\n"
            "--Encrypted Boundary\r\n\tContent-Type: application/octet-stream\r\n"
        )
        body: bytes = struct.pack("<i", len(header)) + header + data
        return head.encode() + body + b"--Encrypted Boundary--\r\n"

    def _answer(self, status: int, body: bytes, *, challenge: str | None = None, sealed: bool = False) -> None:
        self.send_response(status)
        if challenge is not None:
            self.send_header("WWW-Authenticate", challenge)
        kind = f'multipart/encrypted;protocol="{SEALED}";boundary="Encrypted Boundary"'
        self.send_header("Content-Type", kind if sealed else "application/soap+xml;charset=UTF-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _envelope(message_id: str, body: str) -> bytes:
    head = f'<a:RelatesTo xmlns:a="{WSA}">{message_id}</a:RelatesTo>'
    text = f'<s:Envelope xmlns:s="{S}"><s:Header>{head}</s:Header><s:Body>{body}</s:Body></s:Envelope>'
    return text.encode()


def _fault(message_id: str, code: int) -> bytes:
    message = "<f:Message>fault</f:Message>"
    detail = f'<f:WSManFault xmlns:f="{FAULT}" Code="{code}" Machine="loopback">{message}</f:WSManFault>'
    body = (
        f"<s:Fault><s:Code><s:Value>s:Receiver</s:Value></s:Code><s:Reason><s:Text>fault</s:Text></s:Reason>"
        f"<s:Detail>{detail}</s:Detail></s:Fault>"
    )
    return _envelope(message_id, body)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1: with its key for the endpoint, alone for its clients."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both, alone = folder / "endpoint.pem", folder / "ca.pem"
    both.write_bytes(private + public)
    alone.write_bytes(public)
    return both, alone
