"""AUTH above the protocol: what a client says goes through its mechanism's exchange, then permit_auth decides.

Made for one AUTH command. What a mechanism's octets mean is gmta/smtp/sasl.py's, who may log in is the plugins'. For SCRAM the
plugin hands back a verifier and the proof is judged there; a user whom nobody knows gets a challenge like any other. All ways to
fail give one answer, 535 5.7.8; a failing plugin 454 4.7.0. RFC 4954 section 4.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gmta.hookspecs import Credentials
from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.mail.session import Session
from gmta.mail.verdict import Kind, Verdict
from gmta.smtp import events, sasl

if TYPE_CHECKING:
    from gmta.receive.pipeline import Pipeline

PEPPER = "auth:pepper"  # in the shared state: what made-up verifiers are made of
PEPPER_S = 300 * 86400.0


class Mechanisms:
    """What AUTH offers: the mechanisms that plugins serve, of those that are known here."""

    def __init__(self, plugins: Any) -> None:
        hooks = plugins.explain()
        asked = hooks.get("permit_auth", [])
        self._plugins = plugins
        self.any = bool(asked)
        # a plugin that does not say is given user and password
        self._default = frozenset({"PLAIN", "LOGIN"}) if set(asked) - set(hooks.get("get_auth_mechanisms", [])) else frozenset()

    def of(self, session: Session) -> tuple[str, ...]:
        """Those for a session, the best first."""
        served: set[str] = set(self._default)
        for _, names in self._plugins.get("get_auth_mechanisms", session):
            served.update(name.upper() for name in names)
        if session.tls is not None and session.tls.bindings and sasl.SCRAM in served:
            served.add(sasl.SCRAM_PLUS)
        else:
            served.discard(sasl.SCRAM_PLUS)
        return tuple(name for name in sasl.MECHANISMS if name in served)


class Authentication:
    """One AUTH command: `answer` each of its events with a reply; 334 goes on, everything else is the end."""

    __slots__ = ("_exchange", "_known", "_pipeline", "_refuse", "_session", "_tell")

    def __init__(self, pipeline: Pipeline, session: Session, mechanism: str, tell: Callable[[str, Reply], Reply],
                 refuse: Callable[[str, Verdict | None], Reply | None]) -> None:
        """tell, refuse: what logs a refusal and gives it back, and what makes one of a verdict."""
        self._pipeline = pipeline
        self._session = session
        self._tell = tell
        self._refuse = refuse
        self._exchange = sasl.exchange(mechanism, session.tls.bindings if session.tls is not None else {})
        self._known: Reply | None = None  # the refusal that is to be said after the next response

    def answer(self, event: events.Event) -> Reply:
        """The reply to Auth or AuthResponse."""
        assert isinstance(event, (events.Auth, events.AuthResponse))
        if self._known is not None:  # RFC 7628 section 3.2.3: whatever the client says to the error is no news
            return self._known
        try:
            said = self._exchange.step(event.initial if isinstance(event, events.Auth) else event.data)
        except ValueError:
            return self._tell("auth", replies.AUTH_SYNTAX)
        if said is not None:
            return sasl.challenge(said)
        reply = self._decide()
        if reply.code == 535 and (error := self._exchange.failed()) is not None:
            self._known = reply
            return sasl.challenge(error)
        return reply

    def _decide(self) -> Reply:
        exchange = self._exchange
        scram = exchange if isinstance(exchange, sasl.Scram) else None
        credentials = Credentials(exchange.mechanism, exchange.user, exchange.secret, exchange.authzid)
        if scram is not None and scram.proven is not None:
            return self._welcome(scram.user) if scram.proven else self._tell("auth", replies.AUTH_FAILED)
        if exchange.authzid not in ("", exchange.user):  # nobody speaks for somebody else
            return self._tell("auth", replies.AUTH_FAILED)
        verdict = self._pipeline.plugins.permit("permit_auth", self._session, credentials)
        if verdict is not None and verdict.kind is not Kind.ACCEPT:
            return self._refuse("auth", verdict) or replies.AUTH_FAILED
        if scram is not None:
            verifier = credentials.verifier if verdict is not None else None
            if verifier is None:
                verifier = sasl.ScramVerifier.decoy(exchange.user, self._pepper())
            exchange.user = credentials.user
            return sasl.challenge(scram.take(verifier, secrets.token_urlsafe(18)))
        if verdict is None or not credentials.user:
            return self._tell("auth", replies.AUTH_FAILED)
        return self._welcome(credentials.user)

    def _welcome(self, user: str) -> Reply:
        self._session.user = user
        self._pipeline.services.log.info("authenticated", session=self._session.id, ip=self._session.peer_ip, user=user, mechanism=self._exchange.mechanism)
        return replies.AUTH_OK

    def _pepper(self) -> bytes:
        """The same for all workers, and from day to day: a made-up salt that changed would tell that it is made up."""
        state = self._pipeline.services.state
        pepper = state.get(PEPPER)
        if not isinstance(pepper, str):
            pepper = secrets.token_hex(16)
            state.set(PEPPER, pepper, PEPPER_S)
        return pepper.encode()
