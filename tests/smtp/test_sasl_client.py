"""The client's side of SASL: the choice, each mechanism against right and wrong servers, and the RFCs' own examples."""

from __future__ import annotations

import base64

import pytest

from gmta.smtp.client import ClientProtocol
from gmta.smtp.sasl_client import Login, Plain, Scram, choose

# RFC 7677 section 3
NONCE = "rOprNGfwEbeRWgbNEkqO"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="


def test_the_best_that_is_offered() -> None:
    def chosen(offered: str, private: bool = True) -> str:
        found = choose(offered, "u", "s", "n", private=private)
        return found[0] if found else ""

    assert chosen("LOGIN plain scram-sha-256") == "SCRAM-SHA-256"
    assert chosen("LOGIN PLAIN XOAUTH2") == "PLAIN" and chosen("LOGIN") == "LOGIN" and chosen("GSSAPI") == chosen("") == ""
    assert chosen("PLAIN SCRAM-SHA-256 LOGIN", False) == "SCRAM-SHA-256" and chosen("PLAIN LOGIN", False) == ""


def test_plain() -> None:
    exchange = Plain("üser", "säcret")
    assert exchange.first == "\0üser\0säcret".encode() and exchange.finished()
    with pytest.raises(ValueError, match="challenge"):
        exchange.answer(b"")
    with pytest.raises(ValueError, match="NUL"):
        Plain("a", "b\0c")


def test_login() -> None:
    exchange = Login("user", "secret")
    assert exchange.first is None and exchange.answer(b"Username:") == b"user" and not exchange.finished()
    assert exchange.answer(b"anything") == b"secret" and exchange.finished()
    with pytest.raises(ValueError, match="third"):
        exchange.answer(b"?")


def test_scram_as_in_rfc_7677() -> None:
    exchange = Scram("user", "pencil", NONCE)
    assert exchange.first == b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
    assert exchange.answer(SERVER_FIRST) == (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=")
    assert not exchange.finished()
    assert exchange.answer(SERVER_FINAL) == b"" and exchange.finished()


@pytest.mark.parametrize("wrong", [
    SERVER_FIRST.replace(b"rOpr", b"XOpr"), SERVER_FIRST.replace(b"%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0", b""), SERVER_FIRST.replace(b"4096", b"1"),
    SERVER_FIRST.replace(b"4096", b"100000000000"), SERVER_FIRST.replace(b"4096", b"x"), SERVER_FIRST.replace(b"W22Z", b"***"), b"m=x," + SERVER_FIRST,
    b"", b"\xff", b"e=other-error"])
def test_scram_takes_no_odd_challenge(wrong: bytes) -> None:
    with pytest.raises(ValueError):
        Scram("user", "pencil", NONCE).answer(wrong)


@pytest.mark.parametrize("final", [b"v=AAAA", b"e=invalid-proof", b"", b"v=***"])
def test_scram_believes_no_server_that_does_not_know_the_secret(final: bytes) -> None:
    exchange = Scram("user", "pencil", NONCE)
    exchange.answer(SERVER_FIRST)
    with pytest.raises(ValueError):
        exchange.answer(final)
    assert not exchange.finished()


def test_scram_names_are_escaped() -> None:
    assert Scram("a=b,c", "x", "n").first == b"n,,n=a=3Db=2Cc,r=n"


def test_on_the_wire() -> None:
    client = ClientProtocol()
    client.ehlo("me.example")
    client.receive_data(b"220 mx\r\n250-mx\r\n250 AUTH PLAIN\r\n")
    assert [client.next_reply().code, client.next_reply().code] == [220, 250]  # type: ignore[union-attr]
    assert client.auth("LOGIN") == b"AUTH LOGIN\r\n" and client.auth("X", b"") == b"AUTH X =\r\n"
    assert client.auth("PLAIN", b"\0u\0s") == b"AUTH PLAIN " + base64.b64encode(b"\0u\0s") + b"\r\n"
    assert client.auth_response(b"u") == b"dQ==\r\n" and client.auth_response(b"") == b"\r\n" and client.auth_response(None) == b"*\r\n"
    assert client.awaiting == 6
