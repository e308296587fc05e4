"""Nodes are drained and resumed, and the operator's commands see all of them, while mail comes."""

from __future__ import annotations

import json
import shutil
import smtplib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import until
from tests.e2e.test_cluster import TEXT, Cluster
from tests.e2e.test_killed_relay import Sink

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(directory: Path, database_url: str) -> Iterator[Cluster]:
    with Sink() as sink:
        threading.Thread(target=sink.serve_forever, args=(0.05,), daemon=True).start()
        two = Cluster(directory, database_url, sink, count=2)
        yield two
        sink.open.set()
        two.stop()
        shutil.rmtree(two.mail, ignore_errors=True)
        sink.shutdown()


def send(cluster: Cluster, number: int, serial: int, to: str) -> int:
    """The code that a node answers a message with."""
    with smtplib.SMTP("127.0.0.1", cluster.nodes[number].port, timeout=30) as client:
        try:
            client.sendmail("a@example.test", [to], TEXT.format(serial))
        except smtplib.SMTPResponseException as error:
            return error.smtp_code
        except smtplib.SMTPRecipientsRefused as error:
            return error.recipients[to][0]
    return 250


def gmta(cluster: Cluster, number: int, *arguments: str) -> Any:
    """What a command says on a node, as JSON where it is."""
    done = subprocess.run([sys.executable, "-m", "gmta", *arguments, "-c", str(cluster.nodes[number].config)], capture_output=True, text=True,
                          check=True, timeout=60)
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def state(cluster: Cluster, name: str) -> str:
    """A node's state as `gmta node list` has it."""
    return str(next(row["state"] for row in gmta(cluster, 1, "node", "list", "--json") if row["node"] == name))


def test_a_drained_node_takes_nothing_and_finishes_what_it_has(cluster: Cluster) -> None:
    for number in range(2):
        cluster.start(number)
    assert send(cluster, 0, 1, "b@dest.example") == 250  # waits for the sink's greeting
    until(lambda: gmta(cluster, 1, "queue", "stats", "--json")["nodes"].get("node0", {}).get("under_way") == 1, "delivery under way")
    (row,) = gmta(cluster, 1, "queue", "list", "--json")
    assert row["recipients"][0]["node"] == "node0"
    gmta(cluster, 1, "node", "drain", "node0")
    until(lambda: send(cluster, 0, 2, "b@example.test") == 451, "refusal")
    assert state(cluster, "node0") == "draining" and state(cluster, "node1") == "up"
    assert send(cluster, 1, 3, "b@example.test") == 250
    cluster.sink.open.set()
    until(lambda: state(cluster, "node0") == "drained", "drained node")
    assert cluster.sink.taken == {1: 1}
    kinds = {event["kind"]: event["data"]["node"] for event in gmta(cluster, 1, "trace", row["id"], "--json")}
    assert kinds["received"] == kinds["delivered"] == "node0"
    gmta(cluster, 1, "node", "resume", "node0")
    until(lambda: send(cluster, 0, 4, "b@example.test") == 250, "mail taken again")
    until(lambda: cluster.boxed().keys() >= {3, 4}, "mail in the Maildir")
