"""Transport `maildir`: writes messages into Maildirs and their folders, synced, each once, within a quota.

Hooks: get_transports; check_rcpt (quota, and mailboxes that are not there), on_worker_started: these need the name `maildir` in
[plugins] enable.  Keys of [transport:NAME]: path, a template with {local}, {domain}, {user}, {detail} and {home}; user, detail_separator,
detail_folders, quarantine_folder, fold_case, normalize, create, missing, symlinks, owner, directory_mode, file_mode, loop_check, quota,
quota_messages, quota_file, quota_style, over_quota.  Replies: 250 2.1.5 delivered; 552 5.2.2 or 452 4.2.2 mailbox full; 550 5.1.1 or
450 4.2.0 no mailbox; 554 5.4.6 loop; 550 5.1.3 a name too long; 452 4.3.1 no room, 451 4.3.0 any other fault of the file system (both
deferred).

A file is written in tmp/, synced, renamed into new/ (never over another), and the directory synced. Its name derives from queue id
and recipient, so a delivery repeated after a crash finds the first one, in new/ or (moved there by a reader) in cur/. Lines end in
LF, as Maildir readers expect. Messages cross to a native thread in batches, which wait some milliseconds for company, so that
intake's commits get the disk first. The rest of the message is as it came, below Return-Path and Delivered-To (RFC 5321 section 4.4,
RFC 9228).

What a recipient's address makes of the path is entered one directory at a time from the fixed part on, and no symbolic link is
followed there: whoever may write into a mailbox can't send mail elsewhere. Quotas are those of Maildir++: the file maildirsize, which
Dovecot's and Courier's servers keep too. Which recipients there are is left to the plugins that permit them.

With `user` all this is done as that account, in the delivery agent (gmta.agent) where the workers are another; who is no account has
550 5.1.1 and root has 550 5.7.1. The agent looks into mailboxes at RCPT, too.
"""

from __future__ import annotations

import base64
import errno
import grp
import os
import pwd
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from gevent.monkey import get_original
from pydantic import Field, TypeAdapter, field_validator

import gmta
from gmta import PluginConfig, Verdict, hookimpl
from gmta.config import ExistingFile, Size
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState, stored_address
from gmta.mail.message import Message, with_lf
from gmta.mail.trace import delivered_to
from gmta.services.accounts import Account, find_account
from gmta.services.files import NO_ROOM, rename_new, start_writing_out, sync_directory, write_all
from gmta.services.maildirsize import (
    OTHERS,
    Limits,
    Usage,
    add_usage,
    count_usage,
    forget_usage,
    lock,
    read_usage,
    remove,
    unlock,
    write_usage,
)
from gmta.services.watched import Watched

LINGER_S = 0.010
BATCH = 32
LARGE = 64 * 1024  # octets from which a piece begins to be written out at once
_close = get_original("os", "close")  # gevent's looks for watchers first; files here live and die in native threads
_DONE = gmta.delivered("Delivered to mailbox", enhanced="2.1.5")
_LOOP = gmta.failed("The message was delivered to this mailbox before: it goes round in circles", enhanced="5.4.6", code=554)
_NO_NAME = gmta.failed("The address makes no name for a mailbox", enhanced="5.1.3", code=550)

_READ = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_PASS = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC  # asks for no right to read it
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMES = 9  # tries where a name is taken
OWN = "{user}"  # the recipient's own account
_PARTS = ("cur", "new", "tmp")  # in the order in which they are made: who finds tmp finds all


class Config(PluginConfig):
    """[plugin:maildir] has no keys of its own."""


class TransportConfig(PluginConfig):
    """[transport:NAME] of type maildir."""

    path: str = Field("var/mail/{domain}/{local}", description="directory of a mailbox: {local} {domain} {user} {detail}; {home}/… with `user`")
    user: str = Field("", description="account that mailboxes are written as, or {user}: the recipient's own; needs a start as root")
    detail_separator: str = Field("+", description="what parts {user} from {detail}; empty for none")
    detail_folders: bool = Field(True, description="user+work@ goes into the folder .work where that exists")
    quarantine_folder: str = Field(".Junk", description="where mail tagged `quarantine` goes; empty: like all mail")
    fold_case: bool = Field(True, description="names in lower case")
    normalize: Literal["nfc", "nfkc", "none"] = Field("nfc", description="form of Unicode names")
    create: bool = Field(True, description="make a mailbox that is missing")
    missing: Literal["defer", "reject"] = Field("defer", description="what happens to mail for one that is missing, with create = no")
    symlinks: bool = Field(False, description="follow symbolic links below the fixed part of path")
    owner: str = Field("", description="USER or USER:GROUP of what is made; needs a start as root")
    directory_mode: str = "0700"
    file_mode: str = "0600"
    loop_check: bool = Field(True, description="fail a message that says it was delivered to this address before")
    quota: Size = Field(0, description="octets of a mailbox; 0: any number")
    quota_messages: int = Field(0, ge=0, description="messages of a mailbox; 0: any number")
    quota_file: ExistingFile = Field("", description="lines `ADDRESS SIZE [MESSAGES]` or `USER SIZE [MESSAGES]` that differ")
    quota_style: Literal["dovecot", "courier"] = Field("dovecot", description="courier: .Trash and messages marked deleted don't count")
    over_quota: Literal["reject", "defer"] = "reject"

    @field_validator("directory_mode", "file_mode")
    @classmethod
    def _check_mode(cls, value: str) -> str:
        if re.fullmatch(r"0?[0-7]{3,4}", value) is None:
            raise ValueError("octal digits such as 0700")
        return value

    @field_validator("quarantine_folder")
    @classmethod
    def _check_folder(cls, value: str) -> str:
        if value and (not value.startswith(".") or folder_name(value[1:]) != value):
            raise ValueError("a Maildir++ folder such as .Junk or .Junk.Later")
        return value


# --- quota ------------------------------------------------------------------------------------------------------


class Overrides:
    """quota_file: quotas of single mailboxes. Read again within a second of a change; one that can't be read changes nothing."""

    def __init__(self, path: str, services: Any) -> None:
        self._path = path
        self._services = services
        self._limits: dict[str, Limits] = {}
        self._file = Watched([path], self._read, services.clock) if path else None

    def of(self, address: Address, user: str) -> Limits | None:
        """The quota that the file has for an address, else for its user."""
        if self._file is None:
            return None
        try:
            self._file.refresh()
        except (OSError, ValueError) as error:
            self._services.log.error("quota_file not reloaded, the former content stays", error=str(error))
        user = user.lower()
        for key in (address.key, f"{user}@{address.host}", user):
            found = self._limits.get(key)
            if found is not None:
                return found
        return None

    @property
    def any(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def _read(self) -> None:
        """Raises OSError, ValueError."""
        found: dict[str, Limits] = {}
        size: TypeAdapter[int] = TypeAdapter(Size)
        with open(self._path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                words = line.partition("#")[0].split()
                if not words:
                    continue
                try:
                    octets = size.validate_python(words[1])
                    messages = int(words[2]) if len(words) > 2 else 0
                    if messages < 0 or len(words) > 3:
                        raise ValueError
                    key = Address.parse(words[0]).key if "@" in words[0] else words[0].lower()
                except (ValueError, IndexError) as error:
                    raise ValueError(f"{os.path.basename(self._path)}:{number}: expected `ADDRESS SIZE [MESSAGES]`") from error
                found[key] = Limits(octets, messages)
        self._limits = found


# --- the transport ----------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One file to write, below the fixed part of the path.

    folder: "" or a Maildir++ folder; make_folder: make it where it is missing, else INBOX.  seek: look whether an earlier attempt wrote it.
    """

    path: tuple[str, ...]
    folder: str
    make_folder: bool
    name: str
    top: bytes
    message: Message
    seek: bool
    limits: Limits | None


class Reserved:
    """What is in a mailbox, and what a batch will add."""

    __slots__ = ("messages", "octets", "used")

    def __init__(self, used: Usage) -> None:
        self.used = used
        self.octets = self.messages = 0


class Written(NamedTuple):
    """An item's file in tmp/."""

    number: int
    place: Place
    temporary: str
    file: int
    size: int


class Place(NamedTuple):
    """An open Maildir or folder: its path, and its tmp/ and new/."""

    path: tuple[str, ...]
    tmp: int
    new: int


class Maildir:
    """The transport."""

    Config = TransportConfig
    concurrency = 128

    def __init__(self, name: str, config: TransportConfig, services: Any) -> None:
        self.name = name
        self.config = config
        self._services = services
        self._own_account = config.user == OWN
        self._account = _account(config.user) if config.user and not self._own_account else None
        if config.user and config.owner:
            raise ValueError("owner: expected none where there is `user`: what it makes is its own")
        if config.user and not services.agent and os.geteuid() not in (0, self._account.uid if self._account is not None else -1):
            services.log.warning("mail can't be delivered as another user: gmta was not started as root", transport=name)
        home, slash, rest = config.path.partition("/")
        self._in_home = home == "{home}" and bool(config.user)
        if self._in_home:
            self.base, self._template = _home(self._account) if self._account is not None else "", _split_path(slash + rest, fixed=False)[1]
        else:
            self.base, self._template = _split_path(os.path.join(services.config.base, config.path))  # relative to the configuration file
        self._separator = config.detail_separator
        self._by_detail = any("{user}" in part or "{detail}" in part for part in self._template)
        self._host = services.hostname.replace("/", "\\057").replace(":", "\\072").replace(",", "\\054")
        self.directory_mode, self.file_mode = int(config.directory_mode, 8), int(config.file_mode, 8)
        self.owner = _owner(config.owner)
        self._default = Limits(config.quota, config.quota_messages)
        self._overrides = Overrides(config.quota_file, services)
        self._courier = config.quota_style == "courier"
        self._batch: Any = None
        self._is = ""  # the account that we have seen to be ours

    @property
    def has_quota(self) -> bool:
        """Whether any mailbox may be full."""
        return any(self._default) or self._overrides.any

    def user_of(self, address: Address) -> str:
        """The account that an address's mail is delivered as; "" for our own."""
        return address.split_detail(self._separator)[0].lower() if self._own_account else self.config.user

    def _become(self, addresses: list[Address]) -> None:
        """Sees that we are who mail for these is delivered as; raises PermissionError, OSError where there is no such account."""
        (name,) = {self.user_of(address) for address in addresses}
        if name != self._is:
            try:
                account = _account(name)
                home = _home(account) if self._in_home else self.base
            except ValueError as error:
                raise OSError(errno.EINVAL, str(error).removeprefix("user: ")) from error
            if self._is or os.geteuid() != account.uid:
                raise PermissionError(errno.EPERM, f"not as {name}, for which gmta has to be started as root")
            self._is, self.base = name, home

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """Writes a file a recipient."""
        if self.config.user:
            try:
                self._become([recipient.address for recipient in delivery.recipients])
            except OSError as error:
                return dict.fromkeys((recipient.number for recipient in delivery.recipients), _outcome(error))
        batch = self._batch
        if batch is None:
            batch = self._batch = self._services.batch(f"maildir:{self.name}", self._write_all, max_items=BATCH, linger_s=LINGER_S)
        seen = delivered_to(delivery.message) if self.config.loop_check else ()
        outcomes = {}
        for recipient in delivery.recipients:
            outcome: gmta.Outcome | None
            if seen and recipient.address.key in seen:
                outcome = _LOOP
            else:
                try:
                    item = self._item(delivery, recipient)
                except ValueError:
                    outcome = _NO_NAME
                else:
                    try:
                        outcome = batch.submit(item)
                    except OSError as error:
                        outcome = _outcome(error)
            outcomes[recipient.number] = outcome or _DONE
        return outcomes

    def _item(self, delivery: Any, recipient: RecipientState) -> Item:
        envelope = delivery.envelope
        address = recipient.address
        config = self.config
        folder, make_folder = "", False
        detail = self._detail(recipient)
        if config.quarantine_folder and "quarantine" in envelope.tags:
            folder, make_folder = config.quarantine_folder, True
        elif detail and config.detail_folders:
            folder = folder_name(detail)
        top = f"Return-Path: <{envelope.sender}>\nDelivered-To: {address}\n"
        name = f"{int(envelope.received_at)}.{envelope.id}R{recipient.number}.{self._host}"
        return Item(self.path(address, detail), folder, make_folder, name, top.encode("utf-8", "surrogateescape"), delivery.message,
                    not delivery.first_attempt, self.limits(address) if self.has_quota else None)

    def _detail(self, recipient: RecipientState) -> str:
        """The detail of the address, or the one that it was given with and whoever permitted it took away."""
        separator = self._separator
        if not separator:
            return ""
        address = recipient.address
        user, detail = address.split_detail(separator)
        if not detail and separator in recipient.original:
            original = stored_address(recipient.original)
            given, given_detail = original.split_detail(separator)
            if given.lower() == user.lower() and original.host == address.host:
                return given_detail
        return detail

    def path(self, address: Address, detail: str | None = None) -> tuple[str, ...]:
        """The directories below the fixed part, for an address; raises ValueError where they would lead out of it."""
        fold, form = self.config.fold_case, self.config.normalize
        values = {"local": safe(address.mailbox, fold, form) or "%", "domain": safe(address.host or self._services.hostname)}
        if self._by_detail:
            user, own = address.split_detail(self._separator)
            values["user"] = safe(user, fold, form) or "%"
            values["detail"] = safe(own if detail is None else detail, fold, form)
        parts = tuple(part for template in self._template if (part := template.format_map(values)) not in ("", "."))
        if ".." in parts:
            raise ValueError("leads out of the directory")
        return parts

    def directory(self, address: Address) -> str:
        """The Maildir of an address."""
        return os.path.join(self.base, *self.path(address))

    def limits(self, address: Address) -> Limits | None:
        """The quota of an address's mailbox, or None."""
        found = self._overrides.of(address, address.split_detail(self._separator)[0])
        if found is None:
            found = self._default
        return found if any(found) else None

    def room(self, address: Address, size: int) -> gmta.Outcome | None:
        """What hinders a message of that size (0: not known) now: an Outcome, or None. Raises OSError."""
        limits = self.limits(address)
        if limits is None and self.config.create:
            return None
        if self.config.user:
            self._become([address])
        path = self.path(address)
        outcome: gmta.Outcome | None = self._services.batch("maildir quota").submit(lambda: self._room(path, limits, size))
        return outcome

    # --- in the native thread ---------------------------------------------------------------------------------------

    def _room(self, path: tuple[str, ...], limits: Limits | None, size: int) -> gmta.Outcome | None:
        opened = Opened(self)
        try:
            top = opened.readable(path, make=False)
            if limits is None:
                return None
            # with a size of nothing a mailbox is full when it has not one octet left
            return None if self._holds(top, limits, max(size, 1), 1) else self._full(limits, size)
        except FileNotFoundError:
            if not self.config.create:
                return self._missing()
            return None if limits is None or limits.hold(Usage(0, 0), size, 1) else self._full(limits, size)
        finally:
            opened.close()

    def _missing(self) -> gmta.Outcome:
        if self.config.missing == "reject":
            return gmta.failed("There is no such mailbox", enhanced="5.1.1", code=550)
        return gmta.deferred("The mailbox is not there", enhanced="4.2.0", code=450)

    def _full(self, limits: Limits, size: int) -> gmta.Outcome:
        if self.config.over_quota == "reject" or not limits.hold(Usage(0, 0), size, 1):
            return gmta.failed("Mailbox is full", enhanced="5.2.2", code=552)
        return gmta.deferred("Mailbox is full", enhanced="4.2.2", code=452)

    def _holds(self, top: int, limits: Limits, size: int, count: int) -> bool:
        return limits.hold(self.usage(top, limits, size, count), size, count)

    def usage(self, top: int, limits: Limits, size: int = 0, count: int = 0) -> Usage:
        """What is in the open Maildir by its maildirsize; counted anew where that is needed before `size` more octets may be refused."""
        now = self._services.clock()
        used = read_usage(top, limits, now)
        if used is not None and (used.trusted or limits.hold(used, size, count)):
            return used
        lock(top, exclusive=True)  # nobody of ours is between a message's rename and its line in maildirsize
        try:
            used, stamps = count_usage(top, courier=self._courier)
            write_usage(top, limits, used, stamps, self.file_mode, self.give)
            return used
        finally:
            unlock(top)

    def _write_all(self, items: list[Item]) -> list[Any]:
        """Writes every file, syncs them, renames them, then syncs each directory once: None, an Outcome or an OSError for each item.

        Step by step over the whole batch: a file system with a journal commits once for all of a step, where a rename between
        two syncs would make it commit for each.
        """
        results: list[Any] = [None] * len(items)
        opened = Opened(self)
        try:
            written, touched = self._write_each(items, results, opened)
            for one in written:
                start_writing_out(one.file)
            for one in written:
                try:
                    try:
                        os.fsync(one.file)
                    finally:
                        _close(one.file)
                except OSError as error:
                    results[one.number] = error
            locks = self._locks(items, opened)
            for one in written:
                number, place = one.number, one.place
                try:
                    if results[number] is None:
                        self._put(one, items[number])
                        touched.setdefault(place.new, []).append(number)
                except OSError as error:
                    results[number] = error
                if results[number] is not None:
                    remove(place.tmp, one.temporary)
            for new, numbers in touched.items():
                try:
                    os.fsync(new)
                except OSError as error:
                    for number in numbers:
                        results[number] = error
            if locks:
                self._count(items, results, written, locks)
        finally:
            opened.close()
        return results

    def _write_each(self, items: list[Item], results: list[Any], opened: Opened) -> tuple[list[Written], dict[int, list[int]]]:
        """Writes what is not there yet; the files, and for each new/ that an earlier attempt may not have synced who needs that."""
        written: list[Written] = []
        touched: dict[int, list[int]] = {}
        used: dict[tuple[str, ...], Reserved] = {}
        found = self._find(items, results, opened)
        for number, item in enumerate(items):
            if results[number] is not None:
                continue
            try:
                place = opened.place(item)
                if number in found:
                    touched.setdefault(place.new, []).append(number)
                    if item.limits is not None:  # whether it was counted nobody knows
                        forget_usage(opened.directory(item.path))
                    continue
                if item.limits is not None:
                    size = item.message.size + len(item.top)
                    full = self._reserve(item.path, item.limits, size, used, opened)
                    if full is not None:
                        results[number] = full
                        continue
                written.append(self._write(number, item, place))
            except OSError as error:
                missing = isinstance(error, FileNotFoundError) and not self.config.create
                results[number] = self._missing() if missing else error
        return written, touched

    @staticmethod
    def _find(items: list[Item], results: list[Any], opened: Opened) -> set[int]:
        """Which items an earlier attempt wrote: they are in new/, or in cur/ under any flags, looked at in that order."""
        found: set[int] = set()
        absent: dict[Place, list[int]] = {}
        for number, item in enumerate(items):
            if item.seek:
                try:
                    place = opened.place(item)
                    absent.setdefault(place, []).append(number)
                    os.stat(f"{item.name},S={sum(map(len, _content(item)))}", dir_fd=place.new, follow_symlinks=False)
                    found.add(number)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    results[number] = error
        for place, numbers in absent.items():
            try:
                if not found.issuperset(numbers):
                    names = opened.read_messages(place)
                    found.update(number for number in numbers if items[number].name in names)
            except OSError as error:
                for number in numbers:
                    results[number] = error
        return found

    def _reserve(self, path: tuple[str, ...], limits: Limits, size: int, used: dict[tuple[str, ...], Reserved],
                 opened: Opened) -> gmta.Outcome | None:
        """Takes room for a message of the batch; an Outcome where there is none."""
        reserved = used.get(path)
        if reserved is None:
            reserved = used[path] = Reserved(self.usage(opened.readable(path), limits, size, 1))
        octets, messages = reserved.octets + size, reserved.messages + 1
        if not limits.hold(reserved.used, octets, messages) and not reserved.used.trusted:
            reserved.used = self.usage(opened.readable(path), limits, octets, messages)
        if not limits.hold(reserved.used, octets, messages):
            return self._full(limits, size)
        reserved.octets, reserved.messages = octets, messages
        return None

    def _locks(self, items: list[Item], opened: Opened) -> dict[tuple[str, ...], int]:
        """The mailboxes with a quota, open, each with a shared lock: nobody counts before their lines are written."""
        locks: dict[tuple[str, ...], int] = {}
        for item in items:
            if item.limits is not None and item.path not in locks:
                try:
                    locks[item.path] = opened.readable(item.path)
                    lock(locks[item.path])
                except OSError:
                    continue  # its item has failed already, or its file is counted next time
        return locks

    def _count(self, items: list[Item], results: list[Any], written: list[Written], locks: dict[tuple[str, ...], int]) -> None:
        """Adds what was delivered to each maildirsize: a line a mailbox, in one write."""
        sums: dict[tuple[str, ...], list[int]] = {}
        for one in written:
            item = items[one.number]
            if results[one.number] is None and item.limits is not None:
                sums.setdefault(item.path, [0, 0])
                if not (self._courier and item.folder == ".Trash"):
                    sums[item.path][0] += one.size
                    sums[item.path][1] += 1
        for path, (size, count) in sums.items():
            add_usage(locks[path], size, count)

    def _write(self, number: int, item: Item, place: Place) -> Written:
        """Writes the file in tmp/, still to be synced."""
        temporary = item.name
        for attempt in range(1, _NAMES + 1):
            try:
                file = os.open(temporary, _NEW, self.file_mode, dir_fd=place.tmp)
                break
            except FileExistsError:
                if attempt == _NAMES:
                    raise
                if item.seek and attempt == 1:
                    os.unlink(temporary, dir_fd=place.tmp)  # a crash left it
                else:
                    temporary = f"{item.name}-{attempt}"
        size = 0
        try:
            self.give(file, self.file_mode)
            for piece in _content(item):
                write_all(file, piece)
                size += len(piece)
                if len(piece) >= LARGE:
                    start_writing_out(file)
        except OSError:
            _close(file)
            remove(place.tmp, temporary)
            raise
        return Written(number, place, temporary, file, size)

    @staticmethod
    def _put(one: Written, item: Item) -> None:
        """Renames the file into new/. Where the name is taken, by the same message or by another one, neither is lost."""
        place, stem = one.place, item.name
        for attempt in range(1, _NAMES + 1):
            name = f"{stem},S={one.size}"
            try:
                rename_new(place.tmp, one.temporary, place.new, name)
                return
            except FileExistsError:
                if _same(place.tmp, one.temporary, place.new, name):
                    remove(place.tmp, one.temporary)
                    return
                if attempt == _NAMES:
                    raise
                stem = f"{item.name}-{attempt}"

    def give(self, file: int, mode: int) -> None:
        """Sets owner and mode of something just made, where its making did not."""
        if self.owner is not None:
            os.fchown(file, *self.owner)
        if mode & 0o7077:  # what a umask may have taken
            os.fchmod(file, mode)


class Opened:
    """The directories that a batch has to do with, each opened once, by its name within the one above it."""

    def __init__(self, maildir: Maildir) -> None:
        self._maildir = maildir
        self._follow = 0 if maildir.config.symlinks else os.O_NOFOLLOW
        self._open: dict[tuple[str, ...], int] = {}
        self._readable: dict[tuple[str, ...], int] = {}
        self._places: dict[tuple[tuple[str, ...], str], Place] = {}

    def close(self) -> None:
        """Closes all."""
        for file in (*self._open.values(), *self._readable.values()):
            _close(file)

    def directory(self, path: tuple[str, ...], make: bool = False, flags: int = _PASS) -> int:
        """An open directory; raises OSError, FileNotFoundError where it is missing and not to be made."""
        file = self._open.get(path)
        if file is None:
            if path:
                above = self.directory(path[:-1], make)
                try:
                    file = os.open(path[-1], flags | self._follow, dir_fd=above)
                except FileNotFoundError:
                    if not make:
                        raise
                    self._make(above, path[-1])
                    file = os.open(path[-1], flags | self._follow, dir_fd=above)
            else:
                file = self._base(make)
            self._open[path] = file
        return file

    def readable(self, path: tuple[str, ...], make: bool = False) -> int:
        """The same, to be read, locked or synced."""
        file = self._readable.get(path)
        if file is None:
            file = self._readable[path] = os.open(".", _READ, dir_fd=self.directory(path, make))
        return file

    def _base(self, make: bool) -> int:
        base = self._maildir.base
        try:
            return os.open(base, _PASS)
        except FileNotFoundError:
            if not make:
                raise
        missing = [base]
        while not os.path.isdir(os.path.dirname(missing[-1])):
            missing.append(os.path.dirname(missing[-1]))
        for path in reversed(missing):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass
            sync_directory(os.path.dirname(path))
        return os.open(base, _PASS)

    def _make(self, above: int, name: str) -> None:
        """Makes a directory whose name is durable then, whoever made it first."""
        maildir = self._maildir
        try:
            os.mkdir(name, maildir.directory_mode, dir_fd=above)
        except FileExistsError:
            pass
        else:
            if maildir.owner is not None or maildir.directory_mode & 0o7077:
                made = os.open(name, _READ | os.O_NOFOLLOW, dir_fd=above)
                try:
                    maildir.give(made, maildir.directory_mode)
                finally:
                    _close(made)
        file = os.open(".", _READ, dir_fd=above)
        try:
            os.fsync(file)
        finally:
            _close(file)

    def place(self, item: Item) -> Place:
        """tmp/ and new/ of an item's Maildir, or of its folder where that is there or to be made."""
        key = (item.path, item.folder)
        place = self._places.get(key)
        if place is None:
            place = self._maildir_at(item.path, self._maildir.config.create)
            if item.folder:
                path = self._folder(item)
                if path is not None:
                    place = self._maildir_at(path, item.make_folder)
            self._places[key] = place
        return place

    def _maildir_at(self, path: tuple[str, ...], make: bool) -> Place:
        top = self.directory(path, make)
        try:
            return Place(path, self.directory((*path, "tmp")), self.directory((*path, "new"), flags=_READ))
        except FileNotFoundError:
            for part in _PARTS:
                self._make(top, part)
        return Place(path, self.directory((*path, "tmp")), self.directory((*path, "new"), flags=_READ))

    def _folder(self, item: Item) -> tuple[str, ...] | None:
        """The path of an item's folder, or None where there is none and none is to be made."""
        path = (*item.path, item.folder)
        try:
            self.directory(path)
            return path
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise
            if item.make_folder:
                file = os.open("maildirfolder", os.O_WRONLY | os.O_CREAT | OTHERS, self._maildir.file_mode,
                               dir_fd=self.directory(path, make=True))  # what marks a folder in Maildir++
                try:
                    self._maildir.give(file, self._maildir.file_mode)
                finally:
                    _close(file)
                return path
        if self._maildir.config.fold_case:
            with os.scandir(self.readable(item.path)) as entries:
                for entry in entries:
                    if entry.name.lower() == item.folder.lower() and entry.is_dir(follow_symlinks=False):
                        return (*item.path, entry.name)
        return None

    def read_messages(self, place: Place) -> set[str]:
        """The messages in cur/ of a place, by their names without size and flags."""
        with os.scandir(self.directory((*place.path, "cur"), make=True, flags=_READ)) as entries:
            return {entry.name.partition(":")[0].partition(",")[0] for entry in entries}


def _content(item: Item) -> Iterator[bytes]:
    """The file's octets with LF line ends."""
    message = item.message
    top = item.top
    if not message.separator and message.body.size:
        top += b"" if message.header else b"\n"
    return with_lf(message.chunks(), top)


def _same(directory: int, name: str, other_directory: int, other_name: str) -> bool:
    """Whether two files hold the same octets."""
    flags = os.O_RDONLY | OTHERS
    with open(os.open(name, flags, dir_fd=directory), "rb") as one, open(os.open(other_name, flags, dir_fd=other_directory), "rb") as other:
        while True:
            piece = one.read(LARGE)
            if piece != other.read(LARGE):
                return False
            if not piece:
                return True


def safe(text: str, fold_case: bool = True, form: str = "nfc") -> str:
    """One path component for part of an address: "/", "%", a leading dot and what can't be printed as %XX of its UTF-8."""
    if text.isascii():
        text = text.lower() if fold_case else text
        if text.isalnum():
            return text
    else:
        text = _normal(text, form)
        if fold_case:
            text = _normal(text.lower(), form)
    out = "".join(char if char.isprintable() and char not in "/%" else _escaped(char) for char in text)
    return "%2E" + out[1:] if out.startswith(".") else out


def _normal(text: str, form: str) -> str:
    if form == "none":
        return text
    return unicodedata.normalize("NFKC" if form == "nfkc" else "NFC", text)


def _escaped(char: str) -> str:
    return "".join(f"%{octet:02X}" for octet in char.encode("utf-8", "surrogatepass"))


def folder_name(detail: str) -> str:
    """The Maildir++ folder of a detail (names in modified UTF-7, RFC 3501 section 5.1.3), "" where it can't have one."""
    if len(detail) > 64 or "/" in detail or not detail.isprintable() or "" in detail.split("."):
        return ""
    out = "."
    for plain, coded in re.findall(r"([ -~]+)|([^ -~]+)", detail):
        if plain:
            out += plain.replace("&", "&-")
        else:
            out += f"&{base64.b64encode(coded.encode('utf-16-be')).decode('ascii').rstrip('=').replace('/', ',')}-"
    return out


def _split_path(path: str, *, fixed: bool = True) -> tuple[str, tuple[str, ...]]:
    """(fixed part, templates of the directories below it); raises ValueError for other words in braces. fixed: whether there is one."""
    try:
        path.format(local="", domain="", user="", detail="")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"path: expected only {{local}}, {{domain}}, {{user}} and {{detail}} in braces, and {{home}} first where there is `user` ({error})") from error
    parts = path.split("/")
    end = next((index for index, part in enumerate(parts) if "{" in part or "}" in part), len(parts)) if fixed else 0
    return os.path.abspath("/".join(parts[:end]) or "/"), tuple(part for part in parts[end:] if part)


def _account(name: str) -> Account:
    """An account of this machine; raises ValueError where there is none, OSError where that can't be told."""
    account = find_account(name)
    if account is None:
        raise ValueError(f"user: there is no account {name}")
    return account


def _home(account: Account) -> str:
    """The account's home; raises ValueError where passwd(5) has none for it, or one below wherever we happen to be."""
    if not os.path.isabs(account.home):
        raise ValueError("user: the account has no home directory")
    return account.home


def _owner(text: str) -> tuple[int, int] | None:
    """(uid, gid) of USER or USER:GROUP; raises ValueError."""
    if not text:
        return None
    user, _, group = text.partition(":")
    try:
        entry = pwd.getpwnam(user)
        return entry.pw_uid, grp.getgrnam(group).gr_gid if group else entry.pw_gid
    except KeyError as error:
        raise ValueError(f"owner: {error.args[0]}") from error


def _outcome(error: OSError) -> gmta.Outcome:
    """What a fault of the file system means: another try, never a loss, but for a name that no file system takes."""
    if error.errno == errno.ENAMETOOLONG:
        return _NO_NAME
    text = f"Mailbox can't be written: {error.strerror or 'I/O error'}"
    if error.errno in NO_ROOM:
        return gmta.deferred(text, code=452, enhanced="4.3.1")
    return gmta.deferred(text, enhanced="4.3.0")


class _Factory:
    """Makes transports and knows them."""

    Config = TransportConfig

    def __init__(self, made: dict[str, Maildir]) -> None:
        self._made = made

    def __call__(self, name: str, config: TransportConfig, services: Any) -> Maildir:
        """The transport of a section."""
        transport = self._made[name] = Maildir(name, config, services)
        if transport.has_quota and "maildir" not in services.config.plugins.enable:
            services.log.warning("quota is judged at delivery only: maildir is not in [plugins] enable", transport=name)
        return transport


class Plugin:
    """Offers the transport type; at RCPT, looks into the mailbox that a recipient's mail will go to."""

    def __init__(self, config: Config, services: Any) -> None:
        self._transports: dict[str, Maildir] = {}
        self._router: Any = None
        self._rooms: dict[str, Any] = {}  # the same, or what asks the delivery agent in their place

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"maildir": _Factory(self._transports)}

    @hookimpl
    def on_worker_started(self, worker: Any) -> None:
        """Learns who says which transport a recipient goes to, where there is anything to look for."""
        if any(transport.has_quota or not transport.config.create for transport in self._transports.values()):
            self._router = worker.scheduler.router
            self._rooms = {name: transport for name, transport in worker.plugins.transports.items() if name in self._transports}

    @hookimpl
    def check_rcpt(self, session: Any, transaction: Any, recipient: Any) -> Verdict | None:
        """552 5.2.2 or 452 4.2.2 where the mailbox is full, 550 5.1.1 or 450 4.2.0 where there has to be one and is none."""
        if self._router is None:
            return None
        address = recipient.address
        state = RecipientState(0, address, transport=recipient.transport or "", fixed_transport=recipient.transport is not None)
        route = self._router.route(Envelope(transaction.id, transaction.sender, [state]), state)
        transport = self._rooms.get(route[0]) if isinstance(route, tuple) else None
        if transport is None:
            return None
        try:
            outcome = transport.room(address, transaction.size or 0)
        except (OSError, ValueError):
            return None  # its delivery will tell
        if outcome is None:
            return None
        reply = outcome.reply
        make = gmta.reject if reply.permanent else gmta.defer
        return make(reply.text, reply.code, reply.enhanced or "")
