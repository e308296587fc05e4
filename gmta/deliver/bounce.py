"""Reports to the sender (DSN): multipart/report messages about recipients that failed, are late, were reached or expanded.

Who wants to be told what (NOTIFY), how much of the message goes back (RET), ENVID and ORCPT are here; when a report is due, and
that none answers the null sender, is the scheduler's business. Part one is for people: what happened, who said what, what to do
next. Part two is for programs. Part three is the message, or its header. What remotes said is escaped to ASCII; a report needs
SMTPUTF8 only where the sender's own address does, and 8BITMIME only where the returned message does. No line is longer than 998
octets, whatever the message had. A report never fails to be built for a message that can't be read: it then goes without it.
RFC 3461; RFC 6522 (multipart/report); RFC 3463, RFC 3464; RFC 6533 for addresses beyond ASCII; RFC 3834 for Auto-Submitted.
"""

from __future__ import annotations

import quopri
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gmta.mail.address import NULL, Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.mail.trace import date
from gmta.mail.verdict import Outcome

FAILED = "failed"
DELAYED = "delayed"
DELIVERED = "delivered"
EXPANDED = "expanded"

EXPIRED = "5.4.7"  # RFC 3463 section 3.5: delivery time expired, here for good

MAX_RETURNED = 50 * 1024  # a bigger message goes back as its header (RFC 3461 section 6.2 leaves it to us)
MAX_HEADER = 64 * 1024
MAX_LINE = 998  # RFC 5322 section 2.1.1
MAX_SAID = 900  # octets of a remote's words
_WIDTH = 76

_SUBJECTS = {FAILED: "Undelivered mail returned to sender", DELAYED: "Delayed mail (still being retried)",
             DELIVERED: "Successful mail delivery report", EXPANDED: "Successful mail delivery report"}
_INTRODUCTIONS = {
    FAILED: "Your message could not be delivered to {whom} below. It will not be tried again.",
    DELAYED: "Your message has not been delivered yet to {whom} below. This is only a warning: you do not need to send it again, "
             "delivery is still being tried until {until}.",
    DELIVERED: "Your message was delivered, or handed on to the next mail server, for {whom} below.",
    EXPANDED: "Your message has arrived for {whom} below and was passed on to its members. Their own mail servers do not report "
              "back to you.",
}
_ABOUT_NOBODY = ("A message without a sender, which is most often a report about another message, could not be delivered to {whom} "
                 "below. Nobody else is told.")

# What to do next, by enhanced status code: subject.detail, else subject (RFC 3463 section 3, RFC 5248).
_HINTS = {
    "1": "Check the address for typing errors, or ask the recipient for the address that is in use now.",
    "1.2": "Check the part behind the @ for typing errors: there is no such mail domain.",
    "1.7": "The recipient's mail server does not take your own address as a sender. Check how your mail program writes it.",
    "1.8": "The recipient's mail server does not take your own address as a sender. Check how your mail program writes it.",
    "1.10": "That domain takes no mail at all. Reach the recipient in another way.",
    "2": "The mailbox can't take the message. Reach the recipient in another way, or try again later.",
    "2.2": "The recipient's mailbox is full. Reach the recipient in another way, or try again later.",
    "2.3": "Send a smaller message, or put the files where the recipient can fetch them.",
    "3": "The recipient's mail server is in trouble. Try again later.",
    "3.4": "Send a smaller message, or put the files where the recipient can fetch them.",
    "4": "The recipient's mail server could not be reached. Check the part behind the @ for typing errors, or try again later.",
    "4.6": "The message went round in circles. The postmaster of the recipient's domain can mend that.",
    "4.7": "It was tried for as long as we try. Check the part behind the @ for typing errors, or send the message again later.",
    "5": "The mail servers did not understand each other. Show this report to your postmaster.",
    "5.3": "Send the message to fewer recipients at a time.",
    "6": "The recipient's mail server does not take this kind of message. Send it as plain text, or its files by another way.",
    "6.3": "The recipient's mail server takes plain ASCII only. Send the message without other characters.",
    "6.7": "The recipient's mail server does not take addresses with characters beyond ASCII. Ask the recipient for another address.",
    "7": "The recipient's mail server refuses the message by its rules. Its words above may say why; if not, reach the recipient in "
         "another way.",
}
_OTHERWISE = "If the words above do not help you, show this report to your postmaster."

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_QUOTED = re.compile(r"[^!-*,-<>-\[\]-~]")  # RFC 6533 section 3: not QCHAR
_MESSAGE_ID = re.compile(rb"<[!-;=?-~]{1,250}>\Z")
_REMOTE = re.compile(r"([^\s\[\]:]+)?(?:\[([0-9A-Fa-f:.]+)\])?(?::(\d+))?\Z")


class Notice(NamedTuple):
    """One recipient of a report: what became of it; status: where it is not the reply's own ("5.4.7"); tried: now, not some time before."""

    recipient: RecipientState
    outcome: Outcome
    status: str = ""
    tried: bool = True


def wants(recipient: RecipientState, what: str) -> bool:
    """Whether NOTIFY asks for a report of that kind: SUCCESS, FAILURE or DELAY (RFC 3461 section 4.1)."""
    notify = recipient.notify
    if not notify:
        return what != "SUCCESS"  # RFC 3461 section 4.1: without NOTIFY failures, and delays as we please
    return what in notify


def trusted(envelope: Envelope) -> bool:
    """Whether the message came from somebody we know: an account, a network of ours, a program of this machine, or ourselves."""
    facts = envelope.facts
    return bool(facts.get("trusted")) or "user" in facts or facts.get("protocol") == "local"


def envelope_for(about: Envelope, to: Address, queue_id: str, size: int, now: float) -> Envelope:
    """The report's own envelope: from the null sender (RFC 3461 section 6.1, RFC 5321 section 4.5.5) to `to`."""
    # RFC 3461 section 6.1: NOTIFY=NEVER, since nobody can be told about a report
    recipient = RecipientState(0, to, notify=frozenset({"NEVER"}), next_attempt_at=now)
    facts: dict[str, Any] = {"protocol": "local", "about": about.id}
    if about.facts.get("requiretls"):
        facts["requiretls"] = True  # RFC 8689 section 5
    return Envelope(queue_id, NULL, [recipient], size, now, body="8BITMIME", smtputf8=not to.is_ascii, facts=facts)


def returns_whole(envelope: Envelope, mode: str) -> bool:
    """Whether the message itself may go back, by [queue] return_message and whose it is; how it is and RET have their say besides."""
    # RFC 8689 section 5: never a message that must not leave without TLS
    return not envelope.facts.get("requiretls") and (mode == "always" or (mode == "trusted" and trusted(envelope)))


def build(kind: str, envelope: Envelope, notices: Sequence[Notice], message: Message | None, *, hostname: str, queue_id: str, now: float,
          retry_until: float = 0.0, to: Address | None = None, whole: bool = True) -> Message:
    """The report about a message's recipients as a Message.

    kind: FAILED, DELAYED, DELIVERED or EXPANDED; times in Unix seconds; to: the sender, or who is told in place of none;
    whole: the message itself may go back, where RET and its size allow it; else its header does.
    """
    to = envelope.sender if to is None else to
    utf8 = not to.is_ascii
    returned = _returned(kind, envelope, message, utf8, whole)
    text = _human(kind, envelope, notices, hostname, now, retry_until, returned)
    machine = "".join(_machine(kind, envelope, notices, hostname, now, retry_until, utf8))
    boundary = f"=_{queue_id}"
    parts = [_text_part(text)]
    if utf8:  # RFC 6533 section 4
        parts.append(b"Content-Type: message/global-delivery-status\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + machine.encode())
    else:
        parts.append(b"Content-Type: message/delivery-status\r\n\r\n" + machine.encode())
    if returned is not None:
        parts.append(returned[1])
    delimiter = f"\r\n--{boundary}\r\n".encode()
    body = delimiter[2:] + delimiter.join(parts) + f"\r\n--{boundary}--\r\n".encode()
    fields = [
        ("From", f"Mail Delivery System <MAILER-DAEMON@{hostname}>"),
        ("To", f"<{to}>"),
        ("Subject", _SUBJECTS[kind] if to is envelope.sender else "Undeliverable report"),
        ("Date", date(now)),
        ("Message-ID", f"<{queue_id}@{hostname}>"),
        ("Auto-Submitted", "auto-replied"),  # RFC 3834 section 5
        ("MIME-Version", "1.0"),
        ("Content-Type", f'multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"'),
    ]
    if not body.isascii():
        fields.append(("Content-Transfer-Encoding", "8bit"))  # RFC 2045 section 6.4: as its parts have it
    about = _message_id(message)
    if about:
        fields[5:5] = [("In-Reply-To", about), ("References", about)]
    header = "".join(f"{name}: {value}\r\n" for name, value in fields)
    return Message.from_bytes(header.encode() + b"\r\n" + body)


def status_of(kind: str, notice: Notice) -> str:
    """The Status field: the reply's enhanced code where its class fits the report's, else the class alone (RFC 3463)."""
    if notice.status:
        return notice.status
    wanted = {FAILED: "5", DELAYED: "4"}.get(kind, "2")
    enhanced = notice.outcome.reply.enhanced
    return enhanced if enhanced is not None and enhanced[0] == wanted else f"{wanted}.0.0"


# --- part one: for people ---------------------------------------------------------------------------------------


def _human(kind: str, envelope: Envelope, notices: Sequence[Notice], hostname: str, now: float, retry_until: float,
           returned: tuple[str, bytes] | None) -> str:
    """Plain sentences, wrapped, with LF line ends."""
    introduction = _INTRODUCTIONS[kind] if envelope.sender else _ABOUT_NOBODY
    whom = "the recipient" if len(notices) == 1 else f"the {len(notices)} recipients"
    paragraphs = [f"This is the mail server {hostname}.", "\n".join(_wrap(introduction.format(whom=whom, until=date(retry_until))))]
    hints: dict[str, list[str]] = {}
    for notice in notices:
        paragraphs.append("\n".join(_about(kind, notice, envelope, now)))
        if kind in (FAILED, DELAYED):
            hints.setdefault(_hint(status_of(kind, notice), kind), []).append(f"<{notice.recipient.address}>")
    for hint, addresses in hints.items():
        # one hint for all needs no names
        lead = "What to do: " if len(hints) == 1 else f"What to do about {', '.join(addresses)}: "
        paragraphs.append("\n".join(_wrap(lead + hint)))
    facts = [f"Queue id: {envelope.id}", f"Received: {date(envelope.received_at)}", f"Reported: {date(now)}"]
    if envelope.envid:
        facts.append(f"Your reference: {_ascii(envelope.envid)}")
    paragraphs.append("\n".join(facts))
    if returned is not None:
        paragraphs.append(f"What follows is the same for programs, and {returned[0]}.")
    return "\n\n".join(paragraphs) + "\n"


def _about(kind: str, notice: Notice, envelope: Envelope, now: float) -> Iterator[str]:
    """The lines about one recipient."""
    recipient, outcome = notice.recipient, notice.outcome
    yield f"<{recipient.address}>"
    if recipient.original and recipient.original != str(recipient.address):
        yield f"    (you wrote to <{recipient.original}>)"
    if kind == EXPANDED:
        return
    if notice.status == EXPIRED:
        yield from _wrap(f"It was tried for {_span(now - envelope.received_at)}, {_times(recipient.attempts)}. The last result:", "    ")
    name, address = remote_parts(outcome.remote)
    host = f"{name} [{address}]" if name and address else name or (f"[{address}]" if address else "")
    if outcome.own:
        yield from _wrap(_ascii(outcome.reply.text)[:MAX_SAID], "    ")
    else:
        yield f"    {_ascii(host) or 'The next mail server'} said:"
        yield from _wrap(_ascii(str(outcome.reply))[:MAX_SAID], "        ")
    if kind == DELIVERED and outcome.relayed:
        yield from _wrap("That mail server sends no reports of success: this is the last that you hear of it.", "    ")


def _hint(status: str, kind: str) -> str:
    """What to do next about an enhanced status code."""
    if kind == DELAYED:
        return "nothing, unless the matter is urgent. Another report follows when delivery is given up."
    _, subject, detail = status.split(".")
    return _HINTS.get(f"{subject}.{detail}") or _HINTS.get(subject) or _OTHERWISE


def _span(seconds: float) -> str:
    """A time in words: 8 seconds, 4 hours, 5 days."""
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count = round(seconds / length)
        if count >= 2 or length == 1:
            return f"{count} {name}{'' if count == 1 else 's'}"
    return ""


def _times(attempts: int) -> str:
    return {0: "without a chance to be sent", 1: "once"}.get(attempts, f"{attempts} times")


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _text_part(text: str) -> bytes:
    """The first part with its header, in 7 bits whatever it says."""
    lines = text.replace("\n", "\r\n").encode()
    if lines.isascii() and max(map(len, lines.split(b"\r\n"))) <= MAX_LINE:
        return b"Content-Type: text/plain; charset=us-ascii\r\n\r\n" + lines
    return b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(lines)


def _quoted(octets: bytes) -> bytes:
    """CRLF text as quoted-printable (RFC 2045 section 6.7)."""
    return quopri.encodestring(octets.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")


# --- part two: for programs -------------------------------------------------------------------------------------


def _machine(kind: str, envelope: Envelope, notices: Sequence[Notice], hostname: str, now: float, retry_until: float,
             utf8: bool) -> Iterator[str]:
    """The fields of message/delivery-status (RFC 3464 section 2): a group about the message, one a recipient."""
    if envelope.envid:
        yield _field("Original-Envelope-Id", envelope.envid)  # RFC 3464 section 2.2.1
    yield _field("Reporting-MTA", f"dns; {hostname}")
    yield _field("Arrival-Date", date(envelope.received_at))
    for notice in notices:
        recipient, outcome = notice.recipient, notice.outcome
        yield "\r\n"
        if recipient.orcpt:
            form, _, address = recipient.orcpt.partition(";")
            yield f"Original-Recipient: {_typed(form, address, utf8)}\r\n"  # RFC 3464 section 2.3.1
        yield f"Final-Recipient: {_typed('rfc822', str(recipient.address), utf8)}\r\n"
        action = "relayed" if kind == DELIVERED and outcome.relayed else kind  # RFC 3464 section 2.3.3
        yield _field("Action", action)
        yield _field("Status", status_of(kind, notice))
        name, address = remote_parts(outcome.remote)
        if name or address:
            yield _field("Remote-MTA", f"dns; {name or f'[{address}]'}")
        if kind != EXPANDED:
            form = "X-gmta" if outcome.own else "smtp"
            yield _field("Diagnostic-Code", f"{form}; {_ascii(outcome.words)[:MAX_SAID]}")
        if recipient.attempts and notice.tried:
            yield _field("Last-Attempt-Date", date(now))
        if kind == DELAYED:
            yield _field("Will-Retry-Until", date(retry_until))  # RFC 3464 section 2.3.9


def _field(name: str, value: str) -> str:
    """A field of the status parts, folded."""
    return "\r\n ".join(textwrap.wrap(f"{name}: {_ascii(value)}", _WIDTH, break_long_words=False, break_on_hyphens=False)) + "\r\n"


def _typed(form: str, address: str, utf8: bool) -> str:
    """`type;address` of a recipient field; beyond ASCII it is of type utf-8, escaped where the report is ASCII (RFC 6533 section 3)."""
    if form.lower() == "utf-8":
        address = _EMBEDDED.sub(_embedded, address)
    elif not address.isascii():
        form = "utf-8"
    address = _CONTROL.sub(" ", address)
    if form.lower() == "utf-8" and not utf8:
        address = _QUOTED.sub(lambda match: f"\\x{{{ord(match[0]):02X}}}", address)
    return f"{_ascii(form)};{address}"


def _embedded(match: re.Match[str]) -> str:
    """The character that \\x{HEX} stands for; left as it is where there is none."""
    number = int(match[1], 16)
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else match[0]


def remote_parts(remote: str) -> tuple[str, str]:
    """(host name, address) of an Outcome's `remote`: NAME[ADDRESS]:PORT, ADDRESS:PORT or NAME; "" for what is not there."""
    match = _REMOTE.match(remote)
    if match is None:
        address = remote.rpartition(":")[0]  # IPv6 address and port
        return ("", address) if address and set(address) <= set("0123456789abcdefABCDEF:.") else (remote, "")
    name, address = match[1] or "", match[2] or ""
    if not address and name.replace(".", "").isdigit():
        return "", name
    return name, address


# --- part three: the message ------------------------------------------------------------------------------------


def _returned(kind: str, envelope: Envelope, message: Message | None, utf8: bool, whole: bool) -> tuple[str, bytes] | None:
    """(what it is, the part): the whole message in reports of failure where RET allows and it is small, else its header."""
    if message is None:
        return None
    if whole and kind == FAILED and envelope.ret != "HDRS" and message.size <= MAX_RETURNED:  # RFC 3461 section 4.3
        try:
            content = b"".join(message.chunks())
        except OSError:
            content = b""
        if content and max(map(len, content.split(b"\r\n"))) <= MAX_LINE:
            # RFC 6533 section 3: a header beyond ASCII makes it message/global, which only a sender with SMTPUTF8 can be sent
            name = "message/global" if utf8 and not message.header.isascii() else "message/rfc822"
            encoding = "" if content.isascii() else "Content-Transfer-Encoding: 8bit\r\n"
            return "your message", f"Content-Type: {name}\r\n{encoding}\r\n".encode() + content
    header = message.header
    if len(header) > MAX_HEADER:
        header = header[:header.rfind(b"\n", 0, MAX_HEADER) + 1]
    plain = header.isascii()
    if utf8 and not plain:
        return "the header of your message", (
            b"Content-Type: message/global-headers\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + header)
    if plain and max(map(len, header.split(b"\r\n"))) <= MAX_LINE:
        return "the header of your message", b"Content-Type: text/rfc822-headers\r\n\r\n" + header
    return "the header of your message", (
        b"Content-Type: text/rfc822-headers; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(header))


def _message_id(message: Message | None) -> str:
    """The message's Message-ID where it can stand in a field of ours, else ""."""
    if message is None:
        return ""
    found = [value.strip() for value in message.values("Message-ID")]
    return found[0].decode("ascii") if len(found) == 1 and _MESSAGE_ID.match(found[0]) else ""


def _ascii(text: str) -> str:
    """Text on one line of printable ASCII: what remotes say can't add fields or octets beyond ASCII."""
    return _CONTROL.sub(" ", text).encode("ascii", "backslashreplace").decode("ascii")
