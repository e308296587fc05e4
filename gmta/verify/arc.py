"""ARC (RFC 8617): verifies the chain that forwarders have left on a message, and adds a link to it.

`verify_chain` follows section 5.2 and says with ArcResult how far it came; `seal` makes the three fields of a new set. Signatures,
keys and body hashes are those of dkim.py. Whom to trust for a chain, and when to seal, is left to the plugins.

Failure: whatever stands in a message or in DNS makes the chain `fail`, for good even where DNS failed (section 5.2.1): such a
result has `temporary` set, so that the mail may be deferred instead. Only the OSError of a body that can't be read passes through.

dkimpy 1.1.8's ARC class is not used: it holds the whole message, judges every AMS where the last one counts, finds the AMS to
verify by searching for ` i=1;` as text, and knows no Ed25519.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gmta.mail.message import Message
from gmta.verify import Asks, Lookups
from gmta.verify.canonical import Header, hash_body, relaxed_field
from gmta.verify.dkim import (
    HEAVY,
    Fault,
    Heavy,
    Signature,
    Trial,
    digest_of,
    hash_for,
    own_field,
    run,
    try_keys,
)
from gmta.verify.signing import OVERSIGNED, SIGNED, SigningKey, finished, names_to_sign

MAX_INSTANCES = 50  # RFC 8617 section 4.2.1

AAR, AMS, AS = b"arc-authentication-results", b"arc-message-signature", b"arc-seal"
_INSTANCE = re.compile(rb"[0-9]{1,2}\Z")
_AAR_INSTANCE = re.compile(rb"[ \t\r\n]*i[ \t]*=[ \t]*([0-9]{1,2})[ \t\r\n]*;(.*)\Z", re.S)
_UNFOLD = re.compile(rb"\r?\n")


@dataclass(slots=True)
class ArcSet:
    """One link. domain, selector: of its seal.  results: what its Authentication-Results say, unfolded, authserv-id first."""

    instance: int
    domain: str
    selector: str
    results: str


@dataclass(slots=True)
class ArcResult:
    """What the chain is worth.

    result: none, pass or fail.  instances: the highest found.  sets: by instance from 1, only of a sound structure; they mean
    something where the result is pass.  oldest_pass: the oldest instance whose AMS still verifies, 0 where all do, None where
    the result is not pass.  ended: the last seal says fail, so nobody may add another.  temporary: DNS failed.
    """

    result: str
    reason: str = ""
    instances: int = 0
    sets: tuple[ArcSet, ...] = ()
    oldest_pass: int | None = None
    ended: bool = False
    temporary: bool = False
    steps: list[str] = field(default_factory=list)


class _Link:
    """The places of one instance's fields, and their signatures."""

    __slots__ = ("aar", "ams", "instance", "message", "seal", "sealed", "unread")

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self.aar = self.ams = self.seal = -1
        self.message = Signature("message")
        self.sealed = Signature("seal")
        self.unread = ""  # what keeps one of the signatures from being read


def verify_chain(message: Message, resolver: Asks, *, now: float, heavy: Heavy = run, trace: bool = False) -> ArcResult:
    """The Chain Validation Status of a message. now: Unix seconds.  resolver, heavy, trace: as for dkim.verify.  Raises OSError."""
    raw = message.header
    if b"arc-" not in raw.lower():
        return ArcResult("none", "no ARC fields")
    header = Header(raw)
    result = ArcResult("fail")
    try:
        links = _collect(header, result)
        if not links:
            return ArcResult("none", "no ARC fields")
        _check_structure(header, links, result)
        lookups = resolver if isinstance(resolver, Lookups) else Lookups(resolver)
        _check_seals(header, links, lookups, result, _check_messages(header, message, links, lookups, now, heavy, result, trace), trace)
        result.result = "pass"
    except Fault as fault:
        result.reason = fault.reason
        result.temporary = fault.result == "temperror"
        result.oldest_pass = None
    if trace:
        result.steps.append(f"result: {result.result}" + (f" ({result.reason})" if result.reason else ""))
    return result


def _collect(header: Header, result: ArcResult) -> list[_Link]:
    """The sets from 1 on, each field once; raises Fault. RFC 8617 section 5.2 steps 1 to 3."""
    found: dict[int, _Link] = {}
    trouble = ""
    if sum(len(header.places(name)) for name in (AAR, AMS, AS)) > 3 * MAX_INSTANCES:
        raise Fault("fail", f"more than {MAX_INSTANCES} ARC sets")
    for name, attribute in ((AAR, "aar"), (AMS, "ams"), (AS, "seal")):
        for place in header.places(name):
            signature = Signature("seal" if name == AS else "message", place)
            unread = ""
            if name == AAR:
                match = _AAR_INSTANCE.match(header.value(place))
                text = match[1] if match is not None else b""
            else:
                try:
                    signature.read(header.value(place))
                except Fault as fault:
                    unread = fault.reason
                text = signature.tags.get(b"i", b"")
            if _INSTANCE.match(text) is None or not 1 <= int(text) <= MAX_INSTANCES:  # RFC 8617 section 4.2.1
                trouble = trouble or f"{name.decode()}: {unread or 'bad i='}"
                continue
            instance = int(text)
            link = found.setdefault(instance, _Link(instance))
            if getattr(link, attribute) >= 0:
                trouble = trouble or f"i={instance} has {name.decode()} twice"
            setattr(link, attribute, place)
            if unread:
                link.unread = f"{name.decode()} {instance}: {unread}"
            if name == AMS:
                link.message = signature
            elif name == AS:
                link.sealed = signature
    if found:
        result.instances = max(found)
        newest = found[result.instances].sealed.tags.get(b"cv")
        if newest == b"fail":
            result.ended = True
            raise Fault("fail", f"seal {result.instances} says that the chain had failed")
    if trouble:
        raise Fault("fail", trouble)
    links = [found[instance] for instance in sorted(found)]
    for number, link in enumerate(links, 1):
        if link.instance != number:
            raise Fault("fail", f"there is no i={number}")
        if min(link.aar, link.ams, link.seal) < 0:
            raise Fault("fail", f"i={number} is not complete")
    return links


def _check_structure(header: Header, links: Sequence[_Link], result: ArcResult) -> None:
    """The rest of RFC 8617 section 5.2 step 3; raises Fault."""
    sets = []
    for link in links:
        if link.unread:
            raise Fault("fail", link.unread)
        if b"arc-seal" in link.message.names:
            raise Fault("fail", f"message signature {link.instance} covers a seal")  # RFC 8617 section 4.1.2
        wanted = b"none" if link.instance == 1 else b"pass"
        if link.sealed.tags[b"cv"] != wanted:
            raise Fault("fail", f"seal {link.instance} has not cv={wanted.decode()}")
        match = _AAR_INSTANCE.match(header.value(link.aar))
        text = _UNFOLD.sub(b"", match[2]).decode("utf-8", "replace").strip() if match is not None else ""
        sets.append(ArcSet(link.instance, link.sealed.domain, link.sealed.selector, text))
    result.sets = tuple(sets)


def _check_messages(header: Header, message: Message, links: Sequence[_Link], lookups: Lookups, now: float, heavy: Heavy,
                    result: ArcResult, trace: bool) -> list[Trial]:
    """Verifies the last AMS (RFC 8617 section 5.2 step 4), raising Fault; returns the trials of the others, from the last down."""
    trials = [Trial(link.message, trace=trace) for link in reversed(links)]
    for trial in trials:
        trial.attempt(trial.ask, lookups)
        trial.attempt(trial.check_header, header)
        trial.fault = trial.fault or trial.header_fault
        if trials[0].fault is not None:
            break
    else:
        hashes = hash_for(trials, message, heavy)
        for trial in trials:
            trial.attempt(trial.check_body, hashes)
            trial.attempt(trial.signature.check_times, now)
            length = trial.signature.length
            if trial.fault is None and length is not None and length < hashes[trial.signature.body_relaxed].length:
                trial.fault = Fault("fail", "l= leaves a part of the body unsigned")
    last = trials[0]
    result.steps += [f"message signature {len(links)}: {step}" for step in last.steps or ()]
    if last.fault is not None:
        raise Fault(last.fault.result, f"message signature {len(links)}: {last.fault.reason}")
    return trials[1:]


def _check_seals(header: Header, links: Sequence[_Link], lookups: Lookups, result: ArcResult, older: Sequence[Trial],
                 trace: bool) -> None:
    """Verifies every seal, from the last down (RFC 8617 section 5.2 step 6); raises Fault."""
    fields: list[bytes] = []
    digests = []
    for link in links:
        fields += [header.canonical(link.aar, True), header.canonical(link.ams, True)]  # RFC 8617 section 5.1.1
        digests.append(digest_of(fields, own_field(header, link.seal, True)))
        fields.append(header.canonical(link.seal, True))
    for link, digest in zip(reversed(links), reversed(digests), strict=True):
        trial = Trial(link.sealed, trace=trace)
        try:
            trial.ask(lookups)
            try_keys(trial.records, link.sealed, digest, trial.steps)
        except Fault as fault:
            raise Fault(fault.result, f"seal {link.instance}: {fault.reason}") from None
        finally:
            result.steps += [f"seal {link.instance} of {link.sealed.domain}: {step}" for step in trial.steps or ()]
    result.oldest_pass = 0
    for number, trial in enumerate(older):
        if trial.fault is not None:
            result.oldest_pass = len(links) - number  # RFC 8617 section 5.2 step 5
            break


# --- sealing --------------------------------------------------------------------------------------------------------


def seal(message: Message, key: SigningKey, chain: ArcResult, results: str, *, now: float, heavy: Heavy = run) -> list[tuple[str, str]]:
    """The fields of a new ARC set, the first to stand on top; none where the chain may not be continued.

    chain: what verify_chain said of the message as it came in.  results: the value of our Authentication-Results, folded or
    not.  now: Unix seconds.  Raises OSError where the body can't be read.
    """
    instance = chain.instances + 1
    if chain.ended or instance > MAX_INSTANCES:  # RFC 8617 section 5.1 step 2, section 4.2.1
        return []
    header = Header(message.header)
    body = message.body
    hashes = (heavy if body.size > HEAVY else run)(lambda: hash_body(body, {True: set()}))
    common = [f"i={instance}", f"a={key.algorithm}"]
    whose = [f"d={key.domain}", f"s={key.selector}", f"t={int(now)}"]
    aar = f"i={instance}; {results}"
    # never Authentication-Results, which the next one may drop, nor ARC's own (RFC 8617 section 4.1.2)
    names = names_to_sign(header, OVERSIGNED, (*SIGNED, "DKIM-Signature"))
    places = header.pick([name.lower().encode("ascii") for name in names])
    tags = [*common, "c=relaxed/relaxed", *whose, "h=" + ":".join(names), f"bh={base64.b64encode(hashes[True].digest).decode('ascii')}"]
    ams = finished("ARC-Message-Signature", tags, [header.canonical(place, True) for place in places], key)
    fields = [] if chain.result == "fail" else _sets(header, chain.instances)  # RFC 8617 section 5.1.2
    fields += [relaxed_field(AAR, aar.encode("utf-8", "surrogateescape")), relaxed_field(AMS, ams.encode("ascii"))]
    top = finished("ARC-Seal", [*common, f"cv={chain.result}", *whose], fields, key)
    return [("ARC-Seal", top), ("ARC-Message-Signature", ams), ("ARC-Authentication-Results", aar)]


def _sets(header: Header, instances: int) -> list[bytes]:
    """The fields of a sound chain, in the order they are sealed in."""
    if not instances:
        return []
    links = _collect(header, ArcResult("pass"))
    return [header.canonical(place, True) for link in links for place in (link.aar, link.ams, link.seal)]
