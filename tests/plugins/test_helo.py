"""plugins/helo.py: what a stranger may call itself."""

from __future__ import annotations

from typing import Any

import pytest

from gmta.testing import load_plugin, make_services, make_session, make_transaction, run
from gmta.testing.zone import Zone

ALL_TAGGED = dict.fromkeys(("own_name", "own_address", "literal", "dotless", "unresolvable"), "tag")
ZONE = {"a.example.com": {"A": ["192.0.2.1"]}, "six.example.com": {"AAAA": ["2001:db8::1"]}, "mail.example.com": {"MX": [(10, "a.example.com")]},
        "text.example.com": {"TXT": ["x"]}, "broken.example.com": {"rcode": "SERVFAIL"}}


def tags(helo: str, session: Any = None, **keys: Any) -> set[str]:
    plugin = load_plugin("helo", make_services(resolver=Zone(ZONE)), **{**ALL_TAGGED, **keys})
    session = session or make_session(helo=helo)
    session.helo, session.local_ip = helo, "192.0.2.25"
    assert plugin.check_helo(session) is None
    transaction = make_transaction()
    plugin.check_mail(session, transaction)
    return transaction.tags


@pytest.mark.parametrize("helo,tag", [
    ("MX.example.test", "helo-own_name"), ("mx.example.test.", "helo-own_name"), ("example.test", "helo-own_name"),
    ("[192.0.2.25]", "helo-own_address"), ("[192.0.2.1]", ""), ("[192.0.2.2]", "helo-literal"), ("[IPv6:2001:db8::1]", "helo-literal"),
    ("[x-tag:what]", "helo-literal"), ("localhost", "helo-dotless"), ("localhost.", "helo-dotless"),
    ("a.example.com", ""), ("six.example.com", ""), ("mail.example.com", ""), ("broken.example.com", ""),
    ("text.example.com", "helo-unresolvable"), ("none.example.com", "helo-unresolvable"), ("sub.example.test", "helo-unresolvable"),
])
def test_names(helo: str, tag: str) -> None:
    assert tags(helo) == ({tag} if tag else set())


def test_whom_we_know_may_say_anything() -> None:
    for session in (make_session(trusted=True), make_session(user="alice"), make_session(role="submission")):
        assert tags("mx.example.test", session) == set()


def test_ignored_keys_ask_no_dns() -> None:
    zone = Zone(ZONE)
    plugin = load_plugin("helo", make_services(resolver=zone))
    assert plugin.check_helo(make_session(helo="none.example.com")) is None
    assert zone.asked == []


def test_a_better_name_takes_the_tag_back() -> None:
    session = make_session()
    assert tags("localhost", session) == {"helo-dotless"}
    assert tags("a.example.com", session) == set()


def test_dialogue() -> None:
    run("helo", r"""
S: 220
C: EHLO mx.example.test
S: 550 5.7.1 That is the name of this server
C: MAIL FROM:<a@example.com>
S: 503
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
""", resolver=Zone(ZONE))
