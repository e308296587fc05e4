"""Whatever a sender's DNS does, all checks of its message together ask so much, wait so long, and come to a result."""

from __future__ import annotations

from typing import Any

import pytest

from gmta.services.dns import Answer, Status
from gmta.testing import FakeClock, load_plugin, make_message, make_services, make_session, make_transaction
from gmta.testing.zone import Zone
from gmta.verify import MAX_QUERIES, MAX_SECONDS, Lookups
from tests.engine.test_verify_dkim import PLAIN, made

SIGNATURES = 50
# fifty signatures, each with a key of its own, on one message
MANY = b"\r\n".join([made(f"s=s{number}", drop="s").partition(b"\r\n")[0] for number in range(SIGNATURES)] + [PLAIN])
HUGE = "x" * 60000
INCLUDES = "v=spf1 " + " ".join(f"include:i{number}.example.com" for number in range(100)) + " -all"


class Slow(Zone):
    """Takes so many seconds of the clock for each answer; silent: gives none in the end."""

    def __init__(self, records: dict[str, Any], clock: FakeClock, seconds: float, silent: bool) -> None:
        super().__init__(records, clock=clock)
        self._seconds = seconds
        self._silent = silent

    def look_up(self, name: str, kind: str, *, timeout_s: float | None = None) -> Answer:
        """Waits, to the caller's deadline at most."""
        assert timeout_s is not None and timeout_s > 0
        self._clock.advance(min(self._seconds, timeout_s))  # type: ignore[attr-defined]  # a FakeClock
        if self._silent or timeout_s < self._seconds:
            self.asked.append((name, kind))
            return Answer(name, kind, Status.TEMPORARY, reason="no answer in time")
        return super().look_up(name, kind)


def judged(records: dict[str, Any], *, seconds: float = 0.0, silent: bool = False, raw: bytes = MANY, arc: bool = True) -> tuple[dict[str, list[str]], Zone, float]:
    """(results by method, the zone, seconds it took) of a message that all plugins judge."""
    clock = FakeClock()
    began = clock()
    zone = Slow(records, clock, seconds, silent)
    services = make_services(resolver=zone, clock=clock)
    session, transaction, message = make_session(helo="helo.example.com"), make_transaction("alice@example.com"), make_message(raw)
    transaction.notes["lookups"] = Lookups(zone, clock=clock)
    assert load_plugin("spf", services, fail="tag").check_mail(session, transaction) is None
    for name in ("dkim_verify", "arc", "dmarc"):
        keys = {"seal": "never"} if name == "arc" else {}
        load_plugin(name, services, **keys).check_message(session, transaction, message)
    found: dict[str, list[str]] = {}
    for result in transaction.auth_results:
        found.setdefault(result.method, []).append(result.result)
    return found, zone, clock() - began


@pytest.mark.parametrize("seconds", [0.1, 5.0, 30.0])
def test_a_resolver_that_never_answers(seconds: float) -> None:
    found, zone, waited = judged({}, seconds=seconds, silent=True)
    assert found == {"spf": ["temperror", "temperror"], "dkim": ["temperror"] * 10, "arc": ["none"], "dmarc": ["temperror"]}
    assert waited <= MAX_SECONDS and len(zone.asked) <= MAX_QUERIES


def test_a_resolver_that_is_slow() -> None:
    records: dict[str, Any] = {"example.com": {"TXT": [INCLUDES]}} | {f"i{number}.example.com": {"TXT": ["v=spf1 ?all"]} for number in range(100)}
    found, zone, waited = judged(records, seconds=1.5)
    assert waited == MAX_SECONDS and len(zone.asked) <= MAX_QUERIES
    assert found["spf"][0] == "permerror" and set(found["dkim"]) == {"temperror", "permerror"} and found["dmarc"] == ["temperror"]


def test_fifty_signatures_without_keys_and_a_hundred_includes() -> None:
    records: dict[str, Any] = {"example.com": {"TXT": [INCLUDES]}} | {f"i{number}.example.com": {"TXT": ["v=spf1 ?all"]} for number in range(100)}
    found, zone, _ = judged(records)
    assert found == {"spf": ["permerror"], "dkim": ["permerror"] * 8 + ["temperror"] * 2, "arc": ["none"], "dmarc": ["none"]}
    assert len(zone.asked) <= MAX_QUERIES


def test_void_look_ups() -> None:
    records = {"example.com": {"TXT": ["v=spf1 " + " ".join(f"a:n{number}.example.com" for number in range(9)) + " -all"]}}
    found, zone, _ = judged(records)
    assert found["spf"] == ["permerror"] and len([name for name, kind in zone.asked if kind == "A"]) == 3  # RFC 7208 section 4.6.4: two are free


@pytest.mark.parametrize("text", [HUGE, "v=spf1 " + "a:" * 29000, "v=DKIM1; p=" + HUGE, "v=DKIM1; " + "x=1; " * 11000, "v=DMARC1; p=reject; rua=" + HUGE,
                                  "v=DMARC1; " + "p=reject; " * 5000])
def test_sixty_kilobytes_wherever_somebody_looks(text: str) -> None:
    records: dict[str, Any] = {name: {"TXT": [text] * 3} for name in ("example.com", "helo.example.com", "_dmarc.example.com", "_dmarc.com")}
    records |= {f"s{number}._domainkey.example.com": {"TXT": [text] * 9} for number in range(SIGNATURES)}
    found, zone, _ = judged(records)
    assert found["spf"][0] in ("none", "permerror") and len(found["dkim"]) == 10 and set(found["dkim"]) <= {"permerror", "policy", "temperror"}
    assert found["dmarc"][0] in ("none", "fail") and len(zone.asked) <= MAX_QUERIES
