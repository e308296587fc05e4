"""The kit for tests: dialogues are read as documented, and a server that does otherwise than they say is found out."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmta import Address, Envelope, PluginConfig, RecipientState, hookimpl, reject
from gmta.config import ConfigError
from gmta.mail.envelope import DELIVERED
from gmta.queue.store import Settlement, StoreError, StoreFull
from gmta.testing import (
    CHUNKINGS,
    Dialogue,
    DialogueError,
    DialogueFailed,
    FakeClock,
    MemoryServer,
    MemoryStore,
    keywords_at,
    load_plugin,
    make_envelope,
    make_message,
    make_services,
    make_session,
    make_transaction,
    play_at,
    run,
)
from gmta.testing.dialogue import octets


class Plugin:
    """Refuses senders with a word in them."""

    class Config(PluginConfig):
        word: str = "spam"

    def __init__(self, config: Config, services: Any) -> None:
        self.word = config.word

    @hookimpl
    def check_mail(self, transaction: Any) -> Any:
        return reject("No such mail here") if self.word in transaction.sender.mailbox else None


GOOD = """
# a comment
requires: SIZE
S: 220 mx.example.test *
C: EHLO client.example.com
S: 250 mx.example.test greets client.example.com
HAS: SIZE *
LACKS: AUTH*
C: MAIL FROM:<eggs@example.com>
S: 550 5.7.1 No such mail here
C: MAIL FROM:<sender@example.com>
C: RCPT TO:<user@example.test>
C: RCPT TO:<nobody@example.test>
C: DATA
S*2: 250
S: 5xx
S: 354
C: Subject: one
SEND-RAW: \\tand two\\r\\n
C:
C: ..
C: \\{ab*3}
C: .
C: QUIT
S: 250 2.0.0 queued as *
S: 221
EOF
QUEUED: <sender@example.com> <user@example.test>
HAS: Subject: one and two
LACKS: X-*
BODY: .
BODY-RAW: ababab\\r\\n
"""


def test_a_plugin_is_tested_in_one_call() -> None:
    played = run(Plugin, GOOD, word="eggs")
    assert played.reason == "quit"
    assert played.log.of("refused")[0]["stage"] == "mail"
    assert len(played.queued) == 1


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("S: 550 5.7.1", "S: 550 5.7.2", ":10: expected 550 5.7.2"),
    ("HAS: SIZE *", "HAS: SIZE", ":6: the reply has no line 'SIZE'"),
    ("LACKS: AUTH*", "LACKS: PIPE*", ":6: the reply has a line 'PIPELINING'"),
    ("S: 354\n", "", "expected"),
    ("S: 5xx\n", "S: 5xx\nS: 250\n", "expected 250"),
    ("C: QUIT\n", "", "expected 221, got nothing"),
    ("C: QUIT\nS: 250 2.0.0 queued as *\nS: 221", "S: 250", "waits for more"),
    ("BODY: .", "BODY: ..", "the message has body b'.\\r\\nababab\\r\\n'"),
    ("LACKS: X-*", "LACKS: Subject:*", "the message has a line 'Subject: one and two'"),
    ("<user@example.test>\nHAS", "<other@example.test>\nHAS", "the message has from <sender@example.com> to <user@example.test>"),
])
def test_a_server_that_does_otherwise_is_found_out(old: str, new: str, complaint: str) -> None:
    assert old in GOOD
    for chunking in CHUNKINGS:
        with pytest.raises(DialogueFailed) as caught:
            run(Plugin, GOOD.replace(old, new), word="eggs", chunkings=[chunking])
        assert complaint in str(caught.value), chunking


def test_a_server_that_ends_too_soon_is_found_out() -> None:
    for chunking in CHUNKINGS:
        with pytest.raises(DialogueFailed, match="got nothing" if chunking == "whole" else "the server has ended the connection"):
            run((), "S: 220\nC: QUIT\nS: 221\nC: NOOP\nS: 250\n", chunkings=[chunking])


def test_a_queue_that_must_be_empty() -> None:
    with pytest.raises(DialogueFailed, match="expected 0 messages in the queue, there are 1"):
        run(Plugin, GOOD[:GOOD.index("QUEUED")] + "QUEUED: none\n", word="eggs")


def test_answers_that_depend_on_chunking_are_found_out() -> None:
    class Counting:
        def __init__(self) -> None:
            self.asked = 0

        @hookimpl
        def check_helo(self) -> Any:
            self.asked += 1
            return reject(f"{self.asked}")

    with pytest.raises(DialogueFailed, match="other replies when sent by line"):
        run(Counting(), "S: 220\nC: EHLO a\nS: 550\n")


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "d: has no steps"),
    ("C: EHLO\nS: ok", "d:2: expected a reply such as"),
    ("requires: X\nrequired: Y", "d:2: there is no setting required"),
    ("C: x\nrequires: Y", "d:2: settings stand before the first step"),
    ("C: \\q", "d:1: there is no escape \\q"),
    ("C: \\", "d:1: there is no escape \\"),
    ("C x", "d:1: expected a step or a setting, not 'C x'"),
    ("HAS: x", "d:1: HAS needs an S or QUEUED before it"),
    ("S: 250\nBODY: x", "d:2: BODY needs a QUEUED before it"),
    ("C: x\nQUEUED: <a@b>", "d:2: expected none, or <sender> <recipient>"),
    ("C: x\nQUEUED: none\nC: y", "d:3: QUEUED stands at the end"),
    ("EOF: x", "d:1: EOF takes nothing"),
    ("CLOSE\nC: x", "d:2: nothing comes after the end of the connection"),
    ("WAIT: soon", "d:1: expected a time such as"),
])
def test_a_text_that_is_no_dialogue(text: str, complaint: str) -> None:
    with pytest.raises(DialogueError) as caught:
        Dialogue.parse(text, "d")
    assert complaint in str(caught.value)


@given(st.text(max_size=40))
def test_a_line_is_a_step_or_an_error(text: str) -> None:
    try:
        Dialogue.parse(text)
    except DialogueError:
        pass


def test_escapes() -> None:
    assert octets("a\\r\\n\\t\\0\\\\\\x80é") == b"a\r\n\t\0\\\x80\xc3\xa9"
    assert octets("<\\{a\\n*3}\\{base64 \\0u\\0s}>") == b"<a\na\na\nAHUAcw==>"


def test_what_a_dialogue_requires() -> None:
    dialogue = Dialogue.parse("requires: SIZE, AUTH PLAIN\nunless: XCLIENT\nC: x")
    assert dialogue.missing(["SIZE 10", "auth login plain"]) == ""
    assert dialogue.missing(["SIZE", "AUTH LOGIN"]) == "AUTH PLAIN is not offered"
    assert dialogue.missing(["SIZE", "AUTH PLAIN", "XCLIENT NAME"]) == "XCLIENT is offered"
    assert "STARTTLS" in MemoryServer().keywords


def serve(script: list[bytes | int]) -> tuple[tuple[str, int], threading.Thread]:
    """A scripted server for one connection: octets are sent, a number is how many lines to wait for."""
    listening = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        with listening, listening.accept()[0] as link, link.makefile("rb") as lines:
            for step in script:
                if isinstance(step, bytes):
                    link.sendall(step)
                else:
                    for _ in range(step):
                        lines.readline()

    thread = threading.Thread(target=talk)
    thread.start()
    return listening.getsockname(), thread


@pytest.mark.parametrize(("said", "complaint"), [
    (b"250-a\r\n250 SIZE 1\r\n", ""),
    (b"550 no\r\n", "expected 250, got '550 no'"),
    (b"250-a\r\n", "expected 250, got nothing"),
    (b"250-a\r\n251 b\r\n", "a reply whose code changes"),
    (b"250 a\n", "a malformed reply line"),
    (b"250 " + b"a" * 600 + b"\r\n", "a reply line of 606 octets"),
])
def test_over_a_socket(said: bytes, complaint: str) -> None:
    address, thread = serve([b"220 mx\r\n", 1, said, *([] if complaint else [1, b"221 bye\r\n"])])
    try:
        if complaint:
            with pytest.raises(DialogueFailed) as caught:
                keywords_at(address)
            assert complaint in str(caught.value)
        else:
            assert keywords_at(address) == ["SIZE 1"]
    finally:
        thread.join()


def test_what_was_not_expected_at_the_end_is_found_out_over_a_socket() -> None:
    address, thread = serve([b"220 mx\r\n", 1, b"250 one\r\n250 two\r\n"])
    with pytest.raises(DialogueFailed, match="a reply that was not expected: '250 two'"):
        play_at(Dialogue.parse("S: 220\nC: NOOP\nS: 250\n"), address)
    thread.join()


def test_a_plugin_by_name_by_path_and_with_wrong_keys(tmp_path: Path) -> None:
    session = make_session(role="submission", user="alice@example.test")
    assert load_plugin("size_limit", mx="10MB", authenticated=5000).get_size_limit(session) == 5000
    with pytest.raises(ConfigError, match="mxx: unknown key"):
        load_plugin("size_limit", mxx="10MB")
    with pytest.raises(ConfigError, match="no plugin is named size_limits"):
        load_plugin("size_limits")
    own = tmp_path / "own.py"
    own.write_text("from gmta import hookimpl, disconnect\nclass Plugin:\n    def __init__(self, config, services): self.services = services\n"
                   "    @hookimpl\n    def check_connect(self, session): return disconnect(f'Not at {self.services.clock():.0f}')\n")
    assert load_plugin(own, make_services(clock=FakeClock(5))).check_connect(session).reply.text == "Not at 5"
    run(own, "S: 421 4.7.0 Not at *\nEOF\n")


def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/testing.md").read_text()
    plugin, *tests = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/nospam.py").write_text(plugin)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in tests:
        exec(compile(code, "docs/testing.md", "exec"), names)
    called = [names[name]() for name in names if name.startswith("test_")]
    assert len(called) == 4


def test_values() -> None:
    services = make_services({"limits": {"recipients": 100}, "domains": {"local": ["a.test", "b.test"]}})
    assert services.config.limits.recipients == 100 and services.config.domains.local == {"a.test", "b.test"}
    services.log.info("queued", id="x")
    assert services.log.of("queued") == [{"id": "x"}]
    assert make_session(trusted=True).trusted and make_session(tls=True).protocol == "ESMTPS"
    transaction = make_transaction("", ["a@b.test", "c@d.test"], smtputf8=True)
    assert not transaction.sender and [str(recipient.address) for recipient in transaction.recipients] == ["a@b.test", "c@d.test"]
    assert make_message("A: b\n\nc\n").header == b"A: b\r\n"


def test_the_store_in_memory_claims_and_settles() -> None:
    store = MemoryStore()
    envelope = make_envelope(recipients=["a@b.test", "c@d.test"])
    store.put(envelope, make_message())
    assert store.due(2e9, 10) == [] and store.next_due_at() is None
    store.release(envelope)
    assert store.next_due_at() == envelope.recipients[0].next_attempt_at
    assert [[state.number for state in one.recipients] for one in store.due(2e9, 1)] == [[0]]
    (rest,) = store.due(2e9, 10)
    assert [state.number for state in rest.recipients] == [1]
    first = RecipientState(0, Address.parse("a@b.test"), status=DELIVERED)
    store.record(Settlement(envelope, [first]))
    assert store.all_recipients("Q1")[0].status == DELIVERED and store.message("Q1") is not None
    second = RecipientState(1, Address.parse("c@d.test"), status=DELIVERED)
    birth = Envelope("Q2", Address("", ""), [RecipientState(0, Address.parse("sender@example.com"))])
    store.record(Settlement(envelope, [second], births=[(birth, make_message())]))
    assert list(store.messages) == ["Q2"] and store.message("Q1") is None
    store.full = True
    with pytest.raises(StoreFull):
        store.put(envelope, make_message())
    assert not store.has_room(1)
    store.full, store.failing = False, True
    with pytest.raises(StoreError):
        store.put(envelope, make_message())
