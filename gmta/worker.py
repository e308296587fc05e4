"""One worker process: builds the objects, serves the sockets it inherits, delivers, drains.

Started by the supervisor as a fresh interpreter: `python -m gmta.worker`, with GMTA_WORKER in the environment naming the descriptors.
Its first statement is the monkey patch. Exit status 78: it can't boot (bad configuration), so the supervisor must not retry.
"""

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from gevent.event import Event as Flag  # noqa: E402

from gmta.config import ACME, EX_CONFIG, Config, ConfigError  # noqa: E402
from gmta.deliver.agent import AgentTransport  # noqa: E402
from gmta.deliver.scheduler import Scheduler  # noqa: E402
from gmta.mail.address import Address  # noqa: E402
from gmta.mail.reply import NO_PROXY  # noqa: E402
from gmta.mail.session import Session  # noqa: E402
from gmta.plugins import PluginManager  # noqa: E402
from gmta.queue import maildrop  # noqa: E402
from gmta.queue.admin import ask  # noqa: E402
from gmta.queue.ids import IdSource  # noqa: E402
from gmta.queue.sqlite import SqliteStore  # noqa: E402
from gmta.queue.store import Event, Store, StoreError  # noqa: E402
from gmta.receive.connection import Connection  # noqa: E402
from gmta.receive.limits import ConnectionLimits, within  # noqa: E402
from gmta.receive.pickup import Pickup  # noqa: E402
from gmta.receive.pipeline import Pipeline  # noqa: E402
from gmta.receive.proxy import read_header, turn_away  # noqa: E402
from gmta.services import Services  # noqa: E402
from gmta.services.dns import Resolver  # noqa: E402
from gmta.services.log import Log  # noqa: E402
from gmta.services.metrics import Metrics  # noqa: E402
from gmta.services.tls import ServerTls, TlsError  # noqa: E402

DRAIN_S = 30.0
PROXY_S = 10.0  # a proxy has its header ready
GRACE_S = 2.0  # sessions under way when the worker is to leave may begin messages for so long


class Worker:
    """A worker's objects. sockets: (listener name, listening socket)."""

    def __init__(self, config: Config, sockets: list[tuple[str, Any]], number: int, agent: str = "") -> None:
        self.config = config
        self.number = number
        self.log = Log(config.gmta.log_level, config.gmta.log_format, config.gmta.log_file or None)
        self.metrics = Metrics(config.metrics.address, os.path.join(config.gmta.data_dir, "metrics"))
        self.services = Services(config, self.log, self.metrics, resolver=Resolver.configured(config))
        self.services.agent = agent
        self.plugins = PluginManager(config, self.services, self.log, self.metrics)
        for name, transport in list(self.plugins.transports.items()) if agent else ():
            if config.transports[name].get("user") and hasattr(transport, "user_of"):
                self.plugins.transports[name] = AgentTransport(name, transport, agent, self.log, many=config.transports[name]["user"] == "{user}")
        self.ids = IdSource(self.services.clock)
        self.store = self._open_store()
        self.scheduler = Scheduler(config, self.store, self.plugins, self.services, self.ids, self._shares())
        self.pipeline = Pipeline(config, self.plugins, self.store, self.services, self.ids, self.scheduler.accept)
        self.pickup = Pickup(os.path.join(config.gmta.data_dir, maildrop.DIRECTORY), os.path.join(config.gmta.data_dir, "queue"), self.pipeline,
                             config.queue.lifetime)
        self.limits = ConnectionLimits(config.limits, config.domains.relay_from, config.gmta.workers)
        self._sockets = [(name, sock) for name, sock in sockets if name != ACME]
        for _, sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what it accepts has it from here
        self._connections: set[Connection] = set()
        self._stopping = Flag()
        self._orphaned = False  # the supervisor is gone
        self._serial = 0
        self._pid = os.getpid()
        tls = config.tls
        names = {name: (other.certificate, other.key) for name, other in config.tls_names.items()}
        self._acme: Any = None
        if config.obtained:
            from gmta.services import acme

            try:
                acme.provide(config.obtained)
            except OSError as error:
                raise ConfigError([f"[acme]: a certificate can't be kept: {error.filename}: {error.strerror}"]) from error
            if number == 0:
                self._acme = acme.Acme(config, self.services, [sock for name, sock in sockets if name == ACME])
        self._tls = {listener.client_ca: ServerTls(tls.certificate, tls.key or None, tls.minimum_version, names, listener.client_ca, self.log)
                     for listener in config.listeners.values()} if tls.certificate else {}

    def _open_store(self) -> Store:
        """The queue that [queue] store names."""
        config, services = self.config, self.services
        directory = os.path.join(config.gmta.data_dir, "queue")
        if services.database is None:
            return SqliteStore(directory, instance_tag=self.ids.tag, log=self.log, history_s=config.queue.history,
                               message_limit=config.limits.message_size)
        from gmta.queue.postgres import PostgresStore

        return PostgresStore(services.database, directory, node=services.node, log=self.log, history_s=config.queue.history,
                             message_limit=config.limits.message_size, lease_s=config.queue.lease)

    def _shares(self) -> Any:
        """What makes limits and back-off of lanes those of all nodes, where they have one database."""
        if self.services.database is None:
            return None
        from gmta.deliver.shares import LaneShares

        return LaneShares(self.services.database, f"{self.services.node}/{self.ids.tag}", self.log, self.services.clock)

    def run(self, beat: int, life: int) -> None:
        """Serves until SIGTERM or until the supervisor is gone. beat: pipe to write to; life: pipe that ends with the supervisor."""
        gevent.signal_handler(signal.SIGTERM, self._stopping.set)
        gevent.signal_handler(signal.SIGINT, lambda: None)
        gevent.signal_handler(signal.SIGHUP, lambda: None)
        gevent.signal_handler(signal.SIGUSR1, self.log.reopen)
        self.scheduler.start()
        self.store.listen(self.scheduler.look)
        self.pickup.start()
        acceptors = [gevent.spawn(self._accept, name, sock) for name, sock in self._sockets]
        if life >= 0:
            gevent.spawn(self._watch, life)
        if beat >= 0:
            os.set_blocking(beat, False)
            os.write(beat, b"r")
            gevent.spawn(self._beat, beat)
        if self.number == 0 and self.metrics.enabled:
            gevent.spawn(self._export)
        if self._acme is not None:
            self._acme.start()
        self.plugins.on("on_worker_started", self)
        self.log.info("worker started", worker=self.number, pid=os.getpid())
        self._stopping.wait()
        self.plugins.on("on_worker_stopping", self)
        gevent.killall(acceptors)
        if self._acme is not None:
            self._acme.stop()
        if self._orphaned:
            self._let_go()
        self.pickup.stop(5.0)
        self._drain()
        self.scheduler.stop(10.0)
        self.store.close()
        self.plugins.close()
        self.services.close()
        self.metrics.close()
        self.log.info("worker stopped", worker=self.number, pid=os.getpid())

    def _let_go(self) -> None:
        """Serves who is in the backlog, then closes the sockets: nobody else holds them, and a new supervisor needs the port."""
        for name, sock in self._sockets:
            sock.settimeout(0)
            try:
                while True:
                    gevent.spawn(self._serve, *sock.accept(), name, self.config.listeners[name])
            except OSError:
                os.close(sock.detach())  # at once: who gets into the backlog now would be reset
        gevent.sleep(0)  # so that they count among the connections

    def _drain(self) -> None:
        began = time.monotonic()
        while self._connections and time.monotonic() < began + DRAIN_S:
            self.limits.draining = time.monotonic() > began + GRACE_S
            for connection in list(self._connections):
                if connection.shut_down():
                    self._connections.discard(connection)
            gevent.sleep(0.02)

    def _watch(self, life: int) -> None:
        gevent.os.tp_read(life, 1)
        self._orphaned = True
        self._stopping.set()

    def _beat(self, beat: int) -> None:
        while True:
            gevent.sleep(1.0)
            try:
                os.write(beat, b".")
            except BlockingIOError:
                pass
            except OSError:
                return

    def _export(self) -> None:
        """Serves the metrics of all workers, as soon as the worker before this one has let the address go."""
        said = False
        while True:
            try:
                self.metrics.serve()
                return
            except OSError as error:
                if not said:
                    self.log.warning("metrics address is taken", error=str(error))
                said = True
            gevent.sleep(1.0)

    def _accept(self, name: str, listening: Any) -> None:
        listener = self.config.listeners[name]
        while True:
            try:
                accepted, peer = listening.accept()
            except OSError as error:
                self.log.warning("can't accept", listener=name, error=str(error))
                gevent.sleep(0.1)
                continue
            gevent.spawn(self._serve, accepted, peer, name, listener)

    def _serve(self, accepted: Any, peer: Any, name: str, listener: Any) -> None:
        ip, port = _plain(peer[0]), peer[1]
        local_ip, local_port = accepted.getsockname()[:2]
        local_ip = _plain(local_ip)
        if listener.proxy_protocol:
            try:
                if not within(ip, listener.proxy_from):  # what others say about clients is not believed
                    raise ValueError("not in proxy_from")
                client = read_header(accepted, PROXY_S)
            except (ValueError, OSError) as error:
                self.log.warning("no client behind a proxy", listener=name, ip=ip, reason=str(error) or type(error).__name__)
                turn_away(accepted, NO_PROXY.wire())
                return
            if client is not None:
                ip, port, local_ip, local_port = client
        admitted = self.limits.open(ip)
        self._serial += 1
        session = Session(f"{self._pid:x}-{self._serial:x}", role=listener.role, listener=name, peer_ip=ip, peer_port=port, local_ip=local_ip, local_port=local_port,
                          relay_network=self.limits.is_relay_network(ip), opened_at=self.services.clock())
        tls = self._tls.get(listener.client_ca) if listener.tls != "off" else None
        connection = Connection(accepted, session, listener, self.pipeline, tls, self.limits)
        self._connections.add(connection)
        try:
            reason = connection.run(admitted)
            if reason != "quit":
                self.log.info("session closed", session=session.id, ip=ip, reason=reason)
        except Exception as error:  # this session only: the greenlet's own containment
            self.log.error("session failed", session=session.id, ip=ip, error=repr(error))
        finally:
            self._connections.discard(connection)
            self.limits.close(ip, admitted)

    def happened(self, since: float, kinds: Sequence[str], limit: int) -> list[tuple[Event, dict[str, Any]]]:
        """What the queue's history, of all workers of this machine, says since that time: for who may have missed it. Raises OSError."""
        try:
            return ask(self.services, os.path.join(self.config.gmta.data_dir, "queue"),
                       lambda admin: admin.happened(since, kinds, limit, self.services.node))
        except StoreError as error:
            raise OSError(str(error)) from error

    def submit(self, sender: Address, recipients: Sequence[Address], octets: bytes) -> None:
        """Hands in a message that a plugin made (CRLF line ends), as a local program does; returns when it is safe. Raises OSError."""
        drop, name = maildrop.Drop(sender, list(recipients)), self.ids.new()

        def write() -> None:
            file = maildrop.Sender(os.path.join(self.config.gmta.data_dir, maildrop.DIRECTORY), name, drop)
            try:
                file.write(octets)
                file.commit()
            finally:
                file.abandon()

        self.services.batch("submit").submit(write)


def _plain(ip: str) -> str:
    """An address without its zone; IPv4 that came to an IPv6 socket as IPv4."""
    ip = ip.partition("%")[0]
    return ip[7:] if ip.startswith("::ffff:") and "." in ip else ip


def main() -> int:
    """Entry of the worker process."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    given = json.loads(os.environ["GMTA_WORKER"])
    with os.fdopen(given["config"], "rb") as file:
        file.seek(0)
        text = file.read().decode()
    try:
        config = Config.from_snapshot(text)
        sockets = [(name, socket.socket(fileno=descriptor)) for name, descriptor in given["sockets"]]
        worker = Worker(config, sockets, given["number"], given.get("agent", ""))
    except ConfigError as error:
        print("\n".join(error.errors), file=sys.stderr)
        return EX_CONFIG
    except TlsError as error:
        print(f"[tls]: {error}", file=sys.stderr)
        return EX_CONFIG
    worker.run(given["beat"], given["life"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
