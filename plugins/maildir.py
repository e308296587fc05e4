"""Transport `maildir`: writes messages into Maildirs, synced, each once.

Hooks: get_transports.  Keys of [transport:NAME]: path, a template with {local}, {domain}, {user} and {detail};
detail_separator.  Replies: 250 2.1.5 delivered; 452 4.3.1 no room, 451 4.3.0 any other fault of the file system (both deferred).

A file is written in tmp/, synced, renamed into new/, and the directory synced. Its name derives from queue id and recipient,
so a delivery repeated after a crash finds the first one, in new/ or (moved there by a reader) in cur/. Lines end in LF, as
Maildir readers expect. Messages cross to a native thread in batches, which wait some milliseconds for company, so that
intake's commits get the disk first. The rest of the message is as it came, below Return-Path and Delivered-To
(RFC 5321 section 4.4, RFC 9228).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import IncrementalNewlineDecoder
from typing import Any, NamedTuple

from pydantic import Field

import gmta
from gmta import PluginConfig, hookimpl
from gmta.mail.address import Address
from gmta.mail.message import Message
from gmta.services.files import NO_ROOM, start_writing_out, sync_directory, write_all

LINGER_S = 0.010
BATCH = 32
LARGE = 64 * 1024  # octets from which a piece begins to be written out at once
_DONE = gmta.delivered("Delivered to mailbox", enhanced="2.1.5")


class Config(PluginConfig):
    """[plugin:maildir] has no keys of its own."""


class Item(NamedTuple):
    """One file to write; seek: look whether an earlier attempt wrote it."""

    directory: str
    name: str
    top: bytes
    message: Message
    seek: bool

    @property
    def temporary(self) -> str:
        """Where it is written until it is whole."""
        return f"{self.directory}/tmp/{self.name}"


class Maildir:
    """The transport."""

    class Config(PluginConfig):
        """[transport:NAME] of type maildir."""

        path: str = Field("var/mail/{domain}/{local}", description="directory of a mailbox: {local} {domain} {user} {detail}")
        detail_separator: str = Field("+", description="what parts {user} from {detail}; empty for none")

    concurrency = 128

    def __init__(self, name: str, config: Config, services: Any) -> None:
        self.name = name
        self._services = services
        self._path = os.path.join(services.config.base, config.path)  # relative to the configuration file
        self._separator = config.detail_separator
        try:
            self._path.format(local="", domain="", user="", detail="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"path: expected only {{local}}, {{domain}}, {{user}} and {{detail}} in braces ({error})") from error
        self._host = services.hostname.replace("/", "\\057").replace(":", "\\072")
        self._known: set[str] = set()  # touched by the native thread alone
        self._batch: Any = None

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """Writes a file a recipient."""
        batch = self._batch
        if batch is None:
            batch = self._batch = self._services.batch(f"maildir:{self.name}", self._write_all, max_items=BATCH, linger_s=LINGER_S)
        outcomes = {}
        for recipient in delivery.recipients:
            try:
                batch.submit(self._item(delivery, recipient))
            except OSError as error:
                outcomes[recipient.number] = _outcome(error)
            else:
                outcomes[recipient.number] = _DONE
        return outcomes

    def _item(self, delivery: Any, recipient: Any) -> Item:
        envelope = delivery.envelope
        top = f"Return-Path: <{envelope.sender}>\nDelivered-To: {recipient.address}\n"
        name = f"{int(envelope.received_at)}.{envelope.id}R{recipient.number}.{self._host}"
        return Item(self.directory(recipient.address), name, top.encode("utf-8", "surrogateescape"), delivery.message,
                    not delivery.first_attempt)

    def directory(self, address: Address) -> str:
        """The Maildir of an address; every part of the address stays one path component."""
        user, detail = address.split_detail(self._separator)
        return self._path.format(local=safe(address.mailbox), domain=safe(address.host or self._services.hostname),
                                 user=safe(user), detail=safe(detail))

    # --- in the native thread ---------------------------------------------------------------------------------------

    def _write_all(self, items: list[Item]) -> list[OSError | None]:
        """Writes every file, syncs them, renames them, then syncs each directory once.

        Step by step over the whole batch: a file system with a journal commits once for all of a step, where a rename between
        two syncs would make it commit for each.
        """
        results: list[OSError | None] = [None] * len(items)
        touched: dict[str, list[int]] = {}
        written: list[tuple[int, int]] = []
        for number, item in enumerate(items):
            try:
                if item.seek and self._find(item):
                    touched.setdefault(item.directory, []).append(number)  # its directory may not be synced yet
                else:
                    written.append((number, self._write(item)))
            except OSError as error:
                results[number] = error
        for _, file in written:
            start_writing_out(file)
        for number, file in written:
            try:
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
            except OSError as error:
                results[number] = error
        for number, _ in written:
            item = items[number]
            try:
                if results[number] is None:
                    os.rename(item.temporary, f"{item.directory}/new/{item.name}")  # that name can only hold the same message
                    touched.setdefault(item.directory, []).append(number)
            except OSError as error:
                results[number] = error
            if results[number] is not None:
                _remove(item.temporary)
        for directory, numbers in touched.items():
            try:
                sync_directory(f"{directory}/new")
            except OSError as error:
                for number in numbers:
                    results[number] = error
        return results

    def _write(self, item: Item) -> int:
        """Writes tmp/NAME, in a Maildir made where it is missing; the open file, still to be synced."""
        directory = item.directory
        if directory not in self._known:
            self._make(directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC  # a crash may have left it
        try:
            file = os.open(item.temporary, flags, 0o600)
        except FileNotFoundError:  # removed since it was made
            self._known.discard(directory)
            self._make(directory)
            file = os.open(item.temporary, flags, 0o600)
        try:
            for piece in _content(item):
                write_all(file, piece)
                if len(piece) >= LARGE:
                    start_writing_out(file)
        except OSError:
            os.close(file)
            _remove(item.temporary)
            raise
        return file

    def _make(self, directory: str) -> None:
        """Makes a Maildir with the directories above it, each entry synced."""
        missing = []
        path = os.path.abspath(directory)
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        made = [*reversed(missing), *(f"{directory}/{part}" for part in ("tmp", "new", "cur"))]
        for path in made:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                continue
            sync_directory(os.path.dirname(path))
        if len(self._known) > 100_000:
            self._known.clear()
        self._known.add(directory)

    @staticmethod
    def _find(item: Item) -> bool:
        """Whether an earlier attempt's file is in new/, or in cur/ under any flags."""
        if os.path.lexists(f"{item.directory}/new/{item.name}"):
            return True
        try:
            with os.scandir(f"{item.directory}/cur") as entries:
                return any(entry.name.partition(":")[0] == item.name for entry in entries)
        except FileNotFoundError:
            return False


def _content(item: Item) -> Iterator[bytes]:
    """The file's octets with LF line ends."""
    message = item.message
    top = item.top
    if not message.separator and message.body.size:
        top += b"" if message.header else b"\n"
    held = b""  # a CR at the end of a piece waits for its LF
    first = True
    for piece in message.chunks():
        if held:
            piece = held + piece
            held = b""
        if piece.endswith(b"\r"):
            piece, held = piece[:-1], b"\r"
        piece = _with_lf(piece)
        if first:
            piece = top + piece
            first = False
        if piece:
            yield piece
    if held:
        yield held


def _with_lf(piece: bytes) -> bytes:
    """CRLF made LF; a bare CR stays. Dropping every CR is ten times as fast where all of them are of line ends."""
    ends = IncrementalNewlineDecoder(None, False)
    ends.decode(piece.decode("latin-1"), final=True)
    return piece.replace(b"\r", b"") if ends.newlines == "\r\n" else piece.replace(b"\r\n", b"\n")


def safe(text: str) -> str:
    """One path component for part of an address: lower case; "/", "%", controls and a leading dot as %XX."""
    text = text.lower()
    if text.isalnum():
        return text
    out = "".join(f"%{ord(char):02X}" if char in "/%" or ord(char) < 32 or char == "\x7f" else char for char in text)
    return "%2E" + out[1:] if out.startswith(".") else out


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _outcome(error: OSError) -> gmta.Outcome:
    """What a fault of the file system means: always another try, never a loss."""
    text = f"Mailbox can't be written: {error.strerror or 'I/O error'}"
    if error.errno in NO_ROOM:
        return gmta.deferred(text, code=452, enhanced="4.3.1")
    return gmta.deferred(text, enhanced="4.3.0")


class Plugin:
    """Offers the transport type."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"maildir": Maildir}
