"""Verdicts and outcomes: what a hook decides and what a delivery attempt came to.

A Verdict is a hook's word about a session, sender, recipient or message; an Outcome is a transport's word
about one recipient. `verdict_reply` is the one function that turns a Verdict into a Reply. Constructors
raise ValueError for codes that disagree or text that can't be sent (RFC 5321 section 4.2, RFC 3463).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from gmta.mail.address import Address
from gmta.mail.reply import OK, Reply

MAX_TEXT = 400


class Kind(Enum):
    """What a Verdict does."""

    ACCEPT = "accept"
    REJECT = "reject"
    DEFER = "defer"
    DISCONNECT = "disconnect"


class Verdict:
    """A hook's decision: `kind`, the `reply` it gives, and for an accepted recipient where it goes.

    replace: addresses that take the recipient's place (aliases), or None.  transport: name of a
    [transport:NAME] section, or None for the route table.
    """

    __slots__ = ("kind", "replace", "reply", "transport")

    def __init__(self, kind: Kind, reply: Reply, replace: Sequence[Address] | None = None,
                 transport: str | None = None) -> None:
        self.kind = kind
        self.reply = reply
        self.replace = None if replace is None else tuple(replace)
        self.transport = transport

    def __repr__(self) -> str:
        return f"Verdict({self.kind.value}, {self.reply!s})"


def _reply(code: int, enhanced: str, text: str, kind: str, low: int) -> Reply:
    if not low <= code < low + 100:
        raise ValueError(f"{kind}() needs a code from {low} to {low + 99}, not {code}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{kind}() text is longer than {MAX_TEXT} characters")
    return Reply(code, enhanced, text)


_ACCEPT = Verdict(Kind.ACCEPT, OK)


def accept(*, replace: Sequence[Address] | None = None, transport: str | None = None) -> Verdict:
    """Permit; for a recipient also: the addresses that replace it, the transport that delivers it."""
    if replace is None and transport is None:
        return _ACCEPT
    return Verdict(Kind.ACCEPT, OK, replace, transport)


def reject(text: str, code: int = 550, enhanced: str = "5.7.1") -> Verdict:
    """Refuse for good (5xx)."""
    return Verdict(Kind.REJECT, _reply(code, enhanced, text, "reject", 500))


def defer(text: str, code: int = 451, enhanced: str = "4.7.1") -> Verdict:
    """Refuse for now (4xx): the client is to try again."""
    return Verdict(Kind.DEFER, _reply(code, enhanced, text, "defer", 400))


def disconnect(text: str, code: int = 421, enhanced: str = "4.7.0") -> Verdict:
    """Answer and close the connection; 421 (RFC 5321 section 3.8) or a 5xx code."""
    return Verdict(Kind.DISCONNECT, _reply(code, enhanced, text, "disconnect", 400 if code < 500 else 500))


def verdict_reply(verdict: Verdict) -> Reply:
    """The Reply that a Verdict stands for."""
    return verdict.reply


class Status(Enum):
    """State of a recipient after an attempt."""

    DELIVERED = "delivered"
    DEFERRED = "deferred"
    FAILED = "failed"


class Outcome:
    """What an attempt came to for one recipient.

    status; reply: the remote's (or our own) words; remote: the host that said them, "" for ourselves;
    retry_after_s: seconds before the next attempt where the remote named them, else None;
    relayed: True where the next hop does not promise DSNs and took over (RFC 3461 section 5.2.2);
    recipient_fault: False where the fault is the next hop's as a whole (connection, greeting), so that
    the lane backs off; True where only this recipient or message is concerned.
    own: the words are ours, about `remote` or about ourselves, and no remote has said them.
    tls: facts of the session ("TLSv1.3 TLS_AES_256_GCM_SHA384 verified"), for log and history; "" without.
    """

    __slots__ = ("own", "recipient_fault", "relayed", "remote", "reply", "retry_after_s", "status", "tls")

    def __init__(self, status: Status, reply: Reply, *, remote: str = "", retry_after_s: float | None = None,
                 relayed: bool = False, recipient_fault: bool = True, own: bool | None = None, tls: str = "") -> None:
        self.status = status
        self.reply = reply
        self.own = not remote if own is None else own
        self.tls = tls
        self.remote = remote
        self.retry_after_s = retry_after_s
        self.relayed = relayed
        self.recipient_fault = recipient_fault

    @property
    def words(self) -> str:
        """What was said, for people: a remote's whole reply with its code, or the text of our own reason."""
        return self.reply.text if self.own else str(self.reply)

    def __repr__(self) -> str:
        return f"Outcome({self.status.value}, {self.reply!s})"


def delivered(text: str = "Delivered", *, enhanced: str = "2.1.5", remote: str = "", reply: Reply | None = None,
              relayed: bool = False) -> Outcome:
    """The recipient has the message."""
    return Outcome(Status.DELIVERED, reply or Reply(250, enhanced, text), remote=remote, relayed=relayed, own=reply is None)


def deferred(text: str, *, enhanced: str = "4.3.0", code: int = 451, remote: str = "", reply: Reply | None = None,
             retry_after_s: float | None = None, recipient_fault: bool = True) -> Outcome:
    """Not now: the queue tries again."""
    return Outcome(Status.DEFERRED, reply or Reply(code, enhanced, text), remote=remote, retry_after_s=retry_after_s,
                   recipient_fault=recipient_fault, own=reply is None)


def failed(text: str, *, enhanced: str = "5.0.0", code: int = 550, remote: str = "",
           reply: Reply | None = None) -> Outcome:
    """Never: the sender is told."""
    return Outcome(Status.FAILED, reply or Reply(code, enhanced, text), remote=remote, own=reply is None)


def outcome_of(reply: Reply, *, remote: str = "", recipient_fault: bool = True) -> Outcome:
    """The Outcome that a remote's reply means: 2xx delivered, 4xx deferred, 5xx failed."""
    if reply.code < 300:
        return Outcome(Status.DELIVERED, reply, remote=remote)
    status = Status.FAILED if reply.permanent else Status.DEFERRED
    return Outcome(status, reply, remote=remote, recipient_fault=recipient_fault)
