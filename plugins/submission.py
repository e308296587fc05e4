"""Makes what mail programs hand in fit to go out: what is missing is added, what must not go out is taken away.

Hooks: check_message, edit_message. Concerns sessions of submission listeners and mail of this machine's programs, never port 25. What
is added stands on top of the header; all other octets stay as they are. What was done is in the message's history (`gmta trace`).

- Date and Message-ID are added where they are missing (RFC 6409 section 8.2, 8.3).
- Without From: `missing_from = refuse` answers 550 5.6.0, `add` takes the envelope sender. Two From fields, or two Date, Sender or
  Message-ID fields, are refused (RFC 5322 section 3.6). Programs of this machine get the envelope sender always.
- Bcc and Resent-Bcc are removed, with who stands in them (`remove_bcc = no` leaves them).
- `sender = add` puts the user into Sender where From names somebody else (RFC 5322 section 3.6.2); the user has to be an address.
- Octets beyond ASCII in the header need SMTPUTF8 (RFC 6531 section 3.2): `eight_bit_headers = refuse` answers 550 5.6.7. Programs
  of this machine are spared that.

Keys of `[plugin:submission]`: `missing_from = refuse|add`, `remove_bcc = yes`, `sender = no|add`, `eight_bit_headers = refuse|allow`.
Replies: 550 5.6.0, 550 5.6.7. Put it before plugins that read or edit messages. RFC 6409 section 8.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Literal

from pydantic import Field

from gmta import PluginConfig, Verdict, hookimpl, reject
from gmta.mail.address import Address, AddressError
from gmta.mail.fields import mailboxes
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.mail.trace import date

ROLES = ("submission", "local")
_ONCE = re.compile(rb"^(From|Date|Sender|Message-ID)[ \t]*:", re.I | re.M)  # RFC 5322 section 3.6
_BCC = ("bcc", "resent-bcc")


class Config(PluginConfig):
    """Keys of [plugin:submission]."""

    missing_from: Literal["refuse", "add"] = Field("refuse", description="what becomes of a message without From")
    remove_bcc: bool = Field(True, description="Bcc and Resent-Bcc are taken out")
    sender: Literal["no", "add"] = Field("no", description="Sender names the user where From names another")
    eight_bit_headers: Literal["refuse", "allow"] = Field("refuse", description="header fields beyond ASCII without SMTPUTF8")


class Plugin:
    """Judges and mends each message for itself; keeps nothing."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """550 for what can't be mended."""
        if session.role not in ROLES:
            return None
        header = message.header
        if self._config.eight_bit_headers == "refuse" and session.role == "submission" and not header.isascii() and not transaction.smtputf8:
            return reject("Header fields beyond ASCII need SMTPUTF8", 550, "5.6.7")  # RFC 6531 section 3.2
        seen = [name.lower() for name in _ONCE.findall(header)]
        for name in dict.fromkeys(seen):
            if seen.count(name) > 1:
                return reject(f"The message has more than one {name.decode().title()} field", 550, "5.6.0")
        if b"from" not in seen and session.role == "submission" and (self._config.missing_from == "refuse" or not transaction.sender):
            return reject("The message has no From field", 550, "5.6.0")
        return None

    @hookimpl
    def edit_message(self, session: Session, transaction: Transaction, message: Message) -> Message | None:
        """The message with what it lacks and without what it must not have, or None where nothing is to be done."""
        if session.role not in ROLES:
            return None
        present = {name.lower() for name, _ in message.fields()}
        added: list[tuple[str, str]] = []
        if "from" not in present and transaction.sender:
            added.append(("From", f"<{transaction.sender}>"))
        sender = self._sender(session, message) if self._config.sender == "add" and "sender" not in present and "from" in present else None
        if sender is not None:
            added.append(("Sender", f"<{sender}>"))
        if "date" not in present:
            added.append(("Date", date(self._services.clock())))
        if "message-id" not in present:
            added.append(("Message-ID", f"<{transaction.id.lower()}.{secrets.token_hex(8)}@{self._services.hostname}>"))
        doomed = {(name, raw) for name, raw in message.fields() if name.lower() in _BCC} if self._config.remove_bcc else set()
        if not added and not doomed:
            return None
        made = Message(message.header, message.separator, message.body)
        if doomed:
            made.drop(frozenset(doomed))
            transaction.changes.append(f"{' and '.join(sorted({name for name, _ in doomed}))} removed")
        for name, value in reversed(added):
            made.prepend(name, value)
        transaction.changes.extend(f"{name} added" for name, _ in added)
        return made

    @staticmethod
    def _sender(session: Session, message: Message) -> Address | None:
        """The user, where it is an address and not the one author (RFC 5322 section 3.6.2)."""
        try:
            user = Address.parse(session.user or "")
            authors = [address for value in message.values("From") for address in mailboxes(value)]
        except (AddressError, ValueError):
            return None
        if not user or not user.domain or [(one.mailbox.lower(), one.host) for one in authors] == [(user.mailbox.lower(), user.host)]:
            return None
        return user
