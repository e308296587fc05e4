"""A next hop's limits hold over three nodes, as the next hop sees it.

GMTA_CLUSTER_MINUTE=1 in the environment makes it 60 a minute for two minutes; `pytest -s` shows the figures.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.conftest import until
from tests.e2e.test_cluster import TEXT, Cluster
from tests.e2e.test_killed_relay import Conversation, Sink

pytestmark = pytest.mark.e2e

MINUTE = bool(os.environ.get("GMTA_CLUSTER_MINUTE"))
RATE, GAP_S, MESSAGES = ("60/m", 1.0, 120) if MINUTE else ("10/s", 0.1, 60)
LATE_S = 0.4  # a job may begin so much behind its time, and the one after it in time


class CountingSink(Sink):
    """A sink that sees how many connections are open, and when messages come. slow_s: how long it takes over one."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = Counting
        self.slow_s = 0.0
        self.connected = 0
        self.most = 0
        self.peers: set[int] = set()
        self.times: list[float] = []
        self.counted = self._count

    def _count(self) -> None:
        self.times.append(time.monotonic())


class Counting(Conversation):
    """One of its sessions."""

    server: CountingSink

    def handle(self) -> None:
        """Counts itself once those have been seen off that have said goodbye."""
        server = self.server
        with server.lock:
            server.connected += 1
        time.sleep(0.1)
        with server.lock:
            server.most = max(server.most, server.connected)
        try:
            super().handle()
        finally:
            with server.lock:
                server.connected -= 1

    def _take(self) -> None:
        time.sleep(self.server.slow_s)
        super()._take()


@pytest.fixture
def sink() -> Iterator[CountingSink]:
    with CountingSink() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        server.open.set()
        yield server
        server.shutdown()


@pytest.fixture
def cluster(directory: Path, database_url: str, sink: CountingSink) -> Iterator[Cluster]:
    three = Cluster(directory, database_url, sink)
    yield three
    three.stop()
    shutil.rmtree(three.mail, ignore_errors=True)


def deliver(cluster: Cluster, limits: str, count: int) -> CountingSink:
    """Three nodes with those limits get so many messages for the sink together, and deliver them."""
    sink = cluster.sink
    assert isinstance(sink, CountingSink)
    for number in range(3):
        cluster.start(number, f"dest.example = limited\n[transport:limited]\ntype = relay\nhost = 127.0.0.1:{sink.server_address[1]}\n{limits}\n")
    for number, node in enumerate(cluster.nodes):
        with smtplib.SMTP("127.0.0.1", node.port, timeout=30) as client:
            for serial in range(number, count, 3):
                client.sendmail("a@example.test", ["b@dest.example"], TEXT.format(serial))
    end = time.monotonic() + 200
    while len(sink.taken) < count and time.monotonic() < end:
        time.sleep(0.05)
    until(lambda: cluster.ask("SELECT count(*) FROM message") == 0, "empty queue")
    assert sink.taken == dict.fromkeys(range(count), 1)
    return sink


def test_connections_and_rate_hold_over_three_nodes(cluster: Cluster) -> None:
    sink = deliver(cluster, f"concurrency = 2\nrate = {RATE}", MESSAGES)
    took_s = sink.times[-1] - sink.times[0]
    window = int(1 / GAP_S) if not MINUTE else 60
    fullest = max(sum(1 for at in sink.times if start <= at < start + window * GAP_S) for start in sink.times)
    print(f"\n{MESSAGES} messages at {RATE} took {took_s:.1f} s; at most {fullest} in {window * GAP_S:g} s, {sink.most} connections at a time, "
          f"gaps of {min(later - earlier for earlier, later in pairwise(sink.times)):.2f} s and more")
    assert sink.most <= 2
    assert took_s >= (MESSAGES - 1) * GAP_S - LATE_S - GAP_S
    assert fullest <= window + 1 + LATE_S / GAP_S


def test_connections_go_round_among_three_nodes(cluster: Cluster) -> None:
    cluster.sink.slow_s = 0.2  # type: ignore[attr-defined]
    sink = deliver(cluster, "concurrency = 2", 45)
    print(f"\n45 messages of 0.2 s took {sink.times[-1] - sink.times[0]:.1f} s over {sink.most} connections at a time")
    assert sink.most == 2
