"""plugins/auth_file.py, the users file and `gmta user`."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import pytest
from click.testing import CliRunner

from gmta.cli import main
from gmta.config import ConfigError
from gmta.hookspecs import Credentials
from gmta.mail.verdict import Verdict
from gmta.receive.authentication import Authentication
from gmta.services import passwords
from gmta.smtp import events, sasl_client
from gmta.testing import FakeClock, MemoryServer, load_plugin, make_services, make_session
from gmta.testing.fakes import MemoryLog

HASHED = passwords.hash_password("sécret")


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    file.write_text(f"# users\nuser@example.test {HASHED}\n")
    return file


@pytest.fixture
def services() -> Iterator[Any]:
    made = make_services(clock=FakeClock())
    yield made
    made.close()


def ask(plugin: Any, user: str, secret: str, mechanism: str = "PLAIN", ip: str = "192.0.2.1") -> tuple[Verdict | None, Credentials]:
    credentials = Credentials(mechanism, user, secret)
    return plugin.permit_auth(make_session(tls=True, peer_ip=ip), credentials), credentials


def test_right_and_wrong(users: Path, services: Any) -> None:
    plugin = load_plugin("auth_file", services, users_file=users)
    verdict, credentials = ask(plugin, "User@EXAMPLE.test", "sécret", "LOGIN")
    assert verdict is not None and credentials.user == "user@example.test"
    assert ask(plugin, "user@example.test", "se\u0301cret")[0] is not None  # composed otherwise
    for user, secret in (("user@example.test", "secret"), ("user@example.test", ""), ("other@example.test", "sécret"), ("", "x"), ("user@example.test", "x" * 5000)):
        assert ask(plugin, user, secret)[0] is None
    assert ask(plugin, "user@example.test", "sécret", "XOAUTH2")[0] is None


def test_mechanisms_can_be_left_out(users: Path, services: Any) -> None:
    assert load_plugin("auth_file", services, users_file=users).get_auth_mechanisms() == ["SCRAM-SHA-256", "PLAIN", "LOGIN"]
    assert load_plugin("auth_file", services, users_file=users, mechanisms="PLAIN, LOGIN").get_auth_mechanisms() == ["PLAIN", "LOGIN"]
    with pytest.raises(ConfigError, match="mechanisms"):
        load_plugin("auth_file", services, users_file=users, mechanisms="CRAM-MD5")


def test_unknown_users_cost_as_much_as_known_ones(users: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = load_plugin("auth_file", services, users_file=users)
    checked: list[str] = []
    monkeypatch.setattr(plugin, "_check", lambda hashed, secret: bool(checked.append(hashed or "decoy")))
    ask(plugin, "user@example.test", "wrong")
    ask(plugin, "nobody@example.test", "wrong")
    assert len(checked) == 2 and checked[1] == "decoy"
    monkeypatch.undo()
    assert not plugin._check(None, "x") and plugin._decoy.split("$")[3] == HASHED.split()[0].split("$")[3]  # the same parameters


def test_what_was_right_is_not_hashed_again_for_a_while(users: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = load_plugin("auth_file", services, users_file=users)
    ask(plugin, "user@example.test", "sécret")
    asked: list[str] = []
    monkeypatch.setattr(plugin, "_check", lambda hashed, secret: bool(asked.append(secret)))
    assert ask(plugin, "user@example.test", "sécret")[0] is not None and not asked
    assert ask(plugin, "user@example.test", "wrong")[0] is None and asked == ["wrong"]
    assert ask(plugin, "user@example.test", "wrong")[0] is None and asked == ["wrong"]
    services.clock.advance(3600)
    assert ask(plugin, "user@example.test", "sécret")[0] is None and asked == ["wrong", "sécret"]
    services.clock.advance(3600)
    passwords.change(str(users), lambda lines: lines.update({"user@example.test": f"user@example.test {passwords.hash_password('wrong')}"}))
    monkeypatch.undo()
    assert ask(plugin, "user@example.test", "wrong")[0] is not None


def test_a_changed_file_is_read_again(users: Path, services: Any) -> None:
    plugin = load_plugin("auth_file", services, users_file=users)
    assert ask(plugin, "user@example.test", "sécret")[0] is not None
    passwords.change(str(users), lambda lines: lines.clear())
    services.clock.advance(2)
    assert ask(plugin, "user@example.test", "sécret")[0] is None
    users.unlink()
    services.clock.advance(2)
    assert ask(plugin, "user@example.test", "sécret")[0] is None
    services.clock.advance(2)
    ask(plugin, "user@example.test", "sécret")
    assert len(services.log.of("the users file can't be read")) == 1


def test_damaged_lines_are_nobody(users: Path, services: Any) -> None:
    users.write_text(f"user@example.test\nx@example.test plain\nuser@example.test {HASHED.split()[0]} SCRAM-SHA-256$nonsense\n\xff {HASHED}\n")
    plugin = load_plugin("auth_file", services, users_file=users)
    assert ask(plugin, "user@example.test", "sécret")[0] is not None
    assert ask(plugin, "user@example.test", "", "SCRAM-SHA-256")[0] is None
    assert services.log.of("lines of the users file can't be read")[0]["lines"] == 2


def test_a_user_is_served_before_guessers(users: Path, services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """First who is known at an address, then who tries there for the first time; one that is cut off leaves the others their turns."""
    plugin = load_plugin("auth_file", services, users_file=users)
    ask(plugin, "user@example.test", "sécret", ip="192.0.2.77")
    order: list[str] = []

    class Thread:
        def submit(self, check: Any) -> bool:
            gate.wait()
            return bool(check())

    gate = gevent.event.Event()
    monkeypatch.setattr(type(services), "batch", lambda *_, **__: Thread())
    monkeypatch.setattr(plugin, "_check", lambda hashed, secret: bool(order.append(secret)))
    services.clock.advance(3600)
    asked = [("user@example.test", str(number), "192.0.2.1") for number in range(6)]
    asked += [("user@example.test", "new", "192.0.2.2"), ("user@example.test", "known", "192.0.2.77"), ("nobody@example.test", "late", "192.0.2.1")]
    logins = []
    for user, secret, ip in asked:
        logins.append(gevent.spawn(lambda user, secret, ip: ask(plugin, user, secret, ip=ip), user, secret, ip))
        gevent.sleep(0)
    logins[4].kill()
    gate.set()
    gevent.joinall(logins, timeout=5)
    assert [one for one in order if one not in ("0", "1")] == ["known", "new", "2", "3", "5", "late"]
    assert plugin._turns._free == 2 and not plugin._turns._waiting


def test_scram_over_the_whole_server(users: Path) -> None:
    """SCRAM-SHA-256 with our own client's answers, in memory."""
    server = MemoryServer("auth_file", keys={"users_file": users})
    try:
        seen: list[Any] = []
        session = make_session(role="submission", tls=True)
        pipeline = server.connect(None, "submission", tls=None, store=None, accept=lambda *_: None)._pipeline  # type: ignore[arg-type]
        for user, secret, good in (("user@example.test", "sécret", True), ("user@example.test", "x", False), ("who@example.test", "x", False)):
            client = sasl_client.Scram(user, secret, "nonce")
            login = Authentication(pipeline, session, "SCRAM-SHA-256", lambda stage, reply: reply, lambda stage, verdict: None)
            reply = login.answer(events.Auth("SCRAM-SHA-256", client.first))
            assert reply.code == 334
            challenge = sasl_client._decode(reply.text)
            seen.append(challenge.split(b"i=")[1])
            reply = login.answer(events.AuthResponse(client.answer(challenge)))
            if good:
                assert reply.code == 334 and client.answer(sasl_client._decode(reply.text)) == b""
                assert login.answer(events.AuthResponse(b"")).code == 235 and session.user == "user@example.test"
            else:
                assert reply.code == 535
        assert len(set(seen)) == 1  # who is not there looks like who is
        assert pipeline.mechanisms.of(session) == ("SCRAM-SHA-256", "PLAIN", "LOGIN")
    finally:
        server.close()


def test_no_password_in_the_log(users: Path) -> None:
    server = MemoryServer("auth_file", keys={"users_file": users})
    try:
        server.play(r"""
listener: submission
S: 220
C: EHLO client.example.com
S: 250
C: STARTTLS
S: 220
STARTTLS
C: EHLO client.example.com
S: 250
HAS: AUTH SCRAM-SHA-256 PLAIN LOGIN
C: AUTH PLAIN \{base64 \0user@example.test\0hunter2wrong}
S: 535 5.7.8
C: AUTH PLAIN \{base64 \0nobody@example.test\0hunter2wrong}
S: 535 5.7.8
C: AUTH LOGIN
S: 334
C: \{base64 user@example.test}
S: 334
C: \{base64 sécret}
S: 235 2.7.0
C: QUIT
S: 221
""")
        log = server.log
        assert isinstance(log, MemoryLog) and "hunter2" not in repr(log.lines) and "sécret" not in repr(log.lines)
        assert log.of("authenticated")[0]["user"] == "user@example.test"
    finally:
        server.close()


# --- gmta user ---------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: str, text: str = "secret\n") -> Any:
    config = folder / "config.ini"
    config.write_text("[gmta]\nhostname = mx.example.test\n[plugin:auth_file]\nusers_file = people/users\n")
    return CliRunner().invoke(main, ["user", *arguments, "-c", str(config)], input=text)


def test_add_passwd_list_delete(tmp_path: Path) -> None:
    file = tmp_path / "people/users"
    assert command(tmp_path, "list").output == ""
    assert command(tmp_path, "add", "User@Example.test", "--password-stdin").exit_code == 0
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600 and "secret" not in file.read_text()
    assert command(tmp_path, "add", "user@example.test", "--password-stdin").exit_code == 1
    assert command(tmp_path, "add", "second@example.test", text="other\nother\n").exit_code == 0
    assert command(tmp_path, "list").output == "user@example.test\nsecond@example.test\n"
    assert command(tmp_path, "list", "--json").output.strip().startswith("[")
    first = file.read_text().splitlines()[0]
    assert command(tmp_path, "passwd", "user@example.test", "--password-stdin", text="another\n").exit_code == 0
    assert file.read_text().splitlines()[0] != first and passwords.verify(file.read_text().split()[1], "another")
    assert command(tmp_path, "passwd", "nobody@example.test", "--password-stdin").exit_code == 1
    assert command(tmp_path, "delete", "nobody@example.test").exit_code == 1
    assert command(tmp_path, "delete", "user@example.test").exit_code == 0
    assert command(tmp_path, "list").output == "second@example.test\n"
    assert [entry.name for entry in file.parent.iterdir()] == ["users"]


@pytest.mark.parametrize("arguments,text", [
    (("add", "noaddress", "--password-stdin"), "x\n"), (("add", "a@b@c", "--password-stdin"), "x\n"), (("add", "a@example.test", "--password-stdin"), "\n"),
    (("add", '"a b"@example.test', "--password-stdin"), "x\n"), (("add", "a@example.test", "--password-stdin"), "x" * 2000 + "\n"), (("add", "a@example.test"), "one\ntwo\n"),
])
def test_what_can_t_be_added(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    assert command(tmp_path, *arguments, text=text).exit_code in (1, 2)
    assert not (tmp_path / "people/users").exists()


def test_comments_stay_and_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    real = tmp_path / "real"
    real.write_text("# who may send\nold@example.test $argon2id$x\nnonsense\n")
    (tmp_path / "people/users").symlink_to(real)
    assert command(tmp_path, "add", "new@example.test", "--password-stdin").exit_code == 0
    lines = real.read_text().splitlines()
    assert lines[:3] == ["# who may send", "old@example.test $argon2id$x", "nonsense"] and lines[3].startswith("new@example.test $argon2id$")
    assert (tmp_path / "people/users").is_symlink()


def test_a_file_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "people").write_text("no folder")
    said = command(tmp_path, "add", "new@example.test", "--password-stdin")
    assert said.exit_code == 1 and "people" in said.output
