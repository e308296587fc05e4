"""Verifies DKIM signatures (RFC 6376, RFC 8301, RFC 8463, RFC 8616) and says why they pass or don't.

`verify` gives one DkimResult a signature, in the message's order. It asks the resolver for keys, reads the body once, and has
no opinion of what a result means for the mail. Tag lists and c= are parsed by dkimpy, canonicalisation is in canonical.py,
the arithmetic is OpenSSL's through `cryptography`. `Signature`, `Key` and the functions below serve arc.py too.

Failure: whatever stands in a message or in DNS becomes a result, never an exception; only the OSError of a body file that
can't be read passes through.

dkimpy 1.1.8 is not followed where it departs from the RFCs, and its DKIM class not used: it judges the topmost signature
only; takes one that leaves From unsigned, rsa-sha1, an l= past the body, keys whose h= or t=s forbid it, a= and k= that
disagree; refuses s= and q= lists and a b= that comes first; raises on malformed d=, i=, l=, t=, base64 and Ed25519
signatures; and takes a DNS failure for a missing key. Each is set right at the line that carries the RFC's number.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from dkim.canonicalization import CanonicalizationPolicy, InvalidCanonicalizationPolicyError
from dkim.util import DuplicateTag, InvalidTagValueList, parse_tag_value

from gmta.mail.address import domain_key
from gmta.mail.message import Message
from gmta.services.dns import Status, texts
from gmta.verify import Asks, Lookups
from gmta.verify.canonical import BodyHash, Header, hash_body, relaxed_field, without_signature

MAX_SIGNATURES = 10  # judged; the others are named and left
MAX_PARSED = 100  # looked into, to find those ten
MAX_FIELD = 64 * 1024  # octets of one signature field; z= may hold a copy of the header
MAX_TAGS = 100  # of a signature or key record
MAX_COPIES = 100  # of z= compared
MAX_NAMES = 2000  # in h=: more than a header may have fields
MAX_RECORDS = 5  # key records tried where a selector has several (RFC 6376 section 6.1.2)
MIN_BITS, MAX_BITS = 1024, 4096  # RFC 8301 section 3.2
MAX_EXPONENT_BITS = 64  # a huge exponent makes each verification cost what signing does
LEEWAY_S = 3600  # clocks differ; for t= and x=
KEPT_SIZE = 2048  # octets of a key record that is remembered: one of 4096 bits takes some 750
HEAVY = 1024 * 1024  # octets of a body from which on it is hashed through `heavy`

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}\Z")
_NUMBER = re.compile(rb"[0-9]{1,76}\Z")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\Z")
_QUOTED = re.compile(rb"=([0-9A-F]{2})")
_ALGORITHMS = {b"rsa-sha256": "rsa", b"ed25519-sha256": "ed25519"}
_RANK = {"pass": 0, "fail": 1, "policy": 2, "neutral": 3, "permerror": 4}
_PADDING, _HASH, _PREHASHED = PKCS1v15(), SHA256(), Prehashed(SHA256())

T = TypeVar("T")
Heavy = Callable[[Callable[[], Any]], Any]


class Fault(Exception):
    """What keeps a signature from passing: result (as in RFC 8601 section 2.7.1) and reason."""

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result = result
        self.reason = reason


@dataclass(slots=True)
class DkimResult:
    """One signature's outcome.

    result: pass, fail, policy, neutral, temperror or permerror.  domain, selector, identity, algorithm: d=, s=, i= and a=,
    "" where they could not be read.  b: the start of b=, for header.b (RFC 6008).  body_length_used: l= or None.
    key_bits: of the key used.  testing: the key says t=y.  steps: what was done, for people, where that was asked for.
    """

    result: str
    domain: str = ""
    selector: str = ""
    identity: str = ""
    reason: str = ""
    b: str = ""
    algorithm: str = ""
    body_length_used: int | None = None
    key_bits: int = 0
    testing: bool = False
    steps: list[str] = field(default_factory=list)


class Signature:
    """The tags of a DKIM-Signature, ARC-Message-Signature or ARC-Seal field; `read` fills in what it can before it raises Fault."""

    __slots__ = ("algorithm", "b", "body_hash", "body_relaxed", "domain", "expires_at", "header_relaxed", "identity",
                 "identity_domain", "kind", "length", "names", "place", "selector", "signature", "signed_at", "tags")

    def __init__(self, kind: str = "dkim", place: int = -1) -> None:
        self.kind = kind  # "dkim", "message" (ARC-Message-Signature) or "seal" (ARC-Seal)
        self.place = place
        self.tags: dict[bytes, bytes] = {}
        self.algorithm = self.domain = self.selector = self.identity = self.identity_domain = self.b = ""
        self.header_relaxed = self.body_relaxed = True
        self.signature = self.body_hash = b""
        self.names: list[bytes] = []
        self.length: int | None = None
        self.signed_at: int | None = None
        self.expires_at: int | None = None

    @property
    def key_name(self) -> str:
        """Where the key is (RFC 6376 section 3.6.2.1)."""
        return f"{self.selector}._domainkey.{self.domain}"

    def read(self, value: bytes) -> None:
        """Takes the field's value apart; raises Fault."""
        if len(value) > MAX_FIELD:
            raise Fault("policy", f"signature field over {MAX_FIELD} octets")
        tags = self.tags = parse_tags(value)
        self.b = tags.get(b"b", b"")[:80].translate(None, b" \t")[:8].decode("ascii", "replace")
        self.algorithm = tags.get(b"a", b"").decode("ascii", "replace")
        self._read_names(tags)
        required = {"dkim": (b"v", b"a", b"b", b"bh", b"d", b"h", b"s"), "message": (b"a", b"b", b"bh", b"d", b"h", b"s"),
                    "seal": (b"a", b"b", b"cv", b"d", b"s")}[self.kind]
        missing = [name.decode() for name in required if name not in tags]
        if missing:
            raise Fault("permerror", f"{missing[0]}= is missing")  # RFC 6376 section 6.1.1
        if self.kind == "dkim" and tags[b"v"] != b"1":
            raise Fault("permerror", "v= is not 1")  # RFC 6376 section 3.5
        if tags[b"a"] not in _ALGORITHMS:
            sha1 = tags[b"a"] == b"rsa-sha1"
            raise Fault("permerror", "rsa-sha1 is no longer accepted" if sha1 else "unknown algorithm in a=")  # RFC 8301 section 3.1
        self.signature = unbase64(tags[b"b"], "b=")
        self._read_times(tags)
        if self.kind == "seal":
            if b"h" in tags:
                raise Fault("permerror", "h= in a seal")  # RFC 8617 section 4.1.3
            return
        self.body_hash = unbase64(tags[b"bh"], "bh=")
        try:
            # RFC 8617 takes over DKIM's default, simple; its test suite and those who seal take relaxed (RFC 6376 section 3.5)
            default = b"relaxed/relaxed" if self.kind == "message" else b"simple/simple"
            policy = CanonicalizationPolicy.from_c_value(tags.get(b"c", default))
        except InvalidCanonicalizationPolicyError:
            raise Fault("permerror", "unknown canonicalisation in c=") from None
        self.header_relaxed = policy.header_algorithm.name == b"relaxed"
        self.body_relaxed = policy.body_algorithm.name == b"relaxed"
        self._read_header_list(tags[b"h"])
        if b"l" in tags:
            if _NUMBER.match(tags[b"l"]) is None:
                raise Fault("permerror", "l= is not a number")
            self.length = int(tags[b"l"])
        if b"q" in tags and b"dns/txt" not in [method.strip() for method in tags[b"q"].split(b":")]:
            raise Fault("permerror", "q= has no dns/txt")  # RFC 6376 section 3.5: a list, unknown methods are passed over

    def _read_names(self, tags: dict[bytes, bytes]) -> None:
        """d=, s= and i=: first, since a result names them whatever else is wrong."""
        if b"d" in tags:
            self.domain = domain_name(tags[b"d"], "d=")
            if "." not in self.domain:
                raise Fault("permerror", "d= has a single label")  # RFC 6376 section 3.5: domain-name
        if b"s" in tags:
            self.selector = domain_name(tags[b"s"], "s=")
        if len(self.key_name) > 253:
            raise Fault("permerror", "the name of the key is too long")  # RFC 1035 section 2.3.4
        if self.kind != "dkim":
            return
        identity = tags.get(b"i")
        if identity is None:
            self.identity, self.identity_domain = f"@{self.domain}", self.domain
            return
        local, at, host = identity.translate(None, b" \t").rpartition(b"@")
        if not at:
            raise Fault("permerror", "i= has no at sign")
        self.identity_domain = domain_name(host, "i=")
        self.identity = f"{local.decode('utf-8', 'replace')}@{self.identity_domain}"
        if self.identity_domain != self.domain and not self.identity_domain.endswith(f".{self.domain}"):
            raise Fault("permerror", "i= is not within d=")  # RFC 6376 section 3.5, 6.1.1

    def _read_times(self, tags: dict[bytes, bytes]) -> None:
        times: list[int | None] = []
        for name in (b"t", b"x"):
            if name in tags:
                if _NUMBER.match(tags[name]) is None:
                    raise Fault("permerror", f"{name.decode()}= is not a number")
                times.append(int(tags[name]))
            else:
                times.append(None)
        self.signed_at, self.expires_at = times
        if self.signed_at is not None and self.expires_at is not None and self.expires_at <= self.signed_at:
            raise Fault("permerror", "x= is not after t=")  # RFC 6376 section 3.5

    def _read_header_list(self, value: bytes) -> None:
        if value.count(b":") >= MAX_NAMES:
            raise Fault("policy", f"h= has over {MAX_NAMES} names")
        self.names = [name for name in [one.strip().lower() for one in value.split(b":")] if name]
        if self.kind == "dkim" and b"from" not in self.names:
            raise Fault("permerror", "From is not signed")  # RFC 6376 section 5.4, 6.1.1

    def check_times(self, now: float) -> None:
        """Raises Fault for a signature of the future or of the past; `now` in Unix seconds."""
        if self.signed_at is not None and self.signed_at > now + LEEWAY_S:
            raise Fault("policy", "signed in the future")  # RFC 6376 section 3.5 (t=)
        if self.expires_at is not None and self.expires_at < now - LEEWAY_S:
            raise Fault("policy", "signature expired")  # RFC 6376 section 3.5 (x=)

    def summary(self) -> str:
        """One line for people."""
        shown = [f"{name}={self.tags[name.encode()].decode('utf-8', 'replace')}" for name in "disactxl" if name.encode() in self.tags]
        return "signature: " + " ".join(shown)


class Key:
    """A key record (RFC 6376 section 3.6.1). `key_of` makes them, and remembers those it has made."""

    __slots__ = ("bits", "exponent_bits", "flags", "hashes", "kind", "public", "services")

    def __init__(self, record: bytes) -> None:
        """Raises Fault for a record that gives no key."""
        tags = parse_tags(record)
        if b"v" in tags and (tags[b"v"] != b"DKIM1" or next(iter(tags)) != b"v"):
            raise Fault("permerror", "v= of the key record is not DKIM1, or not first")
        if b"p" not in tags:
            raise Fault("permerror", "the key record has no p=")
        if not tags[b"p"]:
            raise Fault("permerror", "key revoked")
        # g= is history, n= for people, other tags unknown: passed over (RFC 6376 section 3.6.1)
        self.kind = tags.get(b"k", b"rsa").decode("ascii", "replace")
        self.hashes = _words(tags.get(b"h"))
        self.services = _words(tags.get(b"s"))
        self.flags = _words(tags.get(b"t")) or frozenset()
        octets = unbase64(tags[b"p"], "p= of the key record")
        self.exponent_bits = 0
        self.public: RSAPublicKey | Ed25519PublicKey
        try:
            if self.kind == "rsa":
                public = load_der_public_key(octets)
                if not isinstance(public, RSAPublicKey):
                    raise ValueError
                self.public, self.bits = public, public.key_size
                self.exponent_bits = public.public_numbers().e.bit_length()
            elif self.kind == "ed25519":
                self.public, self.bits = Ed25519PublicKey.from_public_bytes(octets), 256  # RFC 8463 section 4
            else:
                raise Fault("permerror", "unknown k= in the key record")
        except (ValueError, UnsupportedAlgorithm):
            raise Fault("permerror", f"p= of the key record is no {self.kind} key") from None

    def check(self, signature: Signature) -> None:
        """Raises Fault where the record forbids the signature."""
        if _ALGORITHMS[signature.algorithm.encode()] != self.kind:
            raise Fault("permerror", f"a={signature.algorithm}, but the key is k={self.kind}")  # RFC 6376 section 6.1.2 step 8
        if self.hashes is not None and b"sha256" not in self.hashes:
            raise Fault("permerror", "h= of the key record has no sha256")  # RFC 6376 section 6.1.2 step 6
        if self.services is not None and not self.services & {b"*", b"email"}:
            raise Fault("permerror", "s= of the key record is not for email")  # RFC 6376 section 3.6.1
        if b"s" in self.flags and signature.kind == "dkim" and signature.identity_domain != signature.domain:
            raise Fault("permerror", "i= is of a subdomain, which t=s of the key record forbids")  # RFC 6376 section 3.6.1
        if self.kind == "rsa" and not MIN_BITS <= self.bits <= MAX_BITS:
            raise Fault("policy", f"key of {self.bits} bits")  # RFC 8301 section 3.2
        if self.exponent_bits > MAX_EXPONENT_BITS:
            raise Fault("policy", f"exponent of {self.exponent_bits} bits in the key")

    def verifies(self, signature: bytes, digest: bytes) -> bool:
        """Whether `signature` over what hashes to `digest` was made with this key."""
        try:
            if isinstance(self.public, RSAPublicKey):
                self.public.verify(signature, digest, _PADDING, _PREHASHED)
            else:
                self.public.verify(signature, digest)  # RFC 8463 section 3: over the SHA-256 digest
        except (InvalidSignature, ValueError, UnsupportedAlgorithm):
            return False
        return True

    def signed_digest(self, signature: bytes) -> bytes | None:
        """The digest that an RSA signature was made over; None where it is not of this key, or can't be told."""
        if not isinstance(self.public, RSAPublicKey):
            return None
        try:
            return self.public.recover_data_from_signature(signature, _PADDING, _HASH)
        except (InvalidSignature, ValueError, UnsupportedAlgorithm):
            return None


def key_of(record: bytes) -> Key:
    """The key of a record; raises Fault."""
    return _kept_key(record) if len(record) <= KEPT_SIZE else Key(record)


_kept_key = lru_cache(maxsize=1000)(Key)  # OpenSSL's preparations are kept with it


def parse_tags(value: bytes) -> dict[bytes, bytes]:
    """A tag list (RFC 6376 section 3.2), still folded, by dkimpy's parser; raises Fault."""
    if value.count(b";") > MAX_TAGS:
        raise Fault("policy", f"over {MAX_TAGS} tags")
    if b"\n" in value:
        value = value.replace(b"\r\n", b"").replace(b"\n", b"")
    if _CONTROL.search(value) is not None:  # the parser strips some of them
        raise Fault("permerror", "control character in a tag list")
    try:
        tags: dict[bytes, bytes] = parse_tag_value(value)  # also takes x-vendor=, which the grammar has not, and others write
    except DuplicateTag:
        raise Fault("permerror", "the same tag twice") from None  # RFC 6376 section 3.2
    except InvalidTagValueList:
        raise Fault("permerror", "not a list of tags") from None
    return tags


def unbase64(text: bytes, what: str) -> bytes:
    """The octets of unfolded base64; raises Fault. Missing pads are no fault: RFC 6376 section 2.10 has them optional."""
    text = text.translate(None, b" \t")
    try:
        if _BASE64.match(text) is None:
            raise ValueError
        return base64.b64decode(text.rstrip(b"=") + b"=" * (-len(text.rstrip(b"=")) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise Fault("permerror", f"{what} is not base64") from None


def domain_name(text: bytes, what: str) -> str:
    """A domain or selector in lower case and A-labels (RFC 8616 section 5); raises Fault."""
    name = _name_of(text) if len(text) <= 1000 else ""
    if not name:
        raise Fault("permerror", f"{what} is no domain name")
    return name


@lru_cache(maxsize=2000)
def _name_of(text: bytes) -> str:
    """The name, or "" for a text that is none."""
    try:
        name = domain_key(text.decode("utf-8"))
    except UnicodeDecodeError:
        return ""
    if _NAME.match(name) is None or text.endswith(b".") or len(name) > 253 or max(map(len, name.split("."))) > 63:
        return ""
    return name


def _words(value: bytes | None) -> frozenset[bytes] | None:
    """A colon-separated list; None where the tag is missing."""
    return None if value is None else frozenset(word.strip() for word in value.split(b":"))


def key_records(lookups: Asks, name: str) -> list[bytes]:
    """The TXT records of a key's name, each with its strings joined (RFC 6376 section 3.6.2.2); raises Fault."""
    answer = lookups.look_up(name, "TXT")
    if answer.status is Status.TEMPORARY:
        raise Fault("temperror", f"can't get the key: {answer.reason or 'DNS failed'}")  # RFC 6376 section 6.1.2 step 2
    if answer.status is not Status.FOUND:
        raise Fault("permerror", "no key for the signature")  # RFC 6376 section 6.1.2 step 3
    return texts(answer)[:MAX_RECORDS]


def try_keys(records: Iterable[bytes], signature: Signature, digest: bytes, steps: list[str] | None) -> Key:
    """The key that verifies the signature; raises the Fault nearest to a pass (RFC 6376 section 6.1.2 step 4)."""
    nearest = Fault("permerror", "no key for the signature")
    for record in records:
        try:
            key = key_of(record)
            if steps is not None:
                steps.append(f"key: {key.kind}, {key.bits} bits" + (", a test (t=y)" if b"y" in key.flags else ""))
            key.check(signature)
            if key.verifies(signature.signature, digest):
                return key
            if steps is not None and key.kind == "rsa":
                signed = key.signed_digest(signature.signature)
                steps.append("header: the signature was not made with this key, or was altered itself" if signed is None else
                             f"header: the signer had {_shown(signed)}: a signed field was changed, added or removed")
            raise Fault("fail", "signature did not verify")
        except Fault as fault:
            if steps is not None:
                steps.append(f"key: {fault.reason}")
            if nearest.reason == "no key for the signature" or _RANK[fault.result] < _RANK[nearest.result]:
                nearest = fault
    raise nearest


def digest_of(fields: Iterable[bytes], own: bytes) -> bytes:
    """The hash that a signature is made over: fields without their CRLF, then the signature field (RFC 6376 section 3.7)."""
    return sha256(b"\r\n".join([*fields, own])).digest()


def own_field(header: Header, place: int, relaxed: bool) -> bytes:
    """A signature field as it goes into its own hash."""
    name, _, value = header.raw(place).partition(b":")
    value = without_signature(value)
    return relaxed_field(header.names[place], value) if relaxed else name + b":" + value


def _shown(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


class Trial:
    """One signature on its way to a result; arc.py uses it for ARC-Message-Signature. trace: keep steps."""

    __slots__ = ("fault", "header_fault", "key", "records", "signature", "steps")

    def __init__(self, signature: Signature, *, trace: bool = False) -> None:
        self.signature = signature
        self.steps: list[str] | None = [] if trace else None
        self.fault: Fault | None = None
        self.header_fault: Fault | None = None  # of the signature itself, while the body is still to be hashed
        self.key: Key | None = None
        self.records: list[bytes] = []

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Does a step, unless an earlier one failed."""
        if self.fault is None:
            try:
                step(*args)
            except Fault as fault:
                self.fault = fault

    def ask(self, lookups: Asks) -> None:
        """Gets the key records."""
        name = self.signature.key_name
        try:
            self.records = key_records(lookups, name)
        except Fault as fault:
            if self.steps is not None:
                self.steps.append(f"key: TXT of {name}: {fault.reason}")
            raise
        if self.steps is not None:
            self.steps.append(f"key: TXT of {name}: " + ("found" if len(self.records) == 1 else f"{len(self.records)} records"))

    def check_header(self, header: Header) -> None:
        """Holds the signature against the header; what is wrong is kept until the body is known, so that both can be told."""
        signature = self.signature
        places = header.pick(signature.names, without=signature.place)
        relaxed = signature.header_relaxed
        digest = digest_of([header.canonical(place, relaxed) for place in places], own_field(header, signature.place, relaxed))
        steps = self.steps
        if steps is not None:
            steps.append(f"header: {len(places)} fields hash to {_shown(digest)}: " + ":".join([header.names[place].decode("ascii") for place in places]))
        try:
            self.key = try_keys(self.records, signature, digest, steps)
            if steps is not None:
                steps.append("header: the signature is good")
        except Fault as fault:
            if fault.result != "fail":
                raise
            self.header_fault = fault
            if steps is not None and (changed := _changed(header, signature)):
                steps.append("header: differs from its copy in z=: " + ", ".join(changed))

    def check_body(self, hashes: dict[bool, BodyHash]) -> None:
        """Holds bh= against the body's hash and raises what is wrong of header and body."""
        signature = self.signature
        body = hashes[signature.body_relaxed]
        length = signature.length
        digest = body.digest if length is None else body.digests.get(length)
        if digest is None:
            if self.steps is not None:
                self.steps.append(f"body: {body.length} octets, l= says {length}")
            raise self.header_fault or Fault("permerror", "l= is past the end of the body")  # RFC 6376 section 3.5
        same = digest == signature.body_hash
        if self.steps is not None:
            self.steps.append(f"body: {body.length if length is None else length} of {body.length} octets hash to {_shown(digest)}, "
                              + ("as bh= says" if same else f"bh= is {_shown(signature.body_hash)}"))
        if self.header_fault is not None or not same:
            wrong = [what for what, good in (("signature", self.header_fault is None), ("body hash", same)) if not good]
            raise Fault("fail", f"{' and '.join(wrong)} did not verify")

    def result(self, reason: str = "") -> DkimResult:
        """What it came to."""
        signature, fault = self.signature, self.fault
        result = DkimResult("pass" if fault is None else fault.result, signature.domain, signature.selector, signature.identity,
                            reason if fault is None else fault.reason, signature.b, signature.algorithm, signature.length)
        if self.key is not None:
            result.key_bits = self.key.bits
            result.testing = b"y" in self.key.flags
        if self.steps is not None:
            self.steps.append(f"result: {result.result}" + (f" ({result.reason})" if result.reason else ""))
            result.steps = self.steps
        return result


def _changed(header: Header, signature: Signature) -> list[str]:
    """Names of the fields whose copy in z= (RFC 6376 section 3.5) is not in the message."""
    changed = []
    there: dict[bytes, set[bytes]] = {}
    for copy in signature.tags.get(b"z", b"").translate(None, b" \t").split(b"|")[:MAX_COPIES]:
        name, _, text = copy.partition(b":")
        name = name.lower()
        if name not in there:
            there[name] = {header.canonical(place, True) for place in header.places(name)}
        told = relaxed_field(name, _QUOTED.sub(lambda match: bytes([int(match[1], 16)]), text))
        if name in signature.names and told not in there[name]:
            changed.append(name.decode("ascii", "replace"))
    return changed


def run(function: Callable[[], T]) -> T:
    """The `heavy` that does the work at once."""
    return function()


def hash_for(trials: Sequence[Trial], message: Message, heavy: Heavy) -> dict[bool, BodyHash]:
    """The body's hashes that trials without a fault need, in one reading. Raises OSError."""
    wanted: dict[bool, set[int]] = {}
    for trial in trials:
        if trial.fault is None:
            lengths = wanted.setdefault(trial.signature.body_relaxed, set())
            if trial.signature.length is not None:
                lengths.add(trial.signature.length)
    if not wanted:
        return {}
    body = message.body
    hashes: dict[bool, BodyHash] = (heavy if body.size > HEAVY else run)(lambda: hash_body(body, wanted))
    return hashes


def _aligned(domain: str, authors: Sequence[str]) -> bool:
    """Whether a signing domain may align with an author's: the same, or one above the other."""
    return any(domain == author or domain.endswith(f".{author}") or author.endswith(f".{domain}") for author in authors)


def verify(message: Message, resolver: Asks, *, now: float, max_signatures: int = MAX_SIGNATURES, author_domains: Sequence[str] = (),
           trust_length: bool = False, heavy: Heavy = run, trace: bool = False) -> list[DkimResult]:
    """Judges the signatures of a message, one result each, in the message's order.

    now: Unix seconds.  max_signatures: how many are judged, those of the author's domains first; the others are neutral.
    trust_length: whether a signature passes whose l= leaves a part of the body unsigned; else that is policy.
    resolver: a Lookups where the message's other questions count too.  heavy: calls a function that hashes a big body, in a
    thread perhaps.  trace: keep steps.
    Raises OSError where the body can't be read.
    """
    raw = message.header
    if b"dkim-signature" not in raw.lower():
        return []
    header = Header(raw)
    trials = [Trial(Signature("dkim", place), trace=trace) for place in header.places(b"dkim-signature")]
    authors = header.places(b"from")
    sound: list[Trial] = []
    for number, trial in enumerate(trials):
        signature = trial.signature
        if number >= MAX_PARSED:
            trial.fault = Fault("neutral", f"not judged: more than {MAX_PARSED} signatures")
            continue
        trial.attempt(signature.read, header.value(signature.place))
        if trial.steps is not None:
            trial.steps.append(signature.summary())
        if len(authors) != 1 and trial.fault is None:
            # nobody can say which of several From fields a reader shows (RFC 6376 section 8.15; RFC 5322 section 3.6)
            trial.fault = Fault("permerror", f"{len(authors) or 'no'} From fields")
        if trial.fault is None:
            sound.append(trial)
    if len(sound) > max_signatures:
        sound.sort(key=lambda trial: not _aligned(trial.signature.domain, author_domains))
    for trial in sound[max_signatures:]:
        trial.fault = Fault("neutral", f"not judged: more than {max_signatures} signatures")
    judged = sound[:max_signatures]
    lookups = resolver if isinstance(resolver, Lookups) else Lookups(resolver)
    for trial in judged:
        trial.attempt(trial.ask, lookups)
        trial.attempt(trial.check_header, header)
    hashes = hash_for(judged, message, heavy)
    results = []
    for trial in trials:
        trial.attempt(trial.check_body, hashes)
        trial.attempt(trial.signature.check_times, now)  # last: an altered message comes out no better for being old
        reason = ""
        length = trial.signature.length
        if trial.fault is None and length is not None:
            total = hashes[trial.signature.body_relaxed].length
            reason = f"l= covers {length} of {total} octets of the body"
            if length < total and not trust_length:
                trial.fault = Fault("policy", reason)  # RFC 6376 section 8.2: anything may have been appended
        results.append(trial.result(reason))
    return results
