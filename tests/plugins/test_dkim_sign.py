"""plugins/dkim_sign.py: whose mail is signed, with which keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gmta.config import ConfigError
from gmta.mail.message import Message
from gmta.mail.session import Session
from gmta.testing import load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify.dkim import DkimResult, verify
from gmta.verify.signing import KeyTrouble, SigningKey
from tests.engine.test_verify_dkim import ED, PLAIN, RSA, pem, write

USER = make_session(role="submission", user="alice@example.com")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with an RSA and an Ed25519 key of example.com."""
    write(tmp_path / "example.com/sel.pem", pem(RSA))
    write(tmp_path / "example.com/ed.pem", pem(ED))
    return tmp_path


def plugin(folder: Path, services: Any = None, **more: Any) -> Any:
    return load_plugin("dkim_sign", services or make_services(), keys=f"{folder}/{{domain}}/{{selector}}.pem", **more)


def fields(made: Any, raw: bytes = PLAIN, session: Session = USER) -> list[tuple[str, str]]:
    return made.get_signatures(session, make_transaction(), make_message(raw)) or []


def judged(made: Any, raw: bytes = PLAIN, session: Session = USER, *others: SigningKey) -> list[DkimResult]:
    """The verdicts on what the plugin signs, with its fields put on top as the pipeline does."""
    message = make_message(raw)
    for name, value in reversed(made.get_signatures(session, make_transaction(), message) or []):
        message.prepend(name, value)
    table = {key.record_name: {"TXT": [[key.record()[:200], key.record()[200:]]]} for key in (RSA, ED, *others)}
    return verify(Message.from_bytes(b"".join(message.chunks())), Zone(table), now=1767607200.0)


@pytest.mark.parametrize("session,signs", [
    (USER, True), (make_session(trusted=True), True), (make_session(role="local"), True), (make_session(), False), (make_session(role="submission"), False),
])
def test_whose_mail(keys: Path, session: Session, signs: bool) -> None:
    assert [result.result for result in judged(plugin(keys), session=session)] == ["pass", "pass"] * signs


def test_rsa_first_then_ed25519(keys: Path) -> None:
    assert [(result.algorithm, result.selector) for result in judged(plugin(keys))] == [("rsa-sha256", "sel"), ("ed25519-sha256", "ed")]


def test_only_the_named_selectors(keys: Path) -> None:
    assert [result.selector for result in judged(plugin(keys, selectors="ed, other"))] == ["ed"]


@pytest.mark.parametrize("field,expected", [
    (b"From: alice@EXAMPLE.com", ("example.com", "@example.com")),
    (b"From: alice@sub.example.com", ("example.com", "@sub.example.com")),
    (b"From: a@a.b.example.com, b@other.example", ("example.com", "@a.b.example.com")),
    (b"From: alice@notexample.com", None),
    (b"From: alice@com", None),
    (b"From: alice@[192.0.2.1]", None),
    (b"From: alice", None),
    (b"From: a@example.com\r\nFrom: b@example.com", None),
    (b"X-From: a@example.com", None),
])
def test_author_domain_and_those_above(keys: Path, field: bytes, expected: tuple[str, str] | None) -> None:
    results = judged(plugin(keys), PLAIN.replace(b"From: Alice <alice@example.com>", field))
    assert [(result.result, result.domain, result.identity) for result in results] == ([("pass", *expected)] * 2 if expected else [])


def test_no_parent_where_told_so(keys: Path) -> None:
    raw = PLAIN.replace(b"alice@example.com", b"alice@sub.example.com")
    assert judged(plugin(keys, parent=False), raw) == []
    assert len(judged(plugin(keys, parent=False))) == 2


def test_senders(keys: Path) -> None:
    bulk = SigningKey("bulk.example", "b1", RSA.private)
    write(keys / "bulk.example/b1.pem", pem(RSA))
    made = plugin(keys, senders="news@example.com:bulk.example, Odd@example.com:example.com/ed, @quiet.example:none, @moved.example:example.com/sel")

    def signers(author: bytes) -> list[tuple[str, str, str]]:
        return [(result.result, result.domain, result.selector)
                for result in judged(made, PLAIN.replace(b"alice@example.com", author), USER, bulk)]

    assert signers(b"NEWS@example.com") == [("pass", "bulk.example", "b1")]
    assert signers(b"odd@example.com") == [("pass", "example.com", "ed")]
    assert signers(b"a@moved.example") == [("pass", "example.com", "sel")]
    assert signers(b"a@quiet.example") == []
    assert len(signers(b"alice@example.com")) == 2


@pytest.mark.parametrize("given", [
    {"senders": "news@example.com"}, {"senders": "example.com:bulk.example"}, {"senders": "@example.com:../x"}, {"senders": "a@example.com:b.example/"},
    {"oversign": "Subject"}, {"expire": "soon"}, {"keys": "x/{domain}.pem"},
])
def test_bad_keys_of_the_section_stop_the_start(keys: Path, given: dict[str, str]) -> None:
    with pytest.raises((ConfigError, ValueError)):
        load_plugin("dkim_sign", make_services(), **{"keys": f"{keys}/{{domain}}/{{selector}}.pem", **given})


def test_bad_key_file_stops_the_start(keys: Path) -> None:
    (keys / "example.com/sel.pem").chmod(0o644)
    with pytest.raises(KeyTrouble, match="lets others use the key"):
        plugin(keys)


def test_no_keys_is_said_at_the_start(tmp_path: Path) -> None:
    services = make_services()
    assert fields(plugin(tmp_path / "none", services)) == []
    assert services.log.of("no DKIM keys")  # type: ignore[attr-defined]


def test_new_and_broken_files_while_running(keys: Path) -> None:
    services = make_services()
    made = plugin(keys, services)
    assert len(fields(made)) == 2
    write(keys / "example.com/new.pem", pem(RSA))
    (keys / "example.com/ed.pem").write_bytes(b"half")
    assert len(fields(made)) == 2
    services.clock.advance(1)  # type: ignore[attr-defined]
    assert [value.partition("s=")[2].partition(";")[0] for _, value in fields(made)] == ["new", "sel", "ed"]


def test_mail_does_not_go_unsigned_where_the_only_key_is_bad(tmp_path: Path) -> None:
    made = plugin(tmp_path)
    write(tmp_path / "example.com/sel.pem", b"half")
    with pytest.raises(KeyTrouble):
        fields(made)


def test_expiry_and_what_is_signed(keys: Path) -> None:
    made = plugin(keys, expire="7d", oversign="From, Subject", sign="Date, Comments", selectors="sel")
    ((_, value),) = fields(made)
    assert "x=1768212000" in value and "t=1767607200" in value
    assert "h=From:From:Subject:Subject:Date;" in value.replace("\r\n ", "").replace("; ", ";")


def test_cases_of_signers(keys: Path) -> None:
    """No line over 78 columns, and the header relaxed, so that a relay may refold it."""
    for name, value in fields(plugin(keys)):
        assert "c=relaxed/relaxed" in value
        assert max(map(len, f"{name}: {value}".split("\r\n"))) <= 78
