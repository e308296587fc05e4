"""What a client may ask besides sending mail: VRFY, EXPN and ETRN; and what is known of where it comes from."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from gmta import hookimpl
from gmta.mail.message import Message
from gmta.queue.admin import QueueAdmin
from gmta.queue.sqlite import SqliteStore
from gmta.services.log import NullLog
from gmta.testing import MemoryServer, MemoryStore, make_envelope, run
from gmta.testing.zone import Zone

TRUSTED = {"domains": {"local": "example.test", "relay_from": "192.0.2.0/24"}}


def asked(policy: str, command: str, replies: str, *, given: dict[str, Any] | None = None, plugins: Any = "mailboxes", aliases: Path | None = None) -> None:
    keys: dict[str, Any] = {"accept": "listed", "mailboxes": "user two"}
    if aliases is not None:
        keys["aliases_file"] = aliases
    run(plugins, f"S: 220\nC: EHLO client.example.com\nS: 250\nC: {command}\n{replies}\nC: QUIT\nS: 221\nEOF\n",
        given={"listener:mx": {"vrfy": policy, "expn": policy}, **(given or {})}, **keys)


@pytest.mark.parametrize("policy,given,tells", [("no", {}, False), ("no", TRUSTED, False), ("trusted", {}, False), ("trusted", TRUSTED, True), ("yes", {}, True)])
def test_who_is_told(policy: str, given: dict[str, Any], tells: bool) -> None:
    asked(policy, "VRFY user@example.test", "S: 250 2.1.5 <user@example.test>" if tells else "S: 252 2.5.2", given=given)
    asked(policy, "VRFY none@example.test", "S: 550 5.1.1" if tells else "S: 252 2.5.2", given=given)
    asked(policy, "EXPN user@example.test", "S: 250 2.1.5 <user@example.test>" if tells else "S: 502 5.5.1", given=given)


@pytest.mark.parametrize("argument,reply", [
    ("<user@example.test>", "S: 250 2.1.5 <user@example.test>"), ("user", "S: 250 2.1.5 <user@example.test>"), ("User+x", "S: 250"),
    ("none", "S: 550 5.1.1"), ("<Postmaster>", "S: 250"), ("two words", "S: 550"), ("@", "S: 252"), ("<>", "S: 252"), ("x@foreign.test", "S: 550 5.7.1"),
])
def test_ways_to_ask(argument: str, reply: str) -> None:
    asked("yes", f"VRFY {argument}", reply)


def test_expn_names_all(tmp_path: Path) -> None:
    (tmp_path / "aliases").write_text("team: user, two, guest@foreign.test\nbad: nobody-here\n")
    asked("yes", "EXPN team", "S: 250 2.1.5 <*>", aliases=tmp_path / "aliases")
    asked("yes", "EXPN bad", "S: 550 5.1.1", aliases=tmp_path / "aliases")
    asked("yes", "EXPN x@foreign.test", "S: 550 5.1.1", aliases=tmp_path / "aliases")
    played = run("mailboxes", "S: 220\nC: EHLO a.b\nS: 250\nC: EXPN team\nS: 250\nC: QUIT\nS: 221\n", given={"listener:mx": {"expn": "yes"}},
                 mailboxes="user two", aliases_file=tmp_path / "aliases")
    assert played.replies[2] == ["250 2.1.5 <user@example.test>", "250 2.1.5 <two@example.test>", "250 2.1.5 <guest@foreign.test>"]


def test_unknown_domains_are_counted_as_a_stranger_s_errors() -> None:
    played = run("mailboxes", "S: 220\nC: EHLO a.b\nS: 250\n" + "C: VRFY none\nS: 550\n" * 19 + "C: VRFY none\nS: 550\nS: 421\nEOF\n",
                 given={"listener:mx": {"vrfy": "yes"}}, accept="listed")
    assert played.reason == "closed after 550"


# --- ETRN ---------------------------------------------------------------------------------------------------------


def etrn(tmp_path: Path, commands: str, networks: str = "192.0.2.0/24", hello: str = "EHLO client.example.com") -> list[list[str]]:
    given = {"gmta": {"data_dir": tmp_path}, "domains": {"relay_to": "backup.test, sub.backup.test, other.test", "etrn_from": networks}}
    return run("access", f"S: 220\nC: {hello}\nS: 250\n{commands}", given=given, chunkings=["whole"]).replies


def waiting(tmp_path: Path, recipients: list[str]) -> None:
    """Messages whose next attempt is an hour away."""
    store = SqliteStore(str(tmp_path / "queue"), instance_tag="TESTS", log=NullLog(), history_s=60, message_limit=1000000)
    for number, recipient in enumerate(recipients):
        envelope = make_envelope("a@example.com", [recipient])
        envelope.id = f"0000000000000000{number}"[-16:]
        envelope.recipients[0].next_attempt_at = time.time() + 3600
        store.put(envelope, Message.from_bytes(b"Subject: x\r\n\r\nx\r\n"))
        store.release(envelope)
    store.close()


def due(tmp_path: Path) -> list[str]:
    queue = QueueAdmin(str(tmp_path / "queue"))
    try:
        return sorted(recipient["address"] for message in queue.list() for recipient in message["recipients"]
                      if recipient["next_attempt_at"] <= time.time())
    finally:
        queue.close()


def test_etrn_makes_what_waits_due(tmp_path: Path) -> None:
    waiting(tmp_path, ["a@backup.test", "b@backup.test", "c@sub.backup.test", "d@other.test", "e@foreign.test"])
    replies = etrn(tmp_path, "HAS: ETRN\nC: ETRN backup.test\nS: 253 2.0.0 2 messages\nC: QUIT\nS: 221\n")
    assert replies[2] == ["253 2.0.0 2 messages for backup.test are due now"]
    assert due(tmp_path) == ["a@backup.test", "b@backup.test"]
    etrn(tmp_path, "C: ETRN @BACKUP.test\nS: 253 2.0.0 3 messages\n")
    assert due(tmp_path) == ["a@backup.test", "b@backup.test", "c@sub.backup.test"]


@pytest.mark.parametrize("argument,reply", [
    ("backup.test", "251 2.0.0"), ("foreign.test", "459 4.7.1"), ("#queue", "501"), ("@", "501"), ("", "501"), ("a b", "501"), ("@foreign.test", "459"),
    ("backup.test'; --", "501"), ("backup.test%", "459"),
])
def test_what_else_etrn_is_answered(tmp_path: Path, argument: str, reply: str) -> None:
    etrn(tmp_path, f"C: ETRN {argument}\nS: {reply}\n")


def test_etrn_is_for_named_networks(tmp_path: Path) -> None:
    for networks in ("", "198.51.100.0/24"):
        etrn(tmp_path, "LACKS: ETRN\nC: ETRN backup.test\nS: 502\n", networks)


def test_etrn_needs_a_greeting(tmp_path: Path) -> None:
    given = {"gmta": {"data_dir": tmp_path}, "domains": {"relay_to": "backup.test", "etrn_from": "192.0.2.1"}}
    run("access", "S: 220\nC: ETRN backup.test\nS: 503\n", given=given)


def test_etrn_where_the_queue_can_t_be_read(tmp_path: Path) -> None:
    waiting(tmp_path, ["a@backup.test"])
    for file in (tmp_path / "queue").glob("*.db"):
        file.write_bytes(b"no database " * 1000)
    etrn(tmp_path, "C: ETRN backup.test\nS: 458 4.3.0\nC: NOOP\nS: 250\n")


# --- iprev --------------------------------------------------------------------------------------------------------

PTR = "1.2.0.192.in-addr.arpa"


@pytest.mark.parametrize("table,result,name", [
    ({PTR: {"PTR": "host.example.com"}, "host.example.com": {"A": "192.0.2.1"}}, "pass", "host.example.com"),
    ({PTR: {"PTR": "host.example.com"}, "host.example.com": {"A": "192.0.2.2"}}, "fail", ""),
    ({PTR: {"PTR": "host.example.com"}}, "fail", ""),
    ({PTR: {"PTR": "host.example.com"}, "host.example.com": {"rcode": "SERVFAIL"}}, "temperror", ""),
    ({}, "permerror", ""),
    ({PTR: {"rcode": "SERVFAIL"}}, "temperror", ""),
])
def test_iprev(table: dict[str, Any], result: str, name: str) -> None:
    """RFC 8601 section 2.7.3."""
    assert Zone(table).iprev("192.0.2.1") == (result, name)
    played = run([], MAIL, given={"listener:mx": {"reverse_lookup": "yes"}}, resolver=Zone(table))
    field = re.search(rb"Authentication-Results: mx.example.test;\r\n\tiprev=(\w+) policy.iprev=192.0.2.1\r\n", played.queued[0][1])
    assert field is not None and field[1].decode() == result


def test_iprev_only_where_it_was_asked_and_of_strangers() -> None:
    zone = Zone({})
    assert b"iprev" not in run([], MAIL, resolver=zone).queued[0][1]
    assert zone.asked == []
    assert b"iprev" not in run([], MAIL, given={**TRUSTED, "listener:mx": {"reverse_lookup": "yes"}}, resolver=zone).queued[0][1]


MAIL = """
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<user@example.test>
S: 250
C: DATA
S: 354
C: Subject: x
C:
C: .
S: 250
"""


# --- what edit_message did ----------------------------------------------------------------------------------------


def test_an_edit_is_in_the_history() -> None:
    class Quiet:
        @hookimpl
        def edit_message(self, session: Any, transaction: Any, message: Message) -> Message:
            return Message.from_bytes(b"".join(message.chunks()) + b"footer\r\n")

    class Talking(Quiet):
        @hookimpl
        def edit_message(self, session: Any, transaction: Any, message: Message) -> Message:
            transaction.changes.append("footer added")
            return super().edit_message(session, transaction, message)

    for plugin, words in ((Quiet(), "rewritten by plugin"), (Talking(), "footer added")):
        store = MemoryStore()
        MemoryServer(plugin).play(MAIL, store=store)
        assert [event.data["changes"] for event in store.history if event.kind == "edited"] == [[words]]


# --- under pressure -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others,patience", [(0, 300), (8, 300), (9, 30), (20, 30)])
def test_idle_clients_are_cut_sooner_when_slots_run_out(others: int, patience: int) -> None:
    server = MemoryServer([], {"limits": {"connections": 10, "command_timeout": "300s", "command_timeout_pressure": "30s"}})
    server.limits.total = others + 1
    talk = "S: 220\nC: EHLO client.example.com\nS: 250\nWAIT: {wait}s\n"
    server.play(talk.format(wait=patience - 1) + "C: NOOP\nS: 250\nC: QUIT\nS: 221\nEOF\n", "line")
    assert server.play(talk.format(wait=patience + 1) + "S: 421 4.4.2\nEOF\n", "line").reason == "timeout"


def test_a_message_under_way_is_not_hurried() -> None:
    server = MemoryServer([], {"limits": {"connections": 10, "data_rate": "0"}})
    server.limits.total = 11
    head, end = MAIL.split("C: Subject: x\n")
    server.play(f"{head}C: Subject: x\nWAIT: 100s\n{end}", "line")
