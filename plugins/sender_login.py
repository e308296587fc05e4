"""Users send as themselves: who has logged in may use its own addresses, its aliases, and what [senders] grants, and no others.

Hooks: check_mail (the envelope sender), check_message (every address of the From and Sender fields). Concerns sessions with a user;
who may send without one is `access`'s business. The null sender is anybody's, since receipts and the like need it; the From field
is judged all the same. A field that can't be read without doubt is nobody's.

A user's own addresses: the user name where it is an address, with or without a detail (alice+news@example.test), else that name at
every local domain. Aliases: those of `aliases_file` that lead to the user, over others too. Grants, one user a line:

    [senders]
    alice@example.test = info@example.test, @example.org
    @example.net = noreply@example.net
    backup = *

On the left a user name, `@domain` for all users of a domain, or `*` for every user; on the right addresses, `@domain`, `@.domain`
(all below it), or `*`. Names compare without regard to case.

What a back end of AUTH says the user may use is the user's too: `session.notes["addresses"]`, (user, addresses) as `auth_ldap` leaves it.

Keys of `[plugin:sender_login]`: `aliases_file` (as in `mailboxes`; read again within a second of a change), `allow_include = no` (whether
`:include:FILE` is read there), `detail_separator = +`, `fields = From, Sender`. Reply: 553 5.7.1. RFC 6409 section 6.1, RFC 5322 section 3.6.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

from pydantic import Field

from gmta import PluginConfig, Verdict, hookimpl, reject
from gmta.config import ConfigError, Path, Section
from gmta.mail.address import Address, AddressError, check_domain, domain_key, domains_above
from gmta.mail.fields import mailboxes
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.services.aliases import COMMAND, FILE, name_key, parse_aliases
from gmta.services.watched import Watched

MAX_DEPTH = 20  # aliases that lead to one another
KNOWN = 4096  # answers kept


class Config(PluginConfig):
    """Keys of [plugin:sender_login]."""

    aliases_file: Path = Field("", description="aliases whose targets may use them")
    allow_include: bool = Field(False, description="whether aliases may name files with further targets by :include:")
    detail_separator: str = Field("+", max_length=1)
    fields: list[str] = Field(["From", "Sender"], description="header fields that are judged besides the envelope")


class Grants:
    """What [senders] says. who: user, @domain or *  ->  what it may use; raises ConfigError with all that is wrong."""

    def __init__(self, section: Section) -> None:
        self._granted: dict[str, set[str]] = {}
        errors: list[str] = []
        for who, what in section.items():
            try:
                granted = {self._pattern(word) for word in what.replace(",", " ").split()}
                self._granted.setdefault(self._who(who), set()).update(granted)
            except ValueError as error:
                errors.append(f"{section.where(who)}: expected user = addresses, @domain, @.domain or * ({error})")
        if errors:
            raise ConfigError(errors)

    @staticmethod
    def _who(text: str) -> str:
        if text.startswith("@"):
            check_domain(text[1:])
            return "@" + domain_key(text[1:])
        return text if text == "*" else user_key(text)

    @staticmethod
    def _pattern(text: str) -> str:
        if text == "*":
            return text
        if text.startswith("@"):
            below = "." if text.startswith("@.") else ""
            check_domain(text[1 + len(below):])
            return f"@{below}{domain_key(text[1 + len(below):])}"
        return Address.parse(text).key

    def cover(self, user: str, address: Address) -> bool:
        """Whether the user was granted the address. user: as user_key has it."""
        wanted = {"*", address.key, f"@{address.host}", *(f"@.{parent}" for parent in domains_above(address.host))}
        whose = (user, "@" + user.rpartition("@")[2], "*") if "@" in user else (user, "*")
        return any(not wanted.isdisjoint(self._granted.get(who, ())) for who in whose)


def user_key(user: str) -> str:
    """The form that user names compare by; a name that is no address stays what it is, in lower case."""
    try:
        return name_key(user)
    except ValueError:
        return user.lower()


class Plugin:
    """Holds grants and aliases in memory."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._local = services.config.domains.local
        self._grants = Grants(services.config.sections.get("senders") or Section("senders"))
        self._aliases: dict[str, list[str]] = {}
        self._known: dict[tuple[str, Address], bool] = {}
        self._file = Watched([config.aliases_file], self._load, services.clock) if config.aliases_file else None

    @hookimpl
    def check_mail(self, session: Session, transaction: Transaction) -> Verdict | None:
        """553 5.7.1 where the envelope sender is somebody else's."""
        if session.user is None or not transaction.sender or self._permits(session, session.user, transaction.sender):
            return None
        return _refusal("The sender", str(transaction.sender))

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """553 5.7.1 where From or Sender has an address of somebody else."""
        if session.user is None:
            return None
        for name in self._config.fields:
            for value in message.values(name):
                try:
                    addresses = mailboxes(value)
                except ValueError as error:
                    return reject(f"The {name} field can't be read: {error}"[:300], 553, "5.7.1")
                for address in addresses:
                    if not self._permits(session, session.user, address):
                        return _refusal(f"The {name} address", str(address))
        return None

    def _permits(self, session: Session, user: str, address: Address) -> bool:
        """Whether the session's user may send as that address, by what is configured or by what the back end said at AUTH."""
        if self.may(user, address):
            return True
        whose, addresses = session.notes.get("addresses") or ("", ())
        return bool(whose == user and address.key in addresses)

    def may(self, user: str, address: Address) -> bool:
        """Whether a user may send as that address."""
        self._refresh()
        key = (user, address)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= KNOWN:
                self._known.clear()
            known = self._known[key] = self._judge(user_key(user), address)
        return known

    def _judge(self, user: str, address: Address) -> bool:
        name, _ = address.split_detail(self._config.detail_separator)
        for local in {address.mailbox.lower(), name.lower()}:
            if self._is(user, local, address.host) or (address.host in self._local and self._leads(user, local, address.host)):
                return True
        return self._grants.cover(user, address)

    def _is(self, user: str, local: str, host: str) -> bool:
        """Whether local@host is the user's own name."""
        return user == f"{local}@{host}" if "@" in user else user == local and host in self._local

    def _leads(self, user: str, local: str, host: str) -> bool:
        """Whether an alias leads to the user."""
        level = seen = {(local, host)}  # each alias once: those that name one another would double the work at every level
        for _ in range(MAX_DEPTH + 1):
            below = set()
            for end in self._ends(level):
                found, _ = end.split_detail(self._config.detail_separator)
                if self._is(user, found.lower(), end.host) or self._is(user, end.mailbox.lower(), end.host):
                    return True
                if end.host in self._local:
                    below.add((found.lower(), end.host))
            level = below - seen
            seen = seen | level
        return False

    def _ends(self, names: Iterable[tuple[str, str]]) -> Iterator[Address]:
        """What aliases name. names: their (local part, domain)."""
        for local, host in names:
            for target in self._aliases.get(f"{local}@{host}") or self._aliases.get(local) or ():
                if target[0] in COMMAND + FILE:
                    continue
                try:
                    yield Address.parse(target) if "@" in target else Address.make(target, host)
                except AddressError:
                    continue

    # --- the file ---------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Reads the file; raises OSError or ValueError and then changes nothing."""
        path = FilePath(self._config.aliases_file)
        self._aliases = parse_aliases(path.read_text(encoding="utf-8"), path.name, path.parent if self._config.allow_include else None, special=COMMAND + FILE)
        self._known.clear()

    def _refresh(self) -> None:
        """Reads the file again when it changed."""
        if self._file is None:
            return
        try:
            self._file.refresh()
        except (OSError, ValueError) as error:
            self._services.log.error("aliases not read again, the former ones stay", error=str(error))


def _refusal(what: str, address: str) -> Verdict:
    shown = address.encode("ascii", "backslashreplace").decode("ascii")[:200]
    return reject(f"{what} <{shown}> is not yours to use", 553, "5.7.1")
