"""gmta/verify/dmarc.py: cases from bug reports, the examples of RFC 9989, From fields, records, failures and bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.services.dns import Answer, Status
from gmta.testing.zone import Zone
from gmta.verify import Lookups
from gmta.verify.dmarc import MAX_AUTHORS, POLICIES, Authors, DmarcResult, _domains, _name, authors_of, evaluate, parse

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "dmarc.json").read_text())
NO_SPF = ("none", "")


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in CASES])
def test_reported(case: dict[str, Any], trace: bool) -> None:
    authors = authors_of([field.encode("latin-1").partition(b":")[2] for field in case["from"]])
    outcome = evaluate(Zone(case["zone"]), authors, tuple(case["spf"]), [tuple(one) for one in case["dkim"]], trace=trace)
    assert outcome.result in case["accept"], case["statement"]
    assert outcome.disposition in case["disposition"], case["statement"]


def test_mailauth_agrees() -> None:
    """Another implementation of RFC 9989, on 160 random sets of records."""
    for case in json.loads((DATA / "dmarc_mailauth.json").read_text()):
        spf = ("pass", case["spf"]) if case["spf"] else NO_SPF
        outcome = evaluate(Zone(case["zone"]), Authors((case["author"],)), spf, [("pass", domain) for domain in case["dkim"]], trace=True)
        assert outcome.result == case["result"], case
        assert case["policy"] in (None, outcome.disposition), case
        assert not outcome.organizational_domain or case["organizational_domain"] in (None, outcome.organizational_domain), case


def judge(author: str, *vouching: str, spf: tuple[str, str] = NO_SPF, **records: Any) -> tuple[DmarcResult, Zone]:
    """The outcome for From of this domain with passing signatures of `vouching`; records: policy records by name with _ for dots."""
    zone = Zone({f"_dmarc.{name.replace('_', '.')}": entry if isinstance(entry, dict) else {"TXT": entry} for name, entry in records.items()})
    return evaluate(zone, Authors((author,)), spf, [("pass", domain) for domain in vouching]), zone


# --- the examples of RFC 9989, appendix B -----------------------------------------------------------------------


@pytest.mark.parametrize(("author", "identifier", "aligned"), [
    ("example.com", "example.com", "s"), ("example.com", "child.example.com", "r"), ("child.example.com", "example.net", ""),
    ("child.example.com", "example.com", "r"),
])
@pytest.mark.parametrize("mode", ["r", "s"])
def test_appendix_b_1(author: str, identifier: str, aligned: str, mode: str) -> None:
    expected = "pass" if aligned and mode in (aligned, "r") else "fail"
    record = f"v=DMARC1; p=none; adkim={mode}; aspf={mode}"
    assert judge(author, identifier, example_com=record)[0].result == expected
    assert judge(author, spf=("pass", identifier), example_com=record)[0].result == expected


def test_appendix_b_4_1() -> None:
    records = {"example_com": "v=DMARC1; p=reject", "signing_example_com": "v=DMARC1; p=none"}
    assert judge("example.com", "signing.example.com", **records)[0].aligned == ("dkim=signing.example.com",)
    assert judge("example.com", spf=("pass", "example.com"), **records)[0].aligned == ("spf=example.com",)
    assert judge("signing.example.com", **records)[0].policy_domain == "signing.example.com"


def test_appendix_b_4_2() -> None:
    author = "a.b.c.d.e.f.g.h.i.j.k.example.com"
    records = {"example_com": "v=DMARC1; p=reject", "signing_example_com": "v=DMARC1; p=none"}
    outcome, zone = judge(author, **records)
    assert (outcome.result, outcome.policy_domain, outcome.organizational_domain) == ("fail", "example.com", "example.com")
    assert [name for name, _ in zone.asked] == [f"_dmarc.{name}" for name in (
        author, "g.h.i.j.k.example.com", "h.i.j.k.example.com", "i.j.k.example.com", "j.k.example.com", "k.example.com", "example.com", "com")]
    assert judge(author, "signing.example.com", **records)[0].result == "pass"
    assert judge(author, spf=("pass", "example.com"), **records)[0].result == "pass"


def test_appendix_b_4_3() -> None:
    records = {"giant_bank_example": "v=DMARC1; p=reject", "bank_example": "v=DMARC1; p=none; psd=y"}
    outcome, zone = judge("giant.bank.example", "mail.mega.bank.example", **records)
    assert (outcome.result, outcome.disposition, outcome.policy_domain) == ("fail", "reject", "giant.bank.example")
    assert ("_dmarc.example", "TXT") not in zone.asked
    outcome, _ = judge("giant.bank.example", "mail.mega.bank.example", spf=("pass", "mail.giant.bank.example"), **records)
    assert outcome.aligned == ("spf=mail.giant.bank.example",)


# --- the walk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("labels", "asked"), [(1, 1), (2, 2), (7, 7), (8, 8), (9, 8), (30, 8)])
def test_walk_asks_eight_names_at_most(labels: int, asked: int) -> None:
    outcome, zone = judge(".".join(["x"] * (labels - 1) + ["com"]))
    assert (outcome.result, len(zone.asked)) == ("none", asked)


def test_nothing_is_asked_that_can_not_matter() -> None:
    outcome, zone = judge("news.example.com", "news.example.com", "other.example", news_example_com="v=DMARC1; p=reject")
    assert outcome.result == "pass"
    assert zone.asked == [("_dmarc.news.example.com", "TXT")]
    outcome, zone = judge("news.example.com", "a.other.example", news_example_com="v=DMARC1; p=reject")
    assert outcome.result == "fail"
    assert zone.asked == [("_dmarc.news.example.com", "TXT")]
    outcome, zone = judge("news.example.com", "x.example.com", news_example_com="v=DMARC1; p=reject; adkim=s")
    assert outcome.result == "fail"
    assert zone.asked == [("_dmarc.news.example.com", "TXT")]


@pytest.mark.parametrize(("record", "policies"), [
    ("v=DMARC1; p=quarantine", ("quarantine", "quarantine", "quarantine")),
    ("v=DMARC1; p=none; sp=quarantine", ("none", "quarantine", "quarantine")),
    ("v=DMARC1; p=none; np=reject", ("none", "none", "reject")),
    ("v=DMARC1; p=reject; sp=quarantine; np=none", ("reject", "quarantine", "none")),
])
def test_policy_of_domain_subdomain_and_what_is_not_there(record: str, policies: tuple[str, str, str]) -> None:
    zone = Zone({"_dmarc.example.com": {"TXT": record}, "there.example.com": {"MX": (1, "x.example")}, "alias.example.com": {"CNAME": "gone.example"}})
    domain, there, ghost = policies
    for author, policy in (("example.com", domain), ("there.example.com", there), ("alias.example.com", there), ("ghost.example.com", ghost)):
        outcome = evaluate(zone, Authors((author,)), NO_SPF, [])
        assert (outcome.result, outcome.policy, outcome.disposition) == ("fail", policy, policy)


def test_test_mode_is_one_level_below() -> None:
    for policy, disposition in (("reject", "quarantine"), ("quarantine", "none"), ("none", "none")):
        outcome, _ = judge("example.com", example_com=f"v=DMARC1; p={policy}; t=y")
        assert (outcome.result, outcome.policy, outcome.disposition) == ("fail", policy, disposition)


# --- DNS failure ------------------------------------------------------------------------------------------------

FAILED = {"rcode": "SERVFAIL"}


@pytest.mark.parametrize(("author", "vouching", "records", "expected"), [
    ("example.com", [], {"example_com": FAILED}, ("temperror", "tempfail")),
    ("a.b.example.com", [], {"b_example_com": FAILED, "example_com": "v=DMARC1; p=reject"}, ("temperror", "tempfail")),
    ("example.com", [], {"example_com": "v=DMARC1; p=reject", "com": FAILED}, ("fail", "reject")),
    ("example.com", ["example.com"], {"example_com": "v=DMARC1; p=reject", "com": FAILED}, ("pass", "none")),
    ("example.com", ["spam.example"], {"example_com": "v=DMARC1; p=reject", "com": FAILED}, ("fail", "reject")),
    ("example.com", ["x.example.com"], {"example_com": "v=DMARC1; p=reject", "com": FAILED}, ("temperror", "tempfail")),
    ("example.com", ["x.example.com"], {"example_com": "v=DMARC1; p=none", "com": FAILED}, ("temperror", "none")),
    ("example.com", ["x.example.com"], {"example_com": "v=DMARC1; p=reject; adkim=s", "com": FAILED}, ("fail", "reject")),
    ("example.com", ["x.example.com", "example.com"], {"example_com": "v=DMARC1; p=reject", "com": FAILED}, ("pass", "none")),
    ("x.example.com", [], {"example_com": "v=DMARC1; p=none; np=reject"}, ("temperror", "tempfail")),
])
def test_dns_failure(author: str, vouching: list[str], records: dict[str, Any], expected: tuple[str, str]) -> None:
    zone = Zone({f"_dmarc.{name.replace('_', '.')}": entry if isinstance(entry, dict) else {"TXT": entry} for name, entry in records.items()}
                | {"x.example.com": FAILED})
    outcome = evaluate(zone, Authors((author,)), NO_SPF, [("pass", domain) for domain in vouching])
    assert (outcome.result, outcome.disposition) == expected


@pytest.mark.parametrize(("spf", "dkim", "expected"), [
    (("temperror", "example.com"), [], ("temperror", "tempfail")),
    (("temperror", "x.example.com"), [("fail", "example.com")], ("temperror", "tempfail")),
    (("temperror", "example.net"), [("temperror", "spam.example")], ("fail", "reject")),
    (("temperror", "example.com"), [("pass", "example.com")], ("pass", "none")),
    (("permerror", "example.com"), [("permerror", "example.com"), ("policy", "example.com"), ("neutral", "example.com")], ("fail", "reject")),
])
def test_what_could_not_be_verified_now_may_have_vouched(spf: tuple[str, str], dkim: list[tuple[str, str]], expected: tuple[str, str]) -> None:
    zone = Zone({"_dmarc.example.com": {"TXT": "v=DMARC1; p=reject"}})
    outcome = evaluate(zone, Authors(("example.com",)), spf, dkim)
    assert (outcome.result, outcome.disposition) == expected


# --- records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "v=DMARC1 p=none", "v=DMARC2; p=none", "v=dmarc1; p=none", " v=DMARC1; p=none", "p=none; v=DMARC1", "v=DMARC1.; p=none",
                                  "v=DMARC1\xa0; p=none", "v=DMARC1\n; p=none", "vv=DMARC1"])
def test_no_record(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(("text", "expected"), [
    ("v=DMARC1; rua=mailto:r@example.com", {"p": "none", "usable": True, "psd": "u", "strict_dkim": False, "testing": False, "fo": "0"}),
    ("V \t= DMARC1 \t;\tp = REJECT ;", {"p": "reject", "usable": True}),
    ("v=DMARC1;;;p=reject;=;x;adkim=S;aspf=s;psd=Y;t=Y", {"p": "reject", "strict_dkim": True, "strict_spf": True, "psd": "y", "testing": True}),
    ("v=DMARC1; p=reject; adkim=x; aspf=; psd=x; t=x", {"p": "reject", "strict_dkim": False, "strict_spf": False, "psd": "u", "testing": False}),
    ("v=DMARC1; p=reject; rua=\xff", {"p": "reject", "rua": ""}),
    ("v=DMARC1; p=reject; p=none", {"p": "reject"}),
    ("v=DMARC1; p=rejekt", {"p": "none", "usable": False}),
    ("v=DMARC1", {"p": "none", "usable": False}),
    ("v=DMARC1; p=", {"p": "none", "usable": False}),
    ("v=DMARC1; p=reject; sp=x", {"p": "none", "usable": False}),
    ("v=DMARC1; p=reject; np=x; rua=nobody", {"p": "none", "usable": False}),
    ("v=DMARC1; p=reject; np=x; rua=,mailto:r@example.com!10m", {"p": "none", "np": "", "usable": True}),
    ("v=DMARC1; p=reject; np=x; rua=https://example.com/r", {"p": "none", "usable": True}),
])
def test_record(text: str, expected: dict[str, Any]) -> None:
    record = parse(text)
    assert record is not None
    assert {key: getattr(record, key) for key in expected} == expected


def test_a_policy_that_is_not_valid_is_no_policy() -> None:
    outcome, _ = judge("example.com", example_com="v=DMARC1; p=rejekt")
    assert (outcome.result, outcome.disposition) == ("none", "none")


# --- From -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "domains", "good"), [
    ("a@example.com", "example.com", True),
    (" A B <a@EXAMPLE.com>\r\n", "example.com", True),
    ("=?utf-8?q?x=40bank=2Eexample?= <a@example.com>", "example.com", True),
    ('"boss@bank.example, CEO" <a@example.com>', "example.com", True),
    ('"boss\\" <x@bank.example>" <a@example.com>', "example.com", True),
    ("boss@bank.example <a@example.com>", "example.com", True),
    ("(boss@bank.example (x\\)) ) a@example.com (x)", "example.com", True),
    ('(he said "hi) a@example.com', "example.com", True),
    ("a@(x)example(y).(z)com", "example.com", True),
    ("a @ example . com", "example.com", True),
    ("<a@example.com> (x)", "example.com", True),
    ("X <@relay.example,@other.example:a@example.com>", "example.com", True),
    ('"a@b"@example.com', "example.com", True),
    ("a@example.com.", "example.com", True),
    ("a@b\u00fccher.example", "xn--bcher-kva.example", True),
    ("a@xn--bcher-kva.example", "xn--bcher-kva.example", True),
    ("a@\uff45xample\u3002com", "example.com", True),
    ("Group: a@example.com, b@example.com;", "example.com", True),
    ("a@example.com, b@example.org", "example.com example.org", True),
    ("a@example.com,, b@Example.COM,", "example.com", True),
    ("<a@example.com> <b@example.org>", "example.com example.org", True),
    ("a@example.com b@example.org", "example.com example.org", True),
    ("boss@bank.example <>", "bank.example", True),
    ("X <<a@example.com>>", "example.com", True),
    ("X <a@example.com", "example.com", True),
    ('"X <a@example.com>', "example.com", True),
    ("(X <a@example.com>", "example.com", True),
    ("a@example.com (x, boss@bank.example", "example.com bank.example", True),
    ("Undisclosed: ;", "", False),
    ("", "", False),
    ("MAILER-DAEMON", "", False),
    ('"a@example.com"', "", False),
    ("a@[192.0.2.1]", "", False),
    ("a@", "", False),
    ("a@example..com", "", False),
    ("a@b\udcff.example", "", False),
    ("a@example.com, b@exa..mple", "example.com", False),
])
def test_from(value: str, domains: str, good: bool) -> None:
    authors = authors_of([value.encode("utf-8", "surrogateescape")])
    assert authors.domains == tuple(domains.split())
    assert (authors.problem == "") is good
    assert not authors.excessive


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["a", "B c", ".", " ", "@", "<", ">", "<a@", "example.com>", '"', '"x, y"', "\\", "(", ")", ",", ":", ";", "=?q?=", "\u00fc",
                                 "\r\n ", "-", "example.org"]), max_size=8).map("".join))
def test_the_short_way_for_plain_fields_reads_what_the_long_one_does(value: str) -> None:
    expected = [domain for domain in map(_name, _domains(value)) if domain]
    assert authors_of([value.encode()]).domains == tuple(dict.fromkeys(expected))


def test_several_authors_take_the_strictest_policy_and_never_pass() -> None:
    zone = Zone({"_dmarc.bank.example": {"TXT": "v=DMARC1; p=reject"}, "_dmarc.example.com": {"TXT": "v=DMARC1; p=quarantine"},
                 "_dmarc.example.net": {"TXT": "v=DMARC1; p=none"}, "_dmarc.late.example": {"rcode": "SERVFAIL"}})
    own = [("pass", "example.com"), ("pass", "bank.example")]
    for field, dkim, expected in (
            ("a@example.com, b@bank.example", [], ("fail", "reject")),
            ("a@example.com, b@example.net", [], ("fail", "quarantine")),
            ("a@example.com, b@example.org", [], ("fail", "quarantine")),
            ("a@example.com, b@bank.example", own, ("permerror", "none")),
            ("a@example.com, b@example.net", own, ("fail", "none")),
            ("a@example.org, b@example.info", own, ("permerror", "none")),
            ("a@late.example, b@bank.example", own, ("temperror", "tempfail")),
            ("a@late.example, b@bank.example", [], ("fail", "reject")),
            ("a@late.example, b@example.com", [], ("temperror", "tempfail"))):
        outcome = evaluate(zone, authors_of([field.encode()]), NO_SPF, dkim)
        assert (outcome.result, outcome.disposition) == expected, field
        assert outcome.problem
    for fields in ([b"a@example.com", b"a@example.com"], [b"a@example.com", b"b@bank.example"], [b"a@example.com, b@["]):
        outcome = evaluate(zone, authors_of(fields), NO_SPF, own)
        assert outcome.result == "fail"
        assert outcome.disposition in ("quarantine", "reject")


@pytest.mark.parametrize("value", [
    ", ".join(f"a@n{number}.example" for number in range(MAX_AUTHORS + 1)),
    "a@example.com," * 300 + "boss@bank.example",
    "a@example.com" + " " * 40000 + ", boss@bank.example",
    "(" * 40000,
])
def test_more_than_is_looked_at_is_refused(value: str) -> None:
    zone = Zone()
    outcome = evaluate(zone, authors_of([value.encode()]), NO_SPF, [])
    assert (outcome.result, outcome.disposition) == ("permerror", "reject")
    assert not zone.asked


@pytest.mark.parametrize("value", [
    "x" + " " * 30000 + "<a@example.com>", "(" * 15000 + "a@example.com" + ")" * 15000, '"' * 30001 + "a@example.com", '"' + '\\"' * 15000 + "a@example.com",
    "<" * 30000 + "a@example.com", "\\" * 30000 + " a@example.com", "." * 30000 + "@example.com", ":" * 30000 + "a@example.com",
])
def test_long_from_ends(value: str) -> None:
    authors_of([value.encode()])


@pytest.mark.parametrize("text", [
    "p=a" + " " * 60000 + "b\xff", ";" * 60000, "p=" + " " * 60000 + "x", "rua=" + "mailto:" * 8000, "rua=" + "mailto:a@b!1" * 5000, "p" * 60000 + "=" + "=" * 9,
])
def test_long_record_ends(text: str) -> None:
    assert parse(f"v=DMARC1; {text}") is not None
    assert parse("v" + " " * 60000 + text) is None


# --- whatever comes ---------------------------------------------------------------------------------------------

PIECES = st.sampled_from(["a@", "example.com", "<", ">", "(", ")", '"', "\\", ",", ";", ":", "@", " ", "\r\n ", "b.example", "\u00fc", "[1]", "."])
VALUES = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=12).map(lambda parts: "".join(parts).encode()))
TAGS = st.lists(st.sampled_from(["p=reject", "p=none", "sp=x", "np=quarantine", "psd=y", "psd=n", "t=y", "adkim=s", "x", "=", "p", "rua=mailto:a@b"]), max_size=6)
RECORDS = st.one_of(st.binary(max_size=40), TAGS.map(lambda tags: ";".join(["v=DMARC1", *tags]).encode()))


class Anything:
    """Answers every question with a record or a status that depends on its name."""

    def __init__(self, records: list[bytes], status: Status) -> None:
        self._zone = Zone({"x": {"TXT": [[record] for record in records]}})
        self._status = status
        self._count = len(records)

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        number = sum(map(ord, name)) % (self._count + 1)
        answer = self._zone.look_up("x", "TXT")
        if number == self._count:
            return Answer(name, kind, self._status, reason="so")
        return Answer(name, kind, Status.FOUND, answer.records[number:number + 1])


@settings(max_examples=300)
@given(st.lists(VALUES, max_size=3), st.lists(RECORDS, min_size=1, max_size=3), st.sampled_from(list(Status)[1:]),
       st.lists(st.tuples(st.sampled_from(["pass", "fail", "temperror"]), st.one_of(st.text(max_size=20), st.just("x.example.com"), st.just("b.example"))), max_size=4))
def test_never_raises_and_never_passes_alone(values: list[bytes], records: list[bytes], status: Status, found: list[tuple[str, str]]) -> None:
    asks = Lookups(Anything(records, status))
    spf, *dkim = found or [NO_SPF]
    for trace in (False, True):
        outcome = evaluate(asks, authors_of(values), spf, dkim, trace=trace)
        assert outcome.result in ("pass", "fail", "none", "temperror", "permerror")
        assert outcome.disposition in (*POLICIES, "tempfail")
        if outcome.result == "pass":
            assert outcome.aligned and len(values) == 1
            method, _, domain = outcome.aligned[0].partition("=")
            assert any(result == "pass" for result, _ in ([spf] if method == "spf" else dkim))
            assert domain.endswith(outcome.domain.rpartition(".")[2])
        assert trace or not outcome.steps
