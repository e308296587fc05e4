"""Certificates by ACME below e2e: when they are renewed, what is tried again and when, what a challenge is answered, and what settings are refused."""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from gevent import socket as gsocket
from gevent.event import Event
from gevent.ssl import SSLContext
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.config import ACME, Config, ConfigError, load
from gmta.services import acme
from gmta.services.acme import (
    AGAIN_S,
    LOOK_S,
    PATH,
    PAUSES_S,
    SETTLED_S,
    Acme,
    AcmeError,
    Authority,
    Held,
    HttpAnswers,
    Responder,
    TlsAnswers,
    provide,
)
from gmta.supervisor import Supervisor
from gmta.systemd import Given
from gmta.testing import authority as testing
from gmta.testing.fakes import FakeClock, MemoryLog, make_services
from tests.e2e.conftest import free_port
from tests.http_peer import HttpPeer, Step

DAY_S = 86400.0
ON = "[acme]\nterms_agreed = yes\n"


def written(folder: Path, text: str) -> Config:
    (folder / "config.ini").write_text(text)
    return load(str(folder / "config.ini"))


class Signer:
    """An authority in place of the real one. days: how long its certificates are valid.  fails: what `obtain` raises."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.days = 90.0
        self.fails: Exception | None = None
        self.wish: float | None = None
        self.again_at = float("inf")
        self.mute = False
        self.others: tuple[str, ...] = ()
        self._authority = testing.Authority(folder, "Signer")

    def obtain(self, names: Sequence[str], key_pem: bytes) -> bytes:
        self.asked.append(tuple(names))
        if self.fails is not None:
            raise self.fails
        return self.signed(self.others or names, key_pem)

    def signed(self, names: Sequence[str], key_pem: bytes) -> bytes:
        key: Any = load_pem_private_key(key_pem, None)
        return self._authority._sign(names[0], key, list(names), self.days, authority=False).public_bytes(Encoding.PEM)

    def renewal(self, pem: bytes) -> tuple[float | None, float]:
        assert b"PRIVATE" not in pem
        if self.mute:
            raise AcmeError("no answer")
        return self.wish, self.again_at


class Site:
    """A keeper of one certificate with a clock of its own; it sees no sockets."""

    def __init__(self, folder: Path, keys: str = "") -> None:
        self.config = written(folder, f"[gmta]\nhostname = mx.example.test\n{ON}{keys}")
        self.clock = FakeClock(time.time())
        self.log = MemoryLog()
        self.services = make_services(self.config, clock=self.clock, log=self.log)
        self.signer = Signer(folder)
        self.jitter = 0.0
        provide(self.config.obtained)
        self.keeper = self.begin()

    def begin(self, *, can_answer: bool = True) -> Acme:
        """Another worker's keeper."""
        sockets = [socket.socket()] if can_answer else []
        return Acme(self.config, self.services, sockets, rng=lambda: self.jitter, authority=self.signer)

    @property
    def one(self) -> acme.Kept:
        return self.keeper.kept[0]

    def held(self) -> Held:
        return Held(Path(self.one.path).read_bytes())

    def look(self) -> float:
        """Looks after the certificate; seconds until it is looked at again."""
        self.keeper.look_after(self.one)
        return self.one.look_at - self.clock()


Begin = Callable[..., Site]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Begins with keys of [acme]."""
    made: list[Site] = []

    def start(keys: str = "") -> Site:
        made.append(Site(tmp_path, keys))
        return made[-1]

    yield start
    for one in made:
        one.services.close()


@pytest.fixture
def site(begin: Begin) -> Site:
    return begin()


# --- when ---------------------------------------------------------------------------------------------------------


def test_the_first_certificate_takes_the_place_of_our_own(site: Site) -> None:
    assert site.held().placeholder and site.held().names == {"mx.example.test"}
    before = os.stat(site.one.path)
    assert site.look() == pytest.approx(SETTLED_S)
    assert not site.held().placeholder and site.held().names == {"mx.example.test"} and os.stat(site.one.path).st_ino != before.st_ino
    assert stat.S_IMODE(os.stat(site.one.path).st_mode) == 0o600
    assert site.signer.asked == [("mx.example.test",)]
    assert [line["names"] for line in site.log.of("certificate obtained")] == [("mx.example.test",)]
    assert sorted(os.listdir(Path(site.one.path).parent)) == ["mx.example.test.pem"]


def test_renewed_when_a_third_is_left(site: Site) -> None:
    site.signer.days = 89  # and a day before now: 90 in all
    site.look()
    site.clock.advance(SETTLED_S)
    assert site.look() == pytest.approx(LOOK_S)
    site.clock.advance(58 * DAY_S)
    assert site.look() == pytest.approx(DAY_S - SETTLED_S, abs=10) and len(site.signer.asked) == 1
    site.clock.advance(DAY_S)
    site.look()
    assert len(site.signer.asked) == 2


def test_some_renew_a_little_sooner(site: Site) -> None:
    site.signer.days = 89
    site.look()
    site.clock.advance(57 * DAY_S)
    site.look()
    assert len(site.signer.asked) == 1
    site.jitter = 1.0  # a thirtieth of the lifetime
    site.look()
    assert len(site.signer.asked) == 2


def test_renewed_when_the_authority_says(site: Site) -> None:
    """RFC 9773 section 4.2: at a time in its window, or at once where that is over; it is asked again when it says."""
    site.look()
    site.signer.wish, site.signer.again_at = site.clock() + 5 * DAY_S, site.clock() + 6 * 3600
    site.clock.advance(SETTLED_S)
    assert site.look() == pytest.approx(5 * 3600)
    site.signer.again_at = site.clock() + 40 * DAY_S
    assert site.look() == pytest.approx(LOOK_S)  # nobody is believed for longer
    site.signer.again_at = site.clock() - 5
    assert site.look() == pytest.approx(60)
    site.signer.wish = site.clock() - 1  # revoked, say
    site.look()
    assert len(site.signer.asked) == 2
    site.signer.wish = site.clock() + 1000 * DAY_S
    site.clock.advance(85 * DAY_S)
    site.look()
    assert len(site.signer.asked) == 3  # a wish does not let it end


def test_an_authority_that_does_not_say_when(site: Site) -> None:
    site.look()
    site.signer.mute = True
    site.clock.advance(SETTLED_S)
    assert site.look() == pytest.approx(LOOK_S)
    assert site.log.of("authority does not say when to renew")[0]["error"] == "no answer"
    site.clock.advance(80 * DAY_S)
    site.look()
    assert len(site.signer.asked) == 2


def test_certificates_that_end_at_once_are_not_renewed_without_end(site: Site) -> None:
    site.signer.days = 0.0001
    waits = []
    for _ in range(5):
        waits.append(site.look())
        site.clock.advance(waits[-1])
    assert min(waits) >= SETTLED_S - 1


def test_other_names_are_obtained_at_once(site: Site, tmp_path: Path) -> None:
    site.look()
    first = site.held()
    site.config = written(tmp_path, f"[gmta]\nhostname = mx.example.test\n{ON}names = mx.example.test, mx2.example.test\n")
    site.keeper = site.begin()
    site.look()
    assert site.held().names == {"mx.example.test", "mx2.example.test"}
    assert site.held().key.private_numbers() != first.key.private_numbers()


@pytest.mark.parametrize("content", [b"", b"nonsense", "cut", "other key"])
def test_a_file_that_is_damaged_is_obtained_anew(site: Site, tmp_path: Path, content: bytes | str) -> None:
    site.look()
    if content == "cut":
        content = Path(site.one.path).read_bytes()[:-100]
    elif content == "other key":
        strange = tmp_path / "strange.pem"
        provide({str(strange): ["mx.example.test"]})
        content = strange.read_bytes().partition(b"-----BEGIN CERT")[0] + b"-----BEGIN CERT" + Path(site.one.path).read_bytes().partition(b"-----BEGIN CERT")[2]
    assert isinstance(content, bytes)
    Path(site.one.path).write_bytes(content)
    site.look()
    assert len(site.signer.asked) == 2 and site.held().names == {"mx.example.test"}


def odd(key_pem: bytes) -> bytes:
    """A certificate that has names which can't be read."""
    key: Any = load_pem_private_key(key_pem, None)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1).not_valid_before(now)
    return (builder.not_valid_after(now + datetime.timedelta(days=90)).add_extension(x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, b"\x30\x02\xa3\x00"), False)
            .sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def weak() -> bytes:
    """A certificate of an authority that no TLS library takes."""
    key = rsa.generate_private_key(65537, 1024)
    return acme.self_signed(key, ["weak.example"], days=90).public_bytes(Encoding.PEM)  # type: ignore[arg-type]


def test_a_certificate_that_can_t_be_used_is_not_taken(site: Site) -> None:
    """Whatever the authority gives out: what is there stays, and another is asked for later."""
    site.look()
    before, obtain = Path(site.one.path).read_bytes(), site.signer.obtain
    for made in (lambda names, pem: odd(pem), lambda names, pem: obtain(names, pem) + weak()):
        site.signer.obtain = made  # type: ignore[assignment]
        site.clock.advance(80 * DAY_S)
        site.one.look_at = 0.0
        assert site.look() >= 60 and site.one.failures == 1
        assert Path(site.one.path).read_bytes() == before and len(site.log.of("no certificate")) == 1
        site.log.lines.clear()
        site.one.failures = 0
    Path(site.one.path).write_bytes(Path(site.one.path).read_bytes().partition(b"-----BEGIN CERT")[0] + odd(before))
    site.signer.obtain = obtain  # type: ignore[method-assign]
    site.clock.advance(AGAIN_S)
    site.look()
    assert site.held().names == {"mx.example.test"}


def test_where_there_is_no_lock_to_be_had_it_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acme, "LOCK_S", 0.0)
    lock = Path(site.one.path).parent / "lock"
    lock.mkdir()
    site.config.acme.addresses.clear()
    looked = Event()
    site.keeper.look_after = lambda one: [looked.set(), setattr(one, "look_at", float("inf"))]  # type: ignore[assignment, method-assign, return-value]
    site.keeper.start()
    for _ in range(5):
        gevent.sleep(0)
    assert len(site.log.of("no certificate is looked after")) == 1
    lock.rmdir()
    assert looked.wait(10)
    site.keeper.stop()


def test_an_authority_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of an answer may come in time, and there may be one more without end."""
    monkeypatch.setattr(acme, "LONGEST_S", 0.01)
    authority = Authority(written(tmp_path, ON).acme, str(tmp_path), HttpAnswers())
    with pytest.raises(AcmeError, match="no answer within"):
        authority._told(lambda: gevent.sleep(10))


def test_a_key_that_is_kept(begin: Begin) -> None:
    """The key of our own certificate too: TLSA records can be published before the first certificate is there."""
    site = begin("keep_key = yes\n")
    key = site.held().key.private_numbers()
    for _ in range(2):
        site.look()
        assert site.held().key.private_numbers() == key and not site.held().placeholder
        site.clock.advance(80 * DAY_S)
    assert len(site.signer.asked) == 2


# --- failure ------------------------------------------------------------------------------------------------------


def test_pauses_grow_and_what_is_there_stays(site: Site) -> None:
    site.signer.fails = AcmeError("mx.example.test: connection refused")
    content = Path(site.one.path).read_bytes()
    waits = []
    for _ in range(8):
        waits.append(site.look())
        site.clock.advance(waits[-1])
    assert waits == pytest.approx([*PAUSES_S, PAUSES_S[-1], PAUSES_S[-1]])
    assert Path(site.one.path).read_bytes() == content
    told = site.log.of("no certificate")
    assert told[0] == {"names": ("mx.example.test",), "reason": "there is none yet", "error": "mx.example.test: connection refused", "failures": 1,
                       "next_try_s": 60, "days_left": None}
    site.signer.fails, site.jitter = None, 1.0
    site.look()
    assert site.one.failures == 0 and not site.held().placeholder
    site.signer.fails = OSError(errno.ENOSPC, "No space left on device")
    site.clock.advance(80 * DAY_S)
    assert site.look() == pytest.approx(75)  # a quarter more at most
    assert site.log.of("no certificate")[-1]["days_left"] == pytest.approx((site.held().ends_at - site.clock()) / DAY_S, abs=0.1)


def test_an_authority_that_limits_us_is_left_alone(site: Site) -> None:
    site.signer.fails = AcmeError("too many", slow=True)
    assert site.look() == pytest.approx(PAUSES_S[-1])


def test_a_certificate_for_others_is_not_taken(site: Site) -> None:
    site.signer.others = ("elsewhere.example",)
    site.look()
    assert site.held().placeholder
    assert site.log.of("no certificate")[0]["error"] == "the certificate that came is for elsewhere.example"


def test_workers_that_die_one_after_the_other_do_not_hammer(site: Site) -> None:
    site.signer.fails = AcmeError("no")
    site.look()
    for _ in range(3):
        site.keeper = site.begin()
        assert 0 < site.look() <= AGAIN_S
    assert len(site.signer.asked) == 1
    site.clock.advance(AGAIN_S)
    site.look()
    assert len(site.signer.asked) == 2
    site.signer.fails = None
    site.clock.advance(AGAIN_S)
    site.keeper = site.begin()
    site.look()
    assert not site.held().placeholder


def test_nobody_is_asked_where_nobody_could_look(site: Site) -> None:
    site.keeper = site.begin(can_answer=False)
    site.look()
    assert site.signer.asked == [] and "could not be bound" in site.log.of("no certificate")[0]["error"]


def test_one_worker_at_a_time(site: Site) -> None:
    """The keeper of a new worker begins when the old one's ends."""
    site.config.acme.addresses.clear()
    asked = Event()
    obtain = site.signer.obtain

    def slowly(names: Sequence[str], key_pem: bytes) -> bytes:
        asked.set()
        gevent.sleep(3600)
        return obtain(names, key_pem)

    site.signer.obtain = slowly  # type: ignore[method-assign]
    site.keeper.start()
    assert asked.wait(10)
    lock = os.open(Path(site.one.path).parent / "lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    site.keeper.stop()
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_our_own_certificate_is_put_nowhere_over_another(tmp_path: Path) -> None:
    path = tmp_path / "acme/mx.pem"
    provide({str(path): ["mx.example.test", "b.example.test"]})
    first = path.read_bytes()
    assert Held(first).names == {"mx.example.test", "b.example.test"} and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    provide({str(path): ["mx.example.test"]})
    assert path.read_bytes() == first and len(list(path.parent.iterdir())) == 1


# --- challenges ---------------------------------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[Any], int]]:
    """Serves answers; gives the port."""
    started: list[Responder] = []

    def start(answers: HttpAnswers | TlsAnswers) -> int:
        sock = gsocket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        started.append(Responder(answers, [sock]))
        started[-1].start()
        return int(sock.getsockname()[1])

    yield start
    for one in started:
        one.stop()


def said(port: int, octets: bytes) -> bytes:
    with gsocket.create_connection(("127.0.0.1", port), 10) as link:
        link.sendall(octets)
        link.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: link.recv(4096), b""))


def test_http_answers(answering: Callable[[Any], int]) -> None:
    answers = HttpAnswers()
    answers.add("mx.example.test", "tok-en_1", "tok-en_1.print")
    port = answering(answers)
    right = said(port, b"GET " + PATH + b"tok-en_1 HTTP/1.1\r\nHost: mx.example.test\r\nUser-Agent: x\r\n\r\n")
    assert right.startswith(b"HTTP/1.1 200 OK\r\n") and right.endswith(b"\r\n\r\ntok-en_1.print") and b"Content-Length: 14\r\n" in right
    assert said(port, b"HEAD " + PATH + b"tok-en_1 HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    for wrong in (b"GET / HTTP/1.1\r\n\r\n", b"GET " + PATH + b" HTTP/1.1\r\n\r\n", b"POST " + PATH + b"tok-en_1 HTTP/1.1\r\n\r\n", b"\r\n\r\n", b"x" * acme.HEAD):
        assert said(port, wrong).startswith(b"HTTP/1.1 404 "), wrong
    assert said(port, b"GET ") == b""
    answers.clear()
    assert said(port, b"GET " + PATH + b"tok-en_1 HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 404 ")


def test_those_who_hold_on_hold_up_nobody(answering: Callable[[Any], int]) -> None:
    """Or a few who connect and say nothing would have certificates end."""
    answers = HttpAnswers()
    answers.add("mx.example.test", "token", "token.print")
    port = answering(answers)
    silent = [gsocket.create_connection(("127.0.0.1", port), 10) for _ in range(acme.PEERS + 20)]
    asked = gevent.spawn(said, port, b"GET " + PATH + b"token HTTP/1.1\r\n\r\n")
    asked.join(acme.PEER_S / 2)
    assert asked.value is not None and asked.value.endswith(b"token.print")
    assert silent[0].recv(1) == b"" and len(silent) > acme.PEERS
    for one in silent:
        one.close()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(head=st.binary(max_size=200))
def test_http_answers_nothing_to_nonsense(head: bytes) -> None:
    """Whatever comes, what goes out is an answer, or nothing."""

    class Peer:
        def __init__(self) -> None:
            self.octets, self.out = head, b""

        def recv(self, size: int) -> bytes:
            octets, self.octets = self.octets[:7], self.octets[7:]
            return octets

        def sendall(self, octets: bytes) -> None:
            self.out += octets

    answers = HttpAnswers()
    answers.add("a", "t", "secret")
    peer = Peer()
    answers.serve(peer)
    assert b"secret" not in peer.out and (not peer.out or peer.out.startswith(b"HTTP/1.1 404"))


def test_tls_answers(answering: Callable[[Any], int], tmp_path: Path) -> None:
    """RFC 8737 section 3: one name, one critical extension with the hash, for the protocol acme-tls/1 alone."""
    answers = TlsAnswers(str(tmp_path))
    port = answering(answers)

    def shown(name: str, protocols: Sequence[str] = ("acme-tls/1",)) -> x509.Certificate:
        context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(list(protocols))
        with gsocket.create_connection(("127.0.0.1", port), 10) as link, context.wrap_socket(link, server_hostname=name) as tls:
            assert tls.selected_alpn_protocol() == (protocols[0] if "acme-tls/1" in protocols else None)
            return x509.load_der_x509_certificate(tls.getpeercert(True))

    with pytest.raises(OSError):
        shown("mx.example.test")  # no challenge: no handshake
    for name in ("mx.example.test", "b.example.test"):
        answers.add(name, "token", f"token.{name}")
    for name in ("mx.example.test", "b.example.test"):
        certificate = shown(name)
        assert certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == [name]
        extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31"))
        assert extension.critical and extension.value.public_bytes() == b"\x04\x20" + hashlib.sha256(f"token.{name}".encode()).digest()
    with pytest.raises(OSError):
        shown("elsewhere.example")
    assert list(tmp_path.iterdir()) == []  # no key stays behind
    answers.clear()
    with pytest.raises(OSError):
        shown("mx.example.test")


# --- what a server may say ----------------------------------------------------------------------------------------


class Server:
    """An ACME server that says what it is told to."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        authority = testing.Authority(folder, "Of the directory")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.issue("127.0.0.1"))
        self.peer = HttpPeer(steps, tls=context)
        self.config = written(folder, f"{ON}directory = {self.peer.url('/dir')}\nca_file = {authority.file}\n")
        self.authority = Authority(self.config.acme, str(folder), HttpAnswers())


def serve(folder: Path, *steps: Step | dict[str, Any]) -> Server:
    return Server(folder, [one if isinstance(one, Step) else Step(headers={"Content-Type": "application/json", "Replay-Nonce": "bm9uY2U"},
                                                                  body=json.dumps(one).encode()) for one in steps])


def key_pem() -> bytes:
    return acme._key_pem(acme.ec.generate_private_key(acme.ec.SECP256R1()))


@pytest.mark.parametrize("step", [Step(404), Step(500, body=b"<html>"), Step(body=b"<html>"), Step(body=b"[]"), Step(body=b"{}"), Step(raw=b"nonsense\r\n\r\n"),
                                  Step(raw=b""), Step(body=b'{"newNonce": 5, "newAccount": [], "meta": {"termsOfService": 7}}'), Step(body=b'{"meta": 3}')])
def test_whatever_a_server_says_is_an_error_of_its_own(tmp_path: Path, step: Step) -> None:
    server = serve(tmp_path, step)
    with pytest.raises(AcmeError) as refused:
        server.authority.obtain(["mx.example.test"], key_pem())
    assert str(refused.value)
    server.peer.close()
    with pytest.raises(AcmeError):
        server.authority.obtain(["mx.example.test"], key_pem())  # and one that is gone


def test_an_account_that_needs_another(tmp_path: Path) -> None:
    server = serve(tmp_path, {"newNonce": "https://127.0.0.1/n", "newAccount": "https://127.0.0.1/a", "newOrder": "https://127.0.0.1/o",
                              "meta": {"externalAccountRequired": True}})
    with pytest.raises(AcmeError, match="eab_key_id and eab_secret") as refused:
        server.authority.obtain(["mx.example.test"], key_pem())
    assert refused.value.slow
    server.peer.close()


def test_an_account_s_file_that_is_damaged(tmp_path: Path) -> None:
    """It is not made anew by itself: it may be all that is left of an account."""
    server = serve(tmp_path, {})
    with pytest.raises(AcmeError):
        server.authority.obtain(["mx.example.test"], key_pem())
    (file,) = tmp_path.glob("account-*.json")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for content in ("", "[]", "{}"):
        file.write_text(content)
        with pytest.raises(AcmeError, match=r"account-.*is damaged"):
            server.authority.obtain(["mx.example.test"], key_pem())
    server.peer.close()


def test_limits_of_an_authority_are_known(tmp_path: Path) -> None:
    directory: dict[str, Any] = {}
    server = serve(tmp_path, directory)
    directory |= {name: server.peer.url(f"/{name}") for name in ("newNonce", "newAccount", "newOrder")}
    nonce = {"Replay-Nonce": "bm9uY2U"}
    server.peer.steps[:] = [Step(body=json.dumps(directory).encode()), Step(headers=nonce), Step(
        429, headers=nonce | {"Content-Type": "application/problem+json"},
        body=b'{"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many new accounts"}')]
    with pytest.raises(AcmeError, match="too many new accounts") as refused:
        server.authority.obtain(["mx.example.test"], key_pem())
    assert refused.value.slow
    sent = json.loads(server.peer.heard[-1].body)
    assert server.peer.heard[-1].target == "/newAccount" and set(sent) == {"protected", "payload", "signature"}
    server.peer.close()


def test_renewal_information_is_asked_for(tmp_path: Path) -> None:
    """RFC 9773 section 4.1: under the certificate's own name; the wish lies in the window."""
    start = datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=3)
    end = start + datetime.timedelta(days=1)
    directory: dict[str, Any] = {}
    server = serve(tmp_path, directory)
    directory["renewalInfo"] = server.peer.url("/ari")
    server.peer.steps[:] = [Step(body=json.dumps(directory).encode()), Step(headers={"Retry-After": "7200"}, body=json.dumps(
        {"suggestedWindow": {"start": start.isoformat().replace("+00:00", "Z"), "end": end.isoformat().replace("+00:00", "Z")}}).encode())]
    pem = Signer(tmp_path).signed(["mx.example.test"], key_pem())
    wish, again_at = server.authority.renewal(pem)
    assert wish is not None and start.timestamp() <= wish <= end.timestamp()
    assert again_at - time.time() == pytest.approx(7200, abs=60)
    assert server.peer.heard[-1].target.startswith("/ari/") and server.peer.heard[-1].target.count(".") == 1
    server.peer.steps[:] = [Step(body=json.dumps(directory).encode()), Step(body=json.dumps(directory).encode()), Step(body=json.dumps(directory).encode()), Step(500)]
    with pytest.raises(AcmeError, match="renewal_info"):
        server.authority.renewal(pem)
    server.peer.close()


def test_an_authority_without_renewal_information(tmp_path: Path) -> None:
    server = serve(tmp_path, {"newOrder": "https://127.0.0.1/o"})
    wish, again_at = server.authority.renewal(Signer(tmp_path).signed(["mx.example.test"], key_pem()))
    assert wish is None and again_at > time.time() + 3600
    server.peer.close()


# --- settings and sockets -----------------------------------------------------------------------------------------


def test_what_is_obtained(tmp_path: Path) -> None:
    own = testing.Authority(tmp_path).issue("c.example.test")
    made = written(tmp_path, f"[gmta]\nhostname = mx.example.test\n{ON}[tls:A.example.test]\n[tls:mx.example.test]\n[tls:c.example.test]\n"
                             f"certificate = {own[0]}\nkey = {own[1]}\n[listener:mx]\naddress = 127.0.0.1:2525\ntls = required\n")
    folder = tmp_path / "var/acme"
    assert made.obtained == {f"{folder}/mx.example.test.pem": ("mx.example.test",), f"{folder}/a.example.test.pem": ("a.example.test",)}
    assert made.tls.certificate == made.tls_names["mx.example.test"].certificate == f"{folder}/mx.example.test.pem"
    assert made.tls_names["a.example.test"].certificate == f"{folder}/a.example.test.pem" and made.tls_names["c.example.test"].certificate == own[0]
    assert made.acme.addresses == [("0.0.0.0", 80)]
    again = Config.from_snapshot(made.snapshot())
    assert (again.obtained, again.tls, again.tls_names, again.acme) == (made.obtained, made.tls, made.tls_names, made.acme)
    assert written(tmp_path, f"{ON}challenge = tls-alpn-01\n").acme.addresses == [("0.0.0.0", 443)]
    assert written(tmp_path, "[acme]\nterms_agreed = no\ncontact = a@example.test\n").obtained == {}


@pytest.mark.parametrize(("text", "expected"), [
    ("[acme]\ncontact = a@example.test\n", "1: [acme]: expected terms_agreed = yes, once you have read the terms of https://acme-v02.api.letsencrypt.org/directory"),
    (f"{ON}directory = http://a.example/\n", "3: [acme] directory: expected a URL that begins with https://, not 'http://a.example/'"),
    (f"{ON}names = [192.0.2.1]\n", "3: [acme] names: expected host names, not '[192.0.2.1]'"),
    (f"[gmta]\nhostname = [192.0.2.1]\n{ON}", "3: [acme]: expected host names, not '[192.0.2.1]'"),
    (f"{ON}names = *.example.test\n", "3: [acme] names: expected a domain"),
    (f"{ON}challenge = dns-01\n", "3: [acme] challenge: expected one of 'http-01' or 'tls-alpn-01', not 'dns-01'"),
    (f"{ON}address = 80\n", "3: [acme] address: expected an address such as"),
    (f"{ON}eab_key_id = k\n", "3: [acme] eab_key_id: expected both eab_key_id and eab_secret, or none"),
    (f"{ON}eab_secret = c2VjcmV0\n", "3: [acme] eab_secret: expected both eab_key_id and eab_secret, or none"),
    (f"{ON}eab_key_id = k\neab_secret = a+b/\n", "4: [acme] eab_secret: expected a key in base64url, as the authority gave it"),
    (f"{ON}eab_key_id = k\neab_secret = abcde\n", "4: [acme] eab_secret: expected a key in base64url, as the authority gave it"),
    (f"{ON}contact = nobody\n", "3: [acme] contact: expected an address"),
    (f"{ON}ca_file = gone.pem\n", "3: [acme] ca_file: expected a file that exists and can be read"),
    (f"{ON}[tls]\nkey = config.ini\n", "4: [tls] key: expected a certificate with it, since [acme] brings a key of its own"),
    (f"{ON}[tls]\ncertificate = config.ini\n", "2: [acme] terms_agreed: expected [tls] or a [tls:NAME] without a certificate, since nothing is to be obtained"),
    (f"{ON}[tls:a.example.test]\nminimum_version = 1.3\n", "4: [tls:a.example.test] minimum_version: expected that of [tls], 1.2: it is agreed on before a name is"),
    ("[tls:a.example.test]\n", "1: [tls:a.example.test]: expected a certificate, or [acme] to obtain one"),
])
def test_settings_that_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        written(tmp_path, text)
    assert len(refused.value.errors) == 1
    assert refused.value.errors[0].startswith(f"{tmp_path}/config.ini:{expected}")


def test_the_package_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"terms_agreed: expected the Python package acme to be installed: pip install 'gmta\[acme\]'"):
        written(tmp_path, ON)


def test_one_socket_for_the_first_worker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the number of workers; a port that is taken stops nothing."""
    port, challenge = free_port(), free_port()
    text = f"[gmta]\nworkers = 3\n{ON}address = 127.0.0.1:{challenge}\n[listener:mx]\naddress = 127.0.0.1:{port}\n"
    written(tmp_path, text)
    supervisor = Supervisor(str(tmp_path / "config.ini"), environ={})
    bound = supervisor._bind(supervisor.config)
    assert {key: len(have.sockets) for key, have in bound.items()} == {("mx", "127.0.0.1", port): 3, (ACME, "127.0.0.1", challenge): 1}
    for have in bound.values():
        for sock in have.sockets:
            sock.close()
    with socket.create_server(("127.0.0.1", challenge)):
        bound = supervisor._bind(supervisor.config)
    assert list(bound) == [("mx", "127.0.0.1", port)]
    assert f"[acme] address: can't listen on 127.0.0.1:{challenge}: Address already in use" in capfd.readouterr().err
    for sock in bound["mx", "127.0.0.1", port].sockets:
        sock.close()


def test_a_socket_that_systemd_holds(tmp_path: Path) -> None:
    written(tmp_path, f"{ON}[listener:mx]\naddress = 127.0.0.1:{free_port()}\n")
    supervisor = Supervisor(str(tmp_path / "config.ini"), environ={})
    with socket.create_server(("127.0.0.1", 0)) as held:
        supervisor._given = [Given("acme", held, *held.getsockname())]
        bound = supervisor._bind(supervisor.config)
        assert [key[0] for key in bound] == [ACME, "mx"] and bound[ACME, *held.getsockname()].sockets == [held]
        for sock in next(have.sockets for key, have in bound.items() if key[0] == "mx"):
            sock.close()
