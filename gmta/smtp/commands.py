"""Command lines parsed to events: grammar and parameters, no order of commands, no policy.

Each parser takes the argument and returns the event or the Reply that refuses it; none raises for any input.
RFC 5321 section 4.1, RFC 1870 (SIZE), RFC 6152 (BODY), RFC 6531 (SMTPUTF8), RFC 3461 (DSN), RFC 4954 (AUTH=), RFC 3030.
"""

from __future__ import annotations

import re

from gmta.mail.address import AddressError, check_domain, parse_path
from gmta.mail.reply import (
    BAD_HELO,
    BAD_RECIPIENT_SYNTAX,
    BAD_SENDER_SYNTAX,
    NEEDS_SMTPUTF8,
    SIZE_EXCEEDED,
    SYNTAX,
    UNKNOWN_PARAMETER,
    Reply,
)
from gmta.smtp.events import Hello, Mail, Rcpt

_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-]*\Z")
_XTEXT_ESCAPE = re.compile(r"\+([0-9A-Fa-f]{2})")
_XTEXT = re.compile(r"(?:[!-*,-~]|\+[0-9A-Fa-f]{2})*\Z")  # "=" within is tolerated: clients leave it as it is
_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+\Z")
_CONTROL = re.compile("[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")
_NUMBER = re.compile(r"[0-9]{1,20}\Z")  # RFC 1870 section 3
_NOTIFY = frozenset({"SUCCESS", "FAILURE", "DELAY", "NEVER"})
_NONE: frozenset[str] = frozenset()

MAX_ENVID = 100  # RFC 3461 section 4.4
MAX_ORCPT = 500  # RFC 3461 section 4.2


def xtext_decode(text: str) -> str:
    """The text that xtext stands for (RFC 3461 section 4); raises ValueError, also where it hides a control character."""
    if _XTEXT.match(text) is None:
        raise ValueError("not xtext")
    if "+" in text:
        octets = _XTEXT_ESCAPE.sub(lambda found: chr(int(found[1], 16)), text).encode("latin-1")
        text = octets.decode("utf-8")
    if _CONTROL.search(text):
        raise ValueError("control character in xtext")  # it would break lines in reports and headers
    return text


def xtext_encode(text: str) -> str:
    """`text` as xtext (RFC 3461 section 4)."""
    return "".join(chr(octet) if 33 <= octet <= 126 and octet not in b"+=" else f"+{octet:02X}" for octet in text.encode())


def parse_hello(argument: str, *, esmtp: bool) -> Hello | Reply:
    """EHLO and HELO: one domain or address literal (RFC 5321 section 4.1.1.1)."""
    name = argument.strip()
    if not name or not name.isascii() or len(name) > 255 or (name[0] == "[" and name[-1] != "]"):
        return BAD_HELO
    try:
        check_domain(name)
    except ValueError:
        return BAD_HELO
    return Hello(name, esmtp)


def _parameters(text: str) -> dict[str, str | None] | None:
    """KEYWORD -> value (None without "="); None for text that is no parameter list (RFC 5321 section 4.1.2)."""
    found: dict[str, str | None] = {}
    for word in text.split():
        keyword, equals, value = word.partition("=")
        key = keyword.upper()
        if _KEYWORD.match(keyword) is None or key in found:
            return None
        found[key] = value if equals else None
    return found


def parse_mail(argument: str, *, size_limit: int, eightbitmime: bool, smtputf8: bool, dsn: bool) -> Mail | Reply:
    """MAIL FROM:<path> parameters (RFC 5321 section 4.1.1.2)."""
    if argument[:5].upper() != "FROM:":
        return SYNTAX
    try:
        # A blank behind the colon is no grammar, but old appliances send it.
        sender, rest = parse_path(argument[5:].lstrip(" \t"), null=True, smtputf8=True)
    except (AddressError, ValueError):
        return BAD_SENDER_SYNTAX
    ascii_path = sender.is_ascii
    if not rest:
        return Mail(sender, None, "7BIT", False, "", "", None) if ascii_path else NEEDS_SMTPUTF8
    if _CONTROL.search(rest.replace("\t", " ")):
        return SYNTAX
    parameters = _parameters(rest)
    if parameters is None:
        return SYNTAX
    size: int | None = None
    body, utf8, ret, envid = "7BIT", False, "", ""
    auth: str | None = None
    for key, value in parameters.items():
        if key == "SIZE" and value is not None:
            if not value.isascii() or not value.isdigit():
                return SYNTAX
            if _NUMBER.match(value) is None:
                return SIZE_EXCEEDED  # RFC 1870 section 3: at most 20 digits
            size = int(value)
            if size_limit and size > size_limit:
                return SIZE_EXCEEDED  # RFC 1870 section 6.1
        elif key == "BODY" and eightbitmime:
            body = (value or "").upper()
            if body not in ("7BIT", "8BITMIME"):  # RFC 6152 section 3; BINARYMIME is not offered
                return SYNTAX
        elif key == "SMTPUTF8" and smtputf8:
            if value is not None:  # RFC 6531 section 3.4
                return SYNTAX
            utf8 = True
        elif key == "RET" and dsn:
            ret = (value or "").upper()
            if ret not in ("FULL", "HDRS"):  # RFC 3461 section 4.3
                return SYNTAX
        elif key == "ENVID" and dsn:
            try:
                envid = xtext_decode(value or "")
            except ValueError:
                return SYNTAX
            if not envid or len(value or "") > MAX_ENVID:
                return SYNTAX
        elif key == "AUTH":
            # RFC 4954 section 5; providers add AUTH=<> whatever is offered, and it grants nothing
            try:
                auth = "" if value == "<>" else xtext_decode(value or "")
            except ValueError:
                return SYNTAX
            if not value:
                return SYNTAX
        elif key == "SIZE":
            return SYNTAX
        else:
            return UNKNOWN_PARAMETER  # RFC 5321 section 4.1.1.11
    if not ascii_path and not utf8:
        return NEEDS_SMTPUTF8
    return Mail(sender, size, body, utf8, ret, envid, auth)


def parse_rcpt(argument: str, *, smtputf8: bool, dsn: bool) -> Rcpt | Reply:
    """RCPT TO:<path> parameters (RFC 5321 section 4.1.1.3); smtputf8: MAIL had that parameter."""
    if argument[:3].upper() != "TO:":
        return SYNTAX
    try:
        recipient, rest = parse_path(argument[3:].lstrip(" \t"), postmaster=True, smtputf8=smtputf8)
    except AddressError as error:
        return NEEDS_SMTPUTF8 if error.smtputf8 else BAD_RECIPIENT_SYNTAX
    except ValueError:
        return BAD_RECIPIENT_SYNTAX
    if not rest:
        return Rcpt(recipient, _NONE, "")
    if _CONTROL.search(rest.replace("\t", " ")):
        return SYNTAX
    parameters = _parameters(rest)
    if parameters is None:
        return SYNTAX
    notify, orcpt = _NONE, ""
    for key, value in parameters.items():
        if key == "NOTIFY" and dsn:
            notify = frozenset((value or "").upper().split(","))
            if not notify <= _NOTIFY or ("NEVER" in notify and len(notify) > 1):  # RFC 3461 section 4.1
                return SYNTAX
        elif key == "ORCPT" and dsn:
            kind, semicolon, address = (value or "").partition(";")
            if not semicolon or _ATOM.match(kind) is None or not address or len(value or "") > MAX_ORCPT:
                return SYNTAX
            try:
                # RFC 6533 section 3: utf-8 addresses may come as they are where SMTPUTF8 is in use
                text = address if smtputf8 and not address.isascii() else xtext_decode(address)
            except ValueError:
                return SYNTAX
            orcpt = f"{kind};{text}"
        else:
            return UNKNOWN_PARAMETER
    return Rcpt(recipient, notify, orcpt)


def parse_bdat(argument: str) -> tuple[int, bool, bool] | None:
    """(octets, last, valid) of BDAT (RFC 3030 section 2); None without a count, so that no octets follow.

    valid is False where a word other than LAST stands behind the count: refused, but its octets are on their way.
    """
    words = argument.split()
    if not words or not words[0].isascii() or _NUMBER.match(words[0]) is None:
        return None
    if len(words) == 1:
        return int(words[0]), False, True
    last = words[1].upper() == "LAST"
    return int(words[0]), last, last and len(words) == 2
