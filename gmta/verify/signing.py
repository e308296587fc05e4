"""Makes DKIM signatures (RFC 6376, RFC 8463), and finds the private keys for them in files.

`sign` gives the fields for one message; `KeyFiles` reads keys by domain and notices changed files; `author` tells whose message it
is. Which mail is signed is a plugin's affair. A message without exactly one From field is never signed: nobody can say whose it is.

The header is always relaxed, so that relays may refold it, and the body relaxed too. Fields are folded where blanks are anyway,
behind the colons of h= and within b=; nowhere else.

Failure: a key file that can't be used, or that others may read, raises KeyTrouble; a changed one that can't be used leaves the
key it held before in force and is logged. `sign` raises OSError where the body can't be read, nothing else.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from gmta.mail import mime
from gmta.mail.address import Address, AddressError, domains_above
from gmta.mail.message import Message
from gmta.verify.canonical import Header, hash_body, relaxed_field
from gmta.verify.dkim import HEAVY, MAX_BITS, MIN_BITS, Fault, Heavy, digest_of, domain_name, run

# RFC 6376 section 5.4.1, and what shows or steers a message today. Oversigned (section 5.4.2): one more may not be added.
OVERSIGNED = ("From", "To", "Cc", "Reply-To", "Subject", "Date", "Message-ID", "In-Reply-To", "References", "MIME-Version",
              "Content-Type", "Content-Transfer-Encoding")
# Signed where they are: lists add or replace them, and signing their absence would break every list's mail.
SIGNED = ("Sender", "Resent-Date", "Resent-From", "Resent-Sender", "Resent-To", "Resent-Cc", "Resent-Message-ID", "List-Id",
          "List-Help", "List-Unsubscribe", "List-Unsubscribe-Post", "List-Subscribe", "List-Post", "List-Owner", "List-Archive",
          "Content-ID", "Content-Description", "Content-Disposition", "Content-Language", "Autocrypt", "Feedback-ID")
MAX_FROM = 32 * 1024  # octets of a From field that is looked into
COLUMNS = 78  # RFC 5322 section 2.1.1
DEFAULT_KEYS = "etc/dkim/{domain}/{selector}.pem"
CHECK_INTERVAL_S = 1.0
MAX_DOMAINS = 10000  # remembered, those without keys too

_PADDING, _PREHASHED = PKCS1v15(), Prehashed(SHA256())
_ADDRESS = re.compile(r"(?:[^<>\"(,:;@]*<)?([A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]+@[A-Za-z0-9.-]+)>?\s*\Z")


class KeyTrouble(ValueError):
    """A private key that can't be used; the text names the file and what is wrong."""


class SigningKey:
    """A private key: `domain` is the d= and `selector` the s= of its signatures; `algorithm` their a=."""

    __slots__ = ("algorithm", "domain", "private", "selector")

    def __init__(self, domain: str, selector: str, private: RSAPrivateKey | Ed25519PrivateKey) -> None:
        self.domain = domain
        self.selector = selector
        self.private = private
        self.algorithm = "rsa-sha256" if isinstance(private, RSAPrivateKey) else "ed25519-sha256"

    @classmethod
    def from_pem(cls, domain: str, selector: str, octets: bytes) -> SigningKey:
        """A key from PEM without a password, or the bare base64 of an Ed25519 seed; raises KeyTrouble."""
        try:
            if b"-----BEGIN" in octets:
                private = load_pem_private_key(octets, password=None)
            else:
                private = Ed25519PrivateKey.from_private_bytes(base64.b64decode(octets, validate=False))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise KeyTrouble("no private key in PEM, or one with a password") from None
        if isinstance(private, RSAPrivateKey):
            if not MIN_BITS <= private.key_size <= MAX_BITS:
                raise KeyTrouble(f"RSA key of {private.key_size} bits, verifiers take {MIN_BITS} to {MAX_BITS}")  # RFC 8301 section 3.2
        elif not isinstance(private, Ed25519PrivateKey):
            raise KeyTrouble("neither an RSA nor an Ed25519 key")
        return cls(domain, selector, private)

    def sign(self, digest: bytes) -> bytes:
        """The signature over what hashes to `digest` (RFC 6376 section 3.3.1, RFC 8463 section 3)."""
        if isinstance(self.private, RSAPrivateKey):
            return self.private.sign(digest, _PADDING, _PREHASHED)
        return self.private.sign(digest)

    @property
    def record_name(self) -> str:
        """Where the public key has to be published."""
        return f"{self.selector}._domainkey.{self.domain}"

    def record(self) -> str:
        """The text of the TXT record (RFC 6376 section 3.6.1)."""
        public = self.private.public_key()
        if self.algorithm == "rsa-sha256":
            octets = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return f"v=DKIM1; k=rsa; p={base64.b64encode(octets).decode()}"
        octets = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return f"v=DKIM1; k=ed25519; p={base64.b64encode(octets).decode()}"


# --- signatures -----------------------------------------------------------------------------------------------------


def fold(tags: Iterable[str], column: int) -> str:
    """Tags as `one; two;` in lines of COLUMNS where that can be; `column` is where the first line starts.

    A tag that holds colons (h=) may also be folded behind them.
    """
    lines = ""
    for number, tag in enumerate(tags):
        pieces = re.findall(r"[^:]+:?|:", tag) if tag.startswith("h=") else [tag]
        pieces[-1] += ";"
        for index, piece in enumerate(pieces):
            blank = " " if index == 0 and number else ""
            if column + len(blank) + len(piece) > COLUMNS and (number or index):
                lines += "\r\n "
                column, blank = 1, ""
            lines += blank + piece
            column += len(blank) + len(piece)
    return lines


def finished(name: str, tags: Sequence[str], fields: Iterable[bytes], key: SigningKey) -> str:
    """The value of a signature field: `tags` folded, then b= over `fields` (relaxed, without CRLF) and the field itself."""
    value = fold(tags, len(name) + 2)
    last = len(value) - value.rfind("\r\n ") - 2 if "\r\n " in value else len(name) + 2 + len(value)
    if last + 12 > COLUMNS:
        value, last = value + "\r\n b=", 3
    else:
        value, last = value + " b=", last + 3
    own = relaxed_field(name.lower().encode("ascii"), value.encode("ascii"))
    signature = base64.b64encode(key.sign(digest_of(fields, own))).decode("ascii")
    first = COLUMNS - last
    rest = [signature[start:start + COLUMNS - 1] for start in range(first, len(signature), COLUMNS - 1)]
    return "\r\n ".join([value + signature[:first], *rest])


def names_to_sign(header: Header, oversigned: Iterable[str], signed: Iterable[str]) -> list[str]:
    """What h= lists: each field as often as it is there, the oversigned ones once more."""
    names = []
    for more, group in ((1, oversigned), (0, signed)):
        for name in group:
            names += [name] * (len(header.places(name.lower().encode("ascii"))) + more)
    return names


def sign(message: Message, keys: Sequence[SigningKey], *, now: float, header: Header | None = None, identity_domain: str = "", expire_s: float = 0.0,
         oversigned: Sequence[str] = OVERSIGNED, signed: Sequence[str] = SIGNED, heavy: Heavy = run) -> list[tuple[str, str]]:
    """The DKIM-Signature fields (name, value) of a message, one a key, the first to stand on top; none without exactly one From.

    now: Unix seconds, for t=.  header: the message's, where the caller has it.  identity_domain: the author's domain where it is below the key's, for i=.  expire_s: seconds
    until x=; 0: no x=.  heavy: as for verify.  Raises OSError where the body can't be read.
    """
    if header is None:
        header = Header(message.header)
    if len(header.places(b"from")) != 1 or not keys:  # RFC 6376 section 8.15, RFC 5322 section 3.6
        return []
    body = message.body
    hashes = (heavy if body.size > HEAVY else run)(lambda: hash_body(body, {True: set()}))
    body_hash = base64.b64encode(hashes[True].digest).decode("ascii")
    names = names_to_sign(header, oversigned, signed)
    picked = header.pick([name.lower().encode("ascii") for name in names])
    fields = [header.canonical(place, True) for place in picked]
    times = [f"t={int(now)}"]
    if expire_s:
        times.append(f"x={int(now + expire_s)}")
    made = []
    for key in keys:
        tags = ["v=1", f"a={key.algorithm}", "c=relaxed/relaxed", f"d={key.domain}", f"s={key.selector}"]
        if identity_domain and identity_domain != key.domain:
            tags.append(f"i=@{identity_domain}")
        tags += [*times, "h=" + ":".join(names), f"bh={body_hash}"]
        made.append(("DKIM-Signature", finished("DKIM-Signature", tags, fields, key)))
    return made


def authors(header: Header) -> list[Address]:
    """The mailboxes of the only From field; none where there is not exactly one, or it can't be read."""
    places = header.places(b"from")
    if len(places) != 1 or len(header.raw(places[0])) > MAX_FROM:
        return []
    value = header.value(places[0])
    match = _ADDRESS.match(mime.unfolded(value)[0])
    found = [match[1]] if match is not None else [address for _, address in mime.addresses(value)]
    made = []
    for one in found:
        try:
            address = Address.parse(one)
        except AddressError:
            continue
        if address.domain:
            made.append(address)
    return made


# --- key files ------------------------------------------------------------------------------------------------------


def load_key(path: str, domain: str, selector: str) -> SigningKey:
    """The key in a file; raises KeyTrouble, also for a file that others may read or the group may change."""
    try:
        with open(path, "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            octets = file.read(1 << 16)
    except OSError as error:
        raise KeyTrouble(f"{path}: {error.strerror}") from None
    if mode & 0o027:
        raise KeyTrouble(f"{path}: mode {mode:04o} lets others use the key; expected 0600 or 0640")
    try:
        return SigningKey.from_pem(domain, selector, octets)
    except KeyTrouble as trouble:
        raise KeyTrouble(f"{path}: {trouble}") from None


class _Folder:
    """What is known of one domain's key files."""

    __slots__ = ("checked_at", "keys", "stamp", "trouble")

    def __init__(self) -> None:
        self.checked_at = float("-inf")
        self.stamp: tuple[Any, ...] | None = None
        self.keys: list[SigningKey] = []
        self.trouble: KeyTrouble | None = None


class KeyFiles:
    """Private keys in files named by a pattern with {domain} and {selector}; looked at again when a second has passed.

    log: told of files that can't be used.  clock: any seconds.  Raises ValueError for a pattern without both.
    """

    def __init__(self, pattern: str, log: Any, clock: Callable[[], float]) -> None:
        folder, _, name = pattern.rpartition("/")
        if "{domain}" not in pattern or name.count("{selector}") != 1 or "{selector}" in folder:
            raise ValueError("expected a path with {domain} in it and {selector} in its last part")
        self.pattern = pattern
        self._log = log
        self._clock = clock
        self._folders: OrderedDict[str, _Folder] = OrderedDict()

    def path(self, domain: str, selector: str) -> str:
        """Where a key is kept; raises ValueError for names that are no domain and selector."""
        for name in (domain, selector):
            _checked(name)
        return self.pattern.replace("{domain}", domain).replace("{selector}", selector)

    def keys(self, domain: str) -> list[SigningKey]:
        """The keys of a domain (lower case, A-labels), RSA before Ed25519; raises KeyTrouble where there are only bad ones."""
        folder = self._folders.get(domain)
        if folder is None:
            folder = self._folders[domain] = _Folder()
            if len(self._folders) > MAX_DOMAINS:
                self._folders.popitem(last=False)
        now = self._clock()
        if not 0 <= now - folder.checked_at < CHECK_INTERVAL_S:
            folder.checked_at = now
            self._look(domain, folder)
        if folder.trouble is not None and not folder.keys:
            raise folder.trouble
        return folder.keys

    def keys_for(self, domain: str) -> list[SigningKey]:
        """The keys of a domain, else of the nearest one above it (RFC 6376 section 3.8); raises KeyTrouble."""
        for name in (domain, *domains_above(domain)):
            if "." in name and (keys := self.keys(name)):
                return keys
        return []

    def all_keys(self) -> list[SigningKey]:
        """The keys of every domain that has files, for a check at the start; raises KeyTrouble for the first bad one."""
        before, _, after = self.pattern.partition("{domain}")
        folder, _, prefix = before.rpartition("/")
        suffix = after.partition("/")[0]
        if "{selector}" in suffix:
            return []  # domain and selector share a name: it can't be told which part is which
        found = []
        for name in sorted(_listed(folder or "/")):
            domain = name.removeprefix(prefix).removesuffix(suffix)
            if name == f"{prefix}{domain}{suffix}" and is_name(domain):
                for selector, path in self._files(domain):
                    found.append(load_key(path, domain, selector))
        return found

    def _files(self, domain: str) -> Iterator[tuple[str, str]]:
        """(selector, path) of a domain's files."""
        if not is_name(domain):
            return
        folder, _, name = self.pattern.replace("{domain}", domain).rpartition("/")
        before, _, after = name.partition("{selector}")
        for entry in sorted(_listed(folder or "/")):
            selector = entry[len(before):len(entry) - len(after)]
            if entry == f"{before}{selector}{after}" and is_name(selector):
                yield selector, f"{folder}/{entry}"

    def _look(self, domain: str, folder: _Folder) -> None:
        try:
            files = list(self._files(domain))
            stamp = tuple([(path, info.st_mtime_ns, info.st_size, info.st_ino, info.st_mode)
                           for path, info in [(path, os.stat(path)) for _, path in files]])
        except OSError as error:
            if folder.trouble is None:
                self._log.error("can't look for DKIM keys", file=error.filename, error=error.strerror)
            folder.trouble = KeyTrouble(f"{error.filename}: {error.strerror}")
            folder.stamp = None
            return
        if stamp == folder.stamp:
            return
        folder.stamp = stamp
        folder.trouble = None
        before = {key.selector: key for key in folder.keys}
        keys = []
        for selector, path in files:
            try:
                keys.append(load_key(path, domain, selector))
            except KeyTrouble as trouble:
                self._log.error("DKIM key can't be used", error=str(trouble), former="in force" if selector in before else None)
                folder.trouble = trouble
                if selector in before:
                    keys.append(before[selector])
        folder.keys = sorted(keys, key=lambda key: (key.algorithm != "rsa-sha256", key.selector))


def _listed(folder: str) -> list[str]:
    """The names in a folder; none where it is not there. Raises OSError."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _checked(name: str) -> str:
    try:
        if domain_name(name.encode("utf-8", "surrogateescape"), "name") == name:
            return name
    except Fault:
        pass
    raise ValueError(f"{name!r} is no name of a domain or selector, in lower case and A-labels")


def is_name(name: str) -> bool:
    """Whether it is a domain or selector in lower case and A-labels, safe in a path."""
    try:
        _checked(name)
    except ValueError:
        return False
    return True

