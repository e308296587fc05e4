"""gmta as a process: a written configuration, a free loopback port, a directory of its own."""

from __future__ import annotations

import imaplib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from io import StringIO
from pathlib import Path

import pytest

DEADLINE_S = 30.0
ROOT = os.getuid() == 0
OWNER = pwd.getpwnam("nobody") if ROOT else pwd.getpwuid(os.getuid())  # Dovecot serves no mailbox of root
UNPACKED = Path(__file__).resolve().parents[1] / "data/exim4/usr/sbin"  # its package and Postfix's exclude one another
PROGRAM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:{UNPACKED}"


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


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    """The arguments of a process, empty where it has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _parsed(text: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


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
        text = self.configuration(f"""
[gmta]
workers = 2
[listener:submission]
address = 127.0.0.1:{self.submission_port}
role = submission
[plugins]
enable = mailboxes, access, received_limit
[transport:outbound]
type = relay
[route]
* = outbound
""", mailboxes=mailboxes)
        self.serve(f"{text}{extra}\n")

    def configuration(self, sections: str = "", *, mailboxes: str = "accept = any") -> str:
        """The ini file of a host for example.test with a worker, one MX port and Maildirs.

        sections: more of it; a key there goes before the one here, and a transport with a type of its own before the whole section.
        """
        merged, given = _parsed(f"""
[gmta]
hostname = mx.example.test
workers = 1
log_file = gmta.log
[listener:mx]
address = 127.0.0.1:{self.port}
[domains]
local = example.test
[plugins]
enable = mailboxes, access
[plugin:mailboxes]
{mailboxes}
[transport:mailbox]
type = maildir
path = var/mail/{{domain}}/{{local}}
[route]
local = mailbox
"""), _parsed(sections)
        for section in given.sections():
            if given.has_option(section, "type"):
                merged.remove_section(section)
        merged.read_dict(given)
        text = StringIO()
        merged.write(text)
        return text.getvalue()

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


def dovecot_user(name: str, home: Path, more: str = "") -> str:
    """A line of a passwd-file for Dovecot."""
    return f"{name}:secret:{OWNER.pw_uid}:{OWNER.pw_gid}::{home}::{more}\n"


class Dovecot:
    """A server of our own with IMAP and LMTP: no configuration, port or directory of the system's."""

    def __init__(self, directory: Path, users: str, more: str) -> None:
        """users: a passwd-file; more: of the configuration."""
        me = pwd.getpwuid(os.getuid()).pw_name
        self.imap_port, self.lmtp_port = free_port(), free_port()
        self.socket = directory / "lmtp"
        self._directory = directory / "dovecot"
        self._directory.mkdir()
        self._directory.chmod(0o755)
        (self._directory / "users").write_text(users)
        config = self._directory / "dovecot.conf"
        services = "\n".join(f"service {name} {{\n  chroot =\n}}" for name in ("anvil", "stats"))
        config.write_text(f"""
base_dir = {self._directory}/run
state_dir = {self._directory}/state
log_path = {self._directory}/log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
disable_plaintext_auth = no
auth_username_format = %n
default_internal_user = {'dovecot' if ROOT else me}
default_login_user = {'dovenull' if ROOT else me}
default_internal_group = {'dovecot' if ROOT else me}
first_valid_uid = 1
first_valid_gid = 0
passdb {{
  driver = passwd-file
  args = scheme=plain {self._directory}/users
}}
userdb {{
  driver = passwd-file
  args = {self._directory}/users
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {self.imap_port}
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service lmtp {{
  unix_listener {self.socket} {{
    mode = 0666
  }}
  inet_listener lmtp {{
    port = {self.lmtp_port}
  }}
}}
{services}
{more}
""")
        self._process = subprocess.Popen([program("dovecot"), "-F", "-c", str(config)])
        try:
            until(lambda: self._running() and listens(self.imap_port) and listens(self.lmtp_port) and self.socket.exists(), "Dovecot")
        except BaseException:
            self.stop()
            raise

    def _running(self) -> bool:
        assert self._process.poll() is None, self.log()
        return True

    def log(self) -> str:
        """What Dovecot said."""
        file = self._directory / "log"
        return file.read_text() if file.exists() else ""

    def imap(self, user: str) -> imaplib.IMAP4:
        """A session of a user."""
        client = imaplib.IMAP4("127.0.0.1", self.imap_port, timeout=DEADLINE_S)
        try:
            client.login(user, "secret")
        except imaplib.IMAP4.error as error:
            raise AssertionError(self.log()) from error
        return client

    def stop(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(DEADLINE_S)


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


@pytest.fixture
def dovecot(directory: Path) -> Iterator[Callable[[str, str], Dovecot]]:
    """Starts Dovecot with users and more of its configuration; stopped at the end."""
    started: list[Dovecot] = []

    def start(users: str, more: str) -> Dovecot:
        started.append(Dovecot(directory, users, more))
        return started[-1]

    yield start
    for server in started:
        server.stop()
