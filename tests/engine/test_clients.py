"""Who the client is: XCLIENT, XFORWARD, certificates, TLS that must be, REQUIRETLS, and who talks before the banner."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import ssl
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.ssl import SSLContext

from gmta import hookimpl, reject
from gmta.config import ConfigError
from gmta.mail.session import TlsInfo
from gmta.services.tls import SETTLE_S, ServerTls, TlsError, tls_info
from gmta.testing import FakeClock, MemoryServer, make_config, run
from gmta.testing.authority import Authority
from gmta.testing.fakes import MemoryLog
from tests.engine.test_connection import pair

PROXY = "[listener:mx]\naddress = 127.0.0.1:2525\nxclient_from = 192.0.2.1\n[domains]\nlocal = example.test\nrelay_from = 192.0.2.0/24\n"
MESSAGE = "C: DATA\nS: 354\nC: Subject: x\nC:\nC: .\nS: 250\n"


def test_xclient_makes_it_another_client_s_session() -> None:
    played = run((), r"""
S: 220
C: EHLO proxy.example
S: 250
HAS: XCLIENT NAME ADDR PORT PROTO HELO LOGIN DESTADDR DESTPORT
HAS: XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE
C: XCLIENT ADDR=198.51.100.7 NAME=client.example.com PORT=4711 HELO=x+2Bb.example PROTO=ESMTP
S: 220 mx.example.test
C: MAIL FROM:<a@example.com>
S: 503 5.5.1
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<x@foreign.example>
S: 550 5.7.1
C: RCPT TO:<user@example.test>
S: 250
""" + MESSAGE + "C: QUIT\nS: 221\n", given=PROXY)
    assert (played.session.peer_ip, played.session.peer_name, played.session.peer_port) == ("198.51.100.7", "client.example.com", 4711)
    assert b"client.example.com [198.51.100.7]" in played.queued[0][1]


def test_xclient_log_in_and_again() -> None:
    played = run((), r"""
S: 220
C: EHLO proxy.example
S: 250
C: XCLIENT ADDR=IPV6:2001:db8::7 LOGIN=user@example.test
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<user@example.test>
S: 250
C: RCPT TO:<x@foreign.example>
S: 250
C: XCLIENT LOGIN=[UNAVAILABLE]
S: 503 5.5.1
C: RSET
S: 250
C: XCLIENT LOGIN=[UNAVAILABLE] ADDR=[UNAVAILABLE]
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<user@example.test>
S: 250
C: RCPT TO:<x@foreign.example>
S: 550 5.7.1
C: QUIT
S: 221
""", given=PROXY)
    assert played.session.peer_ip == "0.0.0.0" and played.session.user is None


@pytest.mark.parametrize("argument", ["", "ADDR", "ADDR=nonsense", "ADDR=1.2.3.4 ADDR=1.2.3.4", "X=1", "PORT=x", "PORT=70000", "PROTO=LMTP", "NAME=a+0Db", "NAME=+zz",
                                      "NAME=" + "x" * 300])
def test_xclient_malformed(argument: str) -> None:
    run((), f"S: 220\nC: XCLIENT {argument}\nS: 501\nC: NOOP\nS: 250\nC: QUIT\nS: 221\n", given=PROXY)


def test_xclient_and_xforward_are_not_for_everybody() -> None:
    run((), "S: 220\nC: EHLO c.example\nS: 250\nLACKS: XCLIENT*\nLACKS: XFORWARD*\nC: XCLIENT ADDR=127.0.0.1\nS: 500\nC: XFORWARD ADDR=127.0.0.1\nS: 500\nC: QUIT\nS: 221\n",
        given=PROXY, peer_ip="192.0.2.2")


def test_xclient_is_asked_check_connect_again() -> None:
    class Plugin:
        """Refuses one address."""

        def __init__(self, config: Any, services: Any) -> None:
            pass

        @hookimpl
        def check_connect(self, session: Any) -> Any:
            return reject("Not you", 554, "5.7.1") if session.peer_ip == "198.51.100.66" else None

    run(Plugin, "S: 220\nC: XCLIENT ADDR=198.51.100.66\nS: 554 5.7.1 Not you\nEOF\n", given=PROXY)


def test_xforward_is_kept_for_one_message() -> None:
    one = "C: MAIL FROM:<a@example.com>\nS: 250\nC: RCPT TO:<user@example.test>\nS: 250\n" + MESSAGE
    played = run((), "S: 220\nC: XFORWARD ADDR=1.2.3.4\nS: 503\nC: EHLO c.example\nS: 250\nC: XFORWARD NAME=real.example ADDR=198.51.100.9\nS: 250\n"
                     "C: XFORWARD HELO=[UNAVAILABLE] SOURCE=REMOTE\nS: 250\n" + one + one + "C: QUIT\nS: 221\n", given=PROXY)
    assert played.queued[0][0].facts["forwarded"] == {"name": "real.example", "addr": "198.51.100.9", "source": "REMOTE"}
    assert "forwarded" not in played.queued[1][0].facts and played.session.peer_ip == "192.0.2.1"


def test_requiretls_under_tls_only() -> None:
    played = run((), r"""
S: 220
C: EHLO c.example
S: 250
LACKS: REQUIRETLS
C: MAIL FROM:<a@example.com> REQUIRETLS
S: 555
C: STARTTLS
S: 220
STARTTLS
C: EHLO c.example
S: 250
HAS: REQUIRETLS
C: MAIL FROM:<a@example.com> REQUIRETLS=yes
S: 501
C: MAIL FROM:<a@example.com> REQUIRETLS
S: 250
C: RCPT TO:<user@example.test>
S: 250
""" + MESSAGE + "C: QUIT\nS: 221\n")
    assert played.queued[0][0].facts["requiretls"] is True


def test_tls_that_must_be() -> None:
    given = (f"[listener:mx]\naddress = 127.0.0.1:2525\ntls = required\nvrfy = yes\nexpn = yes\n[tls]\ncertificate = {__file__}\n"
             "[domains]\nrelay_to = backup.example\netrn_from = 192.0.2.0/24\n")
    run((), r"""
S: 220
C: EHLO c.example
S: 250
HAS: STARTTLS
C: MAIL FROM:<a@example.com>
S: 530 5.7.0
C: VRFY user@example.test
S: 530 5.7.0
C: EXPN user@example.test
S: 530 5.7.0
C: ETRN backup.example
S: 530 5.7.0
C: RSET
S: 250
C: NOOP
S: 250
C: STARTTLS
S: 220
STARTTLS
C: EHLO c.example
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: QUIT
S: 221
""", given=given)


@pytest.mark.parametrize("keys,told", [
    ("tls = required", "certificate in [tls]"), ("tls = implicit", "certificate in [tls]"), ("banner_delay = 30s", "1s to 6s"), ("proxy_from = x", "a network"),
    ("client_ca = /nowhere", "a file that exists"), ("xclient_from = 1.2.3.4/8", "a network")])
def test_settings_that_can_t_be(keys: str, told: str) -> None:
    with pytest.raises(ConfigError) as failure:
        make_config(f"[listener:mx]\naddress = 127.0.0.1:2525\n{keys}\n")
    assert told in str(failure.value)


def test_auth_without_tls_on_loopback() -> None:
    given = "[listener:mx]\naddress = 127.0.0.1:2525\nallow_plain_on_loopback = yes\n"
    offered = "S: 220\nC: EHLO c.example\nS: 250\nHAS: AUTH PLAIN LOGIN\nC: AUTH PLAIN \\{base64 \\0user@example.test\\0secret}\nS: 235\nC: QUIT\nS: 221\n"
    run((), offered, given=given, peer_ip="127.0.0.1")
    refused = "S: 220\nC: EHLO c.example\nS: 250\nLACKS: AUTH*\nC: AUTH PLAIN \\{base64 \\0user@example.test\\0secret}\nS: 538\nC: QUIT\nS: 221\n"
    run((), refused, given=given, peer_ip="192.0.2.1")
    run((), refused, peer_ip="127.0.0.1")


def test_starttls_forgets_the_user() -> None:
    given = "[listener:submission]\naddress = 127.0.0.1:2587\nrole = submission\nallow_plain_on_loopback = yes\n"
    run((), r"""
listener: submission
S: 220
C: EHLO c.example
S: 250
C: AUTH PLAIN \{base64 \0user@example.test\0secret}
S: 235
C: STARTTLS
S: 220
STARTTLS
C: EHLO c.example
S: 250
C: MAIL FROM:<user@example.test>
S: 530 5.7.0
C: AUTH PLAIN \{base64 \0user@example.test\0secret}
S: 235
C: MAIL FROM:<user@example.test>
S: 250
C: QUIT
S: 221
""", given=given, peer_ip="127.0.0.1")


def test_what_the_audit_names_is_there() -> None:
    """docs/security.md: every default has a test, and it exists."""
    root = Path(__file__).parents[2]
    audit = (root / "docs/security.md").read_text()
    file = ""
    for path, name in re.findall(r"(tests/[\w/.-]+)?(?:::(\w+))?", audit):
        file = path or file
        assert not path or (root / path).exists(), path
        assert not name or f"def {name}(" in (root / file).read_text(), name


# --- on real sockets ------------------------------------------------------------------------------------------------


def greeted(octets: bytes, given: str, peer_ip: str = "192.0.2.1") -> tuple[bytes, str]:
    """What a client hears that sends so much at once and then nothing; and why its connection ended."""
    server = MemoryServer(given=given, peer_ip=peer_ip)
    ours, theirs = pair()
    try:
        theirs.sendall(octets)
        serving = gevent.spawn(server.connect(ours).run, True)
        heard = b""
        theirs.settimeout(10)
        while b"\n" not in heard and (piece := theirs.recv(1000)):
            heard += piece
        theirs.close()
        return heard, str(serving.get(timeout=10))
    finally:
        server.close()


def test_who_talks_before_the_banner() -> None:
    given = "[listener:mx]\naddress = 127.0.0.1:2525\nbanner_delay = 6s\n"
    heard, reason = greeted(b"EHLO early.example\r\n", given)
    assert heard.startswith(b"554 5.5.1 ") and reason == "pregreet"


def test_who_need_not_wait() -> None:
    given = "[listener:mx]\naddress = 127.0.0.1:2525\nbanner_delay = 6s\n[domains]\nlocal = example.test\nrelay_from = 192.0.2.0/24\n"
    assert greeted(b"EHLO ours.example\r\n", given)[0].startswith(b"220 ")
    assert greeted(b"EHLO early.example\r\n", "")[0].startswith(b"220 ")


def shaken(server: ServerTls, client: ssl.SSLContext, name: str = "mx.example.test") -> tuple[TlsInfo, str, bytes]:
    """What the server knows of a handshake, the version, and the certificate that the client sees."""
    left, right = pair()

    def serve() -> TlsInfo:
        link = server.wrap_socket(left, server_side=True, do_handshake_on_connect=False)
        link.do_handshake()
        link.sendall(b"x")
        return tls_info(link)

    serving = gevent.spawn(serve)
    with SSLContext.wrap_socket(client, right, server_hostname=name) as link:
        link.recv(1)  # under TLS 1.3 a client's certificate is judged after its handshake
        seen, version = link.getpeercert(binary_form=True) or b"", link.version() or ""
    left.close()
    return serving.get(timeout=10), version, seen


def client(authority: Authority) -> SSLContext:
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority.file)
    return context


def test_certificates_are_read_again_when_they_change(tmp_path: Path) -> None:
    authority, log, clock = Authority(tmp_path), MemoryLog(), FakeClock()
    first, second = authority.issue("mx.example.test"), authority.issue("mx.example.test")
    files = [tmp_path / "live.crt", tmp_path / "live.key"]

    def put(issued: tuple[str, str]) -> None:
        for file, source in zip(files, issued, strict=True):
            new = file.with_suffix(".new")
            new.write_bytes(Path(source).read_bytes())
            new.rename(file)

    put(first)
    server = ServerTls(str(files[0]), str(files[1]), log=log, clock=clock)
    assert shaken(server, client(authority))[2] == first.der[0]
    put(second)
    assert shaken(server, client(authority))[2] == first.der[0]  # looked at once a second
    clock.advance(2)
    assert shaken(server, client(authority))[2] == second.der[0] and log.of("certificates read again")
    files[0].write_text("nonsense")
    clock.advance(2)
    assert shaken(server, client(authority))[2] == second.der[0]
    clock.advance(2)
    shaken(server, client(authority))
    assert len(log.of("certificates can't be read again")) == 1
    files[1].unlink()
    for _ in range(3):
        clock.advance(2)
        assert shaken(server, client(authority))[2] == second.der[0]
    assert len(log.of("certificates can't be read again")) == 2  # said once, not once a second
    put(first)
    clock.advance(2)
    assert shaken(server, client(authority))[2] == first.der[0]


def test_a_pair_that_is_being_replaced_at_the_start(tmp_path: Path) -> None:
    """A worker that starts between the new key and the new certificate waits for the other one; not for ever."""
    authority, clock = Authority(tmp_path), FakeClock()
    old, new = authority.issue("mx.example.test"), authority.issue("mx.example.test")
    live = (str(tmp_path / "live.crt"), new[1])
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.advance(seconds)
        if len(waits) == 2:
            Path(live[0]).write_bytes(Path(old[0]).read_bytes())
        if len(waits) == 4:
            Path(live[0]).write_bytes(Path(new[0]).read_bytes())

    server = ServerTls(*live, clock=clock, sleep=sleep)  # at first there is no certificate at all
    assert shaken(server, client(authority))[2] == new.der[0] and len(waits) == 4
    waits[:] = [0.0] * 10
    with pytest.raises(TlsError, match=r"(?i)key.values.mismatch"):
        ServerTls(old[0], new[1], clock=clock, sleep=sleep)
    assert SETTLE_S <= sum(waits) < SETTLE_S + 0.2


def test_a_change_that_leaves_time_and_size_is_seen(tmp_path: Path) -> None:
    """A copy that keeps the time of its original; a key that is only now made readable changes no more than that."""
    authority, clock = Authority(tmp_path), FakeClock()
    one, other = authority.issue("mx.example.test"), authority.issue("mx.example.test")
    live = tmp_path / "live.pem"

    def put(issued: tuple[str, str]) -> None:
        live.write_bytes(b"".join(Path(file).read_bytes() for file in issued).ljust(4000, b"\n"))

    put(one)
    found = os.stat(live)
    server = ServerTls(str(live), None, clock=clock)
    while os.stat(live).st_ctime_ns == found.st_ctime_ns:  # a kernel's clock for files may tick every 4 ms
        put(other)
        os.utime(live, ns=(found.st_atime_ns, found.st_mtime_ns))
    clock.advance(2)
    assert shaken(server, client(authority))[2] == other.der[0]


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_the_end_of_a_session_is_told(tmp_path: Path, version: str) -> None:
    """RFC 8446 section 6.1: a client that reads to the end must be able to tell that from a cut line; the last word and what we wait for are before it."""
    authority = Authority(tmp_path)
    files, known = authority.issue("mx.example.test"), client(authority)
    tls, given = ServerTls(*files), f"[listener:mx]\naddress = 127.0.0.1:2525\ntls = implicit\n[tls]\ncertificate = {files[0]}\nkey = {files[1]}\n"
    known.maximum_version = ssl.TLSVersion[version]
    for octets, last in ((b"EHLO client.example.com\r\nQUIT\r\n", b"221 "), (b"GET / HTTP/1.0\r\n", b"421 ")):
        left, right = pair()
        with contextlib.closing(MemoryServer((), given)) as server:
            connection = server.connect(left, tls=tls)
            serving = gevent.spawn(connection.run, True)
            with SSLContext.wrap_socket(known, right, server_hostname="mx.example.test", suppress_ragged_eofs=False) as link:
                link.settimeout(10)
                link.sendall(octets)
                heard = b"".join(iter(lambda link=link: link.recv(4096), b""))  # an end that was not told raises
            assert heard.split(b"\r\n")[-2].startswith(last), heard
            serving.get(timeout=10)


def test_certificates_by_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("mx.example.test"), authority.issue("mail.other.example")
    server = ServerTls(*one, names={"mail.other.example": tuple(other)})  # type: ignore[dict-item]
    info, _, seen = shaken(server, client(authority))
    told, _, shown = shaken(server, client(authority), "mail.other.example")
    assert (seen, shown) == (one.der[0], other.der[0])
    assert info.bindings["tls-server-end-point"] == hashlib.sha256(seen).digest() and told.bindings["tls-server-end-point"] == hashlib.sha256(shown).digest()
    assert len(info.bindings["tls-exporter"]) == 32 and info.bindings["tls-exporter"] != told.bindings["tls-exporter"]


def test_tls_1_2_binds_nothing_and_has_forward_secrecy(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    old = client(authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    info = shaken(ServerTls(*authority.issue("mx.example.test")), old)[0]
    assert info.version == "TLSv1.2" and info.cipher.startswith("ECDHE-") and not info.bindings
    with pytest.raises(OSError):
        shaken(ServerTls(*authority.issue("mx.example.test"), "1.3"), old)
    weak = client(authority)
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.set_ciphers("AES128-SHA:AES256-GCM-SHA384:ECDHE-ECDSA-AES128-SHA")
    with pytest.raises(OSError):
        shaken(ServerTls(*authority.issue("mx.example.test")), weak)


def test_client_certificates(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "Another authority")
    server = ServerTls(*authority.issue("mx.example.test"), client_ca=authority.file)
    known, unknown = client(authority), client(authority)
    known.load_cert_chain(*authority.issue("relay.partner.example"))
    unknown.load_cert_chain(*stranger.issue("relay.partner.example"))
    assert shaken(server, known)[0].client_name == "relay.partner.example"
    assert shaken(server, client(authority))[0].client_name == ""
    with pytest.raises(OSError):
        shaken(server, unknown)
    assert shaken(ServerTls(*authority.issue("mx.example.test")), unknown)[0].client_name == ""  # not asked, not told


def test_a_proxy_s_certificate_is_not_its_clients(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = ServerTls(*authority.issue("mx.example.test"), client_ca=authority.file)
    heard = said_by_partner(authority, tls, "*", b"EHLO c.example\r\nXCLIENT ADDR=198.51.100.7\r\nEHLO c.example\r\nMAIL FROM:<a@partner.example>\r\n"
                                                 b"RCPT TO:<x@foreign.example>\r\nQUIT\r\n", "xclient_from = 192.0.2.1\n")
    assert b"530 5.7.0" in heard and b"250 2.1.5" not in heard


@pytest.mark.parametrize("names,trusted", [("relay.partner.example", True), ("*", True), ("RELAY.partner.EXAMPLE, x.example", True), ("other.example", False), ("", False)])
def test_a_client_certificate_may_relay(tmp_path: Path, names: str, trusted: bool) -> None:
    authority = Authority(tmp_path)
    tls = ServerTls(*authority.issue("mx.example.test"), client_ca=authority.file)
    heard = said_by_partner(authority, tls, names, b"EHLO c.example\r\nMAIL FROM:<a@partner.example>\r\nRCPT TO:<x@foreign.example>\r\nQUIT\r\n")
    assert (b"250 2.1.5" in heard) is trusted and (b"530 5.7.0" in heard) is not trusted


def said_by_partner(authority: Authority, tls: ServerTls, names: str, octets: bytes, keys: str = "") -> bytes:
    """What a client with a certificate hears when it says that, under TLS, on a submission listener."""
    server = MemoryServer(given=f"[listener:submission]\naddress = 127.0.0.1:2587\nrole = submission\nclient_ca = {authority.file}\nclient_names = {names}\n{keys}")
    left, right = pair()
    serving = gevent.spawn(server.connect(left, "submission", tls=tls).run, True)
    partner = client(authority)
    partner.load_cert_chain(*authority.issue("relay.partner.example"))
    try:
        right.settimeout(10)
        with right.makefile("rwb") as file:
            for line in (b"EHLO c.example\r\n", b"STARTTLS\r\n"):
                while file.readline()[3:4] == b"-":
                    pass
                file.write(line)
                file.flush()
            while file.readline()[:4] != b"220 ":
                pass
        with SSLContext.wrap_socket(partner, right, server_hostname="mx.example.test") as link:
            link.sendall(octets)
            heard = b""
            while piece := link.recv(4096):
                heard += piece
        serving.get(timeout=10)
        return heard
    finally:
        server.close()
