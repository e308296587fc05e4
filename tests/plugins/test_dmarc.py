"""plugins/dmarc.py: what each disposition does to mail, which results it reads, and what it adds to the header."""

from __future__ import annotations

from typing import Any

import pytest

from gmta import AuthResult
from gmta.mail.session import Session, Transaction
from gmta.testing import load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify.arc import ArcResult, ArcSet

ZONE = {
    "_dmarc.reject.example": {"TXT": ["v=DMARC1; p=reject"]},
    "_dmarc.quarantine.example": {"TXT": ["v=DMARC1; p=quarantine"]},
    "_dmarc.none.example": {"TXT": ["v=DMARC1; p=none"]},
    "_dmarc.late.example": {"rcode": "SERVFAIL"},
}
REFUSED = "550 5.7.1 Refused by the DMARC policy of reject.example: nothing vouches for reject.example"


def judged(author: str, *results: AuthResult, sender: str = "a@sender.example", session: Session | None = None, chain: ArcResult | None = None,
           **keys: Any) -> tuple[str | None, Transaction]:
    """(reply or None, transaction) of a message from this address, with these results of other plugins and these keys."""
    plugin = load_plugin("dmarc", make_services(resolver=Zone(ZONE)), **keys)
    transaction = make_transaction(sender)
    transaction.auth_results += results
    if chain is not None:
        transaction.notes["arc"] = chain
    message = make_message(f"From: {author}\nSubject: x\n\nx\n" if author else "Subject: x\n\nx\n")
    verdict = plugin.check_message(session or make_session(), transaction, message)
    return (str(verdict.reply) if verdict else None), transaction


@pytest.mark.parametrize(("author", "keys", "reply", "tags"), [
    ("a@reject.example", {}, REFUSED, set()),
    ("a@reject.example", {"reject": "quarantine"}, None, {"dmarc-fail", "quarantine"}),
    ("a@reject.example", {"reject": "tag"}, None, {"dmarc-fail"}),
    ("a@reject.example", {"reject": "ignore"}, None, set()),
    ("a@reject.example", {"honour": "no"}, None, set()),
    ("a@quarantine.example", {}, None, {"dmarc-fail", "quarantine"}),
    ("a@quarantine.example", {"quarantine": "tag"}, None, {"dmarc-fail"}),
    ("a@none.example", {}, None, set()),
    ("a@nothing.example", {}, None, set()),
    ("a@late.example", {}, "451 4.7.0 DMARC can't be judged now, try again later: _dmarc.late.example: SERVFAIL", set()),
    ("a@late.example", {"temperror": "tag"}, None, {"dmarc-temperror"}),
    ("a@late.example", {"temperror": "ignore"}, None, set()),
    ("", {}, None, {"dmarc-permerror"}),
    ("", {"invalid_from": "ignore"}, None, set()),
    ("", {"invalid_from": "reject"}, "550 5.7.1 Refused, DMARC can't be judged: no From field", set()),
    ("a@nothing.example\nFrom: b@reject.example", {}, "550 5.7.1 Refused by the DMARC policy of reject.example: 2 From fields; nothing vouches", set()),
    ("a@n1.example, a@n2.example, a@n3.example, a@n4.example", {}, "550 5.7.1 Refused, DMARC can't be judged: From has 4 domains", set()),
])
def test_policy(author: str, keys: dict[str, str], reply: str | None, tags: set[str]) -> None:
    answer, transaction = judged(author, **keys)
    assert answer is None if reply is None else (answer or "").startswith(reply)
    assert transaction.tags == tags
    assert [found.method for found in transaction.auth_results] == ["dmarc"]


@pytest.mark.parametrize(("results", "sender", "expected"), [
    ([AuthResult("spf", "pass", (("smtp.mailfrom", "reject.example"),))], "a@reject.example", "pass"),
    ([AuthResult("spf", "pass", (("smtp.mailfrom", "a@x.reject.example"),))], "a@x.reject.example", "pass"),
    ([AuthResult("spf", "pass", (("smtp.helo", "reject.example"),))], "", "pass"),
    ([AuthResult("spf", "pass", (("smtp.helo", "reject.example"),))], "a@other.example", "fail"),
    ([AuthResult("spf", "pass", (("smtp.mailfrom", "reject.example"),)), AuthResult("spf", "fail", (("smtp.helo", "x.example"),))], "a@reject.example", "pass"),
    ([AuthResult("spf", "softfail", (("smtp.mailfrom", "reject.example"),))], "a@reject.example", "fail"),
    ([AuthResult("dkim", "fail", (("header.d", "reject.example"),)), AuthResult("dkim", "pass", (("header.d", "reject.example"), ("header.s", "x")))], "", "pass"),
    ([AuthResult("dkim", "temperror", (("header.d", "reject.example"),))], "", "temperror"),
    ([AuthResult("dkim", "pass")], "", "fail"),
    ([AuthResult("arc", "pass", (("header.d", "reject.example"),))], "", "fail"),
])
def test_results_of_other_plugins(results: list[AuthResult], sender: str, expected: str) -> None:
    _, transaction = judged("a@reject.example", *results, sender=sender)
    assert transaction.auth_results[-1].result == expected


@pytest.mark.parametrize(("author", "properties", "reason"), [
    ("a@x.reject.example", (("header.from", "x.reject.example"), ("policy.dmarc", "reject")), "nothing vouches for x.reject.example"),
    ("a@none.example", (("header.from", "none.example"), ("policy.dmarc", "none")), "nothing vouches for none.example"),
    ("a@nothing.example", (("header.from", "nothing.example"),), ""),
    ("", (), "no From field"),
])
def test_result_for_the_header(author: str, properties: tuple[tuple[str, str], ...], reason: str) -> None:
    found = judged(author)[1].auth_results[-1]
    assert (found.properties, found.reason) == (properties, reason)


PASSED = "mx.list.example; spf=fail (; dmarc=pass) smtp.mailfrom=x; dmarc=pass (p=reject) header.from=reject.example"


@pytest.mark.parametrize(("sets", "trusted"), [
    ([("list.example", PASSED)], True),
    ([("LIST.example", "mx; dmarc=pass")], True),
    ([("other.example", "mx; dmarc=fail"), ("list.example", PASSED)], True),
    ([("list.example", PASSED), ("list.example", "mx; dmarc=fail")], True),
    ([("list.example", PASSED), ("other.example", PASSED)], False),
    ([("other.example", PASSED)], False),
    ([("list.example", "mx; dmarc=fail header.from=reject.example")], False),
    ([("list.example", "mx; dmarc=pass header.from=other.example")], False),
    ([("list.example", 'mx; dkim=fail reason="x; dmarc=pass"')], False),
    ([("list.example", "mx; dkim=fail (x; dmarc=pass)")], False),
    ([("list.example", "mx; dkim=fail (x; dmarc=pass (y (z)) x)")], False),
    ([("list.example", "mx; dmarc=passed")], False),
    ([("list.example", "dmarc=pass")], False),
    ([], False),
])
def test_trusted_sealer_overrides_a_failure(sets: list[tuple[str, str]], trusted: bool) -> None:
    links = tuple(ArcSet(number, domain, "s", results) for number, (domain, results) in enumerate(sets, 1))
    chain = ArcResult("pass", instances=len(links), sets=links)
    answer, transaction = judged("a@reject.example", chain=chain, trusted_sealers="list.example")
    assert (answer is None) is trusted
    assert not transaction.tags
    found = transaction.auth_results[-1]
    assert (found.result, found.properties[1]) == ("fail", ("policy.dmarc", "none" if trusted else "reject"))
    assert judged("a@reject.example", chain=chain)[0] == REFUSED
    chain.result = "fail"
    assert judged("a@reject.example", chain=chain, trusted_sealers="list.example")[0] == REFUSED
    assert judged("a@reject.example", trusted_sealers="list.example")[0] == REFUSED


@pytest.mark.parametrize("session", [make_session(trusted=True), make_session(user="user@example.test")])
def test_trusted_sessions_are_not_judged(session: Session) -> None:
    answer, transaction = judged("a@reject.example", session=session)
    assert answer is None
    assert not transaction.auth_results
