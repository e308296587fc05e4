"""The server's side of SASL: each mechanism as an exchange of octets, until it is known who asks and how it is to be proved.

`exchange` makes one; `step` takes what the client says and gives the next challenge, or None where there is something to decide.
For PLAIN, LOGIN and the OAuth mechanisms that is whether `secret` is right, which is decided elsewhere. For SCRAM the verifier of
`user` is to be handed in with `take`; the proof is judged here, in constant time. Malformed input raises ValueError. Base64 and
the AUTH command are the server protocol's. RFC 4954, RFC 4616 (PLAIN), draft-murchison-sasl-login (LOGIN), RFC 5802 and RFC 7677
(SCRAM-SHA-256), RFC 5929 and RFC 9266 (channel bindings), RFC 7628 (OAUTHBEARER; XOAUTH2 is its forerunner).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

from gmta.mail.reply import Reply

SCRAM_PLUS = "SCRAM-SHA-256-PLUS"
SCRAM = "SCRAM-SHA-256"
MECHANISMS = (SCRAM_PLUS, SCRAM, "OAUTHBEARER", "XOAUTH2", "PLAIN", "LOGIN")  # the best first, as they are offered
ITERATIONS = 100_000  # of new verifiers, and of those that are made up
_SCRAM_NONCE = re.compile(r"[!-+\--~]{1,512}\Z")  # RFC 5802 section 7: printable, no comma
_SASLNAME = re.compile(r"(?:[^=,\0]|=2C|=3D)+\Z")
_BEARER = re.compile(r"bearer +([A-Za-z0-9\-._~+/]+=*)\Z", re.I)  # RFC 6750 section 2.1


def challenge(data: bytes) -> Reply:
    """The 334 reply that carries a challenge."""
    return Reply(334, None, base64.b64encode(data).decode("ascii"))


def prepared(secret: str) -> bytes:
    """A secret as it is hashed, however the client's keyboard composed it (NFKC is what SASLprep does to text without odd characters)."""
    return unicodedata.normalize("NFKC", secret).encode()


class Exchange(ABC):
    """One authentication. user, secret, authzid: what the client says, as far as it has said it."""

    __slots__ = ("authzid", "mechanism", "secret", "user")

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.user = ""
        self.secret = ""
        self.authzid = ""

    @abstractmethod
    def step(self, response: bytes | None) -> bytes | None:
        """The next challenge, or None where something is to be decided. response None: there was no initial one. Raises ValueError."""

    def failed(self) -> bytes | None:
        """What a refused client is told before the refusal; None: nothing."""
        return None


class Plain(Exchange):
    """PLAIN (RFC 4616 section 2)."""

    __slots__ = ()

    def step(self, response: bytes | None) -> bytes | None:
        """Takes the three parts: a user and a secret are needed."""
        if response is None:
            return b""
        parts = response.split(b"\0")
        if len(parts) != 3 or not parts[1] or not parts[2]:
            raise ValueError("not authzid NUL user NUL secret")
        self.authzid, self.user, self.secret = (part.decode("utf-8") for part in parts)
        return None


class Login(Exchange):
    """LOGIN: asks for the user, then for the secret."""

    __slots__ = ()

    def step(self, response: bytes | None) -> bytes | None:
        """The next question."""
        if response is None:
            return b"Username:"
        text = response.decode("utf-8")
        if not text or "\0" in text:
            raise ValueError("empty, or with a NUL")
        if not self.user:
            self.user = text
            return b"Password:"
        self.secret = text
        return None


class OAuth(Exchange):
    """OAUTHBEARER (RFC 7628 section 3.1) and XOAUTH2: `secret` is the token."""

    __slots__ = ()

    def step(self, response: bytes | None) -> bytes | None:
        """Takes user and token."""
        if response is None:
            return b""
        text = response.decode("utf-8")
        if self.mechanism == "OAUTHBEARER":
            head, _, text = text.partition("\x01")
            flag, _, name = head.partition(",")
            if flag not in ("n", "y") or not name.endswith(","):
                raise ValueError("not a gs2 header without channel binding")
            self.user = _saslname(name[2:-1]) if name.startswith("a=") else ""
            if name != "," and not self.user:
                raise ValueError("not a gs2 header")
        fields = dict(field.partition("=")[::2] for field in text.split("\x01") if field)
        if self.mechanism == "XOAUTH2":
            self.user = fields.get("user", "")
        found = _BEARER.match(fields.get("auth", ""))
        if found is None or (not self.user and self.mechanism == "XOAUTH2"):
            raise ValueError("no user, or no bearer token")
        self.secret = found[1]
        return None

    def failed(self) -> bytes | None:
        """RFC 7628 section 3.2.2: the client hears why, and answers before it is refused."""
        if self.mechanism == "OAUTHBEARER":
            return b'{"status":"invalid_token"}'
        return b'{"status":"401","schemes":"bearer","scope":"mail"}'


class ScramVerifier(NamedTuple):
    """What a server keeps in place of a password (RFC 5802 section 2.2); it can't be used to log in."""

    salt: bytes
    iterations: int
    stored_key: bytes
    server_key: bytes

    @classmethod
    def of(cls, secret: str, salt: bytes, iterations: int = ITERATIONS) -> ScramVerifier:
        """The verifier of a password; takes about 20 ms."""
        salted = hashlib.pbkdf2_hmac("sha256", prepared(secret), salt, iterations)
        stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
        return cls(salt, iterations, stored, hmac.digest(salted, b"Server Key", "sha256"))

    @classmethod
    def decoy(cls, user: str, pepper: bytes) -> ScramVerifier:
        """The verifier of nobody, the same each time: a stranger must not learn which users there are (RFC 5802 section 9)."""
        salt = hmac.digest(pepper, b"salt" + user.encode("utf-8", "surrogateescape"), "sha256")
        return cls(salt[:16], ITERATIONS, hmac.digest(pepper, salt, "sha256"), salt)

    def text(self) -> str:
        """One word for a file (RFC 5803 section 2 without its prefix)."""
        salt, stored, server = (base64.b64encode(octets).decode("ascii") for octets in (self.salt, self.stored_key, self.server_key))
        return f"{SCRAM}${self.iterations}:{salt}${stored}:{server}"

    @classmethod
    def parse(cls, text: str) -> ScramVerifier:
        """The verifier that `text` gave; raises ValueError."""
        scheme, first, second = text.split("$")
        iterations, salt = first.split(":")
        stored, server = second.split(":")
        if scheme != SCRAM or not iterations.isdigit():
            raise ValueError("not a SCRAM-SHA-256 verifier")
        return cls(_decode(salt), int(iterations), _decode(stored), _decode(server))


class Scram(Exchange):
    """SCRAM-SHA-256, with channel binding as -PLUS.

    bindings: the channel's data by type; where there are any, -PLUS was offered.
    """

    __slots__ = ("_bindings", "_bound", "_first", "_gs2", "_nonce", "_verifier", "proven")

    def __init__(self, mechanism: str, bindings: Mapping[str, bytes]) -> None:
        super().__init__(mechanism)
        self._bindings = bindings
        self._bound = b""
        self._gs2 = b""
        self._first = ""
        self._nonce = ""
        self._verifier: ScramVerifier | None = None
        self.proven: bool | None = None  # None: there was no proof yet

    def step(self, response: bytes | None) -> bytes | None:
        """First, then final message of the client, then nothing."""
        if response is None:
            return b""
        if self.proven is not None:
            if response:
                raise ValueError("an answer to the server's signature")
            return None
        text = response.decode("utf-8")
        if "\0" in text:
            raise ValueError("a NUL")
        if self._verifier is not None:
            return self._finish(text)
        self._begin(text)
        return None

    def _begin(self, text: str) -> None:
        """client-first-message (RFC 5802 section 7)."""
        flag, _, rest = text.partition(",")
        authzid, _, bare = rest.partition(",")
        if self.mechanism == SCRAM_PLUS:
            kind, _, name = flag.partition("=")
            if kind != "p" or name not in self._bindings:
                raise ValueError("another channel binding than was offered")
            self._bound = self._bindings[name]
        elif flag != "n" and (flag != "y" or self._bindings):  # RFC 5802 section 6: somebody took -PLUS out of our offer
            raise ValueError("a channel binding flag that does not fit")
        if authzid and not authzid.startswith("a="):
            raise ValueError("not an authorization identity")
        fields = bare.split(",")
        if len(fields) < 2 or not fields[0].startswith("n=") or not fields[1].startswith("r="):  # m= is an extension we don't know
            raise ValueError("not a client-first-message")
        if _SCRAM_NONCE.match(fields[1][2:]) is None:
            raise ValueError("not a nonce")
        self.authzid = _saslname(authzid[2:]) if authzid else ""
        self.user = _saslname(fields[0][2:])
        self._gs2 = f"{flag},{authzid},".encode()
        self._first, self._nonce = bare, fields[1][2:]

    def take(self, verifier: ScramVerifier, nonce: str) -> bytes:
        """The challenge for the user of that verifier. nonce: printable, without comma, never used before."""
        self._verifier = verifier
        self._nonce += nonce
        server_first = f"r={self._nonce},s={base64.b64encode(verifier.salt).decode('ascii')},i={verifier.iterations}"
        self._first += "," + server_first
        return server_first.encode()

    def _finish(self, text: str) -> bytes | None:
        """client-final-message: the server's signature where the proof is right, else None with `proven` False."""
        verifier = self._verifier
        assert verifier is not None
        without, _, proof_text = text.rpartition(",p=")
        fields = without.split(",")
        if len(fields) < 2 or not fields[0].startswith("c=") or not fields[1].startswith("r="):
            raise ValueError("not a client-final-message")
        proof = _decode(proof_text)
        bound = _decode(fields[0][2:])
        signed = f"{self._first},{without}".encode()
        mask = hmac.digest(verifier.stored_key, signed, "sha256")
        key = bytes(a ^ b for a, b in zip(proof, mask, strict=False))
        right = hmac.compare_digest(hashlib.sha256(key).digest(), verifier.stored_key) and len(proof) == len(mask)
        same_channel = bound == self._gs2 + self._bound
        self.proven = right and same_channel and fields[1][2:] == self._nonce
        if not self.proven:
            return None
        return b"v=" + base64.b64encode(hmac.digest(verifier.server_key, signed, "sha256"))


def exchange(mechanism: str, bindings: Mapping[str, bytes]) -> Exchange:
    """The exchange of a mechanism in MECHANISMS. bindings: see Scram."""
    if mechanism == "PLAIN":
        return Plain(mechanism)
    if mechanism == "LOGIN":
        return Login(mechanism)
    if mechanism in (SCRAM, SCRAM_PLUS):
        return Scram(mechanism, bindings)
    return OAuth(mechanism)


def _saslname(text: str) -> str:
    """A name without its escapes (RFC 5802 section 5.1); raises ValueError."""
    if _SASLNAME.match(text) is None:
        raise ValueError("not a saslname")
    return text.replace("=2C", ",").replace("=3D", "=")


def _decode(text: str) -> bytes:
    """Octets from base64; raises ValueError."""
    return base64.b64decode(text, validate=True)
