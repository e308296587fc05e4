"""gmta as a process: a written configuration, a free loopback port, a directory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 30.0
PROGRAM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def program(name: str) -> str:
    """The path of a real program; one that is missing is a failure."""
    found = shutil.which(name, path=PROGRAM_PATH)
    assert found, f"{name} is not installed: scripts/test installs it when run as root"
    return found


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(ready: Callable[[], bool], what: str) -> None:
    """Looks until `ready`; fails at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < end, f"no {what} within {DEADLINE_S:.0f} s"
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Whether something takes connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Gmta:
    """One server. `directory` is its folder, `mail` where its Maildirs are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.submission_port = free_port()
        self.mail = directory / "var/mail"
        self.config = directory / "config.ini"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, extra: str = "", *, mailboxes: str = "accept = any") -> None:
        """Writes the configuration and serves; `extra` is more of the ini file."""
        self.serve(f"""
[gmta]
hostname = mx.example.test
workers = 2
log_file = gmta.log
[listener:mx]
address = 127.0.0.1:{self.port}
[listener:submission]
address = 127.0.0.1:{self.submission_port}
role = submission
[domains]
local = example.test
[plugins]
enable = mailboxes, access, received_limit
[plugin:mailboxes]
{mailboxes}
[transport:mailbox]
type = maildir
path = var/mail/{{domain}}/{{local}}
[transport:outbound]
type = relay
[route]
local = mailbox
* = outbound
{extra}
""")

    def serve(self, text: str) -> None:
        """Serves on this configuration."""
        self.config.write_text(text)
        with open(self.directory / "output", "wb") as output:
            self.process = subprocess.Popen([sys.executable, "-m", "gmta", "serve", "-c", str(self.config)],
                                            cwd=self.directory, stdout=output, stderr=output)
        until(lambda: self._running() and listens(self.port), "banner")

    def _running(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "output").read_text()
        return True

    def command(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """`gmta ARGUMENTS -c CONFIG`, to its end."""
        return subprocess.run([sys.executable, "-m", "gmta", *arguments, "-c", str(self.config)], cwd=self.directory,
                              capture_output=True, timeout=DEADLINE_S, check=False)

    def arrived(self, local: str, count: int = 1) -> list[Path]:
        """The files in new/ of a mailbox at example.test, once there are `count`."""
        new = self.mail / "example.test" / local / "new"
        until(lambda: new.is_dir() and len(list(new.iterdir())) >= count, f"message for {local}")
        return sorted(new.iterdir())

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        process = self.process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        self.process = None
        return status


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path (sockets live in it) that other users may enter."""
    path = Path(tempfile.mkdtemp(prefix="gmta-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def gmta(directory: Path) -> Iterator[Gmta]:
    """A server that is not started yet, and stopped at the end."""
    server = Gmta(directory)
    yield server
    server.stop()
