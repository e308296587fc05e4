"""Three nodes on one PostgreSQL: killed, frozen, and with the database killed under them, they lose nothing.

What comes twice is counted: at most what was in delivery at that moment. GMTA_CLUSTER=5 in the environment makes five blows of one,
and more mail; `pytest -s` shows the figures.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from tests.e2e.conftest import Gmta, children, until
from tests.e2e.test_killed_relay import Sink
from tests.postgresql import PostgreSQL

pytestmark = pytest.mark.e2e

BLOWS = int(os.environ.get("GMTA_CLUSTER", "1"))
SESSIONS = 6
CONCURRENCY = 10  # deliveries at a time of a node to the sink
LEASE_S = 2
TEXT = "From: a@example.test\r\nSubject: {}\r\n\r\n" + "body of the message\r\n" * 200


class Cluster:
    """Nodes, a Maildir that they share, a sink."""

    def __init__(self, directory: Path, url: str, sink: Sink, count: int = 3) -> None:
        self.directory, self.url, self.sink = directory, url, sink
        self.mail = directory / "mail"
        self.nodes: list[Gmta] = []
        for number in range(count):
            folder = directory / f"node{number}"
            folder.mkdir()
            self.nodes.append(Gmta(folder))

    def start(self, number: int, extra: str = "") -> None:
        """Starts a node, again where it is gone."""
        node = self.nodes[number]
        node.process = None
        node.serve(node.configuration(f"""
[queue]
store = {self.url}
node = node{number}
lease = {LEASE_S}s
retry = 1s
[domains]
relay_from = 127.0.0.0/8
[limits]
connections_per_ip = 1000
[transport:mailbox]
path = {self.mail}/{{local}}
[transport:outbound]
type = relay
host = 127.0.0.1:{self.sink.server_address[1]}
concurrency = {CONCURRENCY}
[route]
* = outbound
{extra}"""))

    def processes(self, number: int) -> list[int]:
        """A node's supervisor and workers."""
        process = self.nodes[number].process
        assert process is not None
        return [process.pid, *children(process.pid)]

    def kill(self, number: int) -> None:
        """kill -9 of a whole node."""
        process = self.nodes[number].process
        assert process is not None
        for pid in self.processes(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def ask(self, statement: str) -> int:
        """A number from the database."""
        with psycopg.connect(self.url) as connection:
            row = connection.execute(statement).fetchone()
            assert row is not None
            return int(row[0])

    def boxed(self) -> Counter[int]:
        """The messages in the Maildir, by their numbers."""
        found: Counter[int] = Counter()
        for path in (self.mail / "b/new").iterdir() if (self.mail / "b/new").is_dir() else ():
            match = re.search(rb"^Subject: (\d+)$", path.read_bytes(), re.M)
            assert match is not None
            found[int(match[1])] += 1
        return found

    def stop(self) -> None:
        """Ends all nodes."""
        for node in self.nodes:
            for pid in self.processes(self.nodes.index(node)) if node.process is not None and node.process.poll() is None else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            with suppress(Exception):
                node.stop()


class Load:
    """Clients that send numbered messages, in turns to the Maildir and to the sink, to all nodes that answer, until told to end."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._next = 0
        self.acknowledged: set[int] = set()
        self.refusals: Counter[int] = Counter()
        self._threads = [threading.Thread(target=self._send, args=(number,), daemon=True) for number in range(SESSIONS)]
        for thread in self._threads:
            thread.start()

    def _send(self, number: int) -> None:
        while not self._ending.is_set():
            number = (number + 1) % len(self._cluster.nodes)
            try:
                with smtplib.SMTP("127.0.0.1", self._cluster.nodes[number].port, timeout=30) as client:
                    for _ in range(20):
                        if self._ending.is_set():
                            break
                        self._send_one(client)
            except (smtplib.SMTPException, OSError):
                time.sleep(0.05)

    def _send_one(self, client: smtplib.SMTP) -> None:
        with self._lock:
            serial, self._next = self._next, self._next + 1
        try:
            client.sendmail("a@example.test", ["b@example.test" if serial % 2 else "b@dest.example"], TEXT.format(serial))
        except smtplib.SMTPResponseException as error:
            self.refusals[error.smtp_code] += 1
            time.sleep(0.02)
            raise
        self.acknowledged.add(serial)

    def wait_for(self, count: int) -> None:
        """Until so many more are acknowledged."""
        goal = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= goal, "acknowledged messages")

    def end(self) -> None:
        """Waits for the clients."""
        self._ending.set()
        for thread in self._threads:
            thread.join(40)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        server.open.set()
        yield server
        server.shutdown()


@pytest.fixture
def cluster(directory: Path, database_url: str, sink: Sink) -> Iterator[Cluster]:
    three = Cluster(directory, database_url, sink)
    yield three
    three.stop()
    shutil.rmtree(three.mail, ignore_errors=True)


def judge(cluster: Cluster, load: Load, what: str, blows: int, in_flight: int) -> None:
    """Waits until all is delivered; nothing lost, nothing twice but what was in flight."""
    sink = cluster.sink
    boxed: Counter[int] = Counter()

    def drained() -> bool:
        with suppress(psycopg.OperationalError):
            return cluster.ask("SELECT count(*) FROM message") == 0
        return False

    began = time.monotonic()
    until(drained, "empty queue")
    boxed = cluster.boxed()
    there = set(boxed) | set(sink.taken)
    lost = load.acknowledged - there
    twice_boxed, twice_sunk = boxed.total() - len(boxed), sink.total - len(sink.taken)
    print(f"\n{what}: {blows} blows, {len(load.acknowledged)} acknowledged, {len(lost)} lost, twice: {twice_sunk} at the sink "
          f"(in transfer at the blows: {in_flight}), {twice_boxed} in the Maildir; drained in {time.monotonic() - began:.1f} s; "
          f"refused: {dict(load.refusals)}")
    assert not lost and twice_boxed == 0 and twice_sunk <= in_flight
    assert set(load.refusals) <= {451}


def test_three_nodes_share_a_queue(cluster: Cluster) -> None:
    for number in range(3):
        cluster.start(number)
    load = Load(cluster)
    load.wait_for(300 * BLOWS)
    load.end()
    judge(cluster, load, "untouched", 0, 0)


def test_a_node_is_killed(cluster: Cluster) -> None:
    for number in range(3):
        cluster.start(number)
    load, in_flight = Load(cluster), 0
    for blow in range(BLOWS):
        load.wait_for(150)
        in_flight += cluster.sink.busy + CONCURRENCY
        cluster.kill(blow % 3)
        load.wait_for(100)
        if blow < BLOWS - 1:
            cluster.start(blow % 3)
    load.end()
    judge(cluster, load, "kill -9 of a node", BLOWS, in_flight)


def test_the_database_is_killed(cluster: Cluster, postgresql: PostgreSQL) -> None:
    for number in range(3):
        cluster.start(number)
    load = Load(cluster)
    for _ in range(BLOWS):
        load.wait_for(150)
        postgresql.stop(immediate=True)
        time.sleep(1.0)
        postgresql.start()
        load.wait_for(100)
    load.end()
    judge(cluster, load, "PostgreSQL killed", BLOWS, 0)


def test_a_node_is_frozen_beyond_its_lease(cluster: Cluster) -> None:
    for number in range(3):
        cluster.start(number)
    load, in_flight = Load(cluster), 0
    for blow in range(BLOWS):
        load.wait_for(150)
        in_flight += cluster.sink.busy + CONCURRENCY
        frozen = cluster.processes(blow % 3)
        before = cluster.ask("SELECT max(id) FROM worker")
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: cluster.ask("SELECT count(*) FROM worker") == 2, "end of the lease")
        time.sleep(1.0)
        for pid in reversed(frozen):
            os.kill(pid, signal.SIGCONT)
        until(lambda before=before: cluster.ask("SELECT max(id) FROM worker") > before, "new lease")  # type: ignore[misc]
        load.wait_for(100)
    load.end()
    judge(cluster, load, "frozen node", BLOWS, in_flight)


def test_a_large_message_goes_through_two_nodes_in_flat_memory(cluster: Cluster) -> None:
    cluster.sink.open.clear()  # nothing is delivered there
    small, large = TEXT.format(7) + ("x" * 998 + "\r\n") * 400, TEXT.format(8) + ("x" * 998 + "\r\n") * 34_900
    cluster.start(0)
    send(cluster.nodes[0], small)
    before = peak(cluster, 0)
    send(cluster.nodes[0], large)
    grown = [peak(cluster, 0) - before]
    cluster.start(1)
    send(cluster.nodes[1], small)
    until(lambda: cluster.boxed()[7] == 2, "small messages")
    before = peak(cluster, 1)
    cluster.kill(0)
    cluster.sink.open.set()
    until(lambda: cluster.sink.taken[8] == 1, "message at the sink")
    grown.append(peak(cluster, 1) - before)
    until(lambda: cluster.ask("SELECT count(*) FROM chunk") == 0, "no pieces left")
    print(f"\n35 MB through two nodes: memory grew by {grown[0]} and {grown[1]} KB")
    assert max(grown) < 12 * 1024


def send(node: Gmta, text: str) -> None:
    """A small one to the Maildir, a large one to the sink."""
    with smtplib.SMTP("127.0.0.1", node.port, timeout=30) as client:
        client.sendmail("a@example.test", ["b@dest.example" if len(text) > 1_000_000 else "b@example.test"], text)


def peak(cluster: Cluster, number: int) -> int:
    """The most memory that a node's worker has had, in KB."""
    text = "".join(Path(f"/proc/{pid}/status").read_text() for pid in cluster.processes(number)[1:])
    return max(map(int, re.findall(r"VmHWM:\s+(\d+)", text)))
