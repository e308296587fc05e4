"""Messages looked into: parts found in place, text and names decoded, and whatever the octets are a result within bounds."""

from __future__ import annotations

import email
import email.policy
import json
import mmap
from email.message import EmailMessage
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail import mime
from gmta.mail.message import Message

CASES = json.loads((Path(__file__).parents[1] / "data/mime.json").read_text())


def read(raw: bytes) -> mime.Part:
    message = Message.from_bytes(raw)
    return mime.read_parts(message.header, message.body.data)  # type: ignore[union-attr]


def leaves(raw: bytes) -> list[tuple[str, str, bytes]]:
    return [(part.type, part.filename, part.content()) for part in read(raw).walk()]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case_has_a_result(case: dict[str, str]) -> None:
    raw = case["message"].encode("latin-1")
    for part in read(raw).walk():
        part.text(), part.filename, part.content_id, list(part.base64())
    for _, value in mime.header_fields(Message.from_bytes(raw).header):
        mime.field_text(value)


def test_name_split_within_a_character() -> None:
    (case,) = (case for case in CASES if case["id"] == "mim-04")
    assert [name for _, name, _ in leaves(case["message"].encode())] == ["€.pdf"]


def test_unknown_charset_and_malformed_word() -> None:
    assert mime.field_text(b"=?utf-8?B?A?= =?bogus?Q?x?=")[0] == "x"
    assert mime.decode(b"x\xff", "bogus") == ("x\ufffd", False)
    assert mime.decode(b"x", "bogus") == ("x", True)


@pytest.mark.parametrize("charset", ["idna", "punycode", "rot13", "zlib", "hex", "unicode_escape", "undefined", "utf-8\0", "../x", "ä", "x" * 1000])
def test_codec_that_is_no_charset_is_not_used(charset: str) -> None:
    assert mime.decode(b"\\u0041-x", charset) == ("\\u0041-x", True)


@pytest.mark.parametrize(("octets", "charset", "text", "whole"), [
    ("ж".encode("koi8-r"), "KOI8-R", "ж", True), ("漢".encode("gb18030"), "gb2312", "漢", True), (b"\x80", "windows-1252", "€", True), (b"\xe4", "iso-8859-1", "ä", True),
    ("ä".encode(), "", "ä", True), (b"\xe4", "us-ascii", "\ufffd", False), (b"+2AA-", "utf-7", None, False), (b"\xff\xfea\0", "utf-16", "a", True)])
def test_charsets(octets: bytes, charset: str, text: str | None, whole: bool) -> None:
    decoded, all_of_it = mime.decode(octets, charset)
    assert all_of_it is whole
    assert text is None or decoded == text
    decoded.encode("utf-8")  # no half characters


@pytest.mark.parametrize(("raw", "text"), [
    ("=?utf-8?q?a_b=C3=A4?=", "a bä"), ("x =?utf-8?b?w6Q=?= y", "x ä y"), ("=?utf-8?b?w6Q=?=\r\n =?utf-8?q?b?=", "äb"), ("=?utf-8?q?=C3?= =?utf-8?q?=A4?=", "ä"),
    ("=?iso-8859-1?q?=E4?= =?utf-8?q?=C3=A4?=", "ää"), ("=?utf-8*de?q?x?=", "x"), ("=?utf-8?z?x?=", "=?utf-8?z?x?="), ("=?utf-8?q?x", "=?utf-8?q?x"), ("a=?b", "a=?b"),
    ("=?utf-8?q??=", ""), ("=?us-ascii?q?a?= b =?us-ascii?q?c?=", "a b c")])
def test_encoded_words(raw: str, text: str) -> None:
    assert mime.field_text(raw.encode())[0] == text


@pytest.mark.parametrize(("raw", "found"), [
    (b"a@b", [("", "a@b")]), (b'"B, \\"J" <a@b>, =?utf-8?q?=C3=A4?= <c@d>', [('B, "J', "a@b"), ("ä", "c@d")]), (b"a@b (Joe (x)), c@d", [("Joe (x)", "a@b"), ("", "c@d")]),
    (b"g: a@b, c@d;, e@f", [("", "a@b"), ("", "c@d"), ("", "e@f")]), (b"<@x,@y:a@b>", [("", "a@b")]), (b'"a b"@c', [("", '"a b"@c')]), (b"nobody, <>, \"", []), (b"(((", []),
    (b"undisclosed-recipients:;", []), ("Jörg <a@b>".encode(), [("Jörg", "a@b")])])
def test_addresses(raw: bytes, found: list[tuple[str, str]]) -> None:
    assert mime.addresses(raw) == found


def test_addresses_behind_quotes_without_end() -> None:
    """Looking for the end of each would take minutes."""
    assert [address for _, address in mime.addresses(b'"' + b'\\"' * 100_000 + b" <a@b.test>, c@d.test")] == ["a@b.test", "c@d.test"]
    assert mime.addresses(b'"x\\"y <a@b.test>') == [("x\\ y", "a@b.test")]


@pytest.mark.parametrize(("field", "name"), [
    (b'attachment; filename="a b.txt"', "a b.txt"), (b"attachment; filename=a.txt; filename=b.txt", "a.txt"), (b"attachment; filename*=utf-8''%C3%A4.txt", "ä.txt"),
    (b"attachment; filename=x; filename*=utf-8''%C3%A4", "ä"), (b'attachment; filename*1="b"; filename*0="a"', "ab"), (b'attachment; filename="=?utf-8?q?=C3=A4?="', "ä"),
    (b'attachment; filename="a\\"b"', 'a"b'), (b'attachment; filename="open', "open"), (b"attachment;\r\n\tfilename=x", "x"), (b"attachment", ""), (b";;;", ""),
    (b"attachment; filename*=bogus'en'%41%zz", "A%zz")])
def test_file_names(field: bytes, name: str) -> None:
    (part,) = read(b"Content-Disposition: " + field + b"\r\n\r\nx").walk()
    assert part.filename == name


def test_base64_is_read_as_far_as_it_goes() -> None:
    def content(text: bytes) -> bytes:
        (part,) = read(b"Content-Transfer-Encoding: BASE64 (x)\r\n\r\n" + text).walk()
        return part.content()

    assert content(b"aGVs\r\nbG8=\r\n") == b"hello"
    assert content(b"aGVsbG8") == content(b"a-G.V s!bG8=") == b"hello"
    assert content(b"aGk=aGk=") == b"hihi"
    assert content(b"aGVsb") == b"hel"
    assert content(b"====") == content(b"!") == b""


def test_transfer_encodings_in_pieces_are_the_same_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    octets = bytes(range(256)) * 3
    for encoding, sizes in (("base64", (1, 2, 3, 5, 64, 1000)), ("quoted-printable", (4, 5, 7, 64, 1000))):
        message = EmailMessage(policy=email.policy.SMTP)
        message.set_content(octets, maintype="application", subtype="x", cte=encoding)
        for size in sizes:
            monkeypatch.setattr(mime, "PIECE", size)
            (part,) = read(message.as_bytes()).walk()
            assert part.content() == octets, (encoding, size)
            assert mime.binascii.a2b_base64(b"".join(part.base64())) == octets


def test_depth_is_bounded() -> None:
    raw = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(150))
    found = list(read(raw).walk())
    assert len(found) == 1 and found[0].opaque and found[0].depth == mime.MAX_DEPTH


def test_number_of_parts_is_bounded() -> None:
    found = list(read(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\nx\r\n" * 3000).walk())
    assert mime.MAX_PARTS - 2 <= len(found) <= mime.MAX_PARTS


def test_work_is_bounded_where_parts_nest_and_delimiters_stray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mime, "MIN_SCAN", 0)
    deep = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(99))
    assert any(part.opaque for part in read(deep + b"x" * 100_000).walk())
    (part,) = read(b"Content-Type: multipart/mixed; boundary=-\r\n\r\n" + b"---x\r\n" * 50_000).walk()
    assert part.opaque


def test_parts_in_a_file_are_read_in_place(tmp_path: Path) -> None:
    raw = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\none\r\n--b\r\nContent-Type: text/html\r\n\r\ntwo\r\n--b--\r\n"
    message = Message.from_bytes(raw)
    (tmp_path / "m").write_bytes(b"before" + raw)
    with open(tmp_path / "m", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        start = 6 + len(message.header) + len(message.separator)
        assert [part.content() for part in mime.read_parts(message.header, view, start, len(view)).walk()] == [b"one", b"two"]


def test_digest_and_missing_blank_line() -> None:
    assert leaves(b"Content-Type: multipart/digest; boundary=b\r\n\r\n--b\r\n\r\nSubject: x\r\n\r\n--b--") == [("message/rfc822", "", b"Subject: x\r\n")]
    assert leaves(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n<p>\r\n--b--") == [("text/html", "", b"<p>")]


LINES = st.sampled_from([b"--a", b"--a--", b"--ab", b"--b", b"", b"Content-Type: multipart/x; boundary=a", b"Content-Type: multipart/x; boundary=b", b"text", b" folded",
                         b"Content-Transfer-Encoding: base64", b"Content-Type: text/plain; charset=\xff", b"\x80"])


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=25), st.sampled_from([b"\r\n", b"\n"]))
def test_parts_lie_within_their_parents_in_order(lines: list[bytes], end: bytes) -> None:
    raw = b"Content-Type: multipart/mixed; boundary=a" + b"\r\n\r\n" + end.join(lines)
    stack = [read(raw)]
    while stack:
        part = stack.pop()
        last = part.start
        for child in part.parts:
            assert last <= child.start <= child.end <= part.end
            last = child.end
        stack += part.parts


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_any_field_value_gives_text(octets: bytes) -> None:
    mime.field_text(octets)[0].encode("utf-8")
    for name, address in mime.addresses(octets):
        (name + address).encode("utf-8")
    for name, value in mime.parameters(octets).items():
        value.encode("utf-8")
        assert name == name.lower()
