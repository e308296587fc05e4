"""ServerProtocol alone: its bounds, and what a caller may ask of it. What it answers is in tests/dialogs."""

import random

import pytest

from gmta.mail import reply as replies
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


def test_xtext_there_and_back():
    for text in ("a+b=c", "\u00e9\u20ac", "plain"):
        assert decode_xtext(encode_xtext(text), "ENVID") == text


@pytest.mark.parametrize("size", ["\u00b2", "\u0663", "1\u0663"])
def test_a_chunk_size_in_other_digits_than_ascii_is_a_syntax_error(size):
    server = ServerProtocol(Extensions(), "mx.example.org")
    server.receive_data(f"BDAT {size}\r\nNOOP\r\n".encode())
    event = server.next_event()
    assert isinstance(event, events.Fault) and event.reply.code == 501
    server.reply(event.reply)
    assert isinstance(server.next_event(), events.Noop)


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
