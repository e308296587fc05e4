"""Trace fields: Received (RFC 5321 section 4.4, RFC 3848), Authentication-Results (RFC 8601), and which are forged; Delivered-To (RFC 9228)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache

from gmta.mail.address import Address, AddressError, domain_key
from gmta.mail.message import Message
from gmta.mail.session import AuthResult, Session, Transaction

_UNSAFE = re.compile(r"[^!-~]|[()\\]")
_SUSPECT = re.compile(rb"^(?:return-path|authentication-results)[ \t]*:", re.I | re.M)
_AUTHSERV_ID = re.compile(rb'"((?:[^"\\]|\\.)*)"|([^;\s(/"]+)', re.S)
_PVALUE = re.compile(r"(?:[A-Za-z0-9!#$%&'*+\-.^_`{|}~]+|[A-Za-z0-9!#$%&'*+\-./=?^_`{|}~]*@[A-Za-z0-9_\-.]+)\Z")
_UNPRINTABLE = re.compile(r"[^ -~]")

MAX_LOOK = 4096  # octets of a field that are searched for its identifier


def _atom(text: str) -> str:
    return _UNSAFE.sub("?", text)[:255] or "unknown"


_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def date(at: float) -> str:
    """A date-time (RFC 5322 section 3.3) in UTC; at: Unix seconds."""
    return _date(int(at // 1))


@lru_cache(maxsize=16)
def _date(second: int) -> str:
    when = datetime.fromtimestamp(second, UTC)
    return (f"{_DAYS[when.weekday()]}, {when.day:02d} {_MONTHS[when.month - 1]} {when.year:04d} "
            f"{when.hour:02d}:{when.minute:02d}:{when.second:02d} +0000")


def received(session: Session, transaction: Transaction, hostname: str, at: float) -> str:
    """The value of Received; at: Unix seconds. `for` only with one recipient, so that nobody learns of others."""
    peer = f"IPv6:{session.peer_ip}" if ":" in session.peer_ip else session.peer_ip  # RFC 5321 section 4.1.3
    protocol = session.protocol
    if transaction.smtputf8 and session.esmtp:
        protocol = protocol.replace("ESMTP", "UTF8SMTP", 1)  # RFC 6531 section 4.3
    value = f"from {_atom(session.helo)} ({_atom(session.peer_name) if session.peer_name else 'unknown'} [{peer}])\r\n\tby {hostname}"
    if session.tls is not None:
        tls = session.tls
        value += f"\r\n\t(using {_atom(tls.version)} with cipher {_atom(tls.cipher)} ({tls.bits} bits))"
    value += f"\r\n\twith {protocol} id {transaction.id}"
    if len(transaction.recipients) == 1:
        original = transaction.recipients[0].original
        if original.is_ascii:
            value += f"\r\n\tfor <{original}>"
    return value + f"; {date(at)}"


def authentication_results(hostname: str, results: list[AuthResult]) -> str:
    """The value of Authentication-Results (RFC 8601 section 2.2), folded, ASCII; "none" without results."""
    if not results:
        return f"{hostname}; none"
    value = hostname
    for result in results:
        line = f"{result.method}={result.result}"
        value += ";\r\n\t"
        words = [f"reason={_value(result.reason, always=True)}"] if result.reason else []
        for word in words + [f"{name}={_value(text)}" for name, text in result.properties]:
            if len(line) + len(word) > 90:  # RFC 5322 section 2.1.1: far below 998
                value += f"{line}\r\n\t "
                line = word
            else:
                line += f" {word}"
        value += line
    return value


def _value(text: str, *, always: bool = False) -> str:
    """A pvalue or reason (RFC 8601 section 2.2): a token or address as it is, else (or always) a quoted string."""
    if not always and _PVALUE.match(text):
        return text
    return '"' + _UNPRINTABLE.sub("?", text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def drop_forged(message: Message, hostname: str) -> None:
    """Removes every Return-Path (RFC 5321 section 4.4) and Authentication-Results in our name (RFC 8601 section 5)."""
    if _SUSPECT.search(message.header) is None:
        return
    ours = domain_key(hostname)
    doomed = []
    for name, raw in message.fields():
        lower = name.lower()
        if lower == "return-path":
            doomed.append((name, raw))
        elif lower == "authentication-results":
            identifier = _authserv_id(raw.partition(b":")[2][:MAX_LOOK])
            if not identifier or domain_key(identifier) == ours:
                doomed.append((name, raw))
    if doomed:
        message.drop(frozenset(doomed))


def _authserv_id(value: bytes) -> str:
    """The identifier of Authentication-Results, "" where none can be read: then nobody shall read one either."""
    position = depth = 0
    while position < len(value):  # comments before it nest (RFC 5322 section 3.2.2)
        byte = value[position:position + 1]
        if byte == b"(":
            depth += 1
        elif byte == b")" and depth:
            depth -= 1
        elif byte == b"\\" and depth:
            position += 1
        elif not depth and byte not in b" \t\r\n":
            break
        position += 1
    match = _AUTHSERV_ID.match(value, position)
    if match is None:
        return ""
    quoted, token = match.groups()
    return (re.sub(rb"\\(.)", rb"\1", quoted) if quoted is not None else token).decode("utf-8", "surrogateescape")


def delivered_to(message: Message) -> frozenset[str]:
    """The addresses that the message says it was delivered to (RFC 9228), by their `key`: one that comes back to them is in a loop."""
    if b"delivered-to" not in message.header.lower():
        return frozenset()
    found = set()
    for value in message.values("Delivered-To"):
        try:
            found.add(Address.parse(value.strip().decode("utf-8", "surrogateescape").removeprefix("<").removesuffix(">")).key)
        except AddressError:
            continue
    return frozenset(found)
