"""Judges DKIM signatures and notes what came of it for Authentication-Results, DMARC and others; refuses nothing by itself.

Hook: check_message. Mail of trusted sessions is passed over, unless `trusted = yes`. At most `[limits] dkim_signatures` are
judged, those of the author's domain first; the others are left out of Authentication-Results. A body over 1 MB is hashed in a
native thread.

Keys of `[plugin:dkim_verify]`: `temperror = ignore|defer`, what becomes of a message of which no signature passed and at least one
could not be judged since DNS failed; `trusted`; `trust_length`: a signature whose l= leaves a part of the body unsigned passes
(with a reason) instead of being `policy`.

Reply: 451 4.7.5 where DNS failed and `temperror = defer`. RFC 6376 section 6, RFC 8601 section 2.7.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from gmta import AuthResult, PluginConfig, Verdict, defer, hookimpl
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.verify import RESERVED, lookups_of
from gmta.verify.dkim import DkimResult, verify
from gmta.verify.dmarc import authors_of


class Config(PluginConfig):
    """Keys of [plugin:dkim_verify]."""

    temperror: Literal["ignore", "defer"] = Field("ignore", description="where DNS failed and no signature passed")
    trusted: bool = Field(False, description="judge the mail of trusted sessions too")
    trust_length: bool = Field(False, description="let an l= pass that leaves a part of the body unsigned")


class Plugin:
    """Asks gmta.verify.dkim."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """Adds one AuthResult a judged signature, or dkim=none."""
        if session.trusted and not self._config.trusted:
            return None
        services = self._services
        most = services.config.limits.dkim_signatures
        # whose come first matters only where there are too many
        authors = authors_of(message.values("From")).domains if message.header.lower().count(b"dkim-signature") > most else ()
        results = verify(message, lookups_of(transaction, services.resolver).leaving(RESERVED), now=services.clock(), max_signatures=most,
                         author_domains=authors, trust_length=self._config.trust_length, heavy=self._heavy)
        judged = [result for result in results if result.result != "neutral"]  # one a signature: not those past the bound
        transaction.auth_results += [_auth_result(result) for result in judged] or [AuthResult("dkim", "none")]
        if len(judged) < len(results):
            services.log.info("signatures left unjudged", session=session.id, id=transaction.id, count=len(results) - len(judged))
        found = {result.result for result in judged}
        if self._config.temperror == "defer" and "temperror" in found and "pass" not in found:
            return defer("A DKIM key can't be looked up now", 451, "4.7.5")  # RFC 6376 section 6.1.2
        return None

    def _heavy(self, function: Callable[[], Any]) -> Any:
        return self._services.batch("dkim").submit(function)


def _auth_result(result: DkimResult) -> AuthResult:
    """RFC 8601 section 2.7.1, RFC 6008 for header.b."""
    named = (("header.d", result.domain), ("header.i", result.identity), ("header.s", result.selector), ("header.a", result.algorithm),
             ("header.b", result.b))
    return AuthResult("dkim", result.result, tuple([(name, value) for name, value in named if value]), result.reason)
