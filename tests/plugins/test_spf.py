"""plugins/spf.py: what each result does to mail, and what it leaves for other plugins and for the header."""

from __future__ import annotations

from typing import Any

import pytest

from gmta.mail.session import Session, Transaction
from gmta.testing import load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify import MAX_QUERIES, RESERVED

ZONE = {
    "pass.example": {"TXT": ["v=spf1 ip4:192.0.2.1 -all"]},
    "fail.example": {"TXT": ["v=spf1 -all exp=why.fail.example"]},
    "why.fail.example": {"TXT": ["%{i} is not ours"]},
    "softfail.example": {"TXT": ["v=spf1 ~all"]},
    "neutral.example": {"TXT": ["v=spf1 ?all"]},
    "permerror.example": {"TXT": ["v=spf1 nonsense"]},
    "temperror.example": {"rcode": "SERVFAIL"},
}


def judged(sender: str, *, helo: str = "h.none.example", session: Session | None = None, **keys: Any) -> tuple[Any, Transaction]:
    """(reply or None, transaction) of MAIL with these keys."""
    plugin = load_plugin("spf", make_services(resolver=Zone(ZONE)), **keys)
    transaction = make_transaction(sender)
    verdict = plugin.check_mail(session or make_session(helo=helo), transaction)
    return (str(verdict.reply) if verdict else None), transaction


@pytest.mark.parametrize(("result", "keys", "reply", "tags"), [
    ("pass", {}, None, set()),
    ("fail", {}, "550 5.7.23 SPF fail: 192.0.2.1 matches -all of fail.example. The domain fail.example explains: 192.0.2.1 is not ours", set()),
    ("fail", {"explanation": "no"}, "550 5.7.23 SPF fail: 192.0.2.1 matches -all of fail.example", set()),
    ("fail", {"fail": "tag"}, None, {"spf-fail"}),
    ("fail", {"fail": "ignore"}, None, set()),
    ("softfail", {}, None, {"spf-softfail"}),
    ("softfail", {"softfail": "reject"}, "550 5.7.23 SPF softfail: 192.0.2.1 matches ~all of softfail.example", set()),
    ("neutral", {}, None, set()),
    ("neutral", {"neutral": "tag"}, None, {"spf-neutral"}),
    ("none", {}, None, set()),
    ("none", {"none": "reject"}, "550 5.7.23 SPF none: none.example has no SPF record", set()),
    ("permerror", {}, None, {"spf-permerror"}),
    ("permerror", {"permerror": "reject"}, "550 5.7.24 SPF permerror: unknown term nonsense", set()),
    ("temperror", {}, None, set()),
    ("temperror", {"temperror": "defer"}, "451 4.7.24 SPF of temperror.example can't be told now, try again later: ", set()),
])
def test_policy(result: str, keys: dict[str, str], reply: str | None, tags: set[str]) -> None:
    answer, transaction = judged(f"a@{result}.example", **keys)
    assert (answer or "").startswith(reply or "") if reply else answer is None
    assert transaction.tags == tags
    assert [(found.method, found.result, found.properties) for found in transaction.auth_results] == [
        ("spf", result, (("smtp.mailfrom", f"{result}.example"),))]


def test_both_identities() -> None:
    answer, transaction = judged("a@pass.example", helo="fail.example")
    assert answer is None
    assert transaction.tags == {"spf-helo-fail"}
    assert [(found.result, found.properties) for found in transaction.auth_results] == [
        ("pass", (("smtp.mailfrom", "pass.example"),)), ("fail", (("smtp.helo", "fail.example"),))]
    assert judged("a@pass.example", helo="fail.example", helo_fail="reject")[0].startswith("550 5.7.23 SPF fail for the name given at HELO")
    assert judged("a@pass.example", helo="fail.example", helo_fail="ignore")[1].tags == set()


def test_null_sender_is_the_helo_name() -> None:
    answer, transaction = judged("", helo="pass.example")
    assert answer is None
    assert [(found.result, found.properties) for found in transaction.auth_results] == [("pass", (("smtp.helo", "pass.example"),))]
    assert judged("", helo="fail.example")[0].startswith("550 5.7.23")


def test_helo_is_judged_once_a_session() -> None:
    zone = Zone(ZONE)
    plugin = load_plugin("spf", make_services(resolver=zone))
    session = make_session(helo="pass.example")
    for _ in range(3):
        transaction = make_transaction("a@softfail.example")
        assert plugin.check_mail(session, transaction) is None
        assert len(transaction.auth_results) == 2
    assert zone.asked.count(("pass.example", "TXT")) == 1
    session.helo = "fail.example"
    transaction = make_transaction("a@softfail.example")
    plugin.check_mail(session, transaction)
    assert transaction.auth_results[1].result == "fail"


def test_helo_of_another_client_in_the_same_session_is_judged_anew() -> None:
    """A proxy has told of another one (XCLIENT)."""
    zone = Zone({"mx.example": {"TXT": ["v=spf1 ip4:192.0.2.1 -all"]}})
    plugin = load_plugin("spf", make_services(resolver=zone))
    session = make_session(helo="mx.example")
    for ip, result in (("192.0.2.1", "pass"), ("198.51.100.1", "fail")):
        session.peer_ip = ip
        transaction = make_transaction("a@softfail.example")
        plugin.check_mail(session, transaction)
        assert transaction.auth_results[1].result == result


@pytest.mark.parametrize("session", [make_session(trusted=True), make_session(user="user@example.test")])
def test_trusted_sessions_are_not_judged(session: Session) -> None:
    answer, transaction = judged("a@fail.example", session=session)
    assert answer is None
    assert not transaction.auth_results


def test_received_spf() -> None:
    plugin = load_plugin("spf", make_services(resolver=Zone(ZONE)), received_spf="yes", fail="ignore")
    session, transaction, message = make_session(helo='h"\\.example', peer_ip="2001:db8::1"), make_transaction('"a \\" b"@fail.example'), make_message()
    assert plugin.check_mail(session, transaction) is None
    [(name, value)] = plugin.get_headers(session, transaction, message)
    assert (name, value.replace("\r\n\t", " ")) == ("Received-SPF", (
        'fail (mx.example.test: 2001:db8::1 matches -all of fail.example) receiver=mx.example.test; client-ip="2001:db8::1"; '
        'envelope-from="\\"a \\\\\\" b\\"@fail.example"; helo="h\\"\\\\.example"; identity=mailfrom; mechanism=-all'))
    message.prepend(name, value)
    assert load_plugin("spf").get_headers(session, transaction, message) is None
    assert plugin.get_headers(session, make_transaction(), message) is None


def test_reply_fits_whatever_the_domain_says() -> None:
    name = ".".join(["x" * 60] * 4)
    zone = Zone({name: {"TXT": ["v=spf1 -all exp=why.example"]}, "why.example": {"TXT": ["y" * 250]}})
    plugin = load_plugin("spf", make_services(resolver=zone))
    verdict = plugin.check_mail(make_session(), make_transaction(f"a@{name}"))
    assert all(len(line) <= 512 for line in verdict.reply.wire().split(b"\r\n"))


def test_questions_are_left_for_those_who_come_later() -> None:
    """A hostile record can't use up the look-ups that DMARC needs."""
    zone: dict[str, Any] = {name: {"TXT": ["v=spf1 " + " ".join(f"mx:x{n}.{name}" for n in range(10)) + " -all"]} for name in ("a.example", "h.example")}
    for name in ("a.example", "h.example"):
        zone |= {f"x{n}.{name}": {"MX": [(host, f"h{host}.x{n}.{name}") for host in range(10)]} for n in range(10)}
    resolver = Zone(zone)
    plugin = load_plugin("spf", make_services(resolver=resolver))
    transaction = make_transaction("a@a.example")
    assert plugin.check_mail(make_session(helo="h.example"), transaction) is None
    assert len(resolver.asked) <= MAX_QUERIES - RESERVED
    assert transaction.tags == {"spf-permerror"}
