"""The worker's end of the maildrop: takes what local programs left there and receives it, as from a client that is trusted.

One worker at a time does it: the one that holds the directory's lock, which dies with its process. A file is claimed by renaming
it to `taken/QUEUEID` before anything is queued under that id, and removed when the store has it; so after a crash the queue's
history tells whether what lies in `taken` is done. The message goes through ServerProtocol and Reception like any other: limits,
permit, check, edit, get_headers and get_signatures hooks; only the greeting is left out.

Failure: what is refused for good is queued all the same, to fail there, so that its sender gets a report; what is refused for
now (4xx, no room) is tried again until [queue] lifetime is over; a file that is no message is set aside in `odd` with a log
line. Nothing blocks other files.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

import gevent
from gevent.pool import Pool

from gmta.mail import reply as replies
from gmta.mail.address import Address
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message, split_header
from gmta.mail.reply import Reply
from gmta.mail.session import Session
from gmta.queue import maildrop
from gmta.queue.admin import ask
from gmta.queue.maildrop import BadDrop, Drop, Opened
from gmta.queue.store import Event
from gmta.receive.pipeline import Pipeline, Reception
from gmta.services.files import sync_directory
from gmta.smtp import events
from gmta.smtp.client import ClientProtocol
from gmta.smtp.data import Stuffer
from gmta.smtp.server import Extensions, ServerProtocol

POLL_S = 0.5
LOCK_S = 1.0  # between two tries to become the one that picks up
AT_ONCE = 20  # files in hand
WINDOW = 500  # names taken in one look
RETRY_S = 10.0  # doubles from try to try
MAX_RETRY_S = 300.0
UNFINISHED_S = 86400.0  # a file that nobody completed for so long is removed
CHUNK = 256 * 1024
HEAD = 2 * 1024 * 1024  # octets looked through for the end of the header section

_NAME = re.compile(r"[0-9A-V]{16}\.mail\Z")


class LocalSession(Session):
    """A session with a program of this machine."""

    __slots__ = ()

    @property
    def protocol(self) -> str:
        """The with-protocol of Received."""
        return "local"


class Deferred(Exception):
    """Not now; the text says why."""


class Claim:
    """A file in hand. path: where it lies now.  tries: how often it was taken before.  settled: recipients that are seen to already."""

    __slots__ = ("path", "settled", "tries")

    def __init__(self, path: str) -> None:
        self.path = path
        self.tries = 0
        self.settled: set[Address] = set()


class Dialogue:
    """A client and a server in memory: one message's commands and the reception's answers."""

    def __init__(self, pipeline: Pipeline, session: Session) -> None:
        self.reception = Reception(pipeline, session)
        extensions = Extensions(size=pipeline.size_limit(session), rcpt_max=pipeline.recipients)
        self._server = ServerProtocol(extensions, pipeline.hostname, bounds=pipeline.bounds)
        self._client = ClientProtocol(greeted=True)
        self._say(self._client.ehlo(session.helo))

    def mail(self, drop: Drop, size: int) -> Reply:
        """MAIL."""
        return self._answer(self._client.mail(drop.sender, size, drop.body, drop.smtputf8, drop.ret, drop.envid))

    def rcpt(self, recipient: Address, notify: Iterable[str]) -> Reply:
        """RCPT."""
        return self._answer(self._client.rcpt(recipient, notify))

    def data(self, pieces: Iterable[bytes]) -> Reply:
        """DATA and the message; the refusal of either, or the 250."""
        reply: Reply | None = self._answer(self._client.data())
        if reply is not None and reply.code != 354:
            return reply
        stuffer = Stuffer()
        for piece in pieces:
            reply = self._say(stuffer.feed(piece))
            if reply is not None:
                return reply  # read no further
        return self._answer(stuffer.finish())

    def _answer(self, octets: bytes) -> Reply:
        reply = self._say(octets)
        assert reply is not None
        return reply

    def _say(self, octets: bytes) -> Reply | None:
        """The last answer to what the client sends, None where it asks for none."""
        server, last = self._server, None
        server.receive_data(octets)
        while (event := server.next_event()) is not None:
            if type(event) is events.Body:
                self.reception.body(event.data)
                continue
            if type(event) is events.Hello:
                last = replies.OK
            elif type(event) is events.Fault:
                last = event.reply
            else:
                last = self.reception.answer(event)
            self._client.receive_data(server.reply(last))
            self._client.next_reply()
        return last


class Pickup:
    """directory: the maildrop.  queue: the queue's, whose history tells what is done.  lifetime_s: how long a file is tried."""

    def __init__(self, directory: str, queue: str, pipeline: Pipeline, lifetime_s: float) -> None:
        self._directory = directory
        self._taken = os.path.join(directory, maildrop.TAKEN)
        self._odd = os.path.join(directory, maildrop.ODD)
        self._queue = queue
        self._pipeline = pipeline
        self._lifetime_s = lifetime_s
        self._log = pipeline.services.log
        self._clock = pipeline.services.clock
        self._busy: set[str] = set()
        self._later: dict[str, tuple[float, Claim]] = {}
        self._recovered = False
        self._stopping = False
        self._seen = -1
        self._serial = 0
        self._pool = Pool(AT_ONCE)
        self._loop: gevent.Greenlet | None = None

    def start(self) -> None:
        """Starts looking."""
        self._loop = gevent.spawn(self._watch)

    def stop(self, timeout_s: float) -> None:
        """Stops; what is in hand gets timeout_s, and is taken up by the next worker otherwise."""
        self._stopping = True
        self._pool.join(timeout_s)
        self._pool.kill()
        if self._loop is not None:
            self._loop.kill()

    # -- looking ----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Waits for the lock, then looks for files until the worker ends; a directory that can't be read is tried again."""
        said = ""
        while True:
            lock = -1
            try:
                lock = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._recovered, self._seen, said = False, -1, ""  # what another left undone may lie here unchanged
                while True:
                    self.turn()
                    gevent.sleep(POLL_S)
            except BlockingIOError:
                pass  # another worker has it
            except OSError as error:
                if said != str(error):
                    self._log.error("maildrop can't be read", error=str(error))
                said = str(error)
            finally:
                if lock >= 0:
                    self._pool.join()  # whoever has the lock takes up all that lies in `taken`
                    self._later.clear()
                    os.close(lock)
            gevent.sleep(LOCK_S)

    def turn(self) -> None:
        """Looks once, and takes in hand what it finds; raises OSError where the directory can't be read."""
        now = self._clock()
        if self._stopping:
            return
        if not self._recovered:
            self._recovered = True
            for name in sorted(os.listdir(self._taken)):
                self._begin(Claim(os.path.join(self._taken, name)))
        for path, (at, claim) in list(self._later.items()):
            if at <= now:
                del self._later[path]
                self._begin(claim)
        stat = os.stat(self._directory)
        if stat.st_mtime_ns == self._seen:
            return
        passed = self._busy | self._later.keys()
        found, strays = _in_thread(lambda: look(self._directory, passed, now))
        for path in strays:
            self._set_aside(path, "not named as a dropped message is")
        for path in found:
            self._begin(Claim(path))
        # a name that came within the same tick of the file system's clock may have been missed: look again until that is past
        self._seen = stat.st_mtime_ns if now - stat.st_mtime > 1 and len(found) < WINDOW else -1

    def _begin(self, claim: Claim) -> None:
        """Takes a file in hand; waits while AT_ONCE are."""
        self._busy.add(claim.path)
        self._pool.spawn(self._take, claim, claim.path)

    # -- one file ---------------------------------------------------------------------------------------------------

    def _take(self, claim: Claim, found: str) -> None:
        """Receives one file, and sees to it whatever comes of that. found: the name it is busy under."""
        try:
            if claim.tries or os.path.dirname(found) != self._taken or not self._is_done(os.path.basename(found)):
                self._receive(claim)
            os.unlink(claim.path)
        except FileNotFoundError:
            self._log.info("dropped message was withdrawn", file=os.path.basename(claim.path))
        except (BadDrop, PermissionError) as error:
            self._set_aside(claim.path, str(error))
        except Exception as error:  # this file only: the greenlet's own containment; Deferred, the store, the disk
            pause_s = min(MAX_RETRY_S, RETRY_S * 2 ** min(claim.tries, 10))
            self._log.warning("dropped message is left for later", file=os.path.basename(claim.path), reason=str(error) or repr(error), next_try_s=pause_s)
            claim.tries += 1
            self._later[claim.path] = (self._clock() + pause_s, claim)
        finally:
            self._busy.discard(found)

    def _is_done(self, queue_id: str) -> bool:
        """Whether a message was queued under the id of a claim; raises StoreError."""
        return bool(ask(self._pipeline.services, self._queue, lambda admin: admin.trace(queue_id)))

    def _receive(self, claim: Claim) -> None:
        """Queues a file's message, and what is refused of it; raises BadDrop, Deferred, StoreError, OSError."""
        opened: Opened = _in_thread(lambda: maildrop.open_drop(claim.path))
        with opened.file:
            self._serial += 1
            session = LocalSession(f"local-{opened.uid}-{self._serial:x}", role="local", listener="", peer_ip="127.0.0.1", relay_network=True,
                                   opened_at=self._clock())
            session.helo, session.peer_name, session.esmtp = "localhost", "localhost", True
            dialogue = Dialogue(self._pipeline, session)
            try:
                self._talk(dialogue, claim, opened)
            finally:
                dialogue.reception.forget()

    def _talk(self, dialogue: Dialogue, claim: Claim, opened: Opened) -> None:
        """The dialogue about one message."""
        drop = opened.drop
        reply = self._last_word(dialogue.mail(drop, opened.size), opened)
        transaction = dialogue.reception.transaction
        queue_id = transaction.id if transaction is not None else self._pipeline.ids.new()
        self._claim(claim, queue_id)
        self._log.info("picked up", session=dialogue.reception.session.id, id=queue_id, uid=opened.uid, sender=f"<{drop.sender}>",
                       recipients=len(drop.recipients))
        recipients = [address for address in drop.recipients if address not in claim.settled]
        if reply.code >= 400:
            self._fail(queue_id, claim, opened, [(address, reply) for address in recipients])
            return
        refused: list[tuple[Address, Reply]] = []
        left: list[Address] = []
        for number, address in enumerate(recipients):
            reply = dialogue.rcpt(address, drop.notify)
            if reply == replies.TOO_MANY_RECIPIENTS and left:  # aliases made more of them than one message may have
                self._split(claim, opened, recipients[number:])
                break
            reply = self._last_word(reply, opened)
            if reply.code < 400:
                left.append(address)
            else:
                refused.append((address, reply))
        if not left:
            self._fail(queue_id, claim, opened, refused)
            return
        if refused:  # under an id of its own: queue_id says whether the rest is done
            self._fail(self._pipeline.ids.new(), claim, opened, refused)
        opened.file.seek(opened.start)
        reply = self._last_word(dialogue.data(iter(lambda: _in_thread(lambda: opened.file.read(CHUNK)), b"")), opened)
        if reply.code >= 400:
            self._fail(queue_id, claim, opened, [(address, reply) for address in left])

    def _last_word(self, reply: Reply, opened: Opened) -> Reply:
        """The reply where it settles something; raises Deferred for a 4xx while there is time."""
        if not reply.transient:
            return reply
        if self._clock() - opened.at <= self._lifetime_s:
            raise Deferred(str(reply))
        return Reply(554, "5.4.7", f"Delivery time expired; last reply: {reply}")

    def _claim(self, claim: Claim, queue_id: str) -> None:
        """Gives the file the name of the id that it is queued under, for good."""
        path = os.path.join(self._taken, queue_id)

        def rename() -> None:
            os.rename(claim.path, path)
            sync_directory(self._taken)
            sync_directory(self._directory)

        _in_thread(rename)
        claim.path = path

    def _fail(self, queue_id: str, claim: Claim, opened: Opened, refused: list[tuple[Address, Reply]]) -> None:
        """Queues the message for recipients that can't have it: they fail at once, and the sender gets the report it asked for."""
        pipeline, drop, now = self._pipeline, opened.drop, self._clock()
        message: Message = _in_thread(lambda: message_of(opened, claim.path))
        recipients = [RecipientState(number, address, notify=drop.notify, transport="fail", fixed_transport=True, next_attempt_at=now,
                                     last_reply=str(reply), refused=str(reply)) for number, (address, reply) in enumerate(refused)]
        envelope = Envelope(queue_id, drop.sender, recipients, message.size, now, drop.ret, drop.envid, drop.body, drop.smtputf8,
                            {"protocol": "local", "uid": opened.uid})
        facts: dict[str, Any] = {**envelope.facts, "size": envelope.size, "sender": str(drop.sender),
                                 "refused": {str(address): str(reply) for address, reply in refused}}
        pipeline.store.put(envelope, message, (Event(queue_id, now, "received", facts),))
        for address, reply in refused:
            self._log.info("refused", id=queue_id, stage="maildrop", sender=f"<{drop.sender}>", to=address, reply=str(reply))
        claim.settled.update(address for address, _ in refused)
        pipeline.accept(envelope, message)

    def _split(self, claim: Claim, opened: Opened, recipients: list[Address]) -> None:
        """Leaves a message for some of its recipients in the maildrop, as another one."""
        drop = opened.drop
        name = self._pipeline.ids.new()

        def copy() -> None:
            file = maildrop.Sender(self._directory, name, Drop(drop.sender, recipients, drop.notify, drop.ret, drop.envid))
            try:
                opened.file.seek(opened.start)
                for piece in iter(lambda: opened.file.read(CHUNK), b""):
                    file.write(piece)
                file.commit()
            finally:
                file.abandon()

        _in_thread(copy)
        claim.settled.update(recipients)

    def _set_aside(self, path: str, reason: str) -> None:
        """Puts a file where it is not looked at again."""
        self._log.warning("odd file in the maildrop set aside", file=os.path.basename(path), reason=reason)
        try:
            os.rename(path, os.path.join(self._odd, f"{os.path.basename(path)}.{int(self._clock())}"))
        except FileNotFoundError:
            pass  # its owner took it back
        except OSError as error:
            self._log.error("odd file stays in the maildrop", file=os.path.basename(path), error=str(error))


def look(directory: str, passed: Collection[str], now: float) -> tuple[list[str], list[str]]:
    """(paths of complete files, oldest first, WINDOW at most; paths of strays). Removes unfinished files of long ago. Blocks."""
    strays: list[str] = []

    def complete() -> Iterable[str]:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.path in passed or entry.name in (maildrop.TAKEN, maildrop.ODD):
                    continue
                if _NAME.match(entry.name) is not None:
                    yield entry.path
                elif not entry.name.endswith(maildrop.UNFINISHED):
                    if len(strays) < WINDOW:
                        strays.append(entry.path)
                else:
                    with suppress(FileNotFoundError):  # it was completed, or given up, since the directory was read
                        if now - entry.stat(follow_symlinks=False).st_mtime > UNFINISHED_S:
                            os.unlink(entry.path)

    return heapq.nsmallest(WINDOW, complete()), strays


def message_of(opened: Opened, path: str) -> Message:
    """A dropped file's message; a large body stays in the file, for the store to copy (blocks)."""
    opened.file.seek(opened.start)
    head = opened.file.read(HEAD)
    if len(head) < HEAD:
        return Message.from_bytes(head)
    header, separator = split_header(head)
    start = header + separator
    return Message(head[:header], head[header:start], FileBody(path, opened.start + start, opened.size - start))


def _in_thread(call: Callable[[], Any]) -> Any:
    """What `call` gives or raises, run in a native thread."""

    def run() -> tuple[Any, Exception | None]:
        try:
            return call(), None
        except (OSError, BadDrop, sqlite3.Error) as error:  # raised below: the pool would print it
            return None, error

    value, error = gevent.get_hub().threadpool.apply(run)
    if error is not None:
        raise error
    return value

