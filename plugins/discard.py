"""Transport `discard`: takes every message and keeps none.

Hooks: get_transports.  Keys of [transport:NAME]: none of its own.  Replies: 250 2.0.0 for every recipient.
Failure: none; it touches nothing.
"""

from __future__ import annotations

from typing import Any

import gmta
from gmta import PluginConfig, hookimpl


class Config(PluginConfig):
    """[plugin:discard] has no keys of its own."""


class Discard:
    """The transport."""

    class Config(PluginConfig):
        """[transport:NAME] of type discard."""

    concurrency = 20

    def __init__(self, name: str, config: Config, services: Any) -> None:
        self.name = name

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """Delivered, for all."""
        done = gmta.delivered("Discarded", enhanced="2.0.0")
        return {recipient.number: done for recipient in delivery.recipients}


class Plugin:
    """Offers the transport type."""

    def __init__(self, config: Config, services: Any) -> None:
        pass

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"discard": Discard}
