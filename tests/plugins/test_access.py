"""plugins/access.py: who may send where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gmta.mail.address import Address
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Kind
from gmta_plugins import access

DOMAINS = SimpleNamespace(local=["example.test"], relay_to=["backup.test"])


def permitted(session: Session, address: Address) -> bool:
    plugin = access.Plugin(access.Config(), SimpleNamespace(config=SimpleNamespace(domains=DOMAINS)))
    verdict = plugin.permit_rcpt(session, Transaction("t", Address.parse("a@b.test")), Recipient(address))
    assert verdict is None or verdict.kind is Kind.ACCEPT
    return verdict is not None


def user() -> Session:
    session = Session("s")
    session.user = "alice@example.test"
    return session


@pytest.mark.parametrize("address,stranger,trusted", [
    ("x@foreign.test", False, True),
    ("x@backup.test", True, True),
    ("x@BACKUP.test", True, True),
    ("x@sub.backup.test", False, True),
    ("x@xbackup.test", False, True),
    ("x@example.test", False, False),
])
def test_who_may(address: str, stranger: bool, trusted: bool) -> None:
    target = Address.parse(address)
    assert permitted(Session("s"), target) is stranger
    assert permitted(Session("s", relay_network=True), target) is trusted
    assert permitted(user(), target) is trusted


def test_bare_postmaster_is_not_relayed() -> None:
    assert not permitted(user(), Address("Postmaster", ""))
