"""DANE for SMTP: which TLSA records a mail host has, and whether the certificate that it showed is one they mean.

Records count only where a validating resolver vouches for them and for the way to the host; `usable` sorts out those that SMTP has a
meaning for, `match` judges a chain by them. What follows from a record that can't be looked up, or a chain that does not match, is
tlspolicy's. Failure: `Mismatch` says why; certificates that can't be read match nothing.

RFC 6698, RFC 7671 (operation, digest agility), RFC 7672 (SMTP).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # imported where there is a certificate to judge: a worker that meets none starts sooner without
    from cryptography import x509

TRUST_ANCHOR, END_ENTITY = 2, 3  # RFC 7672 section 3.1: the usages that mean something to SMTP
CERTIFICATE, PUBLIC_KEY = 0, 1
EXACT, SHA256, SHA512 = 0, 1, 2
MAX_RECORDS = 50
MAX_CHAIN = 10

_LENGTHS = {SHA256: 32, SHA512: 64}


class Mismatch(Exception):
    """The chain is none that the records mean."""


class Tlsa(NamedTuple):
    """One usable record."""

    usage: int
    selector: int
    matching: int
    data: bytes


def record_name(host: str, port: int) -> str:
    """Where the records of a host stand (RFC 7672 section 2.2.3)."""
    return f"_{port}._tcp.{host}"


def usable(records: Iterable[Any]) -> tuple[Tlsa, ...]:
    """Those of an answer's records that can be used here; of two digests of one kind only the stronger one.

    None left of some means: TLS there must be, but nothing can be verified (RFC 7672 section 2.2).
    """
    found: list[Tlsa] = []
    for record in list(records)[:MAX_RECORDS]:
        one = Tlsa(record.usage, record.selector, record.mtype, record.cert)
        fits = one.usage in (TRUST_ANCHOR, END_ENTITY) and one.selector in (CERTIFICATE, PUBLIC_KEY) and one.matching <= SHA512
        if fits and one.data and len(one.data) == _LENGTHS.get(one.matching, len(one.data)):
            found.append(one)
    strong = {(one.usage, one.selector) for one in found if one.matching == SHA512}
    return tuple([one for one in found if one.matching != SHA256 or (one.usage, one.selector) not in strong])  # RFC 7671 section 9


def match(chain: Sequence[bytes], records: Sequence[Tlsa], names: Sequence[str], now: float) -> str:
    """How a chain (DER, the host's own certificate first) is verified: "dane-ee" or "dane-ta"; raises Mismatch.

    names: the host's, one of which the certificate must have under a trust anchor.  now: Unix seconds.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain[:MAX_CHAIN]]
        own = certificates[0]
        # RFC 7672 section 3.1.1: names and dates of the certificate do not count with DANE-EE
        if any(record.usage == END_ENTITY and _is(record, own) for record in records):
            return "dane-ee"
        anchored = [record for record in records if record.usage == TRUST_ANCHOR]
        if not anchored:
            raise Mismatch("the certificate is none of those in TLSA")
        _reach_anchor(certificates, anchored, now)
        if not any(covers(presented, name) for presented in dns_names(own) for name in names):  # RFC 7672 section 3.2.3
            raise Mismatch(f"the certificate is not for {' or '.join(names)}")
    except (ValueError, TypeError, IndexError, UnsupportedAlgorithm, x509.UnsupportedGeneralNameType, x509.DuplicateExtension) as error:
        raise Mismatch(f"a certificate that can't be read ({type(error).__name__})") from error
    return "dane-ta"


def _reach_anchor(certificates: Sequence[x509.Certificate], records: Sequence[Tlsa], now: float) -> None:
    """Follows the chain up to a trust anchor; raises Mismatch."""
    from cryptography import x509

    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    beyond = []
    for record in records:
        if record.matching == EXACT and record.selector == CERTIFICATE:  # RFC 7671 section 5.2.2: may be left out of the chain
            with contextlib.suppress(ValueError):
                beyond.append(x509.load_der_x509_certificate(record.data))
    current = certificates[0]
    others = [*certificates[1:], *beyond]
    for depth in range(len(others) + 1):
        if not current.not_valid_before_utc <= moment <= current.not_valid_after_utc:
            raise Mismatch("a certificate of the chain is out of date")
        if any(_is(record, current) for record in records):
            return
        issuer = next((other for other in others if other != current and _issued(current, other, depth)), None)
        if issuer is None:
            break
        others.remove(issuer)
        current = issuer
    raise Mismatch("the chain leads to no trust anchor of TLSA")


def _issued(certificate: x509.Certificate, issuer: x509.Certificate, below: int) -> bool:
    """Whether `issuer` may have signed it, and has. below: certificates under it that are authorities themselves."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    if certificate.issuer != issuer.subject:
        return False
    try:
        basic = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not basic.ca or (basic.path_length is not None and basic.path_length < below):
            return False
    except x509.ExtensionNotFound:
        return False
    try:
        if not issuer.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign:
            return False
    except x509.ExtensionNotFound:
        pass
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _is(record: Tlsa, certificate: x509.Certificate) -> bool:
    """Whether a record speaks of this certificate or its key (RFC 6698 section 2.1)."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if record.selector == CERTIFICATE:
        data = certificate.public_bytes(Encoding.DER)
    else:
        data = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if record.matching == SHA256:
        data = hashlib.sha256(data).digest()
    elif record.matching == SHA512:
        data = hashlib.sha512(data).digest()
    return hmac.compare_digest(data, record.data)


def dns_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names of a certificate: the subject alternative names, else the common name (RFC 7672 section 3.2.3)."""
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        return [str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]


def covers(presented: str, wanted: str) -> bool:
    """Whether a certificate's name is that of a host; `*.` stands for one label (RFC 9525 section 6.3).

    wanted: a host name, or `.example.org` for any name below that domain.
    """
    presented, wanted = presented.lower().rstrip("."), wanted.lower().rstrip(".")
    if not presented or not wanted:
        return False
    if wanted.startswith("."):
        return presented.endswith(wanted)
    if presented.startswith("*."):
        first, _, rest = wanted.partition(".")
        return bool(first) and rest == presented[2:] and "." in rest
    return presented == wanted
