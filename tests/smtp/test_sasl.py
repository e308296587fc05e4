"""The server's side of SASL: the RFCs' own examples, our own client against it, and everything malformed."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.smtp import sasl, sasl_client
from gmta.smtp.sasl import Scram, ScramVerifier, exchange

# RFC 7677 section 3
SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
PENCIL = ScramVerifier.of("pencil", SALT, 4096)
CLIENT_FIRST = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO"
SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
SERVER_FIRST = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
CLIENT_FINAL = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
SERVER_FINAL = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
BINDINGS = {"tls-exporter": b"E" * 32, "tls-server-end-point": b"P" * 32}


def scram(mechanism: str = sasl.SCRAM, bindings: dict[str, bytes] | None = None) -> Scram:
    made = exchange(mechanism, bindings or {})
    assert isinstance(made, Scram)
    return made


def test_plain() -> None:
    made = exchange("PLAIN", {})
    assert made.step(None) == b"" and made.step("other\0üser\0säcret".encode()) is None
    assert (made.authzid, made.user, made.secret) == ("other", "üser", "säcret") and made.failed() is None


@pytest.mark.parametrize("response", [b"", b"user", b"\0user", b"\0\0secret", b"\0user\0", b"a\0b\0c\0d", b"\0\xff\0secret"])
def test_plain_malformed(response: bytes) -> None:
    with pytest.raises(ValueError):
        exchange("PLAIN", {}).step(response)


def test_login_with_and_without_initial_response() -> None:
    made = exchange("LOGIN", {})
    assert made.step(None) == b"Username:" and made.step(b"user") == b"Password:" and made.step(b"secret") is None
    assert (made.user, made.secret) == ("user", "secret")
    assert exchange("LOGIN", {}).step(b"user") == b"Password:"
    for response in (b"", b"\xff", b"a\0b"):
        with pytest.raises(ValueError):
            exchange("LOGIN", {}).step(response)


def test_oauthbearer_as_in_rfc_7628() -> None:
    made = exchange("OAUTHBEARER", {})
    said = b"n,a=user@example.com,\x01host=server.example.com\x01port=143\x01auth=Bearer vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg==\x01\x01"
    assert made.step(said) is None
    assert (made.user, made.secret) == ("user@example.com", "vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg==")
    assert b"invalid_token" in (made.failed() or b"")
    nameless = exchange("OAUTHBEARER", {})
    assert nameless.step(b"n,,\x01auth=bearer abc\x01\x01") is None and nameless.user == ""


def test_xoauth2() -> None:
    made = exchange("XOAUTH2", {})
    assert made.step(b"user=someuser@example.com\x01auth=Bearer ya29.vF9\x01\x01") is None
    assert (made.user, made.secret) == ("someuser@example.com", "ya29.vF9") and b"401" in (made.failed() or b"")


@pytest.mark.parametrize("mechanism,response", [
    ("OAUTHBEARER", b""), ("OAUTHBEARER", b"n,,"), ("OAUTHBEARER", b"n,,\x01auth=Basic abc\x01\x01"), ("OAUTHBEARER", b"p=tls-exporter,,\x01auth=Bearer a\x01\x01"),
    ("OAUTHBEARER", b"n,a=,\x01auth=Bearer a\x01\x01"), ("OAUTHBEARER", b"n,x,\x01auth=Bearer a\x01\x01"), ("OAUTHBEARER", b"n,a=b=c,\x01auth=Bearer a\x01\x01"),
    ("XOAUTH2", b""), ("XOAUTH2", b"auth=Bearer a\x01\x01"), ("XOAUTH2", b"user=a\x01\x01"), ("XOAUTH2", b"user=a\x01auth=Bearer a b\x01\x01"), ("XOAUTH2", b"\xff"),
])
def test_oauth_malformed(mechanism: str, response: bytes) -> None:
    with pytest.raises(ValueError):
        exchange(mechanism, {}).step(response)


def test_scram_as_in_rfc_7677() -> None:
    made = scram()
    assert made.step(None) == b"" and made.step(CLIENT_FIRST) is None and made.user == "user" and made.proven is None
    assert made.take(PENCIL, SERVER_NONCE) == SERVER_FIRST
    assert made.step(CLIENT_FINAL) == SERVER_FINAL and made.proven
    assert made.step(b"") is None
    with pytest.raises(ValueError):
        made.step(b"more")


@pytest.mark.parametrize("final", [
    CLIENT_FINAL.replace(b"dHzb", b"dHzc"), CLIENT_FINAL.replace(b"c=biws", b"c=eSws"), CLIENT_FINAL.replace(b"hvYD", b"hvYE"),
    CLIENT_FINAL[:-12], b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p="])
def test_scram_wrong_proof(final: bytes) -> None:
    made = scram()
    made.step(CLIENT_FIRST)
    made.take(PENCIL, SERVER_NONCE)
    assert made.step(final) is None and made.proven is False


@pytest.mark.parametrize("final", [b"", b"c=biws", b"p=abc", b"c=biws,p=abc=", b"c=***,r=x,p=abcd", b"r=x,c=biws,p=abcd", b"\xff", b"c=biws,r=x\0,p=abcd"])
def test_scram_malformed_final(final: bytes) -> None:
    made = scram()
    made.step(CLIENT_FIRST)
    made.take(PENCIL, SERVER_NONCE)
    with pytest.raises(ValueError):
        made.step(final)


@pytest.mark.parametrize("first", [
    b"", b"n", b"n,,", b"n,,n=user", b"n,,r=abc,n=user", b"n,,n=,r=abc", b"n,,n=a=b,r=abc", b"n,,n=user,r=", b"n,,m=x,n=user,r=abc", b"n,user,n=user,r=abc",
    b"x,,n=user,r=abc", b"p=tls-exporter,,n=user,r=abc", b"n,,n=us\0er,r=abc", b"n,,n=user,r=a\xffc", b"n,,n=user,r=a b"])
def test_scram_malformed_first(first: bytes) -> None:
    with pytest.raises(ValueError):
        scram().step(first)


def test_scram_escapes() -> None:
    made = scram()
    made.step(b"n,a=x=2Cy,n=a=3Db=2Cc,r=abc")
    assert (made.user, made.authzid) == ("a=b,c", "x,y")


@given(user=st.text(min_size=1, max_size=20), secret=st.text(min_size=1, max_size=20), other=st.text(min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_our_client_logs_in_with_the_right_secret_only(user: str, secret: str, other: str) -> None:
    if "\0" in user:
        return
    verifier = ScramVerifier.of(secret, b"salt", 4096)
    for said in {secret, other}:
        client = sasl_client.Scram(user, said, "cnonce")
        made = scram()
        assert made.step(client.first) is None
        answer = made.step(client.answer(made.take(verifier, "snonce")))
        same = sasl.prepared(said) == sasl.prepared(secret)
        assert (answer is not None) is bool(made.proven) is same
        if answer is not None:
            assert client.answer(answer) == b"" and client.finished()


def bound(name: str, data: bytes) -> Scram:
    """A SCRAM-SHA-256-PLUS exchange with a client on a channel of that data."""
    made = scram(sasl.SCRAM_PLUS, BINDINGS)
    header = f"p={name},,".encode()
    bare = "n=user,r=abc"
    assert made.step(header + bare.encode()) is None
    first = made.take(PENCIL, "def").decode()
    without = f"c={base64.b64encode(header + data).decode()},r=abcdef"
    key = hmac.digest(hashlib.pbkdf2_hmac("sha256", b"pencil", SALT, 4096), b"Client Key", "sha256")
    mask = hmac.digest(hashlib.sha256(key).digest(), f"{bare},{first},{without}".encode(), "sha256")
    proof = bytes(a ^ b for a, b in zip(key, mask, strict=True))
    made.step(f"{without},p={base64.b64encode(proof).decode()}".encode())
    return made


def test_channel_binding() -> None:
    assert bound("tls-exporter", b"E" * 32).proven and bound("tls-server-end-point", b"P" * 32).proven
    assert bound("tls-exporter", b"P" * 32).proven is False and bound("tls-exporter", b"").proven is False
    for first in (b"p=tls-unique,,n=user,r=abc", b"n,,n=user,r=abc", b"y,,n=user,r=abc", b"p,,n=user,r=abc"):
        with pytest.raises(ValueError):
            scram(sasl.SCRAM_PLUS, BINDINGS).step(first)


def test_a_client_that_was_robbed_of_plus_is_refused() -> None:
    with pytest.raises(ValueError, match="flag"):
        scram(sasl.SCRAM, BINDINGS).step(b"y,,n=user,r=abc")
    assert scram(sasl.SCRAM, BINDINGS).step(b"n,,n=user,r=abc") is None and scram().step(b"y,,n=user,r=abc") is None


def test_verifiers_as_text() -> None:
    assert ScramVerifier.parse(PENCIL.text()) == PENCIL
    for text in ("", "x", "SCRAM-SHA-1$4096:YQ==$YQ==:YQ==", "SCRAM-SHA-256$x:YQ==$YQ==:YQ==", "SCRAM-SHA-256$1:*$YQ==:YQ=="):
        with pytest.raises(ValueError):
            ScramVerifier.parse(text)


def test_a_decoy_is_the_same_each_time_and_no_other_s() -> None:
    assert ScramVerifier.decoy("a", b"p") == ScramVerifier.decoy("a", b"p") != ScramVerifier.decoy("b", b"p")
    assert ScramVerifier.decoy("a", b"p").iterations == sasl.ITERATIONS and ScramVerifier.decoy("a", b"q") != ScramVerifier.decoy("a", b"p")
