"""gmta.verify.dkim, canonical and signing: what passes, what doesn't and why, and that dkimpy agrees where it is right."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import dkim as dkimpy
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from dkim.canonicalization import Relaxed, Simple
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.message import FileBody, MemoryBody, Message
from gmta.testing import make_file_message
from gmta.testing.zone import Zone
from gmta.verify import Lookups
from gmta.verify.canonical import BodyHash, Header, hash_body, relaxed_field, without_signature
from gmta.verify.dkim import Fault, Key, Signature, key_of, parse_tags, verify
from gmta.verify.signing import COLUMNS, KeyFiles, KeyTrouble, SigningKey, authors, sign

NOW = 1600000000.0
CASES = json.loads((Path(__file__).parents[1] / "data/dkim.json").read_text())

RSA = SigningKey("example.com", "sel", generate_private_key(65537, 2048))
ED = SigningKey("example.com", "ed", Ed25519PrivateKey.generate())

PLAIN = (b"From: Alice <alice@example.com>\r\nTo: bob@example.net\r\nSubject: Hello\r\nDate: Sun, 13 Sep 2020 12:00:00 +0000\r\n"
         b"Message-ID: <1@example.com>\r\n\r\nHello  there \r\n\r\nBye\r\n\r\n\r\n")


def zone(*keys: SigningKey, **records: Any) -> Zone:
    """The records of keys; `sel="..."` puts another text there."""
    table = {key.record_name: {"TXT": [[key.record()[:200], key.record()[200:]]]} for key in keys}
    table |= {f"{selector}._domainkey.example.com": {"TXT": text if isinstance(text, list) else [text]} for selector, text in records.items()}
    return Zone(table)


def signed(raw: bytes = PLAIN, keys: tuple[SigningKey, ...] = (RSA,), **options: Any) -> bytes:
    """A message with our signatures on it."""
    message = Message.from_bytes(raw)
    for name, value in reversed(sign(message, keys, now=NOW, **options)):
        message.prepend(name, value)
    return b"".join(message.chunks())


def made(tags: str = "", raw: bytes = PLAIN, *, body: bytes | None = None, key: SigningKey = RSA, drop: str = "", canon: str = "relaxed/relaxed",
         names: str = "from:to:subject:date:message-id", prefix: str = "", own: bytes | None = None) -> bytes:
    """A message with a good signature over tags of any kind: `tags` are added, those whose names are in `drop` left out.

    body: what bh= is made over, already canonical.  own: the message's body under the signature.
    """
    header, _, text = raw.partition(b"\r\n\r\n")
    fields = Header(header + b"\r\n")
    if body is None:
        relaxed = canon.endswith("relaxed")
        body = Relaxed.canonicalize_body(text) if relaxed else Simple.canonicalize_body(text)
    all_tags = [f"{name}={value}" for name, value in (("v", "1"), ("a", key.algorithm), ("c", canon), ("d", key.domain), ("s", key.selector),
                                                     ("h", names), ("bh", base64.b64encode(sha256(body).digest()).decode()))
                if name not in drop.split()]
    value = f" {prefix}" + "; ".join([*all_tags, *([tags] if tags else []), "b="])
    relaxed = canon.startswith("relaxed")
    data = [fields.canonical(place, relaxed) for place in fields.pick([name.strip().lower().encode() for name in names.split(":")])]
    data.append(relaxed_field(b"dkim-signature", value.encode()) if relaxed else b"DKIM-Signature:" + value.encode())
    value += base64.b64encode(key.sign(sha256(b"\r\n".join(data)).digest())).decode()
    return b"DKIM-Signature:" + value.encode() + b"\r\n" + raw


def judge(raw: bytes, resolver: Any = None, **options: Any) -> list[tuple[str, str]]:
    """(result, reason) of each signature."""
    results = verify(Message.from_bytes(raw), resolver or zone(RSA, ED), now=options.pop("now", NOW), trace=True, **options)
    assert all(result.steps and result.steps[-1].startswith(f"result: {result.result}") for result in results)
    return [(result.result, result.reason) for result in results]


def one(raw: bytes, resolver: Any = None, **options: Any) -> tuple[str, str]:
    found = judge(raw, resolver, **options)
    assert len(found) == 1
    return found[0]


def dkimpy_takes(raw: bytes, resolver: Zone) -> bool:
    def look_up(name: bytes, timeout: int = 5) -> bytes:
        return b"".join(resolver.look_up(name.decode(), "TXT").records[0].strings)

    count = len(Header(raw.partition(b"\r\n\r\n")[0]).places(b"dkim-signature"))
    return all(dkimpy.DKIM(raw).verify(idx, dnsfunc=look_up) for idx in range(count))


# --- cases and samples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_case(case: dict[str, Any]) -> None:
    results = verify(Message.from_bytes(case["message"].encode("latin-1")), Zone(case["zone"]), now=1780000000.0)
    found = [result.result for result in results]
    found += ["none"] * (len(case["accept"]) - len(found))
    assert len(found) == len(case["accept"])
    for result, accepted in zip(found, case["accept"], strict=True):
        assert result in accepted, (case["statement"], [result.steps for result in results])


RFC8463 = b"""DKIM-Signature: v=1; a=ed25519-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=brisbane; t=1528637909; h=from : to :
 subject : date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=/gCrinpcQOoIfuHNQIbq4pgh9kyIK3AQUdt9OdqQehSwhEIug4D11Bus
 Fa3bT3FY5OsU7ZbnKELq+eXdp1Q1Dw==
DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed;
 d=football.example.com; i=@football.example.com;
 q=dns/txt; s=test; t=1528637909; h=from : to : subject :
 date : message-id : from : subject : date;
 bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
 b=F45dVWDfMbQDGHJFlXUNB2HKfbCeLRyhDXgFpEL8GwpsRe0IeIixNTe3
 DhCVlUrSjV4BwcVcOF6+FF3Zo9Rpo1tFOeS9mPYQTnGdaSGsgeefOsk2Jz
 dA+L10TeYt9BgDfQNZtKdN1WO//KgIqXP7OdEFE4LjFYNcUxZQ4FADY+8=
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game.  Are you hungry yet?

Joe.
""".replace(b"\n", b"\r\n")
RFC8463_ZONE = Zone({
    "brisbane._domainkey.football.example.com": {"TXT": ["v=DKIM1; k=ed25519; p=11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="]},
    "test._domainkey.football.example.com": {"TXT": [
        "v=DKIM1; k=rsa; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDkHlOQoBTzWRiGs5V6NpP3idY6Wk08a5qhdR6wy5bdOKb2jLQiY/J16JYi0Qvx/b"
        "yYzCNb3W91y3FutACDfzwQ/BC/e/8uBsCR+yz1Lxj+PL6lHvqMKrM3rG4hstT5QjvHO9PzoxZyVYLzBfO2EeC3Ip3G+2kryOTIKT+l/K4w3QIDAQAB"]},
})


def test_samples_of_rfc_8463() -> None:
    """RFC 8463 appendix A: the same message signed by both algorithms."""
    results = verify(Message.from_bytes(RFC8463), RFC8463_ZONE, now=NOW)
    assert [(result.result, result.algorithm, result.selector) for result in results] == [
        ("pass", "ed25519-sha256", "brisbane"), ("pass", "rsa-sha256", "test")]
    assert results[0].b == "/gCrinpc"
    assert [result for result, _ in judge(RFC8463.replace(b"hungry", b"angry"), RFC8463_ZONE)] == ["fail", "fail"]


RFC6376 = b"""DKIM-Signature: v=1; a=rsa-sha256; s=brisbane; d=example.com;
      c=simple/simple; q=dns/txt; i=joe@football.example.com;
      h=Received : From : To : Subject : Date : Message-ID;
      bh=2jUSOH9NhtVGCQWNr9BrIAPreKQjO6Sn7XIkfJVOzv8=;
      b=AuUoFEfDxTDkHlLXSZEpZj79LICEps6eda7W3deTVFOk4yAUoqOB
      4nujc7YopdG5dWLSdNg6xNAZpOPr+kHxt1IrE+NahM6L/LbvaHut
      KVdkLLkpVaVVQPzeRDI009SO2Il5Lu7rDNH6mZckBdrIx0orEtZV
      4bmp/YzhwvcubU4=;
Received: from client1.football.example.com  [192.0.2.1]
      by submitserver.example.com with SUBMISSION;
      Fri, 11 Jul 2003 21:01:54 -0700 (PDT)
From: Joe SixPack <joe@football.example.com>
To: Suzie Q <suzie@shopping.example.net>
Subject: Is dinner ready?
Date: Fri, 11 Jul 2003 21:00:37 -0700 (PDT)
Message-ID: <20030712040037.46341.5F8J@football.example.com>

Hi.

We lost the game. Are you hungry yet?

Joe.
""".replace(b"\n", b"\r\n")
RFC6376_ZONE = Zone({"brisbane._domainkey.example.com": {"TXT": [
    "v=DKIM1; p=MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDwIRP/UC3SBsEmGqZ9ZJW3/DkMoGeLnQg1fWn7/zYtIxN2SnFCjxOCKG9v3b4jYfcTNh5ijSsq631uBI"
    "tLa7od+v/RtdC2UzJ1lWT947qR+Rcac2gbto/NMqJ0fzfVjH4OuKhitdY9tf6mcwGjaNBcWToIMmPSPDdQPNUYckcQ2QIDAQAB"]}})


def test_sample_of_rfc_6376() -> None:
    """RFC 6376 appendix A.2: simple/simple; i= is below d=."""
    results = verify(Message.from_bytes(RFC6376), RFC6376_ZONE, now=NOW)
    assert [(result.result, result.identity) for result in results] == [("pass", "joe@football.example.com")]


# --- signatures -----------------------------------------------------------------------------------------------------


def test_good_with_its_facts() -> None:
    (result,) = verify(Message.from_bytes(made("t=1500000000; i=al@sub.EXAMPLE.com")), zone(RSA), now=NOW)
    assert (result.result, result.domain, result.selector, result.identity) == ("pass", "example.com", "sel", "al@sub.example.com")
    assert (result.algorithm, result.key_bits, result.body_length_used, result.reason) == ("rsa-sha256", 2048, None, "")
    assert len(result.b) == 8


@pytest.mark.parametrize("raw,result,reason", [
    (made(canon="simple/simple"), "pass", ""),
    (made(canon="simple"), "pass", ""),
    (made(canon="relaxed/simple"), "pass", ""),
    (made(drop="c", canon="simple/simple"), "pass", ""),
    (made(key=ED), "pass", ""),
    (made("q=dns/other : dns/txt"), "pass", ""),
    (made("q=dns/other"), "permerror", "q= has no dns/txt"),
    (made("unknown=1"), "pass", ""),
    (made("c=relaxed/strange", drop="c"), "permerror", "unknown canonicalisation in c="),
    (made(drop="v"), "permerror", "v= is missing"),
    (made("v=2", drop="v"), "permerror", "v= is not 1"),
    (made(drop="bh"), "permerror", "bh= is missing"),
    (made(drop="h"), "permerror", "h= is missing"),
    (made(drop="s"), "permerror", "s= is missing"),
    (made(names="to:subject"), "permerror", "From is not signed"),
    (made(names="FROM : To"), "pass", ""),
    (made(names="from::to:"), "pass", ""),
    (made("a=rsa-sha1", drop="a"), "permerror", "rsa-sha1 is no longer accepted"),
    (made("a=rsa-sha512", drop="a"), "permerror", "unknown algorithm in a="),
    (made("d=com", drop="d"), "permerror", "d= has a single label"),
    (made("d=exa..mple.com", drop="d"), "permerror", "d= is no domain name"),
    (made("d=example.com.", drop="d"), "permerror", "d= is no domain name"),
    (made("s=" + "a" * 64, drop="s"), "permerror", "s= is no domain name"),
    (made("s=../../sel", drop="s"), "permerror", "s= is no domain name"),
    (made("i=example.com"), "permerror", "i= has no at sign"),
    (made("i=a@badexample.com"), "permerror", "i= is not within d="),
    (made("i=a@com"), "permerror", "i= is not within d="),
    (made("i=@"), "permerror", "i= is no domain name"),
    (made("t=1600003000"), "pass", ""),
    (made("t=1600090000"), "policy", "signed in the future"),
    (made("t=9999999999999"), "policy", "signed in the future"),
    (made("t=soon"), "permerror", "t= is not a number"),
    (made("t="), "permerror", "t= is not a number"),
    (made("x=1600000100"), "pass", ""),
    (made("x=1599999000"), "pass", ""),
    (made("x=1599900000"), "policy", "signature expired"),
    (made("x=-5"), "permerror", "x= is not a number"),
    (made("x=" + "9" * 70), "pass", ""),
    (made("t=1599900000; x=1599900000"), "permerror", "x= is not after t="),
    (made("l="), "permerror", "l= is not a number"),
    (made("l=" + "9" * 77), "permerror", "l= is not a number"),
    (made("l=١"), "permerror", "l= is not a number"),
    (made("x=1599900000").replace(b"Hello  there", b"Altered"), "fail", "body hash did not verify"),
    (made().replace(b"Subject: Hello", b"Subject: Other"), "fail", "signature did not verify"),
    (made().replace(b"Hello", b"Other"), "fail", "signature and body hash did not verify"),
    (made("d=example.com"), "permerror", "the same tag twice"),
    (made("x y"), "permerror", "not a list of tags"),
    (made(";"), "permerror", "not a list of tags"),
    (made("n=\x0b"), "permerror", "control character in a tag list"),
], ids=lambda value: "" if isinstance(value, bytes) else value)
def test_signature(raw: bytes, result: str, reason: str) -> None:
    assert one(raw) == (result, reason)


def test_a_bad_signature_comes_out_no_worse_than_none() -> None:
    """b= in all shapes that are no signature."""
    good = made()
    head = good[:good.index(b"b=", good.index(b"bh=") + 2)]
    rest = good[good.index(b"\r\nFrom"):]
    for value, result in ((b"", "permerror"), (b"A===", "permerror"), (b"====", "permerror"), (b"!", "permerror"), (b"AAAA", "fail"), (b"A", "permerror"),
                          (base64.b64encode(b"\xff" * 256), "fail"), (base64.b64encode(b"\xff" * 5000), "fail"), (b"\xe4\xf6", "permerror")):
        assert one(head + b"b=" + value + rest)[0] == result, value


def test_missing_pads_of_base64_are_no_fault() -> None:
    raw = made()
    end = raw.index(b"\r\nFrom")
    assert one(raw[:end].rstrip(b"=") + raw[end:])[0] == "pass"


def test_ed25519_signatures_of_any_length() -> None:
    good = made(key=ED)
    head, rest = good[:good.index(b"b=", good.index(b"bh=") + 2)], good[good.index(b"\r\nFrom"):]
    for length in (0, 1, 32, 63, 64, 65, 400):
        raw = head + b"b=" + base64.b64encode(b"\1" * length) + rest
        assert one(raw)[0] == ("permerror" if not length else "fail")


@pytest.mark.parametrize("froms,expected", [(0, "no From fields"), (2, "2 From fields"), (3, "3 From fields")])
def test_from_must_be_there_once(froms: int, expected: str) -> None:
    raw = made(raw=PLAIN.replace(b"From: Alice <alice@example.com>\r\n", b"From: alice@example.com\r\n" * froms))
    assert one(raw) == ("permerror", expected)


def test_oversigned_field_may_not_be_added() -> None:
    raw = made(names="from:from:subject:subject:reply-to")
    assert one(raw)[0] == "pass"
    assert one(raw.replace(b"To: ", b"Subject: two\r\nTo: "))[0] == "fail"
    assert one(raw.replace(b"To: ", b"Reply-To: mallory@example.org\r\nTo: "))[0] == "fail"


def test_fields_of_one_name_are_taken_from_the_bottom() -> None:
    raw = made(raw=b"Received: one\r\nReceived: two\r\n" + PLAIN, names="from:received")
    assert one(b"Received: new\r\n" + raw)[0] == "pass"
    assert one(raw.replace(b"Received: one", b"Received: other"))[0] == "pass"
    assert one(raw.replace(b"Received: two", b"Received: other"))[0] == "fail"


def test_signature_that_lists_dkim_signature_never_means_itself() -> None:
    inner = made("t=1500000000")
    outer = made(raw=inner, names="from:dkim-signature:dkim-signature")
    assert [result for result, _ in judge(outer)] == ["pass", "pass"]
    assert [result for result, _ in judge(outer.replace(b"t=1500000000", b"t=1500000001"))] == ["fail", "fail"]


@pytest.mark.parametrize("place", ["b=SIG; v=1", "v=1; b = SIG ; a=x", "v=1;\r\n\tb\r\n =\r\n SIG\r\n ;a=x", "b=SIG"])
def test_value_of_b_is_taken_out_wherever_it_is(place: str) -> None:
    """RFC 6376 section 3.7: with the blanks around it; not the start of bh=."""
    value = place.replace("SIG", "QUJD\r\n REVG").encode()
    left = without_signature(b" bh=QUJD; " + value if place.startswith("v") else value)
    assert b"QUJD\r\n REVG" not in left
    assert left.count(b"=") == value.count(b"=") + place.startswith("v")
    assert re.search(rb"b[ \r\n]*=(;|\Z)", left)
    assert not place.startswith("v") or b"bh=QUJD;" in left


def test_folded_and_blank_ridden_tag_list() -> None:
    raw = made()
    folded = raw.replace(b"; d=", b";\r\n\td=").replace(b"; s=", b" \t ;\r\n  s=")
    assert one(folded)[0] == "fail"  # a blank before the semicolon is another text
    assert one(raw.replace(b"; d=", b";\r\n\td=").replace(b"; s=", b";\r\n  s="))[0] == "pass"


# --- l= -------------------------------------------------------------------------------------------------------------


def test_length() -> None:
    canonical = Relaxed.canonicalize_body(PLAIN.partition(b"\r\n\r\n")[2])
    size = len(canonical)
    whole, part = made(f"l={size}"), made(f"l={size - 5}", body=canonical[:-5])
    assert one(whole) == ("pass", f"l= covers {size} of {size} octets of the body")
    assert one(part) == ("policy", f"l= covers {size - 5} of {size} octets of the body")
    assert one(part, trust_length=True) == ("pass", f"l= covers {size - 5} of {size} octets of the body")
    assert one(whole + b"appended\r\n") == ("policy", f"l= covers {size} of {size + 14} octets of the body")
    assert one(whole + b"appended\r\n", trust_length=True)[0] == "pass"
    assert one(made("l=0", body=b""))[0] == "policy"
    assert one(made(f"l={size + 1}")) == ("permerror", "l= is past the end of the body")
    assert one(made(f"l={size + 1}").replace(b"Hello\r\n", b"Other\r\n")) == ("fail", "signature did not verify")
    assert one(whole.replace(b"there", b"where"))[0] == "fail"


# --- key records ----------------------------------------------------------------------------------------------------

P = RSA.record().partition("p=")[2]


@pytest.mark.parametrize("record,result,reason", [
    (f"p={P}", "pass", ""),
    (f" v = DKIM1 ; p = {P} ;", "pass", ""),
    (f"v=DKIM1; g=nobody; n=notes; x-other=1; p={P}", "pass", ""),
    (f"v=DKIM1; h=sha1:sha256; s=other:email; t=y:unknown; p={P}", "pass", ""),
    (f"v=DKIM1; s=*; p={P[:40]} {P[40:]}", "pass", ""),
    (f"v=DKIM1; h=sha1; p={P}", "permerror", "h= of the key record has no sha256"),
    (f"v=DKIM1; h=; p={P}", "permerror", "h= of the key record has no sha256"),
    (f"v=DKIM1; s=tlsrpt; p={P}", "permerror", "s= of the key record is not for email"),
    (f"v=DKIM2; p={P}", "permerror", "v= of the key record is not DKIM1, or not first"),
    (f"v=dkim1; p={P}", "permerror", "v= of the key record is not DKIM1, or not first"),
    (f"p={P}; v=DKIM1", "permerror", "v= of the key record is not DKIM1, or not first"),
    (f"v=DKIM1; k=dsa; p={P}", "permerror", "unknown k= in the key record"),
    (f"v=DKIM1; k=ed25519; p={P}", "permerror", "p= of the key record is no ed25519 key"),
    (ED.record(), "permerror", "a=rsa-sha256, but the key is k=ed25519"),
    ("v=DKIM1; p=", "permerror", "key revoked"),
    ("v=DKIM1", "permerror", "the key record has no p="),
    ("v=DKIM1; p=AAAA", "permerror", "p= of the key record is no rsa key"),
    ("v=DKIM1; p=!", "permerror", "p= of the key record is not base64"),
    (f"v=DKIM1; p={P}; p={P}", "permerror", "the same tag twice"),
    ("v=spf1 -all", "permerror", "v= of the key record is not DKIM1, or not first"),
    ("", "permerror", "the key record has no p="),
])
def test_key_record(record: str, result: str, reason: str) -> None:
    assert one(made(), zone(sel=record)) == (result, reason)


def test_a_remembered_key_is_that_of_its_record_alone() -> None:
    names = zone(RSA)
    assert one(made(), names) == one(made(), names) == ("pass", "")
    names[RSA.record_name] = {"TXT": ["v=DKIM1; p="]}
    assert one(made(), names) == ("permerror", "key revoked")
    names[RSA.record_name] = {"TXT": [f"v=DKIM1; n={'x' * 4000}; p={P}"]}
    assert one(made(), names) == ("pass", "")
    assert key_of(RSA.record().encode()) is key_of(RSA.record().encode())


def test_steps_are_kept_only_where_they_are_asked_for() -> None:
    (result,) = verify(Message.from_bytes(made()), zone(RSA), now=NOW)
    assert (result.result, result.steps) == ("pass", [])


def test_strict_key_wants_the_very_domain() -> None:
    strict = zone(sel=f"v=DKIM1; t=s; p={P}")
    assert one(made("i=a@example.com"), strict)[0] == "pass"
    assert one(made("i=a@sub.example.com"), strict) == ("permerror", "i= is of a subdomain, which t=s of the key record forbids")


def test_testing_key_is_told() -> None:
    (result,) = verify(Message.from_bytes(made()), zone(sel=f"v=DKIM1; t=y; p={P}"), now=NOW)
    assert result.result == "pass" and result.testing


def test_several_records() -> None:
    """RFC 6376 section 6.1.2 step 4: each is tried."""
    other = SigningKey("example.com", "sel", generate_private_key(65537, 1024)).record()
    assert one(made(), zone(sel=["v=spf1 -all", other, RSA.record()[:50], RSA.record()]))[0] == "pass"
    assert one(made(), zone(sel=["v=DKIM1; p=", other])) == ("fail", "signature did not verify")
    assert one(made(), zone(sel=["some text", "v=DKIM1; p="]))[0] == "permerror"


@pytest.mark.parametrize("bits,result", [(1024, "pass"), (4096, "pass")])
def test_key_sizes(bits: int, result: str) -> None:
    key = SigningKey("example.com", "sel", generate_private_key(65537, bits))
    assert one(made(key=key), zone(key))[0] == result


def test_small_keys_are_not_accepted() -> None:
    """RFC 8301 section 3.2; the signature is good."""
    case = next(case for case in CASES if case["id"] == "dkim-43")
    assert one(case["message"].encode("latin-1"), Zone(case["zone"]), now=1780000000.0) == ("policy", "key of 512 bits")


@pytest.mark.parametrize("bits,exponent,reason", [(8192, 65537, "key of 8192 bits"), (1016, 65537, "key of 1016 bits"),
                                                  (2048, (1 << 80) + 1, "exponent of 81 bits in the key")])
def test_costly_and_weak_keys_are_not_judged(bits: int, exponent: int, reason: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
    from cryptography.hazmat.primitives.serialization import PublicFormat

    public = RSAPublicNumbers(exponent, (1 << (bits - 1)) + 1).public_key()
    text = base64.b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    assert one(made(), zone(sel=[["v=DKIM1; p=", *re.findall(".{1,200}", text)]])) == ("policy", reason)


def test_key_in_pkcs1_form() -> None:
    from cryptography.hazmat.primitives.serialization import PublicFormat

    octets = RSA.private.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
    assert one(made(), zone(sel="v=DKIM1; p=" + base64.b64encode(octets).decode()))[0] == "pass"


@pytest.mark.parametrize("entry,result,reason", [
    ({"rcode": "SERVFAIL"}, "temperror", "can't get the key"),
    ({"rcode": "REFUSED"}, "temperror", "can't get the key"),
    ({"timeout": True}, "temperror", "can't get the key"),
    ({"rcode": "NXDOMAIN"}, "permerror", "no key for the signature"),
    ({"A": ["192.0.2.1"]}, "permerror", "no key for the signature"),
])
def test_dns(entry: dict[str, Any], result: str, reason: str) -> None:
    found = one(made(), Zone({"sel._domainkey.example.com": entry}))
    assert found[0] == result and found[1].startswith(reason)


def test_key_behind_a_cname() -> None:
    assert one(made(), Zone({"sel._domainkey.example.com": {"CNAME": "key.example.net"}, "key.example.net": {"TXT": [[RSA.record()[:99], RSA.record()[99:]]]}}))[0] == "pass"


def test_internationalised_domain_is_asked_for_in_a_labels() -> None:
    """RFC 8616 section 5."""
    key = SigningKey("bücher.example", "sel", RSA.private)
    resolver = Zone({"sel._domainkey.xn--bcher-kva.example": {"TXT": [[RSA.record()[:99], RSA.record()[99:]]]}})
    (result,) = verify(Message.from_bytes(made(key=key)), resolver, now=NOW)
    assert (result.result, result.domain) == ("pass", "xn--bcher-kva.example")


# --- many -----------------------------------------------------------------------------------------------------------


def test_ten_are_judged_the_aligned_ones_first() -> None:
    other = SigningKey("other.example", "sel", RSA.private)
    foreign = [made(key=other, tags=f"n={number}").partition(b"\r\n")[0] for number in range(12)]
    ours = made().partition(b"\r\n")[0]
    raw = b"\r\n".join([*foreign, ours, PLAIN])
    resolver = Zone({key.record_name: {"TXT": [[RSA.record()[:99], RSA.record()[99:]]]} for key in (RSA, other)})
    results = judge(raw, resolver, author_domains=("example.com",))
    assert [result for result, _ in results] == ["pass"] * 9 + ["neutral"] * 3 + ["pass"]
    assert results[9][1] == "not judged: more than 10 signatures"
    assert resolver.asked == [("sel._domainkey.example.com", "TXT"), ("sel._domainkey.other.example", "TXT")]
    assert [result for result, _ in judge(raw, resolver, max_signatures=2)] == ["pass"] * 2 + ["neutral"] * 11


def test_broken_ones_take_no_place_of_the_ten() -> None:
    raw = b"DKIM-Signature: v=1\r\n" * 30 + made()
    assert [result for result, _ in judge(raw)] == ["permerror"] * 30 + ["pass"]


def test_hundreds_are_named_and_not_looked_into() -> None:
    results = judge(b"DKIM-Signature: v=1\r\n" * 500 + made())
    assert len(results) == 501
    assert results[99][0] == "permerror" and results[100] == ("neutral", "not judged: more than 100 signatures")


def test_questions_and_their_time_are_bounded() -> None:
    raw = b"\r\n".join([made(f"s=s{number}", drop="s").partition(b"\r\n")[0] for number in range(10)] + [PLAIN])
    silent = Zone({f"s{number}._domainkey.example.com": {"timeout": True} for number in range(10)})
    assert {result for result, _ in judge(raw, Lookups(silent, limit=3))} == {"temperror"}
    assert len(silent.asked) == 3


def test_huge_signature_fields() -> None:
    assert one(made("n=" + "x" * 70000)) == ("policy", "signature field over 65536 octets")
    assert one(made(";".join(f"n{number}=1" for number in range(100)))) == ("policy", "over 100 tags")
    assert one(made(names="from:" + ":".join("x" * 2001))) == ("policy", "h= has over 2000 names")


# --- bodies ---------------------------------------------------------------------------------------------------------

LINES = st.lists(st.sampled_from([b" ", b"\t", b"\r\n", b"\r\n\r\n", b"a", b"bc ", b"\r", b"\n", b"\r\n \r\n", b"  ", b"\x0c", b"\0", b"\xe4"]), max_size=30)


@settings(max_examples=300, deadline=None)
@given(LINES, st.lists(st.integers(1, 7), min_size=1, max_size=10), st.lists(st.integers(0, 60), max_size=4))
def test_streamed_hash_is_that_of_dkimpy(pieces: list[bytes], cuts: list[int], lengths: list[int]) -> None:
    body = b"".join(pieces)
    for relaxed in (True, False):
        if relaxed:
            # dkimpy leaves blanks at the end of a last line without CRLF (RFC 6376 section 3.4.4)
            whole = Relaxed.canonicalize_body(body if body.endswith(b"\r\n") or not body else body + b"\r\n")
        else:
            whole = Simple.canonicalize_body(body)
        stream = BodyHash(relaxed, lengths)
        position = turn = 0
        while position < len(body):
            step = cuts[turn % len(cuts)]
            stream.update(body[position:position + step])
            position, turn = position + step, turn + 1
        stream.finish()
        assert (stream.digest, stream.length) == (sha256(whole).digest(), len(whole))
        assert stream.digests == {length: sha256(whole[:length]).digest() for length in set(lengths) if length <= len(whole)}


@pytest.mark.parametrize("body,relaxed,simple", [
    (b"", b"", b"\r\n"), (b"\r\n", b"", b"\r\n"), (b"\r\n\r\n", b"", b"\r\n"), (b" ", b"", b" \r\n"), (b" \t\r\n \r\n", b"", b" \t\r\n \r\n"),
    (b"a", b"a\r\n", b"a\r\n"), (b"a \t b  ", b"a b\r\n", b"a \t b  \r\n"), (b"\r\n\r\na\r\n\r\n", b"\r\n\r\na\r\n", b"\r\n\r\na\r\n"),
])
def test_ends_of_bodies(body: bytes, relaxed: bytes, simple: bytes) -> None:
    """RFC 6376 section 3.4.3, 3.4.4."""
    hashes = hash_body(MemoryBody(body), {True: set(), False: set()})
    assert hashes[True].digest == sha256(relaxed).digest()
    assert hashes[False].digest == sha256(simple).digest()


def test_body_in_a_file_is_never_held_whole(tmp_path: Path) -> None:
    raw = signed(PLAIN + (b"x" * 70 + b"  \r\n") * 40000)
    message = make_file_message(tmp_path / "body", raw)
    assert isinstance(message.body, FileBody) and message.body.size > 2 * 1024 * 1024
    handed: list[Callable[[], Any]] = []

    def heavy(function: Callable[[], Any]) -> Any:
        handed.append(function)
        return function()

    assert [result.result for result in verify(message, zone(RSA), now=NOW, heavy=heavy)] == ["pass"]
    assert len(handed) == 1
    assert [result.result for result in verify(Message.from_bytes(signed()), zone(RSA), now=NOW, heavy=heavy)] == ["pass"]
    assert len(handed) == 1


def test_million_empty_lines_cost_no_memory() -> None:
    stream = BodyHash(True)
    for _ in range(16):
        stream.update(b"\r\n" * 32768)
    assert stream._rest == b"" and stream.length == 0
    stream.update(b"end\r\n")
    stream.finish()
    assert stream.length == 2 * 16 * 32768 + 5


def test_body_that_cannot_be_read_raises() -> None:
    message = Message.from_bytes(signed())
    message.body = FileBody("/nonexistent/body", 0, 10)
    with pytest.raises(OSError):
        verify(message, zone(RSA), now=NOW)


# --- header ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b" ", b"\t", b"\r\n ", b"\r\n\t", b"a", b"B:", b"\xc3\xa4", b"  "]), max_size=20), st.sampled_from([b"Subject", b"X-y", b"from"]))
def test_relaxed_field_is_that_of_dkimpy(pieces: list[bytes], name: bytes) -> None:
    value = b"".join(pieces)
    ((told, text),) = Relaxed.canonicalize_headers([(name, value + b"\r\n")])
    assert relaxed_field(name.lower(), value) + b"\r\n" == told + b":" + text


def test_only_blank_and_tab_are_white_space() -> None:
    assert relaxed_field(b"subject", b" \x0c x\x0b ") == b"subject:\x0c x\x0b"


def test_header_lines_that_are_no_fields() -> None:
    header = Header(b"A: 1\r\nno field From: evil@example.org\r\n\tfolded\r\nb : 2\r\n: empty\r\nC:\r\n 3\r\n")
    assert header.names == [b"a", b"b", b"c"]
    assert header.canonical(1, True) == b"b:2"
    assert header.canonical(2, True) == b"c:3"
    assert header.canonical(1, False) == b"b : 2"
    assert header.pick([b"a", b"a", b"x", b"c"]) == [0, 2]


# --- nothing raises -------------------------------------------------------------------------------------------------

TAGS = st.lists(st.tuples(st.sampled_from(["v", "a", "b", "bh", "c", "d", "h", "i", "l", "q", "s", "t", "x", "z", "p", "k", "g", "n", ""]),
                          st.one_of(st.text(max_size=12), st.sampled_from(["1", "rsa-sha256", "ed25519-sha256", "example.com", "sel", "from", "QUJD", P, "DKIM1",
                                                                           "ed25519", "@example.com", "0", "99999999999999", "=", "from:=41|to:x"]))), max_size=12)


@settings(max_examples=300, deadline=None)
@given(TAGS, st.sampled_from([";", " ; ", ";\r\n\t"]), st.booleans())
def test_arbitrary_signature_fields_never_raise(tags: list[tuple[str, str]], between: str, sound: bool) -> None:
    text = between.join(f"{name}={value}" for name, value in tags)
    if sound:
        given_tags = dict(tags)
        text = between.join(f"{name}={given_tags.get(name, value)}" for name, value in (
            ("v", "1"), ("a", "rsa-sha256"), ("d", "example.com"), ("s", "sel"), ("h", "from"), ("bh", "QUJD"), ("b", "QUJD"), ("l", "3"), ("z", "from:x")))
    raw = b"DKIM-Signature: " + text.encode("utf-8", "surrogatepass") + b"\r\n" + PLAIN
    for result in verify(Message.from_bytes(raw), zone(RSA), now=NOW):
        assert result.result in ("fail", "policy", "neutral", "permerror")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), TAGS.map(lambda tags: ";".join(f"{name}={value}" for name, value in tags).encode("utf-8", "surrogatepass"))))
def test_arbitrary_key_records_never_raise(record: bytes) -> None:
    assert one(made(), Zone({"sel._domainkey.example.com": {"TXT": [[record[start:start + 255] for start in range(0, len(record), 255)] or ""]}}))[0] != "temperror"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.sampled_from(["rsa", "ed25519"]))
def test_arbitrary_octets_as_a_key_never_raise(octets: bytes, kind: str) -> None:
    try:
        Key(f"k={kind}; p={base64.b64encode(octets).decode()}".encode()).check(_plain_signature())
    except Fault:
        pass


def _plain_signature() -> Signature:
    signature = Signature()
    signature.algorithm = "rsa-sha256"
    return signature


def test_mutated_keys_never_raise() -> None:
    octets = bytearray(base64.b64decode(P))
    for place in range(0, len(octets), 3):
        broken = octets.copy()
        broken[place] ^= 0x55
        result, _ = one(made(), zone(sel="p=" + base64.b64encode(bytes(broken)).decode()))
        assert result in ("fail", "permerror", "policy", "pass")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_tag_lists(value: bytes) -> None:
    try:
        parse_tags(value)
    except Fault:
        pass


# --- explaining -----------------------------------------------------------------------------------------------------


def steps(raw: bytes) -> str:
    return "\n".join(verify(Message.from_bytes(raw), zone(RSA), now=NOW, trace=True)[0].steps)


def test_steps_tell_what_differs() -> None:
    raw = made("z=From:Alice=20<alice@example.com>|Subject:Hello")
    assert "the signature is good" in steps(raw) and "as bh= says" in steps(raw)
    altered = steps(raw.replace(b"Subject: Hello", b"Subject: [list] Hello"))
    assert "a signed field was changed, added or removed" in altered
    assert "differs from its copy in z=: subject" in altered
    assert "bh= is " in steps(raw.replace(b"Bye", b"By"))
    cut = raw.index(b"; b=") + 4
    assert "was not made with this key" in steps(raw[:cut] + (b"A" if raw[cut:cut + 1] != b"A" else b"B") + raw[cut + 1:])


# --- signing --------------------------------------------------------------------------------------------------------


def unfolded(raw: bytes) -> str:
    return re.sub(r"\r\n[ \t]", " ", raw.decode("latin-1"))


@pytest.mark.parametrize("keys", [(RSA,), (ED,), (RSA, ED)])
def test_our_signatures_pass_here_and_in_dkimpy(keys: tuple[SigningKey, ...]) -> None:
    raw = signed(keys=keys)
    assert judge(raw) == [("pass", "")] * len(keys)
    assert dkimpy_takes(raw, zone(RSA, ED))
    assert [result for result, _ in judge(raw.replace(b"Bye", b"by"))] == ["fail"] * len(keys)


def test_lines_of_our_field_stay_within_the_columns_and_cut_no_word() -> None:
    raw = PLAIN.replace(b"Subject", b"List-Unsubscribe-Post: x\r\n" * 3 + b"Subject")
    for domain in ("a.example", "example.com", "x" * 30 + ".example.com", ".".join(["label" * 4] * 2) + ".example.com"):
        for key in (SigningKey(domain, "selector2026", RSA.private), SigningKey(domain, "s", ED.private)):
            ((name, value),) = sign(Message.from_bytes(raw), [key], now=NOW, expire_s=86400, identity_domain=f"sub.{domain}")
            lines = f"{name}: {value}".split("\r\n")
            assert max(map(len, lines)) <= COLUMNS
            assert all(line.startswith(" ") and line.strip() for line in lines[1:])
            whole = " ".join(line.strip() for line in lines)
            before_b, _, signature = whole.rpartition(" b=")
            assert re.fullmatch(r"DKIM-Signature: v=1; a=(rsa|ed25519)-sha256; c=relaxed/relaxed; d=\S+; s=\S+; i=@\S+; t=\d+; x=\d+; h=[A-Za-z: -]+; bh=\S+;",
                                before_b), before_b
            assert re.fullmatch("[A-Za-z0-9+/= ]+", signature)


@pytest.mark.parametrize("refold", [
    lambda field: field.replace("\r\n ", " "), lambda field: field.replace("\r\n ", "\r\n\t"), lambda field: field.replace("; ", ";\r\n\t"),
    lambda field: field.replace("\r\n ", " ").replace("; ", ";\r\n   "), lambda field: field.replace("DKIM-Signature:", "dkim-signature : "),
])
def test_our_field_survives_refolding(refold: Callable[[str], str]) -> None:
    raw = signed(keys=(RSA, ED), expire_s=3600)
    message = Message.from_bytes(raw)
    fields = [refold(field.decode()) for name, field in message.fields() if name == "DKIM-Signature"]
    changed = "".join(fields).encode() + PLAIN
    assert changed != raw
    assert [result for result, _ in judge(changed)] == ["pass", "pass"]


def test_what_is_signed_and_oversigned() -> None:
    raw = signed(PLAIN.replace(b"Subject", b"List-Id: <x.example.com>\r\nReceived: by x\r\nSubject"))
    names = re.search(r"h=([^;]+)", unfolded(raw))[1].replace(" ", "").split(":")  # type: ignore[index]
    for name in ("From", "To", "Subject", "Date", "Message-ID"):
        assert names.count(name) == 2
    for name in ("Cc", "Reply-To", "Content-Type", "References"):
        assert names.count(name) == 1
    assert names.count("List-Id") == 1
    assert not {"Received", "Return-Path", "DKIM-Signature", "Authentication-Results"} & set(names)
    assert one(raw.replace(b"To: ", b"Cc: mallory@example.org\r\nTo: "))[0] == "fail"
    assert one(raw.replace(b"\nList-Id:", b"\nX-Trace: 1\r\nList-Archive: <x>\r\nList-Id:"))[0] == "pass"


@pytest.mark.parametrize("froms", [0, 2])
def test_without_exactly_one_from_nothing_is_signed(froms: int) -> None:
    raw = PLAIN.replace(b"From: Alice <alice@example.com>\r\n", b"From: alice@example.com\r\n" * froms)
    assert sign(Message.from_bytes(raw), [RSA], now=NOW) == []


def test_parent_domain_and_expiry() -> None:
    raw = signed(identity_domain="sub.example.com", expire_s=86400)
    (result,) = verify(Message.from_bytes(raw), zone(RSA), now=NOW)
    assert (result.result, result.domain, result.identity) == ("pass", "example.com", "@sub.example.com")
    assert one(raw, now=NOW + 86400 + 7200) == ("policy", "signature expired")


@pytest.mark.parametrize("field,expected", [
    ("alice@example.com", ["alice@example.com"]), ("Alice <alice@Example.COM>", ["alice@example.com"]),
    ('"Doe, Jane" <jane@example.com>, b@example.net', ["jane@example.com", "b@example.net"]),
    ("=?utf-8?q?x?= (comment) <a@example.com>", ["a@example.com"]), ("Al\r\n <alice@example.com>", ["alice@example.com"]),
    ("undisclosed", []), ("<>", []), ("a@b@c", []), ("Ülrich <u@bücher.example>", ["u@xn--bcher-kva.example"]),
    ("(" * 20000, []), ("(" * 2000 + ")" * 2000 + " a@example.com", ["a@example.com"]),
])
def test_authors(field: str, expected: list[str]) -> None:
    found = authors(Header(f"From: {field}\r\n".encode()))
    assert [f"{address.local}@{address.host}" for address in found] == expected


# --- agreement with dkimpy ------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["Subject", "To", "Cc", "X-Odd", "Comments", "MIME-Version", "Content-Type", "In-Reply-To", "x", "List-Id"])
VALUES = st.lists(st.sampled_from([" ", "\t", "\r\n ", "\r\n\t", "word", "x:y;z", "=?utf-8?q?=C3=A4?=", "ä", "\xff", "a" * 200, "  ", '"quoted"', ","]), max_size=12)
BODIES = st.lists(st.sampled_from([b"", b" ", b"text here", b"\t tab \t", b"x" * 1200, "ä € 漢".encode(), b".", b"..", b"From x", b"\xff\xfe", b"  two  blanks  "]), max_size=12)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """Messages with odd headers, folds, empty bodies, 8-bit and long lines, every body line with its CRLF."""
    fields = []
    for name, parts in draw(st.lists(st.tuples(NAMES, VALUES), max_size=6)):
        value = re.sub(r"\r\n[ \t]+(?=\r\n|\Z)", " ", "".join(parts))  # a line of blanks only ends the header for some
        fields.append(f"{name}:{value}\r\n".encode("latin-1" if "\xff" in value else "utf-8", "replace"))
    place = draw(st.integers(0, len(fields)))
    fields.insert(place, b"From: Alice <alice@example.com>\r\n")
    return b"".join(fields) + b"\r\n" + b"".join(line + b"\r\n" for line in draw(BODIES))


@settings(max_examples=120, deadline=None)
@given(messages(), st.booleans())
def test_dkimpy_verifies_ours(raw: bytes, both: bool) -> None:
    whole = signed(raw, (RSA, ED) if both else (RSA,))
    assert {result for result, _ in judge(whole)} == {"pass"}
    assert dkimpy_takes(whole, zone(RSA, ED))


RSA_PEM = RSA.private.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
ED_SEED = base64.b64encode(ED.private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))


@settings(max_examples=120, deadline=None)
@given(messages(), st.sampled_from([b"relaxed", b"simple"]), st.sampled_from([b"relaxed", b"simple"]), st.booleans())
def test_we_verify_what_dkimpy_signs(raw: bytes, header: bytes, body: bytes, ed25519: bool) -> None:
    key, pem = (b"ed", ED_SEED) if ed25519 else (b"sel", RSA_PEM)
    field = dkimpy.sign(raw, key, b"example.com", pem, canonicalize=(header, body),
                        signature_algorithm=b"ed25519-sha256" if ed25519 else b"rsa-sha256", include_headers=[b"From", b"Subject", b"To", b"Cc"])
    assert one(field + raw, now=9e9)[0] == "pass"


# --- key files ------------------------------------------------------------------------------------------------------


class Log:
    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []

    def error(self, event: str, **fields: Any) -> None:
        self.errors.append(fields)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def pem(key: SigningKey) -> bytes:
    return key.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def write(path: Path, octets: bytes, mode: int = 0o600) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(octets)
    path.chmod(mode)


def store(tmp_path: Path) -> tuple[KeyFiles, Clock, Log]:
    clock, log = Clock(), Log()
    return KeyFiles(f"{tmp_path}/{{domain}}/{{selector}}.pem", log, clock), clock, log


def test_keys_are_noticed_and_forgotten_within_a_second(tmp_path: Path) -> None:
    files, clock, _ = store(tmp_path)
    assert files.keys("example.com") == []
    write(tmp_path / "example.com/b.pem", pem(RSA))
    write(tmp_path / "example.com/a.pem", ED_SEED)
    write(tmp_path / "example.com/readme.txt", b"no key")
    write(tmp_path / "example.com/.hidden.pem", b"no key")
    assert files.keys("example.com") == []
    clock.now += 1
    assert [(key.selector, key.algorithm) for key in files.keys("example.com")] == [("b", "rsa-sha256"), ("a", "ed25519-sha256")]
    assert files.keys("example.com")[0] is files.keys("example.com")[0]
    (tmp_path / "example.com/b.pem").unlink()
    clock.now += 1
    assert [key.selector for key in files.keys("example.com")] == ["a"]


def test_a_bad_new_file_leaves_the_former_key_in_force(tmp_path: Path) -> None:
    files, clock, log = store(tmp_path)
    write(tmp_path / "example.com/sel.pem", pem(RSA))
    (key,) = files.keys("example.com")
    write(tmp_path / "example.com/sel.pem", b"half a k")
    clock.now += 1
    assert files.keys("example.com") == [key] and len(log.errors) == 1
    clock.now += 1
    assert files.keys("example.com") == [key] and len(log.errors) == 1


@pytest.mark.parametrize("octets,mode", [
    (b"", 0o600), (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600), (b"\xff\xfe", 0o600), (None, 0o644), (None, 0o660), (None, 0o604),
])
def test_bad_keys_are_trouble_not_silence(tmp_path: Path, octets: bytes | None, mode: int) -> None:
    files, _, _ = store(tmp_path)
    write(tmp_path / "example.com/sel.pem", pem(RSA) if octets is None else octets, mode)
    with pytest.raises(KeyTrouble, match=r"sel\.pem"):
        files.keys("example.com")
    with pytest.raises(KeyTrouble):
        files.all_keys()


def test_too_small_or_strange_keys(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    strange = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(KeyTrouble, match="neither"):
        SigningKey.from_pem("example.com", "sel", strange)
    locked = RSA.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, _password())
    with pytest.raises(KeyTrouble, match="password"):
        SigningKey.from_pem("example.com", "sel", locked)


def _password() -> Any:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    return BestAvailableEncryption(b"x")


def test_names_that_are_no_domains_reach_no_file(tmp_path: Path) -> None:
    files, _, _ = store(tmp_path / "keys")
    write(tmp_path / "sel.pem", pem(RSA))
    for domain in ("..", "../", "", ".", "a/../..", "\0", "EXAMPLE.com", "-", "a..b"):
        assert files.keys(domain) == []
        with pytest.raises(ValueError):
            files.path(domain, "sel")
    with pytest.raises(ValueError):
        files.path("example.com", "../x")


def test_parent_domains(tmp_path: Path) -> None:
    files, _, _ = store(tmp_path)
    write(tmp_path / "example.com/sel.pem", pem(RSA))
    write(tmp_path / "com/sel.pem", pem(RSA))
    assert [key.domain for key in files.keys_for("a.b.example.com")] == ["example.com"]
    assert files.keys_for("other.com") == []
    assert [(key.domain, key.selector) for key in files.all_keys()] == [("com", "sel"), ("example.com", "sel")]


def test_remembered_domains_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.verify.signing.MAX_DOMAINS", 5)
    files, _, _ = store(tmp_path)
    for number in range(20):
        files.keys(f"d{number}.example")
    assert len(files._folders) == 5


@pytest.mark.parametrize("pattern", ["keys/{domain}.pem", "keys/{selector}.pem", "{selector}/{domain}/{selector}.pem", "{domain}/{selector}/x.pem"])
def test_patterns_that_cannot_be_one(pattern: str) -> None:
    with pytest.raises(ValueError):
        KeyFiles(pattern, Log(), Clock())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_trouble(tmp_path: Path) -> None:
    files, _, _ = store(tmp_path)
    (tmp_path / "example.com").mkdir(mode=0)
    with pytest.raises(KeyTrouble):
        files.keys("example.com")
