"""The webhook transport and plugin against a scripted web server: what is sent, what answers mean, where nothing is sent at all."""

from __future__ import annotations

import email
import email.policy
import gc
import json
import os
import random
import ssl
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from standardwebhooks import Webhook as Standard
from urllib3.exceptions import ProtocolError

from gmta import Delivery
from gmta.mail.message import Message
from gmta.mail.verdict import Kind, Outcome, Status, deferred, delivered
from gmta.queue.store import Event
from gmta.services.dns import is_public
from gmta.services.outbox import Outbox
from gmta.services.webhooks import Secrets, split_url
from gmta.testing.authority import Authority
from gmta.testing.fakes import (
    START_AT,
    FakeClock,
    load_module,
    make_envelope,
    make_file_message,
    make_message,
    make_services,
    make_session,
    make_transaction,
)
from gmta.testing.zone import Zone
from gmta_plugins.webhook import Config, Plugin, TransportConfig, Webhook, event_id, request_id
from tests.http_peer import HttpPeer, Step

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs/webhook.schema.json").read_text())
EVENT_SCHEMA = json.loads((ROOT / "docs/webhook-event.schema.json").read_text())
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"

Make = Callable[..., Any]


@pytest.fixture
def peers() -> Iterator[Callable[..., HttpPeer]]:
    made: list[HttpPeer] = []

    def make(*steps: Step, **options: Any) -> HttpPeer:
        made.append(HttpPeer(steps, **options))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Make]:
    made: list[Any] = []

    def make(url: str, *, clock: FakeClock | None = None, resolver: Any = None, **keys: Any) -> Webhook:
        services = make_services({"gmta": {"data_dir": str(tmp_path)}}, clock=clock, resolver=resolver)
        keys = {"allow_private": True, "secret": [SECRET], "request_timeout": 5.0, **keys}
        one = Webhook("hook", TransportConfig(url=url, **keys), services)
        made.append((one, services))
        return one

    yield make
    for one, services in made:
        one.close()
        services.close()


def delivery(message: Message | bytes | str | None = None, *recipients: str, first: bool = True, **facts: Any) -> Delivery:
    envelope = make_envelope(recipients=recipients or ("user@example.test",), **facts)
    message = message if isinstance(message, Message) else make_message(*(() if message is None else (message,)))
    return Delivery(envelope, envelope.recipients, message, "hook", "", first)


def posted(peer: HttpPeer) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(peer.heard[-1].body)
    jsonschema.validate(body, SCHEMA)
    return body


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_json_holds_envelope_apart_from_headers(peers: Make, transport: Make) -> None:
    peer = peers()
    one = delivery("From: \"B, Joe\" <joe@b.example>\nTo: list@example.test\nSubject: =?utf-8?q?h=C3=A4?=\n"
                   "Authentication-Results: mx.example.test; spf=pass smtp.mailfrom=b.example;\n\tdkim=fail reason=\"no; key\" header.d=b.example\n"
                   "Authentication-Results: other.example; spf=fail\nMessage-ID: <1@b>\n\nhello\n",
                   "user+work@example.test", sender="bounce@b.example")
    assert transport(peer.url("/mail?x=1")).deliver(one)[0].status is Status.DELIVERED
    body = posted(peer)
    assert peer.heard[0].target == "/mail?x=1"
    assert body["id"] == peer.heard[0].headers["webhook-id"] == body["queue_id"] == one.envelope.id
    assert body["envelope"]["from"] == "bounce@b.example" and body["envelope"]["to"] == ["user+work@example.test"]
    assert body["envelope"]["recipients"][0] | {"user": "user", "detail": "work"} == body["envelope"]["recipients"][0]
    assert body["subject"] == "hä" and body["from"] == [{"name": "B, Joe", "address": "joe@b.example"}]
    assert body["to"] == [{"name": "", "address": "list@example.test"}] and body["message_id"] == "<1@b>"
    assert body["text"] == "hello\n" and body["html"] is None and body["attachments"] == [] and "original" not in body
    assert ["Subject", "hä"] in body["headers"]
    assert body["authentication"] == [
        {"method": "spf", "result": "pass", "reason": "", "properties": {"smtp.mailfrom": "b.example"}},
        {"method": "dkim", "result": "fail", "reason": "no; key", "properties": {"header.d": "b.example"}}]


def make_mixed() -> bytes:
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"], message["To"], message["Subject"] = "a@b.example", "user@example.test", "files"
    message.set_content("plain ä\n")
    message.add_alternative("<p>ä</p>\n", subtype="html")
    message.add_attachment(bytes(range(256)), maintype="application", subtype="pdf", filename='na"me €.pdf')
    message.add_attachment("not inline\n", filename="notes.txt")
    return message.as_bytes()


def test_json_has_attachments_inline(peers: Make, transport: Make) -> None:
    peer = peers()
    transport(peer.url()).deliver(delivery(make_mixed()))
    body = posted(peer)
    assert body["text"] == "plain ä\n" and body["html"] == "<p>ä</p>\n"
    first, second = body["attachments"]
    assert (first["name"], first["type"], first["size"]) == ('na"me €.pdf', "application/pdf", 256)
    assert b64decode(first["content"], validate=True) == bytes(range(256))
    assert second["name"] == "notes.txt" and second["size"] == len(b64decode(second["content"]))


def test_multipart_has_attachments_as_parts(peers: Make, transport: Make) -> None:
    peer = peers()
    raw = make_mixed()
    transport(peer.url(), format="multipart", original="always").deliver(delivery(raw))
    heard = peer.heard[0]
    form = email.message_from_bytes(b"Content-Type: " + heard.headers["content-type"].encode() + b"\r\n\r\n" + heard.body)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
    payload = json.loads(parts["payload"].get_payload(decode=True))
    jsonschema.validate(payload, SCHEMA)
    assert [one["part"] for one in payload["attachments"]] == ["attachment-1", "attachment-2"]
    assert parts["attachment-1"].get_payload(decode=True) == bytes(range(256)) and payload["attachments"][0]["size"] == 256
    assert b'filename="na%22me \xe2\x82\xac.pdf"' in heard.body
    assert parts["original"].get_payload()[0].as_bytes().replace(b"\r\n", b"\n") == raw.replace(b"\r\n", b"\n")


def test_raw_is_the_message_itself_one_request_a_recipient(peers: Make, transport: Make) -> None:
    peer = peers()
    raw = make_mixed()
    one = delivery(raw, "user@example.test", "jörg@example.test", sender="")
    assert len(transport(peer.url(), format="raw").deliver(one)) == 2
    first, second = peer.heard
    assert first.body == raw and first.headers["content-type"] == "message/rfc822"
    assert json.loads(first.headers["gmta-envelope"]) == {"from": "", "to": ["user@example.test"]}
    assert json.loads(second.headers["gmta-envelope"])["to"] == ["jörg@example.test"]
    assert first.headers["webhook-id"] != second.headers["webhook-id"]


def test_undecodable_octets_are_replaced_flagged_and_the_original_is_there(peers: Make, transport: Make) -> None:
    peer = peers()
    raw = b"From: a@b\r\nSubject: \xff\xfe\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nx\xe9y\r\n"
    transport(peer.url()).deliver(delivery(Message.from_bytes(raw)))
    body = posted(peer)
    assert body["text"] == "x\ufffdy\n" and body["undecodable"] == ["header Subject", "text"]
    assert b64decode(body["original"], validate=True) == raw
    transport(peer.url(), original="never").deliver(delivery(Message.from_bytes(raw)))
    assert "original" not in posted(peer)


@pytest.mark.parametrize("format", ["json", "multipart", "raw"])
def test_large_messages_are_spooled_and_the_same(peers: Make, transport: Make, tmp_path: Path, format: str) -> None:
    content = random.Random(7).randbytes(700_000)
    message = EmailMessage(policy=email.policy.SMTP)
    message["From"], message["Subject"] = "a@b.example", "big"
    message.set_content("see file\n")
    message.add_attachment(content, maintype="application", subtype="octet-stream", filename="big.bin")
    raw = message.as_bytes()
    peer = peers()
    assert transport(peer.url(), format=format).deliver(delivery(make_file_message(tmp_path / "m", raw)))[0].status is Status.DELIVERED
    heard = peer.heard[0]
    assert Secrets([SECRET]).verify(*(heard.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")), [heard.body], START_AT) == ""
    if format == "raw":
        assert heard.body == raw
    elif format == "json":
        (file,) = posted(peer)["attachments"]
        assert b64decode(file["content"], validate=True) == content and file["size"] == len(content)
    else:
        assert content in heard.body


def headers_now(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("webhook-")}


@pytest.fixture(autouse=True)
def standard_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public package reads the clock itself."""
    import standardwebhooks.webhooks as package

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(START_AT, tz)

    monkeypatch.setattr(package, "datetime", Frozen)


def test_signature_verifies_with_the_public_package_for_each_secret(peers: Make, transport: Make) -> None:
    peer = peers()
    transport(peer.url(), secret=[OTHER, SECRET]).deliver(delivery())
    heard = peer.heard[0]
    for secret in (OTHER, SECRET):
        Standard(secret).verify(heard.body, headers_now(heard.headers))
    with pytest.raises(Exception, match="No matching signature"):
        Standard(SECRET).verify(heard.body + b" ", headers_now(heard.headers))
    given = [heard.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")]
    assert Secrets([SECRET]).verify(*given, [heard.body], START_AT) == ""
    assert "secret" in Secrets([SECRET]).verify(*given, [heard.body, b"x"], START_AT)
    assert "seconds" in Secrets([SECRET]).verify(*given, [heard.body], START_AT + 301)
    assert "malformed" in Secrets([SECRET]).verify(given[0], "9" * 5000, given[2], [heard.body], START_AT)


def test_another_set_of_recipients_has_another_id() -> None:
    assert request_id("Q", [0]) == "Q"
    made = [request_id("Q", numbers) for numbers in ([0], [1], [0, 1], [0, 2], [0, 1, 2, 7], [2, 1, 0, 7], [12], [1, 2])]
    assert made[4] == made[5] == "Q_0-2_7"
    assert len(set(made)) == len(made) - 1
    assert not any("." in one for one in made)  # the dot parts id from timestamp in what is signed


def odd_messages() -> Iterator[tuple[str, bytes]]:
    """Odd messages: Python's own where they are installed, recorded ones, and two hundred broken ones made here."""
    try:
        import test.test_email as theirs

        for path in sorted(Path(theirs.__file__).parent.glob("data/*.txt")):
            yield path.name, path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    except ImportError:
        pass
    cases = ROOT / "tests/data/mime.json"
    for case in json.loads(cases.read_text()):
        yield case["id"], case["message"].encode("latin-1")
    pieces = [b"Content-Type: multipart/mixed; boundary=a\r\n", b"Content-Type: multipart/mixed; boundary=\"\"\r\n", b"\r\n", b"--a\r\n", b"--a--\r\n", b"--aa\r\n",
              b"Content-Type: message/rfc822\r\n", b"Content-Type: text/html; charset=\"utf-16\"\r\n", b"Content-Type: text/plain; charset=utf-7\r\n",
              b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: quoted-printable\r\n", b"Content-Transfer-Encoding: x-uuencode\r\n",
              b"Content-Disposition: attachment; filename*0*=utf-8''%E2%82; filename*1*=%AC\r\n", b"Content-Disposition: inline; filename=\"\xff\r\n",
              b"aGVsbG8\r\n", b"aGk=aGk=\r\n", b"=C3=A4=\r\n", b"+2AA-\r\n", b"\x00\x80\xff\r\n", b"Subject: =?utf-8?B?//?= =?x?q?=ZZ?=\r\n",
              b"From: <<a@b>, \"x (c\r\n", b"To: g: a@b, (n (e)) c@d;\r\n", b" folded\r\n", b"Content-Type: text\r\n", b"Content-Type: ;;=\"\r\n"]
    rng = random.Random(6)
    for number in range(200):
        yield f"made-{number}", b"From: a@b\r\n" + b"".join(rng.choice(pieces) for _ in range(rng.randrange(2, 16)))


def test_payload_of_two_hundred_odd_messages_is_valid(peers: Make, transport: Make) -> None:
    one = transport("http://192.0.2.1/")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    count = 0
    for name, raw in odd_messages():
        _, request = next(one.requests(delivery(Message.from_bytes(raw))))
        body = json.loads(b"".join(request.body.pieces()).decode("utf-8", "strict"))
        assert not list(validator.iter_errors(body)), name
        for file in body["attachments"]:
            assert len(b64decode(file["content"], validate=True)) == file["size"], name
        count += 1
    assert count >= 200


# --- what answers mean ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "status"), [
    (Step(200), Status.DELIVERED), (Step(204), Status.DELIVERED), (Step(202, cut=10), Status.DELIVERED), (Step(200, body=b"x" * 200_000), Status.DELIVERED),
    (Step(200, body=b"x" * 65536, endless=True), Status.DELIVERED),
    (Step(410), Status.FAILED), (Step(400), Status.FAILED), (Step(404), Status.FAILED), (Step(301, {"Location": "/other"}), Status.FAILED),
    (Step(408), Status.DEFERRED), (Step(425), Status.DEFERRED), (Step(429), Status.DEFERRED), (Step(500), Status.DEFERRED),
    (Step(503), Status.DEFERRED), (Step(599), Status.DEFERRED),
    (Step(raw=b""), Status.DEFERRED), (Step(raw=b"HTTP/1.1"), Status.DEFERRED), (Step(raw=b"\x16\x03\x01rubbish\r\n\r\n"), Status.DEFERRED),
    (Step(raw=b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n"), Status.DEFERRED),
    (Step(raw=b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n"), Status.DEFERRED),
    (Step(raw=b"HTTP/1.1 2x0 OK\r\n\r\n"), Status.DEFERRED), (Step(raw=b"220 mx ESMTP\r\n"), Status.DEFERRED),
    (Step(raw=b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"), Status.DELIVERED),
    (Step(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), Status.DELIVERED),
])
def test_answer_decides(peers: Make, transport: Make, step: Step, status: Status) -> None:
    peer = peers(step)
    outcome: Outcome = transport(peer.url()).deliver(delivery())[0]
    assert outcome.status is status
    assert len(peer.heard) == 1


def test_client_errors_may_defer(peers: Make, transport: Make) -> None:
    peer = peers(Step(404), Step(410))
    one = transport(peer.url(), client_errors="defer")
    assert one.deliver(delivery())[0].status is Status.DEFERRED
    assert one.deliver(delivery())[0].status is Status.FAILED


@pytest.mark.parametrize(("value", "pause_s"), [
    ("7", 7.0), ("0", 1.0), ("1000000000", 14400.0), ("9" * 500, 14400.0), ("-5", None), ("soon", None), ("", None),
    (format_datetime(datetime.fromtimestamp(START_AT + 2, UTC), usegmt=True), 2.0), ("Mon, 01 Jan 1990 00:00:00 GMT", 1.0),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 14400.0), ("Mon, 99 Jan 2026 00:00:00 GMT", None)])
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed_within_reason(peers: Make, transport: Make, value: str, pause_s: float | None, status: int) -> None:
    outcome = transport(peers(Step(status, {"Retry-After": value})).url(), clock=FakeClock()).deliver(delivery())[0]
    assert outcome.status is Status.DEFERRED and outcome.retry_after_s == pause_s


def test_silence_ends_with_the_time_out_and_the_next_try_has_the_same_id(peers: Make, transport: Make) -> None:
    peer = peers(Step(hang=True), Step(200))
    one = transport(peer.url(), request_timeout=0.2)
    trying = delivery()
    outcome = one.deliver(trying)[0]
    assert outcome.status is Status.DEFERRED
    trying.recipients[0].attempts = 1
    trying.first_attempt = False
    assert one.deliver(trying)[0].status is Status.DELIVERED
    first, second = peer.heard
    assert first.headers["webhook-id"] == second.headers["webhook-id"] and first.body == second.body
    assert [(one.headers["gmta-attempt"], one.headers["gmta-retry"]) for one in peer.heard] == [("1", "no"), ("2", "yes")]


def test_connections_are_kept_and_one_that_ended_unseen_is_made_anew(peers: Make, transport: Make) -> None:
    peer = peers(Step(200), Step(200, body=b"ok"), Step(200, unasked=True), Step(200))
    one = transport(peer.url())
    assert all(one.deliver(delivery())[0].status is Status.DELIVERED for _ in range(4))
    assert [heard.connection for heard in peer.heard] == [0, 0, 0, 1]


def test_kept_connection_that_breaks_is_tried_once_more_marked_as_retry(peers: Make, transport: Make) -> None:
    peer = peers(Step(200), Step(raw=b""), Step(200), Step(raw=b""), Step(raw=b""), Step(200))
    one = transport(peer.url())
    assert [one.deliver(delivery())[0].status for _ in range(3)] == [Status.DELIVERED, Status.DELIVERED, Status.DEFERRED]
    assert [heard.headers["gmta-retry"] for heard in peer.heard] == ["no", "no", "yes", "no", "yes"]


def test_connections_that_break_together_share_the_new_pool(peers: Make, transport: Make) -> None:
    one = transport(peers(Step(200)).url())
    one.deliver(delivery())
    endpoint = one._endpoint
    ((address, old),) = endpoint._pools.items()
    fresh: list[Any] = []

    def broken(*_: Any, **__: Any) -> None:
        del endpoint._pools[address]  # another request, whose connection ended too, was faster
        fresh.append(endpoint._pool(address))
        raise ProtocolError("Connection aborted.", ConnectionResetError())

    old.urlopen = broken
    assert one.deliver(delivery())[0].status is Status.DELIVERED
    assert endpoint._pools == {address: fresh[0]}


# --- where nothing is sent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "198.18.0.1",
    "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:7f00:1::", "::7f00:1", "2001:db8::1", "fe80::1%eth0", "nonsense"])
def test_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808"])
def test_address_is_public(address: str) -> None:
    assert is_public(address)


def test_private_targets_are_refused_by_address_and_by_name(peers: Make, transport: Make) -> None:
    peer = peers()
    zone = Zone({"hook.example": {"A": ["127.0.0.1"]}, "mixed.example": {"A": ["10.0.0.1"], "AAAA": ["::ffff:127.0.0.1"]}})
    for host in ("127.0.0.1", "[::1]", "hook.example", "mixed.example", "gone.example"):
        one = transport(f"http://{host}:{peer.port}/", allow_private=False, resolver=zone)
        outcome = one.deliver(delivery())[0]
        assert outcome.status is Status.DEFERRED and not outcome.recipient_fault, host
    assert not peer.heard


def test_name_is_resolved_and_the_request_goes_to_that_address(peers: Make, transport: Make) -> None:
    peer = peers()
    zone = Zone({"hook.example": {"A": ["127.0.0.9", "127.0.0.1"]}})
    one = transport(f"http://hook.example:{peer.port}/", resolver=zone)
    outcome = one.deliver(delivery())[0]
    assert outcome.status is Status.DELIVERED and outcome.remote == f"127.0.0.1:{peer.port}"
    assert peer.heard[0].headers["host"] == f"hook.example:{peer.port}"


def test_address_of_the_next_generation(peers: Make, transport: Make) -> None:
    peer = peers(host="::1")
    outcome = transport(f"http://[::1]:{peer.port}/").deliver(delivery())[0]
    assert outcome.status is Status.DELIVERED, outcome
    assert peer.heard[0].headers["host"] == f"[::1]:{peer.port}"


@pytest.mark.parametrize("url", ["ftp://a/", "http://", "http://u:p@a/", "http://a/#x", "http://a b/", "http://a:99999/", "http://ä/", "a"])
def test_url_that_cant_be_used(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        split_url(url)
    with pytest.raises(ValueError, match="url"):
        TransportConfig(url=url)


@pytest.mark.parametrize("secret", ["MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_", "whsec_$$$", "whsec_YQ=="])
def test_secret_that_cant_be_used(secret: str) -> None:
    with pytest.raises(ValueError, match="secret"):
        Secrets([secret])


def test_tls_is_verified(peers: Make, transport: Make, tmp_path: Path) -> None:

    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("hook.example"))
    peer = peers(tls=context)
    zone = Zone({"hook.example": {"A": ["127.0.0.1"]}, "other.example": {"A": ["127.0.0.1"]}})
    for host, keys, status in (("hook.example", {"ca_file": str(authority.file)}, Status.DELIVERED), ("hook.example", {}, Status.DEFERRED),
                               ("other.example", {"ca_file": str(authority.file)}, Status.DEFERRED)):
        assert transport(f"https://{host}:{peer.port}/", resolver=zone, **keys).deliver(delivery())[0].status is status, host
    assert len(peer.heard) == 1


# --- the question after the dot -------------------------------------------------------------------------------------


def ask(peer: HttpPeer, **keys: Any) -> tuple[Any, Any]:
    services = make_services()
    plugin = Plugin(Config(wait=True, url=peer.url(), allow_private=True, secret=[SECRET], **keys), services)
    transaction = make_transaction(recipients=("user@example.test", "joe@example.test"))
    return plugin.check_message(make_session(), transaction, make_message()), transaction


def said(**answer: Any) -> Step:
    return Step(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())


def test_question_is_the_message_and_its_facts(peers: Make) -> None:
    peer = peers()
    verdict, transaction = ask(peer)
    assert verdict is None
    body = posted(peer)
    assert body["type"] == "message.check" and body["queue_id"] == transaction.id and body["id"] != transaction.id
    assert body["envelope"]["client"]["ip"] == "192.0.2.1" and len(body["envelope"]["to"]) == 2


@pytest.mark.parametrize(("step", "reply"), [
    (Step(200), None), (Step(204), None), (Step(200, {"Content-Type": "text/html"}, b"<p>"), None), (said(), None), (said(action="accept"), None),
    (said(action="reject"), "550 5.7.1 The message is not wanted here"), (said(action="reject", text="No\r\n250 x", code=554, enhanced="5.7.0"), "554 5.7.0 No 250 x"),
    (said(action="defer", text="Later"), "451 4.7.1 Later"),
    (said(action="reject", code=250), "451 4.3.0"), (said(action="reject", code="550"), "451 4.3.0"), (said(action="explode"), "451 4.3.0"),
    (said(action="reject", text=[1]), "451 4.3.0"), (said(recipients=[1]), "451 4.3.0"), (said(recipients={"a": 1}), "451 4.3.0"),
    (Step(200, {"Content-Type": "application/json"}, b"{"), "451 4.3.0"), (Step(200, {"Content-Type": "application/json"}, b"[]"), "451 4.3.0"),
    (Step(200, {"Content-Type": "application/json"}, b"[" * 60000), "451 4.3.0"),
    (Step(404), "451 4.3.0"), (Step(500), "451 4.3.0"), (Step(raw=b"x"), "451 4.3.0")])
def test_answer_is_the_verdict(peers: Make, step: Step, reply: str | None) -> None:
    peer = peers(step)
    verdict, _ = ask(peer)
    assert verdict is None if reply is None else str(verdict.reply).startswith(reply)
    if reply == "451 4.3.0":
        assert ask(peer, on_error="ignore")[0] is None


def test_silence_is_no_verdict(peers: Make) -> None:
    assert ask(peers(Step(hang=True)), request_timeout=0.1)[0].kind is Kind.DEFER


def test_answer_may_tag_and_judge_single_recipients(peers: Make) -> None:
    verdict, transaction = ask(peers(said(tags=["spam", "no tag\r\n", 3], recipients={"JOE@example.test": {"action": "reject", "text": "gone"}})))
    ((recipient, one),) = verdict.items()
    assert str(recipient.address) == "joe@example.test" and one.kind is Kind.REJECT
    assert transaction.tags == {"spam"}


def test_programs_of_this_machine_are_not_asked_about(peers: Make) -> None:
    peer = peers()
    plugin = Plugin(Config(wait=True, url=peer.url(), allow_private=True), make_services())
    assert plugin.check_message(make_session(role="local"), make_transaction(), make_message()) is None
    assert not peer.heard


def test_url_without_wait_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="transport:NAME"):
        Plugin(Config(url="https://a.example/"), make_services())


# --- events ---------------------------------------------------------------------------------------------------------


def events(peer: HttpPeer, count: int) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in peer.wait(count)]


def test_events_tell_what_became_of_mail(peers: Make) -> None:
    import gevent

    peer = peers()
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True, events_secret=[OTHER]), make_services())
    envelope = make_envelope(recipients=("user@example.test", "joe@example.test"))
    first, second = envelope.recipients
    plugin.on_delivery(envelope, first, delivered("ok", remote="mx.example"), 0.5)
    plugin.on_delivery(envelope, second, deferred("later"), 0.25)
    plugin.on_bounced(envelope, [second])
    transaction = make_transaction()
    transaction.notes["report"] = [{"event": "complained", "recipient": "x@y.example"}]
    plugin.check_message(make_session(), transaction, make_message())
    plugin.on_queued(envelope)
    gevent.wait(timeout=5)
    found = events(peer, 4)
    assert sorted(one["type"] for one in found) == ["bounced", "complained", "deferred", "delivered"]
    by_type = {one["type"]: one["data"] for one in found}
    assert by_type["delivered"]["recipient"] == "user@example.test" and by_type["delivered"]["remote"] == "mx.example"
    assert by_type["complained"]["recipient"] == "x@y.example"
    assert len({one["id"] for one in found}) == 4
    Standard(OTHER).verify(peer.heard[0].body, headers_now(peer.heard[0].headers))


def test_events_of_reports_fit_the_schema(peers: Make) -> None:
    import gevent

    peer = peers()
    services = make_services()
    reader = load_module("bounce_parser").Plugin(load_module("bounce_parser").Config(addresses=["bounces@example.test"]), services)
    teller = Plugin(Config(events_url=peer.url(), allow_private=True), services)
    for number, kind in enumerate(("multipart/report; report-type=delivery-status", "multipart/report; report-type=feedback-report")):
        part = ("message/delivery-status\r\n\r\nReporting-MTA: dns; far.example\r\n\r\nFinal-Recipient: rfc822; joe@far.example\r\nAction: failed\r\nStatus: 5.1.1\r\n"
                if not number else "message/feedback-report\r\n\r\nFeedback-Type: abuse\r\nUser-Agent: x\r\nOriginal-Rcpt-To: joe@far.example\r\n")
        transaction = make_transaction(recipients=["bounces+joe=far.example@example.test"])
        transaction.id = f"Q{number}"
        message = make_message(f"Content-Type: {kind}; boundary=x\r\n\r\n--x\r\nContent-Type: {part}\r\n--x\r\nContent-Type: message/rfc822\r\n\r\nSubject: hi\r\n\r\n--x--\r\n")
        reader.check_message(make_session(), transaction, message)
        teller.check_message(make_session(), transaction, message)
        teller.on_queued(replace(make_envelope(), id=transaction.id))
    gevent.wait(timeout=5)
    found = events(peer, 2)
    assert sorted(one["type"] for one in found) == ["bounced", "complained"]
    for one in found:
        jsonschema.validate(one, EVENT_SCHEMA)


def test_event_is_tried_again_and_a_full_queue_drops_the_oldest(peers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import gevent

    monkeypatch.setattr("gmta_plugins.webhook.PAUSES_S", (0.001, 0.001))
    peer = peers(Step(500), Step(500), Step(200))
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True, events_queue=1, events=["bounced"]), make_services())
    envelope = make_envelope(recipients=("user@example.test", "joe@example.test"))
    plugin.on_delivery(envelope, envelope.recipients[0], delivered("not asked for"), 0.5)
    plugin.on_bounced(envelope, envelope.recipients)
    gevent.wait(timeout=5)
    found = events(peer, 3)
    assert {one["data"]["recipient"] for one in found} == {"joe@example.test"} and len({one["id"] for one in found}) == 1
    assert [one.headers["gmta-retry"] for one in peer.heard] == ["no", "yes", "yes"]


def heard(peer: HttpPeer, count: int, *, different: bool = False) -> list[bytes]:
    """The bodies that a peer has heard, once there are so many (of different ids), while the loop runs."""
    import gevent

    with gevent.Timeout(20):
        while len({one.headers["webhook-id"] for one in peer.heard} if different else peer.heard) < count:
            gevent.sleep(0.001)
    return [one.body for one in peer.heard]


class Worker:
    """What the plugin asks a worker for. rows: of the queue's history."""

    def __init__(self, *rows: tuple[Event, dict[str, Any]]) -> None:
        self.rows = list(rows)
        self.since: list[float] = []

    def happened(self, since: float, kinds: list[str], limit: int) -> list[tuple[Event, dict[str, Any]]]:
        self.since.append(since)
        return [row for row in self.rows if row[0].kind in kinds][:limit]


def teller(peer: HttpPeer, tmp_path: Path, worker: Worker, **keys: Any) -> tuple[Any, Any]:
    """(plugin, its services) with a worker that has started; data_dir is the same each time."""
    services = make_services({"gmta": {"data_dir": str(tmp_path)}})
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True, **keys), services)
    plugin.on_worker_started(worker)
    return plugin, services


def died(services: Any) -> None:
    """Lets go of the file as the end of a process does, in no order."""
    outbox = next(one for one in gc.get_objects() if isinstance(one, Outbox) and one._batch is services.batch("outbox:events"))
    outbox._batch.submit(lambda: os.close(outbox._file))


def numbered(number: int) -> Any:
    """An envelope with an id of its own."""
    return replace(make_envelope(), id=f"{number:016d}")


def test_what_a_dead_worker_had_to_tell_is_told(peers: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta_plugins.webhook.MOMENT_S", 0.0)
    down = peers(Step(503))
    first, first_services = teller(down, tmp_path, Worker())
    envelope = make_envelope(recipients=("user@example.test", "joe@example.test"))
    known, missed = envelope.recipients
    known.attempts = missed.attempts = 1
    first.on_delivery(envelope, known, delivered("ok", remote="mx.example"), 0.5)
    heard(down, 1)
    first._teller.closed = True
    died(first_services)

    peer = peers()
    history = [(Event(envelope.id, 5.0, "delivered", {"to": str(one.address), "attempts": 1, "transport": "out", "reply": "250 ok"}),
                {"sender": "ann@sender.example"}) for one in envelope.recipients]
    history.append((Event("0000000000000001", 6.0, "failed", {"to": "x@y.example", "attempts": 3, "reply": "550 no"}), {}))
    worker = Worker(*history)
    second, services = teller(peer, tmp_path, worker)
    found = {one["data"]["recipient"]: (one["id"], one["type"], one["data"]) for one in map(json.loads, heard(peer, 3))}
    assert {key: value[1] for key, value in found.items()} == {"user@example.test": "delivered", "joe@example.test": "delivered", "x@y.example": "bounced"}
    assert found["user@example.test"][0] == down.heard[0].headers["webhook-id"]  # the same event
    assert found["user@example.test"][2]["remote"] == "mx.example" and found["joe@example.test"][2]["sender"] == "ann@sender.example"
    assert found["joe@example.test"][0] == event_id(envelope.id, "joe@example.test", "delivered", 1)
    assert {one.headers["gmta-retry"] for one in peer.heard} == {"yes"}
    for one in (*peer.heard, *down.heard):
        jsonschema.validate(json.loads(one.body), EVENT_SCHEMA)
    assert worker.since and services.log.of("webhook events taken over") == [{"waiting": 1, "from_history": 2}]
    second.on_worker_stopping(worker)
    second.close()


def test_what_a_worker_that_left_has_not_told_is_for_the_next(peers: Make, tmp_path: Path) -> None:
    down = peers(Step(503))
    first, _ = teller(down, tmp_path, Worker())
    first.on_bounced(make_envelope(), make_envelope().recipients)
    heard(down, 1)
    first.close()
    peer = peers()
    worker = Worker()
    second, _ = teller(peer, tmp_path, worker)
    assert json.loads(heard(peer, 1)[0])["type"] == "bounced" and not worker.since  # it left in order: nothing is missing
    second.close()


def test_a_report_is_kept_before_its_sender_hears_so(peers: Make, tmp_path: Path) -> None:
    plugin, services = teller(peers(Step(503)), tmp_path, Worker())
    transaction = make_transaction()
    transaction.notes["report"] = [{"event": "complained", "recipient": "x@y.example"}]
    plugin.check_message(make_session(), transaction, make_message())
    plugin.on_queued(replace(make_envelope(), id=transaction.id))
    (file,) = (services.config.gmta.data_dir / Path("events")).iterdir()
    assert b'"recipient":"x@y.example"' in file.read_bytes()
    plugin.close()


def test_while_the_endpoint_is_down_one_event_asks_and_nothing_is_given_up(peers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import gevent

    monkeypatch.setattr("gmta_plugins.webhook.DOWN_S", (0.001,))
    peer = peers(*[Step(503)] * 20, Step(200))
    services = make_services()
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True), services)
    for number in range(12):
        envelope = numbered(number)
        plugin.on_delivery(envelope, envelope.recipients[0], delivered("ok"), 0.1)
    gevent.wait(timeout=10)
    taken = [one.headers["webhook-id"] for one in peer.heard[20:]]
    assert len(taken) == len(set(taken)) == 12 and len(peer.heard) == 32
    assert len(services.log.of("webhook events in trouble")) == 1 and not services.log.of("webhook event given up")


def test_an_endpoint_that_stays_down_has_its_time(peers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import gevent

    monkeypatch.setattr("gmta_plugins.webhook.DOWN_S", (0.001,))
    services = make_services()
    peer = peers(Step(503))
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True, events_lifetime=60), services)
    plugin.on_bounced(make_envelope(), make_envelope().recipients)
    heard(peer, 3)
    services.clock.advance(61)
    gevent.wait(timeout=10)
    assert len(services.log.of("webhook event given up")) == 1


def test_an_event_that_is_refused_is_said_so(peers: Make) -> None:
    import gevent

    services = make_services()
    plugin = Plugin(Config(events_url=peers(Step(404)).url(), allow_private=True), services)
    plugin.on_bounced(make_envelope(), make_envelope().recipients)
    gevent.wait(timeout=5)
    assert services.log.of("webhook event refused")[0]["reason"] == "answered 404"


def test_an_event_that_breaks_the_endpoint_holds_up_no_other(peers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the endpoint always hangs up on is not what it is probed with for ever."""
    import gevent

    monkeypatch.setattr("gmta_plugins.webhook.DOWN_S", (0.001,))
    monkeypatch.setattr("gmta_plugins.webhook.SENDERS", 1)
    poison = event_id(make_envelope().id, "user@example.test", "delivered", 1)
    peer = peers(Step(raw=b"", only=poison))
    services = make_services()
    plugin = Plugin(Config(events_url=peer.url(), allow_private=True, events_lifetime=3600), services)
    first = make_envelope(recipients=("user@example.test",))
    first.recipients[0].attempts = 1
    plugin.on_delivery(first, first.recipients[0], delivered("ok"), 0.1)
    for number in range(5):
        envelope = numbered(number)
        plugin.on_delivery(envelope, envelope.recipients[0], delivered("ok"), 0.1)
    heard(peer, 6, different=True)
    services.clock.advance(3601)
    gevent.wait(timeout=10)
    assert [one["event"] for one in services.log.of("webhook event given up")] == [poison]
