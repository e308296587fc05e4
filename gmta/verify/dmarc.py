"""DMARC (RFC 9989): is the domain that From shows the domain that SPF or DKIM vouch for, and what does its owner ask for if not?

`authors_of` takes the author domains from the From fields of a message; `evaluate` finds the policy by a tree walk, compares
identifiers and returns a DmarcResult with the disposition that the domain asks for. Neither raises. What is done about it, and
reports, are left to the plugin.

DNS failure: where a question that matters has no answer, the result is temperror and the disposition tempfail, never the policy
of a name further up (RFC 9989 section 5.3.6). Several author domains (section 11.5): each is judged, at most MAX_AUTHORS, and the
strictest policy among those that fail is the message's; such a message never passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from gmta.mail.address import AddressError, check_domain, domain_key
from gmta.services.dns import Status, texts
from gmta.verify import Asks

MAX_AUTHORS = 3  # author domains judged; each may cost a tree walk (RFC 9989 section 11.5)
MAX_ADDRESSES = 200  # in From
MAX_FROM = 32 * 1024  # octets of all From fields together
MAX_TAGS = 100  # of a record; what comes after them is one more tag
KEPT_SIZE = 1024  # octets of a record whose reading is remembered
MAX_LABELS = 7  # RFC 9989 section 4.10 step 4

POLICIES = ("none", "quarantine", "reject")  # from the mildest

_VERSION = re.compile(r"[vV][ \t]*=[ \t]*DMARC1[ \t]*\Z")  # RFC 9989 section 4.8
_UNPRINTABLE = re.compile(r"[^ -~\t]")
_URI = re.compile(r"[ \t]*[a-z][a-z0-9+.\-]*:[^\s!\"<>\\^`{|}]*(?:![0-9]+[kmgt]?)?[ \t]*\Z", re.I)  # RFC 3986, RFC 9989 section 4.8


class Record(NamedTuple):
    """A policy record. p, sp, np: policies, the latter "" where not given.  strict_dkim, strict_spf: alignment.  psd: y, n or u.

    testing: t=y.  rua, ruf, fo: as published.  usable: False where its policy can't be told (RFC 9989 section 4.10.1).
    """

    p: str
    sp: str
    np: str
    strict_dkim: bool
    strict_spf: bool
    psd: str
    testing: bool
    rua: str
    ruf: str
    fo: str
    usable: bool


@dataclass(frozen=True, slots=True)
class Authors:
    """What the From fields say: the domains, A-labels in lower case, each once; problem: what is wrong with the fields, or "".

    excessive: more than is looked at, so that nothing can be said for the message.
    """

    domains: tuple[str, ...]
    problem: str = ""
    excessive: bool = False


@dataclass(frozen=True, slots=True)
class DmarcResult:
    """What came of it.

    result: pass, fail, none, temperror or permerror.  disposition: none, quarantine, reject, or tempfail where it can't be told
    now.  policy: what the record asks for this domain before t=, "" without record.  domain: the author domain ("" where there
    is none).  organizational_domain, policy_domain: where the walk led, "" where not needed or unknown.  aligned: the
    identifiers that vouch, like "dkim=example.com".  problem: what is wrong with From, or "".  steps: for people.
    """

    result: str
    disposition: str
    reason: str
    policy: str = ""
    domain: str = ""
    organizational_domain: str = ""
    policy_domain: str = ""
    aligned: tuple[str, ...] = ()
    problem: str = ""
    record: Record | None = field(default=None, repr=False)
    steps: tuple[str, ...] = field(default=(), repr=False)


# --- From -------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\\.|[^"\\()<>,;:]+|.', re.S)
_IN_COMMENT = re.compile(r"\\.|[^\\()]+|.", re.S)
_LOOSE = re.compile(r" ?([@.]) ?")
# Name <local@domain>, nothing in it that could be read otherwise: nearly all mail, and a fifth of the work
_PLAIN = re.compile(rb"""[\w !#$%&'*+\-/=?^`{|}~.]*(?:"[^"\\]*"[ ]*)?<[\w!#$%&'*+\-/=?^`{|}~.]+@([A-Za-z0-9.\-]{1,253})>\Z""")


def authors_of(values: Sequence[bytes]) -> Authors:
    """The author domains of a message; values: those of its From fields, from the top, folded or not."""
    if not values:
        return Authors((), "no From field")
    problem = f"{len(values)} From fields" if len(values) > 1 else ""  # RFC 5322 section 3.6
    if sum(map(len, values)) > MAX_FROM:
        return Authors((), "From is too long", excessive=True)
    plain = _PLAIN.match(values[0]) if len(values) == 1 else None
    if plain is not None and (domain := _name(plain[1].decode("ascii"))):
        return Authors((domain,))
    found = [text for value in values for text in _domains(value.decode("utf-8", "surrogateescape"))]
    if len(found) > MAX_ADDRESSES:
        return Authors((), f"From has {len(found)} addresses", excessive=True)
    domains: dict[str, None] = {}
    for text in found:
        domain = _name(text)
        if domain:
            domains[domain] = None
        else:
            problem = problem or "From has an address without a valid domain"
    if len(domains) > MAX_AUTHORS:
        return Authors(tuple(domains), f"From has {len(domains)} domains", excessive=True)
    if not domains:
        problem = problem or "From has no address"
    return Authors(tuple(domains), problem)


def _domains(text: str) -> Iterable[str]:
    """What stands behind the @ of each address, by RFC 5322 section 3.4 and 4.4, lenient: what some reader may show counts."""
    plain: list[str] = []  # the mailbox at hand outside angle brackets: display name or bare address
    angles: list[str] = []
    angle: list[str] | None = None
    found: list[str] = []

    def end() -> None:
        nonlocal angle
        if angle is not None:
            angles.append("".join(angle))
        chosen = [part for part in angles if "@" in part] or _LOOSE.sub(r"\1", " ".join("".join(plain).split())).split()
        found.extend(part.rpartition("@")[2].strip() for part in chosen if "@" in part)
        plain.clear()
        angles.clear()
        angle = None

    position, depth = 0, 0
    comments = "(" in text and _balanced(text)
    while position < len(text):
        match = (_IN_COMMENT if depth else _TOKEN).match(text, position)
        assert match is not None  # both end in "any character"
        token, position = match[0], match.end()
        if depth or (token == "(" and comments):
            depth += (token == "(") - (token == ")")
            continue
        part = plain if angle is None else angle
        if token == "<":
            if angle:
                angles.append("".join(angle))
            angle = []
        elif token == ">" and angle is not None:
            angles.append("".join(angle))
            angle = None
        elif token == ":":  # the name of a group (RFC 6854), or a route (RFC 5322 section 4.4)
            part.clear()
        elif token in (",", ";") and angle is None:
            end()
        elif token[0] == '"' and len(token) > 1:
            part.append("q")  # a local part or a name: nothing in it counts
        else:
            part.append(token)
    end()
    return found


def _balanced(text: str) -> bool:
    """True where every comment ends; where one does not, no reader agrees with another on what it hides, so that nothing is hidden."""
    position, depth = 0, 0
    while position < len(text):
        match = (_IN_COMMENT if depth else _TOKEN).match(text, position)
        assert match is not None
        token, position = match[0], match.end()
        if depth or token == "(":
            depth += (token == "(") - (token == ")")
    return depth == 0


def _name(text: str) -> str:
    """A domain in the form it is looked up by, or "" (RFC 9989 section 5.3.1)."""
    return _short_name(text) if len(text) <= 1000 else ""


@lru_cache(maxsize=2000)
def _short_name(text: str) -> str:
    if text.startswith("["):
        return ""
    name = domain_key("".join(text.split()))
    try:
        check_domain(name)
    except AddressError:
        return ""
    return name if name.isascii() else ""


# --- records ----------------------------------------------------------------------------------------------------


def parse(text: str) -> Record | None:
    """A policy record, or None for a text that is none (RFC 9989 section 4.7, 4.8); remembers short ones."""
    return _parse_short(text) if len(text) <= KEPT_SIZE else _parse(text)


def _parse(text: str) -> Record | None:
    version, *rest = text.split(";", MAX_TAGS)
    if _VERSION.match(version) is None:
        return None
    tags: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if equals and not _UNPRINTABLE.search(part):
            tags.setdefault(name.strip(" \t").lower(), value.strip(" \t"))
    policies = {name: tags.get(name, "").lower() for name in ("p", "sp", "np")}
    usable = True
    if policies["p"] not in POLICIES or any(name in tags and policy not in POLICIES for name, policy in policies.items()):
        # RFC 9989 section 4.10.1: none, if somebody is there to be told of it; else as if there were no DMARC
        usable = any(_URI.match(uri) for uri in tags.get("rua", "").split(","))
        policies = {"p": "none", "sp": "", "np": ""}
    psd = tags.get("psd", "u").lower()
    return Record(policies["p"], policies["sp"], policies["np"], tags.get("adkim", "").lower() == "s",
                  tags.get("aspf", "").lower() == "s", psd if psd in ("y", "n") else "u", tags.get("t", "").lower() == "y",
                  tags.get("rua", ""), tags.get("ruf", ""), tags.get("fo", "0"), usable)


_parse_short = lru_cache(maxsize=1000)(_parse)


class _Unknown(Exception):
    """DNS could not tell now."""


class _Walks:
    """The tree walks of one message: each name is asked once."""

    def __init__(self, asks: Asks, steps: list[str] | None) -> None:
        self._asks = asks
        self._steps = steps
        self._records: dict[str, Record | None] = {}

    def note(self, text: str) -> None:
        """A step for people."""
        if self._steps is not None:
            self._steps.append(text)

    def at(self, name: str) -> Record | None:
        """The one record at a name; raises _Unknown."""
        if name in self._records:
            return self._records[name]
        answer = self._asks.look_up(f"_dmarc.{name}", "TXT")
        if answer.status is Status.TEMPORARY:
            self.note(f"_dmarc.{name}: {answer.reason}")
            raise _Unknown(f"_dmarc.{name}: {answer.reason}")
        candidates = (raw.decode("latin-1") for raw in texts(answer))
        found = list(islice(((text, record) for text in candidates if (record := parse(text)) is not None), 2))
        if not found:
            self.note(f"_dmarc.{name}: no record")
        elif len(found) > 1:  # RFC 9989 section 4.10 steps 2 and 6
            self.note(f"_dmarc.{name}: several records, all discarded")
        else:
            self.note(f"_dmarc.{name}: {found[0][0]}")
        record = self._records[name] = found[0][1] if len(found) == 1 else None
        return record

    def walk(self, start: str) -> tuple[str, dict[str, Record]]:
        """(organizational domain, records by name from the longest) for a name (RFC 9989 section 4.10); raises _Unknown."""
        found: dict[str, Record] = {}
        organizational = ""
        for name in _targets(start):
            record = self.at(name)
            if record is None:
                continue
            found[name] = record
            if record.psd == "n":  # RFC 9989 section 4.10.2 step 1
                organizational = name
            elif record.psd == "y" and name != start:  # step 2
                organizational = start if start.count(".") == name.count(".") + 1 else ".".join(
                    start.split(".")[-(name.count(".") + 2):])
            if record.psd != "u":
                break
        if not organizational:  # step 3: the fewest labels; without any record the name itself
            organizational = next(reversed(found), start)
        return organizational, found

    def exists(self, name: str) -> bool:
        """False for NXDOMAIN (RFC 9989 section 3.2.13, A.4); raises _Unknown."""
        answer = self._asks.look_up(name, "A")
        if answer.status is Status.TEMPORARY:
            self.note(f"{name}: {answer.reason}")
            raise _Unknown(f"{name}: {answer.reason}")
        exists = answer.status is not Status.NXDOMAIN or answer.canonical not in ("", answer.name)  # RFC 6604 section 3: a CNAME is there
        self.note(f"{name} {'exists' if exists else 'does not exist'}")
        return exists


def _targets(start: str) -> Iterable[str]:
    """The names of a walk, eight at most (RFC 9989 section 4.10 steps 1 to 7)."""
    yield start
    rest = start.split(".")[1:][-MAX_LABELS:]
    while rest:
        yield ".".join(rest)
        del rest[0]


# --- the evaluation ---------------------------------------------------------------------------------------------


def evaluate(asks: Asks, authors: Authors, spf: tuple[str, str], dkim: Sequence[tuple[str, str]], *, trace: bool = False) -> DmarcResult:
    """The DMARC result of a message.

    spf: (result, domain) of the MAIL FROM identity, which for the null sender is the HELO name.  dkim: (result, d) of each
    signature.  trace: keep steps, and walk to the organizational domain even where nothing depends on it.
    """
    steps: list[str] | None = [] if trace else None
    walks = _Walks(asks, steps)
    identifiers = [Identifier("spf", spf[0], _name(spf[1]))] + [Identifier("dkim", result, _name(domain)) for result, domain in dkim]
    if authors.problem:
        walks.note(authors.problem)
    if authors.excessive:  # RFC 9989 section 11.5: a threat, not a message
        outcome = DmarcResult("permerror", "reject", authors.problem, problem=authors.problem)
    elif not authors.domains:
        outcome = DmarcResult("permerror", "none", authors.problem, problem=authors.problem)
    elif len(authors.domains) == 1 and not authors.problem:
        outcome = _judge(walks, authors.domains[0], identifiers, trace)
    else:
        outcome = _strictest(walks, authors, identifiers, trace)
    if steps is not None:
        walks.note(f"dmarc={outcome.result}, disposition {outcome.disposition}: {outcome.reason}")
        outcome = replace(outcome, steps=tuple(steps))
    return outcome


def organization_of(asks: Asks, domain: str) -> str | None:
    """The organizational domain of a name (RFC 9989 section 4.10.2), None where DNS can't tell now."""
    try:
        return _Walks(asks, None).walk(domain)[0]
    except _Unknown:
        return None


def is_aligned(asks: Asks, author: str, domain: str, *, strict: bool) -> bool:
    """Whether an identifier's domain is aligned with the author's (RFC 9989 section 4.4); False where DNS can't tell now."""
    author, domain = _name(author), _name(domain)
    try:
        return bool(domain) and (domain == author or (not strict and _same_organization(_Walks(asks, None), author, domain)))
    except _Unknown:
        return False


class Identifier(NamedTuple):
    """What SPF or a signature says of a domain."""

    method: str
    result: str
    domain: str


def _strictest(walks: _Walks, authors: Authors, identifiers: list[Identifier], trace: bool) -> DmarcResult:
    """The result where From is malformed or has several domains: the strictest of those that fail, and no pass (section 11.5)."""
    problem = authors.problem or f"From has {len(authors.domains)} domains"
    if authors.problem:  # RFC 9989 section 4.4: nothing is aligned with a From that is not valid
        identifiers = []
    outcomes = [_judge(walks, domain, identifiers, trace) for domain in authors.domains]
    failed = [outcome for outcome in outcomes if outcome.result == "fail"]
    unknown = [outcome for outcome in outcomes if outcome.result == "temperror"]
    if failed:
        worst = max(failed, key=lambda outcome: POLICIES.index(outcome.disposition))
        if worst.disposition == "reject" or not unknown:
            return replace(worst, reason=f"{problem}; {worst.reason}", problem=problem)
    if unknown:
        return replace(unknown[0], reason=f"{problem}; {unknown[0].reason}", problem=problem)
    return replace(outcomes[0], result="permerror", disposition="none", reason=problem, aligned=(), problem=problem)


def _judge(walks: _Walks, author: str, identifiers: list[Identifier], trace: bool) -> DmarcResult:
    """The result for one author domain."""
    organizational, policy_domain, record = "", "", None

    def outcome(result: str, disposition: str, reason: str, policy: str = "", aligned: tuple[str, ...] = ()) -> DmarcResult:
        return DmarcResult(result, disposition, reason, policy, author, organizational, policy_domain, aligned, record=record)

    try:
        found_at, record = author, walks.at(author)  # RFC 9989 section 4.10.1
        if record is None:
            organizational, found = walks.walk(author)
            found_at = organizational if organizational in found else next(reversed(found), "")  # the last is the PSD's
            record = found.get(found_at)
        if record is None:
            return outcome("none", "none", f"no DMARC policy for {author}")
        policy_domain = found_at
        if not record.usable:
            return outcome("none", "none", f"the policy of {policy_domain} is not valid")
    except _Unknown as unknown:
        return outcome("temperror", "tempfail", str(unknown))
    aligned, unsure, why = _aligned(walks, author, record, identifiers)
    if trace:
        try:
            organizational = walks.walk(author)[0]
        except _Unknown:
            pass
    policy = record.p if policy_domain == author else record.sp or record.p  # RFC 9989 section 4.7
    if aligned:
        return outcome("pass", "none", f"{', '.join(aligned)} vouches for {author}", policy, aligned)
    if policy_domain != author and record.np and record.np != policy:
        try:
            policy = policy if walks.exists(author) else record.np
        except _Unknown as unknown:
            return outcome("temperror", "tempfail", str(unknown))
    if unsure:  # RFC 9989 section 5.3.6
        return outcome("temperror", "none" if policy == "none" else "tempfail", why, policy)
    disposition = policy
    if record.testing and policy != "none":  # RFC 9989 section 4.7: one level below
        disposition = POLICIES[POLICIES.index(policy) - 1]
        walks.note(f"t=y: {policy} becomes {disposition}")
    return outcome("fail", disposition, f"nothing vouches for {author}", policy)


def _aligned(walks: _Walks, author: str, record: Record, identifiers: list[Identifier]) -> tuple[tuple[str, ...], bool, str]:
    """(identifiers that vouch, whether one that DNS can't tell now might, why) for an author domain (RFC 9989 section 4.10.2)."""
    unsure, why = False, ""
    passed = sorted([one for one in identifiers if one.result == "pass" and one.domain], key=lambda one: one.domain != author)
    for one in passed + [one for one in identifiers if one.result == "temperror" and one.domain]:
        if unsure and one.result != "pass":
            break
        strict = record.strict_spf if one.method == "spf" else record.strict_dkim
        try:
            same = one.domain == author or (not strict and _same_organization(walks, author, one.domain))
        except _Unknown as unknown:
            unsure, why = True, str(unknown)
            continue
        walks.note(f"{one.method}={one.result} {one.domain}: {'aligned' if same else 'not aligned'}, {'strict' if strict else 'relaxed'}")
        if not same:
            continue
        if one.result == "pass":
            return (f"{one.method}={one.domain}",), False, ""
        unsure, why = True, f"{one.method} of {one.domain} can't be told now"
    return (), unsure, why


def _same_organization(walks: _Walks, author: str, domain: str) -> bool:
    """True where both have one organizational domain; raises _Unknown. Asks nothing for a name that is not below the author's."""
    if domain.rpartition(".")[2] != author.rpartition(".")[2]:
        return False
    organizational = walks.walk(author)[0]
    if domain != organizational and not domain.endswith(f".{organizational}"):
        return False
    return walks.walk(domain)[0] == organizational
