"""gmta/verify/spf.py and plugins/spf.py against the SPF project's suites, cases from bug reports, and what pyspf gets wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dns.message
import dns.rdatatype
import pytest
import spf as pyspf
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.address import Address
from gmta.mail.session import Transaction
from gmta.services.dns import Answer, Status, name_text
from gmta.testing import load_plugin, make_services, make_session
from gmta.testing.zone import Zone
from gmta.verify import Lookups
from gmta.verify.spf import MAX_QUERIES, Spf, SpfResult, parse, received_spf

DATA = Path(__file__).parents[1] / "data"
SUITES = ("rfc7208-tests.yml", "rfc4408-tests.yml")
RESULTS = {"pass", "fail", "softfail", "neutral", "none", "temperror", "permerror"}


# --- the suites -------------------------------------------------------------------------------------------------


class SuiteZone(Zone):
    """A zone as the suites write it: `TIMEOUT` stands for every kind that has no record, or for one kind; SPF is written TXT."""

    def __init__(self, data: dict[Any, Any]) -> None:
        super().__init__()
        self._silent: dict[str, set[str]] = {}
        for name, entries in data.items():
            name = str(name).lower().rstrip(".")
            if any(len(label) > 63 for label in name.split(".")):
                continue
            found: dict[str, Any] = {}
            silent = self._silent.setdefault(name, set())
            typed = any(isinstance(entry, dict) and "TXT" in entry for entry in entries)
            for entry in entries:
                for kind, value in ({"*": "TIMEOUT"} if entry == "TIMEOUT" else entry).items():
                    if kind == "SPF":
                        if typed:
                            continue
                        kind = "TXT"
                    if value == "TIMEOUT":
                        silent.add(kind)
                    elif value != "NONE":
                        octets = [part.encode() for part in ([value] if isinstance(value, str) else value or [""])] if kind == "TXT" else value
                        found.setdefault(kind, []).append(octets)
            self._has = {**getattr(self, "_has", {}), name: set(found)}
            self[name] = found

    def respond(self, query: dns.message.Message) -> dns.message.Message | None:
        name, kind = name_text(query.question[0].name), dns.rdatatype.to_text(query.question[0].rdtype)
        silent = self._silent.get(name, {"*"} if name.startswith("error.") else set())
        if kind in silent or ("*" in silent and not self._has.get(name, set()) & {kind, "CNAME"}):
            return None
        return super().respond(query)


def suite_cases() -> Iterator[Any]:
    for suite in SUITES:
        path = DATA / suite
        if path.exists():
            with path.open(encoding="utf-8") as file:
                for scenario in yaml.load_all(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
                    for name, case in scenario["tests"].items():
                        yield pytest.param(scenario["zonedata"], case, id=f"{suite[:7]}-{name}")


def test_suites_are_there() -> None:
    missing = [suite for suite in SUITES if not (DATA / suite).exists()]
    assert not missing, "scripts/test fetches them, tests/data/README says how"
    assert sum(1 for _ in suite_cases()) > 390


@pytest.mark.parametrize(("zone", "case"), list(suite_cases()))
def test_suite(zone: dict[Any, Any], case: dict[str, Any]) -> None:
    """Each case through the evaluator with its explanation, and through the plugin."""
    accept = case["result"] if isinstance(case["result"], list) else [case["result"]]
    helo, sender = case["helo"] or "", case["mailfrom"] or ""
    resolver = SuiteZone(zone)
    result = Spf(case.get("receiver", "unknown")).mail_from(resolver, case["host"], helo, sender, trace=True)
    assert result.result in accept, result.steps
    if case.get("explanation"):
        assert result.explanation == (case["explanation"] if case["explanation"] != "DEFAULT" else "")

    plugin = load_plugin("spf", make_services(resolver=resolver))
    local, _, domain = sender.rpartition("@")
    transaction = Transaction("Q1", Address(local or "postmaster", domain) if domain else Address("", ""))
    plugin.check_mail(make_session(peer_ip=case["host"], helo=helo), transaction)
    assert transaction.auth_results[0].result in accept


# --- cases from bug reports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in json.loads((DATA / "spf.json").read_text())])
def test_reported(case: dict[str, Any]) -> None:
    resolver, spf = Zone(case["zone"]), Spf()
    result = spf.mail_from(resolver, case["ip"], case["helo"], case["mail_from"])
    assert result.result in case["accept"], case["statement"]
    if "accept_helo" in case:
        assert spf.helo(resolver, case["ip"], case["helo"]).result in case["accept_helo"]


# --- what pyspf gets wrong, and bounds --------------------------------------------------------------------------


def judge(record: str, ip: str = "192.0.2.1", sender: str = "a@example.com", **names: dict[str, Any]) -> tuple[SpfResult, Zone]:
    zone = Zone({"example.com": {"TXT": [record]}} | {name.replace("__", "-").replace("_", "."): entry for name, entry in names.items()})
    return Spf("mx.example.test").mail_from(zone, ip, "h.example.net", sender, trace=True), zone


@pytest.mark.parametrize(("record", "expected"), [
    ("v=spf1 Redirect=r.example.com", "fail"),
    ("v=spf1 x=1 x=2 X=%{r} ip4:192.0.2.1 -all", "pass"),
    ("v=spf1 ip4:192.0.2.1 include:example.com -all", "pass"),
    ("v=spf1 include:example.com -all", "permerror"),
    ("v=spf1 include -all", "permerror"),
    ("v=spf1 include: -all", "permerror"),
    ("v=spf1 redirect=r.example.com redirect=r.example.com", "permerror"),
    ("v=spf1 exp=r.example.com exp=r.example.com -all", "permerror"),
    ("v=spf1 a:r.example.com/33 -all", "permerror"),
    ("v=spf1 a:r.example.com//129 -all", "permerror"),
    ("v=spf1 a:r.example.com/032 -all", "permerror"),
    ("v=spf1 ip4:192.0.2.1/24//64 -all", "permerror"),
    ("v=spf1 ip4:192.0.2.256 -all", "permerror"),
    ("v=spf1 ip4:192.0.2.1\t-all", "permerror"),
    ("v=spf1 ip4:192.0.2.1 -all\x00", "permerror"),
    ("v=spf1 ip4:192.0.2.1 -all\xa0", "permerror"),
    ("v=spf1 ip6:::ffff:192.0.2.1 -all", "fail"),
    ("v=spf1 all:x -all", "permerror"),
    ("v=spf1 a:%{d0}.example.com -all", "permerror"),
    ("v=spf1 a:%{c}.example.com -all", "permerror"),
    ("v=spf1 a:%{x}.example.com -all", "permerror"),
    ("v=spf1 a:%{d -all", "permerror"),
    ("v=spf1 exists:%{IR}.%{Lr-}.%{d1R}.example.net -all", "pass"),
    ("v=spf1 exists:%{i2R}.x%{d99999999999999999999}.example.net -all", "pass"),
    ("v=spf1 exists:%{i-}.i.example.net -all", "pass"),
    ("v=spf1 exists:a.%{d}" + ".x" * 120 + ".long.example.net -all", "pass"),
    ("v=spf1 exists:" + "y" * 300 + ".z -all", "fail"),
    ("v=spf1", "neutral"),
    ("v=spf1 ", "neutral"),
    ("v=spf1\n", "none"),
])
def test_record(record: str, expected: str) -> None:
    long = ("a.example.com" + ".x" * 120 + ".long.example.net").split(".")
    while len(".".join(long)) > 253:
        del long[0]
    result, _ = judge(record, **{
        "r_example_com": {"TXT": ["v=spf1 -all"], "A": ["198.51.100.1"]},
        "1_2_0_192_a_example_example_net": {"A": ["127.0.0.2"]},
        "0_192_xexample_com_example_net": {"A": ["127.0.0.2"]},
        "192_0_2_1_i_example_net": {"A": ["127.0.0.2"]},
        "_".join(long): {"A": ["127.0.0.2"]},
    })
    assert result.result == expected, result.steps


@pytest.mark.parametrize(("sender", "domain"), [
    ('"a@b"@example.com', "example.com"),
    ("example.com", "example.com"),
    ("@example.com", "example.com"),
    ("a@example.com.", "example.com"),
    ("a@EXAMPLE.com", "EXAMPLE.com"),
    ("", "h.example.net"),
    ("a@[192.0.2.1]", "[192.0.2.1]"),
    ("a@b\u00fccher.example", "xn--bcher-kva.example"),
])
def test_domain_of_the_sender(sender: str, domain: str) -> None:
    assert judge("v=spf1 +all", sender=sender)[0].domain == domain


def test_only_what_is_reached_is_asked() -> None:
    """exp= and the macro p cost nothing where another term decides, and redirect= does not count where it is not followed."""
    terms = " ".join(f"a:n{number}.example.com" for number in range(9))
    hosts = {f"n{number}_example_com": {"A": ["198.51.100.1"]} for number in range(9)}
    result, zone = judge(f"v=spf1 {terms} ip4:192.0.2.1 exists:%{{p}}.example.net redirect=r.example.com exp=e.example.com", **hosts)
    assert result.result == "pass"
    assert zone.asked == [("example.com", "TXT"), *((f"n{number}.example.com", "A") for number in range(9))]
    result, zone = judge(f"v=spf1 {terms} exists:x.example.com -all redirect=r.example.com", **hosts)
    assert result.result == "fail"
    assert ("r.example.com", "TXT") not in zone.asked


def test_explanation_is_safe_or_absent() -> None:
    for text, expected in (("%{i} is not one of %{o}: see http://example.com/?s=%{S}", "192.0.2.1 is not one of example.com: see http://example.com/?s=a%40example.com"),
                           ("two\r\nlines", ""), ("\xff", ""), ("%{x}", ""), ("x" * 300, ""), ("\x1b[2J", "")):
        result, _ = judge("v=spf1 -all exp=e.example.com", e_example_com={"TXT": [text]})
        assert (result.result, result.explanation) == ("fail", expected)
    result, _ = judge("v=spf1 include:i.example.com -all", i_example_com={"TXT": ["v=spf1 +all exp=e.example.com"]}, e_example_com={"TXT": ["x"]})
    assert result.explanation == ""
    result, _ = judge("v=spf1 redirect=i.example.com exp=f.example.com", i_example_com={"TXT": ["v=spf1 -all exp=e.%{d}"]},
                      e_i_example_com={"TXT": ["of %{d}"]}, f_example_com={"TXT": ["x"]})
    assert result.explanation == "of i.example.com"
    result, _ = judge("v=spf1 -all exp=e.example.com", e_example_com={"TXT": ["one", "two"]})
    assert result.explanation == ""


def test_ptr() -> None:
    """Ten names at most; a failing look-up is no match; the macro p is the confirmed name, best one of the domain's."""
    reverse = {"1_2_0_192_in__addr_arpa": {"PTR": ["other.example.net", "h.example.com", "liar.example.com"]}}
    hosts = {"other_example_net": {"A": ["192.0.2.1"]}, "h_example_com": {"A": ["192.0.2.1"]}, "liar_example_com": {"A": ["198.51.100.1"]}}
    assert judge("v=spf1 ptr -all", **reverse, **hosts)[0].result == "pass"
    assert judge("v=spf1 ptr:example.org -all", **reverse, **hosts)[0].result == "fail"
    assert judge("v=spf1 exists:%{p}.ok.example.com -all", **reverse, **hosts, h_example_com_ok_example_com={"A": ["127.0.0.1"]})[0].result == "pass"
    assert judge("v=spf1 exists:%{p}.ok.example.com -all", unknown_ok_example_com={"A": ["127.0.0.1"]})[0].result == "pass"
    many = {"1_2_0_192_in__addr_arpa": {"PTR": [f"n{number}.example.org" for number in range(10)] + ["h.example.com"]}}
    assert judge("v=spf1 ptr -all", **many, **hosts)[0].result == "fail"
    failing = {"1_2_0_192_in__addr_arpa": {"PTR": ["a.example.com", "h.example.com"]}, "a_example_com": {"rcode": "SERVFAIL"}}
    assert judge("v=spf1 ptr -all", **failing, **hosts)[0].result == "pass"


def test_void_lookups_are_counted_by_term() -> None:
    """An IPv6 client does not fail because mail exchangers have IPv4 addresses only."""
    hosts: dict[str, Any] = {f"m{number}_example_com": {"A": ["192.0.2.1"]} for number in range(4)}
    zone = {"example_com": {"TXT": ["v=spf1 mx ip6:2001:db8::1 -all"], "MX": [(number, f"m{number}.example.com") for number in range(4)]}}
    assert judge("", "2001:db8::1", **zone, **hosts)[0].result == "pass"
    assert judge("v=spf1 a:n1.example.com a:n2.example.com ip4:192.0.2.1 -all")[0].result == "pass"
    assert judge("v=spf1 a:n1.example.com mx:n2.example.com exists:n3.example.com ip4:192.0.2.1 -all")[0].result == "permerror"


@pytest.mark.parametrize("ip", ["", "unix", "fe80::1%eth0", "::ffff:192.0.2.77%1", "192.0.2.1 ", "\udcff", "1" * 5000])
def test_odd_client_address(ip: str) -> None:
    assert judge("v=spf1 ip4:192.0.2.0/24 -all", ip)[0].result in ("none", "fail", "pass")


def test_cost_is_bounded() -> None:
    """Mail exchangers can't multiply the questions, records of 60 KB the terms, a slow server the time."""
    zone: dict[str, Any] = {"example_com": {"TXT": ["v=spf1 " + " ".join(f"mx:x{n}.example.com" for n in range(10)) + " -all"]}}
    for n in range(10):
        zone[f"x{n}_example_com"] = {"MX": [(host, f"h{host}.x{n}.example.com") for host in range(10)]}
        zone |= {f"h{host}_x{n}_example_com": {"A": ["198.51.100.1"]} for host in range(10)}
    result, asked = judge("", **zone)
    assert result.result == "permerror"
    assert len(asked.asked) == MAX_QUERIES
    result, _ = judge("v=spf1 " + "ip4:198.51.100.1 " * 1001 + "ip4:192.0.2.1 -all")
    assert result.result == "permerror"

    class Slow(Zone):
        seconds = 0.0

        def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
            assert timeout_s is not None
            self.seconds += min(5.0, timeout_s)
            return super().look_up(name, kind) if self.seconds < 20 else Answer(name, kind, Status.TEMPORARY, reason="late")

    slow = Slow({"example.com": {"TXT": ["v=spf1 " + " ".join(f"include:i{n}.example.com" for n in range(9)) + " -all"]},
                 **{f"i{n}.example.com": {"TXT": ["v=spf1 ?all"]} for n in range(9)}})
    lookups = Lookups(slow, clock=lambda: slow.seconds)
    spf = Spf()
    assert spf.mail_from(lookups, "192.0.2.1", "h.example.net", "a@example.com").result == "temperror"
    assert slow.seconds == 20
    assert spf.helo(lookups, "192.0.2.1", "h.example.net").result == "temperror"
    assert slow.seconds == 20


@pytest.mark.parametrize("record", [
    "v=spf1 a:x." + "a" * 60000 + "! -all",
    "v=spf1 a:" + "a." * 30000 + "! -all",
    "v=spf1 a:" + "/" * 60000 + " -all",
    "v=spf1 a:" + "%{" * 30000 + " -all",
    "v=spf1 exists:%{s" + "1" * 60000 + "}",
    "v=spf1 exists:" + "%{s}" * 15000,
    "v=spf1 " + "a" * 60000 + "=" + "%{" * 100,
    "v=spf1 ip6:" + "1:" * 30000,
    "v=spf1 ip4:" + "1." * 30000,
    "v=spf1" + " a" * 30000,
    "v=spf1" + " " * 60000,
])
def test_long_records_end(record: str) -> None:
    """No expression of the grammar takes time by the square of what a record of 60 KB holds."""
    assert judge(record)[0].result in ("permerror", "neutral")


def test_questions_of_a_message_are_bounded() -> None:
    zone = Zone()
    lookups = Lookups(zone, limit=3)
    early = lookups.leaving(1)
    for name in ("a.example", "b.example", "a.example", "c.example"):
        early.look_up(name, "A")
    assert early.look_up("c.example", "A").status is Status.TEMPORARY
    assert lookups.look_up("c.example", "A").status is Status.NXDOMAIN
    assert lookups.look_up("d.example", "A").status is Status.TEMPORARY
    assert zone.asked == [("a.example", "A"), ("b.example", "A"), ("c.example", "A")]


TERMS = st.one_of(
    st.sampled_from(["a", "mx", "ptr", "all", "-all", "include:r.example", "exists:%{i}.%{d}", "redirect=r.example", "exp=r.example", "ip4:192.0.2.0/24",
                     "ip6:::/0", "a:%{p}.r.example", "exists:%{S}%{L}%{h}.x", "a/0", "a//0", "mx:r.example/8//8", "x=%{l1r-}", "ptr:%{o}"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30),
    st.builds("".join, st.lists(st.sampled_from(["a", "include", "ip4", ":", "=", "/", "%", "{", "}", "d", "1", "r", ".", "x.y", "[", "\\"]), max_size=8)))
RECORDS = st.one_of(st.binary(max_size=80), st.lists(TERMS, max_size=12).map(lambda terms: " ".join(["v=spf1", *terms]).encode()))


class Anything:
    """Answers every question with whatever comes to mind, always the same for the same name."""

    def __init__(self, records: Sequence[bytes], status: Status) -> None:
        self._zone = Zone({"x": {"TXT": [[record] for record in records], "A": ["192.0.2.7"], "AAAA": ["2001:db8::7"], "MX": [(1, "r.example"), (2, "")],
                                 "PTR": ["r.example", "."]}})
        self._status = status

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        if self._status is not Status.FOUND and sum(map(ord, name)) % 3 == 0:
            return Answer(name, kind, self._status, reason="so")
        return self._zone.look_up("x", kind)


@settings(max_examples=300)
@given(st.lists(RECORDS, min_size=1, max_size=2), st.sampled_from(list(Status)), st.sampled_from(["192.0.2.7", "2001:db8::7", "::ffff:192.0.2.9", "x"]),
       st.one_of(st.text(max_size=40), st.text(max_size=10).map(lambda local: f"{local}@example.com"), st.just("\udcff@r.example")),
       st.one_of(st.text(max_size=40), st.just("h.example")))
def test_never_raises(records: list[bytes], status: Status, ip: str, sender: str, helo: str) -> None:
    spf, asks = Spf(), Anything(records, status)
    for result in (spf.mail_from(asks, ip, helo, sender, trace=True), spf.helo(asks, ip, helo, trace=True)):
        assert result.result in RESULTS
        for text in (result.reason, result.mechanism, result.explanation, *result.steps):
            assert text.isascii() and text.isprintable()
        value = received_spf(result, receiver="mx.example.test", ip=ip, helo=helo, sender=sender)
        assert value.isascii() and value.replace("\r\n\t", "").isprintable()


def test_parsing_remembers_only_what_is_small() -> None:
    spf = Spf()
    small = "v=spf1 -all"
    assert spf.parse(small) is spf.parse(small)
    large = "v=spf1" + " a" * 1000
    assert spf.parse(large) is not spf.parse(large)
    with pytest.raises(pyspf.PermError):
        parse("v=spf1 %")
