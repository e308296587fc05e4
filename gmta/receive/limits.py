"""Budgets of a worker's connections: in all, by address, by network. Answers only; the connection does the closing.

Counts are a worker's own. Networks in [domains] relay_from are exempt from the limits by address and network.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import Any


def subnet(ip: str) -> str:
    """The /24 or /48 that an address belongs to."""
    if ":" in ip:
        return str(ipaddress.ip_network(f"{ip}/48", strict=False))
    return ip.rpartition(".")[0]


class ConnectionLimits:
    """How many connections there are now. `open` before the banner, `close` when it is over."""

    def __init__(self, limits: Any, relay_from: list[Any]) -> None:
        self._most: int = limits.connections or 10000
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
            address: Any = ipaddress.ip_address(ip)
            if address.version == 6 and address.ipv4_mapped is not None:
                address = address.ipv4_mapped
            known = self._relay_cache[ip] = any(address in network for network in self._relay_from)
        return known

    @property
    def pressed(self) -> bool:
        """True when slots run out: idle clients are cut sooner."""
        return self.total > self._most * 0.9

    def open(self, ip: str) -> bool:
        """Counts one more; False when it is over a limit (it is counted all the same, so `close` it)."""
        self.total += 1
        self._by_ip[ip] += 1
        network = subnet(ip)
        self._by_subnet[network] += 1
        if self.total > self._most:
            return False
        if self.is_relay_network(ip):
            return True
        return not (0 < self._per_ip < self._by_ip[ip] or 0 < self._per_subnet < self._by_subnet[network])

    def close(self, ip: str) -> None:
        """Counts one less."""
        self.total -= 1
        for counter, key in ((self._by_ip, ip), (self._by_subnet, subnet(ip))):
            counter[key] -= 1
            if counter[key] <= 0:
                del counter[key]
