"""Stops mail loops: refuses a message that has passed too many hops.

Hook: check_message. Counts Received fields; more than `[limits] hops` (50, or this plugin's own `hops`) is a loop.
Concerns every session, trusted ones too, since a loop through a submission client turns as well as any other.
Reply: 554 5.4.6. RFC 5321 section 6.3.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gmta import PluginConfig, Verdict, hookimpl, reject
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction


class Config(PluginConfig):
    """Keys of [plugin:received_limit]."""

    hops: int = Field(default=0, ge=0, description="Received fields allowed; 0 takes [limits] hops")


class Plugin:
    """Counts; keeps nothing."""

    def __init__(self, config: Config, services: Any) -> None:
        self._hops = config.hops or services.config.limits.hops

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | None:
        """554 5.4.6 past the limit."""
        if message.count("Received") > self._hops:  # RFC 5321 section 6.3
            return reject("Too many hops: the message is looping", 554, "5.4.6")
        return None
