"""Reports to the sender (DSN): multipart/report messages about recipients that failed, are late, or were reached.

Who is told what (NOTIFY), how much of the message goes back (RET), ENVID and ORCPT are here; when a report is due and that
none answers the null sender is the scheduler's business. What remotes said is escaped to ASCII. A report never fails to be
built for a message that can't be read: it then goes without the returned part.
RFC 3461, RFC 3462 (6522), RFC 3463, RFC 3464; RFC 3834 for Auto-Submitted; RFC 6533 for addresses beyond ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gmta.mail.address import NULL
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.trace import date
from gmta.mail.verdict import Outcome

FAILED = "failed"
DELAYED = "delayed"
DELIVERED = "delivered"

MAX_RETURNED = 50 * 1024  # a bigger message goes back as its header (RFC 3461 section 6.2 leaves it to us)
MAX_HEADER = 64 * 1024

_SUBJECTS = {FAILED: "Undelivered mail returned to sender", DELAYED: "Delayed mail (still being retried)",
             DELIVERED: "Successful mail delivery report"}
_INTRODUCTIONS = {
    FAILED: "Your message could not be delivered to the recipients below. It will not be tried again.",
    DELAYED: "Your message has not been delivered yet to the recipients below. This is only a warning:\r\n"
             "you do not need to send it again, delivery is still being tried.",
    DELIVERED: "Your message was delivered or handed on for the recipients below.",
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


def wants(recipient: RecipientState, what: str) -> bool:
    """Whether NOTIFY asks for a report of that kind: SUCCESS, FAILURE or DELAY (RFC 3461 section 4.1)."""
    notify = recipient.notify
    if not notify:
        return what != "SUCCESS"  # RFC 3461 section 4.1: without NOTIFY failures, and delays as we please
    return what in notify


def envelope_for(envelope: Envelope, queue_id: str, size: int, now: float) -> Envelope:
    """The report's own envelope: the null sender to the message's sender (RFC 3461 section 6.1, RFC 5321 section 4.5.5)."""
    recipient = RecipientState(0, envelope.sender, next_attempt_at=now)
    needs_utf8 = not envelope.sender.is_ascii
    return Envelope(queue_id, NULL, [recipient], size, now, body="8BITMIME", smtputf8=needs_utf8,
                    facts={"protocol": "local", "about": envelope.id})


def build(kind: str, envelope: Envelope, pairs: Sequence[tuple[RecipientState, Outcome]], message: Message | None, *,
          hostname: str, queue_id: str, now: float, retry_until: float) -> Message:
    """The report about `pairs` of a message as a Message. kind: FAILED, DELAYED or DELIVERED; times in Unix seconds."""
    boundary = f"={queue_id}/{hostname}"
    utf8 = not envelope.sender.is_ascii or any(not recipient.address.is_ascii for recipient, _ in pairs)
    parts = [
        "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
        + _human(kind, envelope, pairs, hostname, now, retry_until),
        f"Content-Type: message/{'global-delivery-status' if utf8 else 'delivery-status'}\r\n"
        + ("Content-Transfer-Encoding: 8bit\r\n" if utf8 else "") + "\r\n"
        + _machine(kind, envelope, pairs, hostname, retry_until),
    ]
    body = b"".join(f"--{boundary}\r\n{part}\r\n".encode() for part in parts)
    body += _returned(kind, envelope, message, boundary)
    body += f"--{boundary}--\r\n".encode()
    header = "".join(f"{name}: {value}\r\n" for name, value in (
        ("From", f"Mail Delivery System <MAILER-DAEMON@{hostname}>"),
        ("To", f"<{envelope.sender}>"),
        ("Subject", _SUBJECTS[kind]),
        ("Date", date(now)),
        ("Message-ID", f"<{queue_id}@{hostname}>"),
        ("Auto-Submitted", "auto-replied"),  # RFC 3834 section 5
        ("MIME-Version", "1.0"),
        ("Content-Type", f'multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"'),
    ))
    return Message.from_bytes(header.encode() + b"\r\n" + body)


def _human(kind: str, envelope: Envelope, pairs: Sequence[tuple[RecipientState, Outcome]], hostname: str, now: float,
           retry_until: float) -> str:
    """The part for people."""
    lines = [f"This is the mail system at host {hostname}.", "", *_INTRODUCTIONS[kind].split("\r\n"), ""]
    if kind == DELAYED:
        lines += [f"It will be tried until {date(retry_until)}.", ""]
    for recipient, outcome in pairs:
        said = f"host {outcome.remote} said: " if outcome.remote else ""
        lines.append(f"<{recipient.address}>: {_ascii(said + str(outcome.reply))}")
        if recipient.original and recipient.original != str(recipient.address):
            lines.append(f"    (sent to <{recipient.original}>)")
    lines += ["", f"Queue id: {envelope.id}", f"Received: {date(envelope.received_at)}", f"Reported: {date(now)}"]
    return "\r\n".join(lines) + "\r\n"


def _machine(kind: str, envelope: Envelope, pairs: Sequence[tuple[RecipientState, Outcome]], hostname: str,
             retry_until: float) -> str:
    """The message/delivery-status part (RFC 3464 section 2)."""
    lines = []
    if envelope.envid:
        lines.append(f"Original-Envelope-Id: {_ascii(envelope.envid)}")  # RFC 3464 section 2.2.1
    lines += [f"Reporting-MTA: dns; {hostname}", f"Arrival-Date: {date(envelope.received_at)}"]
    for recipient, outcome in pairs:
        lines.append("")
        if recipient.orcpt:
            form, _, address = recipient.orcpt.partition(";")
            lines.append(f"Original-Recipient: {_ascii(form)};{_ascii(address)}")  # RFC 3464 section 2.3.1
        lines.append(f"Final-Recipient: {'rfc822' if recipient.address.is_ascii else 'utf-8'};{recipient.address}")
        action = "relayed" if kind == DELIVERED and outcome.relayed else kind  # RFC 3464 section 2.3.3
        lines += [f"Action: {action}", f"Status: {status_of(kind, outcome)}"]
        if outcome.remote:
            lines.append(f"Remote-MTA: dns; {_ascii(outcome.remote)}")
            lines.append(f"Diagnostic-Code: smtp; {_ascii(str(outcome.reply))[:900]}")
        else:
            lines.append(f"Diagnostic-Code: X-gmta; {_ascii(outcome.reply.text)[:900]}")
        if kind == DELAYED:
            lines.append(f"Will-Retry-Until: {date(retry_until)}")  # RFC 3464 section 2.3.9
    return "\r\n".join(lines) + "\r\n"


def status_of(kind: str, outcome: Outcome) -> str:
    """The Status field: the reply's enhanced code where its class fits the report's, else the class alone (RFC 3463)."""
    wanted = {FAILED: "5", DELAYED: "4", DELIVERED: "2"}[kind]
    enhanced = outcome.reply.enhanced
    return enhanced if enhanced is not None and enhanced[0] == wanted else f"{wanted}.0.0"


def _returned(kind: str, envelope: Envelope, message: Message | None, boundary: str) -> bytes:
    """The third part: the message where RET=FULL or nothing was asked and it is small, else its header."""
    if message is None:
        return b""
    header = message.header
    full = kind == FAILED and envelope.ret != "HDRS" and message.size <= MAX_RETURNED  # RFC 3461 section 4.3
    content = b""
    if full:
        try:
            content = b"".join(message.chunks())
        except OSError:
            full = False
    # RFC 6533 section 3: a header beyond ASCII makes the part message/global
    utf8 = not header.isascii()
    if full:
        name = "message/global" if utf8 else "message/rfc822"
        eight = not content.isascii()
    else:
        name = "message/global-headers" if utf8 else "text/rfc822-headers"
        content = header if len(header) <= MAX_HEADER else header[:header.rfind(b"\n", 0, MAX_HEADER) + 1]
        eight = utf8
    encoding = "Content-Transfer-Encoding: 8bit\r\n" if eight else ""
    head = f"--{boundary}\r\nContent-Type: {name}\r\nContent-Description: Your message\r\n{encoding}\r\n"
    return head.encode() + content + (b"" if content.endswith(b"\r\n") else b"\r\n") + b"\r\n"


def _ascii(text: str) -> str:
    """Text on one line of printable ASCII: what remotes say can't add fields or octets beyond ASCII."""
    return _CONTROL.sub(" ", text).encode("ascii", "backslashreplace").decode("ascii")
