"""SASL as far as SMTP sees it: base64 in and out, PLAIN taken apart, the steps of LOGIN.

Whether a secret is right is decided elsewhere. Malformed input raises ValueError. RFC 4954, RFC 4616, RFC 4648.
"""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple

from gmta.mail.reply import Reply

LOGIN_USER = "VXNlcm5hbWU6"  # "Username:"
LOGIN_SECRET = "UGFzc3dvcmQ6"  # "Password:"


class PlainResponse(NamedTuple):
    """What PLAIN says (RFC 4616 section 2); authzid is "" where the client asks for no other identity."""

    authzid: str
    user: str
    secret: str


def decode(text: bytes) -> bytes:
    """The octets of one base64 response; "=" is the empty initial response (RFC 4954 section 4). Raises ValueError."""
    if text == b"=":
        return b""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("not base64") from error


def challenge(data: bytes) -> Reply:
    """The 334 reply that carries a challenge."""
    return Reply(334, None, base64.b64encode(data).decode("ascii"))


def plain(response: bytes) -> PlainResponse:
    """Takes a PLAIN response apart; raises ValueError unless it has three parts, a user and a secret."""
    parts = response.split(b"\0")
    if len(parts) != 3 or not parts[1] or not parts[2]:
        raise ValueError("not authzid NUL user NUL secret")
    authzid, user, secret = (part.decode("utf-8") for part in parts)
    return PlainResponse(authzid, user, secret)


class Login:
    """The server's side of LOGIN (draft-murchison-sasl-login): asks for the user, then for the secret."""

    __slots__ = ("secret", "user")

    def __init__(self) -> None:
        self.user: str | None = None
        self.secret: str | None = None

    def step(self, response: bytes | None) -> Reply | None:
        """The next challenge, or None when `user` and `secret` are known; response None starts. Raises ValueError."""
        if response is None:
            return Reply(334, None, LOGIN_USER)
        text = response.decode("utf-8")
        if self.user is None:
            if not text:
                raise ValueError("empty user name")
            self.user = text
            return Reply(334, None, LOGIN_SECRET)
        self.secret = text
        return None
