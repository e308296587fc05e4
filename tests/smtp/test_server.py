"""ServerProtocol in memory: dialogues under four chunkings, and any octets at all."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.smtp import events
from gmta.smtp.commands import decode_xtext, encode_xtext
from gmta.smtp.lines import ProtocolError
from gmta.smtp.server import Bounds, Extensions, ServerProtocol

ANSWERS = {events.Mail: replies.MAIL_OK, events.Rcpt: replies.RCPT_OK, events.Data: replies.START_MAIL_INPUT, events.Quit: replies.CLOSING,
           events.ChunkEnd: replies.CHUNK_OK, events.StartTls: replies.READY_FOR_TLS}


def play(pieces, size=100000, **options):
    """(octets answered, message octets, events) of a server that agrees to everything."""
    server = ServerProtocol(Extensions(size=size, starttls=True), "mx.example.test", **options)
    out, body, seen = b"", b"", []
    for piece in pieces:
        server.receive_data(piece)
        while (event := server.next_event()) is not None:
            if isinstance(event, events.Body):
                body += event.data
                continue
            seen.append(type(event).__name__)
            answer = ANSWERS.get(type(event), replies.OK)
            if isinstance(event, events.Fault):
                answer = event.reply
            elif isinstance(event, events.BodyEnd) and event.fault:
                answer = event.fault
            out += server.reply(answer)
    return out, body, seen


def chunkings(wire: bytes):
    rng = random.Random(7)
    yield [wire]
    yield wire.splitlines(keepends=True)
    yield [bytes([octet]) for octet in wire]
    pieces, position = [], 0
    while position < len(wire):
        step = rng.randint(1, 9)
        pieces.append(wire[position : position + step])
        position += step
    yield pieces


def codes(out: bytes) -> str:
    return " ".join(line[:3].decode() for line in out.split(b"\r\n") if line[3:4] != b"-" and line)


HELLO = b"EHLO client.example\r\n"
MAIL = b"MAIL FROM:<a@client.example>\r\n"
RCPT = b"RCPT TO:<user@example.test>\r\n"

DIALOGUES = [
    (HELLO + MAIL + RCPT + b"DATA\r\n..x\r\n.\r\nQUIT\r\n", "250 250 250 354 250 221", b".x\r\n"),
    (b"RSET\r\n" + MAIL + HELLO + MAIL, "250 503 250 250", b""),
    (HELLO + b"MAIL FROM: <a@b.test> BODY=8BITMIME\r\nRCPT TO:\t<user@example.test> \r\n", "250 250 250", b""),
    (HELLO + b"MAIL FROM:<a@b.test> SIZE=abc\r\nMAIL FROM:<a@b.test> SIZE=99999999999\r\n", "250 501 552", b""),
    (HELLO + b"MAIL FROM:<a@b.test> X=1\r\n" + RCPT + b"DATA\r\n", "250 555 503 503", b""),
    (HELLO + MAIL + MAIL + b"DATA\r\n", "250 250 503 554", b""),
    (HELLO + MAIL + RCPT + b"RCPT TO:<u@b.test> NOTIFY=NEVER,SUCCESS\r\nRCPT TO:<u@b.test> ORCPT=rfc822;a+0D+0Ab\r\n", "250 250 250 501 501", b""),
    (HELLO + b"MAIL FROM:<p\xc3\xa9@b.test>\r\nMAIL FROM:<p\xc3\xa9@b.test> SMTPUTF8\r\n", "250 553 250", b""),
    (HELLO + b"RCPT TO:<\xf6@b.test>\r\nNOOP\r\n", "250 501 250", b""),
    (b"\r\nBOGUS\r\nEHLO\r\nVRFY a\r\n", "500 500 501 250", b""),
    (b"POST / HTTP/1.1\r\n" + HELLO, "421", b""),
    (b"EHLO a\nX-Injected: 1\r\n" + HELLO, "550", b""),
    (HELLO + b"BDAT 9 LAST\r\nMAIL FROMNOOP\r\n", "250 503 250", b""),
    (HELLO + b"BDAT\r\nBDAT abc\r\nBDAT 6 FIRST\r\nNOOP\r\nNOOP\r\n", "250 501 501 501 250", b""),
    (HELLO + MAIL + RCPT + b"BDAT 5\r\nhelloBDAT 6 LAST\r\nQUIT\r\nNOOP\r\n", "250 250 250 250 250 250", b"helloQUIT\r\n"),
    (HELLO + MAIL + RCPT + b"BDAT 5\r\nhelloRSET\r\n" + MAIL, "250 250 250 250 250 250", b"hello"),
    # RFC 3030 section 2: a failed chunk spoils the message until RSET; nothing of it is ever accepted
    (HELLO + MAIL + RCPT + b"BDAT 3\r\nabcBDAT 3 FIRST\r\ndefBDAT 3 LAST\r\nghi" + RCPT + b"DATA\r\nRSET\r\n" + MAIL + RCPT + b"BDAT 2 LAST\r\nok",
     "250 250 250 250 501 503 503 503 250 250 250 250", b"abcok"),
    (HELLO + MAIL + RCPT + b"BDAT 3\r\nabc" + RCPT + b"BDAT 0 LAST\r\n", "250 250 250 250 503 250", b"abc"),
    (b"EHLO [192.0.2.77\r\nEHLO [192.0.2.77]\r\n", "501 250", b""),
    # RFC 3461 section 4: xtext stands for octets, here those of UTF-8
    (HELLO + b"MAIL FROM:<a@b.test> ENVID=a+FF\r\nMAIL FROM:<a@b.test> ENVID=a+C3+A9\r\n", "250 501 250", b""),
    # chunks that can't end within four times the size limit (100,000 here): not read to their end, whoever asked for them
    (HELLO + b"BDAT 400001\r\nNOOP\r\n", "250 421", b""),
    (HELLO + MAIL + RCPT + b"BDAT 400001 LAST\r\nNOOP\r\n", "250 250 250 421", b""),
    (HELLO + MAIL + RCPT + b"BDAT 3\r\nabcBDAT 399998\r\nNOOP\r\n", "250 250 250 250 421", b"abc"),
    (HELLO + MAIL + RCPT + b"DATA\r\na\nb\r\n.\r\n" + HELLO, "250 250 250 354 550", None),
    (HELLO + MAIL + RCPT + b"DATA\r\na\0b\r\n.\r\nNOOP\r\n", "250 250 250 354 550 250", None),
    (HELLO + b"STARTTLS now\r\nAUTH PLAIN AAAA\r\nHELP\r\n", "250 501 502 250", b""),
    (HELLO + b"MAIL FROM:<a@b.test> X=" + b"a" * 6000 + b"\r\nNOOP\r\n", "250 500 250", b""),
]


@pytest.mark.parametrize("number", range(len(DIALOGUES)))
def test_dialogue_under_any_chunking(number):
    wire, wanted, body = DIALOGUES[number]
    for pieces in chunkings(wire):
        out, got, _ = play(pieces)
        assert codes(out) == wanted, pieces
        if body is not None:
            assert got == body


def test_starttls_forgets_what_came_in_clear():
    server = ServerProtocol(Extensions(starttls=True), "mx")
    server.receive_data(HELLO + b"STARTTLS\r\nMAIL FROM:<evil@b.test>\r\nEH")
    server.next_event()
    server.reply(replies.OK)
    assert isinstance(server.next_event(), events.StartTls)
    server.reply(replies.READY_FOR_TLS)
    assert server.next_event() is None
    server.tls_started()
    assert server.next_event() is None
    server.receive_data(MAIL)
    assert server.next_event() == events.Fault(replies.HELO_FIRST, False)


def test_oversize_is_read_to_its_end_and_refused():
    wire = HELLO + MAIL + RCPT + b"DATA\r\n" + b"x" * 70 + b"\r\n" + b"y" * 70 + b"\r\n.\r\nNOOP\r\n"
    for pieces in chunkings(wire):
        assert codes(play(pieces, size=100)[0]) == "250 250 250 354 552 250"


def test_reply_without_a_question_is_an_error():
    with pytest.raises(ProtocolError):
        ServerProtocol(Extensions(), "mx").reply(replies.OK)


@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(
    [HELLO, MAIL, RCPT, b"DATA\r\n", b".\r\n", b"BDAT 3\r\n", b"BDAT 2 LAST\r\n", b"RSET\r\n", b"\r\n", b"AUTH PLAIN\r\n", b"QUIT\r\n"])), max_size=12))
def test_any_octets_give_wellformed_replies_whatever_the_chunking(parts):
    wire = b"".join(parts)
    whole = play([wire])
    for line in whole[0].split(b"\r\n")[:-1]:
        Reply.parse([line])
    assert play([bytes([octet]) for octet in wire])[0] == whole[0]


def test_xtext_there_and_back():
    for text in ("a+b=c", "\u00e9\u20ac", "plain"):
        assert decode_xtext(encode_xtext(text), "ENVID") == text


def test_a_refused_chunk_counts_as_data_until_it_is_in():
    server = ServerProtocol(Extensions(size=100000), "mx")
    server.receive_data(HELLO + b"BDAT 9 LAST\r\nMAIL")
    server.next_event()
    server.reply(replies.OK)
    assert server.next_event() is None
    assert server.in_data


def test_text_without_a_header_section_has_no_header_bound():
    wire = HELLO + MAIL + RCPT + b"DATA\r\n" + b"no field here\r\n" * 9 + b".\r\nNOOP\r\n"
    for pieces in chunkings(wire):
        assert codes(play(pieces, bounds=Bounds(header_size=11))[0]) == "250 250 250 354 250 250"


def test_bounds_are_the_caller_s():
    wire = HELLO + MAIL + RCPT + b"DATA\r\nA: 1\r\nB: 2\r\n\r\n" + b"x" * 50 + b"\r\n.\r\nNOOP\r\n"
    for bounds, code in ((Bounds(), "250"), (Bounds(text_line=49), "552"), (Bounds(header_size=11), "552"), (Bounds(header_fields=1), "552"),
                         (Bounds(text_line=50, header_size=12, header_fields=2), "250")):
        for pieces in chunkings(wire):
            assert codes(play(pieces, bounds=bounds)[0]) == f"250 250 250 354 {code} 250", (bounds, pieces)
