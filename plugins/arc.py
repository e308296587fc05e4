"""Verifies the ARC chain that forwarders left on a message, and seals what gmta forwards itself.

Hooks: check_message notes arc=none, pass or fail for Authentication-Results, and leaves the ArcResult as the transaction's note `arc`
for plugins that come later (DMARC may trust a sealer); trusted sessions are passed over. get_signatures adds the ARC set of this host:
to mail that strangers sent and that goes on to another domain (aliases, relay_to). Enable it behind spf and dkim_verify, whose
results the seal carries on.

Keys of `[plugin:arc]`: `seal = forwarded|always|never` (always: whatever strangers sent, local recipients too); `domain`, whose key
seals, by default that of this host's name or a domain above it; `keys`, where the private keys are, as for dkim_sign;
`temperror = ignore|defer`. A chain that could not be judged since DNS failed is not sealed: that would break it for good.

Replies: 451 4.7.5 where DNS failed and `temperror = defer`; 451 4.3.0 (from the core) where the key can't be used. RFC 8617.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from gmta import AuthResult, PluginConfig, Verdict, defer, hookimpl
from gmta.config import Path
from gmta.mail.address import domain_key
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.mail.trace import authentication_results
from gmta.verify import RESERVED, lookups_of
from gmta.verify.arc import ArcResult, seal, verify_chain
from gmta.verify.signing import DEFAULT_KEYS, KeyFiles


class Config(PluginConfig):
    """Keys of [plugin:arc]."""

    seal: Literal["forwarded", "always", "never"] = Field("forwarded", description="what is sealed of the mail that strangers sent")
    domain: str = Field("", description="whose key seals; default: the host name's, or of a domain above it")
    keys: Path = Field(DEFAULT_KEYS, description="private keys")
    temperror: Literal["ignore", "defer"] = Field("ignore", description="where DNS failed")


class Plugin:
    """Asks gmta.verify.arc."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._domain = domain_key(config.domain or services.hostname)
        self._local = services.config.domains.local
        self._files = KeyFiles(config.keys, services.log, services.clock)
        if config.seal != "never" and not self._files.keys_for(self._domain):
            services.log.warning("no key to seal with", domain=self._domain, keys=config.keys)

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """Adds the AuthResult, and the note."""
        if session.trusted:
            return None
        services = self._services
        chain = verify_chain(message, lookups_of(transaction, services.resolver).leaving(RESERVED), now=services.clock(), heavy=self._heavy)
        transaction.notes["arc"] = chain
        properties: tuple[tuple[str, str], ...] = ()
        if chain.result != "none":  # RFC 8617 section 6
            properties = (("smtp.remote-ip", session.peer_ip),)
            if chain.oldest_pass is not None:
                properties += (("header.oldest-pass", str(chain.oldest_pass)),)
        transaction.auth_results.append(AuthResult("arc", chain.result, properties, chain.reason if chain.result == "fail" else ""))
        if chain.temporary and self._config.temperror == "defer":
            return defer("A key of the ARC chain can't be looked up now", 451, "4.7.5")
        return None

    @hookimpl
    def get_signatures(self, session: Session, transaction: Transaction, message: Message) -> list[tuple[str, str]] | None:
        """ARC-Seal, ARC-Message-Signature and ARC-Authentication-Results, or None."""
        chain: ArcResult | None = transaction.notes.get("arc")
        if chain is None or not self._wanted(transaction):
            return None
        if chain.temporary:
            self._services.log.warning("ARC chain not continued", session=session.id, id=transaction.id, reason=chain.reason)
            return None
        keys = self._files.keys_for(self._domain)
        if not keys:
            return None
        results = authentication_results(self._services.hostname, transaction.auth_results)
        return seal(message, keys[0], chain, results, now=self._services.clock(), heavy=self._heavy) or None

    def _wanted(self, transaction: Transaction) -> bool:
        if self._config.seal != "forwarded":
            return self._config.seal == "always"
        return any(recipient.address.host not in self._local for recipient in transaction.recipients if recipient.address.domain)

    def _heavy(self, function: Callable[[], Any]) -> Any:
        return self._services.batch("dkim").submit(function)
