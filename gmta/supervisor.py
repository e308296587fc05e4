"""The master process: binds the sockets, starts the workers as fresh interpreters, watches them, reloads, stops.

Imports no gevent. One SO_REUSEPORT socket per worker and listener is kept here, so that connections wait in it, and are not refused,
while a worker restarts. Signals only enqueue; `Supervisor.run` acts. SIGTERM/SIGINT stop, SIGHUP reload (a bad configuration leaves the old
one running), SIGUSR1 reopens log files. A worker that exits with 78 before it is ready can't boot: at the start that ends the supervisor.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from gmta.config import EX_CONFIG, Config, ConfigError, load

HEARTBEAT_S = 30.0
STOP_S = 40.0
READY_S = 20.0


class Process:
    """One worker process as the supervisor sees it."""

    def __init__(self, popen: subprocess.Popen[bytes], number: int, beat: int, life: int) -> None:
        self.popen = popen
        self.number = number
        self.beat = beat
        self.life = life
        self.ready = False
        self.stopping_since = 0.0
        self.last_beat = time.monotonic()


class Supervisor:
    """Keeps `config.gmta.workers` workers alive."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.config = load(path)
        self._sockets: dict[tuple[str, str, int], list[socket.socket]] = {}
        self._workers: list[Process] = []
        self._deaths: list[float] = []
        self._restart_at: dict[int, float] = {}
        self._signals: list[int] = []
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._new: tuple[Config, list[Process]] | None = None

    # -- sockets and processes --------------------------------------------------------------------------------------

    def _bind(self, config: Config) -> None:
        for name, listener in config.listeners.items():
            for host, port in listener.addresses:
                key = (name, host, port)
                have = self._sockets.setdefault(key, [])
                while len(have) < config.gmta.workers:
                    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    if sock.family == socket.AF_INET6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    try:
                        sock.bind((host, port))
                        sock.listen(4096)
                    except OSError as error:
                        sock.close()
                        raise ConfigError([f"[listener:{name}] address: can't listen on {host}:{port}: {error.strerror}"]) from error
                    have.append(sock)

    def _start(self, config: Config, number: int) -> Process:
        """Starts worker `number`; it serves every socket whose index is congruent to it."""
        count = config.gmta.workers
        sockets = [(key[0], sock.fileno()) for key, have in self._sockets.items() if key[0] in config.listeners
                   for index, sock in enumerate(have) if index % count == number]
        snapshot = os.memfd_create("gmta-config")
        os.write(snapshot, config.snapshot().encode())
        beat_read, beat_write = os.pipe()
        life_read, life_write = os.pipe()
        given = json.dumps({"config": snapshot, "sockets": sockets, "beat": beat_write, "life": life_read, "number": number})
        passed = [snapshot, beat_write, life_read, *(descriptor for _, descriptor in sockets)]
        identity: dict[str, Any] = {}
        if config.gmta.user and os.getuid() == 0:
            import pwd

            account = pwd.getpwnam(config.gmta.user)
            identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": os.getgrouplist(account.pw_name, account.pw_gid)}
        popen = subprocess.Popen([sys.executable, "-m", "gmta.worker"], pass_fds=passed, env={**os.environ, "GMTA_WORKER": given},
                                 stdin=subprocess.DEVNULL, cwd="/", start_new_session=False, **identity)
        for descriptor in (snapshot, beat_write, life_read):
            os.close(descriptor)
        os.set_blocking(beat_read, False)
        process = Process(popen, number, beat_read, life_write)
        self._selector.register(beat_read, selectors.EVENT_READ, process)
        return process

    def _forget(self, process: Process) -> None:
        self._selector.unregister(process.beat)
        os.close(process.beat)
        os.close(process.life)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until stopped; gives the exit status."""
        data_dir = self.config.gmta.data_dir
        os.makedirs(data_dir, mode=0o700, exist_ok=True)
        if self.config.gmta.user and os.getuid() == 0:
            import pwd

            account = pwd.getpwnam(self.config.gmta.user)
            os.chown(data_dir, account.pw_uid, account.pw_gid)
        shutil.rmtree(os.path.join(data_dir, "metrics"), ignore_errors=True)  # series of processes of former runs
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda signum, frame: self._signals.append(signum))
        self._selector.register(wake_read, selectors.EVENT_READ, None)
        try:
            self._bind(self.config)
        except ConfigError as error:
            print("\n".join(error.errors), file=sys.stderr)
            return EX_CONFIG
        self._workers = [self._start(self.config, number) for number in range(self.config.gmta.workers)]
        status = 0
        while True:
            for key, _ in self._selector.select(0.25):
                if key.data is None:
                    try:
                        os.read(wake_read, 512)
                    except BlockingIOError:
                        pass
                else:
                    self._heard(key.data)
            while self._signals:
                self._act(self._signals.pop(0))
            status = self._reap() or status
            self._watch()
            if self._stopping and not self._workers and self._new is None:
                return status

    def _heard(self, process: Process) -> None:
        try:
            beats = os.read(process.beat, 512)
        except BlockingIOError:
            return
        if not beats:
            return
        process.last_beat = time.monotonic()
        if not process.ready:
            process.ready = True
            waiting = self._new[1] if self._new is not None else self._workers
            if all(one.ready for one in waiting):
                if self._new is not None:
                    self._switch()
                else:
                    _notify("READY=1")

    def _act(self, signum: int) -> None:
        if signum in (signal.SIGTERM, signal.SIGINT):
            self._stopping = True
            _notify("STOPPING=1")
            for process in self._workers + (self._new[1] if self._new else []):
                self._end(process)
        elif signum == signal.SIGHUP and not self._stopping:
            self._reload()
        elif signum == signal.SIGUSR1:
            for process in self._workers:
                _send(process, signal.SIGUSR1)

    def _end(self, process: Process) -> None:
        if not process.stopping_since:
            process.stopping_since = time.monotonic()
            _send(process, signal.SIGTERM)

    def _reload(self) -> None:
        """Starts workers on the new configuration beside the old ones; the old go when all the new are ready."""
        if self._new is not None:
            return
        _notify("RELOADING=1")
        try:
            config = load(self.path)
            self._bind(config)
        except ConfigError as error:
            print("reload refused, still running on the old configuration:\n" + "\n".join(error.errors), file=sys.stderr, flush=True)
            _notify("READY=1")
            return
        self._new = (config, [self._start(config, number) for number in range(config.gmta.workers)])

    def _switch(self) -> None:
        assert self._new is not None
        for process in self._workers:
            self._end(process)
        self.config, fresh = self._new
        self._workers += fresh
        self._new = None
        _notify("READY=1")

    def _reap(self) -> int:
        status = 0
        for process in [one for one in self._workers if one.popen.poll() is not None]:
            self._workers.remove(process)
            self._forget(process)
            if process.stopping_since or self._stopping:
                continue
            if process.popen.returncode == EX_CONFIG and not process.ready:
                status, self._stopping = EX_CONFIG, True
                for other in self._workers:
                    self._end(other)
                continue
            now = time.monotonic()
            self._deaths = [at for at in self._deaths if now - at < 60] + [now]
            many = len(self._deaths) - 4  # back-off only from the fifth death in a minute, never past 10 s
            self._restart_at[process.number] = now + (min(10.0, 0.5 * 2 ** (many - 1)) if many > 0 else 0.0)
            print(f"worker {process.number} ended with status {process.popen.returncode}, starting it anew", file=sys.stderr, flush=True)
        if self._new is not None and any(one.popen.poll() is not None for one in self._new[1]):
            print("reload refused, still running on the old configuration: the new workers can't boot", file=sys.stderr, flush=True)
            for process in self._new[1]:
                _send(process, signal.SIGKILL)
                process.popen.wait()
                self._forget(process)
            self._new = None
            _notify("READY=1")
        return status

    def _watch(self) -> None:
        now = time.monotonic()
        if not self._stopping:
            for number, at in list(self._restart_at.items()):
                if now >= at:
                    del self._restart_at[number]
                    self._workers.append(self._start(self.config, number))
        for process in self._workers:
            silent = now - process.last_beat > HEARTBEAT_S
            if silent or (process.stopping_since and now - process.stopping_since > STOP_S):
                _send(process, signal.SIGKILL)


def _send(process: Process, signum: int) -> None:
    try:
        process.popen.send_signal(signum)
    except ProcessLookupError:
        pass


def _notify(state: str) -> None:
    """Tells systemd (sd_notify)."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), path)
    except OSError:
        pass
