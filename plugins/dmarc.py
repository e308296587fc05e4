"""DMARC after the final dot: does SPF or DKIM vouch for the domain in From, and what does its owner ask for if neither does?

Hook: check_message. Reads the AuthResults that `spf` (smtp.mailfrom; smtp.helo for the null sender) and `dkim_verify` (header.d)
have left, so it stands behind them in `[plugins] enable`. Adds its own AuthResult (header.from, policy.dmarc). Concerns
strangers: trusted sessions are not judged.

Keys of `[plugin:dmarc]`: `reject` = reject|quarantine|tag|ignore, what is done where the domain asks to reject;
`quarantine` = quarantine|tag|ignore; `temperror` = defer|tag|ignore, where DNS can't tell now; `invalid_from` =
reject|tag|ignore, where From is missing or can't be read and no policy asks for more; `honour = no` only adds the AuthResult. To
quarantine is to set the tag `quarantine` on the transaction, which a transport may turn into a folder; quarantine and tag set the tag
`dmarc-RESULT`. `trusted_sealers`: domains whose ARC seal overrides a failure. Then `arc` stands before this plugin too, and a
failure is not acted upon where the chain passes and a trusted sealer, with none behind it that is not trusted, saw DMARC pass.

What was found and done is left for other plugins in `transaction.notes["dmarc"]`: (DmarcResult, action, overriding sealer or "").

Replies: 550 5.7.1 for what is refused, 451 4.7.0 for temperror. RFC 9989 sections 5.3 and 7.2.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from gmta import AuthResult, PluginConfig, Verdict, defer, hookimpl, reject
from gmta.config import Domain
from gmta.mail.address import domain_key
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.verify import lookups_of
from gmta.verify.arc import ArcResult
from gmta.verify.dmarc import DmarcResult, authors_of, evaluate

MAX_TEXT = 400  # of a reply
MAX_RESULTS, MAX_NESTED = 8192, 5  # octets of a sealer's results, and comments within comments, that are looked at
QUARANTINE = "quarantine"
NOTE = "dmarc"

_NOT_RESULTS = re.compile(r'"(?:[^"\\]|\\.)*"|\((?:[^()\\]|\\.)*\)')
_DMARC_PASS = re.compile(r"\s*dmarc\s*=\s*pass(?=\s|\Z)(?:.*?\sheader\.from\s*=\s*(\S+))?", re.I | re.S)


class Config(PluginConfig):
    """Keys of [plugin:dmarc]."""

    reject: Literal["reject", "quarantine", "tag", "ignore"] = Field("reject", description="where the domain asks to reject")
    quarantine: Literal["quarantine", "tag", "ignore"] = Field("quarantine", description="where the domain asks to quarantine")
    temperror: Literal["defer", "tag", "ignore"] = Field("defer", description="where DNS can't tell now")
    invalid_from: Literal["reject", "tag", "ignore"] = Field("tag", description="where From is missing or can't be read")
    honour: bool = Field(True, description="no: the result is added, nothing is done about it")
    trusted_sealers: frozenset[Domain] = Field(frozenset(), description="domains whose ARC seal overrides a failure")


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
        sealer = self._sealer(transaction.notes.get("arc"), outcome)
        action = "ignore" if sealer or not self._config.honour else self._action(outcome)
        transaction.auth_results.append(_auth_result(outcome, sealer))
        transaction.notes[NOTE] = (outcome, action, sealer)
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

    def _sealer(self, chain: ArcResult | None, outcome: DmarcResult) -> str:
        """The trusted sealer that saw this author domain pass, or "" (RFC 8617 section 7.2.1)."""
        if outcome.result != "fail" or outcome.problem or chain is None or chain.result != "pass":
            return ""
        for link in reversed(chain.sets):
            if domain_key(link.domain) not in self._config.trusted_sealers:
                break
            results = link.results[:MAX_RESULTS]
            for _ in range(MAX_NESTED):
                results = _NOT_RESULTS.sub(" ", results)
            if "(" in results or '"' in results:
                continue
            for result in results.split(";")[1:]:
                match = _DMARC_PASS.match(result)
                if match is not None and (match[1] is None or domain_key(match[1]) == outcome.domain):
                    return link.domain
        return ""

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


def _auth_result(outcome: DmarcResult, sealer: str) -> AuthResult:
    """The result for Authentication-Results (RFC 9989 section 9.1). sealer: who overrides it, or ""."""
    properties: list[tuple[str, str]] = []
    if outcome.domain:
        properties.append(("header.from", outcome.domain))
    if outcome.policy:
        properties.append(("policy.dmarc", "none" if sealer or outcome.disposition == "tempfail" else outcome.disposition))
    reason = "" if outcome.result in ("pass", "none") else outcome.reason
    if sealer:
        reason += f", but {sealer} saw it pass and sealed that"
    return AuthResult("dmarc", outcome.result, tuple(properties), reason)
