"""SPF (RFC 7208): may this host send mail for this domain?

`Spf.mail_from` and `Spf.helo` judge the two identities and return an SpfResult; they never raise. DNS is asked through the
given `look_up` alone. What a result does to mail is the plugin's business.

The engine is pyspf's `query`: its outer check with the mapping of errors to results, its recursion, its limits and its
explanations. Overridden here is what is wrong in pyspf 2.0.14 against RFC 7208 (the section stands at each rule):

- names of modifiers are compared with regard to case, so that REDIRECT= is no redirect; a modifier that is not known may not
  be repeated
- an included domain equal to the record's own is an error even where an earlier term decides; redirect= counts as a look-up
  where it is not followed; macros are expanded, and asked for with %{p}, in terms that are not reached; exp= is fetched for
  every message
- a prefix length of thousands of digits, a client address with a zone, and octets that are no UTF-8 raise
- the sender is split at its first @, not its last; a one-label domain is looked up; a failing PTR look-up is a temporary error
- only l and s macros are rejoined with dots; a name too long loses one label only; R as a transformer is not known
- each address behind an mx term, and each name behind a ptr term, counts as a void look-up, so that an IPv6 client fails where
  the mail exchangers have IPv4 addresses only; section 4.6.4 speaks of terms
- control characters within a record are taken
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote

import spf as pyspf

from gmta.mail.address import domain_key
from gmta.services.dns import Status, plain_address
from gmta.verify import Asks

MAX_TERMS = 1000  # of all records of an evaluation together: bounds the time that records of 60 KB can cost
MAX_TERM = 1000  # characters of one
MAX_ADDRESSES = 500  # of a name that are compared
MAX_QUERIES = 20  # names asked for in an evaluation; ten mx terms with ten hosts each would be 110
MAX_EXPLANATION = 250  # octets of exp= text that fit a reply line
KEPT_RECORDS = 1000  # parsed ones
KEPT_SIZE = 1024  # octets of a record that is kept, so that they take some megabytes at most

RESULTS = {"": "pass", "+": "pass", "-": "fail", "?": "neutral", "~": "softfail"}

_RECORD = re.compile(rb"v=spf1(?: |\Z)", re.I)  # RFC 7208 section 4.5
_UNPRINTABLE = re.compile(r"[^ -~]")
_MODIFIER = re.compile(r"([A-Za-z][A-Za-z0-9_.\-]*)=(.*)\Z", re.S)
_DIRECTIVE = re.compile(
    r"([+\-?~]?)(all|include|a|mx|ptr|ip4|ip6|exists)(?::(.*?))?(?:/(0|[1-9]\d{0,2}))?(?://(0|[1-9]\d{0,2}))?\Z", re.I | re.S)
_MACRO = re.compile(r"%(?:([%_\-])|\{([slodiphvcrt])(\d*)(r?)([.\-+,/_=]*)\})", re.I)  # RFC 7208 section 7.1
_DOMAIN_END = re.compile(
    r"(?:\.(?=[0-9]*[a-z\-])[a-z0-9](?:[a-z0-9\-]*[a-z0-9])?\.?|%[%_\-]|%\{[^}]*\})\Z", re.I)
_NAME = re.compile(r"(?:[ -\-/-\[\]-~]{1,63}\.)+[ -\-/-\[\]-~]{1,63}\Z")  # a backslash would be an escape to the resolver
_IP4 = re.compile(pyspf.PAT_IP4 + r"\Z")


@dataclass(frozen=True, slots=True)
class SpfResult:
    """What came of one identity.

    result: pass, fail, softfail, neutral, none, temperror or permerror.  identity: "mailfrom" or "helo".  domain: whose record
    was asked.  reason: why, one line.  mechanism: the term that decided, or "".  explanation: the domain's own text about a fail,
    safe to show (one line, printable ASCII), or "".  steps: what was asked and found, for people.
    """

    result: str
    identity: str
    domain: str
    reason: str
    mechanism: str = ""
    explanation: str = ""
    steps: tuple[str, ...] = field(default=(), repr=False)


class Directive(NamedTuple):
    """One mechanism of a record: text as published, result where it matches, name, domain-spec or "", prefix lengths, network."""

    text: str
    result: str
    name: str
    spec: str
    prefix: tuple[int, int]
    network: int


class Record(NamedTuple):
    """A record's directives in order, and its modifiers' domain-specs ("" for absent)."""

    directives: tuple[Directive, ...]
    redirect: str
    exp: str


class Client(NamedTuple):
    """A client's address. text: the macro c.  number, bits: as an integer of so many bits.  dotted: the macro i.  reverse: where its PTR
    records are."""

    text: str
    number: int
    bits: int
    dotted: str
    reverse: str


@lru_cache(maxsize=2000)
def client_at(ip: str) -> Client | None:
    """The client of an address, None for what is none; an IPv4-mapped one is IPv4 (RFC 7208 section 5)."""
    try:
        address = plain_address(ip)
    except ValueError:
        return None
    text = str(address)
    dotted = text if address.version == 4 else ".".join(address.exploded.replace(":", "").upper())
    return Client(text, int(address), address.max_prefixlen, dotted, address.reverse_pointer)


class Spf:
    """Judges; keeps the records it has parsed, since many messages come from few domains. receiver: what the macro r stands for."""

    def __init__(self, receiver: str = "unknown") -> None:
        self.receiver = receiver
        self._parsed: dict[str, Record] = {}

    def mail_from(self, asks: Asks, ip: str, helo: str, sender: str, *, now: float = 0.0, explain: bool = True,
                  trace: bool = False) -> SpfResult:
        """The result of the MAIL FROM identity; sender: local@domain, or "" for the null sender.

        now: Unix seconds.  explain: fetch exp= text for a fail.  trace: keep steps.
        """
        local, _, domain = sender.rpartition("@")
        if not domain:  # RFC 7208 section 2.4: the null sender is postmaster at the HELO name
            domain = helo
        return self._check(asks, ip, "mailfrom", local, domain, helo, now, explain, trace)

    def helo(self, asks: Asks, ip: str, helo: str, *, now: float = 0.0, explain: bool = True, trace: bool = False) -> SpfResult:
        """The result of the HELO identity."""
        return self._check(asks, ip, "helo", "", helo, helo, now, explain, trace)

    def _check(self, asks: Asks, ip: str, identity: str, local: str, domain: str, helo: str, now: float, explain: bool,
               trace: bool) -> SpfResult:
        """check_host() of RFC 7208 section 4 for one identity."""
        domain = (domain if domain.isascii() else domain_key(domain)).removesuffix(".")  # RFC 7208 section 4.3: A-labels
        local = local or "postmaster"  # RFC 7208 section 4.3
        client = client_at(ip[:64])
        if client is None:
            return SpfResult("none", identity, domain, "the client's address is not known")
        steps: list[str] | None = [f"may {client.text} send for {_shown(local)}@{_shown(domain)}?"] if trace else None
        if not _is_name(domain):  # RFC 7208 section 4.3: malformed, or not a multi-label name
            reason = f"{_shown(domain) or 'nothing'} is not a domain name to look up"
            return SpfResult("none", identity, _shown(domain), reason, steps=tuple(steps or ()))
        evaluation = Evaluation(self, asks, client, local, domain, helo, now, steps)
        result = evaluation.check()[0]
        mechanism = _shown(evaluation.mechanism or "")
        if result in ("temperror", "permerror"):
            reason = evaluation.prob
        elif mechanism:
            reason = f"{client.text} matches {mechanism} of {evaluation.decided_by}"
        elif result == "none":
            reason = f"{domain} has no SPF record"
        else:
            reason = f"{client.text} matches no term of {domain}"
        explanation = evaluation.explanation() if explain and result == "fail" else ""
        return SpfResult(result, identity, domain, _shown(reason), mechanism, explanation, tuple(steps or ()))

    def parse(self, text: str) -> Record:
        """As the function `parse`, remembering."""
        record = self._parsed.get(text)
        if record is None:
            record = parse(text)
            if len(text) <= KEPT_SIZE:
                if len(self._parsed) >= KEPT_RECORDS:
                    self._parsed.clear()
                self._parsed[text] = record
        return record


def _shown(text: str) -> str:
    """Text for people: printable ASCII on one line, not endless."""
    return _UNPRINTABLE.sub("?", text)[:300]


def _is_name(name: str) -> bool:
    """Two labels or more, each of 1 to 63 octets, 253 in all (RFC 1035 section 2.3.4); no address literal."""
    return len(name) <= 253 and _NAME.match(name) is not None and name[0] != "["


# --- the record -------------------------------------------------------------------------------------------------


def parse(text: str) -> Record:
    """The terms of a record, `v=spf1` first; raises pyspf.PermError for any syntax error in it (RFC 7208 section 4.6)."""
    bad = _UNPRINTABLE.search(text)
    if bad is not None:
        raise pyspf.PermError(f"the record contains the character {bad[0]!a}")
    directives: list[Directive] = []
    modifiers: dict[str, str] = {}
    terms = [term for term in text.split(" ")[1:] if term]
    if len(terms) > MAX_TERMS or max(map(len, terms), default=0) > MAX_TERM:
        raise pyspf.PermError(f"more than {MAX_TERMS} terms, or one of more than {MAX_TERM} characters")
    for term in terms:
        modifier = _MODIFIER.match(term)
        if modifier is None:
            directives.append(_directive(term))
            continue
        name = modifier[1].lower()  # RFC 7208 section 4.6.1: without regard to case
        if name not in ("redirect", "exp"):
            _check_macros(modifier[2], term)
            continue
        if name in modifiers:  # RFC 7208 section 6: these two not twice; unknown ones as often as they like
            raise pyspf.PermError(f"{name}= is given twice")
        _check_spec(modifier[2], term)
        modifiers[name] = modifier[2]
    return Record(tuple(directives), modifiers.get("redirect", ""), modifiers.get("exp", ""))


def _directive(term: str) -> Directive:
    match = _DIRECTIVE.match(term)
    if match is None:
        raise pyspf.PermError(f"unknown term {term[:80]}")
    name = match[2].lower()
    spec, first, second = match[3], match[4], match[5]
    prefix = (32, 128)
    network = 0
    if name in ("ip4", "ip6"):
        bits = 32 if name == "ip4" else 128
        length = bits if first is None else int(first)
        if spec is None or second is not None or length > bits or (_IP4 if bits == 32 else pyspf.RE_IP6).match(spec) is None:
            raise pyspf.PermError(f"bad network in {term[:80]}")
        prefix = (length, length)
        network = int(ipaddress.IPv4Address(spec) if bits == 32 else ipaddress.IPv6Address(spec)) >> (bits - length)
    elif name in ("a", "mx"):
        prefix = (32 if first is None else int(first), 128 if second is None else int(second))
        if prefix[0] > 32 or prefix[1] > 128:
            raise pyspf.PermError(f"bad prefix length in {term[:80]}")
    elif first is not None or second is not None:
        raise pyspf.PermError(f"no prefix length is allowed in {term[:80]}")
    if name == "all" and spec is not None:
        raise pyspf.PermError(f"nothing may follow all: {term[:80]}")
    if name in ("include", "exists") and spec is None:
        raise pyspf.PermError(f"{name} needs a domain")
    if spec is not None and name not in ("ip4", "ip6"):
        _check_spec(spec, term)
    return Directive(term, RESULTS[match[1]], name, spec or "", prefix, network)


def _check_macros(text: str, term: str, letters: str = "slodiphvcrt") -> None:
    """Raises PermError unless each % begins a macro (RFC 7208 section 7.1) of these letters."""
    if "%" not in text:
        return
    if "%" in _MACRO.sub("", text):
        raise pyspf.PermError(f"bad macro in {term[:80]}")
    for _, letter, digits, _, _ in _MACRO.findall(text):
        if letter and letter.lower() not in letters:
            raise pyspf.PermError(f"macro {letter} is for explanations only: {term[:80]}")  # RFC 7208 section 7.2
        if digits and not digits.strip("0"):
            raise pyspf.PermError(f"a macro keeps no part in {term[:80]}")


def _check_spec(spec: str, term: str) -> None:
    """Raises PermError unless `spec` is a domain-spec (RFC 7208 section 7.1)."""
    _check_macros(spec, term, "slodiphv")
    if _DOMAIN_END.search(spec) is None:
        raise pyspf.PermError(f"no domain name in {term[:80]}")


# --- the evaluation ---------------------------------------------------------------------------------------------


class Evaluation(pyspf.query):
    """One evaluation. `check` (pyspf's) starts it and maps TempError and PermError to results."""

    def __init__(self, spf: Spf, asks: Asks, client: Client, local: str, domain: str, helo: str, now: float,
                 steps: list[str] | None) -> None:
        # pyspf's constructor would split the sender anew and read the clock. One letter: what the macro stands for.
        self.l, self.o, self.d, self.h, self.r = local, domain, domain, helo, spf.receiver
        self.s = f"{local}@{domain}"
        self.t = str(int(now))
        self.p = ""
        self.c, self._address, self._bits, self.i, self._reverse = client
        self.v, self.A, self._family = ("in-addr", "A", 0) if self._bits == 32 else ("ip6", "AAAA", 1)
        self.strict = True
        self.verbose = False
        self.libspf_local = None
        self.decided_by = domain
        self._spf = spf
        self._asks = asks
        self._steps = steps
        self._terms = 0
        self._names: set[tuple[str, str]] = set()
        self._exp = ("", "")

    def _step(self, depth: int, text: str) -> None:
        if self._steps is not None:
            self._steps.append("  " * (depth + 1) + _shown(text))

    # -- DNS --------------------------------------------------------------------------------------------------------

    def _ask(self, name: str, kind: str) -> tuple[Any, ...]:
        """The records, () where there are none or the name can't be one (RFC 8616 section 4); raises TempError."""
        name = name.lower()
        if not _is_name(name):
            return ()
        if (name, kind) not in self._names:
            if len(self._names) >= MAX_QUERIES:
                raise pyspf.PermError(f"more than {MAX_QUERIES} DNS look-ups")
            self._names.add((name, kind))
        answer = self._asks.look_up(name, kind)
        if answer.status is Status.TEMPORARY:
            raise pyspf.TempError(f"{name} {kind}: {answer.reason}")
        return answer.records

    def _ask_for_term(self, name: str, kind: str) -> tuple[Any, ...]:
        """As `_ask`, for the one question that a term is about: counts it where it finds nothing."""
        records = self._ask(name, kind)
        if not records:
            self.void_lookups += 1
            if self.void_lookups > pyspf.MAX_VOID_LOOKUPS:  # RFC 7208 section 4.6.4
                raise pyspf.PermError(f"more than {pyspf.MAX_VOID_LOOKUPS} look-ups found nothing")
        return records

    def check_lookups(self) -> None:
        """Counts a term that asks DNS (RFC 7208 section 4.6.4)."""
        self.lookups += 1
        if self.lookups > pyspf.MAX_LOOKUP:
            raise pyspf.PermError(f"more than {pyspf.MAX_LOOKUP} terms ask DNS")

    def dns_spf(self, domain: str) -> str | None:
        """The domain's one record, or None (RFC 7208 section 4.5)."""
        found = [text for text in (b"".join(record.strings) for record in self._ask(domain, "TXT")) if _RECORD.match(text)]
        if len(found) > 1:
            raise pyspf.PermError(f"{domain} has {len(found)} SPF records")
        return found[0].decode("latin-1") if found else None

    def _hold(self, records: tuple[Any, ...], length: int) -> bool:
        """True where one of these address records is in one network with the client's address."""
        shift = self._bits - length
        mine = self._address >> shift
        return any(int(ipaddress.ip_address(record.address)) >> shift == mine for record in records[:MAX_ADDRESSES])

    def _client_names(self, ask: Callable[[str, str], tuple[Any, ...]]) -> list[str]:
        """The names that the client's address claims, at most ten, not yet confirmed (RFC 7208 section 4.6.4, 5.5)."""
        try:
            records = ask(self._reverse, "PTR")
        except pyspf.TempError:  # RFC 7208 section 5.5: no match, and no error
            return []
        return [record.target.to_text(True).lower() for record in records[:pyspf.MAX_PTR]]

    def _confirms(self, name: str) -> bool:
        """True where `name` has the client's address."""
        try:
            return self._hold(self._ask(name, self.A), self._bits)
        except pyspf.TempError:  # RFC 7208 section 5.5: this name is skipped
            return False

    # -- terms ------------------------------------------------------------------------------------------------------

    def check0(self, text: str | None, recursion: int) -> tuple[str, int, str]:
        """Judges by one record, that of self.d (RFC 7208 section 4.6)."""
        if text is None:
            self._step(recursion, f"{self.d} has no SPF record")
            return "none", 250, ""
        self._step(recursion, f"{self.d}: {text}")
        record = self._spf.parse(text)
        self._terms += len(record.directives)
        if self._terms > MAX_TERMS:
            raise pyspf.PermError(f"more than {MAX_TERMS} terms")
        for directive in record.directives:
            if self._matches(directive, recursion):
                self._step(recursion, f"{directive.text} matches: {directive.result}")
                if not recursion:
                    self.mechanism, self.decided_by = directive.text, self.d
                    self._exp = (record.exp, self.d)  # RFC 7208 section 6.2: not that of an included record
                return directive.result, 250, ""
            self._step(recursion, f"{directive.text} does not match")
        if not record.redirect:
            return "neutral", 250, ""  # RFC 7208 section 4.7
        self.check_lookups()
        target = self.expand(record.redirect)
        self._step(recursion, f"redirect to {target}")
        found = self.dns_spf(target)
        if found is None:
            raise pyspf.PermError(f"redirect to {target}, which has no SPF record")  # RFC 7208 section 6.1
        result: tuple[str, int, str] = self.check1(found, target, recursion)
        return result

    def _matches(self, directive: Directive, recursion: int) -> bool:
        name = directive.name
        if name == "all":
            return True
        if name in ("ip4", "ip6"):
            length = directive.prefix[0]
            return (name == "ip4") == (self._bits == 32) and self._address >> (self._bits - length) == directive.network
        self.check_lookups()
        target = self.expand(directive.spec) if directive.spec else self.d
        length = directive.prefix[self._family]
        if name == "include":
            result = self.check1(self.dns_spf(target), target, recursion + 1)[0]
            if result == "none":  # RFC 7208 section 5.2
                raise pyspf.PermError(f"include of {target}, which has no SPF record")
            return bool(result == "pass")
        if name == "a":
            return self._hold(self._ask_for_term(target, self.A), length)
        if name == "mx":
            hosts = self._ask_for_term(target, "MX")
            if len(hosts) > pyspf.MAX_MX:  # RFC 7208 section 4.6.4
                raise pyspf.PermError(f"{target} has more than {pyspf.MAX_MX} mail exchangers")
            return any(self._hold(self._ask(host.exchange.to_text(True), self.A), length) for host in hosts)
        if name == "ptr":
            below = "." + target.lower()
            return any(self._confirms(found) for found in self._client_names(self._ask_for_term) if ("." + found).endswith(below))
        return bool(self._ask_for_term(target, "A"))  # exists: RFC 7208 section 5.7, A for IPv6 clients too

    # -- macros -----------------------------------------------------------------------------------------------------

    def expand(self, text: str, stripdot: bool = True) -> str:
        """Puts in what macros stand for (RFC 7208 section 7); stripdot: it is a domain name."""
        if "%" in text:
            text = _MACRO.sub(self._macro, text)
        if not stripdot:
            return text
        text = text.removesuffix(".")
        if len(text) > 253:  # RFC 7208 section 7.3: whole labels from the left
            text = text[text.find(".", len(text) - 254) + 1:]
        return text

    def _macro(self, match: re.Match[str]) -> str:
        sign, letter, digits, reverse, delimiters = match.groups()
        if sign:
            return {"%": "%", "_": " ", "-": "%20"}[sign]
        lower = letter.lower()
        value: str = self.getp() if lower == "p" else getattr(self, lower)
        if digits or reverse or delimiters:
            parts = re.split(f"[{re.escape(delimiters)}]", value) if delimiters else value.split(".")
            if reverse:
                parts.reverse()
            if digits and len(digits) < 4:
                parts = parts[-int(digits):]
            value = ".".join(parts)
        if letter != lower:  # RFC 7208 section 7.3: URL-escaped
            value = quote(value.encode("utf-8", "surrogateescape"), safe="")
        return value

    def getp(self) -> str:
        """What %{p} stands for: the client's confirmed name, best one of the domain's, or "unknown" (RFC 7208 section 7.3)."""
        if not self.p:
            self.check_lookups()
            domain = self.d.lower()
            names = self._client_names(self._ask)
            names.sort(key=lambda name: (name != domain, not name.endswith("." + domain)))
            self.p = next((name for name in names if self._confirms(name)), "unknown")
        return self.p

    def explanation(self) -> str:
        """The text that exp= of the deciding record gives, "" where it gives none that is safe (RFC 7208 section 6.2)."""
        spec, self.d = self._exp
        if not spec:
            return ""
        try:
            records = self._ask(self.expand(spec), "TXT")
            if len(records) != 1:
                return ""
            text = b"".join(records[0].strings)[:MAX_TERM].decode("ascii")
            _check_macros(text, "exp=")
            text = self.expand(text, stripdot=False)
        except (pyspf.PermError, pyspf.TempError, UnicodeDecodeError):
            return ""
        return text if len(text) <= MAX_EXPLANATION and not _UNPRINTABLE.search(text) else ""


# --- Received-SPF -----------------------------------------------------------------------------------------------


def received_spf(result: SpfResult, *, receiver: str, ip: str, helo: str, sender: str) -> str:
    """The value of a Received-SPF field (RFC 7208 section 9.1), ASCII, folded."""
    pairs: Iterable[tuple[str, str]] = (
        ("receiver", receiver), ("client-ip", ip.partition("%")[0]), ("envelope-from", sender), ("helo", helo),
        ("identity", result.identity), ("mechanism", result.mechanism))
    comment = re.sub(r"[()\\]", "?", _shown(result.reason))
    return f"{result.result} ({receiver}: {comment})" + ";".join(
        f"\r\n\t{name}={_quoted(value)}" for name, value in pairs if value)


def _quoted(value: str) -> str:
    """A dot-atom as it is, anything else as a quoted string (RFC 7208 section 9.1)."""
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+)*", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", _shown(value)) + '"'
