"""Started as root: workers are nobody, and each user's mail is written, and each command run, as that user by the delivery agent."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.e2e.conftest import DEADLINE_S, ROOT, Gmta, children, command_line, until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not ROOT, reason="changing the account needs root")]

GAMES, WWW = (pwd.getpwnam(name) for name in ("games", "www-data")) if ROOT else (None, None)


@pytest.fixture
def homes(directory: Path) -> Iterator[Path]:
    """A directory with one for each of two accounts."""
    made = directory / "homes"
    made.mkdir(mode=0o755)
    made.chmod(0o755)
    for one in (GAMES, WWW):
        assert one is not None
        home = made / one.pw_name
        home.mkdir(mode=0o700)
        os.chown(home, one.pw_uid, one.pw_gid)
    yield made


def worker_user() -> str:
    """nobody, where it may run this interpreter; else root: the agent becomes other users all the same."""
    try:
        subprocess.run([sys.executable, "-c", "import gmta"], user="nobody", group="nogroup", extra_groups=[], cwd="/", check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        return "root"
    return "nobody"


def serve(gmta: Gmta, homes: Path, symlinks: str = "no", quota: str = "0") -> None:
    gmta.serve(gmta.configuration(f"""
[gmta]
user = {worker_user()}
log_file = /dev/null
data_dir = {gmta.directory}/data
[plugins]
enable = mailboxes, maildir
[queue]
retry = 1s
warn_after = 0
[transport:mailbox]
type = maildir
path = {homes}/{{user}}/Maildir
user = {{user}}
symlinks = {symlinks}
quota = {quota}
[transport:sorted]
type = pipe
directory = /
command = /bin/sh -c 'umask; id -u; id -G; cat > $0/got-$$; exit 69' {homes}/{{user}}
user = {{user}}
[route]
www-data@example.test = sorted
"""))


def send(gmta: Gmta, *recipients: str, sender: str = "a@sender.example", size: int = 0) -> None:
    body = "x" * 70 + "\r\n"
    with smtplib.SMTP("127.0.0.1", gmta.port, "client.test", timeout=DEADLINE_S) as client:
        client.sendmail(sender, recipients, f"From: a@sender.example\r\nSubject: hello\r\n\r\nhi\r\n{body * (size // len(body))}")


def files(box: Path, count: int) -> list[Path]:
    until(lambda: (box / "new").is_dir() and len(list((box / "new").iterdir())) >= count, "message")
    return sorted((box / "new").iterdir())


def history(gmta: Gmta, address: str) -> str:
    """The last reply to a queued recipient, once there is one."""
    def last() -> str:
        rows = json.loads(gmta.command("queue", "list", "--json").stdout)
        return next((one["last_reply"] for row in rows for one in row["recipients"] if one["address"] == address), "")
    until(lambda: bool(last()), "an attempt")
    return last()


def agent(gmta: Gmta) -> int:
    assert gmta.process is not None
    return next((pid for pid in children(gmta.process.pid) if b"gmta.agent" in command_line(pid)), 0)


def test_mail_is_written_as_its_user(gmta: Gmta, homes: Path) -> None:
    serve(gmta, homes)
    send(gmta, "Games+x@example.test")
    send(gmta, "games@example.test")
    send(gmta, "games@example.test", size=3_000_000)
    box = homes / "games/Maildir"
    assert GAMES is not None and gmta.process is not None
    for path in (box, box / "new", box / "tmp", box / "cur", *files(box, 3)):
        found = path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (GAMES.pw_uid, GAMES.pw_gid, 0o700 if path.is_dir() else 0o600)
    assert max(path.stat().st_size for path in files(box, 3)) > 2_900_000
    workers = [pid for pid in children(gmta.process.pid) if pid != agent(gmta)]
    uid = pwd.getpwnam(worker_user()).pw_uid
    for pid in workers:
        assert f"Uid:\t{uid}\t{uid}\t{uid}" in Path(f"/proc/{pid}/status").read_text()
    assert gmta.stop() == 0


def test_a_full_mailbox_is_told_in_the_dialogue(gmta: Gmta, homes: Path) -> None:
    serve(gmta, homes, quota="5KB")
    send(gmta, "games@example.test", size=3500)
    files(homes / "games/Maildir", 1)
    assert GAMES is not None
    with smtplib.SMTP("127.0.0.1", gmta.port, "client.test", timeout=DEADLINE_S) as client:
        client.ehlo()
        client.mail("a@sender.example", ["SIZE=3000"])
        assert client.rcpt("games@example.test") == (552, b"5.2.2 Mailbox is full")
        assert client.rcpt("no-such-account@example.test") == (550, b"5.1.1 There is no such account")
        assert client.rcpt("mail@example.test")[0] == 250  # whose mailbox is not there and can't be looked into
    assert (homes / "games/Maildir/maildirsize").stat().st_uid == GAMES.pw_uid


def test_commands_run_as_their_user(gmta: Gmta, homes: Path) -> None:
    serve(gmta, homes)
    send(gmta, "www-data@example.test", sender="games@example.test")
    (report,) = files(homes / "games/Maildir", 1)
    assert WWW is not None
    assert f"0077 {WWW.pw_uid} {WWW.pw_gid}" in report.read_text()
    (got,) = (homes / "www-data").glob("got-*")
    assert got.stat().st_uid == WWW.pw_uid and b"Delivered-To: www-data@example.test\n" in got.read_bytes()


def test_a_command_that_hangs_holds_up_nobody_else(gmta: Gmta, homes: Path) -> None:
    serve(gmta, homes)
    gmta.stop()
    config = re.sub(r"(?m)^command = .*$", f"command = /bin/sh -c 'case $0 in *games) cat > $0/got;; *) touch $0/hangs; sleep 60;; esac' {homes}/{{user}}\ntimeout = 3s",
                    gmta.config.read_text())
    gmta.serve(config.replace("[route]", "[route]\ngames@example.test = sorted"))
    for _ in range(40):
        send(gmta, "www-data@example.test")
    until((homes / "www-data/hangs").exists, "a command that hangs")
    send(gmta, "games@example.test")
    until((homes / "games/got").exists, "the other's command")
    until(lambda: not [one for one in json.loads(gmta.command("queue", "list", "--json").stdout) if one["recipients"][0]["address"].startswith("games")], "its record")


def test_a_user_who_stops_his_own_processes_keeps_none_of_the_agents(gmta: Gmta, homes: Path) -> None:
    """Or a few hundred such, each kept for minutes, would be all that there may be."""
    serve(gmta, homes)
    gmta.stop()
    gmta.serve(re.sub(r"(?m)^command = .*$", "command = /bin/sh -c 'kill -STOP $PPID; sleep 60'", gmta.config.read_text()))
    send(gmta, "www-data@example.test")
    assert "The delivery agent can't be asked" in history(gmta, "www-data@example.test")
    assert not [pid for pid in children(agent(gmta)) if "State:\tT" in Path(f"/proc/{pid}/status").read_text()]


@pytest.mark.parametrize(("name", "status"), [("root", "5.7.1"), ("no-such-account", "5.1.1"), ("..", "5.1.")])
def test_who_gets_no_mail(gmta: Gmta, homes: Path, name: str, status: str) -> None:
    serve(gmta, homes)
    try:
        send(gmta, f"{name}@example.test" if name != ".." else '"../root"@example.test', sender="games@example.test")
    except smtplib.SMTPRecipientsRefused as refused:
        assert name == ".." and b"5.1.3" in next(iter(refused.recipients.values()))[1]
    else:
        (report,) = files(homes / "games/Maildir", 1)
        assert f"Status: {status}" in report.read_text()
    assert sorted(os.listdir(homes)) == ["games", "www-data"]


@pytest.mark.parametrize("symlinks", ["no", "yes"])
@pytest.mark.parametrize("link", ["Maildir", "Maildir/new", "Maildir/tmp"])
def test_a_user_leads_nobody_where_he_may_not_go(gmta: Gmta, homes: Path, directory: Path, link: str, symlinks: str) -> None:
    """Links that he has planted are followed with his rights at most."""
    secret = directory / "secret"
    for part in (secret, *(secret / name for name in ("new", "cur", "tmp"))):
        part.mkdir(mode=0o700)
    box = homes / "games/Maildir"
    (homes / "games" / link).parent.mkdir(exist_ok=True)
    for name in ("new", "cur", "tmp") if link != "Maildir" else ():
        if not link.endswith(name):
            (box / name).mkdir()
    for path in (box, *(box.iterdir() if box.is_dir() else ())):
        if path.exists():
            os.chown(path, GAMES.pw_uid, GAMES.pw_gid)  # type: ignore[union-attr]
    (homes / "games" / link).symlink_to(secret if link == "Maildir" else secret / Path(link).name)
    serve(gmta, homes, symlinks)
    send(gmta, "games@example.test")
    assert "Mailbox can't be written" in history(gmta, "games@example.test")
    assert not [name for _, _, names in os.walk(secret) for name in names]


def test_commands_and_files_of_aliases(gmta: Gmta, homes: Path) -> None:
    """They are done as the key says, and reports name neither."""
    out = homes / "games"
    (gmta.directory / "aliases").write_text(f"""run: "|/bin/sh -c 'id -u > {out}/ran; cat >> {out}/ran'"
keep: {out}/box, games
lose: "|/bin/sh -c 'echo no such queue; exit 67'"
""")
    serve(gmta, homes)
    gmta.stop()
    gmta.serve(gmta.config.read_text().replace("accept = any", f"""accept = system
aliases_file = {gmta.directory}/aliases
command_transport = commands
file_transport = files
[transport:commands]
type = pipe
aliases_file = {gmta.directory}/aliases
user = games
[transport:files]
type = mbox
aliases_file = {gmta.directory}/aliases
user = games
"""))
    send(gmta, "run@example.test", "keep@example.test")
    assert GAMES is not None
    until(lambda: (out / "ran").is_file() and "hi" in (out / "ran").read_text() and (out / "box").is_file(), "command and file")
    assert (out / "ran").read_text().startswith(f"{GAMES.pw_uid}\nReturn-Path: <a@sender.example>\nDelivered-To: run@example.test\n")
    assert (out / "box").stat().st_uid == GAMES.pw_uid
    until(lambda: "\nhi\n\n" in (out / "box").read_text(), "the whole message")
    files(out / "Maildir", 1)
    send(gmta, "lose@example.test", sender="games@example.test")
    report = files(out / "Maildir", 2)[-1].read_text() + files(out / "Maildir", 2)[0].read_text()
    assert "no such queue" in report and "lose@example.test" in report and "/bin/sh" not in report
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        send(gmta, "root@example.test")


def test_the_agent_may_die(gmta: Gmta, homes: Path) -> None:
    serve(gmta, homes)
    for count in range(1, 4):
        send(gmta, "games@example.test")
        files(homes / "games/Maildir", count)
        gone = agent(gmta)
        os.kill(gone, signal.SIGKILL)
        until(lambda gone=gone: agent(gmta) not in (0, gone), "another agent")  # type: ignore[misc]
    send(gmta, "games@example.test")
    files(homes / "games/Maildir", 4)
    assert gmta.process is not None
    before = agent(gmta)
    gmta.process.send_signal(signal.SIGHUP)
    until(lambda: before not in children(gmta.process.pid), "an agent of the new configuration")  # type: ignore[union-attr]
    send(gmta, "games@example.test")
    assert len(files(homes / "games/Maildir", 5)) == 5
    assert gmta.stop() == 0


def test_nobody_else_is_served(gmta: Gmta, homes: Path) -> None:
    """Whoever finds the agent's socket, but for root and the workers, is sent away unheard."""
    serve(gmta, homes)
    name = next(line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()
                if line.split()[-1].startswith("@") and line.split()[6] in inodes(agent(gmta)))
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            import socket

            os.setresuid(GAMES.pw_uid, GAMES.pw_uid, GAMES.pw_uid)  # type: ignore[union-attr]
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(DEADLINE_S)
                client.connect("\0" + name[1:])
                os.write(write, b"closed" if client.recv(1) == b"" else b"served")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    assert os.read(read, 10) == b"closed"
    os.close(read)


def inodes(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since
            links.append(os.readlink(entry.path))
    return {link[8:-1] for link in links if link.startswith("socket:[")}
