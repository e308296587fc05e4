"""What the server protocol tells the engine: one class an event, with what the command said already parsed.

`Fault` is the protocol's own refusal (syntax, sequence, bare newline): the engine sends its reply and counts it. Every
event but Body asks for exactly one `ServerProtocol.reply`. RFC 5321 section 4.1.
"""

from __future__ import annotations

from typing import NamedTuple

from gmta.mail.address import Address
from gmta.mail.reply import Reply


class Hello(NamedTuple):
    """EHLO (esmtp) or HELO with a checked host name or address literal."""

    name: str
    esmtp: bool


class Mail(NamedTuple):
    """MAIL FROM; size in octets or None; body 7BIT/8BITMIME/BINARYMIME; ret FULL/HDRS/""; auth decoded or None; requiretls: RFC 8689."""

    sender: Address
    size: int | None
    body: str
    smtputf8: bool
    ret: str
    envid: str
    auth: str | None
    requiretls: bool = False


class Rcpt(NamedTuple):
    """RCPT TO; notify as in Recipient; orcpt "type;decoded" or ""."""

    recipient: Address
    notify: frozenset[str]
    orcpt: str


class Data(NamedTuple):
    """DATA in sequence with at least one recipient; answer 354 or a refusal."""


class BdatStart(NamedTuple):
    """The first BDAT of a message; answer with a positive reply (never sent) to take it or a refusal that is sent once the chunk is in."""


class Body(NamedTuple):
    """A piece of the message, dots undone; asks for no reply."""

    data: bytes


class BodyEnd(NamedTuple):
    """The whole message is in. fault: None, or the reply that refuses it; close: hang up after that reply."""

    size: int
    fault: Reply | None
    close: bool


class ChunkEnd(NamedTuple):
    """A BDAT chunk that is not the last is in; answer CHUNK_OK or a refusal (RFC 3030 section 2)."""


class Reset(NamedTuple):
    """RSET: the transaction is over."""


class Quit(NamedTuple):
    """QUIT."""


class StartTls(NamedTuple):
    """STARTTLS in sequence: reply 220, then the handshake, then ServerProtocol.tls_started()."""


class Auth(NamedTuple):
    """AUTH with a mechanism that is offered; initial: decoded initial response or None (RFC 4954 section 4)."""

    mechanism: str
    initial: bytes | None


class AuthResponse(NamedTuple):
    """The decoded answer to a 334 challenge."""

    data: bytes


class XClient(NamedTuple):
    """XCLIENT from a client that may: {attribute: value}, "" where it is not available. Answer 220: the session begins anew."""

    attributes: dict[str, str]


class XForward(NamedTuple):
    """XFORWARD from a client that may: {attribute: value} about the next transaction's first client."""

    attributes: dict[str, str]


class Vrfy(NamedTuple):
    """VRFY."""

    argument: str


class Expn(NamedTuple):
    """EXPN."""

    argument: str


class Etrn(NamedTuple):
    """ETRN; node: as given (RFC 1985 section 5.2)."""

    node: str


class Help(NamedTuple):
    """HELP."""

    argument: str


class Noop(NamedTuple):
    """NOOP."""


class Fault(NamedTuple):
    """The protocol refuses the input itself: send `reply`, count an error, hang up where `close`."""

    reply: Reply
    close: bool


Event = (Hello | Mail | Rcpt | Data | BdatStart | Body | BodyEnd | ChunkEnd | Reset | Quit | StartTls | Auth | AuthResponse
         | XClient | XForward | Vrfy | Expn | Etrn | Help | Noop | Fault)
