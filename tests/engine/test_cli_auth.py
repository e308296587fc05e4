"""gmta auth and gmta dmarc: the JSON that tools rely on, and what people read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gmta.cli import main
from gmta.testing.zone import Zone

ZONE = Zone({
    "example.com": {"TXT": ["v=spf1 ip4:192.0.2.1 -all exp=why.example.com"]},
    "why.example.com": {"TXT": ["ask postmaster"]},
    "h.example.com": {"TXT": ["v=spf1 a -all"], "A": ["192.0.2.1"]},
    "_dmarc.example.com": {"TXT": ["v=DMARC1; p=quarantine; sp=reject; t=y"]},
    "_dmarc.late.example": {"rcode": "SERVFAIL"},
    "news.example.com": {"A": ["192.0.2.1"]},
})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("auth") / "config.ini"
    with ZONE.serve() as server:
        path.write_text(f"[gmta]\nhostname = mx.example.test\n[dns]\nservers = {server.address}\n")
        yield str(path)


def run(config: str, *arguments: str | bytes, text: bytes = b"") -> Result:
    result = CliRunner().invoke(main, [*arguments, "-c", config], input=text)
    assert result.exit_code == 0, result.output
    return result


def auth(config: str, text: bytes, *arguments: str) -> Any:
    return json.loads(run(config, "auth", "-", *arguments, "--json", text=text).stdout)


def test_auth(config: str) -> None:
    text = b"From: a@example.com\nSubject: x\n\nx\n"
    found = auth(config, text, "--ip", "192.0.2.1", "--helo", "h.example.com", "--mail-from", "a@example.com")
    assert {key: found["spf"]["mailfrom"][key] for key in ("result", "domain", "reason")} == {
        "result": "pass", "domain": "example.com", "reason": "192.0.2.1 matches ip4:192.0.2.1 of example.com"}
    assert (found["spf"]["helo"]["result"], found["spf"]["helo"]["domain"]) == ("pass", "h.example.com")
    assert found["dkim"] == []
    assert (found["dmarc"]["result"], found["dmarc"]["disposition"]) == ("pass", "none")
    assert found["arc"]["result"] == "none"

    found = auth(config, text, "--ip", "192.0.2.2", "--mail-from", "<a@example.com>", "--now", "1780000000")
    assert (found["spf"]["mailfrom"]["result"], found["spf"]["mailfrom"]["explanation"]) == ("fail", "ask postmaster")
    assert found["spf"]["helo"]["result"] == "none"
    assert (found["dmarc"]["result"], found["dmarc"]["disposition"]) == ("fail", "none")


def test_null_sender_is_the_helo_name(config: str) -> None:
    found = auth(config, b"From: a@example.com\r\n\r\n", "--ip", "192.0.2.1", "--helo", "h.example.com")
    assert (found["spf"]["mailfrom"]["result"], found["spf"]["mailfrom"]["domain"]) == ("pass", "h.example.com")
    assert found["dmarc"]["aligned"] == ["spf=h.example.com"]


def test_signature_that_can_not_be_verified(config: str, tmp_path: Path) -> None:
    file = tmp_path / "message.eml"
    file.write_bytes(b"DKIM-Signature: v=1; a=rsa-sha256; d=example.com; s=sel; h=from; bh=AAAA; b=AAAA\r\nFrom: a@example.com\r\n\r\n")
    found = json.loads(run(config, "auth", str(file), "--ip", "192.0.2.9", "--json").stdout)
    assert [(one["d"], one["s"], bool(one["reason"])) for one in found["dkim"]] == [("example.com", "sel", True)]
    assert found["dkim"][0]["result"] != "pass"


def test_octets_that_are_no_utf8(config: str) -> None:
    found = auth(config, b"From: \xff@example.com\n\n", "--ip", "192.0.2.2", "--helo", "\udcff", "--mail-from", "\udcff@example.com")
    assert found["spf"]["mailfrom"]["result"] == "fail"
    assert found["spf"]["helo"]["result"] == "none"


def test_auth_explains(config: str) -> None:
    text = run(config, "auth", "-", "--ip", "192.0.2.2", "--helo", "x", "--mail-from", "a@example.com", text=b"From: \x1b[2Ja@news.example.com\n\n").stdout
    for line in ("spf=fail (mailfrom example.com): 192.0.2.2 matches -all of example.com", "the domain says: ask postmaster",
                 "ip4:192.0.2.1 does not match", "dkim=none: no signature", "_dmarc.example.com: v=DMARC1; p=quarantine; sp=reject; t=y",
                 "dmarc=fail disposition=quarantine (news.example.com, policy reject at example.com, organizational domain example.com)"):
        assert line in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--from", "From: a@news.example.com", "--spf", "none:", "--dkim", "pass:example.com"], ("pass", "none", "reject", "example.com")),
    (["--from", "from : a@news.example.com", "--spf", "pass:other.example"], ("fail", "quarantine", "reject", "example.com")),
    (["--from", "From: a@late.example"], ("temperror", "tempfail", "", "")),
    (["--from", "From: a@nothing.example"], ("none", "none", "", "nothing.example")),
    (["--from", "From: a@nothing.example", "--from", "From: a@example.com"], ("fail", "none", "quarantine", "example.com")),
    ([], ("permerror", "none", "", "")),
])
def test_dmarc(config: str, arguments: list[str], expected: tuple[str, ...]) -> None:
    found = json.loads(run(config, "dmarc", *arguments, "--json").stdout)
    assert tuple(found[key] for key in ("result", "disposition", "policy", "organizational_domain")) == expected
    assert f"dmarc={expected[0]} disposition={expected[1]}" in run(config, "dmarc", *arguments).stdout


def test_usage(config: str) -> None:
    assert CliRunner().invoke(main, ["dmarc", "--spf", "pass", "-c", config]).exit_code == 2
    assert CliRunner().invoke(main, ["auth", "/no/such/file", "--ip", "192.0.2.1", "-c", config]).exit_code == 2
