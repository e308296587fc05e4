"""What TLS must be: [tls_policy], DANE records and chains, MTA-STS policies and how they are kept, and whether the resolver validates."""

from __future__ import annotations

import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.config import TlsDemand
from gmta.deliver import dane, mtasts
from gmta.deliver.mtasts import FAILED_S, MAX_BODY, FetchFailed, HttpsFetch, MtaSts, Policy
from gmta.deliver.nexthop import Target
from gmta.deliver.tlspolicy import Contexts, TlsPolicies, TlsRule, Unusable, Validation
from gmta.services.state import MemoryState
from gmta.testing import FakeClock, MemoryLog
from gmta.testing.authority import Authority, Issued, tlsa
from gmta.testing.zone import Zone

# --- DANE: records and chains -----------------------------------------------------------------------------------------


class Chains:
    """A root, an authority under it, and certificates."""

    def __init__(self, folder: Path) -> None:
        self.root = Authority(folder, "Root")
        self.middle = Authority(folder, "Middle", self.root)
        self.good = self.middle.issue("mx.example.org", "mail.example.org")
        self.wild = self.middle.issue("*.example.org")
        self.old = self.middle.issue("mx.example.org", days=-1)
        self.other = Authority(folder, "Other").issue("mx.example.org")
        self.bare = self.middle.issue("mx.example.org", chain=False)


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Chains:
    return Chains(tmp_path_factory.mktemp("chains"))


def records(*found: tuple[int, int, int, str]) -> tuple[dane.Tlsa, ...]:
    return dane.usable(SimpleNamespace(usage=usage, selector=selector, mtype=mtype, cert=bytes.fromhex(data)) for usage, selector, mtype, data in found)


def judged(issued: Issued, *found: tuple[int, int, int, str], names: tuple[str, ...] = ("mx.example.org",)) -> str:
    try:
        return dane.match(issued.der, records(*found), names, time.time())
    except dane.Mismatch as mismatch:
        return str(mismatch)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("matching", [0, 1, 2])
def test_end_entity_and_trust_anchor(chains: Chains, selector: int, matching: int) -> None:
    for issued in (chains.good, chains.old, chains.bare):  # dates and names do not count with DANE-EE
        assert judged(issued, issued.tlsa(3, selector, matching), names=("other.example",)) == "dane-ee"
    for of in (0, 1, 2):  # the certificate itself may be the anchor too
        assert judged(chains.good, chains.good.tlsa(2, selector, matching, of=of)) == "dane-ta"
    assert judged(chains.good, chains.other.tlsa(3, selector, matching)) == "the certificate is none of those in TLSA"
    assert "no trust anchor" in judged(chains.good, chains.other.tlsa(2, selector, matching, of=1))


def test_a_trust_anchor_asks_for_name_date_and_chain(chains: Chains) -> None:
    anchor = chains.good.tlsa(2, 0, 1, of=2)
    assert "not for other.example" in judged(chains.good, anchor, names=("other.example",))
    assert judged(chains.good, anchor, names=("other.example", "MAIL.example.org.")) == "dane-ta"
    assert judged(chains.wild, anchor) == "dane-ta" and "not for" in judged(chains.wild, anchor, names=("a.b.example.org", "example.org"))
    assert "out of date" in judged(chains.old, anchor)
    assert "no trust anchor" in judged(chains.bare, anchor)
    assert judged(chains.bare, tlsa(chains.middle.der, 2, 0, 0)) == "dane-ta"  # a whole certificate needs not be shown
    assert "no trust anchor" in judged(chains.bare, tlsa(chains.root.der, 2, 0, 0))


def test_a_certificate_that_is_no_authority_signs_nothing(chains: Chains, tmp_path: Path) -> None:
    """A host's own key under the anchor must not make certificates for others."""
    forged = Authority(tmp_path, "Forger")
    forged.certificate = chains.good.certificate
    chain = [chains.other.der[0], chains.good.der[0], *chains.good.der[1:]]
    with pytest.raises(dane.Mismatch, match="no trust anchor"):
        dane.match(chain, records(chains.good.tlsa(2, 0, 1, of=2)), ("mx.example.org",), time.time())


def test_records_that_mean_nothing_are_sorted_out(chains: Chains) -> None:
    good = chains.good
    assert records((0, 0, 1, good.tlsa(3, 0, 1)[3]), (1, 0, 1, good.tlsa(3, 0, 1)[3]), (3, 2, 1, "00" * 32), (3, 1, 3, "00" * 32),
                   (3, 1, 1, "00" * 31), (3, 1, 2, "00" * 32)) == ()
    both = records(good.tlsa(3, 1, 1), (3, 1, 2, "00" * 64))  # RFC 7671 section 9: the stronger digest decides
    assert [one.matching for one in both] == [2] and judged(good, good.tlsa(3, 1, 1), (3, 1, 2, "00" * 64)) != "dane-ee"
    assert judged(good, good.tlsa(3, 1, 1), (3, 0, 2, "00" * 64)) == "dane-ee"


def test_an_anchor_that_is_no_certificate_spoils_no_other_record(chains: Chains) -> None:
    assert judged(chains.good, (2, 0, 0, "3003020101"), chains.good.tlsa(2, 0, 1, of=2)) == "dane-ta"
    assert "no trust anchor" in judged(chains.good, (2, 0, 0, "3003020101"))


@given(st.lists(st.binary(max_size=60), max_size=3))
@settings(max_examples=30)
def test_certificates_that_can_not_be_read_match_nothing(chain: list[bytes]) -> None:
    with pytest.raises(dane.Mismatch):
        dane.match(chain, (dane.Tlsa(3, 1, 1, b"x" * 32), dane.Tlsa(2, 0, 0, b"y")), ("x",), 0.0)


def test_a_worker_that_judges_no_certificate_does_without_x509() -> None:
    code = "import sys, gmta.worker, gmta_plugins.relay; sys.exit('cryptography.x509' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("presented", "wanted", "covered"), [
    ("mx.example.org", "MX.Example.org", True), ("mx.example.org", "mx.example.com", False), ("*.example.org", "mx.example.org", True),
    ("*.example.org", "a.mx.example.org", False), ("*.example.org", "example.org", False), ("*.org", "example.org", False),
    ("m*.example.org", "mx.example.org", False), ("*", "org", False), ("", "", False), ("mx.example.org", ".example.org", True),
    ("*.example.org", ".example.org", True), ("example.org", ".example.org", False), ("xexample.org", ".example.org", False)])
def test_names(presented: str, wanted: str, covered: bool) -> None:
    assert dane.covers(presented, wanted) is covered


# --- which rule -------------------------------------------------------------------------------------------------------

TARGET = Target("mx.example.org", "192.0.2.1", 25, "mx.example.org", secure=True)
PLAIN = TARGET._replace(secure=False)
TLSA_NAME = "_25._tcp.mx.example.org"
GOOD = {"TLSA": (3, 1, 1, "ab" * 32), "ad": True}


class Fixed(MtaSts):
    """MTA-STS with the given policy for every domain."""

    def __init__(self, policy: Policy | None) -> None:
        self.given = policy

    def policy(self, domain: str) -> Policy | None:
        return self.given


def rule(target: Target = TARGET, *, demands: dict[str, TlsDemand] | None = None, tls: str = "opportunistic", zone: dict[str, Any] | None = None,
         sts: Policy | None = None, domain: str = "example.org", smart: bool = False, validates: bool = True) -> TlsRule:
    resolver = Zone({".": {"SOA": ". . 1 1 1 1 1", "ad": validates}, **(zone or {})})
    validation = Validation(resolver, MemoryLog(), FakeClock())
    policies = TlsPolicies(demands or {}, tls, resolver, sts=Fixed(sts), validation=validation, smart=smart)
    return policies.rule(policies.of_domain(domain), target)


ENFORCE = Policy("enforce", ("mx.example.org", "*.example.net"), 86400)


def test_the_line_that_is_most_about_a_domain() -> None:
    demands = {"example.org": TlsDemand("encrypt"), ".example.org": TlsDemand("none"), ".deep.example.org": TlsDemand("verify"),
               "*": TlsDemand("verify", (), True)}
    for domain, level in (("example.org", "encrypt"), ("a.example.org", "none"), ("b.a.example.org", "none"), ("a.deep.example.org", "verify"),
                          ("deep.example.org", "none"), ("org", "verify"), ("[192.0.2.1]", "verify")):
        assert rule(demands=demands, domain=domain).level == level, domain


def test_what_a_line_says_goes_before_dane_and_mta_sts() -> None:
    for level in ("none", "may", "encrypt", "verify"):
        found = rule(demands={"example.org": TlsDemand(level)}, zone={TLSA_NAME: GOOD}, sts=ENFORCE)  # type: ignore[arg-type]
        assert (found.level, found.source) == (level, "tls_policy")
    assert rule(demands={"example.org": TlsDemand("verify")}).names == ("mx.example.org", "example.org")
    assert rule(demands={"example.org": TlsDemand("verify", ("a.example", ".b.example"))}).names == ("a.example", ".b.example")


def test_the_line_for_all_is_only_what_there_is_else() -> None:
    default = {"*": TlsDemand("encrypt", (), True)}
    assert rule(demands=default).level == "encrypt"
    assert rule(demands=default, zone={TLSA_NAME: GOOD}).level == "dane"
    assert rule(demands=default, sts=ENFORCE).source == "mta-sts"
    assert rule(demands={"*": TlsDemand("none", (), True)}, sts=ENFORCE, zone={TLSA_NAME: GOOD}).level == "none"


def test_without_a_line_the_transport_decides() -> None:
    found = rule()
    assert (found.level, found.required, found.clear_allowed, found.server_name) == ("may", False, True, "mx.example.org")
    assert found.otherwise is not None and found.otherwise.level == "none"
    assert rule(tls="required").level == "encrypt" and not rule(tls="required").clear_allowed
    assert rule(tls="off", sts=ENFORCE, zone={TLSA_NAME: GOOD}).level == "none"
    assert rule(Target("192.0.2.1", "192.0.2.1", 25)).server_name == ""  # RFC 6066 section 3: no addresses in SNI


def test_dane_where_everything_is_secure() -> None:
    found = rule(zone={TLSA_NAME: GOOD}, sts=ENFORCE)  # RFC 8461 section 2: DANE goes first
    assert (found.level, found.source, found.server_name, len(found.tlsa)) == ("dane", "dane", "mx.example.org", 1)
    assert found.names == ("mx.example.org", "example.org") and not found.clear_allowed
    assert rule(PLAIN, zone={TLSA_NAME: GOOD}).level == "may"  # the way to the host is not secure
    assert rule(zone={TLSA_NAME: GOOD | {"ad": False}}).level == "may"
    assert rule(zone={TLSA_NAME: GOOD}, validates=False).level == "may"
    assert rule(zone={TLSA_NAME: GOOD}, smart=True).level == "may"
    assert rule(zone={TLSA_NAME: GOOD}, domain="[192.0.2.1]").level == "dane"


def test_dane_with_no_usable_record_asks_for_tls_at_least() -> None:
    found = rule(zone={TLSA_NAME: {"TLSA": (0, 0, 1, "ab" * 32), "ad": True}})
    assert (found.level, found.tlsa, found.clear_allowed) == ("dane", (), False)  # RFC 7672 section 2.2


def test_dane_with_no_usable_record_weakens_nothing() -> None:
    zone = {TLSA_NAME: {"TLSA": (1, 1, 1, "ab" * 32), "ad": True}}
    found = rule(zone=zone, sts=ENFORCE)
    assert (found.level, found.source) == ("verify", "mta-sts") and not found.clear_allowed
    with pytest.raises(Unusable, match="no mail host of"):
        rule(zone=zone, sts=ENFORCE._replace(mx=("other.example.org",)))
    trial = rule(zone=zone, sts=ENFORCE._replace(mode="testing"))
    assert trial.level == "verify" and trial.otherwise is not None and trial.otherwise.level == "dane" and not trial.clear_allowed
    assert rule(zone=zone, demands={"*": TlsDemand("verify", (), True)}).level == "verify"


def test_dane_that_can_not_be_looked_up_closes_the_host() -> None:
    with pytest.raises(Unusable) as closed:
        rule(zone={TLSA_NAME: {"rcode": "SERVFAIL"}})
    assert closed.value.outcome.reply.enhanced == "4.7.5" and not closed.value.outcome.recipient_fault
    assert rule(PLAIN, zone={TLSA_NAME: {"rcode": "SERVFAIL"}}).level == "may"  # a zone that is not signed may have odd servers


def test_dane_at_the_end_of_an_alias_first() -> None:
    alias = TARGET._replace(canonical="real.example.org")
    found = rule(alias, zone={TLSA_NAME: GOOD, "_25._tcp.real.example.org": GOOD | {"TLSA": (3, 1, 1, "cd" * 32)}})
    assert found.server_name == "real.example.org" and found.names == ("real.example.org", "mx.example.org", "example.org")
    assert rule(alias, zone={TLSA_NAME: GOOD}).server_name == "mx.example.org"


def test_mta_sts_modes() -> None:
    found = rule(sts=ENFORCE)
    assert (found.level, found.names, found.source, found.clear_allowed) == ("verify", ("mx.example.org",), "mta-sts", False)
    with pytest.raises(Unusable, match="no mail host of"):
        rule(sts=ENFORCE._replace(mx=("other.example.org",)))
    trial = rule(sts=ENFORCE._replace(mode="testing"))
    assert trial.level == "verify" and trial.otherwise is not None and trial.otherwise.level == "may" and trial.clear_allowed
    strict = rule(sts=ENFORCE._replace(mode="testing"), tls="required")
    assert strict.otherwise is not None and strict.otherwise.level == "encrypt" and not strict.clear_allowed
    other = rule(sts=Policy("testing", ("other.example.org",), 1))
    assert other.level == "may" and other.noted == "validation-failure"
    assert rule(sts=Policy("none", (), 1)).level == "may"
    assert rule(sts=ENFORCE, domain="[192.0.2.1]").level == "may"


# --- whether the resolver validates -----------------------------------------------------------------------------------


def test_a_resolver_is_believed_until_it_is_seen_not_to_validate() -> None:
    def proven(zone: dict[str, Any], *, again: dict[str, Any] | None = None) -> tuple[bool, bool]:
        clock = FakeClock()
        resolver = Zone(zone)
        validation = Validation(resolver, MemoryLog(), clock, bogus="bogus.example")
        first = validation.proven()
        for name, entry in (again or {}).items():
            resolver[name] = entry
        assert validation.proven() is first  # not asked every time
        clock.advance(61)
        return first, validation.proven()

    signed = {".": {"SOA": ". . 1 1 1 1 1", "ad": True}}
    assert proven(signed | {"bogus.example": {"rcode": "SERVFAIL"}}) == (True, True)
    assert proven(signed) == (True, True)  # the name is gone: that shows nothing
    assert proven({".": {"SOA": ". . 1 1 1 1 1"}}) == (False, False)
    assert proven(signed | {"bogus.example": {"A": "192.0.2.1"}}) == (False, False)
    assert proven({".": {"rcode": "SERVFAIL"}}, again={".": {"SOA": ". . 1 1 1 1 1"}}) == (True, False)


def test_what_is_found_out_is_said_once() -> None:
    log = MemoryLog()
    validation = Validation(Zone({".": {"SOA": ". . 1 1 1 1 1"}}), log, FakeClock())
    assert [validation.proven() for _ in range(3)] == [False] * 3
    assert len(log.of("dane is off, the resolver does not validate")) == 1


# --- MTA-STS ----------------------------------------------------------------------------------------------------------

FILE = b"version: STSv1\r\nmode: enforce\r\nmx: mx.example.org\r\nmx: *.Example.net\r\nmax_age: 604800\r\n"


def test_a_policy_file() -> None:
    policy = mtasts.parse(FILE)
    assert policy == Policy("enforce", ("mx.example.org", "*.example.net"), 604800, lines=tuple(FILE.decode().split("\r\n")[:-1]))
    assert mtasts.parse(b"version:STSv1\nmode :testing\nmx:a\nmax_age: 99999999999"[:-1] + b"\nx: y\nmode: none").mode == "testing"
    assert mtasts.parse(b"version: STSv1\nmode: none\nmax_age: 0").mx == ()
    assert [policy.allows(host) for host in ("MX.example.org", "a.example.net", "a.b.example.net", "example.net", "x.example.org")] == [
        True, True, False, False, False]


@pytest.mark.parametrize("change", [
    (b"STSv1", b"STSv2"), (b"enforce", b"force"), (b"604800", b"-1"), (b"604800", b"1e9"), (b"max_age: 604800\r\n", b""), (b"mx: ", b"my: "),
    (b"*.Example.net", b"a.*.example.net"), (b"mx.example.org", b"m x"), (b"enforce", b"\xff"), (b"mode: enforce", b"mode enforce"),
    (b"604800", "\u0661".encode())])
def test_what_is_no_policy_file(change: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError):
        mtasts.parse(FILE.replace(*change))


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"version: STSv1\n", b"mode: enforce\n", b"mx: a\n", b"max_age: 1\n", b":\n", b"mx:\n"]),
                                          max_size=6).map(b"".join))
@settings(max_examples=60)
def test_a_policy_file_is_one_or_a_value_error(body: bytes) -> None:
    try:
        mtasts.parse(body)
    except ValueError:
        pass


class Site:
    """example.org's record and policy file, and an MtaSts that sees them."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.log = MemoryLog()
        self.zone = Zone({})
        self.state = MemoryState(self.clock)
        self.body: bytes | Exception = FILE
        self.fetched = 0
        self.reported: list[tuple[str, str]] = []
        self.record("v=STSv1; id=1;")
        self.sts = self.worker()

    def worker(self) -> MtaSts:
        return MtaSts(self.zone, self.state, self.log, self.clock, self.fetch, lambda domain, result, reason: self.reported.append((domain, result)))

    def record(self, *texts: str, **entry: Any) -> None:
        self.zone["_mta-sts.example.org"] = {"TXT": list(texts), **entry}

    def fetch(self, domain: str) -> bytes:
        self.fetched += 1
        gevent.sleep(0)
        if isinstance(self.body, Exception):
            raise self.body
        return self.body

    @property
    def mode(self) -> str:
        policy = self.sts.policy("example.org")
        return policy.mode if policy is not None else "-"


def test_a_policy_is_fetched_once_and_kept() -> None:
    site = Site()
    assert [site.mode, site.mode, site.worker().policy("example.org").mode] == ["enforce"] * 3 and site.fetched == 1  # type: ignore[union-attr]
    assert len(site.log.of("mta-sts policy")) == 1


def test_many_that_ask_share_one_fetch() -> None:
    site = Site()
    greenlets = [gevent.spawn(site.sts.policy, "example.org") for _ in range(10)]
    gevent.joinall(greenlets, timeout=10, raise_error=True)
    assert {greenlet.value.mode for greenlet in greenlets} == {"enforce"} and site.fetched == 1


def test_one_that_is_killed_leaves_it_to_the_next() -> None:
    site = Site()
    first, second = (gevent.spawn(site.sts.policy, "example.org") for _ in range(2))
    gevent.sleep(0)
    first.kill()
    second.join(10)
    assert second.value is not None and second.value.mode == "enforce"


def test_another_id_brings_another_policy() -> None:
    site = Site()
    assert site.mode == "enforce"
    site.body = FILE.replace(b"enforce", b"testing")
    assert site.mode == "enforce"
    site.record("v=STSv1; id=2")
    assert site.mode == "testing"
    site.body = FILE.replace(b"enforce", b"none")
    site.record("v=STSv1;id=3 ;")
    assert site.mode == "none"


@pytest.mark.parametrize("record", [{}, {"rcode": "SERVFAIL"}, {"rcode": "NXDOMAIN"}])
def test_who_hides_the_record_does_not_get_rid_of_the_policy(record: dict[str, Any]) -> None:
    site = Site()
    assert site.mode == "enforce"
    site.record(**record) if record else site.record("something else")
    assert site.mode == "enforce"
    site.clock.advance(604801)  # max_age is over
    assert site.mode == "-"


def test_who_hides_the_file_does_not_either() -> None:
    site = Site()
    assert site.mode == "enforce"
    site.record("v=STSv1; id=2")
    site.body = FetchFailed("no answer")
    assert [site.mode, site.mode] == ["enforce"] * 2 and site.fetched == 2  # not tried for each message
    assert site.reported == [("example.org", "sts-policy-fetch-error")]
    site.clock.advance(FAILED_S + 1)
    site.body = b"nonsense"
    assert site.mode == "enforce" and site.reported[-1] == ("example.org", "sts-policy-invalid")
    site.clock.advance(FAILED_S + 1)
    site.body = FILE.replace(b"enforce", b"testing")
    assert site.mode == "testing"


def test_without_a_known_policy_a_failed_fetch_means_none() -> None:
    site = Site()
    site.body = FetchFailed("no")
    assert [site.mode, site.mode] == ["-", "-"] and site.fetched == 1


def test_a_policy_is_renewed_before_it_ends() -> None:
    site = Site()
    site.body = FILE.replace(b"604800", b"3600")
    assert site.mode == "enforce"
    for _ in range(5):
        site.clock.advance(1801)
        assert site.mode == "enforce"
    assert site.fetched == 6


@pytest.mark.parametrize("texts", [(), ("v=STSv1; id=1", "v=STSv1; id=2"), ("v=STSv1",), ("v=STSv1; id=",), ("v=STSv1; id=a-b",), ("v=STSv2; id=1",),
                                   (f"v=STSv1; id={'1' * 33}",), ("id=1; v=STSv1",)])
def test_records_that_do_not_count(texts: tuple[str, ...]) -> None:
    site = Site()
    site.record(*texts) if texts else site.zone.__delitem__("_mta-sts.example.org")
    assert site.mode == "-" and site.fetched == 0


def test_other_records_at_the_name_do_no_harm() -> None:
    site = Site()
    site.record("v=spf1 -all", "v=STSv1; id=1; x=y")
    assert site.mode == "enforce"


@pytest.mark.parametrize("record", ["v=STSv1;id=1", "v=STSv1 ; x=y;\tid=1 ;", "v=STSv1; id=1; id=2", "v=STSv1; ID=2; x=id=3; id=1"])
def test_records_as_they_may_be(record: str) -> None:
    site = Site()
    site.record(record)
    policy = site.sts.policy("example.org")
    assert policy is not None and policy.id == "1"


# --- over HTTPS -------------------------------------------------------------------------------------------------------


class Web:
    """An HTTPS server on loopback with a certificate for the given names."""

    def __init__(self, issued: Issued) -> None:
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda request: reply(request, FILE)
        self.asked: list[tuple[str, str]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.headers["Host"], self.path))
                web.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*issued)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def reply(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    request.send_response(status)
    for name, value in ({"Content_Type": "text/plain", "Content_Length": str(len(body))} | headers).items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Callable[..., tuple[Web, HttpsFetch]]]:
    authority = Authority(tmp_path)
    made: list[Web] = []

    def one(*names: str, trusted: bool = True, addresses: tuple[str, ...] = ("127.0.0.1",), **facts: Any) -> tuple[Web, HttpsFetch]:
        server = Web((authority if trusted else Authority(tmp_path, "Stranger")).issue(*names, **facts))
        made.append(server)
        contexts = Contexts(authority.file)
        return server, HttpsFetch(lambda host: list(addresses), contexts.https, port=server.server.server_port)

    yield one
    for server in made:
        server.close()


Served = Callable[..., tuple[Web, HttpsFetch]]


def failure(fetch: HttpsFetch) -> tuple[str, str]:
    with pytest.raises(FetchFailed) as failed:
        fetch("example.org")
    return failed.value.result, str(failed.value)


def test_the_file_comes_over_https(web: Served) -> None:
    server, fetch = web("mta-sts.example.org", addresses=("127.0.0.99", "127.0.0.1"))
    assert fetch("example.org") == FILE and server.asked == [("mta-sts.example.org", "/.well-known/mta-sts.txt")]
    server.answer = lambda request: reply(request, FILE, Content_Type="Text/Plain; charset=utf-8")
    assert fetch("example.org") == FILE


@pytest.mark.parametrize("facts", [{"names": ("example.org",)}, {"names": ("mta-sts.example.org",), "trusted": False},
                                   {"names": ("mta-sts.example.org",), "days": -1}, {"names": ("127.0.0.1",)}])
def test_a_certificate_that_is_not_right(web: Served, facts: dict[str, Any]) -> None:
    server, fetch = web(*facts.pop("names"), **facts)
    assert failure(fetch)[0] == "sts-webpki-invalid" and not server.asked


@pytest.mark.parametrize(("answer", "said"), [
    (lambda request: reply(request, FILE, 404), "404"), (lambda request: reply(request, b"", 301, Location="https://127.0.0.1/"), "301"),
    (lambda request: reply(request, FILE, Content_Type="text/html"), "text/html"), (lambda request: reply(request, b"x" * (MAX_BODY + 1)), "more than"),
    (lambda request: reply(request, FILE[:-5], Content_Length=str(len(FILE))), "mta-sts.example.org"),
    (lambda request: request.connection.close(), "mta-sts.example.org"), (lambda request: request.wfile.write(b"what?\r\n"), "mta-sts.example.org")])
def test_answers_that_are_no_policy(web: Served, answer: Callable[[BaseHTTPRequestHandler], None], said: str) -> None:
    server, fetch = web("mta-sts.example.org")
    server.answer = answer
    result, text = failure(fetch)
    assert result == "sts-policy-fetch-error" and said in text and len(server.asked) == 1


def test_nobody_there(web: Served) -> None:
    assert "no address" in failure(web("mta-sts.example.org", addresses=())[1])[1]
    server, fetch = web("mta-sts.example.org")
    server.close()
    assert failure(fetch)[0] == "sts-policy-fetch-error"


def test_an_answer_that_drips_has_an_end(web: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtasts, "FETCH_S", 0.2)
    monkeypatch.setattr(mtasts, "Timeout", lambda connect, read: 0.1)
    server, fetch = web("mta-sts.example.org")
    stop = threading.Event()
    server.answer = lambda request: (reply(request, b"", Content_Length="500"), stop.wait(20))[0]
    assert failure(fetch)[0] == "sts-policy-fetch-error"
    stop.set()
