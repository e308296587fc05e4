"""Webhooks from a running gmta to a real, scripted web server: every message arrives, repeats are marked, and the answers rule."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from standardwebhooks import Webhook as Standard

from gmta.services.webhooks import Secrets
from gmta.testing.authority import Authority
from tests.e2e.conftest import Gmta, children, command_line, until
from tests.http_peer import Heard, HttpPeer, Step

pytestmark = pytest.mark.e2e

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MAIL = b"From: a@sender.example\r\nTo: user@example.test\r\nSubject: hello\r\n\r\nhi\r\n"


@pytest.fixture
def peer(directory: Path) -> Iterator[HttpPeer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = Authority(directory)
    context.load_cert_chain(*authority.issue("127.0.0.1"))
    (directory / "ca.pem").write_text(Path(authority.file).read_text())
    made = HttpPeer(tls=context)
    yield made
    made.close()


def serve(gmta: Gmta, peer: HttpPeer, extra: str = "", *, plugins: str = "mailboxes", keys: str = "") -> None:
    gmta.serve(gmta.configuration(f"""
[plugins]
enable = {plugins}
[queue]
retry = 1s
warn_after = 0
[transport:hook]
type = webhook
url = {peer.url()}
secret = {SECRET}
allow_private = yes
ca_file = ca.pem
request_timeout = 2s
{keys}
[route]
user@example.test = hook
* = mailbox
{extra}
"""))


def send(gmta: Gmta, sender: str = "sender@example.test", to: str = "user@example.test", message: bytes = MAIL) -> None:
    with smtplib.SMTP("127.0.0.1", gmta.port, timeout=30) as client:
        client.ehlo("client.example")
        client.sendmail(sender, [to], message)


def queued(gmta: Gmta) -> list[dict[str, object]]:
    return json.loads(gmta.command("queue", "list", "--json").stdout)  # type: ignore[no-any-return]


def check_signatures(heard: list[Heard]) -> None:
    """By the public package of the scheme; it takes bodies for JSON, so those of format raw by ourselves."""
    for one in heard:
        headers = [one.headers[f"webhook-{name}"] for name in ("id", "timestamp", "signature")]
        assert Secrets([SECRET]).verify(*headers, [one.body], float(headers[1])) == ""
        if one.headers["content-type"] == "application/json":
            Standard(SECRET).verify(one.body, one.headers)


def test_every_message_arrives_through_a_script_of_trouble(gmta: Gmta, peer: HttpPeer) -> None:
    trouble = [Step(500), Step(429, {"Retry-After": "1"}), Step(hang=True), Step(raw=b""), Step(raw=b"HTTP/1.1 2"), Step(raw=b"\x16\x03rubbish\r\n\r\n"),
               Step(503, {"Retry-After": "soon"}), Step(half=True), Step(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000, trickle=True), Step(raw=b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"), Step(408)]
    slow = Step(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9999, trickle=True)  # it has the message, whatever else it says
    peer.steps = [*trouble, Step(200, body=b"x" * 1_000_000), Step(202, cut=5), slow, Step(200)]
    serve(gmta, peer)
    for _ in range(4):
        send(gmta)
    until(lambda: not queued(gmta), "end of the queue")
    heard = peer.wait(len(trouble) + 4)
    check_signatures(heard)
    taken = [one.headers["webhook-id"] for one in heard[len(trouble):]]
    assert len(heard) == len(trouble) + 4 and len(set(taken)) == 4  # each once, after the trouble
    for number, one in enumerate(heard):
        earlier = any(other.headers["webhook-id"] == one.headers["webhook-id"] for other in heard[:number])
        assert one.headers["gmta-retry"] == ("yes" if earlier else "no")


def test_answers_that_are_final_are_reported_to_the_sender(gmta: Gmta, peer: HttpPeer) -> None:
    peer.steps = [Step(500), Step(503), Step(408), Step(400, body=b"no such ticket"), Step(410)]
    serve(gmta, peer)
    send(gmta)
    report = gmta.arrived("sender")[0].read_bytes()
    assert b"no such ticket" in report and b"Action: failed" in report
    heard = peer.wait(4)
    assert len(heard) == 4 and len({one.headers["webhook-id"] for one in heard}) == 1
    send(gmta)
    gmta.arrived("sender", 2)
    assert len(peer.heard) == 5


def test_verify_and_replay(gmta: Gmta, peer: HttpPeer, directory: Path) -> None:
    peer.steps = [Step(500), Step(200)]
    serve(gmta, peer, keys="client_errors = defer\n")
    gmta.config.write_text(gmta.config.read_text().replace("retry = 1s", "retry = 1h"))
    gmta.stop()
    gmta.serve(gmta.config.read_text())
    send(gmta)
    peer.wait(1)
    until(lambda: bool(queued(gmta)[0]["recipients"][0]["attempts"]), "first attempt")  # type: ignore[index]
    queue_id = str(queued(gmta)[0]["id"])
    shown = gmta.command("webhook", "verify", queue_id, "--body")
    assert shown.returncode == 0, shown.stderr
    assert f"webhook-id: {queue_id}".encode() in shown.stdout and b'"subject":"hello"' in shown.stdout
    again = gmta.command("webhook", "replay", queue_id, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)[0]["outcome"] == "delivered"
    first, second = peer.wait(2)
    assert first.body == second.body and second.headers["gmta-retry"] == "yes" and queued(gmta)
    (directory / "body").write_bytes(second.body)
    arguments = [f"--{name}={second.headers[f'webhook-{name}']}" for name in ("id", "timestamp", "signature")]
    judged = gmta.command("webhook", "verify", "--file", "body", *arguments, "--secret", SECRET)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    (directory / "body").write_bytes(second.body + b" ")
    assert gmta.command("webhook", "verify", "--file", "body", *arguments, "--secret", SECRET).returncode == 1
    assert gmta.command("webhook", "replay", "0000000000000000").returncode == 1


def test_endpoint_decides_at_smtp_time_and_hears_events(gmta: Gmta, peer: HttpPeer) -> None:
    def said(**answer: str) -> Step:
        return Step(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    peer.steps = [said(action="reject", text="Not this one", code="x"), said(action="reject", text="Not this one"), said(action="accept"), Step(200)]
    serve(gmta, peer, plugins="mailboxes webhook", extra=f"""
[plugin:webhook]
wait = yes
url = {peer.url('/judge')}
events_url = {peer.url('/events')}
events = delivered
secret = {SECRET}
allow_private = yes
ca_file = ca.pem
""")
    with pytest.raises(smtplib.SMTPDataError) as unclear:
        send(gmta, to="joe@example.test")
    assert unclear.value.smtp_code == 451
    with pytest.raises(smtplib.SMTPDataError) as refused:
        send(gmta, to="joe@example.test")
    assert refused.value.smtp_code == 550 and b"Not this one" in refused.value.smtp_error
    send(gmta, to="joe@example.test")
    gmta.arrived("joe")
    heard = peer.wait(4)
    assert [one.target for one in heard] == ["/judge"] * 3 + ["/events"]
    event = json.loads(heard[3].body)
    assert event["type"] == "delivered" and event["data"]["recipient"] == "joe@example.test"
    check_signatures(heard)


def test_killed_workers_lose_nothing(gmta: Gmta, peer: HttpPeer) -> None:
    serve(gmta, peer)
    acknowledged: list[str] = []

    def deliver_some(count: int) -> None:
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=30) as client:
            client.ehlo("client.example")
            for _ in range(count):
                client.mail("sender@example.test")
                client.rcpt("user@example.test")
                code, text = client.data(MAIL)
                assert code == 250
                acknowledged.append(text.decode().rpartition(" ")[2])

    for _ in range(3):
        deliver_some(20)
        (worker,) = workers(gmta)
        os.kill(worker, signal.SIGKILL)
        until(lambda gone=worker: gone not in workers(gmta) and len(workers(gmta)) == 1, "another worker")
    deliver_some(5)
    until(lambda: not queued(gmta), "end of the queue")
    seen: dict[str, bool] = {}
    for one in peer.heard:
        name = one.headers["webhook-id"]
        assert name not in seen or one.headers["gmta-retry"] == "yes"  # none twice without being marked
        seen[name] = True
    assert set(acknowledged) <= seen.keys()


def test_killed_workers_lose_no_event(gmta: Gmta, peer: HttpPeer) -> None:
    """Whatever moment a worker dies in: each recipient's end is told, under one id, and what is told again is marked."""
    peer.steps = [Step(503)] * 10 + [Step(200)]
    serve(gmta, peer, plugins="mailboxes webhook", extra=f"""
[plugin:webhook]
events_url = {peer.url('/events')}
events = delivered
secret = {SECRET}
allow_private = yes
ca_file = ca.pem
""")
    sent = 0
    for _ in range(3):
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=30) as client:
            client.ehlo("client.example")
            for _ in range(30):
                client.sendmail("sender@example.test", [f"joe{sent}@example.test"], MAIL)
                sent += 1
        (worker,) = workers(gmta)
        os.kill(worker, signal.SIGKILL)
        until(lambda gone=worker: gone not in workers(gmta) and len(workers(gmta)) == 1, "another worker")
    until(lambda: not queued(gmta), "end of the queue")
    until(lambda: len({one.headers["webhook-id"] for one in peer.heard}) >= sent, "every event")
    told: dict[str, str] = {}
    for one in peer.heard:
        data = json.loads(one.body)["data"]
        assert one.headers["webhook-id"] not in told or one.headers["gmta-retry"] == "yes"
        told[one.headers["webhook-id"]] = data["recipient"]
    assert sorted(told.values()) == sorted(f"joe{number}@example.test" for number in range(sent))
    assert gmta.stop() == 0


def workers(gmta: Gmta) -> list[int]:
    assert gmta.process is not None
    return [child for child in children(gmta.process.pid) if b"gmta.worker" in command_line(child)]


def resident_kb(gmta: Gmta) -> int:
    """The most that a worker has resident."""
    found = [int(line.split()[1]) for child in workers(gmta) for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return max(found)


def test_large_message_keeps_memory_flat(gmta: Gmta, peer: HttpPeer) -> None:
    serve(gmta, peer)
    send(gmta)
    peer.wait(1)
    before = resident_kb(gmta)
    line = b"QUJD" * 19 + b"\r\n"
    size = 20_000_000
    message = (b"From: a@sender.example\r\nContent-Type: application/octet-stream; name=big\r\nContent-Transfer-Encoding: base64\r\n\r\n" + line * (size // len(line)))
    send(gmta, message=message)
    big = peer.wait(2)[1]
    assert json.loads(big.body)["attachments"][0]["size"] == size // len(line) * 57
    assert resident_kb(gmta) - before < 3 * size // 1024


def test_broken_mime_arrives_unchanged(gmta: Gmta, peer: HttpPeer) -> None:
    cases = json.loads((Path(__file__).parents[1] / "data/mime.json").read_text())
    messages = [case["message"].encode("latin-1") for case in cases]
    serve(gmta, peer, keys="format = raw\n")
    for message in messages:
        send(gmta, message=message)
    heard = peer.wait(len(messages))
    assert all(any(one.body.endswith(b"\r\n" + message) for one in heard) for message in messages)
    check_signatures(heard)


def test_unknown_charset_stops_neither_this_nor_the_next_message(gmta: Gmta, peer: HttpPeer) -> None:
    serve(gmta, peer)
    send(gmta, message=b"From: a@example.com\r\nSubject: =?utf-8?B?A?= =?bogus?Q?x?=\r\nContent-Type: text/plain; charset=bogus\r\n\r\nx\r\n")
    send(gmta)
    first, second = peer.wait(2)
    assert json.loads(first.body)["text"] == "x\n" and json.loads(second.body)["subject"] == "hello"
