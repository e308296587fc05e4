"""sendmail as programs of the machine call it: cron, PHP's mail(), mutt, s-nail, a mailing list with -bs; with the server up and down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import DEADLINE_S, Gmta, program

pytestmark = pytest.mark.e2e

CRON = """From: root (Cron Daemon)
To: operator
Subject: Cron <root@host> backup
Content-Type: text/plain; charset=UTF-8
Content-Transfer-Encoding: 8bit

done: é
.
after
"""
PHP = ('if (!mail("php@example.test", "Subject", "Hallo\\nWelt\\n.\\nEnde", "From: web@example.test\\r\\nBcc: hidden@example.test", '
       '"-fbounces@example.test")) exit(1);')


class Machine:
    """A host whose programs find a sendmail of ours."""

    def __init__(self, gmta: Gmta) -> None:
        self.gmta = gmta
        self.sendmail = gmta.directory / "sendmail"
        self.sendmail.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from gmta.cli.sendmail import main; main()" "$@"\n')
        self.sendmail.chmod(0o755)

    def run(self, *arguments: str, text: str = "", status: int = 0) -> str:
        """A program, to its end; what it said."""
        done = subprocess.run([program(arguments[0]), *arguments[1:]], input=text.encode(), capture_output=True, timeout=DEADLINE_S, check=False,
                              cwd=self.gmta.directory, env={**os.environ, "HOME": str(self.gmta.directory), "LC_ALL": "C.UTF-8",
                                                            "GMTA_CONFIG": str(self.gmta.config)})
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        return (done.stdout + done.stderr).decode()

    def arrived(self, local: str) -> tuple[str, str]:
        """(header, body) of the one message there."""
        (file,) = self.gmta.arrived(local)
        header, _, body = file.read_text(encoding="utf-8").partition("\n\n")
        return header, body


@pytest.fixture
def machine(gmta: Gmta) -> Machine:
    made = Machine(gmta)
    gmta.start()
    return made


def test_programs_send(machine: Machine) -> None:
    sendmail = str(machine.sendmail)
    machine.run(sendmail, "-FCronDaemon", "-i", "-B8BITMIME", "-oem", "operator", text=CRON)
    machine.run("php", "-n", "-d", f"sendmail_path={sendmail} -t -i", "-r", PHP)
    machine.run("mutt", "-n", "-F", "/dev/null", "-e", f'set sendmail="{sendmail} -oem -oi"', "-e", "set copy=no", "-e", "set from=me@example.test",
                "-e", "set use_envelope_from=yes", "-s", "Subject", "mutt@example.test", text="Hello\n")
    machine.run("s-nail", "-:/", "-Sv15-compat", f"-Smta={sendmail}", "-r", "me@example.test", "-s", "Subject", "s-nail@example.test", text="Hello\n")
    machine.run("swaks", "--pipe", f"{sendmail} -bs", "--from", "list@example.test", "--to", "swaks@example.test", "--body", "Hello")
    header, body = machine.arrived("operator")
    assert body == "done: é\n.\nafter\n" and "\nFrom: root@example.test (Cron Daemon)\nTo: operator@example.test\n" in header
    header, body = machine.arrived("php")
    assert header.startswith("Return-Path: <bounces@example.test>\n") and "\nFrom: web@example.test\n" in header and "\nMessage-ID: <" in header
    assert body == "Hallo\nWelt\n.\nEnde\n" and "bcc" not in header.lower()
    assert machine.arrived("hidden")[1] == body
    for name, sender in (("mutt", "me"), ("s-nail", "me"), ("swaks", "list")):
        header, body = machine.arrived(name)
        assert header.startswith(f"Return-Path: <{sender}@example.test>\n") and body.startswith("Hello\n"), name


def test_options(machine: Machine) -> None:
    sendmail, text = str(machine.sendmail), "Subject: x\n\nx\n"
    machine.run(sendmail, "-N", "success", "-R", "hdrs", "-V", "reference-1", "-f", "me@example.test", "told@example.test", text=text)
    report = machine.arrived("me")[1]
    assert "Original-Envelope-Id: reference-1" in report and "\nAction: delivered\n" in report and "rfc822-headers" in report
    machine.run(sendmail, "-f", "<>", "-odi", "-OErrorMode=p", "-h", "5", "-Uv", "--", "null@example.test", text=text)
    assert machine.arrived("null")[0].startswith("Return-Path: <>\n")
    machine.run(sendmail, "-G", "-i", "passed@example.test", text="Subject: only\n\nx\n")
    header = machine.arrived("passed")[0]
    assert header.endswith("\nSubject: only")  # nothing added but the trace
    assert "left in the maildrop as" in machine.run(sendmail, "-v", "a@example.test, B <b@example.test>", text=text)
    assert machine.arrived("b")
    for status, arguments in ((64, ["-Q"]), (64, []), (64, ["-bd"]), (64, ["-N", "perhaps", "a@example.test"]), (67, ["a@@b"]), (64, ["-t"])):
        machine.run(sendmail, *arguments, text=text, status=status)
    machine.run(sendmail, "-t", text="To: a@@b\n\nx\n", status=65)
    for arguments in (["-q"], ["-qRexample.test"], ["-q30m"], ["-bi"], ["-I"]):
        machine.run(sendmail, *arguments)
    assert "empty" in machine.run(sendmail, "-bp")


def test_while_the_server_is_down(machine: Machine) -> None:
    gmta = machine.gmta
    gmta.stop()
    machine.run(str(machine.sendmail), "later@example.test", text="Subject: x\n\nx\n")
    assert "1 in the maildrop" in machine.run(str(machine.sendmail), "-bp")
    gmta.serve(Path(gmta.config).read_text())
    assert machine.arrived("later")
