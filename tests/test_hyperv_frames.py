"""A result comes back whole, between marks with its nonce, or not at all."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagekit.hyperv.frames import frame, make_nonce, marks, unframe
from imagekit.hyperv.transport import TransportError

NONCE = "0123456789abcdef0123456789abcdef"
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), PLAIN, max_size=4), st.text(), st.text())
def test_what_is_framed_comes_back_whatever_is_printed_around_it(
    value: dict[str, Any], before: str, after: str
) -> None:
    assert unframe(before + frame(value, NONCE) + after, NONCE) == value


def test_every_cut_of_an_answer_is_a_failure() -> None:
    text = frame({"state": "Running", "name": "ü"}, NONCE)
    whole = text.index(marks(NONCE)[1]) + len(marks(NONCE)[1])
    for end in range(whole):
        with pytest.raises(TransportError):
            unframe(text[:end], NONCE)


def test_a_console_may_break_lines_anywhere_in_the_text() -> None:
    begin, packed, end = frame({"text": "x" * 500}, NONCE).split("\n")[:3]
    wrapped = "\r\n".join(packed[at : at + 79] for at in range(0, len(packed), 79))
    assert unframe(f"{begin}\r\n{wrapped}\r\n{end}", NONCE) == {"text": "x" * 500}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("!!!", "cannot be read"),
        (base64.b64encode(b"{").decode(), "cannot be read"),
        (base64.b64encode(b"\xff").decode(), "cannot be read"),
        (base64.b64encode(b"[1]").decode(), "not an object"),
        (base64.b64encode(b'{"a":' + b"[" * 60 + b"]" * 60 + b"}").decode(), "not an object"),
        (base64.b64encode(b"[" * 100_000).decode(), "cannot be read"),
        ("A" * (12 << 20), "larger"),
    ],
)
def test_what_is_no_result_is_a_failure(body: str, what: str) -> None:
    begin, end = marks(NONCE)
    with pytest.raises(TransportError, match=what):
        unframe(f"{begin}\n{body}\n{end}", NONCE)


def test_the_frame_of_another_call_does_not_count() -> None:
    with pytest.raises(TransportError, match="without a result"):
        unframe(frame({}, make_nonce()), NONCE)


def test_two_results_are_none() -> None:
    with pytest.raises(TransportError, match="two results"):
        unframe(frame({}, NONCE) + frame({}, NONCE), NONCE)


def test_what_the_host_said_instead_is_shown_escaped_and_short() -> None:
    with pytest.raises(TransportError) as caught:
        unframe("Access\x1b[31m denied " + "x" * 1000, NONCE)
    assert "Access?[31m denied" in str(caught.value) and len(str(caught.value)) < 500
