"""SPF at MAIL: is this client allowed to send for the domain of the sender, and for the name it gives at HELO?

Hooks: check_mail (judges both identities, adds their AuthResults, applies the keys), get_headers (Received-SPF where asked
for). Concerns strangers: trusted sessions are not judged. The null sender is judged as postmaster at the HELO name. HELO is
judged once a session, not once a message. `dmarc` reads the AuthResults, so a domain whose DMARC policy is what counts should
not be refused here: `fail = tag`.

Keys of `[plugin:spf]`, one a result: `fail`, `softfail`, `neutral`, `none`, `permerror` = reject|tag|ignore, `temperror` =
defer|tag|ignore; `helo_fail` = reject|tag|ignore for a fail of the HELO name; `explanation = yes` shows a domain's own words
(exp=) in the refusal where they are one line of printable ASCII; `received_spf = no`. A tag is `spf-RESULT` on the transaction
(`spf-helo-fail` for HELO).

Replies: 550 5.7.23 for what is refused, 550 5.7.24 for permerror, 451 4.7.24 for temperror (RFC 7372). RFC 7208 section 8.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gmta import AuthResult, PluginConfig, Verdict, defer, hookimpl, reject
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.verify import RESERVED, Lookups, lookups_of
from gmta.verify.spf import Spf, SpfResult, received_spf

Policy = Literal["reject", "tag", "ignore"]

NAME = "spf"
MAX_TEXT = 400  # of a reply


class Config(PluginConfig):
    """Keys of [plugin:spf]."""

    fail: Policy = Field("reject", description="the domain says that this client must not send for it")
    softfail: Policy = Field("tag", description="the domain says that it probably should not")
    neutral: Policy = Field("ignore", description="the domain does not say")
    none: Policy = Field("ignore", description="the domain has no SPF record")
    permerror: Policy = Field("tag", description="the domain's record is wrong")
    temperror: Literal["defer", "tag", "ignore"] = Field("ignore", description="DNS can't tell now")
    helo_fail: Policy = Field("tag", description="the client must not use the name it gives")
    explanation: bool = Field(True, description="a domain's own words in the refusal, where they are safe")
    received_spf: bool = Field(False, description="add a Received-SPF field")


class Plugin:
    """Judges at MAIL; the result stays in the transaction's notes for Received-SPF."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._spf = Spf(services.hostname)
        self._policies: dict[str, str] = {name: getattr(config, name) for name in ("fail", "softfail", "neutral", "none", "permerror", "temperror")}
        self._policies["pass"] = "ignore"

    @hookimpl
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """550 or 451 as the keys say."""
        if session.trusted:
            return None
        lookups = lookups_of(transaction, self._services.resolver).leaving(RESERVED)
        sender = str(transaction.sender)
        result = self._spf.mail_from(lookups, session.peer_ip, session.helo, sender, now=self._services.clock(),
                                     explain=self._config.explanation and self._policies["fail"] == "reject")
        transaction.notes[NAME] = result
        self._add(transaction, result, "smtp.mailfrom" if sender else "smtp.helo")
        verdict = self._apply(transaction, result)
        if sender and verdict is None:
            verdict = self._check_helo(session, transaction, lookups)
        return verdict

    def _check_helo(self, session: Session, transaction: Transaction, lookups: Lookups) -> Verdict | None:
        """Judges the HELO identity, or remembers what it came to."""
        who = (session.peer_ip, session.helo)
        judged, result = session.notes.get(NAME, (None, None))
        if result is None or judged != who:
            result = self._spf.helo(lookups, *who, now=self._services.clock(), explain=False)
            session.notes[NAME] = (who, result)
        if result.result == "none":
            return None
        self._add(transaction, result, "smtp.helo")
        if result.result != "fail" or self._config.helo_fail == "ignore":
            return None
        if self._config.helo_fail == "reject":
            return reject(f"SPF fail for the name given at HELO: {result.reason}"[:MAX_TEXT], 550, "5.7.23")
        transaction.tags.add("spf-helo-fail")
        return None

    def _add(self, transaction: Transaction, result: SpfResult, identity: str) -> None:
        reason = "" if result.result in ("pass", "none") else result.reason
        properties = ((identity, result.domain),) if result.domain else ()
        transaction.auth_results.append(AuthResult("spf", result.result, properties, reason))

    def _apply(self, transaction: Transaction, result: SpfResult) -> Verdict | None:
        """What the key for this result says."""
        policy = self._policies[result.result]
        if policy == "ignore":
            return None
        if policy == "defer":
            return defer(f"SPF of {result.domain} can't be told now, try again later: {result.reason}"[:MAX_TEXT], 451, "4.7.24")
        if policy == "reject":
            text = f"SPF {result.result}: {result.reason}"
            if result.explanation:
                text += f". The domain {result.domain} explains: {result.explanation}"  # RFC 7208 section 8.4: whose words these are
            return reject(text[:MAX_TEXT], 550, "5.7.24" if result.result == "permerror" else "5.7.23")
        transaction.tags.add(f"spf-{result.result}")
        return None

    @hookimpl
    def get_headers(self, session: Session, transaction: Transaction, message: Message) -> list[tuple[str, str]] | None:
        """Received-SPF (RFC 7208 section 9.1) where asked for."""
        result: SpfResult | None = transaction.notes.get(NAME)
        if result is None or not self._config.received_spf:
            return None
        return [("Received-SPF", received_spf(result, receiver=self._services.hostname, ip=session.peer_ip, helo=session.helo,
                                              sender=str(transaction.sender)))]
