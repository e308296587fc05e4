"""Forwarding: senders rewritten and turned back, nobody else's mail relayed, loops stopped, and what the other transport is given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmta
from gmta import Delivery
from gmta.config import ConfigError
from gmta.mail.address import NULL, Address
from gmta.mail.envelope import RecipientState
from gmta.mail.session import Recipient
from gmta.mail.verdict import Kind, Status
from gmta.plugins import PluginManager
from gmta.testing.fakes import (
    START_AT,
    FakeClock,
    make_config,
    make_envelope,
    make_message,
    make_services,
    make_session,
    make_transaction,
)
from gmta_plugins.forward import BadSrs, Plugin, Srs

DAY_S = 86400.0
SECRET = "a secret of good length"
OTHER = "another one, the former"
JOE = Address.parse("joe@sender.example")


def srs(*secrets: str) -> Srs:
    return Srs(list(secrets) or [SECRET], "srs.example.test", 21)


def test_sender_comes_back() -> None:
    made = srs().forward(JOE, START_AT)
    assert str(made).startswith("SRS0=") and str(made).endswith("=sender.example=joe@srs.example.test")
    assert srs().reverse(made, START_AT) == JOE
    assert srs().reverse(Address.parse(str(made).lower()), START_AT) == JOE  # some hosts change the case
    assert srs().reverse(made, START_AT + 21 * DAY_S) == JOE
    for later in (22 * DAY_S, 500 * DAY_S, -DAY_S):
        with pytest.raises(BadSrs, match="too old"):
            srs().reverse(made, START_AT + later)


def test_address_of_another_forwarder_keeps_its_inside() -> None:
    first = Srs([OTHER], "first.example", 21).forward(JOE, START_AT)
    second = srs().forward(first, START_AT)
    assert second.local.startswith("SRS1=") and "=first.example==" in second.local
    assert srs().reverse(second, START_AT) == first
    third = Srs(["a third secret of length"], "third.example", 21)
    again = third.forward(second, START_AT)
    assert len(again.local) == len(second.local)  # it grows no more
    assert third.reverse(again, START_AT) == first  # and goes straight to the first


def test_secrets_rotate() -> None:
    old = srs(OTHER).forward(JOE, START_AT)
    assert srs(SECRET, OTHER).reverse(old, START_AT) == JOE
    assert srs(SECRET, OTHER).forward(JOE, START_AT) == srs(SECRET).forward(JOE, START_AT)
    with pytest.raises(BadSrs):
        srs(SECRET).reverse(old, START_AT)


@pytest.mark.parametrize("local", [
    "SRS0", "SRS0=", "SRS0=AAAAAAAA=AB=sender.example=joe", "SRS0=====", "SRS1=AAAAAAAA=first.example==x", "SRS1=AAAAAAAA", "SRS0=AAAA=AB=c", "joe", "SRS2=a=b=c=d",
    "SRS0=ÄÄ=AB=a.example=joe"])
def test_address_not_made_here_is_told(local: str) -> None:
    with pytest.raises(BadSrs):
        srs().reverse(Address(local, "srs.example.test"), START_AT)


@settings(max_examples=80)
@given(st.text("abcXYZ019=+-._ @\"\\ä%!", min_size=1, max_size=30), st.integers(0, 5000))
def test_every_local_part_comes_back(mailbox: str, day: int) -> None:
    try:
        sender = Address.make(mailbox, "sender.example")
    except ValueError:
        return
    now = day * DAY_S
    try:
        made = srs().forward(sender, now)
    except ValueError:  # longer than a local part may be
        assert len(str(sender)) > 30
        return
    back = srs().reverse(Address.parse(str(made)), now)
    if not mailbox.upper().startswith("SRS"):
        assert back == sender


@settings(max_examples=80)
@given(st.integers(5, 40), st.sampled_from("ABCZ=09"))
def test_changed_address_is_not_taken(place: int, char: str) -> None:
    made = srs().forward(JOE, START_AT).local
    place %= len(made)
    changed = made[:place] + char + made[place + 1:]
    if changed.lower() != made.lower():
        with pytest.raises(BadSrs):
            srs().reverse(Address(changed, "srs.example.test"), START_AT)


# --- the plugin -----------------------------------------------------------------------------------------------------

GIVEN: dict[str, dict[str, Any]] = {
    "transport:mailbox": {"type": "discard"},
    "domains": {"local": "example.test", "relay_to": "backup.example"}, "plugins": {"enable": "forward"}, "plugin:forward": {"secret": "a-secret-of-good-length"},
    "transport:out": {"type": "relay", "host": "192.0.2.1"}, "transport:other": {"type": "relay", "host": "192.0.2.2"}, "transport:sent": {"type": "forward"},
    "route": {"*": "out", "special.example": "other", ".above.example": "other", "one@else.example": "other"}}


class Kept:
    """Stands for the transport that delivers."""

    concurrency = 1

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str], bytes]] = []

    def next_hop(self, address: Address) -> str:
        return address.host

    def deliver(self, delivery: Delivery) -> dict[int, gmta.Outcome]:
        self.seen.append((str(delivery.envelope.sender), [str(one.address) for one in delivery.recipients], delivery.message.header))
        return {one.number: gmta.delivered() for one in delivery.recipients}


@pytest.fixture
def plugin() -> Plugin:
    services = make_services(GIVEN, clock=FakeClock())
    settings_of = services.config.validate(__import__("gmta_plugins.forward", fromlist=["Config"]).Config, services.config.plugin["forward"])
    return Plugin(settings_of, services)


def state(number: int, address: str, original: str) -> RecipientState:
    return RecipientState(number, Address.parse(address), original)


@pytest.mark.parametrize(("address", "original", "route"), [
    ("joe@far.example", "alias@example.test", "sent"), ("joe@far.example", "Postmaster", "sent"), ("joe@far.example", "joe@far.example", None), ("joe@far.example", "", None),
    ("joe@example.test", "alias@example.test", None), ("joe@backup.example", "alias@example.test", None), ("joe@special.example", "alias@example.test", None),
    ("joe@x.above.example", "alias@example.test", None), ("one@else.example", "alias@example.test", None), ("two@else.example", "alias@example.test", "sent"),
    ("joe@sender.example", "SRS0=a=b=c=d@mx.example.test", None)])
def test_what_is_forwarded(plugin: Plugin, address: str, original: str, route: str | None) -> None:
    assert plugin.get_route(make_envelope(), state(0, address, original)) == route


def test_transport_rewrites_the_sender_for_delivery_alone(plugin: Plugin) -> None:
    kept = Kept()
    plugin.on_worker_started(SimpleNamespace(plugins=SimpleNamespace(transports={"out": kept})))
    transport = plugin.get_transports(None)["forward"]("sent", plugin.get_transports(None)["forward"].Config(), plugin._services)
    envelope = make_envelope("joe@sender.example")
    envelope.recipients = [state(0, "a@far.example", "one@example.test"), state(1, "b@far.example", "one@example.test"), state(2, "c@far.example", "two@example.test")]
    assert transport.next_hop(Address.parse("a@far.example")) == "far.example"
    outcomes = transport.deliver(Delivery(envelope, envelope.recipients, make_message(), "sent", "far.example"))
    assert {number: outcome.status for number, outcome in outcomes.items()} == dict.fromkeys(range(3), Status.DELIVERED)
    assert str(envelope.sender) == "joe@sender.example"
    (sender, first, header), (_, second, other) = kept.seen
    assert sender.startswith("SRS0=") and sender.endswith("@mx.example.test")
    assert first == ["a@far.example", "b@far.example"] and second == ["c@far.example"]
    assert header.startswith(b"Delivered-To: one@example.test\r\n") and b"one@example.test" not in other


@pytest.mark.parametrize("sender", ["", "joe@example.test", "SRS0=x=y=z=a@mx.example.test"])
def test_senders_that_stay(plugin: Plugin, sender: str) -> None:
    assert str(plugin.sender(Address.parse(sender))) == sender


def rcpt(plugin: Plugin, sender: Address, recipient: Address) -> gmta.Verdict | None:
    transaction = make_transaction()
    transaction.sender = sender
    return plugin.permit_rcpt(make_session(), transaction, Recipient(recipient))


def test_reports_go_to_the_true_sender_and_nothing_else_is_relayed(plugin: Plugin) -> None:
    ours = plugin.sender(JOE)
    verdict = rcpt(plugin, NULL, ours)
    assert verdict is not None and verdict.kind is Kind.ACCEPT and verdict.replace == (JOE,)
    for sender, recipient, code in ((JOE, ours, "5.7.1"), (NULL, Address("SRS0=AAAAAAAA=AB=victim.example=joe", "mx.example.test"), "5.1.1")):
        verdict = rcpt(plugin, sender, recipient)
        assert verdict is not None and verdict.kind is Kind.REJECT and verdict.reply.enhanced == code
    assert rcpt(plugin, NULL, Address("joe", "mx.example.test")) is None
    assert rcpt(plugin, NULL, Address(ours.local, "example.test")) is None


@pytest.mark.parametrize("sender", [f"bounces+{'x' * 50}@sender.example", "joe@[192.0.2.9]"])
def test_sender_that_is_too_long_or_odd_comes_back_too(plugin: Plugin, sender: str) -> None:
    ours = plugin.sender(Address.parse(sender))
    assert len(ours.local) <= 64 and ours.domain == "mx.example.test"
    verdict = rcpt(plugin, NULL, Address.parse(str(ours).lower()))
    assert verdict is not None and verdict.replace == (Address.parse(sender),)
    verdict = rcpt(plugin, NULL, Address("SRSK=ABCDEFGHABCDEFGH", "mx.example.test"))
    assert verdict is not None and verdict.kind is Kind.REJECT


def test_loop_is_refused_for_the_recipient_that_is_in_it(plugin: Plugin) -> None:
    transaction = make_transaction()
    transaction.recipients = [Recipient(Address.parse(f"{name}@far.example"), original=Address.parse(f"{name}@example.test")) for name in ("one", "two")]
    assert plugin.check_message(make_session(), transaction, make_message()) is None
    verdicts = plugin.check_message(make_session(), transaction, make_message("Delivered-To: ONE@example.test\nFrom: a@b.example\n\nx\n"))
    assert verdicts is not None and [str(one.address) for one in verdicts] == ["one@far.example"]
    assert verdicts[transaction.recipients[0]].reply.enhanced == "5.4.6"


@pytest.mark.parametrize(("section", "key", "value", "told"), [
    ("plugin:forward", "secret", "short", "16 characters"), ("plugin:forward", "secret", "", "secret"), ("transport:sent", "via", "sent", "via"),
    ("transport:sent", "via", "nowhere", "via"), ("transport:sent", "type", "relay", "type = forward"), ("plugins", "enable", "", "enable")])
def test_mistakes_are_told_at_the_start(section: str, key: str, value: str, told: str) -> None:
    given = {name: dict(keys) for name, keys in GIVEN.items()}
    given[section][key] = value
    if section == "transport:sent" and key == "type":
        given[section]["host"] = "192.0.2.3"
    services = make_services(given)
    with pytest.raises(ConfigError, match=told):
        PluginManager(services.config, services, services.log)


def test_configuration_as_documented_starts() -> None:
    services = make_services(make_config(GIVEN))
    manager = PluginManager(services.config, services, services.log)
    assert "sent" in manager.transports
    manager.close()
