"""gmta.verify.arc: chains of any length verified and continued, each way to break one, and dkimpy's ARC both ways."""

from __future__ import annotations

import re
from typing import Any

import dkim as dkimpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.message import Message
from gmta.testing.zone import Zone
from gmta.verify import Lookups
from gmta.verify.arc import ArcResult, seal, verify_chain
from gmta.verify.dkim import verify
from gmta.verify.signing import SigningKey
from tests.engine.test_verify_dkim import ED, NOW, PLAIN, RSA, RSA_PEM, messages, signed, zone

SEALER = SigningKey("forwarder.example", "arc", RSA.private)
ALL = zone(RSA, ED, SEALER)


def judge(raw: bytes, resolver: Any = ALL) -> ArcResult:
    return verify_chain(Message.from_bytes(raw), resolver, now=NOW)


def sealed(raw: bytes, key: SigningKey = RSA, results: str = "mx.example.test;\r\n\tspf=pass smtp.mailfrom=example.com") -> bytes:
    """The message with one more set on it."""
    message = Message.from_bytes(raw)
    for name, value in reversed(seal(message, key, judge(raw), results, now=NOW)):
        message.prepend(name, value)
    return b"".join(message.chunks())


ONE = sealed(signed())
TWO = sealed(ONE, SEALER)
THREE = sealed(TWO)


def edit(raw: bytes, name: str, instance: int, old: bytes, new: bytes) -> bytes:
    """The message with a change in the field of that name and instance."""
    message = Message.from_bytes(raw)
    for found, field in message.fields():
        if found == name and re.search(rb"i=%d;" % instance, field):
            assert old in field
            return raw.replace(field, field.replace(old, new, 1))
    raise AssertionError(f"no {name} {instance}")


def without(raw: bytes, name: str, instance: int) -> bytes:
    message = Message.from_bytes(raw)
    (field,) = [field for found, field in message.fields() if found == name and re.search(rb"i=%d;" % instance, field)]
    return raw.replace(field, b"")


def test_chains() -> None:
    assert judge(PLAIN).result == judge(signed()).result == "none"
    for raw, length in ((ONE, 1), (TWO, 2), (THREE, 3)):
        result = judge(raw)
        assert (result.result, result.instances, result.oldest_pass, result.reason) == ("pass", length, 0, ""), result.steps
    result = judge(THREE)
    assert [(one.instance, one.domain, one.selector) for one in result.sets] == [
        (1, "example.com", "sel"), (2, "forwarder.example", "arc"), (3, "example.com", "sel")]
    assert result.sets[0].results == "mx.example.test;\tspf=pass smtp.mailfrom=example.com"
    assert [one.result for one in verify(Message.from_bytes(THREE), ALL, now=NOW)] == ["pass"]


def test_chain_of_fifty_and_no_more() -> None:
    raw = PLAIN
    for _ in range(50):
        raw = sealed(raw)
    assert (judge(raw).result, judge(raw).instances) == ("pass", 50)
    assert seal(Message.from_bytes(raw), RSA, judge(raw), "mx; none", now=NOW) == []
    more = re.sub(rb"i=50;", b"i=51;", raw)
    assert judge(more).result == "fail"


def test_ed25519_seals() -> None:
    assert judge(sealed(sealed(PLAIN, ED), RSA)).result == "pass"


def test_changed_body_under_a_later_seal() -> None:
    """A list changed the body and sealed it: the last AMS counts, the older one tells how far back the message is unchanged."""
    changed = sealed(ONE.replace(b"Bye", b"Bye\r\n-- \r\nlist footer"))
    assert judge(changed).result == "fail"  # the list sealed with cv=fail, since it changed first
    message = Message.from_bytes(ONE.replace(b"Bye", b"Bye\r\n-- \r\nlist footer"))
    for name, value in reversed(seal(message, SEALER, judge(ONE), "list; none", now=NOW)):
        message.prepend(name, value)
    result = judge(b"".join(message.chunks()))
    assert (result.result, result.oldest_pass) == ("pass", 2)


@pytest.mark.parametrize("raw,reason", [
    (TWO.replace(b"Bye", b"bye"), "message signature 2: body hash did not verify"),
    (TWO.replace(b"Subject: H", b"Subject: h"), "message signature 2: signature did not verify"),
    (without(TWO, "ARC-Seal", 1), "i=1 is not complete"),
    (without(TWO, "ARC-Seal", 2), "i=2 is not complete"),
    (without(TWO, "ARC-Message-Signature", 1), "i=1 is not complete"),
    (without(TWO, "ARC-Authentication-Results", 2), "i=2 is not complete"),
    (edit(TWO, "ARC-Authentication-Results", 1, b"spf=pass", b"spf=fail"), "seal 2: signature did not verify"),
    (edit(TWO, "ARC-Seal", 2, b"cv=pass", b"cv=none"), "seal 2 has not cv=pass"),
    (edit(TWO, "ARC-Seal", 1, b"cv=none", b"cv=pass"), "seal 1 has not cv=none"),
    (edit(TWO, "ARC-Seal", 1, b"cv=none", b"cv=fail"), "seal 1 has not cv=none"),
    (edit(TWO, "ARC-Seal", 2, b"cv=pass", b"cv=fail"), "seal 2 says that the chain had failed"),
    (edit(TWO, "ARC-Seal", 2, b"cv=pass;", b""), "arc-seal 2: cv= is missing"),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b"i=2; h=from;"), "arc-seal 2: h= in a seal"),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b"i=3;"), "i=2 is not complete"),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b"i=0;"), "arc-seal: bad i="),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b"i=051;"), "arc-seal: bad i="),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b""), "arc-seal: bad i="),
    (edit(TWO, "ARC-Seal", 2, b"i=2;", b"i=2; i=2;"), "arc-seal: the same tag twice"),
    (edit(TWO, "ARC-Authentication-Results", 2, b"i=2;", b""), "arc-authentication-results: bad i="),
    (edit(TWO, "ARC-Message-Signature", 2, b"h=From", b"h=ARC-Seal:From"), "message signature 2 covers a seal"),
    (edit(TWO, "ARC-Message-Signature", 2, b"bh=", b"bh=!"), "arc-message-signature 2: bh= is not base64"),
    (edit(TWO, "ARC-Message-Signature", 2, b"a=rsa-sha256", b"a=rsa-sha1"), "arc-message-signature 2: rsa-sha1 is no longer accepted"),
    (b"ARC-Seal: i=1; cv=none\r\n" + TWO, "i=1 has arc-seal twice"),
    (b"ARC-Authentication-Results: i=1; forged\r\n" + PLAIN, "i=1 is not complete"),
    (b"ARC-Seal: x\r\n" * 151 + PLAIN, "more than 50 ARC sets"),
])
def test_broken_chains(raw: bytes, reason: str) -> None:
    result = judge(raw)
    assert (result.result, result.reason, result.oldest_pass) == ("fail", reason, None)


def test_dns() -> None:
    """RFC 8617 section 5.2.1: failed for good; `temporary` lets the mail be deferred."""
    lost = zone(RSA)
    result = judge(TWO, lost)
    assert (result.result, result.reason, result.temporary) == ("fail", "message signature 2: no key for the signature", False)
    lost["arc._domainkey.forwarder.example"] = {"rcode": "SERVFAIL"}
    result = judge(TWO, lost)
    assert (result.result, result.temporary) == ("fail", True)
    assert judge(TWO, Lookups(ALL, limit=1)).temporary


def test_sealing_a_broken_chain_covers_the_new_set_alone_and_ends_it() -> None:
    """RFC 8617 section 5.1.2."""
    broken = TWO.replace(b"Bye", b"bye")
    raw = sealed(broken)
    assert b"cv=fail" in raw
    result = judge(raw)
    assert (result.result, result.instances, result.ended) == ("fail", 3, True)
    assert sealed(raw) == raw
    again = judge(re.sub(rb"(?s)ARC-Seal: i=2;.*?\r\n(?![ \t])", b"", sealed(without(broken, "ARC-Seal", 1))))
    assert again.ended


def test_message_signature_covers_dkim_signatures_and_no_results() -> None:
    (field,) = [field for name, field in Message.from_bytes(ONE).fields() if name == "ARC-Message-Signature"]
    names = re.search(rb"h=([^;]+);", re.sub(rb"\s", b"", field))[1].lower().split(b":")  # type: ignore[index]
    assert b"dkim-signature" in names and names.count(b"from") == 2
    assert not [name for name in names if name.startswith(b"arc-") or name == b"authentication-results"]
    assert judge(b"Authentication-Results: next; none\r\n" + ONE).result == "pass"


def test_lines_stay_within_the_columns() -> None:
    for name, field in Message.from_bytes(TWO).fields():
        if name in ("ARC-Seal", "ARC-Message-Signature"):
            assert max(map(len, field.decode().split("\r\n"))) <= 78


# --- dkimpy ---------------------------------------------------------------------------------------------------------


def look_up(resolver: Zone) -> Any:
    return lambda name, timeout=5: b"".join(resolver.look_up(name.decode(), "TXT").records[0].strings)


@settings(max_examples=40, deadline=None)
@given(messages())
def test_dkimpy_verifies_our_chain(raw: bytes) -> None:
    chained = sealed(sealed(raw), SEALER)
    status, results, reason = dkimpy.arc_verify(chained, dnsfunc=look_up(ALL))
    assert (status, len(results)) == (b"pass", 2), reason


@settings(max_examples=40, deadline=None)
@given(messages(), st.booleans())
def test_we_verify_the_chain_of_dkimpy(raw: bytes, ours_first: bool) -> None:
    if ours_first:
        raw = sealed(raw, results="mx.example.test; arc=none")
        raw = b"Authentication-Results: mx.example.test; arc=pass\r\n" + raw
    else:
        raw = b"Authentication-Results: mx.example.test; spf=pass smtp.mailfrom=example.com\r\n" + raw
    fields = dkimpy.arc_sign(raw, b"sel", b"example.com", RSA_PEM, b"mx.example.test")
    result = verify_chain(Message.from_bytes(b"".join(fields) + raw), ALL, now=9e9)
    assert (result.result, result.instances) == ("pass", 1 + ours_first), result.steps


# --- nothing raises -------------------------------------------------------------------------------------------------

FIELDS = st.lists(st.tuples(st.sampled_from(["ARC-Seal", "ARC-Message-Signature", "ARC-Authentication-Results"]),
                            st.lists(st.sampled_from(["i=1", "i=2", "i=", "cv=none", "cv=pass", "cv=fail", "a=rsa-sha256", "b=QUJD", "bh=QUJD", "d=example.com",
                                                      "s=sel", "h=from", "t=1", "x", "=", "\xe4", "i=1;", "mx; spf=pass"]), max_size=9)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(FIELDS)
def test_arbitrary_fields_never_raise(fields: list[tuple[str, list[str]]]) -> None:
    raw = "".join(f"{name}: {'; '.join(tags)}\r\n" for name, tags in fields).encode() + PLAIN
    result = judge(raw)
    assert result.result == ("fail" if fields else "none")
    for name, value in seal(Message.from_bytes(raw), RSA, result, "mx; none", now=NOW):
        Message.from_bytes(b"").prepend(name, value)
