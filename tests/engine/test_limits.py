"""Budgets of connections: by address and network, and whom they do not concern."""

from ipaddress import ip_network
from types import SimpleNamespace

from gmta.receive.limits import ConnectionLimits, subnet


def made(most: int = 100) -> ConnectionLimits:
    limits = SimpleNamespace(connections=most, connections_per_ip=2, connections_per_subnet=3)
    return ConnectionLimits(limits, [ip_network("192.0.2.0/24")])


def test_an_address_that_keeps_knocking_leaves_its_neighbours_their_room() -> None:
    limits = made()
    assert [limits.open("198.51.100.1") for _ in range(10)] == [True, True] + [False] * 8
    assert limits.open("198.51.100.2")
    assert not limits.open("198.51.100.3")  # the network is full now
    assert limits.total == 12
    for admitted in [True, True] + [False] * 8:
        limits.close("198.51.100.1", admitted)
    assert limits.open("198.51.100.3")


def test_relay_networks_are_bounded_by_the_total_alone() -> None:
    limits = made(most=5)
    assert [limits.open("192.0.2.1") for _ in range(6)] == [True] * 5 + [False]
    assert limits.is_relay_network("::ffff:192.0.2.9") and not limits.is_relay_network("2001:db8::1")


def test_networks() -> None:
    assert subnet("198.51.100.7") == "198.51.100"
    assert subnet("2001:db8:1:2::3") == "2001:db8:1::/48"
