"""Where mail ends, with the programs that serve it: Dovecot's quota, LMTP and Sieve, Cyrus's LMTP, procmail and maildrop, commands across kills."""

from __future__ import annotations

import imaplib
import json
import os
import re
import shutil
import signal
import smtplib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gmta.services.maildirsize import Limits, count_usage, read_usage
from tests.e2e.conftest import (
    DEADLINE_S,
    OWNER,
    ROOT,
    Dovecot,
    Gmta,
    children,
    dovecot_user,
    free_port,
    listens,
    program,
    until,
)

pytestmark = pytest.mark.e2e

QUOTA = Limits(100 * 1024 * 1024, 100_000)


def owned(path: Path) -> Path:
    """A directory for the mailboxes' owner."""
    path.mkdir(parents=True)
    os.chown(path, OWNER.pw_uid, OWNER.pw_gid)
    return path


def serve(gmta: Gmta, rest: str, workers: int = 2) -> None:
    gmta.serve(gmta.configuration(f"""
[gmta]
workers = {workers}
[plugins]
enable = mailboxes, access, received_limit, maildir
[transport:mailbox]
{rest}
"""))


def send(gmta: Gmta, *recipients: str, subject: str = "hello", sender: str = "alice@sender.test", more: str = "") -> dict[str, Any]:
    """One message; the recipients that were refused."""
    with smtplib.SMTP("127.0.0.1", gmta.port, "client.test", timeout=DEADLINE_S) as client:
        return client.sendmail(sender, recipients, f"From: Alice <alice@sender.test>\r\nSubject: {subject}\r\n\r\nHello.\r\n{more}")


def load(gmta: Gmta, count: int, size: int = 2000) -> None:
    """Many messages for you@example.test."""
    subprocess.run([program("smtp-source"), "-s", "16", "-m", str(count), "-l", str(size), "-f", "alice@sender.test", "-t", "you@example.test",
                    f"127.0.0.1:{gmta.port}"], check=True, timeout=120)


def settled(gmta: Gmta) -> None:
    """Returns when the queue is empty."""
    until(lambda: json.loads(gmta.command("queue", "list", "--json").stdout) == [], "empty queue")


# --- Dovecot ----------------------------------------------------------------------------------------------------


def usage_over_imap(client: imaplib.IMAP4) -> tuple[int, int]:
    """(KB, messages) as Dovecot tells its user."""
    _, answer = client.getquotaroot("INBOX")
    match = re.search(rb"STORAGE (\d+) 102400 MESSAGE (\d+) 100000", repr(answer).encode())
    assert match, answer
    return int(match[1]), int(match[2])


def test_quota_agrees_with_dovecot(gmta: Gmta, directory: Path, dovecot: Callable[[str, str], Dovecot]) -> None:
    """After a thousand deliveries, three hundred expunges and some more deliveries both keep the same maildirsize, and it is right."""
    box = owned(directory / "mail") / "example.test/you"
    owner = f"owner = {OWNER.pw_name}" if ROOT else ""
    serve(gmta, f"type = maildir\npath = mail/{{domain}}/{{local}}\nquota = 100MB\nquota_messages = 100000\n{owner}")
    server = dovecot(dovecot_user("you", directory), f"""
mail_location = maildir:{box}
mail_plugins = quota
protocol imap {{
  mail_plugins = quota imap_quota
}}
plugin {{
  quota = maildir:User quota
  quota_rule = *:storage=100M:messages=100000
}}
""")

    def check(count: int) -> None:
        top = os.open(box, os.O_RDONLY)
        try:
            found, (counted, _) = read_usage(top, QUOTA, 0.0), count_usage(top)
        finally:
            os.close(top)
        assert counted.messages == count
        assert found is not None and found[:2] == counted[:2], (box / "maildirsize").read_text()
        with server.imap("you") as client:
            assert usage_over_imap(client) == (-(-counted.octets // 1024), count)  # in whole KB, upwards

    load(gmta, 1000)
    settled(gmta)
    assert len(list((box / "new").iterdir())) == 1000 and not list((box / "tmp").iterdir())
    check(1000)
    with server.imap("you") as client:
        assert client.select("INBOX") == ("OK", [b"1000"])
        client.store("1:300", "+FLAGS", r"(\Deleted)")
        client.expunge()
    check(700)
    load(gmta, 20)
    settled(gmta)
    check(720)
    assert (box / "maildirsize").stat().st_size <= 5120
    assert gmta.stop() == 0


def test_full_mailbox_in_the_dialogue(gmta: Gmta) -> None:
    serve(gmta, "type = maildir\npath = var/mail/{domain}/{local}\nquota = 5KB")
    load(gmta, 2)
    gmta.arrived("you", 2)
    with smtplib.SMTP("127.0.0.1", gmta.port, "client.test", timeout=DEADLINE_S) as client:
        client.ehlo()
        client.mail("alice@sender.test", ["SIZE=3000"])
        assert client.rcpt("you@example.test") == (552, b"5.2.2 Mailbox is full")
        assert client.rcpt("other@example.test")[0] == 250
        client.rset()
        client.mail("alice@sender.test", ["SIZE=100"])
        assert client.rcpt("you+detail@example.test")[0] == 250  # some room is left, and the size is known
    assert gmta.stop() == 0


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_lmtp_with_sieve(gmta: Gmta, directory: Path, dovecot: Callable[[str, str], Dovecot], by: str) -> None:
    """Dovecot files by Sieve, and says for each recipient what became of it; the sender is told about those that failed."""
    homes = owned(directory / "homes")
    script = directory / "default.sieve"
    script.write_text('require ["fileinto", "mailbox"];\nif header :contains "subject" "invoice" { fileinto :create "Bills"; }\n')
    os.chown(directory, OWNER.pw_uid, OWNER.pw_gid)  # where the script's binary goes
    names = ("you", "alice", "full")
    users = "".join(dovecot_user(name, owned(homes / name), "userdb_quota_rule=*:bytes=1" if name == "full" else "") for name in names)
    server = dovecot(users, f"""
mail_location = maildir:~/Maildir
protocol lmtp {{
  mail_plugins = quota sieve
}}
plugin {{
  quota = maildir:User quota
  quota_rule = *:storage=100M
  sieve_default = {script}
  sieve = file:~/sieve;active=~/.dovecot.sieve
}}
""")
    host = f"unix:{server.socket}" if by == "unix" else f"127.0.0.1:{server.lmtp_port}"
    serve(gmta, f"type = lmtp\nhost = {host}\n", workers=1)

    def filed(name: str, folder: str, count: int) -> None:
        until(lambda: len(list((homes / name / "Maildir" / folder / "new").glob("*"))) == count, f"message in {folder or 'INBOX'} of {name}")

    send(gmta, "you@example.test", subject="your invoice")
    filed("you", ".Bills", 1)
    send(gmta, "you@example.test")
    filed("you", "", 1)
    send(gmta, "you@example.test", "full@example.test", "nobody-here@example.test", sender="alice@example.test")
    filed("you", "", 2)
    filed("alice", "", 1)
    said = b"".join(file.read_bytes() for file in (homes / "alice/Maildir/new").iterdir()).decode()
    assert re.search(r"^Status: 5\.2\.2", said, re.M) and re.search(r"^Status: 5\.1\.1", said, re.M), said
    settled(gmta)
    assert gmta.stop() == 0


# --- Cyrus ------------------------------------------------------------------------------------------------------


class Cyrus:
    """A server of our own with LMTP by Unix socket and TCP; it makes mailboxes of 8 KB for some users when their first mail comes."""

    def __init__(self, directory: Path, *users: str) -> None:
        top = directory / "cyrus"
        programs = "/usr/lib/cyrus/bin"
        assert Path(f"{programs}/master").exists(), "cyrus-imapd is not installed: scripts/test installs it when run as root"
        self.port, self.socket, self._spool = free_port(), top / "conf/socket/lmtp", top / "spool"
        for path in (self._spool, *(top / "conf" / name for name in ("db", "socket", "proc", "lock"))):
            path.mkdir(parents=True)
        (top / "imapd.conf").write_text(f"""configdirectory: {top}/conf
partition-default: {self._spool}
defaultpartition: default
cyrus_user: {"cyrus" if ROOT else OWNER.pw_name}
autocreate_post: yes
autocreate_quota: 8
autocreate_users: {" ".join(users)}
lmtp_over_quota_perm_failure: yes
servername: cyrus.test
""")
        (top / "cyrus.conf").write_text(f"""START {{
  recover cmd="{programs}/ctl_cyrusdb -C {top}/imapd.conf -r"
}}
SERVICES {{
  lmtpunix cmd="{programs}/lmtpd -C {top}/imapd.conf" listen="{self.socket}" prefork=0
  lmtp cmd="{programs}/lmtpd -C {top}/imapd.conf -a" listen="127.0.0.1:{self.port}" prefork=0
}}
EVENTS {{
}}
""")
        if ROOT:
            for path, _, _ in os.walk(top):
                shutil.chown(path, "cyrus", "mail")
        self._process = subprocess.Popen([f"{programs}/master", "-D", "-C", str(top / "imapd.conf"), "-M", str(top / "cyrus.conf"), "-p", str(top / "pid")],
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: self._process.poll() is None and listens(self.port) and self.socket.exists(), "Cyrus")
        except BaseException:
            self.stop()
            raise

    def messages(self) -> list[str]:
        """All that it has stored."""
        return [path.read_text() for path in self._spool.rglob("*") if re.fullmatch(r"[0-9]+\.", path.name)]

    def stop(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(DEADLINE_S)


@pytest.fixture
def cyrus(directory: Path) -> Iterator[Cyrus]:
    """With the users you, alice, full and bob."""
    server = Cyrus(directory, "you", "alice", "full", "bob")
    yield server
    server.stop()


@pytest.mark.parametrize("by", ["unix", "tcp"])
def test_lmtp_to_cyrus(gmta: Gmta, cyrus: Cyrus, by: str) -> None:
    """Cyrus says for each recipient what became of it, at RCPT and behind the message; connections are used again."""
    serve(gmta, f"type = lmtp\nhost = {f'unix:{cyrus.socket}' if by == 'unix' else f'127.0.0.1:{cyrus.port}'}\n", workers=1)
    pad = "x" * 70 + "\r\n"
    for count in (1, 2):
        send(gmta, "full@example.test", subject="first", more=pad * 90)
        until(lambda count=count: len(cyrus.messages()) == count, "a message")  # type: ignore[misc]
    send(gmta, "you@example.test", "full@example.test", "nobody-here@example.test", subject="second", sender="alice@example.test", more=pad * 60)
    until(lambda: len(cyrus.messages()) == 4, "one message more and a report")
    assert sum("Subject: second\n" in text.replace("\r", "").partition("\n\n")[0] for text in cyrus.messages()) == 1
    report = next(text for text in cyrus.messages() if "Action: failed" in text)
    assert re.search(r"full@example.test.*?^Status: 5\.2\.2", report, re.M | re.S) and re.search(r"nobody-here@example.test.*?^Status: 5\.1\.1", report, re.M | re.S)
    assert "you@example.test" not in report.partition("Content-Type: message/delivery-status")[2].partition("--")[0]
    for number in range(12):
        send(gmta, "bob@example.test", subject=f"more {number}")
    settled(gmta)
    assert len(cyrus.messages()) == 16
    assert gmta.stop() == 0


# --- commands ---------------------------------------------------------------------------------------------------


def test_procmail_and_maildrop(gmta: Gmta, directory: Path) -> None:
    box = directory / "box"
    (directory / "procmailrc").write_text(f"MAILDIR={directory}\nDEFAULT={box}/\nLOGFILE={directory}/procmail.log\n"
                                          f":0\n* ^Subject: refused\n{{\nEXITCODE=77\n:0\n/dev/null\n}}\n")
    (directory / "maildroprc").write_text(f'if (/^Subject: file/)\n{{\nto "{directory}/other"\n}}\nEXITCODE=75\nexit\n')
    (directory / "procmailrc").chmod(0o644)
    (directory / "maildroprc").chmod(0o600)
    for part in ("cur", "new", "tmp"):
        (directory / "other" / part).mkdir(parents=True)
    serve(gmta, f"type = pipe\ncommand = procmail -f {{sender}} {directory}/procmailrc\n"
                f"[transport:maildrop]\ntype = pipe\ncommand = maildrop {directory}/maildroprc\n"
                "[transport:reports]\ntype = maildir\npath = var/mail/{domain}/{local}\n")
    config = gmta.config.read_text().replace("[route]", "[route]\ndrop@example.test = maildrop\nalice@example.test = reports")
    gmta.stop()
    gmta.serve(config)
    send(gmta, "you@example.test")
    until(lambda: (box / "new").is_dir() and len(list((box / "new").iterdir())) == 1, "message by procmail")
    (file,) = (box / "new").iterdir()
    assert file.read_text().startswith("Return-Path: <alice@sender.test>\nDelivered-To: you@example.test\nReceived: ")
    send(gmta, "drop@example.test", subject="file this")
    until(lambda: len(list((directory / "other/new").iterdir())) == 1, "message by maildrop")
    send(gmta, "you@example.test", subject="refused", sender="alice@example.test")
    (report,) = gmta.arrived("alice")
    assert "Status: 5.7.0" in report.read_text() and "ended with status 77 (permission denied)" in report.read_text()
    send(gmta, "drop@example.test", subject="later")
    until(lambda: b"status 75" in gmta.command("queue", "list", "--json").stdout, "deferral by maildrop")
    assert gmta.stop() == 0


def taken_across_kills(gmta: Gmta, kills: int) -> set[str]:
    """Subjects of what was taken while workers were killed; returns when nothing is queued any more."""
    assert gmta.process is not None
    pid = gmta.process.pid
    taken: set[str] = set()
    over = threading.Event()

    def client(number: int) -> None:
        serial = 0
        while not over.is_set():
            try:
                with smtplib.SMTP("127.0.0.1", gmta.port, "client.test", timeout=DEADLINE_S) as session:
                    while not over.is_set():
                        serial += 1
                        subject = f"message {number}-{serial}"
                        session.sendmail("alice@sender.test", ["you@example.test"],
                                         f"Subject: {subject}\r\n\r\n" + "text\r\n" * 500 + "-- end of message\r\n")
                        taken.add(subject)
            except (smtplib.SMTPException, OSError):
                continue  # its worker was killed

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for victims in range(1, kills + 1):
            until(lambda victims=victims: len(taken) > 25 * victims and len(children(pid)) == 2, "more mail")  # type: ignore[misc]
            os.kill(children(pid)[victims % 2], signal.SIGKILL)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    settled(gmta)
    return taken


def test_no_message_is_lost_to_a_command_across_kills(gmta: Gmta, directory: Path) -> None:
    """Every message that was taken reaches the command, and always whole, whichever worker is killed when."""
    script = directory / "note"
    script.write_text(f"#!/bin/sh\nset -e\ntext=$(cat)\ncase $text in *'-- end of message') ;; *) echo partial >> {directory}/partial;; esac\n"
                      f"echo \"$text\" | sed -n 's/^Subject: //p' >> {directory}/noted\n")
    script.chmod(0o755)
    serve(gmta, f"type = pipe\ncommand = {script}\n")
    taken = taken_across_kills(gmta, 4)
    noted = (directory / "noted").read_text().splitlines()
    assert taken <= set(noted), f"{len(taken - set(noted))} of {len(taken)} lost"
    assert not (directory / "partial").exists()
    assert gmta.stop() == 0


def test_every_message_is_once_in_the_maildir_across_kills(gmta: Gmta) -> None:
    serve(gmta, "type = maildir\npath = var/mail/{domain}/{local}\nquota = 1GB\n")
    taken = taken_across_kills(gmta, 6)
    box = gmta.mail / "example.test/you"
    texts = [file.read_text() for file in (box / "new").iterdir()]
    found = [text.partition("\nSubject: ")[2].partition("\n")[0] for text in texts]
    assert taken <= set(found), f"{len(taken - set(found))} of {len(taken)} lost"
    assert len(found) == len(set(found))
    assert all(text.endswith("-- end of message\n") for text in texts)
    assert gmta.stop() == 0
