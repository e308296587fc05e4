"""plugins/dmarc_reports.py: what is counted, the report's XML, who gets it, and that it is sent once."""

from __future__ import annotations

import email
import email.policy
import gzip
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta import AuthResult
from gmta.mail.address import Address
from gmta.mail.reply import Reply
from gmta.services.dns import Answer, Status
from gmta.services.state import MemoryState
from gmta.testing import FakeClock, load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta_plugins.dmarc_reports import DAY_S, _element

NS = {"d": "urn:ietf:params:xml:ns:dmarc-2.0"}
ZONE: dict[str, dict[str, Any]] = {
    "_dmarc.owner.example": {"TXT": ["v=DMARC1; p=reject; sp=quarantine; adkim=s; rua=mailto:dmarc@owner.example"]},
    "_dmarc.quiet.example": {"TXT": ["v=DMARC1; p=reject"]},
    "_dmarc.test.example": {"TXT": ["v=DMARC1; p=reject; t=y; rua=mailto:dmarc@test.example"]},
    "_dmarc.out.example": {"TXT": ["v=DMARC1; p=none; rua=mailto:a@yes.test,mailto:b@no.test,mailto:c@other.test,mailto:d@evil.test"
                                   ",https://x.test/,mailto:e@late.test"]},
    "out.example._report._dmarc.yes.test": {"TXT": ["v=DMARC1;"]},
    "out.example._report._dmarc.no.test": {"TXT": ["v=spf1 -all"]},
    "*._report._dmarc.other.test": {"TXT": ["v=DMARC1; rua=mailto:instead@other.test"]},
    "out.example._report._dmarc.evil.test": {"TXT": ["v=DMARC1; rua=mailto:victim@victim.test"]},
}


class Worker:
    """dmarc and dmarc_reports of one worker; what it hands in is in `mail`."""

    def __init__(self, state: MemoryState, clock: FakeClock, zone: Zone, dmarc: dict[str, Any] | None = None, **keys: Any) -> None:
        services = make_services(clock=clock, resolver=zone)
        services._state = state
        services.spawn = lambda *_: None  # type: ignore[method-assign]
        self.log = services.log
        self.mail: list[tuple[Address, list[Address], bytes]] = []
        self.dmarc = load_plugin("dmarc", services, **(dmarc or {}))
        self.reports = load_plugin("dmarc_reports", services, **keys)
        self.reports.on_worker_started(self)

    def submit(self, sender: Address, recipients: Sequence[Address], octets: bytes) -> None:
        self.mail.append((sender, list(recipients), octets))

    def take(self, author: str = "a@owner.example", *results: AuthResult, sender: str = "bounce@owner.example", ip: str = "192.0.2.1", **facts: Any) -> None:
        session, transaction = make_session(peer_ip=ip, **facts), make_transaction(sender)
        transaction.auth_results += results
        message = make_message(f"From: {author}\n\nx\n")
        verdict = self.dmarc.check_message(session, transaction, message)
        if verdict is None:
            self.reports.check_message(session, transaction, message)
        else:
            self.reports.on_refused(session, transaction, "message", verdict.reply)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1767607200.0)  # 2026-01-05 10:00 UTC


@pytest.fixture
def state(clock: FakeClock) -> MemoryState:
    return MemoryState(clock)


def spf(domain: str, result: str = "pass") -> AuthResult:
    return AuthResult("spf", result, (("smtp.mailfrom", f"bounce@{domain}"),))


def dkim(domain: str, result: str = "pass") -> AuthResult:
    return AuthResult("dkim", result, (("header.d", domain), ("header.s", "s1"), ("header.b", "abcd")))


def sent(worker: Worker, clock: FakeClock) -> list[tuple[str, str, ElementTree.Element]]:
    """(recipient, file name, XML) of what is sent by the end of the next day."""
    worker.reports.flush()
    clock.advance(DAY_S * 2 - 36001 - clock() % 1)  # the next day's last second
    worker.reports.send_due()
    return [unpacked(*one) for one in worker.mail]


def unpacked(sender: Address, recipients: list[Address], octets: bytes) -> tuple[str, str, ElementTree.Element]:
    message = email.message_from_bytes(octets, policy=email.policy.default)
    assert b"\n" not in octets.replace(b"\r\n", b"") and max(map(len, octets.split(b"\r\n"))) < 300
    (part,) = [part for part in message.walk() if part.get_content_type() == "application/gzip"]
    return str(recipients[0]), str(part.get_filename()), ElementTree.fromstring(gzip.decompress(part.get_content()))


def texts(xml: ElementTree.Element, path: str) -> list[str | None]:
    return [found.text for found in xml.findall("/".join(f"d:{name}" for name in path.split("/")), NS)]


def test_the_report(state: MemoryState, clock: FakeClock) -> None:
    worker = Worker(state, clock, Zone(ZONE), organization="Example & Co", contact="https://mx.example.test/")
    for _ in range(3):
        worker.take("a@owner.example", spf("owner.example"), dkim("owner.example"), dkim("list.example", "fail"))
    worker.take("a@owner.example", spf("sub.owner.example"), dkim("sub.owner.example"), ip="2001:db8::1")  # adkim=s: only SPF is aligned
    worker.take("a@owner.example", spf("thief.example"), sender="x@thief.example", ip="198.51.100.1")
    worker.take("a@sub.owner.example", sender="")
    ((to, name, xml),) = sent(worker, clock)
    assert (to, name) == ("dmarc@owner.example", "mx.example.test!owner.example!1767571200!1767657599.xml.gz")
    assert [child.tag.partition("}")[2] for child in xml] == ["version", "report_metadata", "policy_published", "record", "record", "record", "record"]
    assert texts(xml, "report_metadata/org_name") + texts(xml, "report_metadata/email") == ["Example & Co", "postmaster@mx.example.test"]
    assert texts(xml, "report_metadata/report_id") == ["1767571200.owner.example@mx.example.test"]
    assert [(child.tag.partition("}")[2], child.text) for child in xml.findall("d:policy_published/*", NS)] == [
        ("domain", "owner.example"), ("discovery_method", "treewalk"), ("p", "reject"), ("sp", "quarantine"), ("np", "quarantine"), ("fo", "0"),
        ("adkim", "s"), ("aspf", "r"), ("testing", "n")]
    rows = {(ip, origin): (count, disposition, by_dkim, by_spf) for ip, origin, count, disposition, by_dkim, by_spf in zip(
        texts(xml, "record/row/source_ip"), texts(xml, "record/identifiers/header_from"), texts(xml, "record/row/count"),
        texts(xml, "record/row/policy_evaluated/disposition"), texts(xml, "record/row/policy_evaluated/dkim"),
        texts(xml, "record/row/policy_evaluated/spf"), strict=True)}
    assert rows == {("192.0.2.1", "owner.example"): ("3", "pass", "pass", "pass"), ("2001:db8::1", "owner.example"): ("1", "pass", "fail", "pass"),
                    ("198.51.100.1", "owner.example"): ("1", "reject", "fail", "fail"), ("192.0.2.1", "sub.owner.example"): ("1", "quarantine", "fail", "fail")}
    assert sorted(texts(xml, "record/auth_results/dkim/domain")) == ["list.example", "owner.example", "sub.owner.example"]
    assert set(texts(xml, "record/auth_results/spf/scope")) == {"mfrom"}
    assert sorted(texts(xml, "record/identifiers/envelope_from"), key=str) == [None, "owner.example", "owner.example", "thief.example"]


def test_why_a_policy_was_not_applied(state: MemoryState, clock: FakeClock) -> None:
    worker = Worker(state, clock, Zone(ZONE), {"reject": "tag", "quarantine": "tag"})
    worker.take("a@owner.example")
    worker.take("a@test.example")
    reports = {to: texts(xml, "record/row/policy_evaluated/reason/type") for to, _, xml in sent(worker, clock)}
    assert reports == {"dmarc@owner.example": ["local_policy"], "dmarc@test.example": ["local_policy"]}
    other = Worker(MemoryState(clock), clock, Zone(ZONE))
    other.take("a@test.example")
    clock.now = 1767607200.0 + 5 * DAY_S
    other.take("a@test.example")
    ((_, _, xml),) = sent(other, clock)
    assert texts(xml, "record/row/policy_evaluated/reason/type") == ["policy_test_mode"]


def test_who_is_not_counted(state: MemoryState, clock: FakeClock) -> None:
    worker = Worker(state, clock, Zone({**ZONE, "_dmarc.late.example": {"rcode": "SERVFAIL"}}), exclude="test.example")
    worker.take("a@quiet.example")
    worker.take("a@test.example")
    worker.take("a@nothing.example")
    worker.take("a@late.example")
    worker.take("a@owner.example", trusted=True)
    worker.take("a@owner.example", user="alice", role="submission")
    assert sent(worker, clock) == []


def test_a_message_that_another_plugin_refuses_counts_once(state: MemoryState, clock: FakeClock) -> None:
    worker = Worker(state, clock, Zone(ZONE))
    session, transaction, message = make_session(), make_transaction(), make_message("From: a@owner.example\n\nx\n")
    transaction.auth_results.append(dkim("owner.example"))
    worker.dmarc.check_message(session, transaction, message)
    worker.reports.check_message(session, transaction, message)
    worker.reports.on_refused(session, transaction, "message", Reply(550, "5.7.1", "spam"))
    worker.reports.on_refused(session, None, "rcpt", Reply(550, "5.1.1", "no"))
    ((_, _, xml),) = sent(worker, clock)
    assert texts(xml, "record/row/count") == ["1"]


def test_workers_count_together_and_one_of_them_sends(state: MemoryState, clock: FakeClock) -> None:
    zone = Zone(ZONE)
    workers = [Worker(state, clock, zone) for _ in range(3)]
    for worker in workers:
        worker.take("a@owner.example", dkim("owner.example"))
        worker.reports.on_worker_stopping(worker)
    clock.now = 1767657600.0  # midnight
    for worker in workers:
        worker.reports.send_due()
    assert [len(worker.mail) for worker in workers] == [0, 0, 0]  # each domain has its hour
    clock.advance(4 * 3600)
    for worker in workers + workers:
        worker.reports.send_due()
    assert [len(worker.mail) for worker in workers] == [1, 0, 0]
    assert texts(unpacked(*workers[0].mail[0])[2], "record/row/count") == ["3"]
    clock.advance(DAY_S)
    for worker in workers:
        worker.reports.send_due()
    assert sum(len(worker.mail) for worker in workers) == 1


def test_destinations_elsewhere_have_to_agree(state: MemoryState, clock: FakeClock) -> None:
    """RFC 9990 section 4."""
    worker = Worker(state, clock, Zone(ZONE))
    worker.take("a@out.example")
    assert sorted(to for to, _, _ in sent(worker, clock)) == ["a@yes.test", "instead@other.test"]


@pytest.mark.parametrize("rua,destinations", [
    ("mailto:a@sub.owner.example", ["a@sub.owner.example"]), ("mailto:a@owner.example!10k", ["a@owner.example"]), ("mailto:%61@owner.example", ["a@owner.example"]),
    ("MAILTO:a@owner.example?subject=x", ["a@owner.example"]), ("mailto:a@[192.0.2.1]", []), ("mailto:a@owner.example!x", []), ("mailto:", []),
    ("a@owner.example", []), ("mailto:a@example", []), ("mailto:a%0d%0aBcc:b@owner.example", []), ("mailto:a@owner.example, mailto:b@owner.example",
                                                                                                   ["a@owner.example", "b@owner.example"]),
])
def test_addresses_of_rua(rua: str, destinations: list[str], state: MemoryState, clock: FakeClock) -> None:
    worker = Worker(state, clock, Zone(ZONE))
    found = worker.reports.destinations("owner.example", rua)
    assert [str(address) for address, _ in found] == destinations


def test_a_report_too_big_for_its_reader_is_not_sent(state: MemoryState, clock: FakeClock) -> None:
    zone = Zone({"_dmarc.small.example": {"TXT": ["v=DMARC1; p=none; rua=mailto:a@small.example!1,mailto:b@small.example!1m"]}})
    worker = Worker(state, clock, zone)
    worker.take("a@small.example")
    assert [to for to, _, _ in sent(worker, clock)] == ["b@small.example"]
    assert worker.log.of("dmarc report too big")[0]["to"] == "a@small.example"


def test_what_fails_for_now_is_tried_again(state: MemoryState, clock: FakeClock) -> None:
    zone = Zone(ZONE)
    zone["_dmarc.ext.example"] = {"TXT": ["v=DMARC1; p=none; rua=mailto:a@yes.test"]}
    zone["ext.example._report._dmarc.yes.test"] = {"rcode": "SERVFAIL"}
    worker = Worker(state, clock, zone)
    worker.take("a@ext.example")
    assert sent(worker, clock) == []
    zone["ext.example._report._dmarc.yes.test"] = {"TXT": ["v=DMARC1"]}
    full: list[Any] = []

    def refuse(*_: Any) -> None:
        full.append(1)
        raise OSError("disk full")

    worker.submit, submit = refuse, worker.submit  # type: ignore[method-assign]
    worker.reports.send_due()
    worker.submit = submit  # type: ignore[method-assign]
    worker.reports.send_due()
    worker.reports.send_due()
    assert (len(full), len(worker.mail)) == (1, 1)


def test_a_worker_that_stops_meanwhile_leaves_the_report_to_others(state: MemoryState, clock: FakeClock) -> None:
    worker, other = Worker(state, clock, Zone(ZONE)), Worker(state, clock, Zone(ZONE))
    worker.take("a@owner.example", dkim("owner.example"))

    def stop(*_: Any) -> None:
        raise gevent.GreenletExit

    worker.submit = stop  # type: ignore[method-assign]
    with pytest.raises(gevent.GreenletExit):
        sent(worker, clock)
    other.reports.send_due()
    assert (len(worker.mail), len(other.mail)) == (0, 1)


def test_there_is_an_end_to_rows(state: MemoryState, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta_plugins.dmarc_reports.MAX_ROWS", 3)
    worker = Worker(state, clock, Zone(ZONE))
    for number in range(20):
        worker.take("a@owner.example", dkim(f"d{number}.example"), ip=f"192.0.2.{number % 5}")
    ((_, _, xml),) = sent(worker, clock)
    counts = [int(text or 0) for text in texts(xml, "record/row/count")]
    assert len(counts) == 6 and 3 < sum(counts) <= 20
    assert len(texts(xml, "record/auth_results/dkim")) == 3


def test_there_is_an_end_to_domains(state: MemoryState, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a zone can make any number of them."""
    monkeypatch.setattr("gmta_plugins.dmarc_reports.MAX_DOMAINS", 3)
    zone = Zone({f"_dmarc.d{number}.example": {"TXT": [f"v=DMARC1; p=none; rua=mailto:a@d{number}.example"]} for number in range(9)})
    worker = Worker(state, clock, zone)
    for _ in range(2):
        for number in range(9):
            worker.take(f"a@d{number}.example")
    worker.reports.flush()
    assert len(list(state.scan("dmarc-policy:"))) == 3
    assert [int(count) for _, count in state.scan("dmarc-count:")] == [2, 2, 2]


def test_destinations_are_kept_to_a_bound_and_whole(state: MemoryState, clock: FakeClock) -> None:
    rua = ",".join(f"mailto:{'x' * 50}{number}@owner.example" for number in range(900))
    worker = Worker(state, clock, Zone({"_dmarc.owner.example": {"TXT": [f"v=DMARC1; p=none; rua={rua}"]}}))
    worker.take()
    worker.reports.flush()
    ((_, policy),) = state.scan("dmarc-policy:")
    assert len(policy["rua"]) <= 4096 and rua.startswith(policy["rua"] + ",")


def test_a_stop_waits_for_no_name_server(state: MemoryState, clock: FakeClock) -> None:
    class Silent(Zone):
        silent = False
        waited = 0.0

        def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
            if not self.silent:
                return super().look_up(name, kind)
            assert timeout_s is not None and timeout_s <= 2.0
            self.waited += 1
            return Answer(name, kind, Status.TEMPORARY, reason="no answer in time")

    zone = Silent({"_dmarc.owner.example": {"TXT": ["v=DMARC1; p=none; rua=mailto:a@owner.example"]}})
    worker = Worker(state, clock, zone)
    for number in range(200):
        worker.take("a@owner.example", dkim(f"d{number}.owner.example"))
    zone.silent = True
    worker.reports.on_worker_stopping(worker)
    assert len(list(state.scan("dmarc-count:"))) == 200
    assert zone.waited == 1


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_makes_xml(text: str) -> None:
    assert ElementTree.fromstring(_element("x", text).encode("utf-8", "strict")).text is not None or not text
