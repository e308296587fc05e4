"""Fields found in place: what is a field and what only looks like one, picked by name, dropped without a change to the rest."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.mail.message import MemoryBody, Message
from gmta.verify.canonical import Header

JUNK = b"From: a@example.org\r\nno field From: b@example.org\r\n folded\r\nSubject : x\r\n y\r\nFrom-Line: z\r\nfrom : c@example.org\r\n\r\nFrom: d@example.org\r\n"


def test_text_within_a_line_is_no_field() -> None:
    message = Message.from_bytes(JUNK)
    assert [name for name, _ in message.fields()] == ["From", "Subject", "From-Line", "from"]
    assert message.values("FROM") == [b"a@example.org", b"c@example.org"]


@pytest.mark.parametrize("name,values", [("Subject", [b"x\r\n y"]), ("From-Line", [b"z"]), ("Fro", []), ("y", []), ("To", [])])
def test_values_by_name(name: str, values: list[bytes]) -> None:
    assert Message.from_bytes(JUNK).values(name) == values


def test_dropping_a_field_leaves_every_other_octet() -> None:
    message = Message.from_bytes(JUNK)
    message.prepend("Received", "x")
    doomed = frozenset((name, raw) for name, raw in message.fields() if name == "Subject")
    message.drop(doomed)
    assert message.header == b"Received: x\r\n" + JUNK.partition(b"\r\n\r\n")[0].replace(b"Subject : x\r\n y\r\n", b"") + b"\r\n"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([b"From: a", b"from:b", b"FROM \t: c", b" From: d", b"x From: e", b"Fromage: f", b"From", b":", b"\tg", b"From:"]), max_size=8),
       st.sampled_from([b"\r\n", b"\n"]))
def test_values_fields_and_signed_fields_are_the_same_ones(lines: list[bytes], end: bytes) -> None:
    raw = b"Subject: s" + end + b"".join(line + end for line in lines)
    message = Message.from_bytes(raw)
    values = message.values("From")
    assert values == [field.partition(b":")[2].strip(b"\r\n").lstrip(b" \t") for name, field in message.fields() if name.lower() == "from"]
    header = Header(raw)
    assert len(header.places(b"from")) == len(values)


def test_what_can_be_prepended_is_what_cannot_break_out() -> None:
    for length in range(6):
        for octets in itertools.product((b"\r", b"\n", b"\t", b" ", b"x", b"\0", b"?"), repeat=length):
            value = b"".join(octets)
            sound = re.search(rb"\r(?!\n)|(?<!\r)\n|\n(?![ \t])|\0", value) is None
            message = Message(b"", b"", MemoryBody(b""))
            try:
                message.prepend("X", value)
            except ValueError:
                assert not sound, value
            else:
                assert sound, value
