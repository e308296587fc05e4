"""plugins/received_limit.py: loops are stopped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gmta.mail.address import Address
from gmta.mail.message import Message
from gmta.mail.session import Session, Transaction
from gmta.mail.verdict import Verdict
from gmta_plugins import received_limit

SERVICES = SimpleNamespace(config=SimpleNamespace(limits=SimpleNamespace(hops=50)))


def check(received: int, **keys: int) -> Verdict | None:
    plugin = received_limit.Plugin(received_limit.Config(**keys), SERVICES)
    field = b"rECEIVED: from a\r\n by b; date\r\n"
    message = Message.from_bytes(field * received + b"Subject: x\r\n\r\nReceived: in the body\r\n")
    return plugin.check_message(Session("s"), Transaction("t", Address.parse("a@b.test")), message)


@pytest.mark.parametrize("received", [0, 1, 50])
def test_under_the_limit(received: int) -> None:
    assert check(received) is None


def test_over_the_limit() -> None:
    verdict = check(51)
    assert verdict is not None
    assert (verdict.reply.code, verdict.reply.enhanced) == (554, "5.4.6")


def test_own_limit() -> None:
    assert check(11, hops=10) is not None
    assert check(10, hops=10) is None
