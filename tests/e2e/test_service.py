"""gmta as a service: TLS, reload under load, a bad reload, a supervisor that dies, a plugin that breaks."""

from __future__ import annotations

import os
import re
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import DEADLINE_S, Gmta, children, program, until

BROKEN = """Breaks in one hook: raises, hangs or returns nonsense, as told."""


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate and its key."""
    pem, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run([program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-addext",
                    f"subjectAltName=DNS:{name}", "-days", "2", "-keyout", str(key), "-out", str(pem)], check=True, capture_output=True)
    return pem, key


def test_starttls_with_the_certificate_of_the_name_asked_for(gmta: Gmta, directory: Path) -> None:
    extra = ""
    for section, name in (("tls", "mx.example.test"), ("tls:other.example", "other.example")):
        pem, key = certificate(directory, name)
        extra += f"[{section}]\ncertificate = {pem}\nkey = {key}\n"
    gmta.start(extra)
    for name in ("mx.example.test", "other.example"):
        context = ssl.create_default_context(cafile=str(directory / f"{name}.pem"))
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S) as client:
            client._host = name  # the name to verify, and SNI
            client.starttls(context=context)
            client.sendmail("a@sender.test", ["you@example.test"], b"Subject: tls\r\n\r\nx\r\n")
    files = gmta.arrived("you", 2)
    assert all(re.search(rb"using TLSv1\.3 with cipher .*\n\twith ESMTPS id", file.read_bytes()) for file in files)


def both_workers(pid: int) -> list[int]:
    """The two workers of a supervisor, once it has started both."""
    until(lambda: len(children(pid)) == 2, "two workers")
    return children(pid)


def test_reload_under_load_refuses_nobody_and_loses_nothing(gmta: Gmta) -> None:
    gmta.start()
    assert gmta.process is not None
    before = set(both_workers(gmta.process.pid))
    load = subprocess.Popen([program("smtp-source"), "-s", "5", "-m", "1500", "-l", "2000", "-f", "a@sender.test", "-t", "you@example.test",
                             f"127.0.0.1:{gmta.port}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    gmta.arrived("you", 100)  # it is under way
    gmta.process.send_signal(signal.SIGHUP)
    said, _ = load.communicate(timeout=DEADLINE_S)
    assert load.returncode == 0, said
    gmta.arrived("you", 1500)
    assert gmta.process is not None
    pid = gmta.process.pid
    until(lambda: len(children(pid)) == 2 and not before & set(children(pid)), "new workers alone")
    assert len(gmta.arrived("you", 1500)) == 1500


def test_a_bad_configuration_is_refused_and_the_old_one_stays(gmta: Gmta, directory: Path) -> None:
    gmta.start()
    assert gmta.process is not None
    before = both_workers(gmta.process.pid)
    gmta.config.write_text(gmta.config.read_text() + "[bogus]\n")
    gmta.process.send_signal(signal.SIGHUP)
    until(lambda: b"[bogus]: unknown section" in (directory / "output").read_bytes(), "refusal")
    assert children(gmta.process.pid) == before


def test_workers_leave_when_the_supervisor_dies(gmta: Gmta) -> None:
    gmta.start()
    assert gmta.process is not None
    workers = both_workers(gmta.process.pid)
    gmta.process.kill()
    gmta.process.wait()
    until(lambda: not any(running(worker) for worker in workers), "end of the workers")


def test_a_port_that_another_server_has_is_refused(gmta: Gmta) -> None:
    gmta.start()
    second = subprocess.run([sys.executable, "-m", "gmta", "serve", "-c", str(gmta.config)], capture_output=True, text=True, timeout=DEADLINE_S)
    assert second.returncode == 78
    assert f"can't listen on 127.0.0.1:{gmta.port}: Address already in use" in second.stderr


def test_a_new_server_starts_beside_the_workers_of_one_that_was_killed(gmta: Gmta) -> None:
    gmta.start()
    assert gmta.process is not None
    with socket.create_connection(("127.0.0.1", gmta.port)) as kept:  # a session under way keeps a worker alive
        kept.recv(100)
        kept.sendall(b"EHLO c.test\r\nMAIL FROM:<a@b.test>\r\n")
        kept.recv(1000)
        gmta.process.kill()
        gmta.process.wait()
        gmta.start()
        until(lambda: greets(gmta.port), "banner")  # one who came as a worker closed its socket is reset


def greets(port: int) -> bool:
    """Whether a new connection gets a banner."""
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            return connection.recv(100).startswith(b"220")
    except ConnectionError:
        return False


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_replaced(gmta: Gmta) -> None:
    gmta.start()
    assert gmta.process is not None
    pid = gmta.process.pid
    victim = both_workers(pid)[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(children(pid)) == 2 and victim not in children(pid), "replacement")
    for _ in range(4):
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S) as client:
            client.sendmail("a@sender.test", ["you@example.test"], b"Subject: x\r\n\r\nx\r\n")
    gmta.arrived("you", 4)


STAGES = ["check_connect", "check_helo", "check_mail", "permit_rcpt", "check_rcpt", "check_data", "check_message", "edit_message", "get_signatures"]


@pytest.mark.parametrize("way", ["raise ValueError('boom')", "gevent.sleep(9)", "return 'nonsense'"])
def test_a_broken_plugin_defers_and_others_do_not_notice(gmta: Gmta, directory: Path, way: str) -> None:
    hooks = "\n".join(f"""
    @hookimpl
    def {hook}(self, session):
        if session.peer_ip == "127.0.0.2" and (session.helo == "{hook}.test" or "{hook}" == "check_connect" and self.connect):
            {way}
""" for hook in STAGES)
    (directory / "plugins").mkdir()
    (directory / "plugins" / "broken.py").write_text(f'''"""{BROKEN}"""
import gevent
from gmta import hookimpl, PluginConfig


class Config(PluginConfig):
    connect: bool = False


class Plugin:
    def __init__(self, config, services):
        self.connect = config.connect
{hooks}''')
    gmta.start()
    text = (gmta.config.read_text() + "[plugin:broken]\ntimeout = 200ms\n").replace("enable = mailboxes", f"path = {directory}/plugins\nenable = broken, mailboxes")
    for connect in (False, True):
        gmta.stop()
        gmta.serve(text.replace("timeout = 200ms", f"timeout = 200ms\nconnect = {'yes' if connect else 'no'}"))
        for hook in STAGES:
            if (hook == "check_connect") is not connect:
                continue
            with pytest.raises((smtplib.SMTPResponseException, smtplib.SMTPRecipientsRefused)) as refused:
                send(gmta, hook, "127.0.0.2")
            error = refused.value
            code = error.smtp_code if isinstance(error, smtplib.SMTPResponseException) else next(iter(error.recipients.values()))[0]
            assert code == 451, hook
            send(gmta, hook, "127.0.0.1")
            assert f"plugin=broken hook={hook}" in (directory / "gmta.log").read_text()
    assert len(gmta.arrived("you", len(STAGES))) == len(STAGES)


def send(gmta: Gmta, hook: str, source: str) -> None:
    """One message, said hello to as the hook's name."""
    with smtplib.SMTP(local_hostname=f"{hook}.test", timeout=DEADLINE_S, source_address=(source, 0)) as client:
        code, said = client.connect("127.0.0.1", gmta.port)
        if code != 220:
            raise smtplib.SMTPConnectError(code, said)
        client.ehlo_or_helo_if_needed()
        client.sendmail("a@sender.test", ["you@example.test"], b"Subject: x\r\n\r\nx\r\n")
