"""Sender rules of [route]: before everything that is said about recipients; and what the configuration takes for one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from gmta.cli import main
from gmta.config import ConfigError, TlsDemand
from gmta.deliver.router import HELD_ROUTE, Route, Router
from gmta.mail.address import NULL, Address
from gmta.mail.verdict import Outcome
from gmta.testing import make_config, make_envelope

RULES = {"from:boss@a.example": "one", "from:a.example": "two", "from:.a.example": "three", "from:<>": "hold", "from:BÜCHER.example": "fail",
         "c.example": "four", "local": "five", "*": "six"}


def way(sender: str, recipient: str, rules: dict[str, str] = RULES) -> str:
    config = SimpleNamespace(route=rules, domains=SimpleNamespace(local=frozenset({"example.test"})))
    transports = {name: object() for name in rules.values() if name not in ("hold", "fail", "discard")}
    router = Router(config, SimpleNamespace(transports=transports, has=lambda hook: False))
    envelope = make_envelope(sender, [recipient])
    found = router.route(envelope, envelope.recipients[0])
    if isinstance(found, Outcome):
        return str(found.reply.code)
    assert isinstance(found, Route)
    return "hold" if found is HELD_ROUTE else found.transport


@pytest.mark.parametrize(("sender", "recipient", "target"), [
    ("boss@a.example", "x@c.example", "one"), ("BOSS@A.example", "x@example.test", "one"), ("x@a.example", "x@c.example", "two"),
    ("x@sub.deep.a.example", "x@d.example", "three"), ("x@xn--bcher-kva.example", "x@d.example", "550"), ("", "x@c.example", "hold"),
    ("x@b.example", "x@c.example", "four"), ("x@b.example", "x@example.test", "five"), ("x@example", "x@d.example", "six")])
def test_senders_go_before_recipients(sender: str, recipient: str, target: str) -> None:
    assert way(sender, recipient) == target


def test_reports_have_no_sender_to_go_by() -> None:
    rules = {"from:a.example": "one", "*": "two"}
    assert way("", "x@c.example", rules) == "two" and way("", "x@c.example", {"from:<>": "one", "*": "two"}) == "one"


def test_without_a_sender_the_table_speaks_of_recipients() -> None:
    config = SimpleNamespace(route=RULES, domains=SimpleNamespace(local=frozenset()))
    router = Router(config, SimpleNamespace(transports={}))
    assert router.target(Address("x", "c.example")) == "four" and router.target(Address("x", "c.example"), NULL) == "hold"


def test_what_a_sender_rule_may_be() -> None:
    config = make_config("[route]\nfrom:a@b.example = hold\nfrom:b.example = mailbox\nfrom:.b.example = fail\nfrom:<> = discard\n")
    assert config.route["from:<>"] == "discard"
    for key in ("from:", "from:*", "from:a b", "<>"):
        with pytest.raises(ConfigError) as wrong:
            make_config(f"[route]\n{key} = mailbox\n")
        assert key.rstrip() in wrong.value.errors[0]


def test_gmta_route_goes_by_the_sender(tmp_path: Path) -> None:
    (tmp_path / "config.ini").write_text("""
[gmta]
hostname = mx.example.test
[domains]
relay_to = c.example
[plugins]
enable = access
[transport:one]
type = discard
[transport:two]
type = discard
[route]
from:<> = two
from:boss@a.example = fail
* = one
""")

    def told(*options: str) -> str:
        done = CliRunner().invoke(main, ["route", "x@c.example", "-c", str(tmp_path / "config.ini"), *options])
        return done.output.splitlines()[-1]

    assert told() == "x@c.example: transport one" and told("--sender", "<>") == "x@c.example: transport two"
    assert told("--sender", "boss@a.example").startswith("x@c.example: failed: 550 5.7.1") and "Usage" not in told("--sender", "a@b.example")
    assert "no" in told("--sender", "nobody")


def test_tls_policy_lines() -> None:
    config = make_config("[tls_policy]\nExample.org = verify mx.example.net, .Example.com\n.example.org = encrypt\n* = none\n")
    assert config.tls_policy == {"example.org": TlsDemand("verify", ("mx.example.net", ".example.com")), ".example.org": TlsDemand("encrypt"),
                                 "*": TlsDemand("none", (), True)}
    for line, said in (("example.org = maybe", "expected one of none, may"), ("example.org = verfy", "did you mean verify"), ("a b = may", "a domain"),
                       ("example.org = may x.example", "for verify only"), ("example.org =", "expected one of")):
        with pytest.raises(ConfigError) as wrong:
            make_config(f"[tls_policy]\n{line}\n")
        assert said in wrong.value.errors[0]
