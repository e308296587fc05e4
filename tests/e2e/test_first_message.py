"""A message from swaks into a Maildir, and out of it again over Dovecot's IMAP, octet for octet."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import DEADLINE_S, OWNER, Dovecot, Gmta, dovecot_user, program, until

pytestmark = pytest.mark.e2e

MESSAGE = (
    "From: Alice <alice@sender.test>\n"
    "To: you@example.test\n"
    "Subject: first message\n"
    "X-Folded: one\n"
    "\ttwo\n"
    "Message-ID: <first@sender.test>\n"
    "\n"
    "Plain text, Grüße, and blanks at the end:   \n"
    ".\n"
    "..two dots\n"
    ".dot and text\n"
    + "x" * 990 + "\n"
    "\n"
    "last line\n"
).encode()


def swaks(server: Gmta, *arguments: str, to: str = "you@example.test") -> subprocess.CompletedProcess[str]:
    """One run of swaks against the server's MX port."""
    return subprocess.run(
        [program("swaks"), "--server", f"127.0.0.1:{server.port}", "--helo", "client.test", "--from", "alice@sender.test",
         "--to", to, *arguments],
        capture_output=True, text=True, errors="replace", timeout=DEADLINE_S, check=False)


def send(server: Gmta, directory: Path, to: str = "you@example.test") -> str:
    """Sends MESSAGE; the queue id of the 250."""
    file = directory / "message"
    file.write_bytes(MESSAGE.removesuffix(b"\n"))  # swaks ends the last line itself
    done = swaks(server, "--data", f"@{file}", to=to)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"250 2\.0\.0 queued as (\S+)", done.stdout)
    assert match, done.stdout
    return match[1]


def below_trace(stored: bytes) -> bytes:
    """The message from its first own field on."""
    return stored[stored.index(b"From: Alice"):]


def test_swaks_to_maildir(gmta: Gmta, directory: Path) -> None:
    gmta.start()
    queue_id = send(gmta, directory)
    (file,) = gmta.arrived("you")
    stored = file.read_bytes()
    assert below_trace(stored) == MESSAGE
    trace = stored[:stored.index(b"From: Alice")].decode()
    fields = re.findall(r"^([A-Za-z-]+):", trace, re.M)
    assert fields[:3] == ["Return-Path", "Delivered-To", "Received"]
    assert fields.count("Received") == 1
    assert "Return-Path: <alice@sender.test>\n" in trace
    assert queue_id in trace
    assert "client.test" in trace
    assert "[127.0.0.1]" in trace

    until(lambda: json.loads(gmta.command("queue", "list", "--json").stdout) == [], "empty queue")
    history = gmta.command("trace", queue_id)
    assert history.returncode == 0, history.stderr
    assert b"you@example.test" in history.stdout
    assert gmta.stop() == 0


@pytest.mark.parametrize("to,code", [
    ("someone@elsewhere.test", "550"),
    ("someone%elsewhere.test@example.test", "550"),
    ("elsewhere.test!someone@example.test", "550"),
    ('"someone@elsewhere.test"@example.test', "550"),
    ("nobody@example.test", "550"),
])
def test_refused_recipients(gmta: Gmta, to: str, code: str) -> None:
    gmta.start(mailboxes="mailboxes = you@example.test")
    done = swaks(gmta, "--quit-after", "RCPT", to=to)
    assert done.returncode == 24, done.stdout  # swaks: no recipient was accepted
    assert re.search(rf"<\*\* {code} 5\.1\.[13] |<\*\* {code} 5\.7\.1 ", done.stdout), done.stdout


def test_dovecot_serves_what_was_sent(gmta: Gmta, directory: Path, dovecot: Callable[[str, str], Dovecot]) -> None:
    gmta.start()
    send(gmta, directory)
    (file,) = gmta.arrived("you")
    maildir, home = file.parent.parent, directory / "home"
    home.mkdir()
    for path in (home, maildir, *maildir.rglob("*")):
        os.chown(path, OWNER.pw_uid, OWNER.pw_gid)
    for parent in maildir.parents:
        if directory in parent.parents:
            parent.chmod(0o755)
    server = dovecot(dovecot_user("you", home), f"mail_location = maildir:{maildir}:CONTROL={home}/control")
    with server.imap("you") as imap:
        until(lambda: imap.select("INBOX") == ("OK", [b"1"]), "message in INBOX")
        _, data = imap.fetch("1", "(BODY.PEEK[])")
        assert isinstance(data[0], tuple)
        assert below_trace(data[0][1]) == MESSAGE.replace(b"\n", b"\r\n")
