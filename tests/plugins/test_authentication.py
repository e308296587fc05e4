"""spf, dkim_verify, arc and dmarc together, from MAIL to the message that is queued."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gmta.services.dns import Answer, Status
from gmta.testing import Played, load_plugin, make_message, make_services, make_session, make_transaction, run
from gmta.testing.zone import Zone
from gmta.verify import MAX_QUERIES, MAX_SECONDS, Lookups

PLUGINS = ["spf", "dkim_verify", "arc", "dmarc"]
ZONE: dict[str, Any] = {
    "example.com": {"TXT": ["v=spf1 ip4:192.0.2.1 -all"]},
    "_dmarc.example.com": {"TXT": ["v=DMARC1; p=reject"]},
    "_dmarc.example.net": {"TXT": ["v=DMARC1; p=quarantine"]},
    "client.example.com": {"TXT": ["v=spf1 a -all"], "A": ["192.0.2.1"]},
}


def played(author: str, answer: str, peer_ip: str = "192.0.2.1", field: str = "Subject: x") -> Played:
    """A message to the final dot, under every chunking."""
    return run(PLUGINS, f"""
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<user@example.test>
S: 250
C: DATA
S: 354
C: {field}
C: From: {author}
C:
C: x
C: .
S: {answer}
""", resolver=Zone(ZONE), peer_ip=peer_ip, given={"plugin:spf": {"fail": "tag"}})


def results(found: Played) -> list[str]:
    """The Authentication-Results of what was queued, unfolded."""
    [(_, octets)] = found.queued
    header = octets.split(b"\r\n\r\n")[0].decode()
    return [re.sub(r"\r\n\s+", " ", field) for field in re.split(r"\r\n(?!\s)", header) if field.lower().startswith("authentication-results")]


def test_aligned() -> None:
    found = played("a@example.com", "250", field="Authentication-Results: (x (y)) mx.example.test; dmarc=pass header.from=bank.example")
    assert results(found) == [
        "Authentication-Results: mx.example.test; spf=pass smtp.mailfrom=example.com; spf=pass smtp.helo=client.example.com; dkim=none; arc=none; "
        "dmarc=pass header.from=example.com policy.dmarc=none"]
    assert found.queued[0][0].tags == []


def test_refused_and_quarantined() -> None:
    assert not played("a@example.com", "550 5.7.1 Refused by the DMARC policy of example.com: *", peer_ip="192.0.2.2").queued
    found = played("a@example.net", "250")
    assert found.queued[0][0].tags == ["dmarc-fail", "quarantine"]
    assert results(found)[0].endswith('dmarc=fail reason="nothing vouches for example.net" header.from=example.net policy.dmarc=quarantine')


@pytest.mark.parametrize("author", ["a@nothing.example", "a@[192.0.2.1]"])
def test_without_policy(author: str) -> None:
    assert " dmarc=" in results(played(author, "250"))[0]


# --- hostile DNS ------------------------------------------------------------------------------------------------

SIGNATURES = "".join(f"DKIM-Signature: v=1; a=rsa-sha256; d=d{number}.deep.example; s=s; h=from; bh=AAAA; b=AAAA\n" for number in range(50))
DEEP = "a.b.c.d.e.f.g.h.i.j.k.l.m.n.deep.example"
HOSTILE: dict[str, dict[str, Any]] = {
    "includes": {"deep.example": {"TXT": ["v=spf1 " + " ".join(f"include:i{number}.deep.example" for number in range(100)) + " -all"]},
                 "*.deep.example": {"TXT": ["v=spf1 ?all"]}},
    "void": {"deep.example": {"TXT": ["v=spf1 " + " ".join(f"a:n{number}.deep.example" for number in range(100)) + " -all"]}},
    "exchangers": {"deep.example": {"TXT": ["v=spf1 " + " ".join(f"mx:m{number}.deep.example" for number in range(10)) + " -all"]},
                   "*.deep.example": {"MX": [(number, f"h{number}.deep.example") for number in range(10)], "A": ["198.51.100.1"]}},
    "large": {"deep.example": {"TXT": ["v=spf1 " + "a:" + "x." * 30000 + " -all"]}, "*.deep.example": {"TXT": ["v=DMARC1; p=reject;" + "x=y;" * 14000] * 2}},
}


def judged(resolver: Any, transaction: Any = None) -> Any:
    """The transaction of a hostile message after all plugins."""
    services = make_services(resolver=resolver)
    transaction = transaction or make_transaction("a@deep.example")
    session, message = make_session(helo="x.deep.example"), make_message(f"{SIGNATURES}From: a@{DEEP}\n\nx\n")
    spf, *others = (load_plugin(name, services) for name in PLUGINS)
    spf.check_mail(session, transaction)
    for plugin in others:
        plugin.check_message(session, transaction, message)
    return transaction


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_costs_thirty_questions_at_most(name: str) -> None:
    zone = Zone(HOSTILE[name])
    methods = {found.method for found in judged(zone).auth_results}
    assert len(set(zone.asked)) == len(zone.asked) <= MAX_QUERIES
    assert {"spf", "dkim", "dmarc"} <= methods


def test_dead_name_servers_cost_twenty_seconds_at_most() -> None:
    class Dead:
        seconds = 0.0

        def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
            assert timeout_s is not None
            self.seconds += min(5.0, timeout_s)
            return Answer(name, kind, Status.TEMPORARY, reason="no answer in time")

    dead = Dead()
    transaction = make_transaction("a@deep.example")
    transaction.notes["lookups"] = Lookups(dead, clock=lambda: dead.seconds)
    assert {found.result for found in judged(dead, transaction).auth_results if found.method != "arc"} == {"temperror"}
    assert dead.seconds == MAX_SECONDS
