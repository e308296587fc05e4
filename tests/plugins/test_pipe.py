"""The pipe transport: what a command gets and what its end means; no address becomes an option, a path or two arguments."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import pytest

from gmta import Delivery
from gmta.config import Section
from gmta.mail.address import Address, AddressError, parse_mailbox
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message
from gmta.mail.verdict import Outcome, Status
from gmta.services.aliases import special_local
from gmta.testing import MemoryLog, make_services
from gmta_plugins import pipe
from gmta_plugins.pipe import Pipe, parse_command

RAW = b"Subject: x\r\n\r\n.dot\r\nbody\r\n"
ECHO = """
import json, os, sys
json.dump({"arguments": sys.argv[2:], "environment": dict(os.environ), "directory": os.getcwd(), "group": os.getpgrp() == os.getpid(),
           "user": [os.getuid(), os.getgid(), os.getgroups()], "input": sys.stdin.buffer.read().decode("latin-1"),
           "files": sorted(os.listdir("/proc/self/fd"))}, open(sys.argv[1], "a"))
print(file=open(sys.argv[1], "a"))
"""

# mailboxes (local parts without quotes) that would like to be something else
HOSTILE: list[str] = json.loads((Path(__file__).parents[1] / "data/hostile_local_parts.json").read_text())


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """A program that notes how it was run, in the file that its first argument names; and the beginning of a command with it."""
    (tmp_path / "echo.py").write_text(ECHO)
    return f"{sys.executable} {tmp_path}/echo.py {tmp_path}/runs"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Pipe]:
    def made(command: str, **keys: Any) -> Pipe:
        services = make_services({"gmta": {"hostname": "mx.example", "data_dir": str(tmp_path)}}, log=MemoryLog())
        section = Section("transport:pipe", values={"command": command} | {key: str(value) for key, value in keys.items()})
        return Pipe("pipe", services.config.validate(Pipe.Config, section), services)

    return made


def address(mailbox: str, domain: str = "c.example") -> Address:
    """An address from its unquoted local part, quoted where that is needed."""
    try:
        return Address.make(mailbox, domain)
    except AddressError:
        return Address(mailbox, domain)


def delivery(*addresses: Address, message: Message | None = None, sender: str = "a@b.example") -> Delivery:
    recipients = [RecipientState(n, address) for n, address in enumerate(addresses)]
    envelope = Envelope("0123456789ABCDEF", Address.parse(sender), recipients, received_at=1_800_000_000.5)
    return Delivery(envelope, recipients, message or Message.from_bytes(RAW), "pipe")


def deliver(transport: Pipe, *addresses: Address, **facts: Any) -> Outcome:
    outcomes = transport.deliver(delivery(*(addresses or (Address("joe", "c.example"),)), **facts))
    return outcomes[0]


def runs(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "runs"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def script(tmp_path: Path, text: str) -> str:
    """A command that is a shell script."""
    file = tmp_path / "script"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


def test_what_the_command_gets(make: Callable[..., Pipe], echo: str, tmp_path: Path) -> None:
    transport = make(f"{echo} -f {{sender}} -- {{recipient}} {{local}} {{user}} {{detail}} {{domain}} {{id}} 'two words' x{{user}}y",
                     environment="COLOUR=red")
    assert deliver(transport, Address("joe+lists", "C.example")).status is Status.DELIVERED
    (run,) = runs(tmp_path)
    assert run["arguments"] == ["-f", "a@b.example", "--", "joe+lists@C.example", "joe+lists", "joe", "lists", "c.example",
                                "0123456789ABCDEF", "two words", "xjoey"]
    assert run["input"] == "Return-Path: <a@b.example>\nDelivered-To: joe+lists@C.example\n" + RAW.decode().replace("\r\n", "\n")
    assert run["environment"].keys() - {"LC_CTYPE"} == {"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "COLOUR"}
    assert run["directory"] == "/" and run["group"]
    assert run["files"] == ["0", "1", "2", "3"]  # and the one that lists them


def test_forms_of_the_message(make: Callable[..., Pipe], echo: str, tmp_path: Path) -> None:
    deliver(make(echo, line_ends="crlf", trace="no"))
    deliver(make(echo, from_line="yes", trace="no"), sender="")
    deliver(make(echo, from_line="yes", line_ends="crlf"), message=Message.from_bytes(b"no header\r\n"))
    forms = [run["input"] for run in runs(tmp_path)]
    assert forms[0] == RAW.decode()
    assert forms[1] == "From MAILER-DAEMON Fri Jan 15 08:00:00 2027\n" + RAW.decode().replace("\r\n", "\n")
    assert forms[2] == ("From a@b.example Fri Jan 15 08:00:00 2027\r\nReturn-Path: <a@b.example>\r\nDelivered-To: joe@c.example\r\n\r\n"
                        "no header\r\n")


def test_big_message_in_a_file(make: Callable[..., Pipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "IN_MEMORY", 1000)
    body = b"line\r\n" * 1000
    (tmp_path / "body").write_bytes(body)
    message = Message(b"Subject: x\r\n", b"\r\n", FileBody(str(tmp_path / "body"), 0, len(body)))
    assert deliver(make(script(tmp_path, f"cat > {tmp_path}/got"), trace="no"), message=message).status is Status.DELIVERED
    assert (tmp_path / "got").read_bytes() == b"Subject: x\n\n" + body.replace(b"\r\n", b"\n")
    assert not list(tmp_path.glob("pipe-*"))


def test_a_command_need_not_read(make: Callable[..., Pipe], tmp_path: Path) -> None:
    message = Message.from_bytes(RAW + b"x" * 500_000 + b"\r\n")
    assert deliver(make("/bin/true"), message=message).status is Status.DELIVERED


def test_one_run_for_all_recipients(make: Callable[..., Pipe], echo: str, tmp_path: Path) -> None:
    outcomes = make(f"{echo} {{sender}} -- {{recipient}}", per="message").deliver(delivery(address("joe"), address("ann")))
    assert [outcome.status for outcome in outcomes.values()] == [Status.DELIVERED] * 2
    (run,) = runs(tmp_path)
    assert run["arguments"] == ["a@b.example", "--", "joe@c.example", "ann@c.example"]
    assert run["input"].startswith("Return-Path: <a@b.example>\nSubject")


def test_null_sender(make: Callable[..., Pipe], echo: str, tmp_path: Path) -> None:
    deliver(make(f"{echo} {{sender}}"), sender="")
    deliver(make(f"{echo} {{sender}}", null_sender="MAILER-DAEMON"), sender="")
    assert [run["arguments"] for run in runs(tmp_path)] == [[""], ["MAILER-DAEMON"]]


# --- hostile addresses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mailbox", HOSTILE)
def test_hostile_local_part_stays_an_argument(make: Callable[..., Pipe], mailbox: str) -> None:
    envelope = delivery(address(mailbox)).envelope
    bare = make("/bin/true {local} end")
    behind = make("/bin/true -- {local} end")
    within = make("/bin/true /mail/{local}/box end")
    assert behind.arguments(envelope, [address(mailbox)]) == ["/bin/true", "--", mailbox, "end"]
    if mailbox.startswith("-"):
        with pytest.raises(pipe.Unfit) as unfit:
            bare.arguments(envelope, [address(mailbox)])
        assert str(unfit.value.outcome.reply).startswith("550 5.1.3 ")
        assert make("/bin/true {local}", leading_dash="pass").arguments(envelope, [address(mailbox)])[1] == mailbox
    else:
        assert bare.arguments(envelope, [address(mailbox)]) == ["/bin/true", mailbox, "end"]
    if "/" in mailbox or mailbox.startswith(".") or not mailbox:
        with pytest.raises(pipe.Unfit):
            within.arguments(envelope, [address(mailbox)])
    else:
        argument = within.arguments(envelope, [address(mailbox)])[1]
        assert os.path.normpath(argument) == argument == f"/mail/{mailbox}/box"


def test_hostile_local_parts_reach_a_real_command_unharmed(make: Callable[..., Pipe], tmp_path: Path) -> None:
    mailboxes = [mailbox for mailbox in HOSTILE if mailbox]
    command = script(tmp_path, f'shift; printf "%s\\0" "$@" >> {tmp_path}/got; echo >> {tmp_path}/count')
    outcomes = make(f"{command} -- {{local}}", trace="no").deliver(delivery(*map(address, mailboxes)))
    assert {outcome.status for outcome in outcomes.values()} == {Status.DELIVERED}
    assert (tmp_path / "got").read_text().split("\0")[:-1] == mailboxes


def test_sender_that_would_be_an_option(make: Callable[..., Pipe]) -> None:
    outcome = deliver(make("/bin/true -f {sender}"), sender="-oops@b.example")
    assert outcome.status is Status.FAILED and outcome.reply.enhanced == "5.1.7"


@pytest.mark.parametrize("text", ["a\0b@c.example", "\ud800@c.example"])
def test_what_no_argument_can_hold(make: Callable[..., Pipe], text: str) -> None:
    local, _, domain = text.partition("@")
    assert deliver(make("/bin/true -- {recipient}", trace="no"), Address(local, domain)).reply.enhanced == "5.1.3"


# --- how it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status,expected", [
    (0, "250 2.0.0"), (64, "550 5.3.0"), (65, "550 5.6.0"), (66, "550 5.3.0"), (67, "550 5.1.1"), (68, "550 5.1.2"), (69, "550 5.3.0"),
    (70, "550 5.3.0"), (71, "451 4.3.0"), (72, "550 5.3.0"), (73, "550 5.2.0"), (74, "550 5.3.0"), (75, "451 4.3.0"), (76, "550 5.5.0"),
    (77, "550 5.7.0"), (78, "550 5.3.5"), (1, "451 4.3.0"), (127, "451 4.3.0")])
def test_statuses(make: Callable[..., Pipe], tmp_path: Path, status: int, expected: str) -> None:
    outcome = deliver(make(script(tmp_path, f"cat >/dev/null; echo some reason; exit {status}")))
    assert str(outcome.reply).startswith(expected)
    if status:
        assert f"status {status}" in outcome.reply.text and outcome.reply.text.endswith(": some reason")


def test_other_statuses_by_key(make: Callable[..., Pipe], tmp_path: Path) -> None:
    assert deliver(make(script(tmp_path, "exit 1"), other_status="fail")).status is Status.FAILED


def test_words_of_the_command(make: Callable[..., Pipe], tmp_path: Path) -> None:
    assert str(deliver(make(script(tmp_path, "echo 5.2.2 mailbox full; exit 69"))).reply).startswith("550 5.2.2 ")
    assert str(deliver(make(script(tmp_path, "echo 5.2.2 mailbox full; exit 75"))).reply).startswith("451 4.3.0 ")
    outcome = deliver(make(script(tmp_path, "printf 'a\\033[1mb\\r\\nc\\377d\\n' >&2; exit 70")))
    assert outcome.reply.text.endswith(": a [1mb c\ufffdd")
    outcome = deliver(make(script(tmp_path, "yes | head -c 300000; exit 70")))
    assert outcome.status is Status.FAILED and len(outcome.reply.text) < pipe.MAX_OUTPUT + 100


def test_signal_defers(make: Callable[..., Pipe], tmp_path: Path) -> None:
    outcome = deliver(make(script(tmp_path, "kill -KILL $$")))
    assert outcome.status is Status.DEFERRED and "signal 9" in outcome.reply.text


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until_written(path: Path) -> int:
    """The number that a command writes into a FIFO."""
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with gevent.Timeout(10):
            gevent.get_hub().wait(gevent.get_hub().loop.io(reader, 1))
        return int(os.read(reader, 100))
    finally:
        os.close(reader)


def test_time_over_kills_the_whole_group(make: Callable[..., Pipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over when the command's child runs; none of them heeds SIGTERM."""
    monkeypatch.setattr(pipe, "GRACE_S", 0.05)
    os.mkfifo(tmp_path / "started")
    children: list[int] = []
    wait = pipe.subprocess.Popen.wait

    def waits(process: Any, timeout: float | None = None) -> int:
        if timeout == 123:
            children.append(until_written(tmp_path / "started"))
            raise pipe.subprocess.TimeoutExpired("script", timeout)
        status: int = wait(process, timeout)
        return status

    monkeypatch.setattr(pipe.subprocess.Popen, "wait", waits)
    outcome = deliver(make(script(tmp_path, f"trap '' TERM; sleep 1000 & echo $! > {tmp_path}/started; wait; sleep 1000"), timeout="123s"))
    assert outcome.status is Status.DEFERRED and "did not end within 123 s" in outcome.reply.text
    with gevent.Timeout(10):
        while not gone(children[0]):
            gevent.sleep(0.01)


def test_a_delivery_that_is_ended_ends_its_command(make: Callable[..., Pipe], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "started")
    transport = make(script(tmp_path, f"echo $$ > {tmp_path}/started; exec sleep 1000"))
    running = gevent.spawn(deliver, transport)
    pid = until_written(tmp_path / "started")
    running.kill()
    assert gone(pid)


def test_what_stays_behind_does_not_delay(make: Callable[..., Pipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "GRACE_S", 0.05)
    command = script(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; echo said; exit 69")
    outcome = deliver(make(command))
    assert outcome.reply.text.endswith(": said")
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_program_gone_defers(make: Callable[..., Pipe], tmp_path: Path) -> None:
    transport = make(script(tmp_path, "exit 0"))
    (tmp_path / "script").unlink()
    outcome = deliver(transport)
    assert outcome.status is Status.DEFERRED and outcome.reply.enhanced == "4.3.0"


def test_loop_is_stopped(make: Callable[..., Pipe]) -> None:
    raw = b"Delivered-To: joe@c.example\r\nDelivered-To: broken\r\n" + RAW
    assert deliver(make("/bin/true"), message=Message.from_bytes(raw)).reply.enhanced == "5.4.6"
    assert deliver(make("/bin/true"), address("ann"), message=Message.from_bytes(raw)).status is Status.DELIVERED
    assert deliver(make("/bin/true", trace="no"), message=Message.from_bytes(raw)).status is Status.DELIVERED


# --- accounts and keys ------------------------------------------------------------------------------------------


def test_no_such_account(make: Callable[..., Pipe]) -> None:
    transport = make("/bin/true", user="{user}")
    assert deliver(transport, address("no-such-account")).reply.enhanced == "5.1.1"
    assert deliver(transport, address("../root")).reply.enhanced == "5.1.1"
    assert deliver(transport, address("root")).reply.enhanced == "5.7.1"


def test_a_directory_of_accounts_that_fails_defers(make: Callable[..., Pipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(pipe, "find_account", fails)
    assert deliver(make("/bin/true", user="{user}"), address("joe")).status is Status.DEFERRED


def test_a_command_that_can_not_be_killed_holds_nothing_up(make: Callable[..., Pipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has become another user, as set-user-ID programs do."""
    monkeypatch.setattr(pipe, "GRACE_S", 0.01)
    monkeypatch.setattr(pipe.os, "killpg", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    transport = make("/bin/sleep 2", timeout="0.01")
    assert deliver(transport).reply.text.startswith("The command did not end")
    assert transport._services.log.of("command can't be ended")  # type: ignore[attr-defined]


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the account needs root")
def test_runs_as_an_account(make: Callable[..., Pipe], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    command = script(tmp_path, "id -u; id -G; exit 69")
    nobody = pipe.account("nobody")
    assert deliver(make(command, user="nobody")).reply.text.endswith(f": {nobody.uid} {nobody.gid}")
    assert deliver(make(command, user="{user}", directory="/"), address("Nobody+x")).reply.text.endswith(f": {nobody.uid} {nobody.gid}")


@pytest.mark.parametrize("command", ["", "{user}", "/bin/true {home}", "/bin/true {user!r}", "/bin/true {user:>5}", "/bin/true {", "/bin/true 'x",
                                     "/no/such/program", "no-such-program"])
def test_command_that_can_not_be(make: Callable[..., Pipe], command: str) -> None:
    with pytest.raises(ValueError, match="command"):
        make(command)


def test_braces_of_its_own() -> None:
    assert parse_command("/bin/x {{user}}")[1].end == "{user}"


def test_every_hostile_mailbox_could_come_by_smtp() -> None:
    """At least forty of them are addresses that a client may give."""
    assert len([mailbox for mailbox in HOSTILE if mailbox.isascii() and parse_mailbox(str(address(mailbox)))]) >= 40


# --- commands of aliases ---------------------------------------------------------------------------------------------


def of_aliases(make: Callable[..., Pipe], tmp_path: Path, *targets: str, **keys: str) -> Pipe:
    (tmp_path / "aliases").write_text("".join('a: "{}"\n'.format(target.replace("\\", "\\\\").replace('"', '\\"')) for target in targets))
    return make("", aliases_file=str(tmp_path / "aliases"), **({"user": "nobody"} if os.geteuid() == 0 else {}), **keys)


def run_alias(transport: Pipe, target: str, alias: str = "list@c.example", **facts: Any) -> Outcome:
    made = delivery(Address(special_local(target), "c.example"), **facts)
    made.recipients[0].original = alias
    return transport.deliver(made)[0]


def shared(tmp_path: Path) -> Path:
    """A directory that everybody may write to, where nobody can reach it."""
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    made = tmp_path / "out"
    made.mkdir()
    made.chmod(0o777)
    return made


def test_command_of_an_alias_runs_without_a_shell(make: Callable[..., Pipe], tmp_path: Path) -> None:
    out = shared(tmp_path)
    (tmp_path / "note").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {out}/args\ncat > {out}/input\n')
    (tmp_path / "note").chmod(0o755)
    target = f"|{tmp_path}/note 'a b' $HOME; {{local}} `id` > {out}/never \\$x \"q\""
    assert run_alias(of_aliases(make, tmp_path, target), target).status is Status.DELIVERED
    assert (out / "args").read_text().split("\n")[:-1] == ["a b", "$HOME;", "{local}", "`id`", ">", f"{out}/never", "$x", "q"]
    assert not (out / "never").exists()
    assert (out / "input").read_text().startswith("Return-Path: <a@b.example>\nDelivered-To: list@c.example\n")


def test_only_commands_of_the_file_run(make: Callable[..., Pipe], tmp_path: Path) -> None:
    transport = of_aliases(make, tmp_path, "|/bin/true")
    assert run_alias(transport, "|/bin/true").status is Status.DELIVERED
    for target in ("|/bin/false", "/bin/true"):
        assert run_alias(transport, target).reply.enhanced == "5.1.1"
    assert deliver(transport, address("|/bin/true")).reply.enhanced == "5.1.1"
    (tmp_path / "aliases").write_text("a: |/bin/false\n")
    transport._services.clock.advance(2)
    assert run_alias(transport, "|/bin/true").reply.enhanced == "5.1.1" and run_alias(transport, "|/bin/false").status is Status.DEFERRED
    (tmp_path / "aliases").unlink()
    transport._services.clock.advance(2)
    for _ in range(3):  # for as long as it is so
        assert run_alias(transport, "|/bin/true").reply.enhanced == "4.3.0"


def test_loop_through_an_alias_is_stopped(make: Callable[..., Pipe], tmp_path: Path) -> None:
    message = Message.from_bytes(b"Delivered-To: List@c.example\r\n\r\nx\r\n")
    assert run_alias(of_aliases(make, tmp_path, "|/bin/true"), "|/bin/true", message=message).reply.enhanced == "5.4.6"


@pytest.mark.parametrize(("targets", "keys", "error"), [
    (["|no-such-program"], {}, "no program"), (["|/bin/sh 'x"], {}, "quotation"), (["|''"], {}, "expected a program"), (["|/bin/true"], {"per": "message"}, "per = recipient")])
def test_aliases_that_can_not_be(make: Callable[..., Pipe], tmp_path: Path, targets: list[str], keys: dict[str, str], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        of_aliases(make, tmp_path, *targets, **keys)


def test_commands_of_aliases_never_run_as_root(make: Callable[..., Pipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aliases").write_text("a: |/bin/true\n")
    monkeypatch.setattr("gmta_plugins.pipe.os.geteuid", lambda: 0)
    with pytest.raises(ValueError, match="never run as root"):
        make("", aliases_file=str(tmp_path / "aliases"))
    with pytest.raises(ValueError, match="never run as root"):
        make("", aliases_file=str(tmp_path / "aliases"), user="root")
    with pytest.raises(ValueError, match="either this or aliases_file"):
        make("/bin/true", aliases_file=str(tmp_path / "aliases"), user="nobody")


def test_every_key_is_documented() -> None:
    section = (Path(__file__).parents[2] / "docs/transports.md").read_text().split("\n## pipe\n")[1].split("\n## ")[0]
    assert not [key for key in Pipe.Config.model_fields if key != "on_error" and f"| `{key}` |" not in section]
