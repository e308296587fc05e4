"""spf, dkim_verify, arc and dmarc together, from MAIL to the message that is queued."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gmta.testing import Played, run
from gmta.testing.zone import Zone

PLUGINS = ["spf", "dkim_verify", "arc", "dmarc"]
ZONE: dict[str, Any] = {
    "example.com": {"TXT": ["v=spf1 ip4:192.0.2.1 -all"]},
    "_dmarc.example.com": {"TXT": ["v=DMARC1; p=reject"]},
    "_dmarc.example.net": {"TXT": ["v=DMARC1; p=quarantine"]},
    "client.example.com": {"TXT": ["v=spf1 a -all"], "A": ["192.0.2.1"]},
}


def played(author: str, answer: str, peer_ip: str = "192.0.2.1", field: str = "Subject: x") -> Played:
    """A message to the final dot, under every chunking."""
    return run(PLUGINS, f"""
S: 220
C: EHLO client.example.com
S: 250
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<user@example.test>
S: 250
C: DATA
S: 354
C: {field}
C: From: {author}
C:
C: x
C: .
S: {answer}
""", resolver=Zone(ZONE), peer_ip=peer_ip, given={"plugin:spf": {"fail": "tag"}})


def results(found: Played) -> list[str]:
    """The Authentication-Results of what was queued, unfolded."""
    [(_, octets)] = found.queued
    header = octets.split(b"\r\n\r\n")[0].decode()
    return [re.sub(r"\r\n\s+", " ", field) for field in re.split(r"\r\n(?!\s)", header) if field.lower().startswith("authentication-results")]


def test_aligned() -> None:
    found = played("a@example.com", "250", field="Authentication-Results: (x (y)) mx.example.test; dmarc=pass header.from=bank.example")
    assert results(found) == [
        "Authentication-Results: mx.example.test; spf=pass smtp.mailfrom=example.com; spf=pass smtp.helo=client.example.com; dkim=none; arc=none; "
        "dmarc=pass header.from=example.com policy.dmarc=none"]
    assert found.queued[0][0].tags == []


def test_refused_and_quarantined() -> None:
    assert not played("a@example.com", "550 5.7.1 Refused by the DMARC policy of example.com: *", peer_ip="192.0.2.2").queued
    found = played("a@example.net", "250")
    assert found.queued[0][0].tags == ["dmarc-fail", "quarantine"]
    assert results(found)[0].endswith('dmarc=fail reason="nothing vouches for example.net" header.from=example.net policy.dmarc=quarantine')


@pytest.mark.parametrize("author", ["a@nothing.example", "a@[192.0.2.1]"])
def test_without_policy(author: str) -> None:
    assert " dmarc=" in results(played(author, "250"))[0]
