"""Metrics in Prometheus' form, all prefixed `gmta_`, shared by the workers through files (prometheus-client's multi-process mode).

`counter`, `gauge` and `histogram` return the series to `inc`, `set` or `observe`; with no address configured they return one
object that does nothing, and prometheus-client is never imported. `serve` answers GET /metrics for all processes; one
process calls it. Failure: an address that can't be bound raises OSError at `serve`.
"""

from __future__ import annotations

import os
from typing import Any

PREFIX = "gmta_"


class _Nothing:
    """A series that nobody reads."""

    __slots__ = ()

    def inc(self, amount: float = 1) -> None:
        """Nothing."""

    def dec(self, amount: float = 1) -> None:
        """Nothing."""

    def set(self, value: float) -> None:
        """Nothing."""

    def observe(self, amount: float) -> None:
        """Nothing."""


_NOTHING = _Nothing()


class Metrics:
    """address: (host, port) or "host:port" of the exporter, None for no metrics.  dir: folder of the processes' files."""

    def __init__(self, address: str | tuple[str, int] | None = None, dir: str | None = None) -> None:
        self.address = _split(address) if isinstance(address, str) else address
        self.enabled = self.address is not None
        self._dir = dir
        self._families: dict[str, Any] = {}
        self._series: dict[tuple[Any, ...], Any] = {}
        self._server: Any = None
        if self.enabled and dir is not None:
            os.makedirs(dir, exist_ok=True)
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = dir  # read when prometheus_client is imported first

    def counter(self, name: str, /, **labels: str) -> Any:
        """The counter `gmta_NAME_total{labels}`: .inc()."""
        return self._one("Counter", name, labels) if self.enabled else _NOTHING

    def gauge(self, name: str, /, **labels: str) -> Any:
        """The gauge `gmta_NAME{labels}`, summed over live workers: .set(), .inc(), .dec()."""
        return self._one("Gauge", name, labels) if self.enabled else _NOTHING

    def histogram(self, name: str, /, **labels: str) -> Any:
        """The histogram `gmta_NAME{labels}` in seconds or octets: .observe()."""
        return self._one("Histogram", name, labels) if self.enabled else _NOTHING

    def _one(self, kind: str, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.items())
        series = self._series.get(key)
        if series is None:
            family = self._families.get(name)
            if family is None:
                import prometheus_client

                options: dict[str, Any] = {"multiprocess_mode": "livesum"} if kind == "Gauge" else {}
                family = getattr(prometheus_client, kind)(PREFIX + name, name.replace("_", " "), tuple(labels),
                                                          registry=self._own_registry(), **options)
                self._families[name] = family
            series = self._series[key] = family.labels(**labels) if labels else family
        return series

    def _own_registry(self) -> Any:
        registry = self._families.get("")
        if registry is None:
            from prometheus_client import CollectorRegistry

            registry = self._families[""] = CollectorRegistry()
        return registry

    def _all_registry(self) -> Any:
        """What is exported: the series of every process where they share a folder, else our own."""
        if self._dir is None:
            return self._own_registry()
        from prometheus_client import CollectorRegistry
        from prometheus_client.multiprocess import MultiProcessCollector

        registry = CollectorRegistry()
        MultiProcessCollector(registry, self._dir)
        return registry

    def render(self) -> bytes:
        """All series in the text exposition format; b"" where metrics are off."""
        if not self.enabled:
            return b""
        from prometheus_client import generate_latest

        return generate_latest(self._all_registry())

    def serve(self) -> int:
        """Starts the exporter in a thread and returns its port; 0 where metrics are off."""
        if self.address is None:
            return 0
        from prometheus_client import start_http_server

        host, port = self.address
        self._server = start_http_server(port, host, registry=self._all_registry())
        return int(self._server[0].server_port)

    def forget(self, pid: int) -> None:
        """Drops the live gauges of a process that died."""
        if self.enabled and self._dir is not None:
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(pid, self._dir)

    def close(self) -> None:
        """Stops the exporter."""
        if self._server is not None:
            self._server[0].shutdown()
            self._server[0].server_close()
            self._server = None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
