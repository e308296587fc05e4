"""The supervisor below e2e: which sockets it serves, when it starts and kills workers, and what a reload changes.

The workers here are a few lines of Python that beat once and wait, so that a fake clock decides what is late. The last
tests run the real `gmta serve` with sockets that a service manager would pass.
"""

from __future__ import annotations

import json
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmta import supervisor as module
from gmta import systemd
from gmta.config import EX_CONFIG, ConfigError, load
from gmta.supervisor import HEARTBEAT_S, RESTART_S, STOP_S, Supervisor, match_given, restart_pause, worker_account
from gmta.systemd import Notifier, given_sockets
from gmta.testing.fakes import MemoryLog
from tests.e2e.conftest import DEADLINE_S, free_port, listens, until

FAKE = (sys.executable, "-I", "-S", "-c", """
import json, os, signal, sys
given = json.loads(os.environ["GMTA_WORKER"])
text = os.pread(given["config"], 1 << 20, 0).decode()
if "broken.test" in text or os.environ.get("FAKE_BROKEN"):
    sys.exit(78)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn.test" in text else lambda *rest: sys.exit(0))
if "silent.test" not in text:
    os.write(given["beat"], b"r")
while True:
    signal.pause()
""")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Manager:
    """The end that a service manager listens at."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.settimeout(DEADLINE_S)

    def heard(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self.sock.recv(4096).decode().split("\n"))

    def until(self, *wanted: str) -> dict[str, str]:
        """The next message that has these names, others passed over."""
        while not set(wanted) <= set(message := self.heard()):
            pass
        return message


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose paths fit a socket's address."""
    path = Path(tempfile.mkdtemp(prefix="gmta-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def manager(short: Path) -> Iterator[Manager]:
    """Listens at a path."""
    made = Manager(str(short / "notify"))
    yield made
    made.sock.close()


class Site:
    """A configuration and supervisors on it, stopped at the end."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "config.ini"
        self.port = free_port()
        self.clock = Clock()
        self.made: list[Supervisor] = []
        self.write()

    def write(self, *, hostname: str = "mx.test", workers: int = 1, port: int = 0, more: str = "") -> None:
        self.file.write_text(f"[gmta]\nhostname = {hostname}\nworkers = {workers}\n{more}\n[listener:mx]\naddress = 127.0.0.1:{port or self.port}\n")

    def supervisor(self, environ: dict[str, str] | None = None) -> Supervisor:
        made = Supervisor(str(self.file), environ={} if environ is None else environ, worker=FAKE, now_s=self.clock)
        self.made.append(made)
        return made

    def started(self, environ: dict[str, str] | None = None) -> Supervisor:
        """A supervisor whose workers are all ready."""
        made = self.supervisor(environ)
        made.start()
        turn(made, lambda: all(process.ready for process in made.workers), "ready workers")
        return made

    def close(self) -> None:
        for made in self.made:
            for process in made.workers:
                process.signal(signal.SIGKILL)
            made.act(signal.SIGTERM)
            turn(made, lambda made=made: made.done, "end")  # type: ignore[misc]
            for listening in made.listening.values():
                for sock in listening.sockets:
                    sock.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def turn(supervisor: Supervisor, ready: Callable[[], bool], what: str) -> None:
    """Turns the loop until `ready`."""
    def look() -> bool:
        supervisor.step(0.02)
        return ready()

    until(look, what)


def made_for_workers() -> set[str]:
    """The pipes and snapshots that are open, by what they are: what other tests left may be closed at any time, and numbers are used again."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            pass  # that of the listing itself
    return {what for what in found if what.startswith(("pipe:", "/memfd:gmta"))}


def pids(supervisor: Supervisor) -> list[int]:
    return [process.popen.pid for process in supervisor.workers]


# --- restarts ---------------------------------------------------------------------------------------------------


def test_back_off_only_from_the_fifth_death_and_never_past_ten_seconds() -> None:
    assert [restart_pause(deaths) for deaths in range(1, 12)] == [0, 0, 0, 0, 0.5, 1, 2, 4, 8, 10, 10]
    assert restart_pause(10**6) == 10


def test_a_dead_worker_is_replaced_at_once_and_the_fifth_of_a_minute_waits(site: Site) -> None:
    supervisor = site.started()
    for _ in range(4):
        (victim,) = supervisor.workers
        victim.signal(signal.SIGKILL)
        turn(supervisor, lambda victim=victim: supervisor.workers != [] and victim not in supervisor.workers, "replacement")  # type: ignore[misc]
    supervisor.workers[0].signal(signal.SIGKILL)
    turn(supervisor, lambda: supervisor.workers == [], "death")
    site.clock.now += 0.49
    supervisor.step(0)
    assert supervisor.workers == []
    site.clock.now += 0.01
    supervisor.step(0)
    assert len(supervisor.workers) == 1
    site.clock.now += 20  # heartbeats go on in life
    supervisor.workers[0].last_beat = site.clock.now
    site.clock.now += 41
    supervisor.workers[0].last_beat = site.clock.now
    supervisor.workers[0].signal(signal.SIGKILL)
    pid = pids(supervisor)
    turn(supervisor, lambda: supervisor.workers != [] and pids(supervisor) != pid, "replacement at once, a minute later")


def test_each_worker_keeps_its_number_and_sockets(site: Site) -> None:
    site.write(workers=3)
    supervisor = site.started()
    assert [process.number for process in supervisor.workers] == [0, 1, 2]
    (listening,) = supervisor.listening.values()
    assert len(listening.sockets) == 3 and not listening.shared
    supervisor.workers[1].signal(signal.SIGKILL)
    turn(supervisor, lambda: sorted(process.number for process in supervisor.workers if process.ready) == [0, 1, 2], "replacement")
    assert supervisor.listening == {("mx", "127.0.0.1", site.port): listening}


def test_a_worker_without_heartbeat_is_killed_and_replaced(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = site.started()
    (victim,) = supervisor.workers
    site.clock.now += HEARTBEAT_S
    supervisor.step(0)
    assert victim.popen.poll() is None
    site.clock.now += 0.1
    turn(supervisor, lambda: victim not in supervisor.workers and supervisor.workers != [], "replacement")
    assert victim.popen.returncode == -signal.SIGKILL
    assert f'error worker killed worker=0 pid={victim.popen.pid} reason="no heartbeat"' in capfd.readouterr().err


def test_one_that_never_becomes_ready_is_killed_too(site: Site) -> None:
    site.write(hostname="silent.test")
    supervisor = site.supervisor()
    supervisor.start()
    (victim,) = supervisor.workers
    site.clock.now += HEARTBEAT_S + 1
    turn(supervisor, lambda: victim not in supervisor.workers, "kill")
    assert victim.popen.returncode == -signal.SIGKILL


def test_one_that_does_not_leave_is_killed(site: Site) -> None:
    site.write(hostname="stubborn.test")
    supervisor = site.started()
    (victim,) = supervisor.workers
    supervisor.act(signal.SIGTERM)
    victim.last_beat = site.clock.now = site.clock.now + STOP_S
    supervisor.step(0)
    assert victim.popen.poll() is None and not supervisor.done
    victim.last_beat = site.clock.now = site.clock.now + 1
    turn(supervisor, lambda: supervisor.done, "end")
    assert victim.popen.returncode == -signal.SIGKILL and supervisor.status == 0


def test_workers_that_cannot_boot_end_the_start(site: Site) -> None:
    site.write(hostname="broken.test", workers=2)
    supervisor = site.supervisor()
    supervisor.start()
    turn(supervisor, lambda: supervisor.done, "end")
    assert supervisor.status == EX_CONFIG


def test_one_that_cannot_boot_later_does_not_end_the_others(site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    site.write(workers=2)
    supervisor = site.started()
    first, kept = supervisor.workers
    monkeypatch.setenv("FAKE_BROKEN", "yes")  # such as a certificate that was removed since
    first.signal(signal.SIGKILL)
    turn(supervisor, lambda: supervisor._restart_at != {}, "back-off")
    assert capfd.readouterr().err.count(" status=78 ") == 4
    assert supervisor.workers == [kept] and kept.popen.poll() is None and not supervisor.done


# --- reload -----------------------------------------------------------------------------------------------------


def test_a_bad_configuration_changes_nothing_and_systemd_hears_why(site: Site, short: Path, manager: Manager,
                                                                   capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = site.started({"NOTIFY_SOCKET": str(short / "notify")})
    assert manager.heard() == {"READY": "1", "STATUS": "1 worker serving"}
    before, sockets = pids(supervisor), dict(supervisor.listening)
    site.file.write_text(site.file.read_text() + "[bogus]\n")
    supervisor.act(signal.SIGHUP)
    assert "[bogus]: unknown section" in capfd.readouterr().err
    assert manager.heard()["RELOADING"] == "1"
    told = manager.heard()
    assert told["READY"] == "1" and "reload refused: " in told["STATUS"]
    assert (pids(supervisor), supervisor.listening) == (before, sockets)


def test_an_address_that_cannot_be_bound_refuses_the_reload_and_leaves_no_socket(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = site.started()
    before, other = pids(supervisor), free_port()
    site.file.write_text(site.file.read_text().replace(f":{site.port}", f":{other}, 192.0.2.1:{other}"))
    supervisor.act(signal.SIGHUP)
    assert f"[listener:mx] address: can't listen on 192.0.2.1:{other}: Cannot assign" in capfd.readouterr().err
    assert pids(supervisor) == before and not listens(other) and listens(site.port)


def test_workers_that_cannot_boot_refuse_the_reload(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = site.started()
    before, other = pids(supervisor), free_port()
    site.write(hostname="broken.test", port=other)
    supervisor.act(signal.SIGHUP)
    assert listens(other)
    turn(supervisor, lambda: not listens(other), "end of the reload")
    turn(supervisor, lambda: pids(supervisor) == before, "old workers alone")
    assert "the new workers can't boot" in capfd.readouterr().err
    assert listens(site.port)
    supervisor.step(0)
    assert not supervisor._restart_at


def test_new_workers_that_hang_refuse_the_reload(site: Site) -> None:
    supervisor = site.started()
    before = pids(supervisor)
    site.write(hostname="silent.test")
    supervisor.act(signal.SIGHUP)
    site.clock.now += HEARTBEAT_S + 1
    supervisor.workers[0].last_beat = site.clock.now
    turn(supervisor, lambda: supervisor._reload is None and pids(supervisor) == before, "old workers alone")


def test_a_reload_replaces_the_workers_and_moves_the_listener(site: Site) -> None:
    supervisor = site.started()
    before, other = pids(supervisor), free_port()
    site.write(workers=2, port=other)
    supervisor.act(signal.SIGHUP)
    assert listens(site.port)  # until the new workers are ready
    turn(supervisor, lambda: len(supervisor.workers) == 2 and not set(before) & set(pids(supervisor)), "new workers alone")
    assert listens(other) and not listens(site.port)
    assert [len(listening.sockets) for listening in supervisor.listening.values()] == [2]


def test_a_reload_keeps_the_sockets_of_an_address_that_stays(site: Site) -> None:
    site.write(workers=2)
    supervisor = site.started()
    (before,) = [list(listening.sockets) for listening in supervisor.listening.values()]
    for workers in (1, 3):
        site.write(workers=workers)
        supervisor.act(signal.SIGHUP)
        turn(supervisor, lambda workers=workers: len(supervisor.workers) == workers == supervisor.config.gmta.workers, "reload")  # type: ignore[misc]
        (now,) = [listening.sockets for listening in supervisor.listening.values()]
        assert now[:2] == before and len(now) == max(2, workers)  # what waits in a socket is never thrown away


def test_a_reload_keeps_the_sockets_of_a_listener_that_is_renamed_and_adds_addresses_of_its_port(site: Site) -> None:
    supervisor = site.started()
    (before,) = [list(listening.sockets) for listening in supervisor.listening.values()]
    site.file.write_text(site.file.read_text().replace("[listener:mx]", "[listener:inbound]").replace("address = ", f"address = *:{site.port}, "))
    supervisor.act(signal.SIGHUP)
    turn(supervisor, lambda: "inbound" in supervisor.config.listeners and len(supervisor.workers) == 1, "reload")
    assert supervisor.listening["inbound", "127.0.0.1", site.port].sockets == before
    assert len(supervisor.listening["inbound", "0.0.0.0", site.port].sockets) == 1


def test_a_worker_that_boots_is_told_to_reopen_its_log_when_it_is_ready(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = site.supervisor()
    supervisor.start()
    told: list[tuple[bool, int]] = []
    monkeypatch.setattr(module.Process, "signal", lambda self, signum: told.append((self.ready, signum)))
    supervisor.act(signal.SIGUSR1)
    assert told == []  # it has no handler yet, and would end
    turn(supervisor, lambda: supervisor.workers[0].ready, "ready worker")
    assert told == [(True, signal.SIGUSR1)]
    supervisor.act(signal.SIGUSR1)
    assert told == [(True, signal.SIGUSR1)] * 2
    monkeypatch.undo()


def test_a_reload_asked_for_during_a_reload_is_made_afterwards(site: Site) -> None:
    supervisor = site.started()
    supervisor.act(signal.SIGHUP)
    site.write(hostname="second.test")
    supervisor.act(signal.SIGHUP)
    assert supervisor.config.gmta.hostname == "mx.test"
    turn(supervisor, lambda: supervisor.config.gmta.hostname == "second.test", "second reload")


def test_workers_that_cannot_be_started_at_all(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = site.started()
    before, command = pids(supervisor), supervisor._command
    descriptors = made_for_workers()
    supervisor._command = ("/nowhere/python",)
    supervisor.act(signal.SIGHUP)
    assert pids(supervisor) == before and supervisor._reload is None
    assert "[gmta] workers: can't be started: No such file or directory: /nowhere/python" in capfd.readouterr().err
    assert made_for_workers() <= descriptors
    supervisor.workers[0].signal(signal.SIGKILL)
    turn(supervisor, lambda: supervisor.workers == [] and supervisor._restart_at != {}, "death")
    assert "worker can't be started" in capfd.readouterr().err
    supervisor._command = command
    site.clock.now += RESTART_S
    turn(supervisor, lambda: len(supervisor.workers) == 1, "replacement")
    other = site.supervisor()
    other._command = ("/nowhere/python",)
    site.write(port=free_port())
    other.config = load(str(site.file))
    with pytest.raises(ConfigError, match="can't be started"):
        other.start()
    other.act(signal.SIGTERM)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1"])
def test_two_that_start_at_once_never_share_a_port(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One who has bound loses to one who listens before; who has the port shares it with those alone who ask for a share."""
    port = free_port()
    winner: list[socket.socket] = []

    class Slow(socket.socket):
        def listen(self, *backlog: int) -> None:
            if not winner:
                winner.append(self)
                winner[0] = module.listen(host, port, first=True)
            super().listen(*backlog)

    with monkeypatch.context() as patch:
        patch.setattr(module.socket, "socket", Slow)
        with pytest.raises(OSError, match="Address already in use"):
            module.listen(host, port, first=True)
    with winner[0], module.listen(host, port) as sibling:
        for _ in range(2):
            with pytest.raises(OSError, match="Address already in use"):
                module.listen(host, port, first=True)
        seen = set()
        for _ in range(200):  # the kernel shares them out by the client's port
            with socket.create_connection(("::1" if ":" in host else "127.0.0.1", port)):
                taken = next(one for one in select.select([winner[0], sibling], [], [], DEADLINE_S)[0])
                taken.accept()[0].close()
                seen.add(taken)
        assert seen == {winner[0], sibling}


def test_of_many_that_start_at_once_one_gets_the_port() -> None:
    port, begin = free_port(), threading.Barrier(8)
    got: list[socket.socket] = []

    def start() -> None:
        begin.wait()
        try:
            got.append(module.listen("127.0.0.1", port, first=True))
        except OSError:
            pass

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for sock in got:
        sock.close()
    assert len(got) == 1


# --- what stops a start -----------------------------------------------------------------------------------------


def test_all_that_can_not_be_bound_is_said_at_once(site: Site) -> None:
    site.file.write_text(site.file.read_text() + f"[listener:a]\naddress = 192.0.2.1:2\n[listener:b]\naddress = 127.0.0.1:{site.port}\n")
    supervisor = site.supervisor()
    with pytest.raises(ConfigError) as refused:
        supervisor.start()
    first, second = refused.value.errors
    assert first.startswith("[listener:a] address: can't listen on 192.0.2.1:2: ")
    assert second == f"[listener:b] address: 127.0.0.1:{site.port} is that of [listener:mx] already"
    assert not listens(site.port)
    supervisor.act(signal.SIGTERM)


def test_a_user_that_does_not_exist(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.write(more="user = nobody-of-that-name")
    with pytest.raises(ConfigError) as refused:
        load(str(site.file))
    assert refused.value.errors == [f"{site.file}:4: [gmta] user: expected an account of this machine, not 'nobody-of-that-name'"]
    me = pwd.getpwuid(os.geteuid()).pw_name
    site.write(more=f"user = {me}")
    config = load(str(site.file))
    assert worker_account(config) is None  # we are that already

    def gone(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(module.pwd, "getpwnam", gone)  # removed since it was checked
    with pytest.raises(ConfigError, match=r"\[gmta\] user: there is no account"):
        worker_account(config)


def test_only_root_can_become_another(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(entry for entry in pwd.getpwall() if entry.pw_uid not in (0, 4321))
    site.write(more=f"user = {other.pw_name}")
    config = load(str(site.file))
    monkeypatch.setattr(module.os, "geteuid", lambda: 4321)
    with pytest.raises(ConfigError, match=f"only root can start workers as {other.pw_name}"):
        worker_account(config)
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    assert worker_account(config) == other


def test_a_data_directory_that_cannot_be_made(site: Site) -> None:
    (site.directory / "var").write_text("a file")
    supervisor = site.supervisor()
    with pytest.raises(ConfigError, match=r"\[gmta\] data_dir: .*var can't be made"):
        supervisor.start()
    supervisor.act(signal.SIGTERM)


# --- systemd ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_what_systemd_is_told(short: Path, abstract: bool) -> None:
    name = f"gmta-test-{os.getpid()}"
    listener = Manager("\0" + name if abstract else str(short / name))
    clock = Clock()
    environ = {"NOTIFY_SOCKET": "@" + name if abstract else str(short / name), "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "77", "OTHER": "x"}
    notifier = Notifier(environ, 77, clock)
    assert environ == {"OTHER": "x"}  # a child must not speak for us
    notifier.ready("2 workers\nserving")
    assert listener.heard() == {"READY": "1", "STATUS": "2 workers serving"}
    notifier.reloading()
    told = listener.heard()
    assert told["RELOADING"] == "1" and told["MONOTONIC_USEC"].isdigit()
    notifier.alive()
    notifier.alive()  # too early again
    clock.now += 1.5
    notifier.alive()
    notifier.stopping()
    assert [listener.heard() for _ in range(3)] == [{"WATCHDOG": "1"}, {"WATCHDOG": "1"}, {"STOPPING": "1", "STATUS": "stopping"}]
    listener.sock.close()
    notifier.ready("nobody listens")


@pytest.mark.parametrize("environ", [{}, {"WATCHDOG_USEC": "3000000"}, {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "x", "WATCHDOG_PID": "1"}])
def test_without_systemd_nothing_is_told(environ: dict[str, str]) -> None:
    notifier = Notifier(environ, 77)
    notifier.alive()
    notifier.ready("x")
    assert environ == {}


def test_another_process_is_not_the_watchdogs(manager: Manager, short: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(short / "notify"), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "78"}, 77)
    notifier.alive()
    notifier.status("quiet")
    assert manager.heard() == {"STATUS": "quiet"}


class Descriptors:
    """Sockets at consecutive descriptors, as a service manager passes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", 400)
        self.next = 400
        self.names: list[str] = []

    def add(self, sock: socket.socket, name: str = "gmta.socket", listen: bool = True) -> tuple[str, int]:
        if listen:
            sock.listen()
        address = sock.getsockname()
        os.dup2(sock.fileno(), self.next)
        sock.close()
        self.next += 1
        self.names.append(name)
        return address[:2] if isinstance(address, tuple) else ("", 0)

    def environ(self) -> dict[str, str]:
        return {"LISTEN_FDS": str(self.next - 400), "LISTEN_PID": "77", "LISTEN_FDNAMES": ":".join(self.names)}


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Descriptors]:
    made = Descriptors(monkeypatch)
    yield made
    os.closerange(400, made.next)


def bound(family: int = socket.AF_INET, host: str = "127.0.0.1", kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(family, kind)
    if host == "::":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    return sock


def test_given_sockets_are_matched_by_name_then_by_address(site: Site, descriptors: Descriptors) -> None:
    named = descriptors.add(bound(), "submission")
    host, port = descriptors.add(bound())
    both = descriptors.add(bound(socket.AF_INET6, "::"))
    site.file.write_text(f"[gmta]\nhostname = mx.test\nworkers = 2\n[listener:mx]\naddress = {host}:{port}, 127.0.0.1:{site.port}\n"
                         f"[listener:submission]\naddress = 127.0.0.1:1\n[listener:all]\naddress = *:{both[1]}, [::]:{both[1]}\n")
    environ = descriptors.environ()
    given = given_sockets(environ, 77)
    assert environ == {}
    config, errors = load(str(site.file)), list[str]()
    found = match_given(config, given, errors)
    assert not errors
    assert {key: (listening.shared, len(listening.sockets)) for key, listening in found.items()} == {
        ("submission", *named): (True, 1), ("mx", host, port): (True, 1), ("all", "0.0.0.0", both[1]): (True, 1), ("all", "::", both[1]): (True, 0)}
    supervisor = site.supervisor()
    supervisor._given = given
    supervisor.start()  # binds what systemd did not give, and nothing in the place of what it did
    assert {key: (listening.shared, len(listening.sockets)) for key, listening in supervisor.listening.items()} == {
        ("submission", *named): (True, 1), ("mx", host, port): (True, 1), ("mx", "127.0.0.1", site.port): (False, 2),
        ("all", "0.0.0.0", both[1]): (True, 1), ("all", "::", both[1]): (True, 0)}
    for one in given:
        one.sock.detach()


def test_a_given_socket_that_serves_no_listener_is_an_error(site: Site, descriptors: Descriptors) -> None:
    _, port = descriptors.add(bound(), "smtp")
    given = given_sockets(descriptors.environ(), 77)
    errors: list[str] = []
    assert match_given(load(str(site.file)), given, errors) == {}
    assert errors == [f"socket smtp (127.0.0.1:{port}) from systemd serves no listener: expected FileDescriptorName= to be one of mx, "
                      "or ListenStream= to be an address of one"]
    given[0].sock.detach()


def test_what_is_no_listening_socket_is_an_error(descriptors: Descriptors, short: Path) -> None:
    descriptors.add(bound(kind=socket.SOCK_DGRAM), "udp", listen=False)
    descriptors.add(bound(), "deaf", listen=False)
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(short / "s"))
    descriptors.add(local, "unix")
    os.dup2(os.open("/dev/null", os.O_RDONLY), descriptors.next)
    descriptors.next += 1
    with pytest.raises(ConfigError) as refused:
        given_sockets(descriptors.environ(), 77)
    assert [error.split(" from systemd: ")[0] for error in refused.value.errors] == ["socket udp", "socket deaf", "socket unix", "socket 403"]


@pytest.mark.parametrize("environ", [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "78"}, {"LISTEN_FDS": "x", "LISTEN_PID": "77"},
                                     {"LISTEN_FDS": "0", "LISTEN_PID": "77", "LISTEN_FDNAMES": ""}])
def test_sockets_meant_for_another_are_left_alone(environ: dict[str, str]) -> None:
    assert given_sockets(environ, 77) == [] and environ == {}


LAUNCH = """
import json, os, sys
given = json.loads(sys.argv[1])
for index, (descriptor, name) in enumerate(given):
    os.dup2(descriptor, 50 + index)
for index in range(len(given)):
    os.dup2(50 + index, 3 + index)
os.environ |= {"LISTEN_FDS": str(len(given)), "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": ":".join(name for _, name in given)}
os.execv(sys.executable, [sys.executable, "-m", "gmta", "serve", "-c", sys.argv[2]])
"""


def serve(site: Site, sockets: list[tuple[socket.socket, str]], **environ: str) -> subprocess.Popen[bytes]:
    """`gmta serve` with sockets passed as systemd passes them."""
    given = json.dumps([(sock.fileno(), name) for sock, name in sockets])
    with open(site.directory / "output", "wb") as output:
        return subprocess.Popen([sys.executable, "-c", LAUNCH, given, str(site.file)], pass_fds=[sock.fileno() for sock, _ in sockets],
                                env=os.environ | environ, stdout=output, stderr=output)


def banner(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        return client.recv(100)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_serve_under_systemd(site: Site, manager: Manager, short: Path) -> None:
    named, other = bound(), bound()
    named.listen()
    other.listen()
    site.write(workers=2)
    site.file.write_text(site.file.read_text() + f"[listener:submission]\naddress = 127.0.0.1:1\nrole = submission\n"
                         f"[listener:third]\naddress = 127.0.0.1:{other.getsockname()[1]}\n")
    process = serve(site, [(named, "submission"), (other, "x.socket")], NOTIFY_SOCKET=str(short / "notify"), WATCHDOG_USEC="400000")
    try:
        assert manager.until("READY") == {"READY": "1", "STATUS": "2 workers serving"}, (site.directory / "output").read_text()
        ports = [named.getsockname()[1], other.getsockname()[1], site.port]
        assert all(banner(port).startswith(b"220 mx.test") for port in ports)
        before = children(process.pid)
        for worker in before:
            inherited = Path(f"/proc/{worker}/environ").read_bytes()
            assert not any(name in inherited for name in (b"LISTEN_", b"NOTIFY_SOCKET", b"WATCHDOG_"))
        manager.until("WATCHDOG")
        os.kill(before[0], signal.SIGKILL)
        assert all(banner(port).startswith(b"220 mx.test") for port in ports)  # the other one serves, or the next
        process.send_signal(signal.SIGHUP)
        assert int(manager.until("RELOADING")["MONOTONIC_USEC"]) > 0
        assert manager.until("READY")["READY"] == "1"
        assert all(banner(port).startswith(b"220 mx.test") for port in ports)
        process.send_signal(signal.SIGTERM)
        manager.until("STOPPING")
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        named.close()
        other.close()


def test_serve_says_which_socket_it_has_no_listener_for(site: Site) -> None:
    stray = bound()
    stray.listen()
    process = serve(site, [(stray, "smtp")])
    try:
        assert process.wait(DEADLINE_S) == EX_CONFIG
        assert "socket smtp (127.0.0.1:" in (site.directory / "output").read_text()
    finally:
        process.kill()
        process.wait()
        stray.close()


def test_an_agent_that_does_not_leave_is_killed(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor that waits for it would serve no signal, and no worker."""
    monkeypatch.setattr(module, "AGENT_STOP_S", 0.1)
    monkeypatch.setattr(module, "AGENT", (sys.executable, "-I", "-S", "-c", f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(short / "ready")!r}, "w").close()
while True:
    signal.pause()
"""))
    (short / "config.ini").write_text("")
    agent = module.AgentProcess(load(str(short / "config.ini")), os.geteuid())
    agent.watch(0.0, MemoryLog())  # type: ignore[arg-type]
    assert agent._popen is not None
    until((short / "ready").exists, "an agent")
    popen = agent._popen
    agent.stop()
    assert popen.returncode == -signal.SIGKILL
