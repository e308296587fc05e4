"""A transport of type relay or lmtp in memory, and deliveries for it, for tests that send to scripted hosts."""

from __future__ import annotations

import time
from typing import Any

from gmta import Delivery
from gmta.config import Section
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import Message
from gmta.services.deadlines import Deadlines
from gmta.testing import FakeClock, MemoryLog, make_services
from gmta.testing.zone import Zone
from gmta_plugins.relay import Relay

RAW = b"Subject: x\r\n\r\n.dot\r\n..two\r\nbody\r\n"

GREET = """
S: 220 mx1.example.org ESMTP
C: ^EHLO
S: 250-mx1.example.org
S: 250-PIPELINING
S: 250-8BITMIME
S: 250 SIZE 1000000
"""


class Out:
    """A transport with all it needs. keys: of its section; `zone`: DNS; `core`: more of the ini file."""

    def __init__(self, *hosts: str, kind: type[Relay] = Relay, zone: Any = None, core: str = "", **keys: Any) -> None:
        self.log = MemoryLog()
        self.services = make_services(core, resolver=Zone(zone or {}), log=self.log, clock=FakeClock(time.time()))  # certificates have dates
        self.services._still = Deadlines()
        section = Section("transport:out", values={name: str(value) for name, value in keys.items()} | ({"host": " ".join(hosts)} if hosts else {}))
        self.transport = kind("out", self.services.config.validate(kind.Config, section), self.services)
        self.tried: list[str] = []

    def send(self, *names: str, raw: bytes = RAW, next_hop: str = "", sender: str = "a@b.example", **facts: Any) -> list[Any]:
        """The outcomes, in the order of the recipients."""
        job = delivery(*(names or ("x@c.example",)), raw=raw, next_hop=next_hop, sender=sender, **facts)
        outcomes = self.transport.deliver(job)
        self.tried += [str(outcome.reply) for outcome in job.attempts]
        return [outcomes[recipient.number] for recipient in job.recipients]


def delivery(*names: str, raw: bytes = RAW, next_hop: str = "", sender: str = "a@b.example", **facts: Any) -> Delivery:
    recipients = [RecipientState(n, Address.parse(name if "@" in name else f"{name}@c.example")) for n, name in enumerate(names)]
    message = Message.from_bytes(raw)
    envelope = Envelope("0123456789ABCDEF", Address.parse(sender), recipients, message.size, **facts)
    return Delivery(envelope, recipients, message, "out", next_hop, True)
