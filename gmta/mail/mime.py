"""What a message holds, read in place: its MIME parts, its fields as text, its addresses.

`read_parts` finds the parts of a body that is bytes or a memory map and copies nothing; a part's octets are decoded piece by piece
when they are asked for. What is nested deeper than MAX_DEPTH, past MAX_PARTS parts, or would take too long to look through stays
opaque: a part without parts, marked so. Building messages is left to others.

Failure: none. Whatever the octets are, there is a result; text that could not be decoded whole says so. RFC 2045, RFC 2046, RFC 2047,
RFC 2183, RFC 2231, RFC 5322.
"""

from __future__ import annotations

import binascii
import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from encodings import normalize_encoding
from encodings.aliases import aliases
from types import MappingProxyType
from typing import Any

from gmta.mail.message import FileBody, Message

MAX_DEPTH = 100
MAX_PARTS = 1000
MAX_PARAMETERS = 100
MAX_ADDRESSES = 1000
MAX_PARAMETER_TEXT = 16 * 1024  # octets of a structured field that are looked at
MAX_ADDRESS_TEXT = 256 * 1024
MAX_PART_HEADER = 256 * 1024
MAX_STRAY = 10_000  # lines that begin like a delimiter and are none
SCANS = 4  # times its own length that a body is looked through, however parts are nested
MIN_SCAN = 32 * 1024 * 1024  # octets that may be looked through in any case
PIECE = 57 * 1024

_CONTENT = re.compile(rb"^(content-(?:type|transfer-encoding|disposition|id))[ \t]*:(.*(?:\n[ \t].*)*)", re.I | re.M)
_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)(?:\n|\Z)|.*(?:\n|\Z)")
_HEADER = re.compile(rb"(?:[!-9;-~]+[ \t]*:.*(?:\n[ \t].*)*(?:\n|\Z))*")  # a line that is no field begins the body
_TYPE = re.compile(r"\s*([!#$&^_.+\w-]+/[!#$&^_.+\w-]+)", re.A)
_TOKEN = re.compile(r"\s*([^\s;()<>@,\\\"/\[\]?=]+)")
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;\r\n]*))', re.S)
_SECTION = re.compile(r"([^*]+)(?:\*(\d{1,3}))?(\*)?\Z")
_WORD = re.compile(r"=\?([^?*\s]{1,60})(?:\*[^?\s]{0,60})?\?([bBqQ])\?([^?]*)\?=")
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
_NOT_BASE64 = bytes(set(range(256)) - set(_BASE64))
_ADDRESS = re.compile(r'"((?:[^"\\]|\\.)*)"|(\()|<([^<>]*)>|([,;:])|([^",;:<>()\s]+)|.', re.S)

# Codecs that are no charset, or take time out of all proportion.
_CHARSETS = (frozenset(aliases) | frozenset(aliases.values()) | {"utf_8_sig", "koi8_u", "cp1252"}) - {
    "punycode", "idna", "unicode_escape", "raw_unicode_escape", "undefined", "mbcs", "ansi", "dbcs", "oem", "rot13", "rot_13", "base64", "base_64",
    "base64_codec", "bz2", "bz2_codec", "hex", "hex_codec", "quopri", "quopri_codec", "quoted_printable", "uu", "uu_codec", "zip", "zlib", "zlib_codec"}
_UTF_8 = frozenset({"", "ascii", "us_ascii", "utf_8", "utf8"})  # ASCII with other octets is UTF-8 these days, or nothing
# Names in use for charsets that Python knows by another, or of which mail holds a superset.
_ALSO = MappingProxyType({
    "gb2312": "gb18030", "gbk": "gb18030", "x_gbk": "gb18030", "shift_jis": "cp932", "x_sjis": "cp932", "ks_c_5601_1987": "cp949", "euc_kr": "cp949",
    "iso_8859_8_i": "iso8859_8", "iso_8859_8_e": "iso8859_8", "unicode_1_1_utf_7": "utf_7", "utf8mb4": "utf_8", "x_mac_cyrillic": "mac_cyrillic",
    "x_unknown": "ascii", "unknown_8bit": "ascii", "default": "ascii", "utf": "utf_8", "cp_850": "cp850", "tis_620": "tis_620", "windows_874": "cp874"})


class Part:
    """A leaf or a multipart. `type` in lower case; `parts` of a multipart that was looked into; `opaque`: it could not be.

    buffer[start:end] is its body, before any transfer encoding is undone.
    """

    __slots__ = ("_content", "_disposition", "_params", "buffer", "depth", "end", "opaque", "parts", "start", "type")

    def __init__(self, header: bytes, buffer: Any, start: int, end: int, depth: int, default: str) -> None:
        self.buffer = buffer
        self.start = start
        self.end = end
        self.depth = depth
        self.parts: list[Part] = []
        self.opaque = False
        self._content: dict[bytes, bytes] = {}
        for name, value in _CONTENT.findall(header):
            self._content.setdefault(name.lower(), value)
        self._params: dict[str, str] | None = None
        self._disposition: tuple[str, dict[str, str]] | None = None
        kind = self._content.get(b"content-type")
        match = _TYPE.match(_octets_text(kind[:1000])) if kind is not None else None
        if match is not None:
            self.type = match[1].lower()
        else:  # RFC 2045 section 5.2: what can't be read is plain text
            self.type = default if kind is None else "text/plain"

    @property
    def params(self) -> dict[str, str]:
        """Parameters of Content-Type, names in lower case."""
        if self._params is None:
            self._params = parameters(self._content.get(b"content-type", b""))
        return self._params

    @property
    def charset(self) -> str:
        """The charset as declared, or ""."""
        return self.params.get("charset", "")

    @property
    def encoding(self) -> str:
        """The transfer encoding in lower case; "" for none."""
        match = _TOKEN.match(_octets_text(self._content.get(b"content-transfer-encoding", b"")[:200]))
        return match[1].lower() if match is not None else ""

    @property
    def disposition(self) -> str:
        """"attachment", "inline", another word, or ""."""
        return self._disposed()[0]

    @property
    def filename(self) -> str:
        """The name its sender gave it, or "": a name for people, never a path."""
        name = self._disposed()[1].get("filename") or self.params.get("name", "")
        return decode_words(name)[0] if "=?" in name else name

    @property
    def content_id(self) -> str:
        """Content-ID without angle brackets, or ""."""
        return field_text(self._content.get(b"content-id", b""))[0].strip("<> ")

    @property
    def size(self) -> int:
        """Octets of the body as it is encoded."""
        return self.end - self.start

    def _disposed(self) -> tuple[str, dict[str, str]]:
        if self._disposition is None:
            raw = self._content.get(b"content-disposition")
            if raw is None:
                self._disposition = ("", {})
            else:
                match = _TOKEN.match(_octets_text(raw[:200]))
                self._disposition = (match[1].lower() if match is not None else "", parameters(raw))
        return self._disposition

    def walk(self) -> Iterator[Part]:
        """The leaves in order: what holds no parts, opaque multiparts too."""
        stack = [self]
        while stack:
            part = stack.pop()
            if part.parts:
                stack.extend(reversed(part.parts))
            else:
                yield part

    def octets(self) -> Iterator[bytes]:
        """The content in pieces, its transfer encoding undone as far as it goes."""
        encoding = self.encoding
        if encoding == "base64":
            yield from self._from_base64()
        elif encoding == "quoted-printable":
            yield from self._from_quoted()
        else:
            for start in range(self.start, self.end, PIECE):
                yield self.buffer[start:min(self.end, start + PIECE)]

    def _from_base64(self) -> Iterator[bytes]:
        """RFC 2045 section 6.8: what is not of the alphabet is passed over; what follows padding is another run."""
        kept = b""
        for start in range(self.start, self.end, PIECE):
            runs = (kept + self.buffer[start:min(self.end, start + PIECE)].translate(None, _NOT_BASE64)).split(b"=")
            kept = runs.pop()
            for run in runs:
                if run:
                    yield _run(run)
            whole = len(kept) - len(kept) % 4
            if whole:
                yield binascii.a2b_base64(kept[:whole])
                kept = kept[whole:]
        if kept:
            yield _run(kept)

    def _from_quoted(self) -> Iterator[bytes]:
        """RFC 2045 section 6.7, cut at line ends."""
        start = self.start
        while start < self.end:
            stop = min(self.end, start + PIECE)
            if stop < self.end:
                stop = self.buffer.rfind(b"\n", start, stop) + 1 or stop
                for back in (1, 2):  # never within =XX
                    if stop - back > start and self.buffer[stop - back:stop - back + 1] == b"=":
                        stop -= back
                        break
            yield binascii.a2b_qp(self.buffer[start:stop])
            start = stop

    def content(self) -> bytes:
        """`octets` in one."""
        return b"".join(self.octets())

    def base64(self) -> Iterator[bytes]:
        """The content in base64 without line ends, in pieces."""
        if self.encoding == "base64" and self.size <= PIECE:
            yield binascii.b2a_base64(self.content(), newline=False)
            return
        kept = b""
        for piece in self.octets():
            kept += piece
            whole = len(kept) - len(kept) % 3
            if whole:
                yield binascii.b2a_base64(kept[:whole], newline=False)
                kept = kept[whole:]
        if kept:
            yield binascii.b2a_base64(kept, newline=False)

    def text(self) -> tuple[str, bool]:
        """(the content as text with LF line ends, whether all of it could be decoded)."""
        text, whole = decode(self.content(), self.charset)
        return (text.replace("\r\n", "\n") if "\r" in text else text), whole


def _run(run: bytes) -> bytes:
    """A run of base64 without its padding; a lone last character holds no octet."""
    rest = len(run) % 4
    if rest == 1:
        run = run[:-1]
    return binascii.a2b_base64(run + b"=" * (-len(run) % 4))


@contextmanager
def parts_of(message: Message) -> Iterator[Part]:
    """The tree of a message, good within the block; a body in a file is mapped, which raises OSError where it can't be."""
    body = message.body
    if isinstance(body, FileBody):
        with open(body.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield read_parts(message.header, view, body.offset, body.offset + body.size)
    else:
        yield read_parts(message.header, body.data)


def read_parts(header: bytes, body: Any, start: int = 0, end: int | None = None) -> Part:
    """The tree of parts of a message with that header section, whose body is body[start:end]: bytes or an mmap."""
    last = len(body) if end is None else end
    root = Part(header, body, start, last, 0, "text/plain")
    if not root.type.startswith("multipart/"):
        return root
    count, stray, budget = 1, MAX_STRAY, max(SCANS * (last - start), MIN_SCAN)
    stack = [root]
    while stack:
        part = stack.pop()
        boundary = part.params.get("boundary", "").rstrip()
        budget -= part.end - part.start
        if not boundary or part.depth >= MAX_DEPTH or count >= MAX_PARTS or budget < 0:
            part.opaque = True
            continue
        default = "message/rfc822" if part.type == "multipart/digest" else "text/plain"  # RFC 2046 section 5.1.5
        ranges, stray = _split(body, part.start, part.end, b"--" + boundary.encode("utf-8", "surrogateescape"), MAX_PARTS - count, stray)
        part.opaque = not ranges
        count += len(ranges)
        for first, past in ranges:
            head, begin = _part_header(body, first, past)
            child = Part(head, body, begin, past, part.depth + 1, default)
            part.parts.append(child)
            if child.type.startswith("multipart/"):
                stack.append(child)
    return root


def _split(body: Any, start: int, end: int, delimiter: bytes, most: int, stray: int) -> tuple[list[tuple[int, int]], int]:
    """(where the parts between delimiters lie, how many stray lines are still allowed); RFC 2046 section 5.1.1."""
    ranges: list[tuple[int, int]] = []
    begin = -1
    position = start
    first = body[start:start + len(delimiter)] == delimiter
    while stray > 0:
        if first:
            at, first = start, False
        else:
            found = body.find(b"\n" + delimiter, position, end)
            if found < 0:
                break
            at = found + 1
        after = at + len(delimiter)
        closes = body[after:after + 2] == b"--"
        if closes:
            after += 2
        stop = body.find(b"\n", after, end)
        stop = end if stop < 0 else stop
        position = max(at, stop - 1)
        if body[after:min(stop, after + 1000)].strip(b" \t\r"):  # another boundary that begins the same
            stray -= 1
            position = at
            continue
        if begin >= 0:
            past = at - 1
            if past > begin and body[past - 1:past] == b"\r":
                past -= 1
            ranges.append((begin, max(begin, past)))
            if len(ranges) >= most:
                return ranges, stray
        begin = -1 if closes else min(stop + 1, end)
        if closes:
            break
        position = stop
    if begin >= 0:  # the closing delimiter is missing
        ranges.append((begin, end))
    return ranges, stray


def _part_header(body: Any, start: int, end: int) -> tuple[bytes, int]:
    """(header section of a part, where its body begins)."""
    match = _HEADER.match(body, start, end)
    past = match.end() if match is not None else start
    begin = past
    if body[past:min(end, past + 2)] == b"\r\n":
        begin = past + 2
    elif body[past:min(end, past + 1)] == b"\n":
        begin = past + 1
    return body[start:min(past, start + MAX_PART_HEADER)], begin


# --- fields ---------------------------------------------------------------------------------------------------------


def header_fields(header: bytes) -> list[tuple[str, bytes]]:
    """(name, raw value still folded) from the top."""
    return [(name.decode("ascii"), value) for name, value in _FIELD.findall(header) if name]


def field_text(value: bytes) -> tuple[str, bool]:
    """(a field's value unfolded, as text with encoded words decoded; whether all could be)."""
    text, whole = unfolded(value)
    if "=?" in text:
        text, decoded = decode_words(text)
        whole = whole and decoded
    return text, whole


def unfolded(value: bytes) -> tuple[str, bool]:
    """(a field's value on one line, encoded words left alone; whether its octets could be decoded); RFC 5322 section 2.2.3."""
    if b"\n" in value:
        value = value.replace(b"\r\n", b"").replace(b"\n", b"")
    value = value.strip()
    if value.isascii():
        return value.decode("ascii"), True
    return decode(value, "")


def decode_words(text: str) -> tuple[str, bool]:
    """(text with its encoded words decoded, whether all could be); what is no valid word stays as it is. RFC 2047."""
    out: list[str] = []
    whole = True
    position = 0
    charset, octets = "", b""
    for match in _WORD.finditer(text):
        between = text[position:match.start()]
        if octets and (between.strip() or match[1].lower() != charset):
            word, good = decode(octets, charset)
            out.append(word)
            whole, octets = whole and good, b""
        if between.strip() or not position:  # RFC 2047 section 6.2: blanks between two words are not shown
            out.append(between)
        charset = match[1].lower()
        if match[2] in "bB":
            octets += b"".join(_run(run) for run in match[3].encode("ascii", "replace").translate(None, _NOT_BASE64).split(b"=") if run)
        else:
            octets += binascii.a2b_qp(match[3].encode("utf-8", "replace"), header=True)
        position = match.end()
    if octets:
        word, good = decode(octets, charset)
        out.append(word)
        whole = whole and good
    out.append(text[position:])
    return "".join(out), whole


def decode(octets: bytes, charset: str) -> tuple[str, bool]:
    """(the octets as text, whether the charset is known and all of them are in it); without one: ASCII, or UTF-8."""
    name = normalize_encoding(charset.strip(" \t\"'")[:60]).lower() if charset.isascii() else "?"
    name = _ALSO.get(name, name)
    if name in _UTF_8 or name not in _CHARSETS:
        try:
            return octets.decode("utf-8"), name in _UTF_8 or octets.isascii()
        except UnicodeDecodeError:
            return octets.decode("utf-8", "replace"), False
    try:
        text = octets.decode(name)
        text.encode("utf-8")  # UTF-7 can hide halves of characters
        return text, True
    except (LookupError, ValueError):
        pass
    try:
        return octets.decode(name, "replace").encode("utf-8", "replace").decode("utf-8"), False
    except (LookupError, ValueError):
        return octets.decode("utf-8", "replace"), False


def parameters(value: bytes) -> dict[str, str]:
    """Parameters of a structured field, names in lower case, continuations and charsets of RFC 2231 resolved; the first of a name wins."""
    text = _octets_text(value[:MAX_PARAMETER_TEXT]).replace("\r\n", "").replace("\n", "")
    plain: dict[str, str] = {}
    sections: dict[str, dict[int, tuple[bool, str]]] = {}
    for number, match in enumerate(_PARAMETER.finditer(text)):
        if number >= MAX_PARAMETERS:
            break
        name = match[1].lower()
        given = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3].strip().strip('"')
        if "*" in name and (section := _SECTION.match(name)) is not None:  # RFC 2231 sections 3 and 4
            sections.setdefault(section[1], {}).setdefault(int(section[2] or 0), (section[3] is not None, given))
        else:
            plain.setdefault(name, given)
    found = {name: _octets_clean(given) for name, given in plain.items()}
    for name, pieces in sections.items():
        octets, charset = b"", ""
        for number, (encoded, given) in sorted(pieces.items()):
            if encoded:
                if number == 0 and given.count("'") >= 2:
                    charset, _, given = given.split("'", 2)
                octets += _percent(given.encode("utf-8", "surrogateescape"))
            else:
                octets += given.encode("utf-8", "surrogateescape")
        found[name] = decode(octets, charset)[0]
    return found


def _percent(octets: bytes) -> bytes:
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes((int(match[1], 16),)), octets)


def _octets_text(octets: bytes) -> str:
    return octets.decode("utf-8", "surrogateescape")


def _octets_clean(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def addresses(value: bytes) -> list[tuple[str, str]]:
    """(display name, address) of the mailboxes in an address field, group names left out; RFC 5322 section 3.4. What has no @ is left out."""
    text = unfolded(value[:MAX_ADDRESS_TEXT])[0]
    found: list[tuple[str, str]] = []
    words: list[str] = []
    raw: list[str] = []
    angle: str | None = None
    comment = ""

    def end() -> None:
        nonlocal angle, comment
        bare = "".join(raw)
        if angle is not None:
            found.append((decode_words(" ".join(words))[0], angle))
        elif "@" in bare:
            found.append((decode_words(comment)[0], bare))
        words.clear()
        raw.clear()
        angle, comment = None, ""

    position = 0
    while position < len(text) and len(found) < MAX_ADDRESSES:
        match = _ADDRESS.match(text, position)
        assert match is not None
        position = match.end()
        quoted, opens, inner, mark, word = match.groups()
        if opens is not None:
            position, comment = _comment(text, position)
        elif inner is not None:
            angle = inner.rpartition(":")[2].strip() if inner.startswith("@") else inner.strip()
        elif mark == ":":  # the name of a group
            words.clear()
            raw.clear()
        elif mark is not None:
            end()
        elif quoted is not None:
            words.append(re.sub(r"\\(.)", r"\1", quoted))
            raw.append(match[0])
        elif word is not None:
            words.append(word)
            raw.append(word)
        elif match[0] == '"':  # no quote closes it, nor one of those behind it, each of which would be looked for to the end again
            text = text[:position] + text[position:].replace('"', " ")
    end()
    return [pair for pair in found if "@" in pair[1]][:MAX_ADDRESSES]


def _comment(text: str, position: int) -> tuple[int, str]:
    """(where the comment that begins before `position` ends, its text); comments nest."""
    depth, start = 1, position
    while position < len(text) and depth:
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
        position += 1
    return position, text[start:position - 1 if not depth else position].strip()
