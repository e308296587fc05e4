"""DMARC after the final dot: does SPF or DKIM vouch for the domain in From, and what does its owner ask for if neither does?

Hook: check_message. Reads the AuthResults that `spf` (smtp.mailfrom; smtp.helo for the null sender) and `dkim_verify` (header.d)
have left, so it stands behind them in `[plugins] enable`. Adds its own AuthResult (header.from, policy.dmarc). Concerns
strangers: trusted sessions are not judged.

Keys of `[plugin:dmarc]`: `reject` = reject|quarantine|tag|ignore, what is done where the domain asks to reject;
`quarantine` = quarantine|tag|ignore; `temperror` = defer|tag|ignore, where DNS can't tell now; `invalid_from` =
reject|tag|ignore, where From is missing or can't be read and no policy asks for more; `honour = no` only adds the AuthResult. To
quarantine is to set the tag `quarantine` on the transaction, which a transport may turn into a folder; all but ignore set the tag
`dmarc-RESULT` too. With the tag `arc-trusted` a failure is not acted upon: a sealer that is trusted saw it pass.

Replies: 550 5.7.1 for what is refused, 451 4.7.0 for temperror. RFC 9989 sections 5.3 and 7.2.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gmta import AuthResult, PluginConfig, Verdict, defer, hookimpl, reject
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.verify import lookups_of
from gmta.verify.dmarc import DmarcResult, authors_of, evaluate

MAX_TEXT = 400  # of a reply
QUARANTINE = "quarantine"
ARC_TRUSTED = "arc-trusted"


class Config(PluginConfig):
    """Keys of [plugin:dmarc]."""

    reject: Literal["reject", "quarantine", "tag", "ignore"] = Field("reject", description="where the domain asks to reject")
    quarantine: Literal["quarantine", "tag", "ignore"] = Field("quarantine", description="where the domain asks to quarantine")
    temperror: Literal["defer", "tag", "ignore"] = Field("defer", description="where DNS can't tell now")
    invalid_from: Literal["reject", "tag", "ignore"] = Field("tag", description="where From is missing or can't be read")
    honour: bool = Field(True, description="no: the result is added, nothing is done about it")


class Plugin:
    """Judges by what the other plugins found; keeps nothing."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """550 or 451 as the keys say."""
        if session.trusted:
            return None
        spf, dkim = _identifiers(transaction)
        outcome = evaluate(lookups_of(transaction, self._services.resolver), authors_of(message.values("From")), spf, dkim)
        trusted = outcome.result == "fail" and ARC_TRUSTED in transaction.tags
        action = "ignore" if trusted or not self._config.honour else self._action(outcome)
        transaction.auth_results.append(_auth_result(outcome, trusted))
        if action == "ignore":
            return None
        if action == "reject":
            if outcome.policy_domain:
                return reject(f"Refused by the DMARC policy of {outcome.policy_domain}: {outcome.reason}"[:MAX_TEXT], 550, "5.7.1")
            return reject(f"Refused, DMARC can't be judged: {outcome.reason}"[:MAX_TEXT], 550, "5.7.1")
        if action == "defer":
            return defer(f"DMARC can't be judged now, try again later: {outcome.reason}"[:MAX_TEXT], 451, "4.7.0")
        transaction.tags.add(f"dmarc-{outcome.result}")
        if action == "quarantine":
            transaction.tags.add(QUARANTINE)
        return None

    def _action(self, outcome: DmarcResult) -> str:
        """What the key for this outcome says."""
        config = self._config
        if outcome.disposition == "reject":
            return config.reject
        if outcome.disposition == "quarantine":
            return config.quarantine
        if outcome.disposition == "tempfail":
            return config.temperror
        if outcome.result == "permerror":
            return config.invalid_from
        return "ignore"


def _identifiers(transaction: Transaction) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """((result, domain) of SPF, those of DKIM) from the AuthResults."""
    spf, dkim = ("none", ""), []
    identity = "smtp.mailfrom" if transaction.sender else "smtp.helo"  # RFC 9989 section 3.2.4
    for found in transaction.auth_results:
        if found.method == "spf":
            spf = next(((found.result, value.rpartition("@")[2]) for name, value in found.properties if name == identity), spf)
        elif found.method == "dkim":
            dkim += [(found.result, value) for name, value in found.properties if name == "header.d"]
    return spf, dkim


def _auth_result(outcome: DmarcResult, trusted: bool) -> AuthResult:
    """The result for Authentication-Results (RFC 9989 section 9.1)."""
    properties: list[tuple[str, str]] = []
    if outcome.domain:
        properties.append(("header.from", outcome.domain))
    if outcome.policy:
        properties.append(("policy.dmarc", "none" if trusted or outcome.disposition == "tempfail" else outcome.disposition))
    reason = "" if outcome.result in ("pass", "none") else outcome.reason
    if trusted:
        reason += ", but a trusted ARC sealer saw it pass"
    return AuthResult("dmarc", outcome.result, tuple(properties), reason)
