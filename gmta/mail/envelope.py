"""What the queue keeps about a message beside its octets: sender, recipients with their state, facts for later.

Evolution is additive: `from_dict` ignores keys it does not know and defaults those that are missing; it never
raises for an older or a newer writer's dictionary. RFC 5321 section 2.3.1, RFC 3461.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gmta.mail.address import Address

QUEUED = "queued"
DELIVERED = "delivered"
FAILED = "failed"
HELD = "held"


@dataclass(slots=True)
class RecipientState:
    """One recipient's state in the queue; number is its place in the envelope, times are Unix seconds.

    refused: the reply ("550 5.7.1 text") that a recipient fails with undelivered, given by a check or by the postmaster; else "".
    """

    number: int
    address: Address
    original: str = ""
    orcpt: str = ""
    notify: frozenset[str] = frozenset()
    transport: str = ""
    next_hop: str = ""
    fixed_transport: bool = False
    status: str = QUEUED
    attempts: int = 0
    next_attempt_at: float = 0.0
    last_reply: str = ""
    warned: bool = False
    refused: str = ""

    def facts(self) -> dict[str, Any]:
        """What never changes after the message is queued, for the store's JSON column."""
        out: dict[str, Any] = {}
        if self.original and self.original != str(self.address):
            out["original"] = self.original
        if self.orcpt:
            out["orcpt"] = self.orcpt
        if self.notify:
            out["notify"] = sorted(self.notify)
        if self.fixed_transport:
            out["fixed_transport"] = True
        if self.refused:
            out["refused"] = self.refused
        return out


@dataclass(slots=True)
class Envelope:
    """A queued message's envelope. size in octets; received_at Unix seconds; facts: ip, helo, protocol, user, tls."""

    id: str
    sender: Address
    recipients: list[RecipientState]
    size: int = 0
    received_at: float = 0.0
    ret: str = ""
    envid: str = ""
    body: str = "7BIT"
    smtputf8: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form without recipients (the store keeps those as rows)."""
        out: dict[str, Any] = {"facts": self.facts}
        for name in ("ret", "envid"):
            value = getattr(self, name)
            if value:
                out[name] = value
        if self.body != "7BIT":
            out["body"] = self.body
        if self.smtputf8:
            out["smtputf8"] = True
        if self.tags:
            out["tags"] = self.tags
        return out

    @classmethod
    def from_dict(cls, id: str, sender: str, size: int, received_at: float, data: dict[str, Any],
                  recipients: list[RecipientState]) -> Envelope:
        """Builds the envelope from the store's columns and its JSON column."""
        return cls(id, stored_address(sender), recipients, size, received_at, str(data.get("ret", "")), str(data.get("envid", "")),
                   str(data.get("body", "7BIT")), bool(data.get("smtputf8", False)), dict(data.get("facts", {})),
                   list(data.get("tags", ())))


def stored_address(text: str) -> Address:
    """An Address from its stored text, without judging it again: what was accepted once stays deliverable."""
    local, _, domain = text.rpartition("@")
    return Address(local, domain) if local else Address(text, "")
