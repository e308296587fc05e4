"""plugins/auth_ldap.py: what it takes as configuration, and directories that say nothing or nonsense. The real one: tests/e2e/test_ldap.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gmta.config import ConfigError
from gmta.hookspecs import Credentials
from gmta.testing import load_plugin, make_session
from gmta_plugins.auth_ldap import _filled


@pytest.mark.parametrize("keys,said", [
    ({"urls": "ldap://ldap.example.org", "starttls": "no"}, "under TLS"),
    ({"urls": "http://ldap.example.org"}, "ldaps://HOST"),
    ({"urls": "ldaps://"}, "ldaps://HOST"),
    ({"urls": "ldaps://ldap.example.org/dc=x"}, "ldaps://HOST"),
    ({"urls": "ldaps://ldap.example.org:x"}, "[Pp]ort"),
    ({"bind_dn": "cn=x"}, "bind_password"),
    ({"filter": "(mail=alice)"}, "{user} or {local}"),
    ({"filter": "(mail={user}"}, "RFC 4515"),
    ({"filter": "(&(mail={user})"}, "RFC 4515"),
    ({"base_dn": None}, "base_dn"),
    ({"urls": ""}, "urls"),
])
def test_what_stops_the_start(keys: dict[str, Any], said: str) -> None:
    given = {"urls": "ldaps://ldap.example.org", "base_dn": "dc=example,dc=org", **keys}
    with pytest.raises(ConfigError, match=said):
        load_plugin("auth_ldap", **{key: value for key, value in given.items() if value is not None})


def test_a_filter_is_filled_once_and_escaped() -> None:
    assert _filled("(|(mail={user})(uid={local}))", "a*(b)\\@x") == "(|(mail=a\\2a\\28b\\29\\5c@x)(uid=a\\2a\\28b\\29\\5c))"
    assert _filled("(a={local})(b={domain})", "{domain}@{user}") == "(a={domain})(b={user})"
    assert _filled("(a={local})(b={domain})", "plain") == "(a=plain)(b=)"
    assert _filled("(a={user})", "\0") == "(a=\\00)"


@pytest.fixture
def directory() -> Iterator[Callable[[bytes | None], str]]:
    """Listens and answers whatever comes with some octets; None: it says nothing."""
    closing: list[socket.socket] = []

    def start(answer: bytes | None) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        closing.append(listener)

        def serve() -> None:
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    return
                closing.append(link)
                if answer is not None and link.recv(1000):
                    link.sendall(answer)
                    link.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        return f"ldap://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for one in closing:
        one.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 400 Bad\r\n\r\n", b"\x30\x0c\x02\x01\x01\x65\x07\x0a\x01\x00\x04\x00\x04\x00", b"\x30\x84\xff\xff\xff\xff",
                                    b"\x30\x03\x02\x01\x01", None, b"\x30\x0c\x02\x01\x01\x61\x07\x0a\x01\x00\x04\x00\x04\x00"])
@pytest.mark.parametrize("starttls", ["yes", "no"])
def test_nonsense_and_silence(directory: Callable[[bytes | None], str], answer: bytes | None, starttls: str) -> None:
    """An error (454 to the client), never a login, and no password goes out before TLS."""
    plugin = load_plugin("auth_ldap", urls=directory(answer), starttls=starttls, base_dn="dc=example", request_timeout="1s")
    with pytest.raises(Exception):  # noqa: B017
        plugin.permit_auth(make_session(role="submission", tls=True), Credentials("PLAIN", "alice@example.test", "secret"))
    assert not plugin._searching and not plugin._binding and plugin._turns._free == 8


def test_what_no_directory_is_asked_for() -> None:
    plugin = load_plugin("auth_ldap", urls="ldaps://127.0.0.1:1", base_dn="dc=example")
    session = make_session(role="submission", tls=True)
    assert plugin.permit_auth(session, Credentials("PLAIN", "alice", "")) is None  # RFC 4513 section 5.1.2
    assert plugin.permit_auth(session, Credentials("SCRAM-SHA-256", "alice", "")) is None
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        plugin.permit_auth(session, Credentials("PLAIN", "alice", "x"))
