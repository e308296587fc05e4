"""A certificate authority for tests: certificates for any names, right or wrong, as files.

    authority = Authority(folder)
    with Peer(tls=authority.issue("mx.example.org")) as peer: ...     # [transport:outbound] ca_file = {authority.file}

Keys are of P-256, which takes no time to make. days: how long a certificate is valid from now; negative: it ended so long ago.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from itertools import count
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


class Authority:
    """An authority, self-signed or under another one. file: its certificate in PEM; der: in DER; key_der: its public key."""

    def __init__(self, folder: str | Path, name: str = "Test authority", above: Authority | None = None, *, days: float = 30) -> None:
        self._folder = Path(folder)
        self._serial = count(1)
        self._name = name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._above = above
        issuer = above or self
        self.certificate = issuer._sign(name, self._key, [], days, authority=True)
        self.der = self.certificate.public_bytes(Encoding.DER)
        self.key_der = _key_der(self.certificate)
        path = self._folder / f"{name.replace(' ', '-')}.pem"
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        self.file = str(path)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, names: list[str], days: float, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(days=days)
        builder = (x509.CertificateBuilder().subject_name(_name(name)).issuer_name(_name(self._name)).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(min(now, end) - datetime.timedelta(days=1)).not_valid_after(end)
                   .add_extension(x509.BasicConstraints(authority, None), critical=True)
                   .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False))
        if authority:
            builder = builder.add_extension(x509.KeyUsage(True, False, False, False, False, True, True, False, False), critical=True)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(one) for one in names]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, *names: str, days: float = 30, chain: bool = True) -> Issued:
        """A certificate for host names or addresses. chain: with those of the authorities above behind it."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(names[0] if names else "nobody", key, list(names), days, authority=False)
        shown = [certificate]
        issuer: Authority | None = self
        while chain and issuer is not None:
            shown.append(issuer.certificate)
            issuer = issuer._above
        stem = self._folder / f"{self._name.replace(' ', '-')}-{next(self._serial)}"
        certificate_file, key_file = stem.with_suffix(".crt"), stem.with_suffix(".key")
        certificate_file.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in shown))
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Issued((str(certificate_file), str(key_file)), [one.public_bytes(Encoding.DER) for one in shown], certificate)


class Issued(tuple[str, str]):
    """(certificate file, key file). der: the chain, its own first."""

    der: list[bytes]
    certificate: x509.Certificate

    def __new__(cls, files: tuple[str, str], der: list[bytes], certificate: x509.Certificate) -> Issued:
        """A pair of file names that knows what is in them."""
        made = super().__new__(cls, files)
        made.der = der
        made.certificate = certificate
        return made

    def tlsa(self, usage: int = 3, selector: int = 1, matching: int = 1, *, of: int = 0) -> tuple[int, int, int, str]:
        """A TLSA record for a certificate of the chain, as gmta.testing.zone takes it."""
        return tlsa(self.der[of], usage, selector, matching)


def tlsa(der: bytes, usage: int = 3, selector: int = 1, matching: int = 1) -> tuple[int, int, int, str]:
    """A TLSA record for a certificate in DER."""
    data = der if selector == 0 else _key_der(x509.load_der_x509_certificate(der))
    if matching:
        data = (hashlib.sha256 if matching == 1 else hashlib.sha512)(data).digest()
    return usage, selector, matching, data.hex()


def _key_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text[:64])])


def _general(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
