"""Every hook of gmta with its docstring: the index of what can be extended, and the types a plugin is written with.

The verb in a hook's name fixes what its return value means: check_ may object, permit_ must be granted, get_ contributes,
edit_ rewrites, on_ observes. An implementation may take fewer parameters than the specification, never others.
gmta.plugins runs the calls: each has its own deadline, and what raises, hangs or returns nonsense never lets mail through.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Protocol

import pluggy
from pydantic import BaseModel, BeforeValidator, ConfigDict

from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Outcome, Verdict

PROJECT = "gmta"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "B": 1, "KB": 1024, "MB": 1024**2, "GB": 1024**3}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])\Z")
_SIZE = re.compile(r"(\d+)\s*([KMG]?B)?\Z", re.I)


def parse_duration(text: Any) -> float:
    """Seconds of "90s", "5m", "1h", "2d"; numbers pass as seconds; raises ValueError."""
    if isinstance(text, (int, float)):
        return float(text)
    match = _TIME.match(str(text).strip())
    if match is None:
        raise ValueError("a time like 30s, 5m, 2h or 1d")
    return float(match[1]) * _TIMES[match[2]]


def parse_size(text: Any) -> int:
    """Octets of "35MB", "64KB", "1000"; numbers pass; KB is 1,024; raises ValueError."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(str(text).strip())
    if match is None:
        raise ValueError("a size like 500, 64KB, 35MB or 1GB")
    return int(match[1]) * _SIZES[(match[2] or "").upper()]


Duration = Annotated[float, BeforeValidator(parse_duration)]
Size = Annotated[int, BeforeValidator(parse_size)]


class PluginConfig(BaseModel):
    """Base of a plugin's `Config`: the keys every [plugin:NAME] section has. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout: Duration = 30.0
    on_error: Literal["defer", "ignore"] = "defer"


class Delivery:
    """What a transport is handed: some recipients of one message that share transport and next hop.

    first_attempt: True where none of them was tried before, so nothing can have been delivered yet.
    """

    __slots__ = ("envelope", "first_attempt", "message", "next_hop", "recipients", "transport")

    def __init__(self, envelope: Envelope, recipients: list[RecipientState], message: Message, transport: str,
                 next_hop: str, first_attempt: bool) -> None:
        self.envelope = envelope
        self.recipients = recipients
        self.message = message
        self.transport = transport
        self.next_hop = next_hop
        self.first_attempt = first_attempt


class Transport(Protocol):
    """Delivers. `concurrency` is how many deliveries of one lane may be in flight at once."""

    concurrency: int

    def deliver(self, delivery: Delivery) -> dict[int, Outcome]:
        """Outcomes keyed by RecipientState.number; one left out, or an exception, means deferred. The message is not kept."""


class Credentials:
    """What AUTH brought: mechanism ("PLAIN"), authorization identity, user name, secret (password or token)."""

    __slots__ = ("authorization", "mechanism", "secret", "user")

    def __init__(self, mechanism: str, user: str, secret: str, authorization: str = "") -> None:
        self.mechanism = mechanism
        self.user = user
        self.secret = secret
        self.authorization = authorization

    def __repr__(self) -> str:
        return f"Credentials({self.mechanism}, {self.user!r})"  # never the secret


class HookSpecs:
    """The hooks, in the order in which a message meets them."""

    @hookspec
    def on_worker_started(self, worker: Any) -> None:
        """Observes. When: once a worker process serves. worker: the Worker. On failure: logged."""

    @hookspec
    def on_worker_stopping(self, worker: Any) -> None:
        """Observes. When: a worker begins to drain. On failure: logged."""

    @hookspec
    def check_connect(self, session: Session) -> Verdict | None:
        """May object. When: before the banner. Returns None or reject/defer/disconnect; the reply takes the place of the
        220 (554 or 421, RFC 5321 section 3.1). On failure: 451 4.3.0."""

    @hookspec
    def check_helo(self, session: Session) -> Verdict | None:
        """May object. When: after EHLO or HELO; session.helo and session.esmtp are set. On failure: 451 4.3.0."""

    @hookspec
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """Must be granted. When: AUTH brought credentials. Returns accept(), reject(...) or None (not mine); the first that is
        not None decides, nobody: 535 5.7.8. On failure: 454 4.7.0 (RFC 4954 section 6)."""

    @hookspec
    def get_size_limit(self, session: Session) -> int | None:
        """Contributes octets; the smallest wins. When: before EHLO is answered; advertised, checked at MAIL SIZE= (RFC 1870) and
        enforced while the message streams in. On failure: dropped and logged."""

    @hookspec
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """May object. When: after MAIL; transaction.sender and its parameters are set. On failure: 451 4.3.0."""

    @hookspec
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """Must be granted. When: each RCPT. Returns accept(), accept(transport=NAME), accept(replace=[Address, …]) for aliases
        (the whole chain resolved), reject/defer, or None (not mine). Nobody: 550 5.7.1. On failure: 451 4.3.0."""

    @hookspec
    def check_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """May object. When: after a recipient is permitted (greylist, quota, limits). On failure: 451 4.3.0."""

    @hookspec
    def check_data(self, session: Session, transaction: Transaction) -> Verdict | None:
        """May object. When: after DATA, before 354. On failure: 451 4.3.0."""

    @hookspec
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | dict[Recipient, Verdict] | None:
        """May object. When: after the final dot; may add AuthResult and tags. Returns None, a Verdict for the message, or Verdicts
        by recipient. On failure: 451 4.3.0."""

    @hookspec
    def edit_message(self, session: Session, transaction: Transaction, message: Message) -> Message | None:
        """Rewrites. When: after check_message. Returns a new Message or None; each sees the former's result. On failure: 451 4.3.0."""

    @hookspec
    def get_headers(self, session: Session, transaction: Transaction, message: Message) -> list[tuple[str, str]] | None:
        """Contributes [(name, value)], placed under Received. When: after edit_message. On failure: dropped and logged."""

    @hookspec
    def get_signatures(self, session: Session, transaction: Transaction, message: Message) -> list[tuple[str, str]] | None:
        """Contributes [(name, value)], placed on top. When: last, over the final header. On failure: 451 4.3.0."""

    @hookspec
    def get_transports(self, config: Any) -> dict[str, Any] | None:
        """Contributes {type: factory}; factory(name, config, services) makes a Transport and factory.Config is its pydantic model.
        When: at start. On failure: gmta refuses to start."""

    @hookspec
    def get_route(self, envelope: Envelope, recipient: RecipientState) -> str | None:
        """Contributes the name of a transport; the first that is not None wins, nobody: the [route] table. When: before every
        attempt. On failure: dropped and logged."""

    @hookspec
    def on_session_opened(self, session: Session) -> None:
        """Observes. When: a connection is accepted. On failure: logged."""

    @hookspec
    def on_session_closed(self, session: Session, reason: str) -> None:
        """Observes. When: it is over; reason "quit", "timeout", "lost", "refused", … On failure: logged."""

    @hookspec
    def on_refused(self, session: Session, transaction: Transaction | None, stage: str, reply: Reply) -> None:
        """Observes. When: a command or message is refused; stage "connect", "helo", "mail", "rcpt", "data", "message". On failure: logged."""

    @hookspec
    def on_queued(self, envelope: Envelope) -> None:
        """Observes. When: the message is durable, before the 250. On failure: logged."""

    @hookspec
    def on_delivery(self, envelope: Envelope, recipient: RecipientState, outcome: Outcome, elapsed_s: float) -> None:
        """Observes. When: an attempt is over for a recipient. On failure: logged."""

    @hookspec
    def on_bounced(self, envelope: Envelope, recipients: list[RecipientState]) -> None:
        """Observes. When: recipients have failed for good. On failure: logged."""


__all__ = ["Address", "Credentials", "Delivery", "Duration", "HookSpecs", "PluginConfig", "Size", "Transport", "hookimpl",
           "hookspec", "parse_duration", "parse_size"]
