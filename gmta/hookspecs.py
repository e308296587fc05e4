"""Every hook a plugin may have, and the values that only hooks and transports exchange.

The verb in a hook's name is its kind, and the kind fixes what a return value means and what a failure does:

- check_ may object: None, or reject, defer, disconnect. In order, the first verdict wins. Failure: 451 4.3.0.
- permit_ must be granted: None, accept, reject or defer. The first answer decides; none is a refusal. Failure: 451 4.3.0.
- get_ contributes a value or None. All run. Failure: the value is dropped.
- edit_ rewrites: a new Message or None; each sees what the one before made. Failure: 451 4.3.0.
- on_ observes, returns nothing. Failure: logged.

A failure is an exception, running past the plugin's `timeout`, or a value of another type than stated; it is logged with
the plugin's name. Where the plugin's section says `on_error = ignore` a failing call counts as None. A hook may take fewer
parameters than stated, by name. Calls are made by gmta/plugins.py; this module leaves everything but the contract to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import pluggy
from pydantic import BaseModel, ConfigDict, Field

from gmta.config import Duration
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Outcome, Verdict
from gmta.smtp.sasl import ScramVerifier

if TYPE_CHECKING:
    from gmta.config import Config
    from gmta.mail.reply import Reply

PROJECT = "gmta"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class PluginConfig(BaseModel):
    """The keys that every [plugin:NAME] section has; a plugin's `class Config(PluginConfig)` adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, str_strip_whitespace=True)

    timeout: Duration = Field("30s", description="deadline of one call; 0: none")  # type: ignore[assignment]
    on_error: Literal["defer", "ignore"] = Field("defer", description="what a failing call does to the mail at hand")


@dataclass(slots=True)
class Credentials:
    """What a client offers to permit_auth.

    mechanism: "PLAIN", "LOGIN"; "OAUTHBEARER", "XOAUTH2": secret is the token, and user may be empty; "SCRAM-SHA-256",
    "SCRAM-SHA-256-PLUS": secret is empty, and who knows the user puts its `verifier` here and accepts.
    user: a plugin may write it as it is to be known.  authzid: "" or the user.
    """

    mechanism: str
    user: str
    secret: str
    authzid: str = ""
    verifier: ScramVerifier | None = None

    def __repr__(self) -> str:
        return f"Credentials({self.mechanism}, {self.user!r})"  # the secret stays out of logs and tracebacks


@dataclass(slots=True)
class Delivery:
    """What a transport is to deliver: one message to recipients that share transport and next hop.

    first_attempt: False where an earlier attempt may have gone through unrecorded.
    attempts: what `tried` was told, in that order.
    """

    envelope: Envelope
    recipients: list[RecipientState]
    message: Message
    transport: str
    next_hop: str = ""
    first_attempt: bool = True
    attempts: list[Outcome] = field(default_factory=list)

    def tried(self, outcome: Outcome) -> None:
        """Notes a host that would not take the message, before the next one is tried: it goes to the log and the history."""
        self.attempts.append(outcome)


class Transport(Protocol):
    """What delivers. Optional: `next_hop(address) -> str`, the lane's key (without it one lane a transport), `close()`, and `let_go(next_hop)`:
    close the connections kept for that lane, another node is to have its turn.

    Also `user_of(address) -> str`: the account that delivers, where its section has the key `user` and the delivery agent is there; then
    `deliver` gets recipients of one account, in a process of that account; `room(address, size) -> Outcome | None`, what hinders a message now, is asked there too.
    `longest_s`: seconds that a delivery may take.
    """

    concurrency: int

    def deliver(self, delivery: Delivery) -> dict[int, Outcome]:
        """Outcome by RecipientState.number; one left out, or an exception, means deferred. Must not keep the message."""


class TransportFactory(Protocol):
    """A value of get_transports: the class of a transport. Config: pydantic model of its [transport:NAME] keys."""

    Config: ClassVar[type[BaseModel]]

    def __call__(self, name: str, config: Any, services: Any) -> Transport:
        """Makes the transport of one section; raises ConfigError or ValueError where its keys don't fit."""


class HookSpecs:
    """The hooks, in the order in which a message meets them."""

    @hookspec
    def on_worker_started(self, worker: Any) -> None:
        """After a worker has its listeners, store and plugins, before the first connection.

        worker: the running worker.  Failure: logged.
        """

    @hookspec
    def on_worker_stopping(self, worker: Any) -> None:
        """When a worker takes no more connections, before it ends.  worker: as above.  Failure: logged."""

    @hookspec
    def on_session_opened(self, session: Session) -> None:
        """A connection was taken.  Failure: logged."""

    @hookspec
    def check_connect(self, session: Session) -> Verdict | None:
        """Before the banner: addresses are known, nothing was said.

        A reject or defer (554 or 421 suit) stands in place of the banner and closes (RFC 5321 section 3.1).
        Failure: 451 4.3.0.
        """

    @hookspec
    def check_helo(self, session: Session) -> Verdict | None:
        """At EHLO or HELO: session.helo and session.esmtp are set.  A verdict is the command's answer.  Failure: 451 4.3.0."""

    @hookspec
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """At AUTH, when the exchange is complete.

        credentials: mechanism, user, secret.  accept(): the session's user is credentials.user; with
        session.notes["addresses"] = (user, addresses) it may send as those too (sender_login).  None: the user is not known here.
        Nobody answers: 535 5.7.8.  Failure: 454 4.7.0.
        """

    @hookspec
    def get_auth_mechanisms(self, session: Session) -> Sequence[str] | None:
        """At EHLO: the SASL mechanisms that this plugin's permit_auth serves, of those that gmta knows.

        SCRAM-SHA-256 (and -PLUS with it), OAUTHBEARER, XOAUTH2, PLAIN, LOGIN. A plugin with permit_auth and without this hook
        serves PLAIN and LOGIN.  Failure: dropped.
        """

    @hookspec
    def get_size_limit(self, session: Session) -> int | None:
        """At EHLO and again at MAIL: the most octets a message may have.

        The least of all and of [limits] message_size is advertised, checked against SIZE= and enforced: 552 5.3.4.
        Failure: dropped.
        """

    @hookspec
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """At MAIL: sender and parameters are known; there are no recipients.  Failure: 451 4.3.0."""

    @hookspec
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """At RCPT: may this recipient have mail from this client?

        accept(); accept(transport=NAME) names the [transport:NAME] that delivers; accept(replace=[Address, …]) puts
        others in its place (aliases, resolved to their end).  Nobody answers: 550 5.7.1.  Failure: 451 4.3.0.
        """

    @hookspec
    def check_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """At RCPT, after the recipient is permitted: greylisting, quota, limits.

        recipient: its address is where the mail goes, where permit_rcpt put one other address in place of `recipient.original`.
        Failure: 451 4.3.0.
        """

    @hookspec
    def check_data(self, session: Session, transaction: Transaction) -> Verdict | None:
        """At DATA or the first BDAT, before 354: all recipients are known.  Failure: 451 4.3.0."""

    @hookspec
    def check_message(self, session: Session, transaction: Transaction,
                      message: Message) -> Verdict | dict[Recipient, Verdict] | None:
        """After the final dot.

        May add AuthResults and tags to the transaction.  A Verdict is about the message; {recipient: Verdict} about some
        recipients, and the next plugins are still asked.  Failure: 451 4.3.0.
        """

    @hookspec
    def edit_message(self, session: Session, transaction: Transaction, message: Message) -> Message | None:
        """After every check: a new Message takes the old one's place.

        What was changed goes into the history: add a few words to transaction.changes.  Failure: 451 4.3.0.
        """

    @hookspec
    def get_headers(self, session: Session, transaction: Transaction,
                    message: Message) -> Sequence[tuple[str, str]] | None:
        """Fields (name, value) to be placed under Received; gmta's own mail passes here too.  Failure: dropped."""

    @hookspec
    def get_signatures(self, session: Session, transaction: Transaction,
                       message: Message) -> Sequence[tuple[str, str]] | None:
        """Last: fields (name, value) on top of the final header section; gmta's own mail passes here too.

        Failure: 451 4.3.0, since mail must not go out unsigned by accident.
        """

    @hookspec
    def on_refused(self, session: Session, transaction: Transaction | None, stage: str, reply: Reply) -> None:
        """The client was refused.  stage: connect, helo, auth, mail, rcpt, data or message.  Failure: logged."""

    @hookspec
    def on_session_closed(self, session: Session, reason: str) -> None:
        """A connection is over.  reason: what the log says.  Failure: logged."""

    @hookspec
    def get_transports(self, config: Config) -> dict[str, TransportFactory] | None:
        """At the start: {word for `type` in [transport:…]: Transport class}.  Failure: gmta doesn't start."""

    @hookspec
    def on_queued(self, envelope: Envelope) -> None:
        """A message is in the queue, synced.  Failure: logged."""

    @hookspec
    def get_route(self, envelope: Envelope, recipient: RecipientState) -> str | None:
        """At every attempt: the transport's name, or fail, hold, discard.

        The first answer wins; nobody answers: the [route] table.  Failure: dropped.
        """

    @hookspec
    def on_delivery(self, envelope: Envelope, recipient: RecipientState, outcome: Outcome, elapsed_s: float) -> None:
        """An attempt has an outcome, which is recorded.  elapsed_s: seconds the attempt took.  Failure: logged."""

    @hookspec
    def on_bounced(self, envelope: Envelope, recipients: Sequence[RecipientState]) -> None:
        """Recipients were given up; a report goes to the sender where there is one to tell.  Failure: logged."""


HOOKS = tuple(name for name in vars(HookSpecs) if not name.startswith("_"))

__all__ = ["HOOKS", "PROJECT", "Address", "Credentials", "Delivery", "HookSpecs", "PluginConfig", "Transport", "TransportFactory",
           "hookimpl", "hookspec"]
