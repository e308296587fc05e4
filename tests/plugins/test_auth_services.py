"""plugins/auth_http.py, auth_oauth.py and auth_dovecot.py against services on loopback that say right, wrong and nonsense."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from gmta.config import ConfigError
from gmta.hookspecs import Credentials
from gmta.mail.verdict import Verdict
from gmta.testing import FakeClock, MemoryServer, load_plugin, make_services, make_session

USER = "user@example.test"


class Service:
    """An HTTP server; `answer` makes (status, body) of (path, headers, body), `heard` has the bodies."""

    def __init__(self) -> None:
        self.answer: Callable[[str, Any, bytes], tuple[int, bytes]] = lambda path, headers, body: (200, b"")
        self.heard: list[bytes] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service.heard.append(body)
                status, octets = service.answer(self.path, self.headers, body)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(octets)))
                self.end_headers()
                self.wfile.write(octets)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.close()


def ask(plugin: Any, mechanism: str = "PLAIN", user: str = USER, secret: str = "secret") -> tuple[Verdict | None, Credentials]:
    credentials = Credentials(mechanism, user, secret)
    return plugin.permit_auth(make_session(role="submission", tls=True), credentials), credentials


# --- auth_http ----------------------------------------------------------------------------------------------------


def test_http_right_and_wrong(service: Service) -> None:
    plugin = load_plugin("auth_http", url=service.url, authorization="Bearer token")

    def answer(path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        assert headers["Authorization"] == "Bearer token"
        return (200, b'{"user": "canonical@example.test"}') if json.loads(body)["password"] == "secret" else (401, b"")

    service.answer = answer
    verdict, credentials = ask(plugin)
    assert verdict is not None and credentials.user == "canonical@example.test"
    assert json.loads(service.heard[0]) == {"user": USER, "password": "secret", "ip": "192.0.2.1", "helo": "client.example.com", "mechanism": "PLAIN",
                                            "tls": True, "listener": "submission"}
    assert ask(plugin, secret="wrong")[0] is None and ask(plugin, "SCRAM-SHA-256")[0] is None


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"user": 5}', b'{"user": "a\\r\\nb"}', b"x" * 200_000])
def test_http_odd_bodies_name_nobody_else(service: Service, body: bytes) -> None:
    service.answer = lambda *_: (200, body)
    verdict, credentials = ask(load_plugin("auth_http", url=service.url))
    assert verdict is not None and credentials.user == USER


@pytest.mark.parametrize("status", [302, 500, 400, 429])
def test_http_out_of_order_is_454(service: Service, status: int) -> None:
    service.answer = lambda *_: (status, b"")
    server = MemoryServer("auth_http", keys={"url": service.url})
    try:
        server.play("S: 220\nC: EHLO c.example\nS: 250\nC: STARTTLS\nS: 220\nSTARTTLS\nC: EHLO c.example\nS: 250\n"
                    "C: AUTH PLAIN \\{base64 \\0user@example.test\\0hunter2}\nS: 454 4.7.0\nC: QUIT\nS: 221\n")
        assert server.log.of("plugin failed") and "hunter2" not in repr(server.log.of("plugin failed")[0]["reason"])
    finally:
        server.close()


def test_http_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    with pytest.raises(Exception, match="Connection"):
        ask(load_plugin("auth_http", url=url))


@pytest.mark.parametrize("url", ["http://auth.example/", "ftp://127.0.0.1/", "nonsense", ""])
def test_http_passwords_go_nowhere_in_clear(url: str) -> None:
    with pytest.raises(ConfigError):
        load_plugin("auth_http", url=url)


# --- auth_oauth ---------------------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def b64(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def jwks() -> bytes:
    one, two, three = RSA.public_key().public_numbers(), EC.public_key().public_numbers(), ED.public_key().public_bytes_raw()
    return json.dumps({"keys": [
        {"kty": "RSA", "kid": "r", "n": number(one.n), "e": number(one.e)},
        {"kty": "EC", "kid": "e", "crv": "P-256", "x": b64(two.x.to_bytes(32, "big")), "y": b64(two.y.to_bytes(32, "big"))},
        {"kty": "OKP", "kid": "o", "crv": "Ed25519", "x": b64(three)}, {"kty": "oct", "kid": "h", "k": "c2VjcmV0"}, "nonsense"]}).encode()


def token(algorithm: str, kid: str | None = None, header: dict[str, Any] | None = None, **claims: Any) -> str:
    clock = FakeClock()
    said = {"iss": "https://issuer.example", "aud": "mail", "email": USER, "exp": clock() + 600} | claims
    signed = f"{b64(json.dumps({'alg': algorithm, **({'kid': kid} if kid else {}), **(header or {})}).encode())}.{b64(json.dumps(said).encode())}"
    octets = signed.encode()
    if algorithm == "RS256":
        mark = RSA.sign(octets, padding.PKCS1v15(), hashes.SHA256())
    elif algorithm == "PS256":
        mark = RSA.sign(octets, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    elif algorithm == "ES256":
        r, s = decode_dss_signature(EC.sign(octets, ec.ECDSA(hashes.SHA256())))
        mark = r.to_bytes(32, "big") + s.to_bytes(32, "big")
    elif algorithm == "EdDSA":
        mark = ED.sign(octets)
    else:
        mark = b""
    return f"{signed}.{b64(mark)}"


def oauth(service: Service, **keys: Any) -> Any:
    service.answer = lambda path, headers, body: (200, jwks())
    settings = {"jwks_url": service.url, "issuer": "https://issuer.example", "audience": "mail"} | keys
    return load_plugin("auth_oauth", make_services(clock=FakeClock()), **settings)


@pytest.mark.parametrize("algorithm,kid", [("RS256", "r"), ("RS256", None), ("PS256", "r"), ("ES256", "e"), ("EdDSA", "o"), ("EdDSA", None)])
def test_oauth_signed(service: Service, algorithm: str, kid: str | None) -> None:
    plugin = oauth(service)
    verdict, credentials = ask(plugin, "OAUTHBEARER", "", token(algorithm, kid))
    assert verdict is not None and credentials.user == USER
    assert ask(plugin, "XOAUTH2", "User@Example.TEST", token(algorithm, kid, aud=["x", "mail"]))[0] is not None
    assert len(service.heard) == 1


@pytest.mark.parametrize("wrong", [
    "", "a.b", "a.b.c", "....", "!.!.!", token("none"), token("HS256", "h"), token("RS256", "r", iss="https://evil.example"), token("RS256", "r", aud="web"),
    token("RS256", "r", exp=1.0), token("RS256", "r", exp=None), token("RS256", "r", exp="9e9"), token("RS256", "r", exp=True), token("RS256", "r", nbf=9e12),
    token("RS256", "r", email=None), token("RS256", "r", email="a\nb"), token("RS256", "r", email="other@example.test"), token("RS256", "e"),
    token("RS256", "r", {"crit": ["x"]}), token("RS256", "r")[:-8], token("RS256", "r").replace(".", ".x", 1), token("ES256", "e")[:-4],
    token("RS256", "r", {"alg": "ES256"}), token("RS256", "r", {"alg": "RS512"}), token("RS256", "r", {"alg": 5}), f"{b64(b'[' * 5000)}.{b64(b'{}')}.",
])
def test_oauth_signed_wrongly(service: Service, wrong: str) -> None:
    assert ask(oauth(service), "OAUTHBEARER", USER, wrong)[0] is None


def test_oauth_keys_are_asked_for_again_once_a_minute(service: Service) -> None:
    plugin = oauth(service)
    for _ in range(3):
        assert ask(plugin, "XOAUTH2", USER, token("RS256", "new"))[0] is None
    assert len(service.heard) == 1
    plugin._clock.advance(61)
    assert ask(plugin, "XOAUTH2", USER, token("RS256", "new"))[0] is None and len(service.heard) == 2
    service.answer = lambda *_: (503, b"")
    plugin._clock.advance(4000)
    assert ask(plugin, "XOAUTH2", USER, token("RS256", "r", exp=9e12))[0] is not None  # the old keys still do
    assert ask(plugin, "XOAUTH2", USER, token("RS256", "new", exp=9e12))[0] is None and len(service.heard) == 3  # and who is down is not asked each time


def test_oauth_scope(service: Service) -> None:
    plugin = oauth(service, scope="smtp")
    assert ask(plugin, "XOAUTH2", USER, token("RS256", "r", scope="mail smtp"))[0] is not None
    assert ask(plugin, "XOAUTH2", USER, token("RS256", "r", scope="smtps"))[0] is None and ask(plugin, "XOAUTH2", USER, token("RS256", "r"))[0] is None


def test_oauth_introspected(service: Service) -> None:
    plugin = oauth(service, jwks_url="", introspection_url=service.url, issuer="", audience="", client_id="us", client_secret="pw")

    def answer(path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        assert headers["Authorization"] == "Basic " + base64.b64encode(b"us:pw").decode() and body.startswith((b"token=good&", b"token=bad&"))
        return 200, json.dumps({"active": body.startswith(b"token=good"), "email": USER}).encode()

    service.answer = answer
    assert ask(plugin, "OAUTHBEARER", USER, "good")[0] is not None and ask(plugin, "OAUTHBEARER", USER, "bad")[0] is None
    assert ask(plugin, "OAUTHBEARER", "second@example.test", "good")[0] is None
    for status, body in ((500, b""), (200, b"nonsense"), (302, b"")):
        service.answer = lambda *_, status=status, body=body: (status, body)  # type: ignore[misc]
        with pytest.raises(Exception, match="issuer"):
            ask(plugin, "OAUTHBEARER", USER, "good")


@pytest.mark.parametrize("keys", [{}, {"jwks_url": "https://x/"}, {"introspection_url": "http://issuer.example/"},
                                  {"introspection_url": "https://x/", "jwks_url": "https://x/", "issuer": "a", "audience": "b"}])
def test_oauth_settings_that_would_let_anybody_in(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        load_plugin("auth_oauth", **keys)


def test_oauth_in_the_dialogue(service: Service) -> None:
    """The error goes out as a challenge, then the refusal (RFC 7628 section 3.2.3)."""
    service.answer = lambda *_: (200, b'{"active": false}')
    server = MemoryServer("auth_oauth", keys={"introspection_url": service.url})
    try:
        server.play("S: 220\nC: EHLO c.example\nS: 250\nC: STARTTLS\nS: 220\nSTARTTLS\nC: EHLO c.example\nS: 250\nHAS: AUTH OAUTHBEARER XOAUTH2 PLAIN LOGIN\n"
                    "C: AUTH OAUTHBEARER \\{base64 n,a=user@example.test,\\x01auth=Bearer abc\\x01\\x01}\nS: 334 \\{base64 {\"status\":\"invalid_token\"}}\n"
                    "C: AQ==\nS: 535 5.7.8\nC: AUTH XOAUTH2\nS: 334\nC: *\nS: 501\nC: QUIT\nS: 221\n".replace("S: 334 \\{base64 {\"status\":\"invalid_token\"}}",
                    "S: 334 " + base64.b64encode(b'{"status":"invalid_token"}').decode()))
    finally:
        server.close()


# --- auth_dovecot -------------------------------------------------------------------------------------------------


class Dovecot:
    """The auth socket, as a script: greeting, and what it makes of an AUTH line."""

    def __init__(self, path: Path, greeting: str, answer: Callable[[list[str]], str]) -> None:
        self.heard: list[list[str]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(5)
        self._greeting, self._answer = greeting, answer
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._socket.accept()
            except OSError:
                return
            with link, link.makefile("rw", encoding="utf-8", newline="\n") as file:
                file.write(self._greeting)
                file.flush()
                for line in file:
                    words = line.rstrip("\n").split("\t")
                    if words[0] == "AUTH":
                        self.heard.append(words)
                        file.write(self._answer(words))
                        file.flush()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


GREETING = "VERSION\t1\t2\nMECH\tPLAIN\tplaintext\nMECH\tXOAUTH2\nMECH\tDIGEST-MD5\nSPID\t1\nCUID\t2\nCOOKIE\tabc\nDONE\n"


def dovecot(tmp_path: Path, answer: Callable[[list[str]], str], greeting: str = GREETING) -> tuple[Any, Dovecot]:
    server = Dovecot(tmp_path / "auth", greeting, answer)
    return load_plugin("auth_dovecot", make_services(clock=FakeClock()), socket=tmp_path / "auth"), server


def test_dovecot_right_and_wrong(tmp_path: Path) -> None:
    right = base64.b64encode(f"\0{USER}\0secret".encode()).decode()
    plugin, server = dovecot(tmp_path, lambda words: "OK\t1\tuser=canonical\n" if words[-1] == f"resp={right}" else "FAIL\t1\tuser=x\n")
    try:
        assert plugin.get_auth_mechanisms() == ["PLAIN", "LOGIN", "XOAUTH2"]
        for mechanism in ("PLAIN", "LOGIN"):
            verdict, credentials = ask(plugin, mechanism)
            assert verdict is not None and credentials.user == "canonical"
        assert server.heard[0][:4] == ["AUTH", "1", "PLAIN", "service=smtp"] and "rip=192.0.2.1" in server.heard[0] and "secured=tls" in server.heard[0]
        assert ask(plugin, secret="wrong")[0] is None and ask(plugin, "SCRAM-SHA-256")[0] is None
        assert ask(plugin, "XOAUTH2", secret="token")[0] is None and server.heard[-1][2] == "XOAUTH2"
    finally:
        server.close()


@pytest.mark.parametrize("greeting,answer", [
    (GREETING, "FAIL\t1\ttemp\n"), ("VERSION\t2\t0\nDONE\n", "OK\t1\n"), ("VERSION\nDONE\n", "OK\t1\n"), ("MECH\n", "OK\t1\n")])
def test_dovecot_that_does_not_know(tmp_path: Path, greeting: str, answer: str) -> None:
    plugin, server = dovecot(tmp_path, lambda words: answer, greeting)
    try:
        with pytest.raises(Exception, match=r"Dovecot|odd|range"):
            ask(plugin)
    finally:
        server.close()


def test_dovecot_that_is_not_there(tmp_path: Path) -> None:
    plugin = load_plugin("auth_dovecot", make_services(clock=FakeClock()), socket=tmp_path / "auth")
    assert plugin.get_auth_mechanisms() == ["PLAIN", "LOGIN"]
    with pytest.raises(Exception, match="auth"):
        ask(plugin)
