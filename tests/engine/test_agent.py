"""What goes between a worker and the delivery agent, and what a worker makes of an agent that fails. With a real one: tests/e2e/test_users.py."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent.event import Event

import gmta
from gmta import Delivery
from gmta import agent as process
from gmta.agent import make_transports
from gmta.deliver import agent as module
from gmta.deliver.agent import (
    MAX_FRAME,
    AgentTransport,
    close_all,
    delivery_of,
    frame,
    outcomes_of,
    read_frame,
    request_of,
    rows_of,
)
from gmta.mail.message import Message
from gmta.testing.fakes import MemoryLog, make_config, make_envelope, make_file_message, make_message

RAW = b"Subject: x\r\n\r\nhello \xff\r\n"


class Transport:
    concurrency = 128
    longest_s = 60.0

    def user_of(self, address: Any) -> str:
        return str(address.split_detail("+")[0].lower())

    def deliver(self, delivery: Delivery) -> dict[int, gmta.Outcome]:
        raise AssertionError


def delivery(message: Message | None = None, *recipients: str, **facts: Any) -> Delivery:
    envelope = make_envelope(recipients=recipients or ("joe@example.test",), **facts)
    return Delivery(envelope, envelope.recipients, message or make_message(), "mailbox")


@pytest.mark.parametrize("kind", ["memory", "file", "no header", "empty"])
def test_a_delivery_is_the_same_on_the_other_side(tmp_path: Path, kind: str) -> None:
    messages = {"memory": Message.from_bytes(RAW), "file": make_file_message(tmp_path / "m", RAW * 1000), "no header": Message.from_bytes(b"\r\nhello\r\n"),
                "empty": Message.from_bytes(b"")}
    given = delivery(messages[kind], "joe+x@example.test", "j\u00f6@example.test", sender="", tags=["quarantine"], facts={"ip": "192.0.2.1"})
    given.first_attempt = False
    request, files = request_of(given, given.recipients[:1])
    try:
        taken = delivery_of(read_frame(chunks(frame(request))), files)
        assert b"".join(taken.message.chunks()) == b"".join(given.message.chunks())
        assert taken.message.header == given.message.header and taken.message.size == given.message.size
        assert [str(one.address) for one in taken.recipients] == ["joe+x@example.test"] and not taken.envelope.sender and not taken.first_attempt
        assert (taken.envelope.id, taken.envelope.tags, taken.envelope.facts) == (given.envelope.id, ["quarantine"], {"ip": "192.0.2.1"})
    finally:
        close_all(files)


def chunks(data: bytes) -> Callable[[int], bytes]:
    """recv of a peer that sends octet by octet, then closes."""
    left = list(data)
    return lambda size: bytes([left.pop(0)]) if left else b""


def test_outcomes_are_the_same_on_the_other_side() -> None:
    given = {0: gmta.delivered("ok"), 2: gmta.deferred("later", retry_after_s=5.0, recipient_fault=False), 3: gmta.failed("never", code=552, enhanced="5.2.2")}
    taken = outcomes_of(read_frame(chunks(frame(rows_of(given)))))
    assert [(number, str(one.reply), one.status, one.retry_after_s, one.recipient_fault) for number, one in taken.items()] == [
        (number, str(one.reply), one.status, one.retry_after_s, one.recipient_fault) for number, one in given.items()]


@pytest.mark.parametrize(("data", "error"), [(b"", EOFError), (b"\0\0", EOFError), (frame({"a": 1})[:-1], EOFError), (b"\0\0\0\1{", ValueError),
                                             ((MAX_FRAME + 1).to_bytes(4, "big"), ValueError), (b"\xff" * 8, ValueError)])
def test_a_frame_that_is_none(data: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        read_frame(chunks(data))


@pytest.mark.parametrize("change", [{"message": [0, 0, 0]}, {"message": [-1, 0, 0, 0]}, {"message": ["x", 0, 0, 0]}, {"recipients": [{}]}, {"sender": None, "size": None},
                                    {"envelope": 5}, {"message": [999_999, 0, 0, 0]}])
def test_a_request_that_is_none(change: dict[str, Any]) -> None:
    request, files = request_of(delivery(), delivery().recipients)
    try:
        with pytest.raises((ValueError, KeyError, TypeError, OSError)):
            delivery_of({**request, **change}, files)
        with pytest.raises(ValueError, match="no message"):
            delivery_of(request, [])
    finally:
        close_all(files)


Answer = Callable[[socket.socket, int], None]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[Answer], str]]:
    """Starts a server that does with each connection what is said; its address."""
    listening: list[socket.socket] = []

    def start(answer: Answer) -> str:
        path = str(tmp_path / "s")
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        server.listen()
        listening.append(server)

        def serve() -> None:
            for number in range(100):
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, suppress(EOFError, OSError):
                    answer(connection, number)

        threading.Thread(target=serve, daemon=True).start()
        return path

    yield start
    for server in listening:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def take(connection: socket.socket) -> Any:
    data, files, _, _ = socket.recv_fds(connection, 65536, 2)
    close_all(files)
    return read_frame(connection.recv, data)


@pytest.mark.parametrize("said", [b"", b"\0\0\0\2[]", b"\0\0\0\1x", frame({"again": False, "outcomes": [{"number": 0}]}), b"\xff\xff\xff\xff"])
def test_an_agent_that_fails_defers(agent: Callable[[Answer], str], said: bytes) -> None:
    def answer(connection: socket.socket, number: int) -> None:
        take(connection)
        connection.sendall(said)

    log = MemoryLog()
    outcomes = AgentTransport("mailbox", Transport(), agent(answer), log).deliver(delivery())
    assert str(outcomes[0].reply) == "451 4.3.0 The delivery agent can't be asked" and log.of("delivery agent failed")
    assert not [one for one in Path("/proc/self/fd").iterdir() if "memfd:message" in (os.readlink(one) if one.is_symlink() else "")]


def test_there_is_no_agent(tmp_path: Path) -> None:
    assert AgentTransport("mailbox", Transport(), str(tmp_path / "none"), MemoryLog()).deliver(delivery())[0].reply.code == 451


def test_each_account_is_asked_for_and_its_connection_kept(agent: Callable[[Answer], str]) -> None:
    asked: list[tuple[int, list[str], bool]] = []

    def answer(connection: socket.socket, number: int) -> None:
        for _ in range(2):
            request = take(connection)
            asked.append((number, [row["address"] for row in request["recipients"]], request["first_attempt"]))
            connection.sendall(frame({"again": True, "outcomes": rows_of({row["number"]: gmta.delivered("ok") for row in request["recipients"]})}))
            if number == 1:
                return  # its time is over, which nobody is told

    address = agent(answer)
    transport = AgentTransport("mailbox", Transport(), address, MemoryLog())
    assert transport.concurrency < 128 and not hasattr(transport, "next_hop")
    many = AgentTransport("mailbox", Transport(), address, MemoryLog(), many=True)
    assert many.next_hop(delivery().recipients[0].address) == "joe" and many.concurrency < transport.concurrency
    assert transport.deliver(delivery(None, "joe@example.test")).keys() == {0}
    assert transport.deliver(delivery(None, "joe+x@example.test", "Joe@example.test")).keys() == {0, 1}
    transport._idle.clear()
    assert transport.deliver(delivery(None, "ann@example.test")).keys() == {0}
    assert transport.deliver(delivery(None, "ann@example.test")).keys() == {0}
    assert asked == [(0, ["joe@example.test"], True), (0, ["joe+x@example.test", "Joe@example.test"], True), (1, ["ann@example.test"], True),
                     (2, ["ann@example.test"], False)]
    transport.close()


def test_an_account_that_hangs_at_rcpt_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose home hangs, or who stops what runs as him, may be asked for by many sessions."""
    def request(self: AgentTransport, account: str, request: dict[str, Any], files: list[int]) -> dict[int, gmta.Outcome]:
        if account == "joe":
            Event().wait()
        return {0: gmta.failed("full")}

    monkeypatch.setattr(module, "CONCURRENCY", 4)
    monkeypatch.setattr(AgentTransport, "_request", request)
    transport = AgentTransport("mailbox", Transport(), "", MemoryLog(), many=True)
    joe, ann = delivery(None, "joe@example.test", "ann@example.test").recipients
    asking = [gevent.spawn(transport.room, joe.address, 1) for _ in range(8)]
    gevent.sleep(0)
    asked = gevent.spawn(transport.room, ann.address, 1)
    asked.join(1)
    assert asked.value is not None and asked.value.reply.text == "full"
    gevent.killall(asking)
    assert not transport._asked and transport._slots.counter == 4


def test_a_directory_that_hangs_at_rcpt_keeps_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked waits a few seconds only, and asks anew; there are some hundred processes at a time."""
    monkeypatch.setattr(process, "ROOM_S", 0.05)
    monkeypatch.setattr(process, "become", lambda name: time.sleep(60))
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if not pid:
        try:
            process.Fork({"mailbox": Transport()}, theirs).run()
        finally:
            os._exit(0)
    with ours, theirs:
        ours.sendall(frame({"transport": "mailbox", "room": "joe@example.test", "size": 1}))
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGALRM


def test_only_what_delivers_as_users_is_made(tmp_path: Path) -> None:
    """Nothing else of a configuration runs in the process that stays root: no plugin, no other transport."""
    config = make_config(f"""
[gmta]
data_dir = {tmp_path}/data
[plugins]
enable = mailboxes, forward, webhook
[plugin:forward]
secret = abcdefghijklmnopqrst
[plugin:webhook]
events_url = http://127.0.0.1:1/
[transport:mailbox]
type = maildir
path = {tmp_path}/{{user}}
user = {{user}}
concurrency = 3
[transport:out]
type = relay
[transport:forwarded]
type = forward
[lane:big]
match = far.example
[queue:far.example]
retry = 1m
[tls_policy]
far.example = encrypt
[route]
local = mailbox
* = out
""")
    log = MemoryLog()
    made = make_transports(config.snapshot(), log)
    assert list(made) == ["mailbox"] and not log.lines and not (tmp_path / "data").exists()
    assert made["mailbox"].user_of(delivery().recipients[0].address) == "joe"
