"""Workers are killed (-9) in the middle of relaying to a sink that counts: nothing is lost, and no more comes twice than was in flight.

GMTA_RELAYED=10000 in the environment makes it 10,000 messages; `pytest -s` shows the figures.
"""

from __future__ import annotations

import json
import os
import re
import signal
import smtplib
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.conftest import Gmta, children, until

pytestmark = pytest.mark.e2e

MESSAGES = int(os.environ.get("GMTA_RELAYED", "600"))
KILLS = 4
CONCURRENCY = 20  # deliveries at a time of a worker to one next hop
TEXT = "From: a@example.test\r\nSubject: {}\r\n\r\n" + "body of the message\r\n" * 50


class Sink(socketserver.ThreadingTCPServer):
    """Takes mail and counts it by subject. `open` lets the greetings out; `counted` is called between a message and its 250."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.taken: Counter[int] = Counter()
        self.busy = 0  # messages begun and not answered
        self.open = threading.Event()
        self.lock = threading.Lock()
        self.counted: Callable[[], None] = lambda: None

    @property
    def total(self) -> int:
        """Messages taken, each as often as it came."""
        return self.taken.total()

    def handle_error(self, *_: object) -> None:
        """Who was killed is gone."""


class Conversation(socketserver.StreamRequestHandler):
    """A session with one client."""

    server: Sink
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Greets when it may, and takes whatever comes."""
        self.server.open.wait()
        self.wfile.write(b"220 sink.example ESMTP\r\n")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go\r\n")
                self._take()
            elif verb == b"QUIT":
                self.wfile.write(b"221 bye\r\n")
                return
            else:
                self.wfile.write(b"250-sink.example\r\n250 PIPELINING\r\n" if verb == b"EHLO" else b"250 ok\r\n")

    def _take(self) -> None:
        server, lines = self.server, []
        with server.lock:
            server.busy += 1
        try:
            for line in self.rfile:
                if line == b".\r\n":
                    break
                lines.append(line)
            else:
                return
            found = re.search(rb"^Subject: (\d+)\r$", b"".join(lines), re.M)
            assert found is not None
            with server.lock:
                server.taken[int(found[1])] += 1
                server.counted()
            self.wfile.write(b"250 taken\r\n")
        finally:
            with server.lock:
                server.busy -= 1


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.open.set()
        server.shutdown()


def test_nothing_is_lost_and_little_comes_twice(gmta: Gmta, sink: Sink) -> None:
    gmta.serve(gmta.configuration(f"""
[gmta]
workers = 2
[domains]
relay_from = 127.0.0.0/8
[transport:outbound]
type = relay
host = 127.0.0.1:{sink.server_address[1]}
concurrency = {CONCURRENCY}
[route]
* = outbound
"""))
    assert gmta.process is not None
    pid, in_flight = gmta.process.pid, []

    def kill() -> None:
        if sink.total == MESSAGES * (len(in_flight) + 1) // (KILLS + 1) and len(in_flight) < KILLS:
            workers = children(pid)
            in_flight.append(sink.busy)
            os.kill(workers[len(in_flight) % len(workers)], signal.SIGKILL)

    sink.counted = kill
    for first in range(0, MESSAGES, 100):  # over several connections, so that both workers get some
        with smtplib.SMTP("127.0.0.1", gmta.port) as client:
            for number in range(first, min(first + 100, MESSAGES)):
                client.sendmail("a@example.test", ["b@dest.example"], TEXT.format(number))
    assert not sink.taken
    sink.open.set()
    until(lambda: len(sink.taken) == MESSAGES, "all messages at the sink")
    until(lambda: json.loads(gmta.command("queue", "list", "--json").stdout) == [], "empty queue")
    twice = sink.total - MESSAGES
    print(f"\n{MESSAGES} messages, {len(in_flight)} workers killed with {in_flight} messages in transfer: "
          f"0 lost, {twice} came twice, at most {KILLS * CONCURRENCY} were in flight")
    assert sorted(sink.taken) == list(range(MESSAGES)) and len(in_flight) == KILLS
    assert twice <= KILLS * CONCURRENCY
