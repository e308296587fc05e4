"""gmta/mail/trace.py: Authentication-Results as RFC 8601 has it, and which fields from outside are dropped."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.message import Message
from gmta.mail.session import AuthResult
from gmta.mail.trace import authentication_results, delivered_to, drop_forged

TOKEN = r"[!#$%&'*+\-.0-9A-Z^_`a-z{|}~]+"  # RFC 2045 section 5.1
VALUE = rf'(?:{TOKEN}|"(?:[ !#-\[\]-~]|\\[ -~])*")'
PVALUE = rf"(?:{VALUE}|[A-Za-z0-9!#$%&'*+\-./=?^_`{{|}}~]*@[A-Za-z0-9_.\-]+)"
FIELD = re.compile(rf"{VALUE}(?:; none|(?:;\s+{TOKEN}={TOKEN}(?:\s+reason={VALUE})?(?:\s+[a-z]+\.[a-z\-]+={PVALUE})*)+)\Z")


def test_results() -> None:
    value = authentication_results("mx.example.test", [
        AuthResult("spf", "pass", (("smtp.mailfrom", "example.org"),)),
        AuthResult("dkim", "fail", (("header.d", "example.org"), ("header.b", "aB/+cd==")), 'it "broke" \\ there'),
        AuthResult("iprev", "pass", (("policy.iprev", "2001:db8::1"),)),
        AuthResult("auth", "pass", (("smtp.auth", "user@example.test"),)),
    ])
    assert re.sub(r"\s+", " ", value) == (
        'mx.example.test; spf=pass smtp.mailfrom=example.org; '
        'dkim=fail reason="it \\"broke\\" \\\\ there" header.d=example.org header.b="aB/+cd=="; '
        'iprev=pass policy.iprev="2001:db8::1"; auth=pass smtp.auth=user@example.test')
    assert FIELD.match(value)
    assert authentication_results("mx.example.test", []) == "mx.example.test; none"


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["spf", "dkim"]), st.text(max_size=300), st.lists(st.text(max_size=300), max_size=3)), max_size=4))
def test_whatever_a_sender_wrote_stays_a_value(found: list[tuple[str, str, list[str]]]) -> None:
    """Text of a sender in reasons and properties can neither end the value nor begin another result."""
    results = [AuthResult(method, "fail", tuple(("smtp.mailfrom", text) for text in texts), reason) for method, reason, texts in found]
    value = authentication_results("mx.example.test", results)
    assert FIELD.match(value)
    assert all(len(line) < 998 for line in value.split("\r\n"))
    message = Message.from_bytes(b"Subject: x\r\n\r\n")
    message.prepend("Authentication-Results", value)
    assert message.count("Authentication-Results") == 1
    drop_forged(message, "mx.example.test")
    assert message.count("Authentication-Results") == 0


@pytest.mark.parametrize("field", [
    "Authentication-Results: mx.example.test; spf=pass",
    "authentication-results : MX.Example.TEST; spf=pass",
    "Authentication-Results: mx.example.test 1; spf=pass",
    "Authentication-Results: mx.example.test. ; spf=pass",
    "Authentication-Results:\r\n\tmx.example.test; spf=pass",
    "Authentication-Results: (a comment) mx.example.test; spf=pass",
    "Authentication-Results: (nested (com\\)ment)) (twice) mx.example.test (and behind); spf=pass",
    'Authentication-Results: "mx.example.test"; spf=pass',
    'Authentication-Results: "mx.\\example.test"; spf=pass',
    "Authentication-Results: (without end mx.example.test; spf=pass",
    "Authentication-Results: ; spf=pass",
    "Authentication-Results: " + "(" * 5000 + ")" * 5000 + " mx.example.test; spf=pass",
    "Return-Path: <a@example.org>",
])
def test_forged_is_dropped(field: str) -> None:
    message = Message.from_bytes(f"Received: x\r\n{field}\r\nSubject: x\r\n\r\nbody\r\n".encode())
    drop_forged(message, "mx.example.test")
    assert b"".join(message.chunks()) == b"Received: x\r\nSubject: x\r\n\r\nbody\r\n"


@pytest.mark.parametrize("field", [
    "Authentication-Results: mx.other.example; dkim=pass header.d=mx.example.test",
    "Authentication-Results: (mx.example.test) mx.other.example; none",
    "Authentication-Results: sub.mx.example.test; none",
    "X-Authentication-Results: mx.example.test; none",
    "ARC-Authentication-Results: i=1; mx.example.test; none",
])
def test_foreign_stays(field: str) -> None:
    raw = f"Received: x\r\n{field}\r\nSubject: x\r\n\r\nbody\r\n".encode()
    message = Message.from_bytes(raw)
    drop_forged(message, "mx.example.test")
    assert b"".join(message.chunks()) == raw


def test_where_a_message_says_it_was_delivered() -> None:
    header = (b'Delivered-To: Joe@EXAMPLE.test\r\ndelivered-to:\r\n <"j o e"@b\xc3\xbccher.example>\r\nDelivered-To: no address\r\n'
              b"Delivered-To: \xff\r\nX-Delivered-To: ann@example.test\r\n")
    assert delivered_to(Message.from_bytes(header + b"\r\nDelivered-To: ben@example.test\r\n")) == {"joe@example.test", "j o e@xn--bcher-kva.example"}
