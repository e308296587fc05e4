"""The resolver against scripted name servers on loopback, and the zone that stands for one in tests."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.config import name_server
from gmta.services.dns import TTL_TEMPORARY_S, Answer, Resolver, Status, name_text, reverse_query, texts, wire_name
from gmta.testing import Dialogue, FakeClock, MemoryServer
from gmta.testing.zone import NameServer, Zone

Respond = Callable[[dns.message.Message, bool], Any]

RECORDS = {
    "example.org": {"MX": [(20, "mx2.example.org"), (10, "mx1.example.org")], "TXT": ["v=spf1 mx -all", ["two ", "strings"]]},
    "mx1.example.org": {"A": ["192.0.2.1", "192.0.2.2"], "AAAA": "2001:db8::1"},
    "four.example.org": {"A": "192.0.2.4"},
    "alias.example.org": {"CNAME": "second.example.org", "ttl": 30},
    "second.example.org": {"CNAME": "four.example.org"},
    "dangling.example.org": {"CNAME": "nothing.example.org"},
    "_25._tcp.mx1.example.org": {"TLSA": (3, 1, 1, "ab" * 32)},
    "big.example.org": {"TXT": [f"{number} " + "x" * 200 for number in range(20)]},
    "broken.example.org": {"rcode": "SERVFAIL"},
    "silent.example.org": {"rcode": "TIMEOUT"},
    "xn--mnchen-3ya.example.org": {"A": "192.0.2.5"},
    "*.wild.example.org": {"A": "192.0.2.6"},
}


class Script:
    """A name server that answers with what `respond` makes of a query; `asked` has (name, kind, over TCP)."""

    def __init__(self, respond: Respond) -> None:
        self.asked: list[tuple[str, str, bool]] = []
        self.queries: list[dns.message.Message] = []
        self._respond = respond
        self.server = NameServer(self._answer)

    def _answer(self, data: bytes, over_tcp: bool) -> Iterable[bytes]:
        query = dns.message.from_wire(data)
        self.queries.append(query)
        question = query.question[0]
        self.asked.append((name_text(question.name), question.rdtype.name, over_tcp))
        answers = self._respond(query, over_tcp)
        return [answer if isinstance(answer, bytes) else answer.to_wire()
                for answer in (answers if isinstance(answers, list) else [answers] if answers else [])]


@pytest.fixture
def script() -> Iterable[Callable[[Respond], Script]]:
    made: list[Script] = []

    def make(respond: Respond) -> Script:
        made.append(Script(respond))
        return made[-1]

    yield make
    for one in made:
        one.server.close()


def response(query: dns.message.Message, *answer: str, authority: Iterable[str] = (), rcode: str = "NOERROR", flags: int = 0) -> dns.message.Message:
    """A response with record sets, each as `NAME TTL IN KIND DATA`."""
    made = dns.message.make_response(query, recursion_available=True)
    for section, lines in ((made.answer, answer), (made.authority, authority)):
        for line in lines:
            name, ttl, _, kind, data = line.split(" ", 4)
            section.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    made.set_rcode(dns.rcode.from_text(rcode))
    made.flags |= flags
    return made


A = "host.example. 300 IN A 192.0.2.1"
SOA = "example. 600 IN SOA ns.example. hostmaster.example. 1 3600 600 86400 120"


# --- what is found --------------------------------------------------------------------------------------------


def test_found() -> None:
    zone = Zone(RECORDS)
    answer = zone.look_up("Example.ORG.", "mx")
    assert (answer.name, answer.kind, answer.status, answer.canonical) == ("example.org", "MX", Status.FOUND, "example.org")
    assert [record.preference for record in answer.records] == [20, 10]
    assert [record.preference for record in zone.mx("example.org").records] == [10, 20]
    assert texts(zone.txt("example.org")) == [b"v=spf1 mx -all", b"two strings"]
    assert zone.look_up("_25._tcp.mx1.example.org", "TLSA").records[0].cert == b"\xab" * 32
    assert zone.look_up("münchen.example.org", "A").name == "xn--mnchen-3ya.example.org"
    assert zone.look_up("a.b.wild.example.org", "A").status is Status.FOUND


def test_not_there_and_no_such_record_and_cant_tell_are_three_things() -> None:
    zone = Zone(RECORDS)
    statuses = {name: zone.look_up(name, "A").status for name in ("no.example.org", "example.org", "org", "broken.example.org", "silent.example.org")}
    assert statuses == {"no.example.org": Status.NXDOMAIN, "example.org": Status.NODATA, "org": Status.NODATA,
                        "broken.example.org": Status.TEMPORARY, "silent.example.org": Status.TEMPORARY}
    assert all(zone.look_up(name, "A").reason for name in statuses)


def test_served_zone_and_zone_in_memory_say_the_same() -> None:
    zone = Zone(RECORDS)
    names = [name for name in (*RECORDS, "no.example.org", "org", "b.wild.example.org", "dangling.example.org") if name != "silent.example.org"]
    with zone.serve() as server:
        resolver = Resolver([server.address], timeout_s=5)
        for name in names:
            for kind in ("A", "MX", "TXT", "TLSA"):
                direct, asked = zone.look_up(name, kind), resolver.look_up(name, kind)
                assert (direct.status, set(direct.records), direct.canonical) == (asked.status, set(asked.records), asked.canonical), (name, kind)


def test_addresses() -> None:
    zone = Zone({**RECORDS, "half.example.org": {"A": "192.0.2.9"}})
    both = zone.addresses("mx1.example.org")
    assert (both.status, both.v4, both.v6) == (Status.FOUND, ("192.0.2.1", "192.0.2.2"), ("2001:db8::1",))
    assert both.all == ("2001:db8::1", "192.0.2.1", "192.0.2.2")
    assert zone.addresses("mx1.example.org", (6,)).all == ("2001:db8::1",)
    assert zone.addresses("alias.example.org").canonical == "four.example.org"
    assert [zone.addresses(name).status for name in ("example.org", "no.example.org", "broken.example.org")] == [Status.NODATA, Status.NXDOMAIN, Status.TEMPORARY]


def test_addresses_of_one_family_while_the_other_fails(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A) if query.question[0].rdtype == 1 else response(query, rcode="SERVFAIL"))
    found = Resolver([server.server.address]).addresses("host.example")
    assert (found.status, found.v4, found.partial) == (Status.FOUND, ("192.0.2.1",), True)
    gone = script(lambda query, _: response(query, authority=[SOA]) if query.question[0].rdtype == 1 else response(query, rcode="SERVFAIL"))
    assert Resolver([gone.server.address]).addresses("host.example").status is Status.TEMPORARY


def test_localhost_and_addresses_as_names_are_never_asked() -> None:
    zone = Zone(RECORDS)
    assert zone.addresses("localhost").all == ("::1", "127.0.0.1")
    assert [zone.look_up(name, "A").status for name in ("192.0.2.1", "2001:db8::1")] == [Status.NXDOMAIN] * 2
    assert zone.asked == []


def test_reverse_name_is_confirmed() -> None:
    zone = Zone({
        "1.2.0.192.in-addr.arpa": {"PTR": ["liar.example.org", "bad name.example.org", "true.example.org"]},
        "true.example.org": {"A": ["192.0.2.9", "192.0.2.1"]},
        "liar.example.org": {"A": "192.0.2.7"},
        "bad name.example.org": {"A": "192.0.2.1"},
        "2.2.0.192.in-addr.arpa": {"PTR": "liar.example.org"},
        reverse_query("2001:db8::1"): {"PTR": "six.example.org"},
        "six.example.org": {"AAAA": "2001:0db8:0::1"},
    })
    assert [zone.reverse_name(ip) for ip in ("192.0.2.1", "::ffff:192.0.2.1", "2001:DB8::1")] == ["true.example.org", "true.example.org", "six.example.org"]
    assert [zone.reverse_name(ip) for ip in ("192.0.2.2", "192.0.2.3", "unknown", "")] == [""] * 4


def test_reverse_name_asks_for_few_of_many_names() -> None:
    zone = Zone({"1.2.0.192.in-addr.arpa": {"PTR": [f"h{number}.example.org" for number in range(50)]}, "h40.example.org": {"A": "192.0.2.1"}})
    assert zone.reverse_name("192.0.2.1") == ""
    assert len(zone.asked) == 11


# --- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reason"), [
    ("", "no name"), ("a..b", "empty label"), (".a", "empty label"), ("x" * 64 + ".example", "label over 63 octets"),
    (".".join(["x" * 60] * 5), "name over 255 octets"), ("x." * 2000, "name too long"), ("a\\", "bad escape"), ("a\\999.b", "bad escape"),
    ("a\ud800.example", "not an internationalised name"), ("\u2603\u20dd.example", "not an internationalised name"),
])
def test_name_that_cant_be(name: str, reason: str) -> None:
    zone = Zone(RECORDS)
    answer = zone.look_up(name, "A")
    assert answer.status is Status.NXDOMAIN
    assert answer.reason.startswith(reason)
    assert (answer.name.isascii(), len(answer.name) <= 255, zone.asked) == (True, True, [])


@pytest.mark.parametrize("name", ["_dmarc.example", "a_b.-c-.example", "with blank.example", "@", "a@b.example", "1.2.3", "xn--a.example", "!#$%.example", "*.example"])
def test_odd_names_are_asked_for(name: str) -> None:
    zone = Zone({name: {"TXT": "here"}})
    assert texts(zone.txt(name)) == [b"here"]
    assert wire_name(zone.txt(name).name) == wire_name(name)


def test_unknown_kind() -> None:
    answer = Zone(RECORDS).look_up("example.org", "no such")
    assert (answer.status, answer.reason) == (Status.NODATA, "no such kind of record")


@given(st.text() | st.text(alphabet="aZ0-_.\\\u00fc\u3002\ud800 @", max_size=80), st.sampled_from(["A", "MX", "TXT"]))
@settings(max_examples=200, deadline=None)
def test_no_name_raises(name: str, kind: str) -> None:
    answer = Zone(RECORDS).look_up(name, kind)
    assert isinstance(answer.status, Status)
    assert answer.name.isascii() and answer.name.isprintable()
    if answer.canonical:
        assert name_text(wire_name(answer.name)) == answer.name


@given(st.lists(st.binary(min_size=1, max_size=63), min_size=1, max_size=4).filter(lambda labels: sum(map(len, labels)) + len(labels) < 255))
@settings(max_examples=100, deadline=None)
def test_names_of_any_octets_survive_text(labels: list[bytes]) -> None:
    name = dns.name.Name([*labels, b""]).canonicalize()
    assert wire_name(name_text(name)) == name


# --- aliases --------------------------------------------------------------------------------------------------


def test_aliases_in_one_answer() -> None:
    clock = FakeClock()
    zone = Zone(RECORDS, clock=clock)
    answer = zone.look_up("alias.example.org", "A")
    assert (answer.canonical, answer.records[0].address, answer.expires_at) == ("four.example.org", "192.0.2.4", clock.now + 30)
    assert zone.asked == [("alias.example.org", "A")]
    assert [zone.look_up("alias.example.org", "MX").status, zone.look_up("dangling.example.org", "A").status] == [Status.NODATA, Status.NXDOMAIN]
    assert zone.look_up("alias.example.org", "CNAME").records[0].target == dns.name.from_text("second.example.org")


def test_alias_whose_target_the_server_leaves_out(script: Callable[[Respond], Script]) -> None:
    def respond(query: dns.message.Message, _: bool) -> dns.message.Message:
        if query.question[0].name == dns.name.from_text("alias.example"):
            return response(query, "alias.example. 60 IN CNAME Host.Example.", flags=dns.flags.AD)
        return response(query, A)

    server = script(respond)
    answer = Resolver([server.server.address], validating=True).look_up("alias.example", "A")
    assert (answer.status, answer.canonical, answer.secure) == (Status.FOUND, "host.example", False)
    assert [name for name, _, _ in server.asked] == ["alias.example", "host.example"]


@pytest.mark.parametrize("answer", [
    ["a.example. 60 IN CNAME b.example.", "b.example. 60 IN CNAME a.example."],
    ["a.example. 60 IN CNAME a.example."],
    ["a.example. 60 IN CNAME b.example."],
    [f"{name}.example. 60 IN CNAME {name}x.example." for name in ["a" + "x" * count for count in range(30)]],
])
def test_endless_aliases(script: Callable[[Respond], Script], answer: list[str]) -> None:
    def respond(query: dns.message.Message, _: bool) -> dns.message.Message:
        if query.question[0].name == dns.name.from_text("b.example"):
            return response(query, "b.example. 60 IN CNAME a.example.")
        return response(query, *answer)

    server = script(respond)
    found = Resolver([server.server.address]).look_up("a.example", "A")
    assert (found.status, "CNAME" in found.reason) == (Status.TEMPORARY, True)
    assert len(server.asked) <= 2


# --- the cache ------------------------------------------------------------------------------------------------


def asked_twice(script: Callable[[Respond], Script], respond: Respond, name: str, kept_s: float) -> Answer:
    """Checks that an answer is kept for so long and no longer."""
    server, clock = script(respond), FakeClock()
    resolver = Resolver([server.server.address], clock=clock)
    answer = resolver.look_up(name, "A")
    clock.now += kept_s - 0.1
    assert resolver.look_up(name.upper() + ".", "A") is answer
    assert len(server.asked) == 1
    clock.now += 0.2
    assert resolver.look_up(name, "A").status is answer.status
    assert len(server.asked) == 2
    return answer


@pytest.mark.parametrize(("ttl", "kept_s"), [(300, 300), (0, 1), (10_000_000, 86400)])
def test_positive_answer_is_kept(script: Callable[[Respond], Script], ttl: int, kept_s: float) -> None:
    asked_twice(script, lambda query, _: response(query, f"host.example. {ttl} IN A 192.0.2.1"), "host.example", kept_s)


@pytest.mark.parametrize("rcode", ["NXDOMAIN", "NOERROR"])
@pytest.mark.parametrize(("authority", "kept_s"), [
    ([SOA], 120), (["example. 60 IN SOA . . 1 1 1 1 7200"], 60), (["example. 90000 IN SOA . . 1 1 1 1 90000"], 3600),
    ([], 1), (["other. 600 IN SOA . . 1 1 1 1 600"], 1),
])
def test_negative_answer_is_kept(script: Callable[[Respond], Script], rcode: str, authority: list[str], kept_s: float) -> None:
    answer = asked_twice(script, lambda query, _: response(query, authority=authority, rcode=rcode), "no.example", kept_s)
    assert answer.status is (Status.NXDOMAIN if rcode == "NXDOMAIN" else Status.NODATA)


def test_temporary_failure_is_kept_for_seconds(script: Callable[[Respond], Script]) -> None:
    asked_twice(script, lambda query, _: response(query, rcode="SERVFAIL"), "host.example", TTL_TEMPORARY_S)


def test_cache_is_bounded_and_drops_what_was_used_least(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, f"{query.question[0].name} 300 IN A 192.0.2.1"))
    resolver = Resolver([server.server.address], cache_size=3)
    for name in ("a.example", "b.example", "c.example", "a.example", "d.example", "a.example", "b.example"):
        resolver.look_up(name, "A")
    assert [name[0] for name, _, _ in server.asked] == ["a", "b", "c", "d", "b"]
    assert len(resolver._cache) == resolver._slots == 3
    resolver.forget()
    resolver.look_up("a.example", "A")
    assert len(server.asked) == 6


def test_big_answers_count_for_more() -> None:
    zone = Zone(RECORDS)
    with zone.serve() as server:
        resolver = Resolver([server.address], cache_size=5)
        resolver.look_up("four.example.org", "A")
        resolver.look_up("big.example.org", "TXT")
        assert resolver._slots == 5
        assert [key[0] for key in resolver._cache] == ["big.example.org"]
        small = Resolver([server.address], cache_size=2)
        assert small.look_up("big.example.org", "TXT").status is Status.FOUND
        assert not small._cache


# --- servers --------------------------------------------------------------------------------------------------


def test_query_is_as_it_should_be(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A))
    for _ in range(4):
        Resolver([server.server.address]).look_up("host.example", "A")
    assert len({query.id for query in server.queries}) > 1
    query = server.queries[0]
    assert query.flags == dns.flags.RD | dns.flags.AD
    assert (query.edns, query.payload, query.ednsflags) == (0, 1232, 0)
    Resolver([server.server.address], validating=True).look_up("host.example", "A")
    assert server.queries[-1].ednsflags == dns.flags.DO


def test_truncated_answer_is_fetched_over_tcp() -> None:
    zone = Zone(RECORDS)
    with zone.serve() as server:
        answer = Resolver([server.address]).look_up("big.example.org", "TXT")
    assert len(answer.records) == 20
    assert zone.asked == [("big.example.org", "TXT")] * 2


def test_answer_cut_in_the_middle_of_a_record(script: Callable[[Respond], Script]) -> None:
    def respond(query: dns.message.Message, over_tcp: bool) -> Any:
        return response(query, A) if over_tcp else response(query, A, flags=dns.flags.TC).to_wire()[:-5]

    server = script(respond)
    assert Resolver([server.server.address]).look_up("host.example", "A").status is Status.FOUND
    assert [over_tcp for _, _, over_tcp in server.asked] == [False, True]


def test_truncated_over_tcp_too(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A, flags=dns.flags.TC))
    assert Resolver([server.server.address]).look_up("host.example", "A").status is Status.TEMPORARY


def forged(query: dns.message.Message, change: Callable[[dns.message.Message], None]) -> dns.message.Message:
    made = response(dns.message.from_wire(query.to_wire()), "host.example. 300 IN A 192.0.2.66")
    change(made)
    return made


@pytest.mark.parametrize("change", [
    lambda made: setattr(made, "id", made.id ^ 1),
    lambda made: setattr(made, "flags", made.flags & ~dns.flags.QR),
    lambda made: setattr(made.question[0], "name", dns.name.from_text("other.example")),
    lambda made: setattr(made.question[0], "rdtype", dns.rdatatype.TXT),
    lambda made: made.question.clear(),
    lambda made: made.set_opcode(dns.opcode.STATUS),
], ids=["id", "query", "name", "kind", "no question", "opcode"])
def test_forged_answers_are_passed_over(script: Callable[[Respond], Script], change: Callable[[dns.message.Message], None]) -> None:
    server = script(lambda query, _: [b"junk", forged(query, change), response(query, A)])
    answer = Resolver([server.server.address]).look_up("host.example", "A")
    assert [record.address for record in answer.records] == ["192.0.2.1"]


def test_flood_of_forged_answers_ends(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: [forged(query, lambda made: setattr(made, "id", made.id ^ 1))] * 100)
    answer = Resolver([server.server.address]).look_up("host.example", "A")
    assert (answer.status, "other questions" in answer.reason) == (Status.TEMPORARY, True)


def dead_address() -> str:
    with Zone().serve() as server:
        return server.address


@pytest.mark.parametrize("respond", [
    lambda query, _: response(query, rcode="SERVFAIL"),
    lambda query, _: response(query, rcode="REFUSED"),
    lambda query, _: response(query, rcode="YXDOMAIN"),
    lambda query, _: response(query, rcode="FORMERR"),
    lambda query, _: query.id.to_bytes(2, "big") + b"\x81\x80\0\1\0\1\0\0\0\0garbage",
    lambda query, _: None,
    lambda query, over_tcp: None if over_tcp else response(query, flags=dns.flags.TC),
    lambda query, over_tcp: b"\0" * 12 if over_tcp else response(query, flags=dns.flags.TC),
    lambda query, _: (lambda made: setattr(made, "flags", made.flags & ~dns.flags.RA) or made)(
        response(query, authority=["example. 60 IN NS ns.example."])),
], ids=["servfail", "refused", "yxdomain", "formerr", "unreadable", "silent", "silent over tcp", "wrong over tcp", "lame"])
def test_next_server_is_asked(script: Callable[[Respond], Script], respond: Respond) -> None:
    bad, good = script(respond), script(lambda query, _: response(query, A))
    resolver = Resolver([bad.server.address, good.server.address], timeout_s=1)
    assert resolver.look_up("host.example", "A").status is Status.FOUND
    assert bad.asked and good.asked
    alone = Resolver([bad.server.address], timeout_s=0.2).look_up("host.example", "A")
    assert (alone.status, bad.server.address in alone.reason) == (Status.TEMPORARY, True)


def test_dead_server_is_passed_over() -> None:
    with Zone({"host.example": {"A": "192.0.2.1"}}).serve() as server:
        assert Resolver([dead_address(), server.address]).look_up("host.example", "A").status is Status.FOUND
    assert Resolver([dead_address()]).look_up("host.example", "A").status is Status.TEMPORARY


def test_silent_server_is_asked_last_from_then_on(script: Callable[[Respond], Script]) -> None:
    silent, good = script(lambda query, _: None), script(lambda query, _: response(query, f"{query.question[0].name} 300 IN A 192.0.2.1"))
    resolver = Resolver([silent.server.address, good.server.address], timeout_s=1)
    for name in ("a.example", "b.example", "c.example"):
        assert resolver.look_up(name, "A").status is Status.FOUND
    assert len(silent.asked) == 1


def test_silent_server_is_asked_again_within_the_deadline(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A) if len(server.asked) > 1 else None)
    assert Resolver([server.server.address], timeout_s=1).look_up("host.example", "A").status is Status.FOUND
    assert len({query.id for query in server.queries}) == 1  # the same query, so that a late answer counts


def test_server_that_does_not_know_edns(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A) if query.edns < 0 else response(query, rcode="FORMERR"))
    assert Resolver([server.server.address]).look_up("host.example", "A").status is Status.FOUND
    assert [query.edns for query in server.queries] == [0, -1]


@pytest.mark.parametrize(("validating", "flags", "secure"), [
    (True, dns.flags.AD, True), (True, 0, False), (False, dns.flags.AD, False), (None, dns.flags.AD, True), (None, 0, False),
])
def test_secure_only_where_the_server_may_be_believed(script: Callable[[Respond], Script], validating: bool | None, flags: int, secure: bool) -> None:
    server = script(lambda query, _: response(query, A, flags=flags))
    assert Resolver([server.server.address], validating=validating).look_up("host.example", "A").secure is secure


def test_little_time_of_one_caller_is_not_remembered_for_all(script: Callable[[Respond], Script]) -> None:
    server = script(lambda query, _: response(query, A))
    resolver = Resolver([server.server.address])
    assert resolver.look_up("host.example", "A", timeout_s=0).status is Status.TEMPORARY
    assert resolver.look_up("host.example", "A").status is Status.FOUND


def test_over_ipv6() -> None:
    try:
        served = Zone(RECORDS).serve("::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with served as server:
        assert server.address.startswith("[::1]:")
        assert Resolver([server.address]).look_up("big.example.org", "TXT").status is Status.FOUND


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_answers_never_raise(data: st.DataObject) -> None:
    def respond(query: bytes, _: bool) -> list[bytes]:
        made = bytearray(response(dns.message.from_wire(query), A, "x.example. 1 IN TXT a b", authority=[SOA]).to_wire())
        for at, octet in changes:
            made[2 + at % (len(made) - 2)] = octet
        return [bytes(made[:len(made) - cut])]

    changes = data.draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4))
    cut = data.draw(st.integers(0, 20))
    with NameServer(respond) as server:
        assert isinstance(Resolver([server.address], timeout_s=0.02).look_up("host.example", "A").status, Status)


# --- the system's servers -------------------------------------------------------------------------------------


def test_resolv_conf_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text("# nothing\nsearch example\nnameserver\nnameserver nonsense\nnameserver 192.0.2.53\nnameserver ::1\nnameserver fe80::1%lo\n")
    resolver = Resolver(resolv_conf=str(file))
    assert [str(server) for server in resolver._servers()] == ["192.0.2.53:53", "[::1]:53", "[fe80::1%lo]:53"]
    assert resolver._servers()[2].sockaddr()[3] > 0
    file.write_text("nameserver 192.0.2.54\n")
    assert [str(server) for server in resolver._servers()] == ["192.0.2.54:53"]
    file.unlink()
    assert [str(server) for server in resolver._servers()] == ["127.0.0.1:53"]


@pytest.mark.parametrize(("text", "made"), [
    ("127.0.0.1", ("127.0.0.1", 53)), ("127.0.0.1:5353", ("127.0.0.1", 5353)), ("::1", ("::1", 53)), ("[::1]:54", ("::1", 54)), ("[::1]", ("::1", 53)),
])
def test_server_addresses(text: str, made: tuple[str, int]) -> None:
    assert name_server(text) == made


@pytest.mark.parametrize("text", ["", "dns.example", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:0", "127.0.0.1:65536", "[::1", "[::1]53", "[::1]:", "localhost:53"])
def test_bad_server_address(text: str) -> None:
    with pytest.raises(ValueError, match="IP address"):
        Resolver([text])


# --- many at a time -------------------------------------------------------------------------------------------

PATCHED = r"""
from gevent import monkey
monkey.patch_all()
import threading
import gevent
from gmta.services.dns import Resolver, Status
from gmta.testing import Dialogue, MemoryServer
from gmta.testing.zone import NameServer, Zone

zone = Zone({"host.example": {"A": "192.0.2.1"}})
asked, arrived, go = [], threading.Event(), threading.Event()
silent = 0


def respond(query, over_tcp):
    asked.append(query)
    arrived.set()
    go.wait()
    return zone._respond_wire(query, over_tcp) if len(asked) > silent else []


def fresh(servers, first_silent=0):
    global silent
    asked.clear(), arrived.clear(), go.clear()
    silent = first_silent
    return Resolver(servers, timeout_s=20)


with NameServer(respond) as server:
    resolver = fresh([server.address])
    many = [gevent.spawn(resolver.look_up, "host.example", "A") for _ in range(50)]
    arrived.wait()
    gevent.sleep(0)  # runs although 50 wait
    assert not any(one.dead for one in many)
    go.set()
    answers = [one.get() for one in many]
    assert len(asked) == 1 and all(answer is answers[0] for answer in answers) and answers[0].status is Status.FOUND
    assert not resolver._flights

    for end in ("kill", "timeout"):
        resolver = fresh([server.address], first_silent=1)
        owner = gevent.spawn(resolver.look_up, "host.example", "A")
        arrived.wait()
        waiters = [gevent.spawn(resolver.look_up, "host.example", "A") for _ in range(10)]
        gevent.sleep(0)
        if end == "kill":
            owner.kill()
        else:
            owner.kill(gevent.Timeout())
        go.set()
        assert all(waiter.get().status is Status.FOUND for waiter in waiters)
        assert len(asked) == 2, len(asked)
        assert not resolver._flights

    resolver = fresh([server.address])
    owner = gevent.spawn(resolver.look_up, "host.example", "A")
    arrived.wait()
    hurried = resolver.look_up("host.example", "A", timeout_s=0.01)
    assert hurried.status is Status.TEMPORARY
    go.set()
    assert owner.get().status is Status.FOUND and len(asked) == 1
print("fine")
"""


def test_greenlets_share_a_query_and_outlive_each_other() -> None:
    done = subprocess.run([sys.executable, "-c", PATCHED], capture_output=True, text=True, timeout=60)
    assert done.stdout == "fine\n", done.stderr


def test_threads_share_an_answer() -> None:
    zone = Zone(RECORDS)
    with zone.serve() as server:
        resolver = Resolver([server.address])
        answers: list[Answer] = []
        threads = [threading.Thread(target=lambda: answers.append(resolver.look_up("four.example.org", "A"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {answer.status for answer in answers} == {Status.FOUND}
    assert len(answers) == 8


# --- the zone -------------------------------------------------------------------------------------------------


def test_zone_changes_are_seen_at_once() -> None:
    zone = Zone(RECORDS)
    zone["new.example.org"] = {"A": "192.0.2.8", "CAA": '0 issue "ca.example"'}
    assert zone.addresses("new.example.org", (4,)).v4 == ("192.0.2.8",)
    assert zone.look_up("new.example.org", "CAA").records[0].value == b"ca.example"
    del zone["new.example.org"]
    assert zone.look_up("new.example.org", "A").status is Status.NXDOMAIN


def test_zone_octets_and_null_mx() -> None:
    zone = Zone({"example.org": {"TXT": ["\xff" * 300, [b"\x00", "a"]], "MX": [0, ""]}})
    assert texts(zone.txt("example.org")) == [b"\xff" * 300, b"\x00a"]
    assert zone.mx("example.org").records[0].exchange == dns.name.root


@pytest.mark.parametrize("entry", [{"A": "not an address"}, {"MX": ["x"]}, {"NOSUCH": "x"}, {"TLSA": [3, 1]}])
def test_zone_refuses_what_it_cant_make(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"example\.org"):
        Zone({"example.org": entry})


def test_zone_ad() -> None:
    assert Zone({"example.org": {"A": "192.0.2.1", "ad": True}}).look_up("example.org", "A").secure
    assert not Zone({"example.org": {"A": "192.0.2.1"}}).look_up("example.org", "A").secure
    assert Zone({"example.org": {"A": "192.0.2.1"}}, ad=True).look_up("nothing.example.org", "A").secure


def test_reverse_query() -> None:
    assert reverse_query("192.0.2.1") == "1.2.0.192.in-addr.arpa"
    assert reverse_query("2001:db8::1") == ipaddress.ip_address("2001:db8::1").reverse_pointer


# --- the name of a client -------------------------------------------------------------------------------------

DIALOGUE = """
S: 220 *
C: HELO client.example
S: 250 *
C: QUIT
S: 221 *
EOF
"""


@pytest.mark.parametrize(("lookup", "ip", "name", "asked"), [
    ("yes", "192.0.2.1", "client.example", 2), ("yes", "192.0.2.2", "", 1), ("yes", "192.0.2.3", "", 1), ("no", "192.0.2.1", "", 0),
])
def test_client_has_a_name_where_the_listener_asks_for_it(lookup: str, ip: str, name: str, asked: int) -> None:
    zone = Zone({"1.2.0.192.in-addr.arpa": {"PTR": "client.example"}, "client.example": {"A": "192.0.2.1"}, "3.2.0.192.in-addr.arpa": {"rcode": "TIMEOUT"}})
    server = MemoryServer(given={"listener:mx": {"reverse_lookup": lookup}}, resolver=zone, peer_ip=ip)
    assert server.play(Dialogue.parse(DIALOGUE)).session.peer_name == name
    assert len(zone.asked) == asked
