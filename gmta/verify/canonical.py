"""What DKIM and ARC sign: header fields picked and canonicalised, bodies hashed while they stream (RFC 6376 section 3.4, 3.7).

Octets only: no DNS, no keys, nothing of what a tag means. The algorithms are those of dkimpy (`dkim.canonicalization`), done with
`bytes.replace`, which costs a tenth of a regular expression, and over a stream; tests/engine/test_verify_dkim.py holds both against
each other. dkimpy 1.1.8 is not followed where it departs from the RFC: it strips form feeds and the like at the ends of relaxed
fields, drops the last line's trailing blanks only where a CRLF follows them, refuses a blank before the colon, and leaves blanks
behind the value of b= when it takes that out.

Failure: none here; `BodyHash.over` passes on the OSError of a body that can't be read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from gmta.mail.message import Body

CHUNK = 64 * 1024  # of a body at once: a replace holds the interpreter lock, and other sessions must not notice

_FIELD_END = re.compile(rb"\n(?![ \t])")
_NAME = re.compile(rb"[!-9;-~]+\Z")  # RFC 5322 section 2.2
_LINE_END = re.compile(rb"\r?\n")
_B_TAG = re.compile(rb"[ \t\r\n]*b[ \t\r\n]*=")
_EMPTY_LINES = re.compile(rb"(?:\n\r)*")  # on the reversed octets


class Header:
    """The fields of a raw header section, to be picked by name from the bottom up.

    names: field names in lower case, from the top; lines that are no field are left out.
    """

    __slots__ = ("_places", "_raw", "_relaxed", "names")

    def __init__(self, raw: bytes) -> None:
        self.names: list[bytes] = []
        self._raw: list[bytes] = []
        self._relaxed: list[bytes | None] = []
        self._places: dict[bytes, list[int]] = {}
        *fields, rest = _FIELD_END.split(raw)
        fields = [field.removesuffix(b"\r") for field in fields]
        for field in [*fields, rest] if rest else fields:
            name, colon, _ = field.partition(b":")
            if not colon:
                continue
            name = _field_name(name) if len(name) <= 64 else _field_name.__wrapped__(name)
            if not name:
                continue
            places = self._places.get(name)
            if places is None:
                self._places[name] = [len(self._raw)]
            else:
                places.append(len(self._raw))
            self.names.append(name)
            self._raw.append(field)
        self._relaxed = [None] * len(self._raw)

    def places(self, name: bytes) -> Sequence[int]:
        """Where the fields of that (lower-case) name are, from the top."""
        return self._places.get(name, ())

    def raw(self, place: int) -> bytes:
        """A field as it came, without the CRLF at its end."""
        return self._raw[place]

    def value(self, place: int) -> bytes:
        """What stands behind the colon, as it came."""
        return self._raw[place].partition(b":")[2]

    def canonical(self, place: int, relaxed: bool) -> bytes:
        """A field without the CRLF at its end, canonicalised."""
        if not relaxed:
            return self._raw[place]  # RFC 6376 section 3.4.1
        field = self._relaxed[place]
        if field is None:
            field = self._relaxed[place] = relaxed_field(self.names[place], self.value(place))
        return field

    def pick(self, names: Iterable[bytes], *, without: int = -1) -> list[int]:
        """The places that h= means: the last field of a name first, then the one above it; names beyond those mean nothing.

        without: the field that is being verified, which never signs itself (RFC 6376 section 3.5, 5.4.2).
        """
        left: dict[bytes, int] = {}
        picked = []
        for name in names:
            places = self._places.get(name)
            if places is None:
                continue
            index = left.get(name, len(places)) - 1
            if index >= 0 and places[index] == without:
                index -= 1
            left[name] = max(index, 0)
            if index >= 0:
                picked.append(places[index])
        return picked


@lru_cache(maxsize=1000)  # few names are in all headers
def _field_name(text: bytes) -> bytes:
    """What stands before the colon as a field's name in lower case, or nothing where it is none."""
    name = text.rstrip(b" \t").lower()  # RFC 5322 section 4.5: a blank before the colon is obsolete, not wrong
    return name if _NAME.match(name) is not None else b""


def relaxed_field(name: bytes, value: bytes) -> bytes:
    """A field under the relaxed algorithm, without the CRLF (RFC 6376 section 3.4.2). name: in lower case."""
    if b"\n" in value:
        value = _LINE_END.sub(b"", value)
    # only SP and HTAB are WSP (RFC 6376 section 2.8): bytes.strip() would take form feeds too
    return name + b":" + _reduced(value).strip(b" ")


def without_signature(value: bytes) -> bytes:
    """The value of a signature field with that of its b= tag taken out, blanks around it too (RFC 6376 section 3.7)."""
    start = 0
    while (tag := _B_TAG.match(value, start)) is None:
        start = value.find(b";", start) + 1
        if not start:
            return value
    end = value.find(b";", tag.end())
    return value[:tag.end()] + value[end:] if end >= 0 else value[:tag.end()]


def _reduced(data: bytes) -> bytes:
    """Every run of blanks and tabs as one blank."""
    if b"\t" in data:
        data = data.replace(b"\t", b" ")
    if b" " in data:
        while b"  " in data:
            data = data.replace(b"  ", b" ")
    return data


class BodyHash:
    """SHA-256 over a canonicalised body that comes in pieces.

    lengths: the values of l= to note the digest at.  Afterwards `digest` is that of the whole, `length` its octets, and
    `digests` has those of the lengths that the body reached.
    """

    __slots__ = ("_filled", "_hash", "_lengths", "_lines", "_relaxed", "_rest", "digest", "digests", "length")

    def __init__(self, relaxed: bool, lengths: Iterable[int] = ()) -> None:
        self.digest = b""
        self.digests: dict[int, bytes] = {}
        self.length = 0
        self._relaxed = relaxed
        self._lengths = sorted(set(lengths), reverse=True)
        self._hash = hashlib.sha256()
        self._rest = b""  # the end of the last piece, which may yet turn out to be the end of a line
        self._lines = 0  # CRLFs held back, which may yet turn out to be empty lines at the end
        self._filled = False  # something other than empty lines was there

    def update(self, piece: bytes) -> None:
        """Takes the next octets of the body."""
        data = self._rest + piece if self._rest else piece
        if self._relaxed:
            bare = data.removesuffix(b"\r")
            kept = bare.rstrip(b" \t")
            self._rest = (b" " if len(kept) < len(bare) else b"") + data[len(bare):]
            data = _reduced(kept)
            if b" " in data and b" \r\n" in data:  # one octet is looked for far faster than three, and base64 has none
                data = data.replace(b" \r\n", b"\r\n")  # RFC 6376 section 3.4.4 (a)
        elif data.endswith(b"\r"):
            data, self._rest = data[:-1], b"\r"
        else:
            self._rest = b""
        self._take(data)

    def finish(self) -> None:
        """The body has ended."""
        rest = self._rest.removesuffix(b" ") if self._relaxed else self._rest
        self._take(rest)
        if self._filled:
            self._add(b"\r\n")  # RFC 6376 section 3.4.3: empty lines at the end go, a missing CRLF is added
        elif not self._relaxed:
            self._add(b"\r\n")  # RFC 6376 section 3.4.3: simple makes one CRLF of an empty body, relaxed leaves nothing
        else:
            self._add(b"")
        self.digest = self._hash.digest()

    def _take(self, data: bytes) -> None:
        """Hashes what can no longer be empty lines at the end."""
        text = data.rstrip(b"\r\n")
        if len(text) != len(data):
            tail = data[len(text):]
            lines = len(tail) // 2
            if tail != b"\r\n" * lines:
                lines = _EMPTY_LINES.match(tail[::-1]).end() // 2  # type: ignore[union-attr]  # it always matches
                text = data[:len(data) - 2 * lines]
        else:
            lines = 0
        if text:
            while self._lines:
                few = min(self._lines, CHUNK)
                self._add(b"\r\n" * few)
                self._lines -= few
            self._add(text)
            self._filled = True
        self._lines += lines

    def _add(self, data: bytes) -> None:
        lengths = self._lengths
        while lengths and lengths[-1] <= self.length + len(data):
            length = lengths.pop()
            self._hash.update(data[:length - self.length])
            data = data[length - self.length:]
            self.length = length
            self.digests[length] = self._hash.digest()
        self.length += len(data)
        self._hash.update(data)


def hash_body(body: Body, wanted: dict[bool, set[int]]) -> dict[bool, BodyHash]:
    """Reads a body once for all canonicalisations wanted: relaxed or not -> lengths. Raises OSError."""
    hashes = {relaxed: BodyHash(relaxed, lengths) for relaxed, lengths in wanted.items()}
    for piece in body.chunks(CHUNK):
        for start in range(0, len(piece), CHUNK):
            part = piece[start:start + CHUNK] if len(piece) > CHUNK else piece
            for one in hashes.values():
                one.update(part)
    for one in hashes.values():
        one.finish()
    return hashes
