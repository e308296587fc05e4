"""ClientProtocol in memory: replies in any pieces, bounds, no injection, and a whole dialogue with ServerProtocol."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.smtp import events
from gmta.smtp.client import MAX_REPLY, MAX_REPLY_LINE, ClientProtocol, Limits, parse_limits
from gmta.smtp.data import Stuffer
from gmta.smtp.lines import ProtocolError
from gmta.smtp.server import Extensions, ServerProtocol

EHLO = b"250-mx.example\r\n250-SIZE 1000\r\n250-auth PLAIN LOGIN\r\n250 PIPELINING\r\n"


def greeted(*, lmtp: bool = False) -> ClientProtocol:
    client = ClientProtocol()
    client.receive_data(b"220 mx\r\n")
    assert client.next_reply() is not None
    assert (client.lhlo if lmtp else client.ehlo)("me.example")
    client.receive_data(EHLO)
    assert client.next_reply() is not None
    return client


def test_extensions_are_read() -> None:
    assert greeted().extensions == {"SIZE": "1000", "AUTH": "PLAIN LOGIN", "PIPELINING": ""}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 500])
def test_replies_do_not_depend_on_pieces(size: int) -> None:
    wire = b"220-a\r\n220 b\r\n" + EHLO
    client = ClientProtocol()
    client.ehlo("me.example")
    got = []
    for start in range(0, len(wire), size):
        client.receive_data(wire[start:start + size])
        while (reply := client.next_reply()) is not None:
            got.append((client.last_command, reply.code, len(reply.lines)))
    assert got == [("greeting", 220, 2), ("EHLO", 250, 4)]


def test_lmtp_answers_once_for_each_accepted_recipient() -> None:
    client = greeted(lmtp=True)
    for octets in (client.mail("a@b.example"), client.rcpt("c@d.example"), client.rcpt("no@d.example"), client.rcpt("e@d.example")):
        assert octets.endswith(b"\r\n")
    client.data()
    client.receive_data(b"250 ok\r\n250 ok\r\n550 no\r\n250 ok\r\n354 go\r\n250 first\r\n451 second\r\n")
    assert [reply.code for reply in iter(client.next_reply, None)] == [250, 250, 550, 250, 354, 250, 451]
    assert client.awaiting == 0 and not client.in_data
    client.receive_data(b"250 too many\r\n")
    with pytest.raises(ProtocolError):
        client.next_reply()


def test_recipients_are_those_of_the_transaction_that_the_answers_speak_of() -> None:
    client = greeted()
    for octets in (client.mail("a@b.example"), client.rcpt("c@d.example"), client.mail("nested@b.example"), client.rcpt("e@d.example"),
                   client.rset(), client.mail("f@b.example"), client.rcpt("g@d.example")):
        assert octets.endswith(b"\r\n")
    client.receive_data(b"250 ok\r\n250 ok\r\n503 5.5.1 nested\r\n250 ok\r\n250 reset\r\n250 ok\r\n250 ok\r\n")
    counts = []
    while client.next_reply() is not None:
        counts.append(client.recipients)
    assert counts == [0, 1, 1, 2, 0, 0, 1]


def test_commands_out_of_order_and_line_breaks_are_refused() -> None:
    with pytest.raises(ProtocolError):
        ClientProtocol().mail("a@b.example")
    for address in ("a@b.example>\r\nRCPT TO:<x@y.example", "a\nb@c.example", "a\0@b.example", "\ud800@b.example"):
        with pytest.raises(ProtocolError):
            greeted().rcpt(address)
    client = greeted()
    client.data()
    client.receive_data(b"354 go\r\n")
    client.next_reply()
    with pytest.raises(ProtocolError):
        client.rset()


def test_clear_text_behind_starttls_is_refused() -> None:
    client = greeted()
    client.starttls()
    client.receive_data(b"220 go\r\n250 injected\r\n")
    client.next_reply()
    with pytest.raises(ProtocolError):
        client.tls_started()


@pytest.mark.parametrize("wire", [b"hello\r\n", b"199 x\r\n", b"2500 x\r\n", b"\r\n", b"250_x\r\n", b"220-a\r\n" * 200000, b"2" * (MAX_REPLY + 9999)])
def test_what_is_no_reply_is_a_protocol_error(wire: bytes) -> None:
    client = ClientProtocol()
    client.receive_data(wire)
    with pytest.raises(ProtocolError):
        client.next_reply()


@pytest.mark.parametrize("size", [1, 1000, MAX_REPLY_LINE, 100000])
def test_a_long_reply_is_cut_and_the_next_one_whole(size: int) -> None:
    wire = b"550-" + b"x" * 9000 + b"\r\n550-y\r\n" + b"550-z\r\n" * 200 + b"521 5.7.1 last\r\n250 ok\r\n"
    client = greeted()
    client.mail("a@b.example")
    client.noop()
    got = []
    for start in range(0, len(wire), size):
        client.receive_data(wire[start:start + size])
        got += list(iter(client.next_reply, None))
    assert [reply.code for reply in got] == [521, 250]
    assert got[0].lines[0] == "x" * (MAX_REPLY_LINE - 4) and got[0].lines[1] == "y" and got[0].lines[-1] == "last"


def test_limits_are_read_and_nonsense_passed_over() -> None:
    assert parse_limits("RCPTMAX=50 mailmax=100 X=1 RCPTDOMAINMAX=0 RCPTMAX=9") == Limits(100, 50, 0)
    assert parse_limits("RCPTMAX MAILMAX= RCPTDOMAINMAX=1234567") == parse_limits("") == Limits()


@given(st.lists(st.binary(max_size=30) | st.sampled_from([b"250 ok\r\n", b"220-x\r\n", b"354\r\n", b"421 bye\n"]), max_size=8))
def test_only_protocol_error_escapes(pieces: list[bytes]) -> None:
    client = ClientProtocol()
    client.ehlo("me.example")
    try:
        for piece in pieces:
            client.receive_data(piece)
            while client.next_reply() is not None:
                pass
    except ProtocolError:
        pass


@given(st.binary(max_size=300).map(lambda raw: raw.replace(b"\r", b"").replace(b"\0", b"").replace(b"\n", b"\r\n") + b"\r\n"))
def test_a_message_arrives_as_it_was(message: bytes) -> None:
    client, server = ClientProtocol(), ServerProtocol(Extensions(size=10000), "mx.example")
    client.receive_data(Reply(220, None, "mx.example").wire())
    seen: list[events.Event] = []
    body = b""

    def ask(octets: bytes) -> int:
        nonlocal body
        server.receive_data(octets)
        while (event := server.next_event()) is not None:
            if isinstance(event, events.Body):
                body += event.data
                continue
            seen.append(event)
            client.receive_data(server.reply(replies.START_MAIL_INPUT if isinstance(event, events.Data) else replies.OK))
        reply = client.next_reply()
        assert reply is not None
        return reply.code

    assert client.next_reply() is not None
    ask(client.ehlo("me.example"))
    assert ask(client.mail("a@b.example", size=len(message), body="8BITMIME", ret="HDRS", envid="a+b c")) == 250
    assert ask(client.rcpt("c@d.example", notify=["FAILURE", "DELAY"], orcpt="rfc822;x+y@d.example")) == 250
    assert ask(client.data()) == 354
    stuffer = Stuffer()
    assert ask(stuffer.feed(message) + stuffer.finish()) == 250
    assert body == message
    mail, rcpt = seen[1], seen[2]
    assert isinstance(mail, events.Mail) and (mail.envid, mail.ret, mail.size) == ("a+b c", "HDRS", len(message))
    assert isinstance(rcpt, events.Rcpt) and rcpt.orcpt == "rfc822;x+y@d.example"
    assert rcpt.notify == frozenset({"FAILURE", "DELAY"})
