"""Signs the mail of trusted sessions and gmta's own with the author domain's DKIM keys.

Hook: get_signatures. The author is the first mailbox of From; a message without exactly one From field is not signed. Its domain's
keys are looked for, then those of the domains above it (with i= naming the author's), and each of them signs, RSA before Ed25519.
Mail of a domain without keys goes unsigned.

Keys of `[plugin:dkim_sign]`: `keys`, where the private keys are, with {domain} and {selector}, in PEM, mode 0600 or 0640, noticed
within a second of a change; `selectors`, the only ones to use; `parent`, whether keys of domains above count; `senders`, exceptions as
`ADDRESS:DOMAIN`, `ADDRESS:DOMAIN/SELECTOR` or `ADDRESS:none`, where ADDRESS may be `@domain`; `expire`, time until x=, 0 for none;
`oversign`, fields signed once more than they are there, so that none can be added; `sign`, fields signed where they are.

Reply: 451 4.3.0 (from the core) where keys are there and none can be used, since mail must not go out unsigned by accident; bad keys
stop the start. RFC 6376 section 5, RFC 8301, RFC 8463.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator

from gmta import Duration, PluginConfig, hookimpl
from gmta.config import Path
from gmta.mail.address import Address, domain_key
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.verify.canonical import Header
from gmta.verify.signing import DEFAULT_KEYS, OVERSIGNED, SIGNED, KeyFiles, SigningKey, authors, is_name, sign


class Config(PluginConfig):
    """Keys of [plugin:dkim_sign]."""

    keys: Path = Field(DEFAULT_KEYS, description="private keys")
    selectors: list[str] = Field([], description="the only ones to use; default: all")
    parent: bool = Field(True, description="sign with a key of a domain above the author's")
    senders: list[str] = Field([], description="exceptions: ADDRESS:DOMAIN[/SELECTOR] or ADDRESS:none")
    expire: Duration = Field("0", description="until x=; 0: none")  # type: ignore[assignment]
    oversign: list[str] = Field(list(OVERSIGNED), description="fields of which none may be added")
    sign: list[str] = Field(list(SIGNED), description="fields signed where they are")

    @field_validator("senders")
    @classmethod
    def _check_senders(cls, value: list[str]) -> list[str]:
        for one in value:
            parse_sender(one)
        return value

    @field_validator("oversign")
    @classmethod
    def _check_oversign(cls, value: list[str]) -> list[str]:
        if "from" not in [name.lower() for name in value]:
            raise ValueError("expected From among them")  # RFC 6376 section 5.4
        return value


def parse_sender(text: str) -> tuple[str, tuple[str, str] | None]:
    """(address or @domain to compare with, (domain, selector or "") or None for unsigned); raises ValueError."""
    address, colon, target = text.rpartition(":")
    domain, slash, selector = target.partition("/")
    local, at, host = address.rpartition("@")
    if not colon or not at or not host or (slash and not is_name(selector)):
        raise ValueError(f"{text!r}: expected ADDRESS:DOMAIN, ADDRESS:DOMAIN/SELECTOR or ADDRESS:none")
    key = f"{local.lower()}@{domain_key(host)}"
    if target == "none":
        return key, None
    domain = domain_key(domain)
    if not is_name(domain):
        raise ValueError(f"{text!r}: {domain!r} is no domain")
    return key, (domain, selector)


class Plugin:
    """Finds the keys and hands them to gmta.verify.signing."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._files = KeyFiles(config.keys, services.log, services.clock)
        self._senders = dict(parse_sender(one) for one in config.senders)
        self._selectors = frozenset(config.selectors)
        found = self._files.all_keys()  # a bad key stops the start
        if not found:
            services.log.warning("no DKIM keys", keys=config.keys)

    @hookimpl
    def get_signatures(self, session: Session, transaction: Transaction, message: Message) -> list[tuple[str, str]] | None:
        """DKIM-Signature fields, or None."""
        if not session.trusted and session.role != "local":
            return None
        header = Header(message.header)
        found = authors(header)
        if not found:
            return None
        author = found[0]
        keys = self._keys(author)
        if self._selectors:
            keys = [key for key in keys if key.selector in self._selectors]
        if not keys:
            return None
        identity = author.host if author.host.endswith(f".{keys[0].domain}") else ""
        return sign(message, keys, now=self._services.clock(), header=header, identity_domain=identity, expire_s=self._config.expire,
                    oversigned=self._config.oversign, signed=self._config.sign, heavy=self._heavy)

    def _keys(self, author: Address) -> list[SigningKey]:
        """The keys for an author; raises KeyTrouble where there are only bad ones."""
        host = author.host
        if self._senders:
            for address in (f"{author.mailbox.lower()}@{host}", f"@{host}"):
                if address in self._senders:
                    target = self._senders[address]
                    if target is None:
                        return []
                    domain, selector = target
                    return [key for key in self._files.keys(domain) if selector in ("", key.selector)]
        return self._files.keys_for(host) if self._config.parent else self._files.keys(host)

    def _heavy(self, function: Callable[[], Any]) -> Any:
        return self._services.batch("dkim").submit(function)
