"""Accepts recipients in the local domains: listed mailboxes, aliases, a catch-all, and always postmaster.

Hooks: permit_rcpt; get_route (where aliases may be commands or files). Says nothing about domains that are not in `[domains] local`; what no plugin permits is refused.

Keys of `[plugin:mailboxes]`: `accept = listed|any|system` (any: every safe name in a local domain is a mailbox; system: every account of this
machine but root), `mailboxes`
(comma- or blank-separated; a name without @ holds in every local domain), `mailboxes_file` (one a line, `#` comments),
`aliases_file` (classic aliases syntax), `allow_include = no` (whether `:include:FILE` is read there), `detail_separator = +`, `catch_all`
(an address), `command_transport` and `file_transport` (where targets `|program` and `/path` go), `aliases_url`, `aliases_authorization` and
`aliases_ca_file` (a web service that is asked for aliases). The files are read again within a second of a change; one that can't be read or parsed then leaves the former
content in force and is logged, at the start it stops the start.

Order: exact name, name without detail, `accept = system`, catch_all, `accept = any`. An alias is followed to its end before the answer, so
an unknown user behind it is refused at RCPT. Names match without regard to case. Commands (`|program`) and files
(`/path`) as alias targets are refused, unless a key says which transport runs or writes them, which reads them from the same file
(`aliases_file` of types pipe and mbox); nothing that a client says becomes a part of them.

`aliases_url`: POST of JSON {"address"} for a name in a local domain that `aliases_file` has not, with and without detail; never for one that
could mean a path or a command. Answer 200 with {"to": [address, ...]}: the targets; 204 or 404: no alias; anything else, or none within
`aliases_timeout`: 451. Answers hold for ALIAS_S. Redirections are not followed.

Replies: 550 5.1.1 no such user; 451 4.3.0 the accounts or aliases can't be looked up; 550 5.4.6 the aliases loop; 550 5.1.3 a name that could mean a path, a command or a
further route (percent hack, bang path), unless it is listed. RFC 5321 section 4.5.1 (postmaster), RFC 5233 (detail).
"""

from __future__ import annotations

import json
import re
from pathlib import Path as FilePath
from typing import Any, Literal

from gevent.threadpool import ThreadPool
from pydantic import Field, field_validator

from gmta import Duration, PluginConfig, Verdict, accept, defer, hookimpl, reject
from gmta.config import ExistingFile, Path
from gmta.mail.address import Address, AddressError, domain_key
from gmta.mail.session import Recipient, Session, Transaction
from gmta.services.accounts import find_account
from gmta.services.aliases import COMMAND, FILE, name_key, parse_aliases, special_local
from gmta.services.ask import ServiceError, WebService, private_url
from gmta.services.watched import Watched

MAX_DEPTH = 50  # an alias chain longer than this is taken for a loop
ACCOUNT_S = 60.0
MAX_ACCOUNTS = 10_000
ALIAS_S = 30.0  # so long what the service has said of an alias holds
LONGEST = 256 * 1024  # octets of its answer
MAX_ANSWERS = 10_000
LOOKUPS = 4  # accounts that are looked up at a time; each may be asked for over a network
MAX_TARGETS = 1000  # one RCPT must not become an unbounded number of recipients

# What a mailbox name must not hold unless the postmaster listed it: path parts, commands, routes, quoting.
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f/\\|%!:@\"`<>,;()\[\]]|\A[.\-~]|\.\.|\.\Z")

_SPECIAL = re.compile(r"[|/][0-9a-f]{24}\Z")


class Config(PluginConfig):
    """Keys of [plugin:mailboxes]."""

    accept: Literal["listed", "any", "system"] = "listed"
    mailboxes: list[str] = Field(default=[], description="names, with or without @domain")
    mailboxes_file: Path = ""
    aliases_file: Path = ""
    allow_include: bool = Field(False, description="whether aliases may name files with further targets by :include:")
    detail_separator: str = "+"
    catch_all: str = ""
    command_transport: str = Field("", description="[transport:NAME] that runs `|program` of aliases, of type pipe with this aliases_file")
    file_transport: str = Field("", description="[transport:NAME] that writes `/path` of aliases, of type mbox with this aliases_file")
    aliases_url: str = Field("", description="web service that is asked for aliases; https, or http on this machine")
    aliases_authorization: str = Field("", description="value of the header Authorization for it")
    aliases_ca_file: ExistingFile = Field("", description="authorities that its certificate is verified by; default: the system's")
    aliases_timeout: Duration = Field("10s", gt=0, description="for a whole request")  # type: ignore[assignment]

    @field_validator("aliases_url")
    @classmethod
    def _check_url(cls, value: str) -> str:
        return private_url(value) if value else ""

    @field_validator("mailboxes")
    @classmethod
    def _check_mailboxes(cls, value: list[str]) -> list[str]:
        for name in value:
            name_key(name)
        return value

    @field_validator("catch_all")
    @classmethod
    def _check_catch_all(cls, value: str) -> str:
        if value:
            Address.parse(value)
        return value

    @field_validator("detail_separator")
    @classmethod
    def _check_separator(cls, value: str) -> str:
        if len(value) > 1 or value.isalnum() or value in ("@", ".", '"'):
            raise ValueError("expected one character such as + or -, or nothing")
        return value


class Refused(Exception):
    """A chain of aliases that can't be delivered; `verdict` is the answer."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reply.text)
        self.verdict = verdict


def parse_mailboxes(text: str, source: str) -> set[str]:
    """The names of a mailboxes_file: the first word of each line; raises ValueError with the line."""
    found: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].split()
        if word:
            try:
                found.add(name_key(word[0]))
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {word[0]!r} is not a mailbox: {error}") from error
    return found


class AliasService:
    """A web service that knows aliases. Connections are kept, answers remembered for ALIAS_S."""

    def __init__(self, config: Config, services: Any) -> None:
        self._services = services
        self._service = WebService(config.aliases_url, config.aliases_authorization, config.aliases_ca_file, config.aliases_timeout)
        self._answers: dict[str, tuple[list[str] | None, float]] = {}

    def targets(self, address: str) -> list[str] | None:
        """Where an address of ours leads, None where it is no alias; raises Refused where the service does not say."""
        now = self._services.clock()
        known = self._answers.get(address)
        if known is None or not known[1] - ALIAS_S <= now < known[1]:
            try:
                found = self._ask(address)
            except (ServiceError, ValueError) as error:
                self._services.log.error("aliases can't be looked up", service=self._service.host, address=address, reason=str(error))
                raise Refused(defer("Aliases can't be looked up", 451, "4.3.0")) from None
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            known = self._answers[address] = (found, now + ALIAS_S)
        return known[0]

    def _ask(self, address: str) -> list[str] | None:
        """One request; raises ValueError for an answer that is none."""
        status, octets = self._service.ask({"address": address}, LONGEST)
        if status in (204, 404):
            return None
        if status != 200:
            raise ValueError(f"it answers {status}")
        if len(octets) > LONGEST:
            raise ValueError("its answer is too long")
        said = json.loads(octets)
        targets = said.get("to") if isinstance(said, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError('its answer is no {"to": [address, ...]}')
        for target in targets:
            try:
                Address.parse(target)
            except AddressError as error:
                raise ValueError(f"{target!r} is no address: {error}") from error
        return targets or None


class Plugin:
    """Holds the lists in memory; a look-up touches no file but for one stat a second."""

    def __new__(cls, config: Config, services: Any) -> Plugin:
        """With commands or files one that is asked for routes, too: others cost nothing at an attempt."""
        return super().__new__(WithSpecials if config.command_transport or config.file_transport else cls)

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._domains = services.config.domains.local
        named = services.config.sections.get("domains", {}).get("local", "").replace(",", " ").split()
        self._first = domain_key(named[0]) if named else ""  # the set of [domains] has no first
        self._listed = frozenset(name_key(name) for name in config.mailboxes)
        self._from_file: set[str] = set()
        self._aliases: dict[str, list[str]] = {}
        self._special = {kind: name for kind, name in ((COMMAND, config.command_transport), (FILE, config.file_transport)) if name}
        for key, name in (("command_transport", config.command_transport), ("file_transport", config.file_transport)):
            if name and name not in services.config.transports:
                raise ValueError(f"{key}: there is no [transport:{name}]")
        self._accounts: dict[str, tuple[bool, float]] = {}
        self._threads: ThreadPool | None = None
        self._service = AliasService(config, services) if config.aliases_url else None
        self._catch_all = Address.parse(config.catch_all) if config.catch_all else None
        self._paths = [path for path in (config.mailboxes_file, config.aliases_file) if path]
        self._own = len(self._paths)  # behind them those that aliases include
        self._files = Watched(self._paths, self._load, services.clock) if self._paths else None

    @hookimpl
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """Accepts what ends in mailboxes or foreign addresses, refuses unknown names of local domains."""
        address = recipient.address
        if not address.domain:  # RFC 5321 section 4.1.1.3: <Postmaster> without a domain
            if address.local.lower() != "postmaster" or not self._first:
                return None
            address = Address("postmaster", self._first)
        elif address.host not in self._domains:
            return None
        self._refresh()
        try:
            found: dict[str, Address] = {}
            self._resolve(address, (), found, set())
        except Refused as refused:
            if address.mailbox.lower() != "postmaster":
                return refused.verdict
            found = {"": Address("postmaster", address.domain)}  # RFC 5321 section 4.5.1: never refused
        final = list(found.values())
        if len(final) == 1 and str(final[0]) == str(recipient.address):
            return accept()
        return accept(replace=final)

    def _resolve(self, address: Address, path: tuple[str, ...], found: dict[str, Address], done: set[str]) -> None:
        """Adds to `found` where `address` ends; raises Refused. path: aliases above it; done: aliases dealt with."""
        if address.host not in self._domains:
            found.setdefault(address.key, address)
            return
        key = address.key
        if path and path[-1] == key:  # `joe: joe, joe@elsewhere` keeps a copy in joe's own mailbox
            self._end(address, found)
            return
        if key in path or len(path) >= MAX_DEPTH:
            raise Refused(reject(f"Aliases loop at <{_shown(address)}>", 550, "5.4.6"))
        user, detail = address.split_detail(self._config.detail_separator)
        for name in (address.mailbox, user) if detail else (address.mailbox,):
            targets = self._targets_of(name, address.host)
            if targets is not None:
                self_key = f"{name.lower()}@{address.host}"
                if self_key in path and self_key != path[-1]:
                    raise Refused(reject(f"Aliases loop at <{_shown(address)}>", 550, "5.4.6"))
                if path and path[-1] == self_key:
                    self._end(Address.make(name, address.domain), found)
                    return
                if self_key in done:  # aliases that name one another twice would double the work at every level
                    return
                for target in targets:
                    if target[0] in self._special:
                        end = Address.make(special_local(target), address.domain)
                        found.setdefault(end.key, end)
                        continue
                    self._resolve(self._address(target, address.domain), (*path, self_key), found, done)
                    if len(found) > MAX_TARGETS:
                        raise Refused(reject("The alias has too many targets", 550, "5.3.5"))
                done.add(self_key)
                return
            if self._is_listed(name, address.host):
                found.setdefault(f"{name.lower()}@{address.host}", Address.make(name.lower(), address.host))
                return
        self._unlisted(address, user, path, found, done)

    def _unlisted(self, address: Address, user: str, path: tuple[str, ...], found: dict[str, Address],
                  done: set[str]) -> None:
        """The end for a name that neither list nor alias holds."""
        if user.lower() == "postmaster":  # RFC 5321 section 4.5.1
            found.setdefault(f"postmaster@{address.host}", Address("postmaster", address.host))
            return
        if _UNSAFE.search(address.mailbox):
            raise Refused(reject("Recipient address is not allowed", 550, "5.1.3"))
        try:
            is_account = self._config.accept == "system" and self._is_account(user.lower())
        except OSError as error:
            raise Refused(defer(f"Accounts can't be looked up: {error.strerror}", 451, "4.3.0")) from error
        if is_account:
            found.setdefault(f"{user.lower()}@{address.host}", Address.make(user.lower(), address.host))
            return
        if self._catch_all is not None and self._catch_all.key not in path and self._catch_all.key != address.key:
            self._resolve(self._catch_all, (*path, address.key), found, done)
            return
        catches = self._catch_all is not None and self._catch_all.key == address.key
        if self._config.accept == "any" or catches:
            found.setdefault(f"{user.lower()}@{address.host}", Address.make(user.lower(), address.host))
            return
        raise Refused(reject(f"<{_shown(address)}>: no such user here", 550, "5.1.1"))

    def _end(self, address: Address, found: dict[str, Address]) -> None:
        """An alias that names itself: its own mailbox, where there may be one."""
        name = address.mailbox.lower()
        if _UNSAFE.search(name) and not self._is_listed(name, address.host):
            raise Refused(reject("Recipient address is not allowed", 550, "5.1.3"))
        found.setdefault(f"{name}@{address.host}", Address.make(name, address.host))

    def _is_listed(self, name: str, host: str) -> bool:
        lower = name.lower()
        full = f"{lower}@{host}"
        return full in self._listed or lower in self._listed or full in self._from_file or lower in self._from_file

    def _is_account(self, name: str) -> bool:
        """Whether this machine has an account of that name which is not root's; remembered for a minute."""
        now = self._services.clock()
        known = self._accounts.get(name)
        if known is None or not known[1] - ACCOUNT_S <= now < known[1]:
            if len(self._accounts) >= MAX_ACCOUNTS:
                self._accounts.clear()
            if self._threads is None:  # of its own: where a directory hangs, the hub's go on with what is asked of no directory
                self._threads = ThreadPool(LOOKUPS)
            found = self._threads.apply(_has_account, (name,))
            if isinstance(found, OSError):
                raise found
            known = self._accounts[name] = (found, now + ACCOUNT_S)
        return known[0]

    def _targets_of(self, name: str, host: str) -> list[str] | None:
        lower = name.lower()
        found = self._aliases.get(f"{lower}@{host}") or self._aliases.get(lower)
        if found is None and self._service is not None and not _UNSAFE.search(lower):
            return self._service.targets(f"{lower}@{host}")
        return found

    @staticmethod
    def _address(target: str, domain: str) -> Address:
        return Address.parse(target) if "@" in target else Address.make(target, domain)

    # --- files -------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Reads the files; raises OSError or ValueError and then changes nothing."""
        config = self._config
        mailboxes: set[str] = set()
        aliases: dict[str, list[str]] = {}
        included: list[str] = []
        if config.mailboxes_file:
            path = FilePath(config.mailboxes_file)
            mailboxes = parse_mailboxes(path.read_text(encoding="utf-8"), path.name)
        if config.aliases_file:
            path = FilePath(config.aliases_file)
            aliases = parse_aliases(path.read_text(encoding="utf-8"), path.name, path.parent if config.allow_include else None,
                                    special="".join(self._special), included=included)
        self._paths[self._own:] = included
        self._from_file, self._aliases = mailboxes, aliases

    def _refresh(self) -> None:
        """Loads the files again when they changed."""
        if self._files is None:
            return
        try:
            self._files.refresh()
        except (OSError, ValueError) as error:
            self._services.log.error("mailbox files not reloaded, the former content stays", error=str(error))


class WithSpecials(Plugin):
    """The same where aliases may be commands or files."""

    @hookimpl
    def get_route(self, envelope: Any, recipient: Any) -> str | None:
        """The transport of a command or file; it knows which of them there are."""
        address = recipient.address
        kind = address.local[:1]
        return self._special.get(kind) if kind in self._special and _SPECIAL.match(address.local) and address.host in self._domains else None


def _has_account(name: str) -> bool | OSError:
    """In a native thread; an OSError where that can't be told now, given back since the pool would print it."""
    try:
        account = find_account(name)
    except OSError as error:
        return error
    return account is not None and account.uid != 0


def _shown(address: Address) -> str:
    """The address for a reply line: ASCII, bounded."""
    return str(address).encode("ascii", "backslashreplace").decode("ascii")[:200]
