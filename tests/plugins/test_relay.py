"""The relay and lmtp transports against scripted hosts on loopback: outcomes, connections, fail-over, limits, TLS and AUTH."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest

from gmta.config import ConfigError
from gmta.mail.address import Address
from gmta.mail.verdict import Status
from gmta.smtp import sasl_client
from gmta.smtp.data import stuff
from gmta.testing import make_services
from gmta.testing.authority import Authority
from gmta.testing.peer import Peer
from gmta.testing.zone import Zone
from gmta_plugins.relay import Lmtp, Relay, split_host
from tests.sending import GREET, RAW, Out, delivery

DELIVERED, DEFERRED, FAILED = Status.DELIVERED, Status.DEFERRED, Status.FAILED

@pytest.fixture
def make() -> Iterator[Callable[..., Out]]:
    made: list[Out] = []

    def one(*hosts: str, **keys: Any) -> Out:
        made.append(Out(*hosts, **keys))
        return made[-1]

    yield one
    for out in made:
        out.transport.close()


@pytest.fixture
def host() -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def one(*scripts: str, **facts: Any) -> Peer:
        made.append(Peer(*scripts, **facts))
        return made[-1]

    yield one
    for peer in made:
        peer.close()


Make = Callable[..., Out]
Host = Callable[..., Peer]
KEYWORDS = [["PIPELINING", "8BITMIME"], ["8BITMIME"], ["PIPELINING", "CHUNKING", "8BITMIME"], ["CHUNKING", "8BITMIME"], []]


def statuses(outcomes: list[Any]) -> list[Status]:
    return [outcome.status for outcome in outcomes]


# --- outcomes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 50_000, 700_000])
@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("lmtp", [False, True])
def test_an_outcome_a_recipient_and_the_octets_as_they_are(make: Make, host: Host, keywords: list[str], size: int, lmtp: bool) -> None:
    peer = host(keywords=keywords, lmtp=lmtp, replies={"RCPT TO:<bad": "550 5.1.1 unknown user"})
    out = make(peer.address, kind=Lmtp if lmtp else Relay)
    raw = RAW + (b"." + b"x" * 70 + b"\r\n") * (size // 73)
    for _ in range(2):
        outcomes = out.send("x", "bad", "y", raw=raw)
        assert statuses(outcomes) == [DELIVERED, FAILED, DELIVERED]
        assert outcomes[1].reply.enhanced == "5.1.1" and peer.address in outcomes[1].remote
        assert outcomes[0].relayed and not outcomes[1].relayed  # it offers no DSN
    assert peer.messages == [raw, raw] and peer.connections == 1


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize(("replies", "wanted"), [
    ({"RCPT": "550 5.1.1 no"}, (FAILED, "550 5.1.1 no")), ({"RCPT": "450 4.2.1 later"}, (DEFERRED, "450 4.2.1 later")),
    ({"MAIL": "550 5.7.1 not you"}, (FAILED, "550 5.7.1 not you")), ({"MAIL": "451 4.3.0 later"}, (DEFERRED, "451 4.3.0 later")),
    ({"final": "554 5.7.1 spam"}, (FAILED, "554 5.7.1 spam")), ({"final": "452 4.3.1 full"}, (DEFERRED, "452 4.3.1 full")),
    ({"DATA": "451 4.3.0 later", "BDAT": "451 4.3.0 later"}, (DEFERRED, "451 4.3.0 later")),
])
def test_a_refusal_leaves_the_connection_usable(make: Make, host: Host, keywords: list[str], replies: dict[str, str],
                                                wanted: tuple[Status, str]) -> None:
    peer = host(keywords=keywords, replies=replies)
    out = make(peer.address)
    if "BDAT" in replies and "CHUNKING" in keywords:
        replies = {"final": replies["BDAT"]}  # a host that has read the chunk
        peer.replies = replies
    outcome = out.send("x")[0]
    assert (outcome.status, str(outcome.reply)) == wanted and outcome.recipient_fault
    del peer.replies[next(iter(peer.replies))]
    peer.replies.clear()
    assert statuses(out.send("x")) == [DELIVERED]
    assert peer.connections == 1 and len(peer.messages) in (1, 2)


def test_one_write_and_one_round_trip_where_the_remote_takes_that(make: Make, host: Host) -> None:
    peer = host("""
        S: 220 x
        C: ^EHLO
        S: 250-x
        S: 250-PIPELINING
        S: 250 CHUNKING
        C: ^MAIL FROM:<a@b.example>$
        C: ^RCPT TO:<x@c.example>$
        C: ^RCPT TO:<y@c.example>$
        C: ^BDAT 37 LAST$
        MESSAGE
        S: 250 ok
        S: 550 5.1.1 no
        S: 250 ok
        S: 250 taken
        C: ^QUIT$
    """)
    out = make(peer.address)
    raw = b"x" * 37
    assert statuses(out.send("x", "y", raw=raw)) == [FAILED, DELIVERED]
    assert peer.messages == [raw]


def test_chunking_can_be_switched_off_and_is_dropped_where_a_host_does_not_know_bdat(make: Make, host: Host) -> None:
    peer = host(keywords=["PIPELINING", "CHUNKING"])
    assert statuses(make(peer.address, chunking="no").send()) == [DELIVERED]
    assert "DATA" in peer.commands()
    peer = host("""
        S: 220 x
        C: ^EHLO
        S: 250-x
        S: 250-PIPELINING
        S: 250 CHUNKING
        C: ^MAIL
        S: 250 ok
        C: ^RCPT
        S: 250 ok
        C: ^BDAT
        S: 502 5.5.1 not implemented
        END
    """, keywords=["PIPELINING", "CHUNKING"])
    out = make(peer.address)
    assert statuses(out.send()) == [DELIVERED]  # at once, on another connection
    out.transport.close()
    assert statuses(out.send()) == [DELIVERED] and [commands[3] for commands in map(peer.commands, (1, 2))] == ["DATA", "DATA"]


def test_what_the_remote_can_not_take_fails_at_once(make: Make, host: Host) -> None:
    def enhanced(*keywords: str, raw: bytes = RAW, **facts: Any) -> str | None:
        peer = host(keywords=keywords)
        found: str | None = make(peer.address).send(raw=raw, **facts)[0].reply.enhanced
        assert not peer.messages
        return found

    assert enhanced("SIZE 10") == "5.3.4"
    assert enhanced("PIPELINING", raw="Subject: x\r\n\r\nä\r\n".encode(), body="8BITMIME") == "5.6.3"
    assert enhanced("PIPELINING", raw="Subject: x\r\n\r\nä\r\n".encode()) == "5.6.3"  # whatever was declared
    assert enhanced("PIPELINING", raw="Subject: ä\r\n\r\nx\r\n".encode(), smtputf8=True) == "5.6.3"
    assert enhanced("8BITMIME", raw="Subject: ä\r\n\r\nx\r\n".encode(), smtputf8=True) == "5.6.7"
    assert enhanced("8BITMIME", "CHUNKING", body="BINARYMIME") == "5.6.3"


def test_what_is_declared_is_what_is_in_it(make: Make, host: Host) -> None:
    def mail(raw: bytes, *keywords: str, **facts: Any) -> str:
        peer = host(keywords=["SIZE", *keywords])
        assert statuses(make(peer.address).send(raw=raw, **facts)) == [DELIVERED]
        return peer.commands()[1]

    eight = "Subject: x\r\n\r\nä\r\n".encode()
    assert mail(RAW, "8BITMIME").endswith(f"SIZE={len(RAW)}")
    assert mail(eight, "8BITMIME").endswith("BODY=8BITMIME") and mail(RAW, "8BITMIME", body="8BITMIME").endswith("BODY=8BITMIME")
    assert "BODY" not in mail(RAW, body="8BITMIME")
    assert mail(eight + b"\0", "8BITMIME", "CHUNKING", "BINARYMIME", body="BINARYMIME").endswith("BODY=BINARYMIME")


def test_domains_go_in_a_labels_where_utf8_is_not_offered(make: Make, host: Host) -> None:
    peer = host(keywords=["8BITMIME"])
    out = make(peer.address)
    assert statuses(out.send("x@bücher.example", sender="a@bücher.example", smtputf8=True)) == [DELIVERED]
    assert peer.commands()[1:3] == ["MAIL FROM:<a@xn--bcher-kva.example>", "RCPT TO:<x@xn--bcher-kva.example>"]
    assert out.send("ü@bücher.example", smtputf8=True)[0].reply.enhanced == "5.6.7"
    peer = host(keywords=["8BITMIME", "SMTPUTF8"])
    assert statuses(make(peer.address).send("ü@bücher.example", smtputf8=True)) == [DELIVERED]
    assert peer.commands()[1:3] == ["MAIL FROM:<a@b.example> SMTPUTF8", "RCPT TO:<ü@bücher.example>"]


def test_dsn_parameters_go_on(make: Make, host: Host) -> None:
    for keywords in (["PIPELINING", "DSN"], ["PIPELINING"]):
        peer = host(keywords=keywords)
        job = delivery("x", "y", ret="HDRS", envid="e1")
        job.recipients[0].notify = frozenset({"SUCCESS", "FAILURE"})
        job.recipients[0].orcpt, job.recipients[1].orcpt = "rfc822;o+x@c.example", "utf-8;ü+x@c.example"
        outcome = make(peer.address).transport.deliver(job)[0]
        sent = " ".join(peer.commands())
        assert ("RET=HDRS" in sent) == ("ENVID=e1" in sent) == ("NOTIFY=FAILURE,SUCCESS" in sent) == ("DSN" in keywords)
        assert ("ORCPT=rfc822;o+2Bx@c.example" in sent) == (r"ORCPT=utf-8;\x{FC}\x{2B}x@c.example" in sent) == ("DSN" in keywords)
        assert outcome.relayed == ("DSN" not in keywords)


def test_lmtp_answers_each_recipient(make: Make, host: Host) -> None:
    for keywords in (["PIPELINING"], ["PIPELINING", "CHUNKING"], []):
        peer = host(lmtp=True, keywords=keywords, replies={"final1": "452 4.2.2 full"})
        assert statuses(make(peer.address, kind=Lmtp).send("x", "y", "z")) == [DELIVERED, DEFERRED, DELIVERED]
        assert peer.commands()[0] == "LHLO mx.example.test"


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", KEYWORDS[:4])
@pytest.mark.parametrize("refusal", ["452 4.5.3 too many recipients", "552 too many recipients", "452 too many"])
def test_too_many_recipients_are_sent_in_another_transaction(make: Make, host: Host, keywords: list[str], refusal: str) -> None:
    peer = host(keywords=keywords, rcpt_max=2, replies={"too many": refusal, "RCPT TO:<bad": "452 4.2.2 full"})
    assert statuses(make(peer.address).send("a", "bad", "c", "d", "e", "f")) == [DELIVERED, DEFERRED, *[DELIVERED] * 4]
    assert len(peer.messages) == 3 and peer.connections == 1
    assert [line[9:10] for line in peer.commands() if line.startswith("RCPT")] == list("abcdefdeff")


def test_one_that_takes_none_has_not_too_many(make: Make, host: Host) -> None:
    peer = host(replies={"RCPT": "552 too many recipients"})
    outcomes = make(peer.address).send("a", "b")
    assert statuses(outcomes) == [DEFERRED] * 2 and outcomes[0].reply.code == 452
    assert len([line for line in peer.commands() if line.startswith("MAIL")]) == 1


def test_limits_that_a_host_states_are_kept(make: Make, host: Host) -> None:
    peer = host(keywords=["PIPELINING", "LIMITS RCPTMAX=2 MAILMAX=2"])
    assert statuses(make(peer.address).send("a", "b", "c", "d", "e")) == [DELIVERED] * 5
    assert [[line[:4] for line in peer.commands(number) if line[:4] in ("MAIL", "RCPT", "QUIT")] for number in (0, 1)] == [
        ["MAIL", "RCPT", "RCPT", "MAIL", "RCPT", "RCPT", "QUIT"], ["MAIL", "RCPT"]]
    peer = host(keywords=["PIPELINING", "LIMITS RCPTDOMAINMAX=1"])
    assert statuses(make(peer.address).send("a@a.example", "b@b.example", "c@A.example", "d@d.example")) == [DELIVERED] * 4
    assert [line[9:10] for line in peer.commands() if line.startswith("RCPT")] == list("acbd") and len(peer.messages) == 3


def test_a_connection_ends_after_so_many_messages(make: Make, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.deliver.client.MESSAGES_A_CONNECTION", 2)
    peer = host()
    out = make(peer.address)
    for _ in range(3):
        assert statuses(out.send()) == [DELIVERED]
    assert peer.connections == 2 and peer.commands(0)[-1] == "QUIT"


# --- connections ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", KEYWORDS[:4])
@pytest.mark.parametrize("ending", ["DROP", "S: 421 4.3.2 enough"])
def test_a_kept_connection_that_ends_is_replaced_at_once(make: Make, host: Host, keywords: list[str], ending: str) -> None:
    """By the next message: closed while it idled, or in the place of the next answer."""
    greet = "S: 220 x\nC: EHLO\n" + "".join(f"S: 250-{word}\n" for word in ["x", *keywords]) + "S: 250 HELP\n"
    data = ["BDAT", "MESSAGE"] if "CHUNKING" in keywords else ["DATA", "S: 354 go", "MESSAGE"]
    message = "C: MAIL\nS: 250 ok\nC: RCPT\nS: 250 ok\n" + "\n".join([f"C: {data[0]}", *data[1:], "S: 250 taken"]) + "\n"
    peer = host(greet + message + "C: MAIL\n" + ending, keywords=keywords)
    out = make(peer.address)
    assert statuses(out.send() + out.send()) == [DELIVERED, DELIVERED]
    assert peer.connections == 2 and len(peer.messages) == 2 and out.tried == (["421 4.3.2 enough"] if "421" in ending else [])


def test_a_kept_connection_that_was_closed_is_not_used(make: Make, host: Host) -> None:
    peer = host(GREET + "C: MAIL\nS: 250 ok\nC: RCPT\nS: 250 ok\nC: DATA\nS: 354 go\nMESSAGE\nS: 250 taken\nS: 421 4.4.2 idle\nDROP")
    out = make(peer.address)
    assert statuses(out.send()) == [DELIVERED]
    wait_for(lambda: peer.sessions[0].ended)
    assert statuses(out.send()) == [DELIVERED] and len([line for line in peer.commands(0) if line.startswith("MAIL")]) == 1


def test_an_idle_connection_ends_with_quit(make: Make, host: Host) -> None:
    peer = host()
    out = make(peer.address, idle_timeout="0.02s")
    assert statuses(out.send()) == [DELIVERED]
    out.services.clock.advance(1)
    wait_for(lambda: peer.sessions[0].ended)
    assert peer.commands()[-1] == "QUIT"
    out = make(peer.address, idle_timeout="0s")
    out.send()
    wait_for(lambda: peer.sessions[1].ended)
    assert peer.commands()[-1] == "QUIT"


def wait_for(ready: Callable[[], bool]) -> None:
    with gevent.Timeout(10):
        while not ready():
            gevent.sleep(0.001)


SILENT = {"greeting": "", "ehlo": "S: 220 x\nC: EHLO\n", "mail": GREET + "C: MAIL\nC: RCPT\nC: DATA\n",
          "rcpt": GREET + "C: MAIL\nC: RCPT\nC: DATA\nS: 250 ok\n", "data": GREET + "C: MAIL\nC: RCPT\nC: DATA\nS: 250 ok\nS: 250 ok\n",
          "final": GREET + "C: MAIL\nC: RCPT\nC: DATA\nS: 250 ok\nS: 250 ok\nS: 354 go\nMESSAGE\n"}


@pytest.mark.parametrize("where", SILENT)
@pytest.mark.parametrize("end", ["HANG", "DROP", "S: hello\nHANG", "S: 421 4.3.2 no\nHANG", "S: 250-\nDROP"])
def test_remotes_that_fall_silent_or_mad(make: Make, host: Host, where: str, end: str) -> None:
    """At any place: the next host gets it, unless the message may have been taken."""
    script = SILENT[where] + end
    peer, other = host(script, script), host()
    short = dict.fromkeys(("greeting_timeout", "command_timeout", "data_timeout"), "0.05s" if end == "HANG" else "30s")
    out = make(peer.address, **short)
    outcome = out.send()[0]
    assert outcome.status is DEFERRED and not outcome.recipient_fault and peer.address in outcome.remote
    assert outcome.reply.enhanced in ("4.4.2", "4.5.0", "4.3.2")
    outcome = make(peer.address, other.address, **short).send()[0]
    assert outcome.status is (DEFERRED if where == "final" and "421" not in end else DELIVERED)
    assert len(other.messages) == (outcome.status is DELIVERED)


def test_an_attempt_has_an_end(make: Make, host: Host) -> None:
    peer, other = host("S: 220 x\nC: EHLO\nS: 250-x\nHANG"), host()
    out = make(peer.address, other.address, attempt_timeout="0.3s")
    outcome = out.send()[0]
    assert outcome.status is DEFERRED and "Timeout" in outcome.reply.text and not other.sessions


def test_quit_is_sent_wherever_somebody_listens(make: Make, host: Host) -> None:
    for script in ("S: 554 5.7.1 blocked\nC: ^QUIT", "S: 450 4.3.2 later\nC: ^QUIT", "S: 220 x\nC: EHLO\nS: 500 no\nC: HELO\nS: 500 no\nC: ^QUIT"):
        peer = host(script)
        make(peer.address).send()
        wait_for(lambda session=peer.sessions[0]: session.ended)  # type: ignore[misc]
        peer.check()
    peer = host("S: 421 4.3.2 closing\nEND")
    make(peer.address).send()
    wait_for(lambda: peer.sessions[0].ended)
    peer.check()
    assert peer.commands() == []


def test_next_host_where_one_is_dead_busy_or_unwilling(make: Make, host: Host) -> None:
    dead, busy, unwilling, good = host("REFUSE"), host(replies={"greeting": "421 4.3.2 busy"}), host(replies={"greeting": "554 5.7.1 no"}), host()
    out = make(dead.address, busy.address, unwilling.address, good.address)
    assert statuses(out.send()) == [DELIVERED]
    assert [text[:9] for text in out.tried] == ["451 4.4.1", "421 4.3.2", "554 5.7.1"]
    out = make(unwilling.address, busy.address, dead.address)
    outcome = out.send()[0]
    assert outcome.status is DEFERRED and not outcome.recipient_fault and "4.4.1" in str(outcome.reply) and len(out.tried) == 2


def test_a_smart_host_that_does_not_want_us_is_no_fault_of_the_sender(make: Make, host: Host) -> None:
    outcome = make(host(replies={"greeting": "554 5.7.1 no"}).address).send()[0]
    assert outcome.status is DEFERRED and "554 5.7.1 no" in outcome.reply.text


def test_a_dead_address_is_not_waited_for_again(make: Make, host: Host) -> None:
    dead, good = host("REFUSE"), host()
    out = make(dead.address, good.address, idle_timeout="0s")
    out.send()
    out.send()
    assert len(out.tried) == 1 and len(good.messages) == 2


def test_a_host_that_does_not_greet_is_as_good_as_dead(make: Make, host: Host) -> None:
    silent, good = host("HANG", "HANG"), host()
    out = make(silent.address, good.address, idle_timeout="0s", greeting_timeout="0.05s")
    assert statuses(out.send() + out.send()) == [DELIVERED] * 2 and silent.connections == 1


@pytest.mark.parametrize("keywords", KEYWORDS[:4])
def test_when_everybody_is_answered_nobody_else_is_asked(make: Make, host: Host, keywords: list[str]) -> None:
    peer = host(keywords=keywords, replies={"RCPT": "550 5.1.1 no", "DATA": None, "no recipients": None, "RSET": None})
    other = host()
    out = make(peer.address, other.address)
    assert statuses(out.send("x", "y")) == [FAILED, FAILED] and not other.sessions
    assert statuses(out.send("x", "y")) == [FAILED, FAILED] and not other.sessions


def test_connections_come_from_our_own_address(make: Make, host: Host) -> None:
    peer = host()
    out = make(peer.address, source="127.0.0.9 ::1", helo="out.example")
    seen: list[str] = []
    original = peer._socket.accept

    def accept() -> Any:
        sock, address = original()
        seen.append(address[0])
        return sock, address

    peer._socket = type("Listening", (), {"accept": staticmethod(accept), "close": peer._socket.close, "shutdown": peer._socket.shutdown})()
    out.send()
    out.transport.close()
    out.send()
    assert "127.0.0.9" in seen and peer.commands()[0] == "EHLO out.example"
    for wrong in ("127.0.0.1 127.0.0.2", "host.example"):
        with pytest.raises(ConfigError, match="IP addresses"):
            make(peer.address, source=wrong)


# --- through MX -----------------------------------------------------------------------------------------------------


def zone(**hosts: str) -> dict[str, Any]:
    """c.example with MX hosts in that order, at these addresses."""
    return {"c.example": {"MX": [(10 * number, f"{name}.example") for number, name in enumerate(hosts, 1)]},
            **{f"{name}.example": {"A": address} for name, address in hosts.items()}}


def test_the_next_mx_host_has_its_turn(make: Make, host: Host) -> None:
    good = host(host="127.0.0.3")
    for replies, tried in (({"greeting": "554 5.7.1 blocked"}, "554 5.7.1 blocked"), ({"EHLO": "421 4.7.0 no"}, "421 4.7.0 no"),
                           ({"MAIL": "452 4.3.1 full"}, "452 4.3.1 full"), ({"RCPT": "421 4.7.0 no"}, "421 4.7.0 no"),
                           ({"final": "421 4.3.2 going"}, "421 4.3.2 going")):
        bad = host(replies=replies, host="127.0.0.2", port=good.port)
        out = make(zone=zone(bad="127.0.0.2", good="127.0.0.3"), port=good.port, allow_loopback="yes")
        outcome = out.send(next_hop="c.example")[0]
        assert outcome.status is DELIVERED and outcome.remote == f"good.example[127.0.0.3]:{good.port}" and out.tried == [tried]
        out.transport.close()
        bad.close()


def test_what_a_host_says_about_recipients_stands(make: Make, host: Host) -> None:
    good = host(host="127.0.0.3")
    bad = host(replies={"RCPT TO:<x": "450 4.2.0 greylisted", "RCPT TO:<y": "421 4.7.0 closing"}, host="127.0.0.2", port=good.port, keywords=[])
    out = make(zone=zone(bad="127.0.0.2", good="127.0.0.3"), port=good.port, allow_loopback="yes")
    outcomes = out.send("x", "y", "z", next_hop="c.example")
    assert statuses(outcomes) == [DELIVERED] * 3 or statuses(outcomes) == [DEFERRED, DELIVERED, DELIVERED]
    assert [line for line in bad.commands() if line.startswith("RCPT")] == ["RCPT TO:<x@c.example>", "RCPT TO:<y@c.example>"]


def test_where_no_host_wants_us_for_good_the_sender_hears_it(make: Make, host: Host) -> None:
    one = host(replies={"greeting": "554 5.7.1 blocked"}, host="127.0.0.2")
    two = host(replies={"greeting": "521 5.3.2 no mail here"}, host="127.0.0.3", port=one.port)
    keys = {"zone": zone(one="127.0.0.2", two="127.0.0.3"), "port": one.port, "allow_loopback": "yes"}
    outcome = make(**keys).send(next_hop="c.example")[0]
    assert outcome.status is FAILED and str(outcome.reply) == "554 5.7.1 blocked"
    two.replies["greeting"] = "421 4.3.2 later"
    assert make(**keys).send(next_hop="c.example")[0].status is DEFERRED


def test_domains_without_hosts(make: Make) -> None:
    out = make(zone={"c.example": {"MX": (0, "")}})
    assert str(out.send(next_hop="c.example")[0].reply).startswith("556 5.1.10")
    outcome = out.send(next_hop="gone.example")[0]
    assert outcome.status is FAILED and outcome.reply.enhanced == "5.1.2" and outcome.recipient_fault


def test_lanes_and_sections() -> None:
    services = make_services(resolver=Zone({}))
    assert Relay("out", Relay.Config(), services).next_hop(Address("x", "C.example")) == "c.example"
    assert Relay("out", Relay.Config(host=["127.0.0.1:25"]), services).next_hop(Address("x", "C.example")) == ""
    with pytest.raises(ValueError, match="lmtp has no MX"):
        Lmtp("out", Lmtp.Config(), services)
    with pytest.raises(ValueError, match="not for whatever MX"):
        Relay("out", Relay.Config(username="me", password="secret"), services)


def test_every_key_is_documented() -> None:
    docs = (Path(__file__).parents[2] / "docs/transports.md").read_text()
    for key in set(Relay.Config.model_fields) - {"timeout", "on_error"}:
        assert f"`{key}`" in docs, key


@pytest.mark.parametrize(("text", "parts"), [("h", ("h", 25)), ("h:26", ("h", 26)), ("[::1]:26", ("::1", 26)), ("::1", ("::1", 25))])
def test_split_host(text: str, parts: tuple[str, int]) -> None:
    assert split_host(text, 25) == parts


@pytest.mark.parametrize("text", ["", ":25", "h:0", "h:x", "[::1]:99999"])
def test_split_host_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected ADDRESS"):
        split_host(text, 25)


# --- AUTH -----------------------------------------------------------------------------------------------------------


def encoded(text: str) -> str:
    return re.escape(base64.b64encode(text.encode()).decode())


AUTH = "S: 220 x\nC: EHLO\nS: 250-x\nS: 250 AUTH {}\n"


@pytest.mark.parametrize(("offered", "exchange"), [
    ("LOGIN PLAIN", f"C: ^AUTH PLAIN {encoded(chr(0) + 'me' + chr(0) + 'secret')}$"),
    ("LOGIN", f"C: ^AUTH LOGIN$\nS: 334 VXNlcm5hbWU6\nC: ^{encoded('me')}$\nS: 334 UGFzc3dvcmQ6\nC: ^{encoded('secret')}$"),
])
def test_credentials_are_given_to_hosts_of_this_machine(make: Make, host: Host, offered: str, exchange: str) -> None:
    peer = host(AUTH.format(offered) + exchange + "\nS: 235 2.7.0 ok\nPLAY")
    assert statuses(make(peer.address, username="me", password="secret").send()) == [DELIVERED]
    peer.check()


def test_challenges_are_answered_off_the_loop(make: Make, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much work a challenge is, the server says (SCRAM's iterations): others are served meanwhile."""
    threads: list[int] = []
    answer = sasl_client.Login.answer
    monkeypatch.setattr(sasl_client.Login, "answer", lambda *words: threads.append(threading.get_ident()) or answer(*words))
    peer = host(AUTH.format("LOGIN") + "C: ^AUTH LOGIN$\nS: 334 VXNlcm5hbWU6\nC: \nS: 334 UGFzc3dvcmQ6\nC: \nS: 235 2.7.0 ok\nPLAY")
    assert statuses(make(peer.address, username="me", password="secret").send()) == [DELIVERED]
    assert len(threads) == 2 and threading.get_ident() not in threads


@pytest.mark.parametrize(("script", "said"), [
    (AUTH.format("GSSAPI") + "C: ^QUIT$", "no AUTH mechanism"), ("S: 220 x\nC: EHLO\nS: 250 x\nC: ^QUIT$", "no AUTH mechanism"),
    (AUTH.format("PLAIN") + "C: ^AUTH PLAIN\nS: 535 5.7.8 wrong\nC: ^QUIT$", "535 5.7.8 wrong"),
    (AUTH.format("PLAIN") + "C: ^AUTH PLAIN\nS: 334 x\nC: ^\\*$\nS: 501 5.7.0 cancelled\nC: ^QUIT$", "broken off"),
    (AUTH.format("SCRAM-SHA-256") + "C: ^AUTH SCRAM-SHA-256 \nS: 235 2.7.0 come in\nC: ^QUIT$", "235"),  # without proof
    (AUTH.format("LOGIN") + "C: ^AUTH LOGIN\nS: 235 2.7.0 come in\nC: ^QUIT$", "235"),
])
def test_without_authentication_the_mail_waits(make: Make, host: Host, script: str, said: str) -> None:
    peer = host(script)
    outcome = make(peer.address, username="me", password="secret").send()[0]
    assert outcome.status is DEFERRED and not outcome.recipient_fault and said in outcome.reply.text
    wait_for(lambda: peer.sessions[0].ended)
    peer.check()


# --- TLS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def relay_to(make: Make, peer: Peer, authority: Authority, *, core: str = "", records: dict[str, Any] | None = None, **keys: Any) -> Out:
    """A transport for which `peer` is mx.example.org, the MX host of c.example; DNS is signed."""
    zone = {".": {"SOA": ". . 1 1 1 1 1", "ad": True}, "c.example": {"MX": (10, "mx.example.org"), "ad": True},
            "mx.example.org": {"A": peer.host, "ad": True}, **(records or {})}
    return make(zone=zone, core=core, port=peer.port, allow_loopback="yes", ca_file=authority.file, **keys)


def test_opportunistic_tls_takes_any_certificate_and_says_so(make: Make, host: Host, authority: Authority) -> None:
    peer = host(tls=authority.issue("other.example", days=-1))
    outcome = relay_to(make, peer, authority).send(next_hop="c.example")[0]
    assert outcome.status is DELIVERED and re.fullmatch(r"TLSv1\.[23] [A-Z0-9_-]+ unverified", outcome.tls)
    session = peer.sessions[0]
    assert session.tls and session.server_name == "mx.example.org" and session.commands.count("EHLO mx.example.test") == 2


def test_no_address_is_said_in_sni(make: Make, host: Host, authority: Authority) -> None:
    peer = host(tls=authority.issue("127.0.0.1"))
    assert statuses(make(peer.address).send()) == [DELIVERED] and peer.sessions[0].tls and peer.sessions[0].server_name == ""


NO_TLS = ["S: 220 x\nC: EHLO\nS: 250-x\nS: 250 STARTTLS\nC: ^STARTTLS$\n" + end for end in (
    "S: 220 go\nSTARTTLS garbage", "S: 220 go\nSTARTTLS close", "S: 220 go\nHANG", "S: 220 go\\n250 injected\nSTARTTLS close")]


@pytest.mark.parametrize("script", NO_TLS)
def test_a_handshake_that_fails_goes_on_in_clear_only_where_it_may(make: Make, host: Host, authority: Authority, script: str) -> None:
    peer = host(script)
    out = relay_to(make, peer, authority, command_timeout="0.1s" if "HANG" in script else "300s")
    outcome = out.send(next_hop="c.example")[0]
    assert outcome.status is DELIVERED and outcome.tls == "" and not peer.sessions[1].tls and out.log.of("tls failed")
    assert not any(line.startswith("MAIL") for line in peer.commands(0))
    for keys in ({"tls": "required"}, {"core": "[tls_policy]\n.example = encrypt\n"}):
        peer = host(script)
        out = relay_to(make, peer, authority, command_timeout="0.1s" if "HANG" in script else "300s", **keys)
        outcome = out.send(next_hop="c.example")[0]
        assert outcome.status is DEFERRED and not outcome.recipient_fault and peer.connections == 1


@pytest.mark.parametrize(("script", "clear"), [
    ("S: 220 x\nC: EHLO\nS: 250 x\nPLAY", True), ("S: 220 x\nC: EHLO\nS: 250-x\nS: 250 STARTTLS\nC: STARTTLS\nS: 454 4.7.0 not now\nPLAY", True)])
def test_no_tls_on_offer(make: Make, host: Host, authority: Authority, script: str, clear: bool) -> None:
    peer = host(script)
    assert statuses(relay_to(make, peer, authority).send(next_hop="c.example")) == [DELIVERED] and peer.connections == 1
    peer = host(script)
    outcome = relay_to(make, peer, authority, tls="required").send(next_hop="c.example")[0]
    assert outcome.status is DEFERRED and outcome.reply.enhanced == "4.7.10"
    wait_for(lambda: peer.sessions[0].ended)
    assert peer.commands()[-1] == "QUIT"


def test_tls_off_asks_for_none(make: Make, host: Host, authority: Authority) -> None:
    peer = host(tls=authority.issue("mx.example.org"))
    assert statuses(relay_to(make, peer, authority, tls="off").send(next_hop="c.example")) == [DELIVERED]
    assert "STARTTLS" not in peer.commands()


@pytest.mark.parametrize(("names", "facts", "policy", "status"), [
    (["mx.example.org"], {}, "verify", DELIVERED), (["c.example"], {}, "verify", DELIVERED), (["*.example.org"], {}, "verify", DELIVERED),
    (["other.example"], {}, "verify", DEFERRED), (["mx.example.org"], {"days": -1}, "verify", DEFERRED),
    (["mx.example.org"], {"stranger": True}, "verify", DEFERRED), (["a.mail.example"], {}, "verify .mail.example", DELIVERED),
    (["mx.example.org"], {}, "verify .mail.example", DEFERRED), (["other.example"], {}, "encrypt", DELIVERED)])
def test_what_verify_takes(make: Make, host: Host, authority: Authority, tmp_path: Path, names: list[str], facts: dict[str, Any], policy: str,
                           status: Status) -> None:
    issuer = Authority(tmp_path, "Stranger") if facts.pop("stranger", False) else authority
    peer = host(tls=issuer.issue(*names, **facts))
    outcome = relay_to(make, peer, authority, core=f"[tls_policy]\nc.example = {policy}\n").send(next_hop="c.example")[0]
    assert outcome.status is status and peer.connections == 1 and len(peer.messages) == (status is DELIVERED)
    if policy.startswith("verify"):
        assert outcome.tls.endswith("verified:tls_policy") if status is DELIVERED else outcome.reply.enhanced == "4.7.5"


def test_a_smart_host_is_verified_by_its_name(make: Make, host: Host, authority: Authority) -> None:
    peer = host(tls=authority.issue("smart.example"))
    for policy, status in (("smart.example = verify", DELIVERED), ("smart.example = verify other.example", DEFERRED)):
        out = make(f"smart.example:{peer.port}", zone={"smart.example": {"A": "127.0.0.1"}}, core=f"[tls_policy]\n{policy}\n", ca_file=authority.file)
        assert out.send()[0].status is status
    peer = host(tls=authority.issue("127.0.0.1"))
    out = make(peer.address, core="[tls_policy]\n* = verify\n", ca_file=authority.file)
    assert out.send()[0].tls.endswith("verified:tls_policy")


def test_dane(make: Make, host: Host, authority: Authority) -> None:
    right, wrong = authority.issue("unrelated.example", days=-1), authority.issue("mx.example.org")

    def outcome(shown: Any, record: Any, **changes: Any) -> Any:
        peer = host(tls=shown) if shown is not None else host()
        records = {f"_{peer.port}._tcp.mx.example.org": record} if record else {}
        found = relay_to(make, peer, authority, records=records | changes).send(next_hop="c.example")[0]
        clear = any(line.startswith("MAIL") for session in peer.sessions if not session.tls for line in session.commands)
        return found.status, found.tls.rpartition(" ")[2], clear

    signed = {"TLSA": right.tlsa(), "ad": True}
    assert outcome(right, signed) == (DELIVERED, "verified:dane-ee", False)
    assert outcome(wrong, {"TLSA": wrong.tlsa(2, of=1), "ad": True}) == (DELIVERED, "verified:dane-ta", False)
    assert outcome(right, {"TLSA": right.tlsa(2, of=1), "ad": True})[0] is DEFERRED  # out of date, and not for this host
    assert outcome(wrong, signed) == (DEFERRED, "", False)
    assert outcome(None, signed) == (DEFERRED, "", False)
    assert outcome(right, {"rcode": "SERVFAIL"}) == (DEFERRED, "", False)
    assert outcome(right, {"TLSA": (1, 1, 1, "00" * 32), "ad": True}) == (DELIVERED, "unverified", False)
    assert outcome(None, {"TLSA": (1, 1, 1, "00" * 32), "ad": True}) == (DEFERRED, "", False)
    assert outcome(wrong, signed | {"ad": False}) == (DELIVERED, "unverified", False)
    unsigned = {"mx.example.org": {"A": "127.0.0.1"}}
    assert outcome(wrong, signed, **unsigned) == (DELIVERED, "unverified", False)
    assert outcome(None, signed, **unsigned) == (DELIVERED, "", True)


def test_dane_closes_one_host_and_not_the_next(make: Make, host: Host, authority: Authority) -> None:
    certificate = authority.issue("mx.example.org")
    bad = host(tls=certificate, host="127.0.0.2")
    good = host(tls=certificate, host="127.0.0.3", port=bad.port)
    zone = {".": {"SOA": ". . 1 1 1 1 1", "ad": True}, "c.example": {"MX": [(10, "bad.example"), (15, "dark.example"), (20, "good.example")], "ad": True},
            "bad.example": {"A": "127.0.0.2", "ad": True}, "dark.example": {"A": "127.0.0.4", "ad": True}, "good.example": {"A": "127.0.0.3", "ad": True},
            f"_{bad.port}._tcp.bad.example": {"TLSA": (3, 1, 1, "00" * 32), "ad": True}, f"_{bad.port}._tcp.dark.example": {"rcode": "SERVFAIL"},
            f"_{bad.port}._tcp.good.example": {"TLSA": certificate.tlsa(), "ad": True}}
    out = make(zone=zone, port=bad.port, allow_loopback="yes")
    outcome = out.send(next_hop="c.example")[0]
    assert outcome.status is DELIVERED and good.messages and not bad.messages
    assert ["4.7.5" in text for text in out.tried] == [True, True]


STS_RECORD = {"_mta-sts.c.example": {"TXT": ["v=STSv1; id=1"]}, "_smtp._tls.c.example": {"TXT": ["v=TLSRPTv1; rua=mailto:tls@c.example"]}}


@pytest.mark.parametrize(("mode", "names", "pattern", "status", "verified", "reported"), [
    ("enforce", ["mx.example.org"], "*.example.org", DELIVERED, "verified:mta-sts", ""),
    ("enforce", ["c.example"], "mx.example.org", DEFERRED, "", "certificate-host-mismatch"),
    ("enforce", ["mx.example.org"], "mx.example.net", DEFERRED, "", "validation-failure"),
    ("enforce", [], "mx.example.org", DEFERRED, "", "starttls-not-supported"),
    ("testing", ["mx.example.org"], "mx.example.org", DELIVERED, "verified:mta-sts", ""),
    ("testing", ["c.example"], "mx.example.org", DELIVERED, "unverified", "certificate-host-mismatch"),
    ("testing", ["mx.example.org"], "mx.example.net", DELIVERED, "unverified", "validation-failure"),
    ("testing", [], "mx.example.org", DELIVERED, "", "starttls-not-supported"),
    ("none", ["c.example"], "mx.example.org", DELIVERED, "unverified", ""),
])
def test_mta_sts(make: Make, host: Host, authority: Authority, mode: str, names: list[str], pattern: str, status: Status, verified: str,
                 reported: str) -> None:
    peer = host(tls=authority.issue(*names)) if names else host()
    out = relay_to(make, peer, authority, records=STS_RECORD, core="[tlsrpt]\nsend = yes\n", dane="no")
    assert out.transport._policies._sts is not None
    out.transport._policies._sts._fetch = lambda domain: f"version: STSv1\nmode: {mode}\nmx: {pattern}\nmax_age: 86400\n".encode()
    outcome = out.send(next_hop="c.example")[0]
    assert outcome.status is status and outcome.tls.rpartition(" ")[2] == verified
    counted = [facts for _, facts in out.services.state.scan("tlsrpt-facts:")]
    assert [facts["result"] for facts in counted] == [reported]
    assert counted[0]["policy"]["policy-type"] == ("no-policy-found" if mode == "none" else "sts")


def test_tls_required_no(make: Make, host: Host, authority: Authority) -> None:
    """RFC 8689: what the recipient's domain asks for does not hold for such a message, and for it alone; what the postmaster asks for does."""
    bad = {"TLSA": (3, 1, 1, "00" * 32), "ad": True}
    raw = b"TLS-Required: No\r\n" + RAW
    for shown in (authority.issue("other.example"), None):
        peer = host(tls=shown) if shown is not None else host()
        records = {f"_{peer.port}._tcp.mx.example.org": bad, "_smtp._tls.c.example": {"TXT": ["v=TLSRPTv1; rua=mailto:tls@c.example"]}}
        out = relay_to(make, peer, authority, records=records, core="[tlsrpt]\nsend = yes\n")
        assert statuses(out.send(next_hop="c.example")) == [DEFERRED]
        counted = out.services.state.scan("tlsrpt")
        outcome = out.send(next_hop="c.example", raw=raw)[0]
        assert outcome.status is DELIVERED and outcome.tls.endswith("unverified") is (shown is not None)
        assert out.services.state.scan("tlsrpt") == counted
        assert statuses(out.send(next_hop="c.example")) == [DEFERRED]  # its connection is not kept for others
        assert statuses(out.send(next_hop="c.example", raw=b"TLS-Required: Yes\r\n" + RAW)) == [DEFERRED]
        assert out.send(next_hop="c.example", raw=raw, facts={"requiretls": True})[0].status is not DELIVERED
        out = relay_to(make, peer, authority, records=records, core="[tls_policy]\nc.example = verify\n")
        assert statuses(out.send(next_hop="c.example", raw=raw)) == [DEFERRED]


def test_requiretls(make: Make, host: Host, authority: Authority) -> None:
    """RFC 8689: verified TLS with a host that somebody vouches for and that promises the same, or back to the sender."""
    right, wrong = authority.issue("mx.example.org"), authority.issue("other.example")
    keywords = ["PIPELINING", "REQUIRETLS"]

    def words(tls: Any, keywords: list[str], *, smart: bool = False, **records: Any) -> str:
        peer = host(tls=tls, keywords=keywords)
        if smart:
            out = make(f"mx.example.org:{peer.port}", zone={"mx.example.org": {"A": "127.0.0.1"}}, ca_file=authority.file)
        else:
            out = relay_to(make, peer, authority, records=records)
        assert statuses(out.send(next_hop="" if smart else "c.example")) == [DELIVERED]  # others don't mind
        outcome = out.send(next_hop="" if smart else "c.example", facts={"requiretls": True})[0]
        mails = [line for session in peer.sessions for line in session.commands if line.startswith("MAIL")]
        assert [line.endswith(" REQUIRETLS") for line in mails] == [False] + [True] * (outcome.status is DELIVERED)
        return f"{outcome.status.value} {outcome.reply.enhanced}"

    assert words(right, keywords) == words(right, keywords, smart=True) == "delivered 2.0.0"
    assert words(right, ["PIPELINING"]) == "failed 5.7.30"
    assert words(wrong, keywords) == words(wrong, keywords, smart=True) == "deferred 4.7.5"
    assert words(None, keywords) == "deferred 4.7.10"
    assert words(right, keywords, **{"mx.example.org": {"A": "127.0.0.1"}}) == "failed 5.7.30"  # DNS could have been forged


def test_stuffing_is_what_the_peer_undoes() -> None:
    with Peer() as peer, socket.create_connection((peer.host, peer.port)) as sock, sock.makefile("rwb", buffering=0) as stream:
        for line in (b"", b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n", stuff(RAW), b"QUIT\r\n"):
            stream.write(line)
            while stream.readline()[3:4] == b"-":
                pass
        assert peer.messages == [RAW]
