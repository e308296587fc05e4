"""Where mail goes: MX order, families, aliases, loops, hosts that can't take mail, and what DNS did not say."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from typing import Any

import pytest

from gmta.deliver.nexthop import DEAD_S, MAX_TARGETS, NextHops, NoTargets, Target
from gmta.mail.verdict import Status
from gmta.testing import FakeClock, MemoryLog
from gmta.testing.zone import Zone


def hops(records: Mapping[str, Any], *, ad: bool = False, log: MemoryLog | None = None, clock: FakeClock | None = None, **facts: Any) -> NextHops:
    facts.setdefault("shuffle", lambda found: None)
    return NextHops(Zone(records, ad=ad), log or MemoryLog(), clock or FakeClock(), hostname="MX.example", **facts)


def addresses(targets: list[Target]) -> list[str]:
    return [target.address for target in targets]


def refusal(found: NextHops, domain: str = "c.example") -> tuple[Status, str]:
    with pytest.raises(NoTargets) as none:
        found.targets(domain)
    return none.value.outcome.status, str(none.value.outcome.reply)


HOSTS = {"one.example": {"A": "192.0.2.1"}, "two.example": {"A": ["192.0.2.2"], "AAAA": "2001:db8::2"}, "three.example": {"A": "192.0.2.3"}}


def test_by_preference_and_the_families_in_turn() -> None:
    found = hops({"c.example": {"MX": [(20, "two.example"), (10, "one.example")]}, **HOSTS}).targets("c.example")
    assert found == [Target("one.example", "192.0.2.1", 25, "one.example"), Target("two.example", "2001:db8::2", 25, "two.example"),
                     Target("two.example", "192.0.2.2", 25, "two.example")]


def test_the_web_is_fetched_from_public_addresses_only() -> None:
    inside = ["10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "224.0.0.1", "8.8.8.8"]
    found = hops({"w.example": {"A": inside, "AAAA": ["::1", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2606:4700::1"]}})
    assert sorted(found.web_addresses("w.example")) == ["2606:4700::1", "8.8.8.8"] and found.web_addresses("none.example") == []


def test_equals_come_in_any_order() -> None:
    zone = {"c.example": {"MX": [(10, f"h{n}.example") for n in range(5)]}, **{f"h{n}.example": {"A": f"192.0.2.{n + 1}"} for n in range(5)}}
    found = hops(zone, shuffle=random.Random(1).shuffle)
    orders = {tuple(addresses(found.targets("c.example"))) for _ in range(20)}
    assert len(orders) > 10 and all(len(set(order)) == 5 for order in orders)


def test_no_more_than_can_be_tried() -> None:
    zone = {"c.example": {"MX": [(n, f"h{n}.example") for n in range(30)]}, **{f"h{n}.example": {"A": f"192.0.2.{n + 1}"} for n in range(30)}}
    found = hops(zone)
    assert addresses(found.targets("c.example")) == [f"192.0.2.{n + 1}" for n in range(MAX_TARGETS)]
    assert ("h29.example", "A") not in found._resolver.asked


def test_the_domain_itself_where_there_is_no_mx() -> None:
    assert addresses(hops({"c.example": {"A": "192.0.2.9"}}, port=26).targets("c.example")) == ["192.0.2.9"]
    assert hops({"c.example": {"AAAA": "2001:db8::9"}}, port=26).targets("c.example") == [Target("c.example", "2001:db8::9", 26, "c.example")]


def test_aliases_are_followed() -> None:
    zone = {"c.example": {"CNAME": "d.example"}, "d.example": {"MX": (10, "alias.example")}, "alias.example": {"CNAME": "one.example"}, **HOSTS}
    assert hops(zone).targets("c.example") == [Target("alias.example", "192.0.2.1", 25, "one.example")]


@pytest.mark.parametrize(("domain", "address"), [("[192.0.2.7]", "192.0.2.7"), ("[IPv6:2001:db8::7]", "2001:db8::7")])
def test_address_literals(domain: str, address: str) -> None:
    assert hops({}).targets(domain) == [Target(address, address, 25)]


@pytest.mark.parametrize(("domain", "enhanced"), [("[192.0.2.300]", "5.1.2"), ("[127.0.0.1]", "5.4.6"), ("[IPv6:::1]", "5.4.6"), ("[0.0.0.0]", "5.4.4"),
                                                  ("[192.0.2.25]", "5.4.6"), ("[IPv6:::ffff:127.0.0.1]", "5.4.6")])
def test_address_literals_that_take_no_mail(domain: str, enhanced: str) -> None:
    status, text = refusal(hops({}, listeners=[("192.0.2.25", 25)]), domain)
    assert status is Status.FAILED and enhanced in text


@pytest.mark.parametrize(("records", "status", "said"), [
    ({}, Status.FAILED, "550 5.1.2 Domain c.example does not exist"),
    ({"c.example": {"MX": (0, "")}}, Status.FAILED, "556 5.1.10"),
    ({"c.example": {"TXT": "x"}}, Status.FAILED, "550 5.4.4 c.example has neither"),
    ({"c.example": {"rcode": "SERVFAIL"}}, Status.DEFERRED, "451 4.4.3 DNS look-up of c.example (MX)"),
    ({"c.example": {"timeout": True}}, Status.DEFERRED, "4.4.3"),
    ({"c.example": {"MX": (10, "one.example")}, "one.example": {"rcode": "SERVFAIL"}}, Status.DEFERRED, "4.4.3 DNS look-up of one.example"),
    # the address of a domain with MX records is never used (RFC 5321 section 5.1)
    ({"c.example": {"MX": (10, "gone.example"), "A": "192.0.2.1"}}, Status.FAILED, "5.4.4 No mail host"),
    ({"c.example": {"MX": [(10, "gone.example"), (20, "one.example")]}, "one.example": {"rcode": "SERVFAIL"}}, Status.DEFERRED, "4.4.3"),
    ({"c.example": {"MX": [(10, "one.example"), (20, "gone.example")]}, "one.example": {"rcode": "SERVFAIL"}}, Status.DEFERRED, "4.4.3"),
    ({"c.example": {"MX": (10, "localhost")}}, Status.FAILED, "5.4.6"),
    ({"c.example": {"A": "127.0.0.1"}}, Status.FAILED, "5.4.6"),
    ({"c.example": {"MX": (10, "mx.example")}}, Status.FAILED, "5.4.6 Mail for c.example loops back"),
    ({"c.example": {"MX": (10, "own.example")}, "own.example": {"A": "192.0.2.25"}}, Status.FAILED, "5.4.6 Mail for c.example loops back"),
    ({"c.example": {"MX": (10, "192.0.2.1")}, "192.0.2.1": {"A": "192.0.2.1"}}, Status.FAILED, "5.4.4"),
    ({"c.example": {"MX": (10, "odd.example")}, "odd.example": {"A": ["0.0.0.0", "224.0.0.1", "169.254.1.1", "255.255.255.255"],
                                                               "AAAA": ["::", "ff02::1", "fe80::1", "::ffff:0.0.0.0"]}}, Status.FAILED, "5.4.4"),
])
def test_domains_whose_mail_goes_nowhere(records: dict[str, Any], status: Status, said: str) -> None:
    found, text = refusal(hops(records, listeners=[("192.0.2.25", 25), ("127.0.0.1", 2525)]))
    assert found is status and said in text


def test_where_we_are_a_mail_host_only_better_ones_are_used() -> None:
    mx = [(10, "one.example"), (20, "two.example"), (20, "mx.example"), (30, "three.example")]
    assert addresses(hops({"c.example": {"MX": mx}, **HOSTS}).targets("c.example")) == ["192.0.2.1"]
    mx = [(10, "one.example"), (20, "own.example"), (30, "three.example")]
    own = {"own.example": {"A": "192.0.2.25"}}
    assert addresses(hops({"c.example": {"MX": mx}, **HOSTS, **own}, listeners=[("192.0.2.25", 25)]).targets("c.example")) == ["192.0.2.1"]
    # another port is another server's
    assert len(hops({"c.example": {"MX": mx}, **HOSTS, **own}, listeners=[("192.0.2.25", 26)]).targets("c.example")) == 3


def test_a_listener_on_every_address_is_ours_on_every_address_of_this_machine() -> None:
    zone = {"c.example": {"A": "127.0.0.1"}, "d.example": {"A": "192.0.2.1"}}
    found = hops(zone, listeners=[("0.0.0.0", 2525)], port=2525, allow_loopback=True)
    assert "5.4.6" in refusal(found)[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, pytest.raises(OSError):
        probe.bind(("192.0.2.1", 0))
    assert addresses(found.targets("d.example")) == ["192.0.2.1"]
    assert addresses(hops(zone, listeners=[("0.0.0.0", 2525)], port=26, allow_loopback=True).targets("c.example")) == ["127.0.0.1"]


def test_a_machine_that_may_bind_any_address_has_not_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """net.ipv4.ip_nonlocal_bind, as machines that share an address have it."""
    class Anywhere(socket.socket):
        def bind(self, address: Any) -> None:
            pass

    monkeypatch.setattr("gmta.deliver.nexthop.socket.socket", Anywhere)
    zone = {"c.example": {"A": "127.0.0.5"}, "d.example": {"A": "192.0.2.1"}, "e.example": {"AAAA": "2001:db8::1"}, "f.example": {"AAAA": "::1"}}
    found = hops(zone, listeners=[("0.0.0.0", 2525), ("::", 2525)], port=2525, allow_loopback=True)
    assert "5.4.6" in refusal(found)[1] and "5.4.6" in refusal(found, "f.example")[1]
    assert addresses(found.targets("d.example")) == ["192.0.2.1"] and addresses(found.targets("e.example")) == ["2001:db8::1"]


def test_hosts_that_can_not_take_mail_are_passed_over_and_named() -> None:
    log = MemoryLog()
    mx = [(10, "127.0.0.1"), (20, "."), (30, "loop.example"), (40, "gone.example"), (50, "one.example")]
    zone = {"c.example": {"MX": mx}, "loop.example": {"A": ["127.0.0.5", "192.0.2.5"]}, **HOSTS}
    assert addresses(hops(zone, log=log).targets("c.example")) == ["192.0.2.5", "192.0.2.1"]
    assert [(line["host"], line["reason"]) for line in log.of("mx skipped")] == [
        ("127.0.0.1", "not a host name"), (".", "not a host name"), ("loop.example", "a loopback address")]


def test_one_family_that_can_not_be_told_does_not_hide_the_other() -> None:
    class Half(Zone):
        def look_up(self, name: str, kind: str, **keys: Any) -> Any:
            return super().look_up("broken.example" if kind == "AAAA" else name, kind, **keys)

    zone = Half({"c.example": {"MX": (10, "one.example")}, "broken.example": {"rcode": "SERVFAIL"}, **HOSTS})
    found = NextHops(zone, MemoryLog(), FakeClock(), hostname="mx.example")
    assert addresses(found.targets("c.example")) == ["192.0.2.1"]


def test_what_gave_no_connection_is_tried_last_for_a_while() -> None:
    clock = FakeClock()
    found = hops({"c.example": {"MX": [(10, "one.example"), (20, "three.example")]}, **HOSTS}, clock=clock)
    first, second = found.targets("c.example")
    found.failed(first)
    assert found.targets("c.example") == [second, first]
    clock.advance(DEAD_S + 1)
    assert found.targets("c.example") == [first, second]
    found.failed(first)
    found.answered(first)
    assert found.targets("c.example") == [first, second]


def test_smart_hosts() -> None:
    zone = {"two.example": HOSTS["two.example"], "broken.example": {"rcode": "SERVFAIL"}}
    found = hops(zone)
    assert found.smart_hosts([("127.0.0.1", 2500), ("two.example", 587), ("gone.example", 25), ("localhost", 26)]) == [
        Target("127.0.0.1", "127.0.0.1", 2500), Target("two.example", "2001:db8::2", 587, "two.example"),
        Target("two.example", "192.0.2.2", 587, "two.example"), Target("localhost", "::1", 26, "localhost"),
        Target("localhost", "127.0.0.1", 26, "localhost")]
    for name in ("broken.example", "gone.example"):  # what the postmaster wrote is never the sender's fault
        with pytest.raises(NoTargets) as none:
            found.smart_hosts([(name, 25)])
        assert none.value.outcome.status is Status.DEFERRED and name in none.value.outcome.reply.text


@pytest.mark.parametrize(("spoiled", "secure"), [(None, True), ("c.example", False), ("one.example", False), ("real.example", False)])
def test_secure_all_the_way_or_not_at_all(spoiled: str | None, secure: bool) -> None:
    zone: dict[str, Any] = {"c.example": {"MX": (10, "one.example"), "ad": True}, "one.example": {"CNAME": "real.example", "ad": True},
                            "real.example": {"A": "192.0.2.1", "ad": True}}
    found = NextHops(Told(zone, spoiled), MemoryLog(), FakeClock(), hostname="mx.example")
    assert found.targets("c.example")[0].secure is secure


class Told(Zone):
    """A zone that is signed but for one name: with it in the chain an answer has no AD."""

    def __init__(self, records: dict[str, Any], spoiled: str | None) -> None:
        super().__init__(records)
        self.spoiled = spoiled

    def look_up(self, name: str, kind: str, **keys: Any) -> Any:
        answer = super().look_up(name, kind, **keys)
        chain = {"c.example": {"c.example"}, "one.example": {"one.example", "real.example"}}.get(name, set())
        object.__setattr__(answer, "secure", self.spoiled not in chain)
        return answer
