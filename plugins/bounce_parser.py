"""Reads delivery reports and complaints that come to our own VERP addresses, and leaves what they say to other plugins.

Hooks: permit_rcpt, check_message.  Keys of [plugin:bounce_parser]: addresses, separator, transport, accept.
VERP: mail to joe@far.example goes out from bounces+joe=far.example@example.test, so that whatever comes back tells by its recipient
whom it is about. What is found is the transaction's note `report`, a list of events {event: bounced|deferred|delivered|complained, …},
and a log line each; enable it in front of plugins that read the note, and of those that judge names in local domains.

Replies: none of its own; recipients of that form are permitted, for `transport` where that is set. Mail that is no report, or one that
can't be read, passes like any other. RFC 3464, RFC 5965, RFC 6522, RFC 6533.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from gmta import PluginConfig, Verdict, accept, hookimpl
from gmta.mail import mime
from gmta.mail.address import Address, AddressError
from gmta.mail.message import Message
from gmta.mail.session import Recipient, Session, Transaction

NOTE = "report"
MAX_STATUS = 256 * 1024  # octets of a report's machine-readable part
MAX_EVENTS = 100
MAX_TEXT = 500
STATUS_TYPES = ("message/delivery-status", "message/global-delivery-status")
ORIGINAL_TYPES = ("message/rfc822", "text/rfc822-headers", "message/global", "message/global-headers")
ACTIONS = (("failed", "bounced"), ("delayed", "deferred"), ("delivered", "delivered"), ("relayed", "delivered"), ("expanded", "delivered"))

_BLANK = re.compile(rb"\r?\n(?:[ \t]*\r?\n)+")


class Config(PluginConfig):
    """Keys of [plugin:bounce_parser]."""

    addresses: list[str] = Field([], description="where reports come: each with separator and anything behind it")
    separator: str = Field("+", min_length=1, max_length=1, description="what stands behind the local part")
    transport: str = Field("", description="where the reports go; default: as [route] says")
    accept: bool = Field(True, description="permit these recipients")

    @field_validator("addresses")
    @classmethod
    def _addresses(cls, value: list[str]) -> list[str]:
        for one in value:
            Address.parse(one)
        return value


def read_report(message: Message) -> list[dict[str, str]]:
    """The events that a report tells of; none where the message is no report. Raises OSError where its body can't be read."""
    with mime.parts_of(message) as root:
        if not root.type.startswith("multipart/"):
            return []
        events: list[dict[str, str]] = []
        about: dict[str, str] = {}
        for part in root.walk():
            if part.type in STATUS_TYPES and not events:
                events = _delivery_status(_start(part))
            elif part.type == "message/feedback-report" and not events:
                events = _feedback(_start(part))
            elif part.type in ORIGINAL_TYPES and not about:
                header = _fields(_start(part).partition(b"\r\n\r\n")[0])
                about = {"message_id": _text(header.get("message-id", b"")), "subject": _text(header.get("subject", b""))}
        return [{**event, **about} for event in events]


def _start(part: mime.Part) -> bytes:
    """The first octets of a part's content."""
    found = b""
    for piece in part.octets():
        found += piece
        if len(found) >= MAX_STATUS:
            break
    return found[:MAX_STATUS]


def _fields(block: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, value in mime.header_fields(block):
        found.setdefault(name.lower(), value)
    return found


def _text(value: bytes) -> str:
    return mime.field_text(value)[0][:MAX_TEXT]


def _typed(value: bytes) -> str:
    """What stands behind the type: an address, a host or a diagnostic text (RFC 3464 section 2.1.2)."""
    text = _text(value)
    kind, mark, rest = text.partition(";")
    return (rest if mark and "@" not in kind else text).strip().strip("<>")


def _delivery_status(content: bytes) -> list[dict[str, str]]:
    """One event a recipient (RFC 3464 section 2)."""
    blocks = [_fields(block) for block in _BLANK.split(content.strip(b"\r\n \t"), MAX_EVENTS + 1)[:MAX_EVENTS + 1]]
    whole = {} if "final-recipient" in blocks[0] else blocks[0]
    events = []
    for block in blocks:
        action = _text(block.get("action", b"")).lower().split("(")[0].strip()
        kind = next((event for word, event in ACTIONS if word == action), "")
        if not kind or not block.keys() & {"final-recipient", "original-recipient"}:
            continue
        events.append({
            "event": kind, "reported": _typed(block.get("original-recipient") or block.get("final-recipient", b"")),
            "final_recipient": _typed(block.get("final-recipient", b"")), "action": action, "status": _text(block.get("status", b"")).split(" ")[0],
            "reply": _typed(block.get("diagnostic-code", b"")), "remote": _typed(block.get("remote-mta", b"")),
            "reporter": _typed(whole.get("reporting-mta", b"")), "envid": _text(whole.get("original-envelope-id", b""))})
    return events


def _feedback(content: bytes) -> list[dict[str, str]]:
    """A complaint, unless its sender says that the mail is wanted (RFC 5965 section 3.1, RFC 6430)."""
    fields = _fields(content)
    kind = _text(fields.get("feedback-type", b"")).lower()
    if not kind or kind in ("not-spam", "opt-out-list"):
        return []
    return [{"event": "complained", "reported": _text(fields.get("original-rcpt-to", b"")).strip("<>"), "feedback_type": kind,
             "reporter": _text(fields.get("reporting-mta", b"") or fields.get("user-agent", b"")), "source_ip": _text(fields.get("source-ip", b""))}]


def verp_recipient(detail: str) -> str:
    """joe@far.example of joe=far.example; what is not of that form as it is."""
    local, mark, domain = detail.rpartition("=")
    try:
        return str(Address.make(local, domain)) if mark else detail
    except AddressError:
        return detail


class Plugin:
    """Knows the addresses, and reads what comes to them."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._bases = frozenset((address.mailbox.lower(), address.host) for address in map(Address.parse, config.addresses))
        if config.transport and config.transport not in services.config.transports:
            raise ValueError(f"transport: there is no [transport:{config.transport}]")

    def _detail(self, address: Address) -> str | None:
        """What stands behind the separator in an address of ours, None in any other."""
        base, mark, detail = address.mailbox.partition(self._config.separator)
        return detail if mark and detail and (base.lower(), address.host) in self._bases else None

    @hookimpl
    def permit_rcpt(self, session: Session, transaction: Transaction, recipient: Recipient) -> Verdict | None:
        """Takes what comes to the addresses."""
        if not self._config.accept or self._detail(recipient.address) is None:
            return None
        return accept(transport=self._config.transport or None)

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> None:
        """Leaves the events of a report as a note."""
        ours = [(recipient.original, detail) for recipient in transaction.recipients if (detail := self._detail(recipient.original)) is not None]
        if not ours:
            return
        try:
            events = read_report(message)
        except OSError as error:
            self._services.log.error("report can't be read", id=transaction.id, error=str(error))
            return
        for address, detail in ours:
            found = self._about(events, address, verp_recipient(detail))
            for event in found:
                self._services.log.info("report read", id=transaction.id, event=event["event"], recipient=event["recipient"],
                                        status=event.get("status"), reply=event.get("reply"))
            if found:
                transaction.notes[NOTE] = transaction.notes.get(NOTE, []) + found

    @staticmethod
    def _about(events: list[dict[str, str]], address: Address, recipient: str) -> list[dict[str, str]]:
        """The event about the recipient that the address names: reports may name others that it was sent on to."""
        named = [event for event in events if event["reported"].lower() == recipient.lower()]
        bad = [event for event in events if event["event"] in ("bounced", "complained")]
        return [{**event, "source": "report", "recipient": recipient, "address": str(address)} for event in (named or bad or events)[:1]]
