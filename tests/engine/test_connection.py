"""The connection loop below the process: deadlines on a clock that a test sets, TLS over loopback, budgets, the ways it ends."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.select
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gevent import socket as gevent_socket

from gmta import disconnect, hookimpl, reject
from gmta.receive import connection as connection_module
from gmta.services.tls import client_context, server_context
from gmta.testing import FakeClock, MemoryServer, MemoryStore, run

HELLO = "S: 220\nC: EHLO client.example.com\nS: 250\n"
ENVELOPE = HELLO + "C: MAIL FROM:<sender@example.com>\nS: 250\nC: RCPT TO:<user@example.test>\nS: 250\n"
DATA = ENVELOPE + "C: DATA\nS: 354\n"


class Watcher:
    """Notes what it is told of sessions."""

    def __init__(self) -> None:
        self.opened = 0
        self.reasons: list[str] = []

    @hookimpl
    def on_session_opened(self) -> None:
        self.opened += 1

    @hookimpl
    def on_session_closed(self, reason: str) -> None:
        self.reasons.append(reason)


# --- deadlines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialogue", "reason"), [
    (HELLO + "WAIT: 300s\nS: 421 4.4.2\nEOF\n", "timeout"),
    ("S: 220\nWAIT: 300s\nS: 421 4.4.2\nEOF\n", "timeout"),
    # a command has one deadline as a whole, however it trickles in
    (HELLO + "SEND-RAW: N\nWAIT: 150s\nSEND-RAW: OO\nWAIT: 149s\nSEND-RAW: P\nWAIT: 1s\nS: 421 4.4.2\nEOF\n", "timeout"),
    # ... and each its own, though its first octets come with the one before
    (HELLO + "SEND-RAW: NOOP\\r\\nNO\nS: 250\nWAIT: 200s\nSEND-RAW: OP\\r\\nNO\nS: 250\nWAIT: 200s\nSEND-RAW: OP\\r\\n\nS: 250\n", "lost"),
    # data have a least rate, looked at after a minute ...
    (DATA + "C: \\{x*10000}\nWAIT: 19s\nC: \\{x*10000}\nWAIT: 100s\nS: 421 4.4.2\nEOF\n", "too slow"),
    (DATA + "C: \\{x*30000}\nWAIT: 59s\nC: \\{x*30000}\nWAIT: 59s\nC: .\nS: 250\n", "lost"),
    # ... and a deadline as a whole, however fast they are
    (DATA + "C: \\{x*9000}\n" + "WAIT: 50s\nC: \\{x*60000}\n" * 11 + "WAIT: 50s\nS: 421 4.4.2\nEOF\n", "timeout"),
    # chunks are data, the commands between them are commands
    (ENVELOPE + "C: BDAT 5\nWAIT: 121s\nS: 421 4.4.2\nEOF\n", "too slow"),
    (ENVELOPE + "C: BDAT 5\nSEND-RAW: hello\nS: 250\nWAIT: 299s\nC: BDAT 0 LAST\nS: 250\n", "lost"),
    # the next message has a minute of its own
    (DATA + "C: x\nWAIT: 59s\nC: .\nS: 250\nC: MAIL FROM:<>\nS: 250\nC: RCPT TO:<user@example.test>\nS: 250\nC: DATA\nS: 354\nWAIT: 59s\nC: .\nS: 250\n",
     "lost"),
])
def test_patience(dialogue: str, reason: str) -> None:
    given = {"limits": {"text_line": "1MB", "message_size": "2MB"}}
    watcher = Watcher()
    assert run(watcher, dialogue, given=given).reason == reason
    assert watcher.reasons == [reason] * 4


def test_patience_is_shorter_under_pressure() -> None:
    server = MemoryServer(given={"limits": {"connections": 1}})
    assert server.limits.open("192.0.2.9") and server.limits.pressed
    server.play(HELLO + "WAIT: 30s\nS: 421 4.4.2\nEOF\n")


def test_the_clock_grants_nothing_to_a_client_that_does_not_read() -> None:
    """A write that blocks ends with the connection, not with patience for ever."""
    server = MemoryServer(given={"limits": {"errors_per_session": 100000}})
    ours, theirs = pair()
    connection = server.connect(ours)
    serving = gevent.spawn(connection.run, True)
    pushing = gevent.spawn(theirs.sendall, b"HELP\r\n" * 200000)
    until(lambda: connection._writing and connection.deadline < float("inf") and blocked(ours))
    server.clock.advance(61)
    connection.expire()
    assert serving.get(timeout=10).startswith("lost")
    pushing.kill()
    theirs.close()


def pair() -> tuple[Any, Any]:
    """A TCP connection over loopback: the server's end, the client's."""
    with gevent_socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        theirs = gevent_socket.create_connection(listening.getsockname())
        return listening.accept()[0], theirs


def until(ready: Any) -> None:
    """Lets greenlets run until `ready`; fails in the end."""
    for _ in range(5000):
        if ready():
            return
        gevent.sleep(0.001)
    raise AssertionError("it did not come to that")


def blocked(sock: Any) -> bool:
    """Whether a write to the socket would wait."""
    return not gevent.select.select([], [sock.fileno()], [], 0)[1]


# --- budgets ----------------------------------------------------------------------------------------------------


def test_errors_are_counted_but_not_what_is_ours() -> None:
    given = {"limits": {"errors_per_session": 3}}
    run((), HELLO + "C: X\nS: 500\nC: RCPT TO:<a@b.c>\nS: 503\nC: NOOP\nS: 250\nC: Y\nS: 500\nS: 421 4.7.0\nEOF\n", given=given)
    store = MemoryStore()
    store.full = True
    MemoryServer(given=given).play(HELLO + "C: MAIL FROM:<>\nS: 452 4.3.1\n" * 1 + "C: MAIL FROM:<>\nS: 452\n" * 5 + "C: QUIT\nS: 221\nEOF\n", store=store)


def test_errors_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    server = MemoryServer(given={"limits": {"error_delay": "1500ms", "error_delay_from": 2}})
    with monkeypatch.context() as patch:
        patch.setattr(connection_module.gevent, "sleep", pauses.append)
        server.play(HELLO + "C: X\nS: 500\n" * 5 + "C: NOOP\nS: 250\n")
    assert pauses == [1.5, 1.5, 1.5]


def test_failed_logins_are_counted_apart() -> None:
    wrong = "C: AUTH PLAIN \\{base64 \\0user@example.test\\0wrong}\nS: 535 5.7.8\n"
    tls = HELLO + "C: STARTTLS\nS: 220\nSTARTTLS\nC: EHLO client.example.com\nS: 250\n"
    run((), tls + wrong * 2 + "S: 421 4.7.0\nEOF\n", given={"limits": {"auth_failures": 2}})


def test_one_too_many_is_told_so() -> None:
    server = MemoryServer(watcher := Watcher())
    ours, theirs = pair()
    serving = gevent.spawn(server.connect(ours).run, False)
    said = theirs.recv(1000)
    theirs.close()
    assert said.startswith(b"421 4.7.0 ") and said.endswith(b"\r\n")
    assert serving.get(timeout=10) == "refused"
    assert (watcher.opened, watcher.reasons) == (0, [])


# --- how it ends ------------------------------------------------------------------------------------------------


def test_a_refusal_stands_in_place_of_the_banner() -> None:
    class Door(Watcher):
        @hookimpl
        def check_connect(self) -> Any:
            return reject("Not from there", 554, "5.7.1")

    played = run(door := Door(), "S: 554 5.7.1 Not from there\nEOF\n")
    assert played.reason == "refused" and door.reasons == ["refused"] * 4


def test_a_hook_may_hang_up() -> None:
    class Door(Watcher):
        @hookimpl
        def check_rcpt(self) -> Any:
            return disconnect("Enough")

    door = Door()
    run(door, ENVELOPE.replace("S: 250\nC: RCPT TO:<user@example.test>\nS: 250\n", "C: RCPT TO:<user@example.test>\nC: DATA\nS: 250\nS: 421 4.7.0\nEOF\n"))
    assert door.reasons == ["closed after 421"] * 4


def test_who_goes_away_leaves_no_file() -> None:
    store = MemoryStore()
    server = MemoryServer()
    played = server.play(DATA + "C: Subject: big\nC:\nSEND-RAW: \\{xxxxxxxx\\r\\n*20000}\nCLOSE\n", store=store)
    spool = Path(store.new_spool_file("x")).parent
    assert played.reason == "lost" and spool.is_dir() and list(spool.iterdir()) == []
    store.close()


def test_the_store_is_full_or_fails_at_the_dot() -> None:
    class Breaking(MemoryStore):
        def has_room(self, size_bytes: int) -> bool:
            return True

    store = Breaking()
    server = MemoryServer()
    message = "C: Subject: x\nC:\nC: .\n"
    for switch, code in (("full", "452 4.3.1"), ("failing", "451 4.3.0")):
        setattr(store, switch, True)
        server.play(DATA + message + f"S: {code}\nC: NOOP\nS: 250\nC: QUIT\nS: 221\nEOF\nQUEUED: none\n", store=store)
        setattr(store, switch, False)
    server.play(DATA + message + "S: 250 2.0.0 queued as *\nC: QUIT\nS: 221\nEOF\n", store=store)


class Talk:
    """A client, and the connection that serves it."""

    def __init__(self, server: MemoryServer, **options: Any) -> None:
        ours, self.socket = pair()
        self.connection = server.connect(ours, **options)
        self.serving = gevent.spawn(self.connection.run, True)
        self.hear()

    def hear(self) -> bytes:
        """What the server says next; empty at the end."""
        with gevent.Timeout(10):
            return self.socket.recv(65536)

    def ask(self, octets: bytes) -> bytes:
        """Says it, and hears the answer."""
        self.socket.sendall(octets)
        return self.hear()


@pytest.fixture
def server() -> Iterator[MemoryServer]:
    server = MemoryServer()
    yield server
    server.close()


def test_a_worker_that_leaves_tells_the_silent(server: MemoryServer) -> None:
    talk = Talk(server)
    talk.ask(b"EHLO client.example.com\r\n")
    assert not talk.connection.shut_down()  # it has spoken just now
    server.clock.advance(2)
    assert talk.connection.shut_down()
    assert talk.hear().startswith(b"421 4.3.2 ")
    assert talk.hear() == b""
    talk.socket.close()
    assert talk.serving.get(timeout=10) == "lost"


def test_a_worker_that_leaves_lets_a_message_in(server: MemoryServer) -> None:
    talk = Talk(server)
    talk.ask(b"EHLO client.example.com\r\n")
    talk.ask(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<user@example.test>\r\n")
    server.clock.advance(2)
    assert not talk.connection.shut_down()
    assert talk.ask(b"DATA\r\n").startswith(b"354")
    server.clock.advance(2)
    assert not talk.connection.shut_down()
    server.limits.draining = True
    assert talk.ask(b"\r\n.\r\n").startswith(b"250 2.0.0 queued as ")
    assert talk.ask(b"MAIL FROM:<a@b.example>\r\n").startswith(b"421 4.3.2 ")  # but not the next
    assert talk.hear() == b""
    talk.socket.close()
    assert talk.serving.get(timeout=10) == "closed after 421"


# --- TLS --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server's context with a certificate of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mx.example.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
                   .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1)).sign(key, hashes.SHA256()))
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return server_context(str(path), None)


def test_what_was_sent_in_clear_is_not_answered_in_tls(server: MemoryServer, context: ssl.SSLContext) -> None:
    talk = Talk(server, tls=context)
    talk.ask(b"EHLO client.example.com\r\n")
    assert talk.ask(b"STARTTLS\r\nMAIL FROM:<injected@example.com>\r\nNOOP\r\n") == b"220 2.0.0 Ready to start TLS\r\n"
    talk.socket = client_context().wrap_socket(talk.socket, server_hostname="mx.example.test")
    assert talk.ask(b"MAIL FROM:<sender@example.com>\r\n").startswith(b"503 5.5.1")  # the only answer
    assert b"STARTTLS" not in talk.ask(b"EHLO client.example.com\r\n")
    assert talk.connection.session.tls is not None and talk.connection.session.tls.version == "TLSv1.3"
    assert talk.ask(b"QUIT\r\n").startswith(b"221")
    talk.socket.close()
    assert talk.serving.get(timeout=10) == "quit"


def test_a_deadline_under_tls_is_told_under_tls(server: MemoryServer, context: ssl.SSLContext) -> None:
    talk = Talk(server, tls=context)
    talk.ask(b"EHLO client.example.com\r\n")
    talk.ask(b"STARTTLS\r\n")
    talk.socket = client_context().wrap_socket(talk.socket, server_hostname="mx.example.test")
    talk.ask(b"EHLO client.example.com\r\n")
    server.clock.advance(301)
    talk.connection.expire()
    assert talk.hear().startswith(b"421 4.4.2 ")
    talk.socket.close()
    assert talk.serving.get(timeout=10) == "timeout"


def test_a_handshake_that_does_not_come(context: ssl.SSLContext) -> None:
    server = MemoryServer(watcher := Watcher(), {"limits": {"tls_timeout": "20ms"}})
    talk = Talk(server, tls=context)
    talk.ask(b"EHLO client.example.com\r\n")
    talk.ask(b"STARTTLS\r\n")
    assert talk.serving.get(timeout=10) == "lost (Timeout)"
    assert watcher.reasons == ["lost (Timeout)"]
    assert talk.hear() == b""
    talk.socket.close()


def test_implicit_tls(context: ssl.SSLContext) -> None:
    server = MemoryServer(given=f"[listener:smtps]\naddress = 127.0.0.1:2465\ntls = implicit\n[tls]\ncertificate = {__file__}\n")
    ours, theirs = pair()
    serving = gevent.spawn(server.connect(ours, "smtps", tls=context).run, True)
    client = client_context().wrap_socket(theirs, server_hostname="mx.example.test")
    assert client.recv(1000).startswith(b"220 mx.example.test ")
    client.sendall(b"EHLO client.example.com\r\n")
    said = client.recv(1000)
    assert b"AUTH PLAIN LOGIN" in said and b"STARTTLS" not in said
    client.sendall(b"QUIT\r\n")
    assert client.recv(1000).startswith(b"221")
    client.close()
    assert serving.get(timeout=10) == "quit"


def test_a_listener_without_tls_offers_none(context: ssl.SSLContext) -> None:
    server = MemoryServer(given="[listener:plain]\naddress = 127.0.0.1:2526\ntls = off\n")
    assert FakeClock is type(server.clock)
    server.play("listener: plain\nS: 220\nC: EHLO client.example.com\nS: 250\nLACKS: STARTTLS\nC: STARTTLS\nS: 502 5.5.1\n")
