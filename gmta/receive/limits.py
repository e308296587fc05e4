"""Budgets of a worker's connections: in all, by address, by network. Answers only; the connection does the closing.

Counts are a worker's own. Networks in [domains] relay_from are exempt from the limits by address and network.
"""

from __future__ import annotations

import ipaddress
import os
import resource
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gmta.services.dns import plain_address

CONNECTION_OCTETS = 120 * 1024  # of memory, with TLS
OTHER_DESCRIPTORS = 300


def subnet(ip: str) -> str:
    """The /24 or /48 that an address belongs to."""
    if ":" in ip:
        return str(ipaddress.ip_network(f"{ip}/48", strict=False))
    return ip.rpartition(".")[0]


def within(ip: str, networks: Iterable[Any]) -> bool:
    """Whether the address lies in one of the networks."""
    address = plain_address(ip)
    return any(address in network for network in networks)


def affordable(workers: int) -> int:
    """Connections that one of `workers` may hold: a quarter of the machine's memory among them, and its descriptors."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = memory // 4 // workers // CONNECTION_OCTETS
    return max(100, most if descriptors == resource.RLIM_INFINITY else min(most, descriptors - OTHER_DESCRIPTORS))


class ConnectionLimits:
    """How many connections there are now. `open` before the banner, `close` when it is over, whatever `open` said."""

    def __init__(self, limits: Any, relay_from: list[Any], workers: int = 1) -> None:
        self._most: int = limits.connections or affordable(workers)
        self._per_ip: int = limits.connections_per_ip
        self._per_subnet: int = limits.connections_per_subnet
        self._relay_from = relay_from
        self._relay_cache: dict[str, bool] = {}
        self._by_ip: Counter[str] = Counter()
        self._by_subnet: Counter[str] = Counter()
        self.total = 0
        self.draining = False  # the worker leaves: no new messages

    def is_relay_network(self, ip: str) -> bool:
        """Whether the address lies in [domains] relay_from."""
        known = self._relay_cache.get(ip)
        if known is None:
            if len(self._relay_cache) > 10000:
                self._relay_cache.clear()
            known = self._relay_cache[ip] = within(ip, self._relay_from)
        return known

    @property
    def pressed(self) -> bool:
        """True when slots run out: idle clients are cut sooner."""
        return self.total > self._most * 0.9

    def open(self, ip: str) -> bool:
        """Counts one more; False when that is over a limit. One that is refused counts in `total` alone, so that an
        address that keeps knocking does not use up what its neighbours may have."""
        self.total += 1
        network = subnet(ip)
        if self.total > self._most:
            return False
        if not self.is_relay_network(ip) and (0 < self._per_ip <= self._by_ip[ip] or 0 < self._per_subnet <= self._by_subnet[network]):
            return False
        self._by_ip[ip] += 1
        self._by_subnet[network] += 1
        return True

    def close(self, ip: str, admitted: bool) -> None:
        """Counts one less; admitted: what `open` said."""
        self.total -= 1
        if not admitted:
            return
        for counter, key in ((self._by_ip, ip), (self._by_subnet, subnet(ip))):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]
