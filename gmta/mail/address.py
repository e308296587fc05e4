"""Mail addresses: the path grammar of RFC 5321 section 4.1.2 with RFC 6531, and what addresses compare by.

`Address` keeps the text as it came (quotes and case too), so that Return-Path parses to the same mailbox;
`mailbox` and `host` are the forms to compare. `parse_path` takes what stands between MAIL FROM: and the
parameters. Errors are AddressError, a ValueError whose text can be shown to a client.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator

import idna

MAX_LOCAL = 64  # RFC 5321 section 4.5.3.1.1
MAX_DOMAIN = 255  # RFC 5321 section 4.5.3.1.2
MAX_PATH = 256  # RFC 5321 section 4.5.3.1.3, with the angle brackets

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
_UTF8 = "\u0080-\U0010ffff"  # RFC 6531 section 3.3: UTF8-non-ascii in atext, qtext and U-labels
_DOT_STRING = rf"[{_ATEXT}{_UTF8}]+(?:\.[{_ATEXT}{_UTF8}]+)*"
_QUOTED = rf'"(?:[ !#-\[\]-~{_UTF8}]|\\[ -~])*"'  # RFC 5321 section 4.1.2: qtextSMTP, quoted-pairSMTP
_LABEL = rf"[A-Za-z0-9_{_UTF8}](?:[A-Za-z0-9_\-{_UTF8}]*[A-Za-z0-9_{_UTF8}])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_LITERAL = r"\[[!-Z^-~]+\]"

_SIMPLE = re.compile(r"([A-Za-z0-9_+\-=]+(?:\.[A-Za-z0-9_+\-=]+)*)@([A-Za-z0-9](?:[A-Za-z0-9.\-]*[A-Za-z0-9])?)\Z")
_MAILBOX = re.compile(rf"({_DOT_STRING}|{_QUOTED})@({_DOMAIN}|{_LITERAL})\.?\Z")
_ROUTE = re.compile(rf"@{_DOMAIN}(?:,@{_DOMAIN})*:")  # RFC 5321 appendix C: accepted, ignored
_PLAIN_DOMAIN = re.compile(rf"{_DOMAIN}\Z")
_DOT_ATOM = re.compile(rf"{_DOT_STRING}\Z")
_ALL_NUMERIC = re.compile(r"[0-9.]+\Z")
_BAD_CHAR = re.compile("[\x00-\x1f\x7f\x80-\x9f\u2028\u2029]")  # nothing that some reader takes for a line end


class AddressError(ValueError):
    """The text is not an address; `smtputf8` tells that it is one only under SMTPUTF8 (RFC 6531)."""

    def __init__(self, text: str, *, smtputf8: bool = False) -> None:
        super().__init__(text)
        self.smtputf8 = smtputf8


class Address:
    """A mailbox: `local` and `domain` as written. The null reverse-path has both empty and is false.

    `Postmaster` without a domain (RFC 5321 section 4.1.1.3) has an empty domain.
    """

    __slots__ = ("_host", "domain", "local")

    def __init__(self, local: str, domain: str) -> None:
        self.local = local
        self.domain = domain
        self._host: str | None = None

    @property
    def host(self) -> str:
        """The domain to compare and look up by: lower case, A-labels (RFC 5890), literals as written."""
        host = self._host
        if host is None:
            host = self._host = domain_key(self.domain)
        return host

    @property
    def mailbox(self) -> str:
        """The local part without quotes and quoted pairs: what it means (RFC 5321 section 4.1.2)."""
        local = self.local
        if local.startswith('"'):
            return re.sub(r"\\(.)", r"\1", local[1:-1])
        return local

    @property
    def key(self) -> str:
        """The form to compare by without regard to case."""
        return f"{self.mailbox.lower()}@{self.host}"

    @property
    def is_literal(self) -> bool:
        """True for user@[192.0.2.1]."""
        return self.domain.startswith("[")

    @property
    def is_ascii(self) -> bool:
        """False where the address needs SMTPUTF8 (RFC 6531)."""
        return self.local.isascii() and self.domain.isascii()

    def split_detail(self, separator: str) -> tuple[str, str]:
        """(user, detail) of user+detail; detail is "" where there is none (RFC 5233)."""
        if separator:
            user, found, detail = self.mailbox.partition(separator)
            if found and user:
                return user, detail
        return self.mailbox, ""

    def __bool__(self) -> bool:
        return bool(self.local)

    def __str__(self) -> str:
        return f"{self.local}@{self.domain}" if self.domain else self.local

    def __repr__(self) -> str:
        return f"Address({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Address):
            return NotImplemented
        return self.mailbox == other.mailbox and self.host == other.host

    def __hash__(self) -> int:
        return hash((self.mailbox, self.host))

    @classmethod
    def parse(cls, text: str) -> Address:
        """An Address from `local@domain` (no brackets); "" is the null address. Raises AddressError."""
        return parse_mailbox(text) if text else NULL

    @classmethod
    def make(cls, mailbox: str, domain: str) -> Address:
        """An Address from an unquoted local part, which is quoted where the grammar asks for it."""
        local = mailbox
        if _DOT_ATOM.match(mailbox) is None:
            local = '"' + re.sub(r'(["\\])', r"\\\1", mailbox) + '"'
        return parse_mailbox(f"{local}@{domain}")


NULL = Address("", "")


def domain_key(domain: str) -> str:
    """The comparable form of a domain: lower case and A-labels; a name that IDNA refuses stays lower case."""
    key = domain.lower().rstrip(".")
    if key.isascii():
        return key
    try:
        return idna.encode(key, uts46=True).decode("ascii").lower()
    except idna.IDNAError:
        return key


def domains_above(domain: str) -> Iterator[str]:
    """The domains that a domain lies in, the nearest first."""
    while "." in domain:
        domain = domain.partition(".")[2]
        yield domain


def check_domain(domain: str) -> None:
    """Raises AddressError unless `domain` is a domain name or an address literal (RFC 5321 section 4.1.2, 4.1.3)."""
    if domain.startswith("["):
        literal_ip(domain)
        return
    if _PLAIN_DOMAIN.match(domain.removesuffix(".")) is None:
        raise AddressError("bad domain")
    encoded = domain if domain.isascii() else domain_key(domain)
    if len(encoded) > MAX_DOMAIN:
        raise AddressError("domain too long")
    for label in encoded.rstrip(".").split("."):
        if len(label) > 63:  # RFC 1035 section 2.3.4
            raise AddressError("label of the domain too long")
    if _ALL_NUMERIC.match(encoded):
        raise AddressError("an address literal needs brackets")


def literal_ip(literal: str) -> str:
    """The IP address within `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 section 4.1.3); raises AddressError."""
    if not (literal.startswith("[") and literal.endswith("]")):
        raise AddressError("bad address literal")
    text = literal[1:-1]
    try:
        if text[:5].lower() == "ipv6:":
            return str(ipaddress.IPv6Address(text[5:]))
        return str(ipaddress.IPv4Address(text))
    except ValueError as error:
        raise AddressError("bad address literal") from error


def client_network(ip: str) -> str:
    """Whom an IP address stands for: itself, or for IPv6 the /64 that one client has for its own."""
    return str(ipaddress.ip_network(f"{ip}/64", strict=False)) if ":" in ip else ip


def parse_mailbox(text: str) -> Address:
    """An Address from `local@domain`; raises AddressError."""
    match = _SIMPLE.match(text)
    if match is not None and len(text) < MAX_LOCAL and ".." not in match[2] and not match[2][-1].isdigit():
        return Address(match[1], match[2])
    if _BAD_CHAR.search(text):
        raise AddressError("address contains a control character")
    match = _MAILBOX.match(text)
    if match is None:
        raise AddressError("not of the form local@domain")
    local, domain = match[1], match[2]
    if len(local.encode()) > MAX_LOCAL:
        raise AddressError("local part too long")
    check_domain(domain)
    return Address(local, domain)


def parse_path(text: str, *, null: bool = False, postmaster: bool = False, smtputf8: bool = False) -> tuple[Address, str]:
    """Splits `<path> parameters` into the Address and the rest (RFC 5321 section 4.1.2).

    null: `<>` is allowed (MAIL).  postmaster: `<Postmaster>` is allowed (RCPT).  smtputf8: octets beyond ASCII are
    allowed (they came as UTF-8).  A source route is parsed and dropped (RFC 5321 section 3.6.1).
    """
    if not text.startswith("<"):
        raise AddressError("a path needs angle brackets")
    end = text.find(">")
    if '"' in text[:end]:
        end = _quoted_end(text)
    if end < 0:
        raise AddressError("path has no closing bracket")
    rest = text[end + 1:]
    if rest and rest[0] not in " \t":
        raise AddressError("blank expected behind the path")
    path = text[1:end]
    if len(path.encode()) + 2 > MAX_PATH:
        raise AddressError("path too long")
    if not path.isascii() and not smtputf8:
        raise AddressError("address needs SMTPUTF8", smtputf8=True)
    if not path:
        if null:
            return NULL, rest.strip()
        raise AddressError("an address is required")
    if path.startswith("@"):
        route = _ROUTE.match(path)
        if route is None:
            raise AddressError("bad source route")
        path = path[route.end():]
    if postmaster and path.lower() == "postmaster":
        return Address(path, ""), rest.strip()
    return parse_mailbox(path), rest.strip()


def _quoted_end(text: str) -> int:
    """Index of the bracket that closes a path with a quoted string in it, or -1."""
    quoted = escaped = False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == ">" and not quoted:
            return index
    return -1
