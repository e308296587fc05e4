"""plugins/submission.py: what is added, taken out and refused, and that nothing else changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.message import Message
from gmta.testing import MemoryServer, MemoryStore, load_plugin, make_message, make_session, make_transaction, run

WHOLE = "From: alice@example.test\nDate: Mon, 05 Jan 2026 10:00:00 +0000\nMessage-ID: <1@example.test>\nSubject: x\n"


def edited(text: str | bytes, sender: str = "alice@example.test", user: str | None = "alice@example.test", role: str = "submission",
           **keys: Any) -> tuple[bytes, list[str]]:
    message, transaction = make_message(text), make_transaction(sender)
    made = load_plugin("submission", **keys).edit_message(make_session(role=role, user=user), transaction, message)
    return b"".join((made or message).chunks()), transaction.changes


def refusal(text: str | bytes, sender: str = "alice@example.test", role: str = "submission", smtputf8: bool = False, **keys: Any) -> str:
    transaction = make_transaction(sender, smtputf8=smtputf8)
    verdict = load_plugin("submission", **keys).check_message(make_session(role=role), transaction, make_message(text))
    return "" if verdict is None else str(verdict.reply)


def test_a_whole_message_stays_as_it_is() -> None:
    assert edited(f"{WHOLE}\nHello\n") == (make_octets(f"{WHOLE}\nHello\n"), [])


def make_octets(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


def test_date_and_message_id_are_added_on_top() -> None:
    raw, changes = edited("subject:  odd   spacing \nFROM :alice@example.test\nX: a\n\t b\n\nHello\n")
    top, rest = raw.split(b"subject:", 1)
    assert re.fullmatch(rb"Date: Mon, 05 Jan 2026 10:00:00 \+0000\r\nMessage-ID: <q1\.[0-9a-f]{16}@mx\.example\.test>\r\n", top)
    assert rest == b"  odd   spacing \r\nFROM :alice@example.test\r\nX: a\r\n\t b\r\n\r\nHello\r\n"
    assert changes == ["Date added", "Message-ID added"]


def test_bcc_is_removed_whole() -> None:
    raw, changes = edited(f"{WHOLE}bcc: secret@example.test,\n\tsecret2@example.test\nTo: b@c.test\nResent-Bcc: s3\n\nBcc: this is text\n")
    assert raw == make_octets(f"{WHOLE}To: b@c.test\n\nBcc: this is text\n")
    assert changes == ["Resent-Bcc and bcc removed"]
    assert b"secret" in edited(f"{WHOLE}Bcc: secret@example.test\n\n", remove_bcc=False)[0]


def test_from_is_refused_or_added() -> None:
    assert refusal("Subject: x\n\nHello\n") == "550 5.6.0 The message has no From field"
    assert refusal("Just a text\n") == "550 5.6.0 The message has no From field"
    assert refusal("Subject: x\n\nHello\n", missing_from="add") == ""
    assert refusal("Subject: x\n\nHello\n", sender="", missing_from="add").startswith("550 5.6.0")
    raw, changes = edited("Subject: x\n\nHello\n", missing_from="add")
    assert raw.startswith(b"From: <alice@example.test>\r\nDate: ") and changes[0] == "From added"
    raw, _ = edited("Just a text\n", missing_from="add")
    assert raw.endswith(b"@mx.example.test>\r\n\r\nJust a text\r\n")


@pytest.mark.parametrize("from_,user,added", [
    ("bob@example.test", "alice@example.test", True), ("Alice@Example.Test", "alice@example.test", False), ("bob@example.test", "alice", False),
    ("bob@example.test", None, False), ("alice@example.test, bob@example.test", "alice@example.test", True), ("<<", "alice@example.test", False),
])
def test_sender_where_from_differs(from_: str, user: str | None, added: bool) -> None:
    text = WHOLE.replace("alice@", "nobody@").replace("nobody@example.test", from_, 1) + "\n"
    message, transaction = make_message(text), make_transaction()
    made = load_plugin("submission", sender="add").edit_message(make_session(role="submission", user=user), transaction, message)
    assert (made is not None and made.header.startswith(b"Sender: <alice@example.test>\r\n")) is added
    assert transaction.changes == (["Sender added"] if added else [])


def test_sender_that_is_there_stays() -> None:
    message = make_message(f"{WHOLE}Sender: carol@example.test\n\n")
    session = make_session(role="submission", user="dave@example.test")
    assert load_plugin("submission", sender="add").edit_message(session, make_transaction(), message) is None


def test_fields_that_stand_twice() -> None:
    assert refusal(f"{WHOLE}From: b@c.test\n\n") == "550 5.6.0 The message has more than one From field"
    assert refusal(f"{WHOLE}message-id : <2@c.test>\n\n").startswith("550 5.6.0")
    assert refusal(f"{WHOLE}\nFrom: b@c.test\n") == ""


def test_eight_bit_headers() -> None:
    text = WHOLE.replace("Subject: x", "Subject: \u00fc").replace("\n", "\r\n").encode() + b"\r\n"
    assert refusal(text) == "550 5.6.7 Header fields beyond ASCII need SMTPUTF8"
    assert refusal(text, smtputf8=True) == refusal(text, eight_bit_headers="allow") == refusal(text, role="local") == ""
    assert refusal(f"{WHOLE}\n\u00fc\n") == ""


def test_programs_of_this_machine_may_leave_from_out() -> None:
    assert refusal("Subject: x\n\n", role="local") == ""
    assert edited("Subject: x\n\n", role="local", user=None)[1] == ["From added", "Date added", "Message-ID added"]
    assert edited("Subject: x\n\n", role="local", user=None, sender="")[1] == ["Date added", "Message-ID added"]


def test_nothing_of_it_on_port_25() -> None:
    assert refusal("Subject: \u00fc\n\n", role="mx") == ""
    assert edited("Bcc: x@y.test\n\nHello\n", role="mx") == (b"Bcc: x@y.test\r\n\r\nHello\r\n", [])


NAMES = st.sampled_from(["Subject", "X-A", "received", "Bcc", "To", "DKIM-Signature", "resent-bcc", "Bcc-X"])
VALUES = st.text(st.sampled_from("ab :;<>@\t"), max_size=20)
FIELDS = st.lists(st.tuples(NAMES, VALUES, VALUES), max_size=8)


@settings(max_examples=60, deadline=None)
@given(FIELDS, st.binary(max_size=30))
def test_the_rest_stays_octet_for_octet(fields: list[tuple[str, str, str]], body: bytes) -> None:
    def octets(kept: list[tuple[str, str, str]]) -> bytes:
        return b"".join(f"{name}: {value}\r\n {more}\r\n".encode() for name, value, more in kept)

    start = make_octets(WHOLE)
    message = Message.from_bytes(start + octets(fields) + b"\r\n" + body)
    made = load_plugin("submission").edit_message(make_session(role="submission"), make_transaction(), message) or message
    assert b"".join(made.chunks()) == start + octets([one for one in fields if one[0].lower() not in ("bcc", "resent-bcc")]) + b"\r\n" + body


def test_what_was_done_is_in_the_history() -> None:
    store = MemoryStore()
    server = MemoryServer("submission", {"listener:submission": {"auth_required": "no"}, "domains": {"relay_from": "192.0.2.0/24"}})
    server.play(DIALOGUE, store=store)
    server.close()
    assert [(event.kind, event.data.get("changes")) for event in store.history] == [
        ("received", None), ("edited", ["Bcc removed", "Date added", "Message-ID added"])]


DIALOGUE = r"""
listener: submission
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<user@example.test>
S: 250
C: RCPT TO:<somebody@foreign.test>
S: 250
C: DATA
S: 354
C: From: user@example.test
C: Bcc: somebody@foreign.test
C: Subject: hello
C:
C: Hello
C: .
S: 250 2.0.0 queued as *
C: QUIT
S: 221
EOF
QUEUED: <user@example.test> <somebody@foreign.test>
HAS: Date: Mon, 05 Jan 2026 10:00:00 +0000
HAS: Message-ID: <*@mx.example.test>
HAS: Subject: hello
LACKS: Bcc:*
BODY: Hello
"""


def test_dialogue() -> None:
    """Message-IDs are not the same twice, so one chunking a play."""
    for chunking in ("whole", "byte"):
        run("submission", DIALOGUE, given={"listener:submission": {"auth_required": "no"}, "domains": {"relay_from": "192.0.2.0/24"}}, chunkings=[chunking])
