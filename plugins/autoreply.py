"""Answers mail on behalf of people who are away: at most once in a while to one sender, and never to machines.

Hooks: check_message, on_queued, on_worker_started.  Keys of [plugin:autoreply]: directory, period, skip_tags, addressed.
A text is a file of the directory, named as the mailbox in lower case, in UTF-8: fields Subject, From-Date, Until-Date, an empty line, the
answer. It is sent from the null sender by way of the maildrop, so that limits, signatures and routes hold for it as for any mail.

Replies: none; a message is never held up, and what fails is logged. Sent once in `period` a mailbox and sender, by services.state: where that
forgets, somebody has a second answer. RFC 3834, RFC 5230 section 4.5 and 4.6 (what counts as addressed, who has no answer).
"""

from __future__ import annotations

import os
import quopri
import re
import stat
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from email.header import Header
from typing import Any

from pydantic import Field

from gmta import Duration, PluginConfig, hookimpl
from gmta.config import Path
from gmta.mail import mime, trace
from gmta.mail.address import NULL, Address
from gmta.mail.message import Message
from gmta.mail.session import Recipient, Session, Transaction

CHECK_INTERVAL_S = 1.0
MAX_FILE = 64 * 1024
MAX_PENDING = 1000  # answers to messages that are between check and queue
MAX_SUBJECT = 200
MAX_REFERENCES = 10

# Senders that are machines or lists (RFC 3834 section 2, RFC 5230 section 4.6).
_MACHINE = re.compile(r"(owner-.*|.*-(request|owner|relay|bounces?|confirm|errors)|mailer-daemon|postmaster|(no|do[-_.]?not)[-_.]?reply|bounces?|listserv|majordomo|srs[01]=.*)"
                      r"([+=-].*)?\Z", re.I | re.S)
_LIST_FIELDS = frozenset({"list-id", "list-help", "list-unsubscribe", "list-post", "list-owner", "list-archive", "list-subscribe", "feedback-id", "x-autoreply",
                          "x-autorespond", "x-auto-response-suppress", "x-loop"})
_TO = ("to", "cc", "resent-to", "resent-cc", "bcc")
_MESSAGE_ID = re.compile(r"<[^<>\s]{1,250}>")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")
_NAME = re.compile(r"[^/\x00-\x20]{1,320}\Z")
_FIELD = re.compile(r"(subject|from-date|until-date)\s*:\s*(.*)\Z", re.I)


class Config(PluginConfig):
    """Keys of [plugin:autoreply]."""

    directory: Path = Field("", description="where the texts are, each named as its address in lower case")
    period: Duration = Field(7 * 86400.0, gt=0, description="between two answers to one sender")
    skip_tags: list[str] = Field(["spam", "quarantine"], description="tags of mail that has no answer")
    addressed: bool = Field(True, description="whether the mailbox must be named in To or Cc")


@dataclass(slots=True)
class Due:
    """An answer that is due when the message is queued."""

    mailbox: Address
    sender: Address
    subject: str
    message_id: str
    references: list[str]


class Text:
    """A file's content; raises ValueError where it can't be used. until: the last day."""

    def __init__(self, octets: bytes) -> None:
        lines = octets.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self.subject = ""
        self.first: date | None = None
        self.until: date | None = None
        while lines and (match := _FIELD.match(lines[0])) is not None:
            name, value = match[1].lower(), match[2].strip()
            if name == "subject":
                self.subject = _CONTROLS.sub(" ", value)
            elif name == "from-date":
                self.first = date.fromisoformat(value)
            else:
                self.until = date.fromisoformat(value)
            del lines[0]
        self.body = "\n".join(lines).strip("\n") + "\n"
        if not self.body.strip():
            raise ValueError("there is no answer in it")

    def holds(self, now: float) -> bool:
        """Whether now is between its dates."""
        today = datetime.fromtimestamp(now, UTC).date()
        return (self.first is None or self.first <= today) and (self.until is None or today < self.until + timedelta(days=1))


class Plugin:
    """Sees who is written to, and answers."""

    def __init__(self, config: Config, services: Any) -> None:
        if not config.directory:
            raise ValueError("directory: expected the folder of the texts")
        self._config = config
        self._services = services
        self._names: frozenset[str] = frozenset()
        self._stamp: Any = None
        self._checked_at = float("-inf")
        self._skip = frozenset(config.skip_tags)
        self._due: OrderedDict[str, list[Due]] = OrderedDict()
        self._worker: Any = None

    @hookimpl
    def on_worker_started(self, worker: Any) -> None:
        """The way out is there now."""
        self._worker = worker

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> None:
        """Notes the answers that are due; objects to nothing."""
        names = self._texts()
        if not names or not transaction.sender:  # RFC 3834 section 2: never to the null sender
            return
        away = [one for one in transaction.recipients if str(one.address).lower() in names]
        if not away or _MACHINE.match(transaction.sender.mailbox) is not None:
            return
        fields: dict[str, list[bytes]] = {}
        for name, value in mime.header_fields(message.header):
            fields.setdefault(name.lower(), []).append(value)
        if is_automatic(fields):
            return
        named = {address.lower() for name in _TO for value in fields.get(name, ()) for _, address in mime.addresses(value)}
        found = [self._answer_to(one, transaction.sender, fields) for one in away
                 if one.address != transaction.sender and (not self._config.addressed or self._is_named(one, named))]
        if found:
            self._due[transaction.id] = found
            if len(self._due) > MAX_PENDING:
                self._due.popitem(last=False)

    @hookimpl
    def on_queued(self, envelope: Any) -> None:
        """Answers what was taken."""
        due = self._due.pop(envelope.id, None)
        if due is not None and not self._skip.intersection(envelope.tags):
            self._services.spawn(self._answer_all, envelope.id, due)

    def _texts(self) -> frozenset[str]:
        """The names of the texts, looked at once a second."""
        now = self._services.clock()
        if not 0 <= now - self._checked_at < CHECK_INTERVAL_S:
            self._checked_at = now
            try:
                found = os.stat(self._config.directory)
                stamp = (found.st_mtime_ns, found.st_ino)
                if stamp != self._stamp or now - found.st_mtime < 2 * CHECK_INTERVAL_S:
                    self._names = frozenset(name for name in os.listdir(self._config.directory) if "@" in name and _NAME.match(name))
                    self._stamp = stamp
            except OSError as error:
                if self._stamp != str(error):
                    self._services.log.error("texts of automatic replies can't be listed", error=str(error))
                self._names, self._stamp = frozenset(), str(error)
        return self._names

    @staticmethod
    def _is_named(recipient: Recipient, named: set[str]) -> bool:
        """RFC 5230 section 4.5: the mailbox, the alias it was reached by, or either with a detail."""
        for address in (recipient.address, recipient.original):
            if str(address).lower() in named:
                return True
        user = recipient.address.mailbox.lower()
        return any(local.partition("+")[0] == user and domain == recipient.address.domain.lower()
                   for local, _, domain in (one.rpartition("@") for one in named))

    @staticmethod
    def _answer_to(recipient: Recipient, sender: Address, fields: dict[str, list[bytes]]) -> Due:
        def text(name: str) -> str:
            return _CONTROLS.sub(" ", mime.field_text(fields.get(name, [b""])[0][:20_000])[0])

        ids = _MESSAGE_ID.findall(text("message-id"))[:1]
        return Due(recipient.address, sender, text("subject")[:MAX_SUBJECT], ids[0] if ids else "", _MESSAGE_ID.findall(text("references"))[-MAX_REFERENCES:] + ids)

    def _answer_all(self, queue_id: str, due: list[Due]) -> None:
        for number, one in enumerate(due):
            try:
                self._answer(f"{queue_id}.{number}", queue_id, one)
            except (OSError, ValueError) as error:
                self._services.log.error("no automatic reply", id=queue_id, mailbox=one.mailbox, error=str(error))

    def _answer(self, name: str, queue_id: str, due: Due) -> None:
        """Sends one answer, unless its sender had one lately; raises OSError, ValueError."""
        path = os.path.join(self._config.directory, str(due.mailbox).lower())
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a FIFO there would have the whole worker wait
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("the text is no plain file")
            text = Text(file.read(MAX_FILE))
        if self._worker is None or not text.holds(self._services.clock()):
            return
        key = f"autoreply:{str(due.mailbox).lower()}:{str(due.sender).lower()}"
        if self._services.state.add(key, 1, self._config.period) > 1:
            return
        try:
            self._worker.submit(NULL, [due.sender], self.compose(name, due, text))
        except OSError:
            self._services.state.delete(key)  # who writes again has another chance
            raise
        self._services.log.info("automatic reply", id=queue_id, mailbox=due.mailbox, to=due.sender)

    def compose(self, name: str, due: Due, text: Text) -> bytes:
        """The answer's octets (RFC 3834 section 3)."""
        subject = text.subject or f"Auto: {due.subject}".rstrip()
        lines = [f"From: {due.mailbox}", f"To: {due.sender}", f"Subject: {_encoded(subject)}", f"Date: {trace.date(self._services.clock())}", f"Message-ID: <autoreply.{name}@{self._services.hostname}>",
                 "Auto-Submitted: auto-replied", "X-Auto-Response-Suppress: All"]
        if due.message_id:
            lines.append(f"In-Reply-To: {due.message_id}")
        if due.references:
            lines.append("References: " + "\r\n ".join(due.references))
        body = text.body.encode("utf-8")
        plain = body.isascii() and all(len(line) <= 900 for line in body.split(b"\n"))
        lines += ["MIME-Version: 1.0", f"Content-Type: text/plain; charset={'us-ascii' if plain else 'utf-8'}",
                  f"Content-Transfer-Encoding: {'7bit' if plain else 'quoted-printable'}", "", ""]
        return "\r\n".join(lines).encode("utf-8", "replace") + (body if plain else quopri.encodestring(body)).replace(b"\n", b"\r\n")


def _encoded(text: str) -> str:
    """A subject for a header section, folded (RFC 2047)."""
    return Header(text, None if text.isascii() else "utf-8", header_name="Subject").encode(linesep="\r\n")


def is_automatic(fields: dict[str, list[bytes]]) -> bool:
    """Whether a message says of itself that nobody waits for an answer. fields: raw values by name in lower case."""
    if _LIST_FIELDS & fields.keys():
        return True
    first = {name: b" ".join(fields[name]).strip().lower() for name in ("auto-submitted", "precedence", "content-type", "x-spam-flag") if name in fields}
    if not first.get("auto-submitted", b"no").startswith(b"no"):  # RFC 3834 section 2
        return True
    return (first.get("precedence", b"") in (b"bulk", b"junk", b"list", b"auto_reply") or first.get("content-type", b"").startswith(b"multipart/report")
            or first.get("x-spam-flag", b"").startswith(b"yes"))
