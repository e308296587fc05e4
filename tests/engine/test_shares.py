"""Limits and back-off of lanes that all nodes share: what each may have, whose turn it is, what one learns from another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import psycopg
import pytest

from gmta.deliver import shares as shares_module
from gmta.deliver.lanes import Health, Lane, Lanes
from gmta.deliver.shares import LaneShares, SharedGate
from gmta.mail.reply import Reply
from gmta.queue import pgschema
from gmta.services.postgres import Database
from gmta.testing import MemoryLog, make_config


class Job:
    again = False


class Node:
    """A worker's lanes whose jobs last until `done`."""

    def __init__(self, url: str, name: str, sections: dict[str, dict[str, Any]]) -> None:
        self.log = MemoryLog()
        self.database = Database(url, name=name, log=self.log)
        self.later = 0.0
        self.stopped_at = 0.0  # what the clock shows where it stands still
        self.let_go: list[str] = []
        self.returned: list[Job] = []
        self.running: list[tuple[Lane, gevent.event.AsyncResult]] = []
        self.shares = LaneShares(self.database, name, self.log, self.clock)
        network = SimpleNamespace(concurrency=20, next_hop=lambda address: address.host, let_go=self.let_go.append)
        config = make_config({"gmta": {"workers": 2}, "transport:out": {"type": "fake"}, "queue": {"retry": "5m 15m 1h"}, **sections})
        self.lanes = Lanes(config, {"out": network}, self._run, lambda lane, job: self.returned.append(job), lambda: None, self.clock,
                           lambda domain: [], lambda seconds, call: None, shares=self.shares)

    def clock(self) -> float:
        return self.stopped_at or time.time() + self.later

    def _run(self, lane: Lane, job: Job) -> Health:
        result = gevent.event.AsyncResult()
        self.running.append((lane, result))
        health: Health = result.get()
        return health

    def put(self, domain: str, count: int = 1) -> list[Any]:
        """Queues so many jobs; what the lane said of each."""
        said = [self.lanes.put("out", domain, Job(), 1000) for _ in range(count)]
        settle()
        return said

    def share(self) -> None:
        self.shares.share(self.lanes)
        settle()

    def done(self, health: Health = Health.GOOD, count: int = 1) -> None:
        """So many jobs come to their end, the oldest first."""
        for _ in range(count):
            self.running.pop(0)[1].set(health)
        settle()

    def lane(self, domain: str) -> Lane:
        return self.lanes._lanes["out", domain]

    def close(self) -> None:
        self.lanes.stop(0)
        self.database.close()


def until(ready: Callable[[], Any]) -> None:
    with gevent.Timeout(30):
        while not ready():
            gevent.sleep(0.01)


def settle() -> None:
    for _ in range(10):
        gevent.sleep(0)


class Cluster:
    def __init__(self, url: str) -> None:
        self.url = url
        self.nodes: list[Node] = []
        with psycopg.connect(url, autocommit=True) as connection:
            pgschema.migrate(connection)

    def make(self, count: int, **sections: dict[str, Any]) -> list[Node]:
        named = {name.replace("_", ":", 1): keys for name, keys in sections.items()}
        self.nodes += [Node(self.url, f"node{n}", named) for n in range(count)]
        return self.nodes

    def execute(self, statement: str, *values: Any) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement, values)


@pytest.fixture
def cluster(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(shares_module, "LATE_S", 60.0)  # however slow the machine is
    made = Cluster(database_url)
    yield made
    for node in made.nodes:
        node.close()


def share_all(nodes: list[Node], times: int = 1) -> None:
    for _ in range(times):
        for node in nodes:
            node.share()


LIMITS: list[dict[str, dict[str, Any]]] = [{"lane_big": {"match": "*.example", "connections": "2"}},
                                         {"transport_out": {"type": "fake", "concurrency": "2"}}]


@pytest.mark.parametrize("sections", LIMITS)
def test_connections_are_those_of_all_nodes(cluster: Cluster, sections: dict[str, dict[str, Any]]) -> None:
    nodes = cluster.make(3, **sections)
    for node in nodes:
        node.put("one.example", 5)
        assert not node.running
    share_all(nodes, 3)
    assert [len(node.running) for node in nodes] in ([1, 1, 0], [2, 0, 0])
    most = sum(len(node.running) for node in nodes)
    for _ in range(12):  # who is done begins another, and never are there more than two
        for node in nodes:
            if node.running:
                node.done()
            node.share()
            most = max(most, sum(len(other.running) for other in nodes))
    assert most == 2


def test_permits_go_round_where_there_are_fewer_than_workers(cluster: Cluster) -> None:
    nodes = cluster.make(3, lane_big={"match": "*.example", "connections": "1"})
    for node in nodes:
        node.put("one.example", 4)
    share_all(nodes)
    assert [len(node.running) for node in nodes] == [1, 0, 0]
    served = []
    for _ in range(30):
        for node in nodes:
            node.share()
            assert sum(len(other.running) for other in nodes) <= 1
            if node.running:
                served.append(nodes.index(node))
                node.later += shares_module.TURN_S
                node.done()
    assert [served.count(n) for n in range(3)] == [4, 4, 4]
    assert served[:3] == [0, 1, 2] and nodes[0].let_go  # before it was another's turn


def test_each_gets_its_part_where_all_want_more(cluster: Cluster) -> None:
    nodes = cluster.make(3, lane_big={"match": "*.example", "connections": "9"})
    for node in nodes:
        node.put("one.example", 200)
        node.lane("one.example").limit = 20
    nodes[0].share()
    nodes[0].share()
    assert len(nodes[0].running) == 9
    for _ in range(8):
        share_all(nodes)
        for node in nodes:
            node.done(count=len(node.running))
            node.share()
        assert sum(len(node.running) for node in nodes) <= 9
    share_all(nodes, 2)
    assert [len(node.running) for node in nodes] == [3, 3, 3]


def test_what_nobody_needs_is_anothers(cluster: Cluster) -> None:
    first, second = cluster.make(2, lane_big={"match": "*.example", "connections": "2"})
    first.put("one.example", 2)
    share_all([first, first])
    first.done(count=1)
    first.done(count=1)
    first.later = 5  # a moment ago they were in use
    first.share()
    second.put("one.example", 2)
    share_all([second, second])
    assert not first.running and len(second.running) == 1  # slow start
    second.done()
    second.share()
    assert len(second.running) == 1 and first.let_go == ["one.example"]


def test_a_dead_workers_permits_lapse(cluster: Cluster) -> None:
    dead, other = cluster.make(2, lane_big={"match": "*.example", "connections": "1"})
    dead.put("one.example", 2)
    dead.share()
    other.put("one.example")
    other.share()
    assert (len(dead.running), len(other.running)) == (1, 0)
    cluster.execute("UPDATE lane_holder SET until = 0 WHERE worker = 'node0'")
    other.share()
    assert len(other.running) == 1
    dead.later = shares_module.LEASE_S  # it was only frozen: it begins nothing more
    dead.done()
    assert not dead.running
    dead.share()
    assert not dead.running


def test_a_crash_of_the_database_gives_no_permit_twice(cluster: Cluster) -> None:
    first, second = cluster.make(2, lane_big={"match": "*.example", "connections": "1"})
    first.put("one.example")
    first.share()
    cluster.execute("TRUNCATE lane_holder")
    first.share()
    second.put("one.example")
    second.share()
    assert (len(first.running), len(second.running)) == (1, 0)


def test_a_rate_is_that_of_all_nodes(cluster: Cluster) -> None:
    nodes = cluster.make(3, lane_big={"match": "*.example", "rate": "60/m"})
    for node in nodes:
        node.put("one.example", 5)
    share_all(nodes)
    gates = [node.lanes.gates[0] for node in nodes]
    points = [gate.points[0] if isinstance(gate, SharedGate) and gate.points else 0.0 for gate in gates]
    assert len(nodes[0].running) == 1 and not nodes[1].running and not nodes[2].running  # the others' times are still to come
    assert 0.9 < points[2] - points[1] < 1.1
    nodes[1].stopped_at = points[1]
    nodes[1].lanes.call(gates[1])
    settle()
    assert len(nodes[1].running) == 1


def test_a_quick_rate_is_taken_in_blocks_that_do_not_overlap(cluster: Cluster) -> None:
    nodes = cluster.make(3, lane_big={"match": "*.example", "rate": "100/s"})
    points: list[float] = []
    for node in nodes:
        gate = node.lanes.gates[0]
        assert isinstance(gate, SharedGate)
        node.put("one.example", 50)
        answers = node.shares._exchange([], [(gate.name, gate.gap_s, gate.misses(node.clock()))], {}, set(), {})
        ((_, behind, n),) = answers[shares_module._POINTS]
        assert n == int(shares_module.BLOCK_S / gate.gap_s)
        points += [behind - (n - i) * gate.gap_s for i in range(n)]
    assert points == sorted(points)
    assert all(later - earlier > 0.0099 for earlier, later in itertools.pairwise(points))


def test_a_dead_destination_is_known_to_all_and_probed_by_one(cluster: Cluster) -> None:
    nodes = cluster.make(3)
    share_all(nodes)
    first, second, third = nodes
    first.put("dead.example", 3)
    first.lane("dead.example").last_reply = "no answer"
    first.done(Health.BAD)
    assert len(first.returned) == 2
    share_all(nodes)
    for node in nodes:
        assert node.put("dead.example") != [None] and "no answer" in node.lanes.reason(node.lane("dead.example"))
    for node in nodes:
        node.later = 400
        cluster.execute("UPDATE lane_closed SET until = 0")
        node.lanes.tick()
    share_all(nodes)
    probing = [node.lanes.rooms(10)[1] for node in nodes]
    assert probing == [["out:dead.example"], [], []]
    first.put("dead.example")
    first.done(Health.GOOD)
    share_all(nodes)
    assert [node.put("dead.example") for node in nodes] == [[None]] * 3
    assert all(node.running for node in (second, third))


def test_a_probe_that_fails_keeps_the_lane_closed_for_all(cluster: Cluster) -> None:
    first, second = nodes = cluster.make(2)
    first.put("dead.example")
    first.done(Health.BAD)
    share_all(nodes)
    for node in nodes:
        node.later = 400
        node.lanes.tick()
    share_all(nodes[::-1])
    assert second.lanes.rooms(10)[1] == ["out:dead.example"] and not first.lanes.rooms(10)[1]
    second.put("dead.example")
    second.done(Health.BAD)
    share_all(nodes[::-1])
    assert first.lane("dead.example").failures == second.lane("dead.example").failures == 2


def test_a_prober_that_dies_is_followed_by_another(cluster: Cluster) -> None:
    first, second = nodes = cluster.make(2)
    first.put("dead.example")
    first.done(Health.BAD)
    share_all(nodes)
    for node in nodes:
        node.later = 400
        node.lanes.tick()
    share_all(nodes)
    assert first.lanes.rooms(10)[1]
    cluster.execute("UPDATE lane_closed SET probe_until = 0")
    second.later = 1000
    second.lanes.tick()
    second.share()
    assert second.lanes.rooms(10)[1] == ["out:dead.example"]


def test_where_a_lane_works_another_nodes_failure_closes_nothing(cluster: Cluster) -> None:
    first, second = nodes = cluster.make(2)
    second.put("one.example")
    second.done()
    first.put("one.example")
    first.done(Health.BAD)
    share_all(nodes)
    assert first.put("one.example") != [None] and second.put("one.example") == [None]


def test_what_on_reply_says_holds_for_all(cluster: Cluster) -> None:
    first, second = nodes = cluster.make(2, lane_big={"match": "*.example", "on_reply": "421 slow down -> pause 10m"})
    share_all(nodes)
    first.put("one.example")
    first.share()
    first.lanes.heard(first.lane("one.example"), Reply(421, "4.7.0", "slow down"))
    share_all(nodes)
    refused = second.put("two.example")
    assert refused != [None] and "slow down" in second.lanes.reason(second.lane("two.example"))


def test_a_node_that_comes_later_knows_what_is_closed(cluster: Cluster) -> None:
    (first,) = cluster.make(1)
    first.put("dead.example")
    first.done(Health.BAD)
    first.share()
    late = Node(cluster.url, "late", {})
    cluster.nodes.append(late)
    late.share()
    assert late.lanes.rooms(10)[0] == ["out:dead.example"]


def test_without_the_database_limited_lanes_wait_and_the_others_go_on(cluster: Cluster) -> None:
    (node,) = cluster.make(1, lane_big={"match": "one.example", "connections": "1"})
    cluster.execute("ALTER TABLE lane_holder RENAME TO hidden")
    node.shares.start(node.lanes)
    node.put("one.example")
    node.put("two.example")
    assert len(node.running) == 1
    until(lambda: node.log.of("lanes are not shared"))
    cluster.execute("ALTER TABLE hidden RENAME TO lane_holder")
    until(lambda: len(node.running) == 2 and node.log.of("lanes are shared again"))
    assert len(node.log.of("lanes are not shared")) == 1
    node.shares.stop()
    with psycopg.connect(cluster.url) as connection:
        assert connection.execute("SELECT count(*) FROM lane_holder").fetchone() == (0,)


def test_what_was_not_used_for_long_is_deleted(cluster: Cluster) -> None:
    (node,) = cluster.make(1)
    for statement in ("INSERT INTO lane_holder VALUES ('x', 'gone', 1, 1, 0, 0)", "INSERT INTO lane_limit VALUES ('x', 0, 0)",
                      "INSERT INTO lane_closed VALUES ('out:x', 3, 0, '', 'gone', 1, '', 0)"):
        cluster.execute(statement)
    node.share()
    with psycopg.connect(cluster.url) as connection:
        for table in ("lane_holder", "lane_limit", "lane_closed"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_a_turn_ends_when_the_points_in_time_that_were_taken_are_used(cluster: Cluster) -> None:
    first, second = cluster.make(2, lane_big={"match": "*.example", "connections": "1", "rate": "60/m"})
    gate = first.lanes.gates[0]
    assert isinstance(gate, SharedGate)
    first.put("one.example", 5)
    share_all([first, first])
    first.done()
    first.share()
    second.put("one.example")
    gate.tell_at = 0.0  # a while later
    share_all([second, first])
    (point,) = gate.points
    assert not first.running and point > first.clock()
    gate.points[0] += shares_module.TURN_S  # as if taken at the end of its turn
    first.stopped_at = gate.points[0]
    first.lanes.call(gate)
    settle()
    assert len(first.running) == 1
    first.done()
    share_all([first, second])
    assert not gate.points and gate.permits == 0 and second.lanes.gates[0].permits == 1  # type: ignore[attr-defined]


def test_what_has_not_changed_is_not_said_again_at_once(cluster: Cluster) -> None:
    (node,) = cluster.make(1, lane_big={"match": "*.example", "connections": "1"})
    node.put("one.example")
    share_all([node])
    gate = node.lanes.gates[0]
    assert isinstance(gate, SharedGate) and len(node.running) == 1
    node.share()
    assert gate.news(node.clock()) is None
    node.later = shares_module.RENEW_S
    assert gate.news(node.clock()) == (1, 1)


def test_a_transport_that_fails_to_let_go_holds_nothing_up(cluster: Cluster) -> None:
    first, second = cluster.make(2, lane_big={"match": "*.example", "connections": "1"})

    def let_go(next_hop: str) -> None:
        raise RuntimeError("not today")

    first.lanes._transports["out"].let_go = let_go
    first.put("one.example")
    first.share()
    first.done()
    first.later = 5
    first.share()
    second.put("one.example")
    second.share()
    assert len(second.running) == 1 and first.log.of("transport failed")


def test_permits_whose_grant_was_not_heard_of_are_given_back(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = cluster.make(2, lane_big={"match": "*.example", "connections": "1"})
    one.put("one.example")
    exchange = one.shares._exchange

    def lost(*args: Any) -> Any:
        exchange(*args)
        raise OSError("the connection broke before the answer")

    monkeypatch.setattr(one.shares, "_exchange", lost)
    with pytest.raises(OSError):
        one.share()
    monkeypatch.undo()
    one.shares._gates.clear()  # nothing is wanted any more
    one.share()
    two.put("one.example")
    two.share()
    assert len(two.running) == 1


def test_the_first_who_comes_makes_the_tables(database_url: str) -> None:
    node = Node(database_url, "early", {"lane:big": {"match": "one.example", "connections": "1"}})
    node.put("one.example")
    node.share()
    assert len(node.running) == 1
    node.close()
