"""TLS reports: what is counted for whom, and the report as RFC 8460 wants it."""

from __future__ import annotations

import email
import email.policy
import gzip
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gmta.config import ConfigError
from gmta.deliver import dane
from gmta.deliver.mtasts import Policy
from gmta.deliver.nexthop import Target
from gmta.deliver.tlspolicy import DomainPolicy, TlsRule
from gmta.deliver.tlsrpt import DAY_S, LOOK_S, SPREAD_S, TlsReports, leave_in_maildrop, over_https
from gmta.mail.address import Address
from gmta.queue import maildrop
from gmta.services.state import MemoryState
from gmta.services.webhooks import PostFailed
from gmta.testing import FakeClock, MemoryLog, make_config
from gmta.testing.authority import Authority
from gmta.testing.zone import Zone

TARGET = Target("mx.example.org", "192.0.2.1", 25)
STS = Policy("enforce", ("mx.example.org",), 86400, lines=("version: STSv1", "mode: enforce", "mx: mx.example.org", "max_age: 86400"))


class World:
    """Two workers that count together."""

    def __init__(self, record: str = "v=TLSRPTv1; rua=mailto:tls@example.org", **keys: Any) -> None:
        self.clock = FakeClock()
        self.clock.now -= self.clock.now % DAY_S  # midnight
        self.log = MemoryLog()
        self.zone = Zone({"_smtp._tls.example.org": {"TXT": [record]}})
        self.state = MemoryState(self.clock)
        self.sent: list[tuple[Address, list[Address], bytes]] = []
        self.failing = False
        self.posted: list[tuple[str, str, bytes]] = []
        self.status: int | PostFailed = 201
        self.keys = SimpleNamespace(**{"sender": "", "organization": "", **keys})
        self.workers = [self.worker() for _ in range(2)]

    def worker(self) -> TlsReports:
        return TlsReports(self.keys, "mx.example.test", self.zone, self.state, self.log, self.clock, self.submit, self.post,
                          lambda function: None)

    def submit(self, sender: Address, recipients: list[Address], octets: bytes) -> None:
        if self.failing:
            raise OSError("no room")
        self.sent.append((sender, recipients, octets))

    def post(self, url: str, content_type: str, octets: bytes) -> int:
        self.posted.append((url, content_type, octets))
        if isinstance(self.status, PostFailed):
            raise self.status
        return self.status

    def note(self, result: str = "", *, rule: TlsRule | None = None, sts: Policy | None = None, domain: str = "example.org", **facts: str) -> None:
        for worker in self.workers:
            worker.note(DomainPolicy(domain, sts=sts), rule or TlsRule(), TARGET, result, **facts)

    def send_due(self) -> None:
        for worker in self.workers:
            worker.send_due()

    def report(self) -> dict[str, Any]:
        """The only report that was sent."""
        (_, _, octets), = self.sent
        part = list(email.message_from_bytes(octets, policy=email.policy.SMTP).iter_parts())[1]  # type: ignore[attr-defined]
        found: dict[str, Any] = json.loads(gzip.decompress(part.get_content()))
        return found


def test_a_report_as_it_is_mailed() -> None:
    world = World(organization='Ex "ample" GmbH', sender="tls-reports@example.test")
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    world.send_due()
    world.send_due()  # nobody sends it again
    (sender, recipients, octets), = world.sent
    assert str(sender) == "tls-reports@example.test" and [str(one) for one in recipients] == ["tls@example.org"]
    assert octets.isascii() and max(map(len, octets.split(b"\r\n"))) < 998 and b"\n" not in octets.replace(b"\r\n", b"")
    message = email.message_from_bytes(octets, policy=email.policy.SMTP)
    assert not message.defects and message.get_content_type() == "multipart/report" and message.get_param("report-type") == "tlsrpt"
    assert message["From"] == 'Ex ample GmbH <tls-reports@example.test>' and message["TLS-Report-Domain"] == "example.org"
    assert message["TLS-Report-Submitter"] == "mx.example.test" and message["Auto-Submitted"]
    assert message["TLS-Required"] == "No"
    assert message["Subject"] == "Report Domain: example.org Submitter: mx.example.test Report-ID: <2026-01-05.example.org@mx.example.test>"
    text, report = message.iter_parts()
    assert "mail hosts of example.org" in text.get_content()
    assert report.get_content_type() == "application/tlsrpt+gzip"
    assert report.get_filename() == "mx.example.test!example.org!1767571200!1767657599.json.gz"
    assert json.loads(gzip.decompress(report.get_content())) == {
        "organization-name": 'Ex "ample" GmbH', "contact-info": "tls-reports@example.test",
        "report-id": "2026-01-05.example.org@mx.example.test",
        "date-range": {"start-datetime": "2026-01-05T00:00:00Z", "end-datetime": "2026-01-05T23:59:59Z"},
        "policies": [{"policy": {"policy-type": "no-policy-found", "policy-domain": "example.org"},
                      "summary": {"total-successful-session-count": 2, "total-failure-session-count": 0}}]}


def test_sessions_are_told_apart_by_policy_and_by_what_went_wrong() -> None:
    world = World()
    sts = TlsRule("verify", ("mx.example.org",), source="mta-sts")
    world.note(rule=sts, sts=STS)
    world.note("certificate-expired", rule=sts, sts=STS, reason="certificate has expired", source="198.51.100.1")
    world.note("certificate-expired", rule=sts, sts=STS, reason="certificate has expired", source="198.51.100.1")
    world.note("starttls-not-supported", rule=sts, sts=STS)
    world.note("validation-failure", rule=TlsRule(noted="validation-failure"), sts=STS)
    world.note(rule=TlsRule("dane", (), (dane.Tlsa(3, 1, 1, b"\xab" * 32),), "mx.example.org", "dane"))
    world.note()
    world.workers[0].fetch_failed("example.org", "sts-policy-invalid", "no mx")
    world.clock.advance(DAY_S + SPREAD_S)
    world.send_due()
    policies = {policy["policy"]["policy-type"] + str(len(policy["policy"].get("policy-string", ()))): policy for policy in world.report()["policies"]}
    assert set(policies) == {"sts4", "sts0", "tlsa1", "no-policy-found0"}
    found = policies["sts4"]
    assert found["policy"] == {"policy-type": "sts", "policy-string": list(STS.lines), "policy-domain": "example.org", "mx-host": ["mx.example.org"]}
    assert found["summary"] == {"total-successful-session-count": 2, "total-failure-session-count": 8}
    assert {detail["result-type"]: detail["failed-session-count"] for detail in found["failure-details"]} == {
        "certificate-expired": 4, "starttls-not-supported": 2, "validation-failure": 2}
    assert {"result-type": "certificate-expired", "sending-mta-ip": "198.51.100.1", "receiving-mx-hostname": "mx.example.org", "receiving-ip": "192.0.2.1",
            "failed-session-count": 4, "failure-reason-code": "certificate has expired"} in found["failure-details"]
    assert policies["tlsa1"]["policy"]["policy-string"] == ["3 1 1 " + "ab" * 32] and policies["tlsa1"]["policy"]["mx-host"] == ["mx.example.org"]
    assert policies["sts0"]["failure-details"] == [{"result-type": "sts-policy-invalid", "failed-session-count": 1, "failure-reason-code": "no mx"}]


def test_a_report_waits_for_its_time_and_is_for_one_day() -> None:
    world = World()
    world.note()
    world.send_due()
    world.clock.advance(DAY_S)
    world.note()  # the next day's
    sent_at = None
    for _ in range(SPREAD_S // 600 + 1):
        world.send_due()
        if world.sent and sent_at is None:
            sent_at = world.clock.now % DAY_S
        world.clock.advance(600)
    assert sent_at is not None and len(world.sent) == 1
    assert world.report()["policies"][0]["summary"]["total-successful-session-count"] == 2


def test_what_could_not_be_left_is_left_later() -> None:
    world = World()
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    world.failing = True
    world.send_due()
    world.failing = False
    world.clock.advance(LOOK_S)
    assert world.log.of("tls report can't be sent") and not world.sent
    world.send_due()
    assert len(world.sent) == 1


def test_a_report_waits_where_dns_can_not_tell_who_gets_it() -> None:
    world = World()
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    for worker in world.workers:
        worker._resolver = Zone({"_smtp._tls.example.org": {"rcode": "SERVFAIL"}})
    world.send_due()
    assert not world.sent
    for worker in world.workers:
        worker._resolver = world.zone
    world.clock.advance(LOOK_S)
    world.send_due()
    world.send_due()
    assert len(world.sent) == 1


@pytest.mark.parametrize(("record", "addresses", "urls"), [
    ("v=TLSRPTv1; rua=mailto:a@b.example,https://c.example/x , mailto:d%2Be@f.example?subject=x", ["a@b.example", "d+e@f.example"], ["https://c.example/x"]),
    ("v=TLSRPTv1;rua=MAILTO:a@b.example;x=y", ["a@b.example"], []), ("v=TLSRPTv1; rua=HTTPS://c.example/x?y=z;", [], ["HTTPS://c.example/x?y=z"]),
    ("v=TLSRPTv1 ;\tx=mailto:x@b.example ; rua=mailto:a@b.example", ["a@b.example"], []),
    ("v=TLSRPTv2; rua=mailto:a@b.example", [], []), ("v=TLSRPTv10; rua=mailto:a@b.example", [], []),
    ("v=TLSRPTv1", [], []), ("v=TLSRPTv1; rua=mailto:nobody", [], []), ("rua=mailto:a@b.example", [], []),
    ("v=TLSRPTv1; rua=http://c.example/,https://me:secret@c.example/,https://,https://c.example:x/", [], [])])
def test_only_who_asks_is_counted(record: str, addresses: list[str], urls: list[str]) -> None:
    world = World(record)
    world.note()
    world.note(domain="other.example")
    assert bool(world.state.scan("tlsrpt:")) == bool(addresses or urls)
    world.clock.advance(DAY_S + SPREAD_S)
    world.send_due()
    assert [[str(one) for one in recipients] for _, recipients, _ in world.sent] == ([addresses] if addresses else [])
    assert [url for url, _, _ in world.posted] == urls


BOTH = "v=TLSRPTv1; rua=mailto:a@b.example,https://c.example/x"


def test_a_report_as_it_is_posted() -> None:
    world = World(BOTH)
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    world.send_due()
    world.send_due()
    (url, content_type, octets), = world.posted
    assert (url, content_type) == ("https://c.example/x", "application/tlsrpt+gzip")
    assert json.loads(gzip.decompress(octets)) == world.report()  # what the mail has, with the same report-id


@pytest.mark.parametrize(("status", "again"), [(PostFailed("nobody there"), True), (500, True), (429, True), (302, False), (404, False)])
def test_what_could_not_be_posted_is_posted_later_and_not_mailed_again(status: int | PostFailed, again: bool) -> None:
    world = World(BOTH)
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    world.status = status
    world.send_due()
    world.status = 200
    world.clock.advance(LOOK_S)
    world.send_due()
    world.send_due()
    assert len(world.posted) == 1 + again and len(world.sent) == 1
    assert len({octets for _, _, octets in world.posted}) == 1
    assert len(world.log.of("tls report can't be posted" if isinstance(status, PostFailed) else "tls report refused")) == 1


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, str, list[tuple[str, dict[str, str], bytes]]]]:
    """(authority's file, URL, requests) of an HTTPS server for reports.example; it sends /moved away."""
    authority, requests = Authority(tmp_path), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append((self.path, dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(307 if self.path == "/moved" else 201)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

        do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("reports.example"))
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[assignment, method-assign]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield authority.file, f"https://reports.example:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def test_over_https(web: tuple[str, str, list[tuple[str, dict[str, str], bytes]]]) -> None:
    ca_file, url, requests = web
    zone = Zone({"reports.example": {"A": "127.0.0.1"}, "other.example": {"A": "127.0.0.1"}})
    post = over_https(zone, FakeClock(), allow_private=True, ca_file=ca_file)
    assert post(f"{url}/tls?for=example.org", "application/tlsrpt+gzip", b"\x1f\x8b\x00") == 201
    (path, headers, body), = requests
    assert (path, headers["Content-Type"], body) == ("/tls?for=example.org", "application/tlsrpt+gzip", b"\x1f\x8b\x00")
    assert headers["Host"] == url.removeprefix("https://") and not any(name.lower().startswith("webhook") for name in headers)
    assert post(f"{url}/moved", "text/plain", b"") == 307 and len(requests) == 2  # redirects are not followed
    for refused, why in ((over_https(zone, FakeClock(), allow_private=False, ca_file=ca_file), "no public address"),
                         (over_https(zone, FakeClock(), allow_private=True), "certificate verify failed")):
        with pytest.raises(PostFailed, match=why):
            refused(f"{url}/x", "text/plain", b"")
    with pytest.raises(PostFailed, match=r"doesn't match|not valid for"):
        post(url.replace("reports", "other"), "text/plain", b"")
    (gone := Path(ca_file).with_name("gone.pem")).write_text("")
    with pytest.raises(PostFailed, match="authorities"):
        over_https(zone, FakeClock(), allow_private=True, ca_file=str(gone))(f"{url}/x", "text/plain", b"")
    with pytest.raises(PostFailed, match="no public address"):
        over_https(zone, FakeClock(), allow_private=False)("https://127.0.0.1/x", "text/plain", b"")
    assert len(requests) == 2


def test_any_session_after_a_start_has_the_reports_of_yesterday_looked_for() -> None:
    world = World()
    world.note()
    begun: list[Any] = []
    again = TlsReports(world.keys, "mx.example.test", world.zone, world.state, world.log, world.clock, world.submit, world.post, begun.append)
    for _ in range(2):
        again.note(DomainPolicy("other.example"), TlsRule(), TARGET)
        again._loop = begun
    assert begun == [again._look_on]


def test_two_records_are_none() -> None:
    world = World()
    world.zone["_smtp._tls.example.org"] = {"TXT": ["v=TLSRPTv1; rua=mailto:a@b.example"] * 2 + ["v=TLSRPTv1; rua=mailto:c@b.example"]}
    world.note()
    assert not world.state.scan("tlsrpt")


def test_it_is_left_in_the_maildrop(tmp_path: Path) -> None:
    (tmp_path / maildrop.DIRECTORY).mkdir()
    leave_in_maildrop(str(tmp_path), FakeClock())(Address.parse("postmaster@mx.example.test"), [Address.parse("tls@example.org")], b"Subject: x\r\n\r\n")
    (path,) = (tmp_path / maildrop.DIRECTORY).iterdir()
    opened = maildrop.open_drop(str(path))
    assert (str(opened.drop.sender), opened.drop.notify) == ("postmaster@mx.example.test", {"NEVER"})
    assert opened.file.read() == b"Subject: x\r\n\r\n"
    opened.file.close()
    with pytest.raises(OSError):
        leave_in_maildrop(str(tmp_path / "gone"), FakeClock())(Address.parse("a@b.example"), [Address.parse("c@d.example")], b"")


def test_its_sender_is_an_address() -> None:
    assert make_config("[tlsrpt]\nsend = yes\nsender = tls@example.test\n").tlsrpt.sender == "tls@example.test"
    with pytest.raises(ConfigError, match="sender: expected an address"):
        make_config("[tlsrpt]\nsender = nobody\n")


def test_what_was_sent_is_not_written_down_again() -> None:
    world = World()
    world.note()
    world.clock.advance(DAY_S + SPREAD_S)
    world.send_due()
    counted = world.state.scan("tlsrpt-sent:")
    for _ in range(5):
        world.send_due()
    assert len(world.sent) == 1 and world.state.scan("tlsrpt-sent:") == counted
