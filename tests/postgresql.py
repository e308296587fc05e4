"""Debian's PostgreSQL on a port and a data directory of its own; as another account where the tests run as root."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

DEADLINE_S = 60.0


def programs() -> Path | None:
    """The folder of the newest PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class PostgreSQL:
    """One server. fsync: off where power cuts are not the point."""

    def __init__(self, *, fsync: bool = False, directory: str | None = None) -> None:
        bin = programs()
        assert bin is not None, "PostgreSQL is not installed: scripts/test installs it when run as root"
        self._bin = bin
        self.directory = Path(tempfile.mkdtemp(prefix="gmta-pg-", dir=directory))
        self._account = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        if self._account is not None:
            os.chown(self.directory, self._account.pw_uid, self._account.pw_gid)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._numbers = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        data = self.directory / "data"
        self._run("initdb", "-D", str(data), "-U", "gmta", "-A", "trust", "-N", "--no-instructions", "-E", "UTF8", "--locale=C")
        with open(data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self.directory}'\n"
                       f"fsync = {'on' if fsync else 'off'}\nmax_connections = 200\nshared_buffers = 256MB\nmax_wal_size = 4GB\n"
                       "authentication_timeout = 2s\n")  # how long a shutdown waits for who has only begun to connect
        self.start()

    def _options(self) -> dict[str, object]:
        account = self._account
        return {"cwd": self.directory} | ({"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {})

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run([self._bin / name, *arguments], check=True, capture_output=True, **self._options())  # type: ignore[call-overload]

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen([self._bin / "postgres", "-D", self.directory / "data"], stdout=log, stderr=log,
                                             **self._options())  # type: ignore[call-overload]
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < end and self._process.poll() is None, (self.directory / "log").read_text()
                time.sleep(0.05)

    def stop(self, *, immediate: bool = False) -> None:
        """Ends it; immediate: as a crash does."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
            self._process.wait(DEADLINE_S)
        self._process = None

    def remove(self) -> None:
        """Ends it, with its data."""
        self.stop(immediate=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, database: str) -> str:
        """How to connect to a database."""
        return f"postgresql://gmta@127.0.0.1:{self.port}/{database}"

    def create(self) -> str:
        """A new, empty database; its URL."""
        name = f"test{os.getpid()}_{next(self._numbers)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)
