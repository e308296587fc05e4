"""The master process: binds the sockets, starts the workers as fresh interpreters, watches them, reloads, stops.

Imports no gevent. One SO_REUSEPORT socket per worker and listener is kept here, so that connections wait in it, and are not refused,
while a worker restarts; a socket that systemd gave is shared by all workers instead. Signals only enqueue; `step` acts.
SIGTERM/SIGINT stop, SIGHUP reload (a bad configuration leaves the old one and its sockets as they are), SIGUSR1 reopens log files.
A worker that exits with 78 before it is ready can't boot: at the start that ends the supervisor, in a reload only the reload.
Failure: ConfigError from the constructor and status 78 from `run`, with every error on standard error.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from gmta.config import ACME, EX_CONFIG, Config, ConfigError, load
from gmta.queue import maildrop
from gmta.services.log import Log
from gmta.systemd import Given, Notifier, given_sockets

HEARTBEAT_S = 30.0  # a worker silent for so long is killed, while it boots too
STOP_S = 40.0  # a worker told to leave gets so long
AGENT_STOP_S = 5.0  # a delivery agent told to leave, which has nothing to end, gets so long
TAKEN_S = 1.0
RESTART_S = 1.0  # between tries to start a worker that can't be started at all
BACKLOG = 4096
WORKER = (sys.executable, "-m", "gmta.worker")
AGENT = (sys.executable, "-m", "gmta.agent")

Key = tuple[str, str, int]  # listener, host, port


def restart_pause(deaths: int) -> float:
    """Seconds to wait before a worker is started again; deaths: of the last minute, this one included."""
    return min(10.0, 0.5 * 2.0 ** (min(deaths, 10) - 5)) if deaths > 4 else 0.0


class Listening:
    """The sockets of one address. shared: every worker serves all of them (systemd's); else each worker its own."""

    __slots__ = ("shared", "sockets")

    def __init__(self, sockets: list[socket.socket], shared: bool = False) -> None:
        self.sockets = sockets
        self.shared = shared


class AgentProcess:
    """The delivery agent (gmta.agent) of a configuration: its socket, which outlives it, and its process. uid: of the workers."""

    def __init__(self, config: Config, uid: int) -> None:
        self.config = config
        self._uid = uid
        self._start_at = 0.0
        self._popen: subprocess.Popen[bytes] | None = None
        self._life = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("")  # a name of the kernel's choice, in no directory (unix(7), autobind)
        self._socket.listen(BACKLOG)
        self.address: str = self._socket.getsockname().decode("latin-1")

    def watch(self, now: float, log: Log) -> None:
        """Starts the process where there is none."""
        if self._popen is not None and self._popen.poll() is not None:
            log.error("delivery agent ended", pid=self._popen.pid, status=self._popen.returncode, restart_in_s=RESTART_S)
            self._forget()
            self._start_at = now + RESTART_S
        if self._popen is None and now >= self._start_at:
            try:
                self._start()
            except OSError as error:
                self._start_at = now + RESTART_S
                log.error("delivery agent can't be started", error=str(error), next_try_s=RESTART_S)

    def _start(self) -> None:
        life_read, self._life = os.pipe()
        try:
            snapshot = memory_file(self.config)
        except OSError:
            os.close(life_read)
            self._forget()
            raise
        given = json.dumps({"config": snapshot, "socket": self._socket.fileno(), "uid": self._uid, "life": life_read,
                            "log": [self.config.gmta.log_level, self.config.gmta.log_format]})
        try:
            self._popen = subprocess.Popen(AGENT, pass_fds=[snapshot, self._socket.fileno(), life_read], env={**os.environ, "GMTA_AGENT": given},
                                           stdin=subprocess.DEVNULL, cwd="/")
        except OSError:
            self._forget()
            raise
        finally:
            os.close(snapshot)
            os.close(life_read)

    def _forget(self) -> None:
        self._popen = None
        if self._life >= 0:
            os.close(self._life)
            self._life = -1

    def stop(self) -> None:
        """Ends it; what its forks have begun they end."""
        if self._popen is not None:
            self._popen.terminate()
            try:
                self._popen.wait(AGENT_STOP_S)
            except subprocess.TimeoutExpired:  # stopped by somebody, or in a call that hangs
                self._popen.kill()
                self._popen.wait()
        self._forget()
        self._socket.close()


class Process:
    """One worker process as the supervisor sees it. beat: descriptor its heartbeat comes from; life: one that ends with us."""

    __slots__ = ("agent", "beat", "killed", "last_beat", "life", "number", "popen", "ready", "reopen", "stopping_since")

    def __init__(self, popen: subprocess.Popen[bytes], number: int, beat: int, life: int, started_at: float,
                 agent: AgentProcess | None = None) -> None:
        self.popen = popen
        self.agent = agent
        self.number = number
        self.beat = beat
        self.life = life
        self.ready = False
        self.reopen = False  # its log files, once it is ready: before that SIGUSR1 would end it
        self.killed = False
        self.stopping_since: float | None = None
        self.last_beat = started_at

    def signal(self, signum: int) -> None:
        """Sends a signal, if the process is still there."""
        try:
            self.popen.send_signal(signum)
        except ProcessLookupError:
            pass


class Reload:
    """A new configuration whose workers are not all ready yet."""

    __slots__ = ("config", "listening", "workers")

    def __init__(self, config: Config, listening: dict[Key, Listening], workers: list[Process]) -> None:
        self.config = config
        self.listening = listening
        self.workers = workers


class Supervisor:
    """Keeps `config.gmta.workers` workers alive. environ: where systemd's variables are taken from; now_s: a monotonic clock."""

    def __init__(self, path: str | None, *, environ: MutableMapping[str, str] = os.environ, worker: Sequence[str] = WORKER,
                 now_s: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.config = load(path)
        self.workers: list[Process] = []
        self.listening: dict[Key, Listening] = {}
        self._command = worker
        self._now_s = now_s
        self._given = given_sockets(environ, os.getpid())
        self._notifier = Notifier(environ, os.getpid(), now_s)
        self._log = Log(self.config.gmta.log_level, self.config.gmta.log_format)
        self._deaths: list[float] = []
        self._restart_at: dict[int, float] = {}
        self._signals: list[int] = []
        self._up = False  # all workers of the first configuration were ready once
        self._stopping = False
        self.status = 0  # the exit status
        self._selector = selectors.DefaultSelector()
        self._reload: Reload | None = None
        self._reload_again = False
        self._agents: list[AgentProcess] = []

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Runs until stopped; gives the exit status."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            signal.signal(number, lambda signum, frame: self._signals.append(signum))
        self._selector.register(wake_read, selectors.EVENT_READ, wake_read)
        try:
            self.start()
        except ConfigError as error:
            print("\n".join(error.errors), file=sys.stderr)
            self.status = EX_CONFIG
            self._stop()
        while not self.done:
            self.step(0.25)
        self._watch_agents()
        return self.status

    def start(self) -> None:
        """Prepares the data directory, binds, and starts the workers; raises ConfigError."""
        account = worker_account(self.config)
        prepare(self.config, account)
        shutil.rmtree(os.path.join(self.config.gmta.data_dir, "metrics"), ignore_errors=True)  # series of processes of former runs
        if os.geteuid() == 0 and account is None:
            self._log.warning("workers run as root", advice="[gmta] user = NAME")
        self.listening = self._bind(self.config)
        self._start_all(self.config, self.listening, self.workers)

    @property
    def done(self) -> bool:
        """Whether all is over."""
        return self._stopping and not self.workers

    def step(self, timeout_s: float) -> None:
        """One turn: waits for a heartbeat or a signal up to timeout_s, and does what is due."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Process):
                self._heard(key.data)
            else:
                try:
                    os.read(key.data, 512)
                except BlockingIOError:
                    pass
        while self._signals:
            self.act(self._signals.pop(0))
        self._reap()
        self._watch()
        self._watch_agents()
        self._notifier.alive()

    def act(self, signum: int) -> None:
        """Does what a signal asks for."""
        if signum in (signal.SIGTERM, signal.SIGINT):
            self._stop()
        elif signum == signal.SIGHUP and not self._stopping:
            self._begin_reload()
        elif signum == signal.SIGUSR1:
            for process in self._all():
                process.reopen = not process.ready
                if process.ready:
                    process.signal(signal.SIGUSR1)

    # -- sockets ----------------------------------------------------------------------------------------------------

    def _bind(self, config: Config) -> dict[Key, Listening]:
        """The sockets a configuration asks for: systemd's, those open already, new ones. Raises ConfigError; then none is new."""
        errors: list[str] = []
        bound = match_given(config, self._given, errors)
        named = {one.name for one in self._given}
        ours = {key[1:]: listening.sockets for key, listening in self.listening.items() if not listening.shared}
        owners: dict[tuple[str, int], str] = {}  # address -> section
        fresh: list[socket.socket] = []
        for name, addresses in served(config).items():
            where, wanted = (f"[listener:{name}]", config.gmta.workers) if name != ACME else ("[acme]", 1)  # worker 0 alone answers
            for host, port in addresses if name.lstrip(":") not in named else ():
                if owners.setdefault((host, port), where) != where:
                    errors.append(f"{where} address: {host}:{port} is that of {owners[host, port]} already")
                    continue
                key = (name, host, port)
                if key in bound:
                    continue
                have = bound[key] = Listening(list(ours.get((host, port), ())))  # of a listener that may have had another name
                try:
                    if all(port != other for _, other in ours):  # where we have the port on some address the probe would hit ourselves
                        fresh.append(first_to_listen(host, port))
                        have.sockets.append(fresh[-1])
                    while len(have.sockets) < wanted:
                        fresh.append(listen(host, port))
                        have.sockets.append(fresh[-1])
                except OSError as error:
                    errors.append(f"{where} address: can't listen on {host}:{port}: {error.strerror or error}")
                    if name == ACME:  # mail goes on, with the certificate that there is
                        self._log.error("no certificate can be obtained", reason=errors.pop())
                        del bound[key]
        if errors:
            for sock in fresh:
                sock.close()
            raise ConfigError(errors)
        return bound

    def _close_unused(self, others: dict[Key, Listening]) -> None:
        """Closes the sockets of `others` that are not served now; systemd's stay open, as it may hand them to a later reload."""
        used = {sock for listening in self.listening.values() for sock in listening.sockets} | {one.sock for one in self._given}
        for listening in others.values():
            for sock in listening.sockets:
                if sock not in used:
                    sock.close()

    # -- processes --------------------------------------------------------------------------------------------------

    def _start(self, config: Config, listening: dict[Key, Listening], number: int) -> Process:
        """Starts worker `number`: it serves what is shared, and of each address every socket whose index is congruent to it.

        Raises ConfigError, OSError.
        """
        count = config.gmta.workers
        sockets = [(key[0], sock.fileno()) for key, have in listening.items()
                   for index, sock in enumerate(have.sockets) if have.shared or index % count == number]
        agent = self._agent_of(config)
        snapshot = memory_file(config)
        beat_read, beat_write = os.pipe()
        life_read, life_write = os.pipe()
        given = json.dumps({"config": snapshot, "sockets": sockets, "beat": beat_write, "life": life_read, "number": number,
                            "agent": agent.address if agent is not None else ""})
        passed = [snapshot, beat_write, life_read, *(descriptor for _, descriptor in sockets)]
        account = worker_account(config)
        identity: dict[str, Any] = {}
        if account is not None:
            identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": os.getgrouplist(account.pw_name, account.pw_gid)}
        try:
            popen = subprocess.Popen(self._command, pass_fds=passed, env={**os.environ, "GMTA_WORKER": given},
                                     stdin=subprocess.DEVNULL, cwd="/", start_new_session=False, **identity)
        except OSError:
            os.close(beat_read)
            os.close(life_write)
            raise
        finally:
            for descriptor in (snapshot, beat_write, life_read):
                os.close(descriptor)
        os.set_blocking(beat_read, False)
        process = Process(popen, number, beat_read, life_write, self._now_s(), agent)
        self._selector.register(beat_read, selectors.EVENT_READ, process)
        return process

    def _agent_of(self, config: Config) -> AgentProcess | None:
        """The agent that a configuration needs, made at the first time. Raises ConfigError, OSError."""
        if os.geteuid() != 0 or not any(section.get("user") for section in config.transports.values()):
            return None
        agent = next((one for one in self._agents if one.config is config), None)
        if agent is None:
            account = worker_account(config)
            agent = AgentProcess(config, os.geteuid() if account is None else account.pw_uid)
            self._agents.append(agent)
            agent.watch(self._now_s(), self._log)
        return agent

    def _watch_agents(self) -> None:
        """Keeps the agents that have workers, ends the others."""
        for agent in list(self._agents):
            if (agent.config is self.config and not self._stopping) or any(process.agent is agent for process in self._all()):
                agent.watch(self._now_s(), self._log)
            else:
                self._agents.remove(agent)
                agent.stop()

    def _start_all(self, config: Config, listening: dict[Key, Listening], workers: list[Process]) -> None:
        """Starts every worker of a configuration, into `workers`; raises ConfigError."""
        try:
            for number in range(config.gmta.workers):
                workers.append(self._start(config, listening, number))
        except OSError as error:
            whose = f" as {config.gmta.user}" if config.gmta.user else ""
            raise ConfigError([f"[gmta] workers: can't be started{whose}: {error.strerror}: {error.filename or self._command[0]}"]) from error

    def _all(self) -> list[Process]:
        """Every worker, those of a reload under way too."""
        return self.workers + (self._reload.workers if self._reload is not None else [])

    def _forget(self, process: Process) -> None:
        self._selector.unregister(process.beat)
        os.close(process.beat)
        os.close(process.life)

    def _heard(self, process: Process) -> None:
        """Takes a heartbeat; the first one says that the worker serves."""
        try:
            beats = os.read(process.beat, 512)
        except BlockingIOError:
            return
        if not beats:
            return  # it ended, or is about to
        process.last_beat = self._now_s()
        if process.ready:
            return
        process.ready = True
        if process.reopen:
            process.signal(signal.SIGUSR1)
        if self._reload is not None:
            if all(one.ready for one in self._reload.workers):
                self._switch(self._reload)
        elif not self._up and not self._stopping and all(one.ready for one in self.workers):
            self._up = True
            self._notifier.ready(self._serving())

    def _serving(self) -> str:
        count = self.config.gmta.workers
        return f"{count} worker{'' if count == 1 else 's'} serving"

    def _end(self, process: Process) -> None:
        if process.stopping_since is None:
            process.stopping_since = self._now_s()
            process.signal(signal.SIGTERM)

    def _stop(self) -> None:
        self._stopping = True
        self._notifier.stopping()
        self.workers, self._reload = self._all(), None
        for process in self.workers:
            self._end(process)

    def _reap(self) -> None:
        """Takes note of workers that ended, and says when the next of that number starts."""
        for process in [one for one in self.workers if one.popen.poll() is not None]:
            self.workers.remove(process)
            self._forget(process)
            if process.stopping_since is not None or self._stopping:
                continue
            if process.popen.returncode == EX_CONFIG and not self._up:
                self.status = EX_CONFIG
                self._stop()
                continue
            now = self._now_s()
            self._deaths = [at for at in self._deaths if now - at < 60] + [now]
            pause_s = restart_pause(len(self._deaths))
            self._restart_at[process.number] = now + pause_s
            self._log.warning("worker ended", worker=process.number, pid=process.popen.pid, status=process.popen.returncode,
                              restart_in_s=pause_s)
        reload = self._reload
        if reload is not None and any(one.popen.poll() is not None for one in reload.workers):
            self._give_up(reload, ["the new workers can't boot"])

    def _watch(self) -> None:
        """Starts what is due again, kills what has missed its heartbeat or its time to leave."""
        now = self._now_s()
        if not self._stopping:
            for number, at in list(self._restart_at.items()):
                if now >= at:
                    del self._restart_at[number]
                    try:
                        self.workers.append(self._start(self.config, self.listening, number))
                    except (OSError, ConfigError) as error:  # no memory, no process: the others go on, this one is tried again
                        self._restart_at[number] = now + RESTART_S
                        self._log.error("worker can't be started", worker=number, error=str(error), next_try_s=RESTART_S)
        for process in self._all():
            silent = now - process.last_beat > HEARTBEAT_S
            if not process.killed and (silent or (process.stopping_since is not None and now - process.stopping_since > STOP_S)):
                process.killed = True
                self._log.error("worker killed", worker=process.number, pid=process.popen.pid,
                                reason="no heartbeat" if silent else "did not leave")
                process.signal(signal.SIGKILL)

    # -- reload -----------------------------------------------------------------------------------------------------

    def _begin_reload(self) -> None:
        """Starts workers on the new configuration beside the old ones; the old go when all the new are ready."""
        if self._reload is not None:
            self._reload_again = True  # what changed since may not have been read
            return
        self._notifier.reloading()
        try:
            config = load(self.path)
            prepare(config, worker_account(config))
            listening = self._bind(config)
        except ConfigError as error:
            self._refuse_reload(error.errors)
            return
        reload = self._reload = Reload(config, listening, [])
        try:
            self._start_all(config, listening, reload.workers)
        except ConfigError as error:
            self._give_up(reload, error.errors)

    def _refuse_reload(self, errors: list[str]) -> None:
        print("reload refused, still running on the old configuration:\n" + "\n".join(errors), file=sys.stderr, flush=True)
        self._notifier.ready(f"{self._serving()}; reload refused: {errors[0]}")

    def _switch(self, reload: Reload) -> None:
        """The new workers serve: the old ones end, and sockets that nobody serves any more close."""
        for process in self.workers:
            self._end(process)
        former = self.listening
        self.config, self.listening = reload.config, reload.listening
        self.workers += reload.workers
        self._reload = None
        self._restart_at.clear()
        self._close_unused(former)
        self._log = Log(self.config.gmta.log_level, self.config.gmta.log_format)
        self._notifier.ready(self._serving())
        self._next_reload()

    def _give_up(self, reload: Reload, errors: list[str]) -> None:
        """A new worker ended before all were ready: back to the old configuration; those that serve already may end what they began."""
        for process in reload.workers:
            self._end(process)
        self.workers += reload.workers
        self._reload = None
        self._close_unused(reload.listening)
        self._refuse_reload(errors)
        self._next_reload()

    def _next_reload(self) -> None:
        if self._reload_again:
            self._reload_again = False
            self._begin_reload()


def memory_file(config: Config) -> int:
    """A configuration as a process gets it that is started with it: an open file without a name."""
    file = os.memfd_create("gmta-config")
    os.write(file, config.snapshot().encode())
    return file


def listen(host: str, port: int, *, first: bool = False) -> socket.socket:
    """A listening socket that shares its port with those of the other workers; raises OSError.

    first: nobody may listen there yet. Two who try that at once do not both get it: the kernel gives a port to one socket until that one
    is willing to share it, and then only to such as ask for a share.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not first:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        if first:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        sock.close()
        raise
    return sock


def first_to_listen(host: str, port: int) -> socket.socket:
    """Like listen; raises OSError too where another server of the same account listens, which would share the port unseen.

    What is left of one that was killed has a moment to go: its workers let the port go as soon as they notice.
    """
    end = time.monotonic() + TAKEN_S
    while True:
        try:
            return listen(host, port, first=True)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= end:
                raise
        time.sleep(0.05)


def served(config: Config) -> dict[str, list[tuple[str, int]]]:
    """The addresses of each listener, and of [acme] under the name ACME where it obtains certificates."""
    found = {name: listener.addresses for name, listener in config.listeners.items()}
    return found | {ACME: config.acme.addresses} if config.obtained else found


def match_given(config: Config, given: Sequence[Given], errors: list[str]) -> dict[Key, Listening]:
    """systemd's sockets by what they serve: the listener whose name is the socket's FileDescriptorName (all its addresses are
    systemd's then), else the one that has the socket's address. A socket that serves none is an error."""
    found: dict[Key, Listening] = {}
    wanted = served(config)
    for one in given:
        name = one.name if one.name in wanted else f":{one.name}"
        if name in wanted:
            keys = [(name, one.host, one.port)]
        else:
            keys = [(name, host, port) for name, addresses in wanted.items() for host, port in addresses if one.matches(host, port)]
        if not keys:
            errors.append(f"socket {one} from systemd serves no listener: expected FileDescriptorName= to be one of "
                          f"{', '.join(config.listeners)}, or ListenStream= to be an address of one")
            continue
        for key in keys:  # several: one socket for both wildcards, or an address that two listeners have
            found.setdefault(key, Listening([], shared=True))
        found[keys[0]].sockets.append(one.sock)
    return found


def worker_account(config: Config) -> pwd.struct_passwd | None:
    """Whom the workers are to become, None to stay who we are; raises ConfigError where that can't be."""
    name = config.gmta.user
    if not name:
        return None
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError([f"[gmta] user: there is no account {name} on this machine"]) from None
    if account.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise ConfigError([f"[gmta] user: only root can start workers as {name}; start gmta as root or as {name}"])
    return account


def prepare(config: Config, account: pwd.struct_passwd | None) -> None:
    """Makes the data directory and the maildrop, the workers' own; raises ConfigError."""
    data_dir = config.gmta.data_dir
    try:
        os.makedirs(data_dir, mode=0o700, exist_ok=True)
        if account is not None:
            os.chown(data_dir, account.pw_uid, account.pw_gid)
            os.chmod(data_dir, stat.S_IMODE(os.stat(data_dir).st_mode) | stat.S_IXGRP)  # to the maildrop
        maildrop.prepare(data_dir, account)
    except OSError as error:
        raise ConfigError([f"[gmta] data_dir: {error.filename or data_dir} can't be made: {error.strerror}"]) from error
