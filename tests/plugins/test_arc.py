"""plugins/arc.py: what it notes, and what it seals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gmta.mail.message import Message
from gmta.mail.session import AuthResult, Session
from gmta.testing import load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify.arc import ArcResult, verify_chain
from gmta.verify.signing import SigningKey
from tests.engine.test_verify_arc import ONE
from tests.engine.test_verify_dkim import PLAIN, RSA, pem, write, zone

OWN = SigningKey("example.test", "sel", RSA.private)
AWAY, HERE = ("user@elsewhere.example",), ("user@example.test",)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write(tmp_path / "example.test/sel.pem", pem(RSA))
    return tmp_path


def passed(folder: Path, raw: bytes, recipients: tuple[str, ...] = AWAY, *, session: Session | None = None, resolver: Any = None,
           services: Any = None, **given: Any) -> tuple[str | None, list[AuthResult], ArcResult | None, bytes]:
    """(reply, AuthResults, note, message as it goes on) of a message that meets the plugin."""
    services = services or make_services(resolver=resolver or zone(RSA, OWN))
    plugin = load_plugin("arc", services, keys=f"{folder}/{{domain}}/{{selector}}.pem", **given)
    transaction, message, session = make_transaction(recipients=recipients), make_message(raw), session or make_session()
    transaction.auth_results.append(AuthResult("spf", "pass", (("smtp.mailfrom", "example.com"),)))
    verdict = plugin.check_message(session, transaction, message)
    for name, value in reversed(plugin.get_signatures(session, transaction, message) or []):
        message.prepend(name, value)
    return (str(verdict.reply) if verdict else None), transaction.auth_results[1:], transaction.notes.get("arc"), b"".join(message.chunks())


def chain(raw: bytes) -> ArcResult:
    return verify_chain(Message.from_bytes(raw), zone(RSA, OWN), now=1767607200.0)


def test_forwarded_mail_is_sealed(keys: Path) -> None:
    reply, (result,), note, raw = passed(keys, PLAIN)
    assert (reply, result.result, result.properties, note.result if note else "") == (None, "none", (), "none")
    found = chain(raw)
    assert (found.result, found.instances) == ("pass", 1), found.steps
    assert found.sets[0].domain == "example.test"
    text = " ".join(found.sets[0].results.split())
    assert text.startswith("mx.example.test;") and "spf=pass smtp.mailfrom=example.com" in text and "arc=none" in text


def test_chain_is_noted_and_continued(keys: Path) -> None:
    _, (result,), note, raw = passed(keys, ONE)
    assert (result.result, result.properties) == ("pass", (("smtp.remote-ip", "192.0.2.1"), ("header.oldest-pass", "0")))
    assert note is not None and note.sets[0].domain == "example.com"
    assert (chain(raw).result, chain(raw).instances) == ("pass", 2)


def test_broken_chain_is_noted_and_ended(keys: Path) -> None:
    _, (result,), _, raw = passed(keys, ONE.replace(b"Bye", b"bye"))
    assert (result.result, result.reason) == ("fail", "message signature 1: body hash did not verify")
    assert chain(raw).ended
    assert passed(keys, raw)[3] == raw


@pytest.mark.parametrize("recipients,given,seals", [
    (AWAY, {}, True), (HERE, {}, False), (HERE + AWAY, {}, True), (HERE, {"seal": "always"}, True), (AWAY, {"seal": "never"}, False),
    (("user@EXAMPLE.test",), {}, False),
])
def test_what_is_sealed(keys: Path, recipients: tuple[str, ...], given: dict[str, str], seals: bool) -> None:
    assert (passed(keys, PLAIN, recipients, **given)[3] != PLAIN) is seals


@pytest.mark.parametrize("session", [make_session(user="a@example.test"), make_session(trusted=True)])
def test_trusted_sessions_are_passed_over(keys: Path, session: Session) -> None:
    reply, results, note, raw = passed(keys, ONE, session=session)
    assert (reply, results, note, raw) == (None, [], None, ONE)


def test_chain_that_cannot_be_judged_now_is_not_broken_for_good(keys: Path) -> None:
    down = Zone({"sel._domainkey.example.com": {"rcode": "SERVFAIL"}})
    services = make_services(resolver=down)
    reply, (result,), _, raw = passed(keys, ONE, services=services)
    assert (reply, result.result, raw) == (None, "fail", ONE)
    assert services.log.of("ARC chain not continued")  # type: ignore[attr-defined]
    assert passed(keys, ONE, resolver=down, temperror="defer")[0] == "451 4.7.5 A key of the ARC chain can't be looked up now"


def test_without_a_key_nothing_is_sealed_and_the_start_says_so(tmp_path: Path) -> None:
    services = make_services(resolver=zone(RSA))
    assert passed(tmp_path, PLAIN, services=services)[3] == PLAIN
    assert services.log.of("no key to seal with")  # type: ignore[attr-defined]


def test_other_domain(keys: Path) -> None:
    write(keys / "example.com/sel.pem", pem(RSA))
    assert chain(passed(keys, PLAIN, domain="lists.example.com")[3]).sets[0].domain == "example.com"
