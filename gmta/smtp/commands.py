"""The grammar of commands: one function a verb, from the argument text to an event or the Reply that refuses it.

RFC 5321 section 4.1.1; SIZE RFC 1870; 8BITMIME RFC 6152; BINARYMIME RFC 3030; SMTPUTF8 RFC 6531; DSN RFC 3461; AUTH RFC 4954.
Refusals are raised as Refused, which the server turns into a Fault.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re

from gmta.mail import reply as replies
from gmta.mail.address import Address, AddressError, check_domain, parse_path
from gmta.mail.reply import Reply
from gmta.smtp.events import Auth, Hello, Mail, Rcpt

XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
XFORWARD = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")

_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9\-]*\Z")
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*\Z")  # RFC 3461 section 4
_HEX = re.compile(rb"\+([0-9A-F]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NOTIFY = frozenset({"SUCCESS", "FAILURE", "DELAY"})
_HELO = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_])?\.?\Z")  # "_" is no host name, but real clients say it
MAX_SIZE_DIGITS = 20  # RFC 1870 section 3


class Refused(Exception):
    """The command is refused with `reply`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


def _syntax(text: str) -> Refused:
    return Refused(Reply(501, "5.5.4", text))


def decode_xtext(text: str, what: str) -> str:
    """The text of an xtext (RFC 3461 section 4); raises Refused for bad ones and for control characters in the result."""
    if _XTEXT.match(text) is None:
        raise _syntax(f"{what} is not xtext")
    try:
        decoded = _HEX.sub(lambda match: bytes([int(match[1], 16)]), text.encode("ascii")).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _syntax(f"{what} is not UTF-8") from error
    if _CONTROL.search(decoded):  # would become a line of somebody's header or report
        raise _syntax(f"{what} contains a control character")
    return decoded


def encode_xtext(text: str) -> str:
    """Text as xtext (RFC 3461 section 4); beyond ASCII as the octets of its UTF-8."""
    return "".join(chr(octet) if 33 <= octet <= 126 and octet not in b"+=" else f"+{octet:02X}" for octet in text.encode())


def parse_hello(argument: str, *, esmtp: bool) -> Hello:
    """EHLO or HELO (RFC 5321 section 4.1.1.1): a host name or an address literal."""
    name = argument.strip()
    if not name.isascii():
        raise Refused(replies.BAD_HELO)
    if name.startswith("["):
        try:
            check_domain(name)
        except AddressError as error:
            raise Refused(replies.BAD_HELO) from error
    elif len(name) > 255 or _HELO.match(name) is None:
        raise Refused(replies.BAD_HELO)
    return Hello(name, esmtp)


def _split(argument: str, keyword: str) -> str:
    """What follows FROM: or TO:, blanks skipped (some clients send them)."""
    if argument[:len(keyword)].upper() != keyword:
        raise _syntax(f"{keyword}<address> expected")
    return argument[len(keyword):].lstrip(" \t")


def _parameters(text: str) -> list[tuple[str, str | None]]:
    out: list[tuple[str, str | None]] = []
    seen: set[str] = set()
    for word in text.split():
        keyword, equals, value = word.partition("=")
        keyword = keyword.upper()
        if _KEYWORD.match(keyword) is None or not value.isascii():
            raise Refused(replies.SYNTAX)
        if keyword in seen:
            raise _syntax(f"{keyword} is given twice")
        seen.add(keyword)
        out.append((keyword, value if equals else None))
    return out


def parse_mail(argument: str, *, size_limit: int, smtputf8: bool, dsn: bool, esmtp: bool, requiretls: bool = False) -> Mail:
    """MAIL FROM:<path> parameters (RFC 5321 section 4.1.1.2)."""
    text = _split(argument, "FROM:")
    utf8 = False
    path_end = text.rfind(">")
    if smtputf8:
        utf8 = any(word.upper() == "SMTPUTF8" for word in text[path_end + 1:].split())
    try:
        sender, rest = parse_path(text, null=True, smtputf8=utf8)
    except AddressError as error:
        if error.smtputf8 and smtputf8:
            raise Refused(replies.NEEDS_SMTPUTF8) from error  # RFC 6531 section 3.5
        raise Refused(Reply(501, "5.1.7", f"Bad sender address: {error}")) from error
    size: int | None = None
    body, ret, envid = "7BIT", "", ""
    auth: str | None = None
    must_tls = False
    for keyword, value in _parameters(rest) if rest else ():
        if not esmtp:
            raise Refused(replies.UNKNOWN_PARAMETER)  # RFC 5321 section 4.1.1.11: parameters only after EHLO
        if keyword == "SIZE":
            if value is None or not value.isdigit():
                raise _syntax("SIZE needs a number")
            if len(value) > MAX_SIZE_DIGITS or int(value) > size_limit > 0:
                raise Refused(replies.SIZE_EXCEEDED)  # RFC 1870 section 6.1
            size = int(value)
        elif keyword == "BODY" and value and value.upper() in ("7BIT", "8BITMIME"):
            body = value.upper()
        elif keyword == "SMTPUTF8" and smtputf8:
            if value is not None:
                raise _syntax("SMTPUTF8 takes no value")  # RFC 6531 section 3.4
        elif keyword == "RET" and dsn:
            if not value or value.upper() not in ("FULL", "HDRS"):
                raise _syntax("RET is FULL or HDRS")  # RFC 3461 section 4.3
            ret = value.upper()
        elif keyword == "ENVID" and dsn:
            if not value or len(value) > 100:
                raise _syntax("ENVID needs 1 to 100 octets")  # RFC 3461 section 4.4
            envid = decode_xtext(value, "ENVID")
        elif keyword == "AUTH":
            if not value:
                raise _syntax("AUTH needs a value")
            auth = "" if value == "<>" else decode_xtext(value, "AUTH")  # RFC 4954 section 5
        elif keyword == "REQUIRETLS" and requiretls:
            if value is not None:
                raise _syntax("REQUIRETLS takes no value")  # RFC 8689 section 2
            must_tls = True
        elif keyword == "BODY":
            raise _syntax("BODY is 7BIT or 8BITMIME")
        else:
            raise Refused(replies.UNKNOWN_PARAMETER)
    return Mail(sender, size, body, utf8, ret, envid, auth, must_tls)


def parse_rcpt(argument: str, *, smtputf8: bool, smtputf8_offered: bool, dsn: bool, esmtp: bool) -> Rcpt:
    """RCPT TO:<path> parameters (RFC 5321 section 4.1.1.3)."""
    text = _split(argument, "TO:")
    try:
        recipient, rest = parse_path(text, postmaster=True, smtputf8=smtputf8)
    except AddressError as error:
        if error.smtputf8 and smtputf8_offered:
            raise Refused(replies.NEEDS_SMTPUTF8) from error
        raise Refused(Reply(501, "5.1.3", f"Bad recipient address: {error}")) from error
    notify: frozenset[str] = frozenset()
    orcpt = ""
    for keyword, value in _parameters(rest) if rest else ():
        if keyword == "NOTIFY" and dsn and esmtp:
            notify = frozenset((value or "").upper().split(","))
            if notify != {"NEVER"} and not (notify and notify <= _NOTIFY):
                raise _syntax("NOTIFY is NEVER, or a list of SUCCESS, FAILURE, DELAY")  # RFC 3461 section 4.1
        elif keyword == "ORCPT" and dsn and esmtp:
            kind, semicolon, address = (value or "").partition(";")
            if not semicolon or not address or _KEYWORD.match(kind) is None or len(value or "") > 500:
                raise _syntax("ORCPT is type;address")  # RFC 3461 section 4.2
            orcpt = f"{kind};{decode_xtext(address, 'ORCPT')}"
        else:
            raise Refused(replies.UNKNOWN_PARAMETER)
    return Rcpt(recipient, notify, orcpt)


def parse_bdat(argument: str) -> tuple[int, bool]:
    """(octets, last) of BDAT (RFC 3030 section 2); a BadChunk tells how many octets follow all the same."""
    words = argument.split()
    if not words or not (words[0].isascii() and words[0].isdigit()) or len(words[0]) > MAX_SIZE_DIGITS:  # RFC 3030 section 2: digits of ASCII
        raise Refused(Reply(501, "5.5.4", "BDAT needs a chunk size"))
    last = len(words) == 2 and words[1].upper() == "LAST"
    if len(words) > 1 and not last:
        raise BadChunk(Reply(501, "5.5.4", "Only LAST may follow the chunk size"), int(words[0]))
    return int(words[0]), last


class BadChunk(Refused):
    """A BDAT refused for its syntax whose `octets` must be read and dropped."""

    def __init__(self, reply: Reply, octets: int) -> None:
        super().__init__(reply)
        self.octets = octets


def decode_base64(text: bytes) -> bytes:
    """A SASL response (RFC 4954 section 4); raises Refused."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(replies.AUTH_SYNTAX) from error


def parse_attributes(argument: str, known: tuple[str, ...]) -> dict[str, str]:
    """NAME=xtext … of XCLIENT or XFORWARD, as Postfix has them; a value that is not available becomes ""."""
    found: dict[str, str] = {}
    for word in argument.split():
        name, equals, value = word.partition("=")
        name = name.upper()
        if not equals or name not in known or name in found:
            raise _syntax(f"Attributes are {' '.join(known)}, each once")
        text = decode_xtext(value, name)
        if text.upper() in ("[UNAVAILABLE]", "[TEMPUNAVAIL]"):
            text = ""
        elif name in ("ADDR", "DESTADDR"):
            text = _ip(text)
        elif name in ("PORT", "DESTPORT") and not (text.isascii() and text.isdigit() and int(text) < 65536):
            raise _syntax(f"{name} is a number")
        elif name == "PROTO" and text.upper() not in ("SMTP", "ESMTP"):
            raise _syntax("PROTO is SMTP or ESMTP")
        elif len(text) > 255:
            raise _syntax(f"{name} is too long")
        found[name] = text
    if not found:
        raise Refused(replies.SYNTAX)
    return found


def _ip(text: str) -> str:
    """An address as XCLIENT has it, IPv6 ones behind IPV6:."""
    if text[:5].upper() == "IPV6:":
        text = text[5:]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise _syntax("Not an IP address") from None
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_auth(argument: str, mechanisms: tuple[str, ...]) -> Auth:
    """AUTH mechanism [initial-response] (RFC 4954 section 4); "=" is the empty response."""
    words = argument.split()
    if not words or len(words) > 2:
        raise Refused(replies.SYNTAX)
    mechanism = words[0].upper()
    if mechanism not in mechanisms:
        raise Refused(replies.AUTH_MECHANISM)
    if len(words) == 1:
        return Auth(mechanism, None)
    if words[1] == "=":
        return Auth(mechanism, b"")
    return Auth(mechanism, decode_base64(words[1].encode("ascii", "replace")))


__all__ = ["Address", "BadChunk", "Refused", "decode_base64", "decode_xtext", "encode_xtext", "parse_attributes", "parse_auth", "parse_bdat",
           "parse_hello", "parse_mail", "parse_rcpt"]
