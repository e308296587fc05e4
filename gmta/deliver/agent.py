"""Deliveries that are to run as another user: handed by a worker, which is nobody, to the agent, which may become anybody but root.

`AgentTransport` stands in a worker for a transport that has `user_of(address)`, the name of the account which an address's mail is delivered
as. It asks the agent (gmta.agent) for each account by itself, over a Unix socket: a request in JSON, and the message in open files. One
connection is one account's, and is kept for the next message. What is delivered where the agent finds out for itself, from its own
configuration: who has a worker in his power can hand in mail, and no more.

Failure: an agent that is not there, ends, or says nothing within the transport's `longest_s` defers.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gevent
from gevent.lock import BoundedSemaphore

import gmta
from gmta.hookspecs import Delivery
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState, stored_address
from gmta.mail.message import CHUNK, FileBody, MemoryBody, Message
from gmta.mail.reply import Reply
from gmta.mail.verdict import Outcome, Status
from gmta.services.files import write_all

MAX_FRAME = 4 * 1024 * 1024  # octets: a hundred recipients with all that is known of them
LONGEST_S = 300.0  # a delivery of a transport that names no other time
GRACE_S = 30.0
ROOM_S = 10.0
ROOM_OF_ACCOUNT = 2  # questions about one account's room at a time; the others wait
CONCURRENCY = 32  # deliveries at a time, and connections kept: each is a process
OF_ACCOUNT = 4  # of them for one account, where each recipient is its own
_LENGTH = 4


class OpenBody(FileBody):
    """A body in a file that is open already: who reads it may have no right to open it."""

    __slots__ = ("_file",)

    def __init__(self, file: int, offset: int, size: int) -> None:
        super().__init__(f"descriptor {file}", offset, size)
        self._file = file

    def chunks(self, size: int = CHUNK) -> Iterator[bytes]:
        """The octets in pieces of up to `size`; raises OSError."""
        at, end = self.offset, self.offset + self.size
        while at < end:
            piece = os.pread(self._file, min(size, end - at), at)
            if not piece:
                raise OSError("the message is shorter than it was")
            at += len(piece)
            yield piece


# --- what goes over the socket --------------------------------------------------------------------------------------


def frame(value: Any) -> bytes:
    """JSON with its length in front."""
    data = json.dumps(value, separators=(",", ":")).encode("ascii")
    return len(data).to_bytes(_LENGTH, "big") + data


def read_frame(receive: Callable[[int], bytes], start: bytes = b"") -> Any:
    """The value of a frame. start: octets of it that are there already. Raises OSError, EOFError, ValueError."""
    data = start
    size = _LENGTH
    while len(data) < size:
        piece = receive(min(65536, size - len(data)))
        if not piece:
            raise EOFError
        data += piece
        if size == _LENGTH and len(data) >= _LENGTH:
            size += int.from_bytes(data[:_LENGTH], "big")
            if size > MAX_FRAME + _LENGTH:
                raise ValueError("a frame too large")
    return json.loads(data[_LENGTH:])


def request_of(delivery: Delivery, recipients: Sequence[RecipientState]) -> tuple[dict[str, Any], list[int]]:
    """(a delivery as JSON, open files with the message); raises OSError."""
    envelope, message = delivery.envelope, delivery.message
    header, body = message.header, message.body
    sizes = [len(header), len(message.separator), 0, body.size]
    files = [os.memfd_create("message", os.MFD_CLOEXEC)]
    try:
        write_all(files[0], header + message.separator)
        if isinstance(body, FileBody):
            files.append(os.open(body.path, os.O_RDONLY | os.O_CLOEXEC))
            sizes[2] = body.offset
        else:
            for piece in body.chunks():
                write_all(files[0], piece)
    except BaseException:
        close_all(files)
        raise
    rows = [{"number": one.number, "address": str(one.address), "original": one.original, "attempts": one.attempts} for one in recipients]
    return {"transport": delivery.transport, "id": envelope.id, "sender": str(envelope.sender), "size": envelope.size,
            "received_at": envelope.received_at, "envelope": envelope.to_dict(), "recipients": rows, "first_attempt": delivery.first_attempt,
            "message": sizes}, files


def delivery_of(request: Any, files: Sequence[int]) -> Delivery:
    """The Delivery of a request; raises ValueError, KeyError, TypeError, OSError for what is none."""
    recipients = [RecipientState(int(row["number"]), stored_address(str(row["address"])), str(row["original"]), attempts=int(row["attempts"]))
                  for row in request["recipients"]]
    header, separator, offset, size = (int(number) for number in request["message"])
    if min(header, separator, offset, size) < 0 or not files:
        raise ValueError("no message")
    top = b"".join(OpenBody(files[0], 0, header + separator).chunks())
    body: MemoryBody | FileBody
    if len(files) > 1:
        body = OpenBody(files[1], offset, size)
    else:
        body = OpenBody(files[0], header + separator, size)
    envelope = Envelope.from_dict(str(request["id"]), str(request["sender"]), int(request["size"]), float(request["received_at"]),
                                  dict(request["envelope"]), recipients)
    return Delivery(envelope, recipients, Message(top[:header], top[header:], body), str(request["transport"]),
                    first_attempt=bool(request["first_attempt"]))


def rows_of(outcomes: dict[int, Outcome]) -> list[dict[str, Any]]:
    """Outcomes as JSON."""
    return [{"number": number, "status": one.status.value, "code": one.reply.code, "enhanced": one.reply.enhanced, "text": one.reply.text,
             "recipient_fault": one.recipient_fault, "retry_after_s": one.retry_after_s} for number, one in outcomes.items()]


def outcomes_of(rows: Any) -> dict[int, Outcome]:
    """Outcomes from JSON; raises ValueError, KeyError, TypeError for what is none."""
    return {int(row["number"]): Outcome(Status(row["status"]), Reply(int(row["code"]), row["enhanced"], str(row["text"])),
                                        recipient_fault=bool(row["recipient_fault"]), retry_after_s=row["retry_after_s"]) for row in rows}


def close_all(files: Sequence[int]) -> None:
    """Closes descriptors."""
    for file in files:
        os.close(file)


# --- the worker's side ----------------------------------------------------------------------------------------------


class AgentTransport:
    """A transport whose deliveries the agent does. address: of the agent's socket.  many: there is an account for each recipient, and so a
    lane: whose command hangs holds up nobody else."""

    def __init__(self, name: str, transport: Any, address: str, log: Any, *, many: bool = False) -> None:
        self.name = name
        self.transport = transport
        self.concurrency = min(transport.concurrency, OF_ACCOUNT if many else CONCURRENCY)
        if many:
            self.next_hop = transport.user_of
        elif hasattr(transport, "next_hop"):
            self.next_hop = transport.next_hop
        self._slots = BoundedSemaphore(CONCURRENCY)
        self._room = ROOM_OF_ACCOUNT if many else CONCURRENCY
        self._asked: dict[str, tuple[BoundedSemaphore, int]] = {}
        self._address = address
        self._log = log
        self._longest_s = getattr(transport, "longest_s", LONGEST_S) + GRACE_S
        self._idle: dict[str, list[Any]] = {}

    def deliver(self, delivery: Delivery) -> dict[int, Outcome]:
        """Asks for each account by itself."""
        accounts: dict[str, list[RecipientState]] = {}
        for recipient in delivery.recipients:
            accounts.setdefault(self.transport.user_of(recipient.address), []).append(recipient)
        outcomes: dict[int, Outcome] = {}
        for account, recipients in accounts.items():
            try:
                with self._slots, gevent.Timeout(self._longest_s, TimeoutError("it gave no answer in time")):
                    outcomes |= self._ask(account, delivery, recipients)
            except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
                self._log.error("delivery agent failed", id=delivery.envelope.id, account=account, error=str(error) or type(error).__name__)
                later = gmta.deferred("The delivery agent can't be asked", enhanced="4.3.0")
                outcomes |= dict.fromkeys((recipient.number for recipient in recipients), later)
        return outcomes

    def room(self, address: Address, size: int) -> Outcome | None:
        """What the transport's own `room` says, asked as the account. Raises OSError where the agent can't be asked."""
        request = {"transport": self.name, "room": str(address), "size": size}
        account = self.transport.user_of(address)
        try:
            with gevent.Timeout(ROOM_S, TimeoutError("it gave no answer in time")), self._turn(account), self._slots:
                return self._request(account, request, []).get(0)
        except (EOFError, ValueError, KeyError, TypeError) as error:
            raise OSError(f"the delivery agent can't be asked: {error}") from error

    @contextmanager
    def _turn(self, account: str) -> Iterator[None]:
        """One of the questions about an account: whose home hangs may be asked for by many sessions, and is to take no others' slots."""
        turns, waiting = self._asked.get(account, (BoundedSemaphore(self._room), 0))
        self._asked[account] = turns, waiting + 1
        try:
            with turns:
                yield
        finally:
            waiting = self._asked.pop(account)[1] - 1
            if waiting:
                self._asked[account] = turns, waiting

    def close(self) -> None:
        """Closes kept connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()
        close = getattr(self.transport, "close", None)
        if close is not None:
            close()

    def _ask(self, account: str, delivery: Delivery, recipients: list[RecipientState]) -> dict[int, Outcome]:
        request, files = request_of(delivery, recipients)
        try:
            return self._request(account, request, files)
        finally:
            close_all(files)

    def _request(self, account: str, request: dict[str, Any], files: list[int]) -> dict[int, Outcome]:
        """Asks over a kept connection, else over a new one."""
        data = frame(request)
        while True:
            connection = self._kept(account)
            fresh = connection is None
            if connection is None:
                connection = self._connect()
            try:
                answer = self._exchange(connection, data, files)
            except BaseException as error:
                connection.close()
                if not fresh and isinstance(error, (ConnectionError, EOFError)):
                    data = frame({**request, "first_attempt": False})  # the process had its time; whether it began nobody knows
                    continue
                raise
            if answer["again"]:
                self._keep(account, connection)
            else:
                connection.close()
            return outcomes_of(answer["outcomes"])

    def _kept(self, account: str) -> Any:
        """A connection of this account that nobody uses, or None."""
        connections = self._idle.get(account)
        if not connections:
            return None
        connection = connections.pop()
        if not connections:
            del self._idle[account]
        return connection

    def _keep(self, account: str, connection: Any) -> None:
        """Keeps a connection for the next message of this account; of those of others as many as may work at a time."""
        self._idle.setdefault(account, []).append(connection)
        while sum(map(len, self._idle.values())) > CONCURRENCY:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop(0).close()
            if not self._idle[oldest]:
                del self._idle[oldest]

    def _connect(self) -> Any:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(self._address)
        except BaseException:
            connection.close()
            raise
        return connection

    @staticmethod
    def _exchange(connection: Any, data: bytes, files: list[int]) -> Any:
        sent = connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else [])
        if sent < len(data):  # to send nothing would be an error too, where it has answered and gone
            connection.sendall(data[sent:])
        return read_frame(connection.recv)
