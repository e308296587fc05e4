"""sendmail, mailq, newaliases: what programs of this machine call to send mail, with the faces they know.

`sendmail` reads a message from standard input (-bm, the default) or SMTP (-bs), and leaves it in the maildrop (gmta.queue.maildrop),
with the server up or down; whether a recipient exists is judged when a worker picks it up, and told to the sender by a report.
Of the configuration it reads what it needs ([gmta], [limits], [domains]) and no file that only the server may read, so that any
account that may write the maildrop can send. Options that change nothing here are taken and ignored.

Failure: a line on standard error and a status of sysexits.h: 64 usage, 65 bad data, 67 bad recipient, 69 not possible (too large),
73 the maildrop can't be written, 75 try again (no room), 78 configuration. Nothing is left in the maildrop then.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING

from gmta.cli import compose
from gmta.cli.output import clean
from gmta.config import EX_CONFIG, ConfigError, Domains, Gmta, Limits, Queue, Section, _Text, find, validate
from gmta.mail import reply as replies
from gmta.mail.address import NULL, Address, AddressError, domain_key
from gmta.mail.reply import Reply
from gmta.queue import maildrop
from gmta.queue.ids import IdSource
from gmta.queue.maildrop import Drop
from gmta.queue.store import StoreError
from gmta.services.files import NO_ROOM
from gmta.smtp import events
from gmta.smtp.server import Bounds, Extensions, ServerProtocol

if TYPE_CHECKING:
    from gmta.queue.admin import Admin

EX_USAGE = 64
EX_DATAERR = 65
EX_NOUSER = 67
EX_UNAVAILABLE = 69
EX_CANTCREAT = 73
EX_TEMPFAIL = 75
EX_NOPERM = 77

# what is not in `Options.take` changes nothing
FLAGS = "GITUcimntvx"
WITH_VALUE = "ABCFLNORVXbefhopr"


class Failure(Exception):
    """The end, with a status and its reason."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class Options:
    """What the command line says. sender: None where it does not."""

    mode: str = "m"
    config: str | None = None
    sender: str | None = None
    full_name: str = ""
    notify: frozenset[str] = frozenset()
    ret: str = ""
    envid: str = ""
    from_header: bool = False
    ignore_dots: bool = False
    gateway: bool = False
    verbose: bool = False
    flush: str | None = None
    recipients: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, arguments: list[str]) -> Options:
        """The options; raises Failure."""
        options = cls(recipients=list(arguments))
        rest = options.recipients
        while rest and rest[0].startswith("-"):
            word = rest.pop(0)
            if word == "--":
                return options
            letters = word[1:]
            while letters:
                letter, letters = letters[0], letters[1:]
                if letter in FLAGS:
                    options.take(letter, "")
                    continue
                if letter in WITH_VALUE and not letters and not rest:
                    raise Failure(EX_USAGE, f"-{letter} needs a value")
                if letter not in WITH_VALUE and letter != "q":  # -q alone has no value
                    raise Failure(EX_USAGE, f"there is no option -{clean(letter)}")
                options.take(letter, letters or (rest.pop(0) if letter != "q" else ""))
                letters = ""
        if any(one.startswith("-") for one in rest):
            raise Failure(EX_USAGE, "options stand before recipients; put -- before a recipient that begins with -")
        return options

    def take(self, letter: str, value: str) -> None:
        """Takes one option; raises Failure."""
        if letter == "b":
            self.mode = value
        elif letter == "C":
            self.config = value
        elif letter in ("f", "r"):
            self.sender = value
        elif letter == "F":
            self.full_name = value
        elif letter == "G":
            self.gateway = True
        elif letter == "I":
            self.mode = "i"
        elif letter == "N":
            self.notify = frozenset(word.strip().upper() for word in value.split(","))
            if self.notify != {"NEVER"} and not self.notify <= maildrop.NOTIFY:  # RFC 3461 section 4.1
                raise Failure(EX_USAGE, "-N: expected never, or a list of success, failure, delay")
        elif letter == "R":
            self.ret = value.upper()
            if self.ret not in ("FULL", "HDRS"):
                raise Failure(EX_USAGE, "-R: expected full or hdrs")
        elif letter == "V":
            self.envid = value
            if maildrop.ENVID.match(value) is None:
                raise Failure(EX_USAGE, "-V: expected up to 100 printable characters without blanks")
        elif letter == "i" or (letter == "o" and value.startswith("i")) or (letter == "O" and value.lower().startswith("ignoredots=t")):
            self.ignore_dots = True
        elif letter == "q":
            self.flush = value
        elif letter == "t":
            self.from_header = True
        elif letter == "v":
            self.verbose = True


class Site:
    """What sendmail needs of the configuration. origin: the domain of bare names. Raises ConfigError."""

    def __init__(self, path: str | None) -> None:
        self.path = os.path.abspath(path or find())
        text = _Text()
        text.read(self.path)
        text.fill()  # its errors, and sections that this account may not read, are for the server to judge
        if not text.sections:
            raise ConfigError(text.errors or [f"{self.path}: there is nothing in it"])
        base = os.path.dirname(self.path)
        own, limits, domains = (text.sections.get(name) or Section(name, self.path) for name in ("gmta", "limits", "domains"))
        if not own.get("hostname"):
            own["hostname"] = socket.getfqdn()
        gmta = validate(Gmta, own, base=base, look=False)
        self.limits = validate(Limits, limits, base=base, look=False)
        local = validate(Domains, domains, base=base, look=False).local
        self.data_dir = gmta.data_dir
        self._queue = text.sections.get("queue") or Section("queue", self.path)
        self.hostname = gmta.hostname
        first = domains.get("local", "").replace(",", " ").split()
        self.origin = self.hostname if self.hostname in local or not first else domain_key(first[0])


    def queue(self) -> Admin:
        """The queue; raises ConfigError (where this account may not know of it, too), StoreError, sqlite3.Error, PermissionError."""
        from gmta.queue.admin import open_queue

        return open_queue(validate(Queue, self._queue, look=False).store, self.data_dir)


# --- a message ---------------------------------------------------------------------------------------------------


class Handover:
    """Writes messages into the maildrop of a site; raises Failure."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._ids = IdSource(time.time)
        self._directory = os.path.join(site.data_dir, maildrop.DIRECTORY)

    def new_name(self) -> str:
        """A name for a file, or for a Message-ID."""
        return self._ids.new()

    def open(self, name: str, drop: Drop) -> maildrop.Sender:
        """A file for a message."""
        if len(drop.recipients) > self._site.limits.recipients:
            raise Failure(EX_UNAVAILABLE, f"{len(drop.recipients)} recipients, {self._site.limits.recipients} are allowed")
        try:
            if not os.path.isdir(self._directory):
                os.makedirs(self._site.data_dir, mode=0o700, exist_ok=True)
                maildrop.prepare(self._site.data_dir)
            return maildrop.Sender(self._directory, name, drop)
        except OSError as error:
            raise self.failure(error) from error

    def fill(self, file: maildrop.Sender, pieces: Iterable[bytes]) -> None:
        """Writes all pieces and commits; the file is gone where that fails."""
        try:
            for piece in pieces:
                self.write(file, piece)
            file.commit()
        except OSError as error:
            raise self.failure(error) from error
        finally:
            file.abandon()

    def write(self, file: maildrop.Sender, piece: bytes) -> None:
        """Writes a piece, up to the limit of a message's size."""
        file.write(piece)
        if file.size > self._site.limits.message_size:
            raise Failure(EX_UNAVAILABLE, f"the message is larger than {self._site.limits.message_size} octets")

    def failure(self, error: OSError) -> Failure:
        """What an error of the file system comes to."""
        status = EX_TEMPFAIL if error.errno in NO_ROOM or error.errno == errno.EIO else EX_CANTCREAT
        return Failure(status, f"{error.filename or self._directory}: {error.strerror}")


def send(options: Options, site: Site) -> None:
    """Reads a message from standard input and leaves it in the maildrop (-bm)."""
    user = account()
    try:
        author = Address.make(user.pw_name, site.origin)
        sender = author if options.sender is None else sender_of(options.sender, site.origin)
    except AddressError as error:
        raise Failure(EX_USAGE, f"sender {clean(options.sender or user.pw_name)}: {error}") from error
    named = []
    for one in options.recipients:
        try:
            named += [compose.qualified(found.text, site.origin) for found in compose.addresses(one) if found.text]
        except AddressError as error:
            raise Failure(EX_NOUSER, f"recipient {clean(one)}: {error}") from error
    if not named and not options.from_header:
        raise Failure(EX_USAGE, "whom to send it to? Name recipients, or use -t")
    text = compose.Text(sys.stdin.buffer, dot_ends=not options.ignore_dots)
    try:
        fields, first = compose.read_header(text, site.limits.header_size)
        if options.from_header:
            named = list(dict.fromkeys(named + compose.recipients(fields, site.origin)))
    except compose.TooLarge as error:
        raise Failure(EX_DATAERR, f"the header is larger than {site.limits.header_size} octets") from error
    except AddressError as error:
        raise Failure(EX_DATAERR, f"the header names a recipient that is no address: {error}") from error
    if not named:
        raise Failure(EX_USAGE, "the header names no recipient")
    handover = Handover(site)
    name = handover.new_name()
    if options.gateway:
        header = b"".join(one.raw for one in fields if one.name not in compose.HIDDEN)
    else:
        header = compose.complete(fields, author=sender or author, full_name=options.full_name or full_name(user), origin=site.origin,
                                  hostname=site.hostname, message_id=name, date=formatdate(localtime=True))

    def pieces() -> Iterator[bytes]:
        yield header + b"\r\n"
        yield from text.body(first)

    drop = Drop(sender, list(dict.fromkeys(named)), options.notify, options.ret, options.envid)
    handover.fill(handover.open(name, drop), pieces())
    if options.verbose:
        print(f"left in the maildrop as {name}", file=sys.stderr)


def sender_of(text: str, origin: str) -> Address:
    """The envelope sender that -f names; "" and <> are the null sender. Raises AddressError."""
    found = [one.text for one in compose.addresses(text)] or [""]
    if len(found) > 1:
        raise AddressError("more than one address")
    return compose.qualified(found[0], origin) if found[0] else NULL


def account() -> pwd.struct_passwd:
    """Who calls us."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        name = f"uid{os.getuid()}"
        return pwd.struct_passwd((name, "x", os.getuid(), os.getgid(), "", "/", ""))


def full_name(user: pwd.struct_passwd) -> str:
    """A user's name for people: $NAME, else the one in the account, where & stands for the account's own."""
    return os.environ.get("NAME") or user.pw_gecos.partition(",")[0].replace("&", user.pw_name.capitalize())


# --- SMTP on standard input --------------------------------------------------------------------------------------


def speak(options: Options, site: Site) -> None:
    """SMTP on standard input and output, the maildrop its queue (-bs). Recipients are judged when they are picked up."""
    limits = site.limits
    # DSN is not offered: a dropped message has one NOTIFY for all its recipients
    server = ServerProtocol(Extensions(size=limits.message_size, rcpt_max=limits.recipients, dsn=False), site.hostname,
                            bounds=Bounds(limits.command_line, limits.text_line, limits.header_size, limits.header_fields))
    handover = Handover(site)
    conversation = Conversation(handover, limits.recipients)
    out = sys.stdout.buffer
    out.write(Reply(220, None, f"{site.hostname} ESMTP gmta").wire())
    try:
        while not conversation.over:
            event = server.next_event()
            if event is None:
                out.flush()
                octets = os.read(0, 65536)
                if not octets:
                    return
                server.receive_data(octets)
            elif isinstance(event, events.Body):
                conversation.body(event.data)
            else:
                out.write(server.reply(conversation.answer(event)))
        out.flush()
    finally:
        conversation.forget()


class Conversation:
    """The answers of -bs."""

    def __init__(self, handover: Handover, recipients: int) -> None:
        self._handover = handover
        self._most = recipients
        self._drop: Drop | None = None
        self._file: maildrop.Sender | None = None
        self._failure: Reply | None = None
        self.over = False

    def answer(self, event: events.Event) -> Reply:
        """The reply to an event."""
        if isinstance(event, events.Fault):
            self.over = event.close
            return event.reply
        if isinstance(event, events.Mail):
            self._drop = Drop(event.sender, [])
            return replies.MAIL_OK
        if isinstance(event, events.Rcpt):
            return self._rcpt(event)
        if isinstance(event, events.Data | events.BdatStart):
            return self._begin() or replies.START_MAIL_INPUT
        if isinstance(event, events.BodyEnd):
            return self._end(event)
        if isinstance(event, events.Hello | events.Reset):
            self.forget()
        self.over = isinstance(event, events.Quit)
        return {events.Quit: replies.CLOSING, events.Vrfy: replies.CANNOT_VRFY, events.Expn: replies.NOT_IMPLEMENTED,
                events.Help: replies.HELP, events.ChunkEnd: self._failure or replies.CHUNK_OK}.get(type(event), replies.OK)

    def _rcpt(self, event: events.Rcpt) -> Reply:
        assert self._drop is not None
        if len(self._drop.recipients) >= self._most:
            return replies.TOO_MANY_RECIPIENTS
        self._drop.recipients.append(event.recipient)
        return replies.RCPT_OK

    def _begin(self) -> Reply | None:
        assert self._drop is not None
        try:
            self._file = self._handover.open(self._handover.new_name(), self._drop)
        except Failure as failure:
            return Reply(451, "4.3.0", str(failure))
        return None

    def body(self, octets: bytes) -> None:
        """Takes a piece of the message."""
        if self._failure is None and self._file is not None:
            try:
                self._handover.write(self._file, octets)
            except (Failure, OSError) as error:
                self._failure = replies.SIZE_EXCEEDED if isinstance(error, Failure) else replies.STORE_FULL

    def _end(self, event: events.BodyEnd) -> Reply:
        self.over = event.close
        try:
            refusal = event.fault or self._failure
            if refusal is not None:
                return refusal
            assert self._file is not None
            self._handover.fill(self._file, ())
            return Reply(250, "2.0.0", "left in the maildrop")
        except Failure as failure:
            return Reply(451, "4.3.0", str(failure))
        finally:
            self.forget()

    def forget(self) -> None:
        """Drops the transaction."""
        if self._file is not None:
            self._file.abandon()
        self._drop = self._file = self._failure = None


# --- the queue and the aliases -----------------------------------------------------------------------------------


def list_queue(options: Options, site: Site) -> None:
    """The queue in the form that scripts know from mailq (-bp)."""
    count = octets = 0
    for row in site.queue().list():
        if not count:
            print(f"{'-Queue ID-':<17} {'--Size--':>8} ----Arrival Time---- -Sender/Recipient-------")
        at = time.strftime("%a %b %d %H:%M:%S", time.localtime(row["received_at"]))
        print(f"{row['id']}{'!' if row['held'] else ' '} {row['size']:>8} {at:>19}  {clean(row['sender']) or 'MAILER-DAEMON'}")
        for recipient in row["recipients"]:
            if recipient["status"] in ("queued", "held"):
                if recipient["last_reply"]:
                    print(f"({clean(recipient['last_reply'])})")
                print(f"{'':47} {clean(recipient['address'])}")
        print()
        count += 1
        octets += row["size"]
    dropped = maildrop.waiting(site.data_dir)
    if dropped:
        print(f"({dropped} in the maildrop, for the server to pick up)")
    print(f"-- {(octets + 1023) // 1024} Kbytes in {count} Request{'' if count == 1 else 's'}." if count else "Mail queue is empty")


def retry_queue(options: Options, site: Site) -> None:
    """Makes what waits due now (-q; -qI ID, -qR DOMAIN and -qS SENDER choose); an interval changes nothing."""
    flush = options.flush or ""
    admin = site.queue()
    kind, what = flush[:1], flush[1:]
    if not flush:
        admin.retry(all=True)
    elif kind == "I":
        admin.retry([what])
    elif kind == "R":
        admin.retry(domain=what.rpartition("@")[2])
    elif kind == "S":
        admin.retry(sender=what)


def check_aliases(options: Options, site: Site) -> None:
    """-bi: the server reads the aliases by itself when they change; what is wrong with them is said here. Raises ConfigError."""
    from gmta.cli.options import plugin_manager
    from gmta.config import load

    plugin_manager(load(site.path))


MODES: dict[str, Callable[[Options, Site], None]] = {"m": send, "s": speak, "p": list_queue, "i": check_aliases}


def run(program: str, arguments: list[str]) -> int:
    """Does what `program` (sendmail, mailq or newaliases) is asked for; gives the exit status."""
    try:
        options = Options.parse(arguments)
        if program in ("mailq", "newaliases"):
            options.mode = "p" if program == "mailq" else "i"
        if options.mode in ("d", "D", "l"):
            raise Failure(EX_USAGE, "the server is started by `gmta serve`")
        work = MODES.get(options.mode)
        if options.flush is not None and options.mode == "m":
            work = retry_queue
        if work is None:
            raise Failure(EX_USAGE, f"-b{clean(options.mode)} is not available")
        work(options, Site(options.config))
    except Failure as failure:
        print(f"{program}: {failure}", file=sys.stderr)
        return failure.status
    except ConfigError as error:
        print("\n".join(error.errors), file=sys.stderr)
        return EX_CONFIG
    except (sqlite3.Error, StoreError) as error:
        print(f"{program}: the queue can't be read or changed: {error}", file=sys.stderr)
        return EX_TEMPFAIL
    except PermissionError as error:
        print(f"{program}: {error.filename}: {error.strerror}", file=sys.stderr)
        return EX_NOPERM
    except (BrokenPipeError, KeyboardInterrupt):
        return EX_TEMPFAIL
    return 0


def main() -> None:
    """The command, by the name it was called under."""
    name = os.path.basename(sys.argv[0])
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(run(name if name in ("mailq", "newaliases") else "sendmail", sys.argv[1:]))
