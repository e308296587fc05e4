"""The client's side of SASL: which mechanism to take of those offered, and what to answer to each challenge.

Octets in and out, base64 and the AUTH command are gmta/smtp/client.py's. A server that answers out of turn, asks for too much work
or does not know the secret itself (SCRAM) raises ValueError, and the exchange is to be cancelled.
RFC 4616 (PLAIN), draft-murchison-sasl-login (LOGIN), RFC 5802 and RFC 7677 (SCRAM-SHA-256).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import unicodedata
from typing import Protocol

MECHANISMS = ("SCRAM-SHA-256", "PLAIN", "LOGIN")  # the best first
CLEAR = frozenset({"PLAIN", "LOGIN"})  # mechanisms that show the secret to whoever listens
LEAST_ITERATIONS, MOST_ITERATIONS = 4096, 200_000  # RFC 7677 section 4; more than that stalls us for a server's whim


class Exchange(Protocol):
    """One authentication. first: the initial response, or None where the server speaks first."""

    first: bytes | None

    def answer(self, challenge: bytes) -> bytes:
        """The response to a challenge; raises ValueError."""

    def finished(self) -> bool:
        """Whether a 235 may be believed now."""


def choose(offered: str, user: str, secret: str, nonce: str, *, private: bool) -> tuple[str, Exchange] | None:
    """(mechanism, its exchange) for the parameters of AUTH in the EHLO reply; None where nothing suits.

    nonce: printable ASCII without comma, never used before.  private: nobody can listen.
    """
    words = set(offered.upper().split())
    for mechanism in MECHANISMS:
        if mechanism in words and (private or mechanism not in CLEAR):
            if mechanism == "PLAIN":
                return mechanism, Plain(user, secret)
            return mechanism, Login(user, secret) if mechanism == "LOGIN" else Scram(user, secret, nonce)
    return None


class Plain:
    """PLAIN."""

    def __init__(self, user: str, secret: str) -> None:
        if "\0" in user or "\0" in secret:
            raise ValueError("NUL in the credentials")
        self.first: bytes | None = f"\0{user}\0{secret}".encode()

    def answer(self, challenge: bytes) -> bytes:
        """There is nothing to ask."""
        raise ValueError("a challenge in PLAIN")

    def finished(self) -> bool:
        """Always."""
        return True


class Login:
    """LOGIN: whatever the server asks, first the user, then the secret."""

    first: bytes | None = None

    def __init__(self, user: str, secret: str) -> None:
        self._left = [secret.encode(), user.encode()]

    def answer(self, challenge: bytes) -> bytes:
        """The user, then the secret."""
        if not self._left:
            raise ValueError("a third question in LOGIN")
        return self._left.pop()

    def finished(self) -> bool:
        """When both are said."""
        return not self._left


class Scram:
    """SCRAM-SHA-256 without channel binding: the secret stays here, and the server has to know it too."""

    def __init__(self, user: str, secret: str, nonce: str) -> None:
        # RFC 5802 section 5.1; NFKC is what SASLprep does to text that has no odd characters
        name = unicodedata.normalize("NFKC", user).replace("=", "=3D").replace(",", "=2C")
        self._secret = unicodedata.normalize("NFKC", secret).encode()
        self._nonce = nonce
        self._bare = f"n={name},r={nonce}"
        self._signature: bytes | None = None
        self._proven = False
        self.first: bytes | None = f"n,,{self._bare}".encode()

    def answer(self, challenge: bytes) -> bytes:
        """The proof, then nothing once the server has proved itself."""
        if self._signature is None:
            return self._prove(challenge.decode("utf-8"))
        fields = _fields(challenge.decode("utf-8"))
        if not hmac.compare_digest(_decode(fields.get("v", "")), self._signature):
            raise ValueError(f"the server does not know the secret ({fields.get('e', 'wrong signature')[:80]})")
        self._proven = True
        return b""

    def _prove(self, server_first: str) -> bytes:
        fields = _fields(server_first)
        nonce, salt, iterations = fields.get("r", ""), _decode(fields.get("s", "")), fields.get("i", "")
        if not nonce.startswith(self._nonce) or nonce == self._nonce or "m" in fields:  # RFC 5802 section 5.1
            raise ValueError("a SCRAM challenge that is not for us")
        if not iterations.isdigit() or not LEAST_ITERATIONS <= int(iterations[:9]) <= MOST_ITERATIONS or not salt:
            raise ValueError("SCRAM with an odd salt or iteration count")
        salted = hashlib.pbkdf2_hmac("sha256", self._secret, salt, int(iterations))
        key = hmac.digest(salted, b"Client Key", "sha256")
        final = f"c=biws,r={nonce}"
        signed = f"{self._bare},{server_first},{final}".encode()
        mask = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, mask, strict=True))
        self._signature = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
        return f"{final},p={base64.b64encode(proof).decode('ascii')}".encode()

    def finished(self) -> bool:
        """When the server has proved itself."""
        return self._proven


def _fields(text: str) -> dict[str, str]:
    """The attributes of a SCRAM message; the first of a name counts."""
    found: dict[str, str] = {}
    for part in text.split(","):
        found.setdefault(part[:1], part[2:])
    return found


def _decode(text: str) -> bytes:
    """Octets from base64; raises ValueError."""
    return base64.b64decode(text, validate=True)
