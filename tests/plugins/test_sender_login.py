"""plugins/sender_login.py and gmta/mail/fields.py: who may send as whom, and which addresses a From field has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmta.config import ConfigError
from gmta.mail.address import Address
from gmta.mail.fields import mailboxes
from gmta.testing import load_plugin, make_message, make_services, make_session, make_transaction, run

DOMAINS = {"local": "example.test, other.test"}


def plugin(senders: dict[str, str] | None = None, **keys: Any) -> Any:
    return load_plugin("sender_login", make_services({"domains": DOMAINS, "senders": senders or {}}), **keys)


@pytest.mark.parametrize("user,address,may", [
    ("alice@example.test", "alice@example.test", True),
    ("Alice@Example.Test", "aLICE@EXAMPLE.test", True),
    ("alice@example.test", "alice+news@example.test", True),
    ("alice@example.test", "alice@other.test", False),
    ("alice@example.test", "alice@foreign.test", False),
    ("alice@example.test", "bob@example.test", False),
    ("alice@example.test", "alicex@example.test", False),
    ("alice", "alice@example.test", True),
    ("alice", "alice@other.test", True),
    ("alice", "alice@foreign.test", False),
    ("alice+x@example.test", "alice+x@example.test", True),
    ("alice+x@example.test", "alice@example.test", False),
    ("b\xfccher@example.test", "b\xfccher@example.test", True),
    ("alice@b\xfccher.test", "alice@xn--bcher-kva.test", True),
    ("no user name at all", "alice@example.test", False),
    ("alice@example.test", '"alice"@example.test', True),
])
def test_own_addresses(user: str, address: str, may: bool) -> None:
    assert plugin().may(user, Address.parse(address)) is may


GRANTS = {"alice@example.test": "info@example.test, @org.test", "@other.test": "all@other.test", "*": "noreply@example.test",
          "backup": "*", "bob@example.test": "@.below.test"}


@pytest.mark.parametrize("user,address,may", [
    ("ALICE@example.test", "Info@example.test", True),
    ("alice@example.test", "info+x@example.test", False),
    ("alice@example.test", "anybody@org.test", True),
    ("alice@example.test", "anybody@sub.org.test", False),
    ("bob@example.test", "info@example.test", False),
    ("bob@example.test", "x@a.b.below.test", True),
    ("bob@example.test", "x@below.test", False),
    ("x@other.test", "all@other.test", True),
    ("x@sub.other.test", "all@other.test", False),
    ("x", "all@other.test", False),
    ("x", "noreply@example.test", True),
    ("backup", "whoever@where.test", True),
])
def test_grants(user: str, address: str, may: bool) -> None:
    assert plugin(GRANTS).may(user, Address.parse(address)) is may


@pytest.mark.parametrize("who,what", [("alice@example.test", "@"), ("@not a domain", "x@y.test"), ("alice", "no-address")])
def test_wrong_grants_stop_the_start(who: str, what: str) -> None:
    with pytest.raises(ConfigError, match=r"\[senders\]"):
        plugin({who: what})


def test_aliases_that_lead_to_the_user(tmp_path: Path) -> None:
    file = tmp_path / "aliases"
    file.write_text("info: sales, bob@foreign.test\nsales: alice\nloop: loop2\nloop2: loop\nboss@other.test: alice@example.test\nalice: alice, x@y.test\n")
    found = plugin(aliases_file=file)
    assert [address for address in ("info@example.test", "sales@example.test", "boss@other.test", "loop@example.test", "boss@example.test",
                                    "info@foreign.test", "info+x@example.test")
            if found.may("alice@example.test", Address.parse(address))] == [
                "info@example.test", "sales@example.test", "boss@other.test", "info+x@example.test"]
    assert not found.may("bob@example.test", Address.parse("info@example.test"))


def test_aliases_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "aliases"
    file.write_text("info: alice\n")
    services = make_services({"domains": DOMAINS})
    found = load_plugin("sender_login", services, aliases_file=file)
    info = Address.parse("info@example.test")
    assert found.may("alice@example.test", info)
    file.write_text("info: bobby\n")
    assert found.may("alice@example.test", info)  # not yet looked
    services.clock.advance(2)
    assert not found.may("alice@example.test", info)
    file.write_text("info\n")
    services.clock.advance(2)
    assert found.may("bobby@example.test", info)  # what can't be read changes nothing
    assert services.log.of("aliases not read again, the former ones stay")


def test_aliases_that_name_one_another_are_followed_once(tmp_path: Path) -> None:
    """Following each whenever it is named would take 30 to the power of 20 steps."""
    names = [f"list{number}" for number in range(30)]
    file = tmp_path / "aliases"
    file.write_text("".join(f"{name}: {', '.join(names)}\n" for name in names) + "list29: alice\n")
    found = load_plugin("sender_login", make_services({"domains": DOMAINS}), aliases_file=file)
    assert found.may("alice@example.test", Address.parse("list0@example.test"))
    assert not found.may("bob@example.test", Address.parse("list0@example.test"))


def test_aliases_are_followed_for_twenty_levels(tmp_path: Path) -> None:
    file = tmp_path / "aliases"
    file.write_text("".join(f"a{number}: a{number + 1}\n" for number in range(21)) + "b: a0\n")
    found = load_plugin("sender_login", make_services({"domains": DOMAINS}), aliases_file=file)
    assert found.may("a21@example.test", Address.parse("a0@example.test"))
    assert not found.may("a21@example.test", Address.parse("b@example.test"))


@pytest.mark.parametrize("header,refused", [
    ("From: alice@example.test", ""),
    ("From: Alice <alice+x@example.test>", ""),
    ("From: Alice <alice@example.test>, Bob <bob@example.test>", "bob@example.test"),
    ("From: alice@example.test\nFrom: bob@example.test", "bob@example.test"),
    ("From: alice@example.test\nSender: bob@example.test", "bob@example.test"),
    ("From: \"alice@example.test\" <bob@example.test>", "bob@example.test"),
    ("From: alice@example.test <bob@example.test>", "can't be read"),
    ("From: bob@example.test (alice@example.test)", "bob@example.test"),
    ("From: <alice@example.test> <bob@example.test>", "can't be read"),
    ("From: <@a.test:alice@example.test>", "can't be read"),
    ("Subject: no From", ""),
    ("From:", ""),
])
def test_the_from_field(header: str, refused: str) -> None:
    session = make_session(role="submission", user="alice@example.test")
    verdict = plugin().check_message(session, make_transaction("alice@example.test"), make_message(f"{header}\n\nHello\n"))
    assert (verdict is not None) is bool(refused)
    if verdict is not None:
        assert (verdict.reply.code, verdict.reply.enhanced) == (553, "5.7.1")
        assert refused in verdict.reply.text


def test_strangers_are_not_judged() -> None:
    found = plugin()
    for session in (make_session(), make_session(trusted=True), make_session(role="local", trusted=True)):
        assert found.check_mail(session, make_transaction("who@ever.test")) is None
        assert found.check_message(session, make_transaction("who@ever.test"), make_message("From: who@ever.test\n\n")) is None


def test_dialogue() -> None:
    run("sender_login", r"""
listener: submission
S: 220
C: EHLO client.example.com
S: 250
C: STARTTLS
S: 220
STARTTLS
C: EHLO client.example.com
S: 250
C: AUTH PLAIN \{base64 \0user@example.test\0secret}
S: 235
C: MAIL FROM:<other@example.test>
S: 553 5.7.1
C: MAIL FROM:<>
S: 250
C: RSET
S: 250
C: MAIL FROM:<user@example.test>
S: 250
C: RCPT TO:<somebody@foreign.test>
S: 250
C: DATA
S: 354
C: From: other@example.test
C:
C: Hello
C: .
S: 553 5.7.1
C: MAIL FROM:<user@example.test>
S: 250
C: RCPT TO:<somebody@foreign.test>
S: 250
C: DATA
S: 354
C: From: User <user+shop@example.test>
C:
C: Hello
C: .
S: 250 2.0.0 queued as *
C: QUIT
S: 221
EOF
""")


@pytest.mark.parametrize("value,addresses", [
    (b"a@b.test", ["a@b.test"]),
    (b"A (c (nested \\) ) d) B. <a@b.test>, c@d.test", ["a@b.test", "c@d.test"]),
    (b'"x, <y@z.test>" <a@b.test>', ["a@b.test"]),
    (b"friends: a@b.test, C <c@d.test>; , e@f.test", ["a@b.test", "c@d.test", "e@f.test"]),
    (b"undisclosed:;", []),
    (b'"q p"@b.test', ['"q p"@b.test']),
    (b"a@[192.0.2.1]", ["a@[192.0.2.1]"]),
    (b"=?utf-8?q?x?= <a@b.test>", ["a@b.test"]),
    ("J\u00f6rg <j\u00f6rg@b\u00fccher.test>".encode(), ["j\u00f6rg@b\u00fccher.test"]),
    (b"A\r\n <a@b.test>,\r\n\tc@d.test", ["a@b.test", "c@d.test"]),
    (b"", []),
])
def test_fields(value: bytes, addresses: list[str]) -> None:
    assert [str(address) for address in mailboxes(value)] == addresses


@pytest.mark.parametrize("value", [
    b"a", b"<a@b.test", b"a@b.test>", b"a b@c.test", b"<a@b.test> x", b"<<a@b.test>>", b"a@b.test c@d.test", b"(a@b.test", b"a;b@c.test",
    b"g: h: a@b.test;", b"g: a@b.test", b"<a@b.test,c@d.test>", b'"a@b.test', b"\xff <a@b.test>", b"<>", b"a@b@c.test", b"a@b..test", b"\\a@b.test",
    b"[x] <a@b.test>", b"(" * 100 + b"a@b.test" + b")" * 100, b"x" * 100000,
])
def test_fields_that_can_be_taken_in_two_ways(value: bytes) -> None:
    with pytest.raises(ValueError):
        mailboxes(value)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_fields_of_any_octets(value: bytes) -> None:
    """Nothing but ValueError, and what is found is an address."""
    try:
        found = mailboxes(value)
    except ValueError:
        return
    assert all(Address.parse(str(address)) == address for address in found)


def test_what_the_back_end_says() -> None:
    """Addresses in session.notes count for the user that they were noted for."""
    made = plugin()
    session = make_session(role="submission", user="alice@example.test")
    session.notes["addresses"] = ("alice@example.test", frozenset({"office@foreign.test"}))
    assert made.check_mail(session, make_transaction(sender="Office@foreign.TEST")) is None
    assert made.check_mail(session, make_transaction(sender="other@foreign.test")) is not None
    session.user = "bob@example.test"
    assert made.check_mail(session, make_transaction(sender="office@foreign.test")) is not None


def test_include_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "team").write_text("alice\n")
    (tmp_path / "aliases").write_text("office: :include:team\n")
    with pytest.raises(ValueError, match="allow_include"):
        plugin(aliases_file=str(tmp_path / "aliases"))
    made = plugin(aliases_file=str(tmp_path / "aliases"), allow_include="yes")
    assert made.may("alice@example.test", Address.parse("office@example.test"))
