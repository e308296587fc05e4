"""The delivery agent: a process that stays root where workers do not, and delivers as the user whom the mail is for.

Started by the supervisor as a fresh interpreter, `python -m gmta.agent`, where started by root and a [transport:NAME] has the key `user`.
Workers connect to its Unix socket; it takes connections of their account and root's alone (SO_PEERCRED), and for each forks. The fork reads
the request, asks the transport, made from the configuration as root has it, which account that is, gives up root for that account
for good (groups, gid, uid), and only then looks at the message and lets the transport deliver: whatever a user has put into his home
(links, FIFOs, odd modes), the process has that user's rights and no others. It serves one account, for some messages or seconds.
Never root: an account with uid 0 gets no mail. The process that stays root reads nothing from anybody.

Failure: a fork that dies or hangs is one delivery that the worker tries again; it is killed past the time that a delivery may take, and
at once where it is stopped: its user may send it signals, and would keep all that there may be.
A configuration that can't be used ends it with 78, as it does a worker.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import gevent
import gevent.os
import gevent.socket
import gevent.subprocess

import gmta
from gmta.config import EX_CONFIG, Config, ConfigError
from gmta.deliver.agent import LONGEST_S, ROOM_S, close_all, delivery_of, frame, read_frame, rows_of
from gmta.mail.envelope import stored_address
from gmta.plugins import PluginManager
from gmta.services import Services
from gmta.services.accounts import find_account
from gmta.services.batch import Batch, call_each
from gmta.services.log import Log
from gmta.services.metrics import Metrics

MOST = 256  # processes at a time
REQUEST_S = 10.0  # for a request to come whole
IDLE_S = 10.0  # for the next one
SERVED = 100  # messages of one process
LIFE_S = 60.0  # after which it takes no other
ORPHAN_S = 45.0  # workers may go on for so long without their supervisor
_PR_SET_DUMPABLE = 4
_CREDENTIALS = struct.Struct("3i")


class Agent:
    """The process that stays root. listening: its socket.  uid: of the workers."""

    def __init__(self, transports: dict[str, Any], listening: socket.socket, uid: int, log: Log) -> None:
        self._transports = transports
        self._listening = listening
        self._uids = frozenset({uid, os.geteuid()})
        self._log = log
        self._children: dict[int, float] = {}
        self._most_s = LIFE_S + 60.0 + max((getattr(one, "longest_s", LONGEST_S) for one in transports.values()), default=LONGEST_S)

    def run(self, life: int) -> None:
        """Serves until SIGTERM, or some time after the other end of `life` is gone."""
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda signum, frame: None)
        self._listening.setblocking(False)
        listening = self._listening.fileno()
        end = float("inf")
        while time.monotonic() < end:
            waiting = select.poll()  # select(2) knows no descriptor above 1023, and these have the supervisor's numbers
            for one in (wake, *([life] if end == float("inf") else []), *([listening] if len(self._children) < MOST else [])):
                waiting.register(one, select.POLLIN)
            ready = {descriptor for descriptor, _ in waiting.poll(1000)}
            if wake in ready:
                try:
                    os.read(wake, 512)
                except BlockingIOError:
                    pass
            if life in ready:
                end = time.monotonic() + ORPHAN_S
            self._reap()
            if listening in ready:
                self._accept()

    def _reap(self) -> None:
        """Takes note of processes that ended, and ends those past their time."""
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                self._children.clear()
                return
            if not pid:
                break
            if os.WIFSTOPPED(status):
                os.kill(pid, signal.SIGKILL)
                continue
            self._children.pop(pid, None)
        now = time.monotonic()
        for pid, began in self._children.items():
            if now - began > self._most_s:
                os.kill(pid, signal.SIGKILL)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        with connection:
            _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            if uid not in self._uids:
                return
            try:
                pid = os.fork()
            except OSError as error:
                self._log.error("delivery agent can't fork", error=str(error))
                return
            if pid:
                self._children[pid] = time.monotonic()
                return
            self._serve(connection)

    def _serve(self, connection: socket.socket) -> NoReturn:
        """In the fork, to its end."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            self._listening.close()
            Fork(self._transports, connection).run()
            status = 0
        except (EOFError, TimeoutError, ConnectionError):
            status = 0  # the worker has gone
        except Exception as error:  # the delivery attempt: its worker sees the connection end, and tries again
            self._log.error("delivery agent failed", error=f"{type(error).__name__}: {error}")
        finally:
            os._exit(status)


class Fork:
    """One account's process."""

    def __init__(self, transports: dict[str, Any], connection: socket.socket) -> None:
        self._transports = transports
        self._connection = connection
        self._account = ""

    def run(self) -> None:
        """Serves one request after another."""
        end = time.monotonic() + LIFE_S
        for number in range(1, SERVED + 1):
            self._connection.settimeout(REQUEST_S if number == 1 else IDLE_S)
            request, files = self._read()
            try:
                again = number < SERVED and time.monotonic() < end
                outcomes = self._outcomes(request, files)
            finally:
                close_all(files)
            again = again and bool(self._account)
            self._connection.settimeout(REQUEST_S)
            self._connection.sendall(frame({"again": again, "outcomes": rows_of(outcomes)}))
            if not again:
                return

    def _read(self) -> tuple[Any, list[int]]:
        data, files, _, _ = socket.recv_fds(self._connection, 65536, 2)
        try:
            for file in files:
                os.set_inheritable(file, False)
            if not data:
                raise EOFError
            self._connection.settimeout(REQUEST_S)
            return read_frame(self._connection.recv, data), files
        except BaseException:
            close_all(files)
            raise

    def _outcomes(self, request: Any, files: list[int]) -> dict[int, gmta.Outcome]:
        transport = self._transports.get(str(request["transport"]))
        if transport is None:
            raise ValueError(f"no transport {request['transport']!r} delivers as a user")
        if "room" in request:
            address = stored_address(str(request["room"]))
            signal.setitimer(signal.ITIMER_REAL, 2 * ROOM_S)  # ends the process, whatever call it hangs in: who asked has long gone
            refused = self._become({transport.user_of(address)})
            try:
                outcome = refused or self._work(transport.room, address, int(request["size"]))
            except OSError:
                outcome = None  # the delivery will tell
            signal.setitimer(signal.ITIMER_REAL, 0)
            return {} if outcome is None else {0: outcome}
        recipients = delivery_of({**request, "message": [0, 0, 0, 0]}, files).recipients  # nothing of the message yet
        refused = self._become({transport.user_of(recipient.address) for recipient in recipients})
        if refused is not None:
            return dict.fromkeys((recipient.number for recipient in recipients), refused)
        outcomes: dict[int, gmta.Outcome] = self._work(transport.deliver, delivery_of(request, files))
        return outcomes

    def _become(self, names: set[str]) -> gmta.Outcome | None:
        """Sees to it that this process is that account's; an Outcome where that may not be. Raises ValueError, OSError."""
        (name,) = names  # or ValueError: nobody, or two accounts
        if not self._account:
            refused = become(name)
            if refused is not None:
                return refused
            self._account = name
        elif name != self._account:
            raise ValueError("another account")
        return None

    def _work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls it, unless the worker goes away meanwhile: what was started is ended then."""
        work = gevent.spawn(function, *arguments)
        watch = gevent.spawn(self._left, work)
        work.join()
        watch.kill()
        if isinstance(work.value, gevent.GreenletExit):
            raise EOFError
        return work.get()

    def _left(self, work: Any) -> None:
        gevent.os.make_nonblocking(self._connection.fileno())
        gevent.socket.wait_read(self._connection.fileno())
        work.kill(block=False)


def become(name: str) -> gmta.Outcome | None:
    """Becomes an account for good; an Outcome where that can't or may not be. Raises OSError."""
    try:
        account = find_account(name)
    except OSError as error:
        return gmta.deferred(f"Accounts can't be looked up: {error.strerror}", enhanced="4.3.0")
    if account is None:
        return gmta.failed("There is no such account", enhanced="5.1.1", code=550)
    if not account.uid:
        return gmta.failed("No mail is delivered as this account", enhanced="5.7.1", code=550)
    os.chdir("/")
    os.umask(0o077)
    if os.geteuid() == 0:
        os.setgroups(account.groups())
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # nor may the account look into what was root's
    if os.getresuid() != (account.uid,) * 3 or os.getresgid() != (account.gid,) * 3:
        raise PermissionError(f"can't become {name}")
    return None


def import_all() -> None:
    """Imports what a delivery imports when it first needs it: a user may have no right to read where the interpreter has its modules.

    A fork tries it out and says what it was, since the process that stays root must have no loop and no threads of its own.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            gevent.get_hub().threadpool.apply(os.getpid)
            gevent.spawn(gevent.sleep, 0).join()
            with gevent.subprocess.Popen(["/bin/true"], stdin=gevent.subprocess.DEVNULL, start_new_session=True) as process:
                process.wait(REQUEST_S)
            Batch(call_each).submit(os.getpid)
            with os.fdopen(write, "w") as out:
                json.dump(list(sys.modules), out)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        names = json.loads(file.read() or "[]")
    os.waitpid(pid, 0)
    for name in names:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # one that is no file, or not for this system


def make_transports(text: str, log: Log) -> dict[str, Any]:
    """The transports of a configuration's snapshot that deliver as users, and nothing else of it. Raises ConfigError."""
    data = json.loads(text)
    data["sections"] = [section for section in data["sections"]
                        if not section["name"].startswith(("plugin:", "listener:", "queue:")) and section["name"] != "route"
                        and (not section["name"].startswith("transport:") or section["values"].get("user"))]
    for section in data["sections"]:
        if section["name"] == "plugins":
            section["values"].pop("enable", None)
    config = Config.from_snapshot(json.dumps(data))
    services = Services(config, log, Metrics())
    made = PluginManager(config, services, log).transports
    return {name: transport for name, transport in made.items() if hasattr(transport, "user_of")}


def main() -> int:
    """Entry of the agent."""
    given = json.loads(os.environ.pop("GMTA_AGENT"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
    with os.fdopen(given["config"], "rb") as file:
        file.seek(0)
        text = file.read().decode()
    try:
        log = Log(*given["log"])  # standard error: a file would be one in a directory of the workers' account
        agent = Agent(make_transports(text, log), socket.socket(fileno=given["socket"]), given["uid"], log)
    except ConfigError as error:
        print("\n".join(error.errors), file=sys.stderr)
        return EX_CONFIG
    import_all()
    agent.run(given["life"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
