"""gmta dkim keygen and check: the file, the record, and what DNS says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gmta.cli import main
from gmta.testing.zone import Zone
from gmta.verify.signing import load_key


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.ini"
    file.write_text("[gmta]\nhostname = mx.example.test\nworkers = 1\n[listener:mx]\naddress = 127.0.0.1:2525\n"
                    "[domains]\nlocal = example.test\n[plugin:dkim_sign]\nkeys = keys/{domain}/{selector}.pem\nexpire = 7d\n"
                    "[transport:mailbox]\ntype = maildir\npath = mail/{domain}/{local}\n[route]\nlocal = mailbox\n")
    return file


def gmta(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["dkim", *arguments, "-c", str(config)])


def record(output: str) -> str:
    """The text of a TXT record in zone-file form."""
    strings = re.findall(r'"([^"]*)"', output)
    assert strings and max(map(len, strings)) <= 255
    return "".join(strings)


@pytest.mark.parametrize("more,algorithm", [((), "rsa-sha256"), (("--ed25519",), "ed25519-sha256"), (("--bits", "4096"), "rsa-sha256")])
def test_keygen(config: Path, more: tuple[str, ...], algorithm: str) -> None:
    done = gmta(config, "keygen", "Example.COM", "--selector", "s1", *more)
    assert done.exit_code == 0, done.output
    file = config.parent / "keys/example.com/s1.pem"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    key = load_key(str(file), "example.com", "s1")
    assert key.algorithm == algorithm
    comment, rest = done.output.split("\n", 1)
    assert comment == f"; private key: {file}"
    assert rest.startswith("s1._domainkey.example.com. IN TXT ( ") and record(rest) == key.record()
    assert [one.name for one in file.parent.iterdir()] == ["s1.pem"]


def test_keygen_names_the_file_itself_and_never_writes_over_one(config: Path) -> None:
    first = json.loads(gmta(config, "keygen", "example.com", "--json").output)
    assert re.fullmatch(r"rsa[0-9]{6}\._domainkey\.example\.com", first["name"])
    octets = Path(first["file"]).read_bytes()
    again = gmta(config, "keygen", "example.com")
    assert again.exit_code == 1 and "is there already" in again.output
    assert Path(first["file"]).read_bytes() == octets
    assert re.fullmatch(r"ed[0-9]{6}\._domainkey\.example\.com", json.loads(gmta(config, "keygen", "example.com", "--ed25519", "--json").output)["name"])


@pytest.mark.parametrize("arguments", [("keygen", "../x"), ("keygen", "com"), ("keygen", "example.com", "--selector", "../x"), ("check", "")])
def test_bad_names_are_usage_errors(config: Path, arguments: tuple[str, ...]) -> None:
    assert gmta(config, *arguments).exit_code == 2
    assert not (config.parent / "keys").exists()


def test_bad_pattern_is_a_bad_configuration(config: Path) -> None:
    config.write_text(config.read_text().replace("{selector}.pem", "key.pem"))
    done = gmta(config, "keygen", "example.com")
    assert done.exit_code == 78 and "[plugin:dkim_sign] keys: expected a path with {domain}" in done.output


def test_check(config: Path) -> None:
    for selector in ("good", "missing", "other", "revoked", "down", "twice"):
        assert gmta(config, "keygen", "example.com", "--selector", selector, "--ed25519").exit_code == 0
    folder = config.parent / "keys/example.com"
    texts = {file.stem: load_key(str(file), "example.com", file.stem).record() for file in folder.iterdir()}
    zone = Zone({
        "good._domainkey.example.com": {"TXT": [texts["good"]]}, "other._domainkey.example.com": {"TXT": [texts["good"]]},
        "revoked._domainkey.example.com": {"TXT": ["v=DKIM1; k=ed25519; p="]}, "down._domainkey.example.com": {"rcode": "SERVFAIL"},
        "twice._domainkey.example.com": {"TXT": [texts["twice"], texts["good"]]},
    })
    with zone.serve() as server:
        config.write_text(config.read_text() + f"[dns]\nservers = {server.address}\n")
        done = gmta(config, "check", "example.com")
        as_json = gmta(config, "check", "example.com", "--json")
        for selector in ("missing", "other", "revoked", "down", "twice"):
            (folder / f"{selector}.pem").unlink()
        good = gmta(config, "check", "example.com")
    assert done.exit_code == as_json.exit_code == 1
    said = {one["name"].partition(".")[0]: one["reason"] for one in json.loads(as_json.output)}
    assert said["down"].startswith("can't get the key")
    assert said["twice"].startswith("2 records at one name")
    assert {name: said[name] for name in ("good", "missing", "other", "revoked")} == {
        "good": "", "missing": "no record", "other": "the record is of another key", "revoked": "key revoked"}
    assert "good._domainkey.example.com (ed25519-sha256): published\n" in done.output
    assert texts["missing"] in done.output
    assert good.exit_code == 0 and good.output == "good._domainkey.example.com (ed25519-sha256): published\n"


def test_check_without_keys(config: Path) -> None:
    done = gmta(config, "check", "example.com")
    assert done.exit_code == 1 and "no keys for example.com" in done.output
