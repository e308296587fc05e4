"""Client and server connected in memory: whatever is asked and answered, both end in a legal state and agree on what it is.

Besides: arbitrary octets raise nothing in the server, nothing but ProtocolError in the client, and mean the same however they are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail import reply as replies
from gmta.mail.reply import Reply
from gmta.smtp import events
from gmta.smtp.client import ClientProtocol
from gmta.smtp.data import Stuffer
from gmta.smtp.lines import ProtocolError
from gmta.smtp.server import Bounds, Extensions, ServerProtocol
from gmta.testing.dialogue import Replies

POSITIVE: dict[type, Reply] = {
    events.Mail: replies.MAIL_OK, events.Rcpt: replies.RCPT_OK, events.Data: replies.START_MAIL_INPUT, events.Quit: replies.CLOSING,
    events.ChunkEnd: replies.CHUNK_OK, events.StartTls: replies.READY_FOR_TLS, events.Auth: replies.AUTH_OK,
}
REFUSALS = (replies.LOCAL_ERROR, replies.NOT_PERMITTED)


def answer(event: events.Event, mood: int) -> Reply:
    """The engine's reply: mostly positive, sometimes not, what the protocol has found wrong always."""
    if isinstance(event, events.Fault):
        return event.reply
    if isinstance(event, events.BodyEnd) and event.fault is not None:
        return event.fault
    if mood == 0 and not isinstance(event, events.Quit | events.Reset | events.Noop):
        return REFUSALS[0]
    if mood == 1 and not isinstance(event, events.Quit | events.Reset | events.Noop):
        return REFUSALS[1]
    return POSITIVE.get(type(event), replies.OK)


class Link:
    """A client and a server, and the wire between them. moods: one for each answer of the server; 2 ends the session with 421."""

    def __init__(self, extensions: Extensions, moods: Sequence[int], cut: int) -> None:
        self.client = ClientProtocol()
        self.server = ServerProtocol(extensions, "mx.example.test")
        self.moods = list(moods)
        self.cut = cut
        self.closed = False
        self.wire = b""
        self.sent = b""
        self.taken = b""
        self.codes: list[tuple[str, int]] = []
        self._to_client(Reply(220, None, "mx.example.test").wire())

    def say(self, octets: bytes) -> None:
        """The client writes; nothing moves yet."""
        self.wire += octets

    def flush(self) -> None:
        """The server reads all of it, piece by piece, and the client all of the answers."""
        wire, self.wire = self.wire, b""
        for start in range(0, len(wire), self.cut):
            if not self.closed:
                self.server.receive_data(wire[start:start + self.cut])
                self._serve()
        if not self.closed:
            assert self.client.awaiting == self.client.in_data  # the answer to the end of data is due by itself
            self.agree()

    def _serve(self) -> None:
        while not self.closed and (event := self.server.next_event()) is not None:
            if isinstance(event, events.Body):
                self.taken += event.data
                continue
            mood = self.moods.pop(0) if self.moods else 9
            if mood == 2:
                self._to_client(replies.SHUTTING_DOWN.wire())
                self.closed = True
                return
            reply = answer(event, mood)
            self._to_client(self.server.reply(reply))
            self.closed = isinstance(event, events.Quit) or bool(getattr(event, "close", False))
            if isinstance(event, events.StartTls) and reply.code == 220:
                self.client.tls_started()
                self.server.tls_started()

    def _to_client(self, octets: bytes) -> None:
        for start in range(0, len(octets), self.cut):
            self.client.receive_data(octets[start:start + self.cut])
            while (reply := self.client.next_reply()) is not None:
                self.codes.append((self.client.last_command, reply.code))

    def agree(self) -> None:
        """Both know the same about the session."""
        client, server = self.client, self.server
        assert (client.greeted, client.in_data) == (server.greeted, server.in_data)
        if server.in_transaction:
            assert client.recipients == server.recipients
        if server.greeted and server.esmtp:
            offered = {line.partition(" ")[0] for line in server.extensions.keywords()}
            assert set(client.extensions) >= offered - {"STARTTLS", "AUTH"}


def command(link: Link, word: str, argument: int) -> bool:
    """Gives one command to the link; False where the client's side says that it is out of place. True ends the group."""
    client = link.client
    plain: dict[str, Callable[[], bytes]] = {
        "ehlo": lambda: client.ehlo("me.example"), "helo": lambda: client.helo("me.example"), "rset": client.rset, "noop": client.noop,
        "quit": client.quit, "data": client.data, "starttls": client.starttls,
        "auth": lambda: client.auth("PLAIN", b"\0user@example.test\0secret"),
        "mail": lambda: client.mail("a@b.example", size=argument * 5 if "SIZE" in client.extensions else None),
        "rcpt": lambda: client.rcpt(f"user{argument}@example.test"),
        "bdat": lambda: client.bdat(argument, argument % 2 == 0) + b"x" * argument,
    }
    if word == "bdat" and "CHUNKING" not in client.extensions:
        return False  # its octets would be read as commands
    try:
        link.say(plain[word]())
    except ProtocolError:
        return False
    return True


ENDS_GROUP = frozenset({"ehlo", "helo", "quit", "data", "starttls", "auth", "noop"})  # RFC 2920 section 3.1
TRANSACTION = ("mail", "rcpt", "rcpt", "data")
PHRASES = st.sampled_from([(word,) for word in ("ehlo", "helo", "mail", "rcpt", "data", "bdat", "rset", "noop", "quit", "starttls", "auth")]
                          + [TRANSACTION, TRANSACTION, TRANSACTION, ("mail", "rcpt", "bdat", "bdat"), ("mail", "rcpt", "bdat", "rset"),
                             ("starttls", "ehlo", "auth"), ("rset", "mail", "rcpt", "rcpt"), ("data", "quit")])
COMMANDS = st.lists(st.tuples(PHRASES, st.integers(0, 9)), min_size=1, max_size=10).map(
    lambda phrases: [(word, argument + number) for words, argument in phrases for number, word in enumerate(words)])
MOODS = st.lists(st.sampled_from([9] * 20 + [0, 1]), max_size=25).flatmap(
    lambda moods: st.integers(1, 60).map(lambda at: [*moods[:at], 2, *moods[at:]] if at < len(moods) else moods))
EXTENSIONS = st.builds(Extensions, size=st.sampled_from([0, 60, 1000]), starttls=st.booleans(), auth=st.sampled_from([(), ("PLAIN", "LOGIN")]),
                       pipelining=st.booleans(), chunking=st.booleans(), dsn=st.booleans(), smtputf8=st.booleans(), limits=st.booleans())
MESSAGES = st.lists(st.sampled_from([b"Subject: x\r\n", b"\r\n", b".\r\n", b"..\r\n", b"text\r\n", b"\r\n.\r\n", b".", b"a" * 30]), max_size=6).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(extensions=EXTENSIONS, commands=COMMANDS, moods=MOODS,
       message=MESSAGES, cut=st.sampled_from([1, 3, 1000]), leave=st.sampled_from([None, None, None, 1, 4, 9]))
def test_any_walk_ends_in_a_legal_state(extensions: Extensions, commands: list[tuple[str, int]], moods: list[int], message: bytes, cut: int,
                                        leave: int | None) -> None:
    link = Link(extensions, moods, cut)
    commands = [("ehlo", 0), *commands]
    for number, (word, argument) in enumerate(commands):
        if link.closed:
            break
        if link.client.in_data:
            stuffer = Stuffer()
            before = len(link.taken)
            link.say(stuffer.feed(message) + stuffer.finish())
            link.flush()
            if link.codes[-1] == ("end of data", 250):
                assert link.taken[before:] == message + (b"" if not message or message.endswith(b"\r\n") else b"\r\n")
            continue
        if number == leave:
            link.wire = link.wire[:argument]  # the client is gone in the middle of what it said
            link.server.receive_data(link.wire)
            link._serve()
            return
        if word == "starttls" or "PIPELINING" not in link.client.extensions:
            link.flush()
        if not link.closed and command(link, word, argument) and (word in ENDS_GROUP or "PIPELINING" not in link.client.extensions):
            link.flush()
    if not link.closed and not link.client.in_data:
        link.flush()
    if not link.closed and not link.client.in_data:
        link.moods.clear()
        command(link, "quit", 0)
        link.flush()
        assert link.codes[-1] == ("QUIT", 221)
    assert [code for _, code in link.codes[:-1] if code == 421] == []  # nothing follows a 421


def test_a_refused_starttls_leaves_both_in_clear() -> None:
    link = Link(Extensions(starttls=True), [9, 0], 1000)
    for word in ("ehlo", "starttls"):
        command(link, word, 0)
        link.flush()
    assert not link.server.tls and link.codes[-1] == ("STARTTLS", 451)
    assert command(link, "mail", 1)


def test_a_421_out_of_the_blue_is_read() -> None:
    client = ClientProtocol()
    client.receive_data(b"220 mx\r\n421 4.4.2 Timeout, closing\r\n")
    assert [reply.code for reply in iter(client.next_reply, None)] == [220, 421]
    assert client.last_command == ""


# --- any octets, cut anyhow -------------------------------------------------------------------------------------

OPEN = b"EHLO a.example\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@example.test>\r\n"
SAID = st.tuples(st.sampled_from([b"", OPEN, OPEN.replace(b"\r\n", b"\n"), OPEN + b"DATA\r\n", OPEN + b"BDAT 30\r\n", OPEN + b"DATA\n"]), st.lists(st.one_of(
    st.binary(max_size=12), st.sampled_from([
        b"EHLO a.example\r\n", b"HELO b\r\n", b"MAIL FROM:<a@b.example>\r\n", b"MAIL FROM:<> SIZE=90\r\n", b"RCPT TO:<c@example.test>\r\n",
        b"DATA\r\n", b"DATA\n", b"A: b\r\n\r\nx\r\n.\r\n", b"A: b\nB: c\n", b".\r\n", b".\r\n", b"\r\n.\r\n", b"\n.\n", b"\n..", b"\r.\r", b"BDAT 3\r\n",
        b"BDAT 4 LAST\r\n", b"BDAT 0 LAST\r\n", b"BDAT 500 LAST\r\n", b"a\r\n", b"A: b\r\n", b"\r\n", b"\r", b"\n", b"\0", b"x" * 40, b"y" * 60,
        b"RSET\r\n", b"NOOP\r\n", b"AUTH PLAIN\r\n", b"AUTH LOGIN AAAA\r\n", b"*\r\n", b"QUIT\r\n", b"VRFY x\r\n", b"y" * 66000]),
), max_size=14).map(b"".join), st.sampled_from([b"", b".\r\n", b"\r\n.\r\nNOOP\r\n", b"BDAT 2 LAST\r\n\r\nNOOP\r\n"])).map(b"".join)
CUTS = st.lists(st.integers(1, 60), min_size=1, max_size=8)


def cut(octets: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The octets in pieces of these sizes, over and over."""
    pieces, position, number = [], 0, 0
    while position < len(octets):
        size = sizes[number % len(sizes)] if position < 400 else 30000
        pieces.append(octets[position:position + size])
        position, number = position + size, number + 1
    return pieces


def served(pieces: Sequence[bytes], moods: Sequence[int], size: int, normalize: bool) -> tuple[list[events.Event], bytes]:
    """(events, octets answered); Body events only where the message was taken, in one."""
    server = ServerProtocol(Extensions(size=size, auth=("PLAIN", "LOGIN")), "mx.example.test", bounds=Bounds(100, 50, 60, 3), normalize=normalize)
    seen: list[events.Event] = []
    out = body = b""
    for piece in pieces:
        server.receive_data(piece)
        while (event := server.next_event()) is not None:
            if isinstance(event, events.Body):
                body += event.data
                continue
            if isinstance(event, events.BodyEnd) and event.fault is None:
                seen.append(events.Body(body))
            if not isinstance(event, events.ChunkEnd):
                body = b""
            mood = moods[len(seen) % len(moods)]
            challenge = isinstance(event, events.Auth) and mood > 5
            seen.append(event)
            out += server.reply(Reply(334, None, "") if challenge else answer(event, mood))
            if isinstance(event, events.Quit) or getattr(event, "close", False):
                return seen, out
    return seen, out


@settings(max_examples=300, deadline=None)
@given(said=SAID, cuts=CUTS, moods=st.lists(st.sampled_from([9, 9, 9, 9, 9, 5, 0, 1]), min_size=1, max_size=6), size=st.sampled_from([0, 100]), normalize=st.booleans())
def test_any_octets_mean_the_same_however_they_are_cut(said: bytes, cuts: list[int], moods: list[int], size: int, normalize: bool) -> None:
    whole = served([said], moods, size, normalize)
    Replies().feed(whole[1])  # raises where one is malformed
    assert served(cut(said, cuts), moods, size, normalize) == whole
    assert served(cut(said, [1]), moods, size, normalize) == whole


TEXT = st.lists(st.sampled_from([b"A: b\r\n", b"a\r\n", b"\r\n", b"\n", b"\r", b".", b"\0", b"x" * 45, b"\r\n.\n", b"A: b\n", b" c\r\n"]), max_size=12).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXT, cuts=CUTS, size=st.sampled_from([0, 60]), normalize=st.booleans(), how=st.sampled_from(["data", "data in LF", "chunk", "chunks"]))
def test_a_message_is_judged_the_same_however_it_is_cut(text: bytes, cuts: list[int], size: int, normalize: bool, how: str) -> None:
    if how == "data":
        said = OPEN + b"DATA\r\n" + text + b"\r\n.\r\n"
    elif how == "data in LF":
        said = (OPEN + b"DATA\r\n").replace(b"\r\n", b"\n") + text + b"\n.\n"
    elif how == "chunk":
        said = OPEN + b"BDAT %d LAST\r\n" % len(text) + text
    else:
        half = len(text) // 2
        said = OPEN + b"BDAT %d\r\n" % half + text[:half] + b"BDAT %d LAST\r\n" % (len(text) - half) + text[half:]
    said += b"NOOP\r\n"
    whole = served([said], [9], size, normalize)
    assert served(cut(said, cuts), [9], size, normalize) == whole
    assert served(cut(said, [1]), [9], size, normalize) == whole


def heard(pieces: Sequence[bytes], asked: int) -> tuple[list[tuple[str, Reply]], str]:
    """(what each reply answers, reply) up to the first thing that is none, and what that was."""
    client = ClientProtocol()
    for ask in (lambda: client.ehlo("a.example"), client.noop, client.rset, lambda: client.lhlo("b.example"))[:asked]:
        ask()
    got: list[tuple[str, Reply]] = []
    try:
        for piece in pieces:
            client.receive_data(piece)
            while (reply := client.next_reply()) is not None:
                got.append((client.last_command, reply))
    except ProtocolError as error:
        return got, str(error)
    return got, ""


@settings(max_examples=200, deadline=None)
@given(said=st.lists(st.binary(max_size=8) | st.sampled_from([b"250 ok\r\n", b"220-x\r\n", b"220 y\r\n", b"250-SIZE 5\r\n", b"550 5.1.1 no\n",
                                                              b"421 bye\r\n", b"354\r\n", b"\r\n", b"z" * 66000]), max_size=10).map(b"".join),
       cuts=CUTS, asked=st.integers(0, 4))
def test_any_replies_mean_the_same_however_they_are_cut(said: bytes, cuts: list[int], asked: int) -> None:
    whole = heard([said], asked)
    assert heard(cut(said, cuts), asked) == whole
    assert heard(cut(said, [1]), asked) == whole


@pytest.mark.parametrize("method", ["ehlo", "mail", "rcpt"])
@given(text=st.text(max_size=12))
def test_no_argument_becomes_a_second_line(method: str, text: str) -> None:
    client = ClientProtocol()
    client.receive_data(b"220 a\r\n")
    client.next_reply()
    client.ehlo("a.example")
    client.receive_data(b"250 a\r\n")
    client.next_reply()
    try:
        octets = getattr(client, method)(text)
    except ProtocolError:
        assert client.awaiting == 0
        return
    assert octets.count(b"\n") == octets.count(b"\r") == 1 and octets.endswith(b"\r\n")
