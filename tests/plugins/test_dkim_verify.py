"""plugins/dkim_verify.py: what it notes for others, and when it defers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gmta.mail.session import Session, Transaction
from gmta.mail.trace import authentication_results
from gmta.testing import load_plugin, make_file_message, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify import MAX_QUERIES, RESERVED
from gmta.verify.canonical import Header
from tests.engine.test_verify_dkim import ED, PLAIN, RSA, made, signed, zone

BROKEN = Zone({"sel._domainkey.example.com": {"rcode": "SERVFAIL"}})


def judged(raw: bytes, resolver: Any = None, *, session: Session | None = None, **keys: Any) -> tuple[str | None, Transaction]:
    """(reply or None, transaction) after the dot."""
    plugin = load_plugin("dkim_verify", make_services(resolver=resolver or zone(RSA, ED)), **keys)
    transaction = make_transaction()
    verdict = plugin.check_message(session or make_session(), transaction, make_message(raw))
    return (str(verdict.reply) if verdict else None), transaction


def results(transaction: Transaction) -> list[tuple[str, str]]:
    assert {result.method for result in transaction.auth_results} <= {"dkim"}
    return [(result.result, result.reason) for result in transaction.auth_results]


def test_each_signature_is_noted_with_its_properties() -> None:
    reply, transaction = judged(signed(keys=(RSA, ED)).replace(b"\r\nFrom", b"\r\nX-Added: 1\r\nFrom"))
    assert reply is None
    assert results(transaction) == [("pass", ""), ("pass", "")]
    first, second = (dict(result.properties) for result in transaction.auth_results)
    assert {name: value for name, value in first.items() if name != "header.b"} == {
        "header.d": "example.com", "header.i": "@example.com", "header.s": "sel", "header.a": "rsa-sha256"}
    assert (second["header.s"], second["header.a"], len(second["header.b"])) == ("ed", "ed25519-sha256", 8)


@pytest.mark.parametrize("raw,expected", [
    (PLAIN, ("none", "")),
    (signed().replace(b"Bye", b"bye"), ("fail", "body hash did not verify")),
    (b"DKIM-Signature: v=1\r\n" + PLAIN, ("permerror", "a= is missing")),
    (made("l=0", body=b""), ("policy", "l= covers 0 of 20 octets of the body")),
])
def test_what_does_not_pass_is_noted_with_its_reason(raw: bytes, expected: tuple[str, str]) -> None:
    reply, transaction = judged(raw)
    assert reply is None
    assert results(transaction) == [expected]


def test_length_is_trusted_only_when_told_to() -> None:
    _, transaction = judged(made("l=0", body=b""), trust_length=True)
    assert results(transaction) == [("pass", "l= covers 0 of 20 octets of the body")]


def test_hostile_values_break_no_field() -> None:
    raw = made('i="a;b\\"c d"@example.com; n=x').replace(b"d=example.com", b"d=exa mple;.com", 1)
    _, transaction = judged(made("i=\xe4;b(c)@example.com") + raw)
    value = authentication_results("mx.example.test", transaction.auth_results)
    assert value.count(";") == len(transaction.auth_results)
    assert "\n" not in value.replace("\r\n\t", "").replace("\r\n ", "")


def test_dns_failure_defers_only_where_told_to_and_nothing_passed() -> None:
    assert judged(signed(), BROKEN)[0] is None
    reply, transaction = judged(signed(), BROKEN, temperror="defer")
    assert reply == "451 4.7.5 A DKIM key can't be looked up now"
    assert results(transaction)[0][0] == "temperror"
    half = zone(ED)
    half["sel._domainkey.example.com"] = {"rcode": "SERVFAIL"}
    reply, transaction = judged(signed(keys=(RSA, ED)), half, temperror="defer")
    assert reply is None
    assert [result for result, _ in results(transaction)] == ["temperror", "pass"]


@pytest.mark.parametrize("session", [make_session(user="alice@example.test"), make_session(trusted=True)])
def test_trusted_sessions_are_passed_over_unless_told_otherwise(session: Session) -> None:
    assert judged(signed(), session=session)[1].auth_results == []
    assert results(judged(signed(), session=session, trusted=True)[1]) == [("pass", "")]


def test_those_past_the_bound_are_left_out() -> None:
    field = made().partition(b"\r\n")[0]
    other = field.replace(b"d=example.com", b"d=other.example")
    resolver = zone(RSA)
    services = make_services("[limits]\ndkim_signatures = 3\n", resolver=resolver)
    transaction = make_transaction()
    load_plugin("dkim_verify", services).check_message(make_session(), transaction, make_message(b"\r\n".join([*[other] * 20, field, PLAIN])))
    assert [dict(result.properties)["header.d"] for result in transaction.auth_results] == ["other.example", "other.example", "example.com"]
    assert transaction.auth_results[2].result == "pass"
    assert services.log.of("signatures left unjudged") == [{"session": "s1", "id": "Q1", "count": 18}]  # type: ignore[attr-defined]


def test_questions_are_shared_with_the_other_checks() -> None:
    resolver = Zone({})
    plugin = load_plugin("dkim_verify", make_services("[limits]\ndkim_signatures = 90\n", resolver=resolver))
    raw = b"\r\n".join([made(f"s=s{number}", drop="s").partition(b"\r\n")[0] for number in range(60)] + [PLAIN])
    transaction = make_transaction()
    plugin.check_message(make_session(), transaction, make_message(raw))
    assert len(resolver.asked) == MAX_QUERIES - RESERVED
    assert [result.result for result in transaction.auth_results].count("temperror") == 60 - (MAX_QUERIES - RESERVED)


def test_big_body_is_hashed_in_a_native_thread(tmp_path: Path) -> None:
    services = make_services(resolver=zone(RSA))
    message = make_file_message(tmp_path / "body", signed(PLAIN + b"x" * 60 * 1024 * 20 + b"\r\n"))
    assert message.body.size > 1024 * 1024
    transaction = make_transaction()
    try:
        load_plugin("dkim_verify", services).check_message(make_session(), transaction, message)
        assert results(transaction) == [("pass", "")]
        assert services.batch("dkim")._started
    finally:
        services.close()


def test_message_is_left_as_it_is() -> None:
    message = make_message(signed())
    before = b"".join(message.chunks())
    load_plugin("dkim_verify", make_services(resolver=zone(RSA))).check_message(make_session(), make_transaction(), message)
    assert b"".join(message.chunks()) == before
    assert len(Header(message.header).places(b"dkim-signature")) == 1
