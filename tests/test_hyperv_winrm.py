"""WinRM against an endpoint on this computer: what is sent arrives as it was, and every failure is said as one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from imagekit.errors import UsageError
from imagekit.hyperv.credentials import Credentials
from imagekit.hyperv.frames import frame, make_nonce, unframe
from imagekit.hyperv.transport import Answer, LoginFailed, TransportError
from imagekit.hyperv.winrm import Endpoint, WinrmTransport, parse_endpoint
from tests.wsman_endpoint import Call, Reply, WsmanEndpoint, make_certificate

HOSTILE = [
    "x'; Remove-Item C:\\ -Recurse; '",
    '"$(calc)`n$env:PATH"',
    "’‘‚‛ quotes that PowerShell takes for its own",
    "}; exit 1 #",
    "line\nbreaks\r\nand\ttabs",
    "<S>&amp;</S> ]]> <![CDATA[ x",
    "_x000A_ looks escaped, _x005F_ too",
    "\x01\x07\x1f\x7f control",
    "Grüße, 日本語, 🚀 and \u202e",
    "",
    " lead and trail ",
]


def echo(call: Call) -> Reply:
    return Reply([frame({"got": call.parameters["Data"], "script": call.script}, call.parameters["Nonce"])])


@pytest.fixture
def ntlm_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom the endpoint's NTLM knows."""
    users = tmp_path / "users"
    users.write_text("DOMAIN:tester:pass word\n")
    monkeypatch.setenv("NTLM_USER_FILE", str(users))


def connect(endpoint: WsmanEndpoint, *, password: str = "pass word", ca_file: Path | None = None) -> WinrmTransport:
    user = "DOMAIN\\tester" if endpoint.auth == "ntlm" else "tester"
    settings = Endpoint("127.0.0.1", endpoint.port, endpoint.tls, endpoint.auth, ca_file=ca_file)
    return WinrmTransport(settings, Credentials(user, password))


def ask(transport: WinrmTransport, data: str, *, script: str = "param($Data, $Nonce)", timeout: float = 20) -> Answer:
    nonce = make_nonce()
    answer = transport.run(script, {"Data": data, "Nonce": nonce}, timeout=timeout)
    value = unframe(answer.text, nonce)
    assert value["script"] == script
    assert value["got"] == data
    return answer


def test_hostile_text_arrives_as_it_was_sealed_by_ntlm(ntlm_users: None) -> None:
    """Over plain HTTP, with nothing readable on the wire."""
    with WsmanEndpoint(echo) as endpoint:
        transport = connect(endpoint)
        for text in HOSTILE:
            ask(transport, text)
        ask(transport, json.dumps(HOSTILE, ensure_ascii=False))
        transport.close()
        assert [call.parameters["Data"] for call in endpoint.calls[:-1]] == HOSTILE
        assert b"Envelope" not in endpoint.wire and b"Remove-Item" not in endpoint.wire
        assert len(endpoint.wire) > 10_000


def test_hostile_text_arrives_as_it_was_by_basic_over_tls(tmp_path: Path) -> None:
    both, alone = make_certificate(tmp_path)
    with WsmanEndpoint(echo, auth="basic", certificate=both) as endpoint:
        transport = connect(endpoint, ca_file=alone)
        for text in HOSTILE:
            ask(transport, text)
        transport.close()
        assert not endpoint.shells, "the shell on the host was not closed"


def test_ntlm_over_tls_works_too(ntlm_users: None, tmp_path: Path) -> None:
    both, alone = make_certificate(tmp_path)
    with WsmanEndpoint(echo, certificate=both) as endpoint:
        ask(connect(endpoint, ca_file=alone), "over TLS")


def test_a_certificate_nobody_vouches_for_is_refused(ntlm_users: None, tmp_path: Path) -> None:
    both, _ = make_certificate(tmp_path)
    with WsmanEndpoint(echo, certificate=both) as endpoint, pytest.raises(TransportError, match="TLS") as caught:
        ask(connect(endpoint), "x")
    assert caught.value.hint is not None and "--ca-file" in caught.value.hint
    assert not endpoint.calls


def test_text_of_many_fragments_arrives_whole(ntlm_users: None) -> None:
    with WsmanEndpoint(echo) as endpoint:
        ask(connect(endpoint), "ü'\"\n" * 50_000)


def test_a_script_with_an_error_record_says_so(ntlm_users: None) -> None:
    def answering(call: Call) -> Reply:
        reply = echo(call)
        return Reply(reply.output, errors=["Zugriff verweigert: C:\\Grüße"])

    with WsmanEndpoint(answering) as endpoint:
        answer = ask(connect(endpoint), "x")
        assert any("Zugriff verweigert: C:\\Grüße" in error for error in answer.errors)


def test_a_script_that_the_host_ends_is_a_failure_with_its_reason(ntlm_users: None) -> None:
    with (
        WsmanEndpoint(lambda call: Reply(fails="The term 'Hyper-V\\Get-VM' is not recognized")) as endpoint,
        pytest.raises(TransportError, match="not recognized"),
    ):
        ask(connect(endpoint), "x")


@pytest.mark.parametrize("auth", ["basic", "ntlm"])
def test_a_wrong_password_is_a_failed_login_and_is_not_repeated(auth: str, ntlm_users: None, tmp_path: Path) -> None:
    both, alone = make_certificate(tmp_path)
    endpoint = (
        WsmanEndpoint(echo, auth="basic", certificate=both) if auth == "basic" else WsmanEndpoint(echo, auth="ntlm")
    )
    with endpoint, pytest.raises(LoginFailed) as caught:
        ask(connect(endpoint, password="hunter2-wrong", ca_file=alone if auth == "basic" else None), "x")
    shown = f"{caught.value} {caught.value.hint} {caught.value!r}"
    assert "hunter2" not in shown
    assert not endpoint.calls


def test_a_host_that_stays_silent_is_given_up_in_time(ntlm_users: None) -> None:
    with WsmanEndpoint(echo, fault="silent") as endpoint:
        began = time.monotonic()
        with pytest.raises(TransportError, match="did not answer within 1 s"):
            ask(connect(endpoint), "x", timeout=1)
        assert time.monotonic() - began < 15


@pytest.mark.parametrize("fault", ["truncate-xml", "truncate-fragment", "hang-up", "no-frame"])
def test_an_answer_that_breaks_off_is_a_failure_of_the_transport(fault: str, ntlm_users: None) -> None:
    with WsmanEndpoint(echo, fault=fault) as endpoint:  # type: ignore[arg-type]
        transport = connect(endpoint)
        with pytest.raises(TransportError):
            ask(transport, "x" * 1000)
        endpoint.fault = "none"
        for shell in endpoint.shells.values():
            shell.done.clear()
        ask(transport, "the next call opens a new connection")


def test_nobody_listening_is_said(ntlm_users: None) -> None:
    with WsmanEndpoint(echo) as endpoint:
        port = endpoint.port
    transport = WinrmTransport(Endpoint("127.0.0.1", port, False, "ntlm"), Credentials("u", "p"))
    with pytest.raises(TransportError, match=f"the connection to http://127.0.0.1:{port}/wsman failed"):
        transport.run("", {}, timeout=5)


@pytest.mark.parametrize(
    ("text", "url", "user"),
    [
        ("hyperv://host1", "https://host1:5986/wsman", None),
        ("host1", "https://host1:5986/wsman", None),
        ("hyperv://host1:5985", "http://host1:5985/wsman", None),
        ("hyperv://host1:443", "https://host1:443/wsman", None),
        ("hyperv+http://host1:8080", "http://host1:8080/wsman", None),
        ("hyperv://me%40realm@host1", "https://host1:5986/wsman", "me@realm"),
        ("hyperv://[fe80::1]", "https://[fe80::1]:5986/wsman", None),
    ],
)
def test_a_host_is_named_by_a_url(text: str, url: str, user: str | None) -> None:
    endpoint = parse_endpoint(text)
    assert (endpoint.url, endpoint.user) == (url, user)


@pytest.mark.parametrize(
    "text", ["hyperv://", "hyperv://u:secret@host", "hyperv://host/path", "ftp://host", "hyperv://h:x"]
)
def test_a_url_that_names_no_host_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("auth", ["basic", "certificate"])
def test_what_cannot_seal_messages_does_not_go_over_http(auth: str) -> None:
    with pytest.raises(UsageError, match="in the clear"):
        parse_endpoint("hyperv://host:5985", auth=auth)
