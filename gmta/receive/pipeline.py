"""From protocol events to replies: hooks are asked, the transaction is kept, the message goes to the queue.

`Pipeline` is a worker's; `Reception` is one connection's, and answers one event at a time. Only 250 after the final dot says that
the store has it, synced. Failures: a hook's failure is the plugin manager's answer; StoreFull is 452 4.3.1, StoreError 451 4.3.0;
a refused message's spool file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import gevent

from gmta.mail import reply as replies
from gmta.mail.address import NULL, Address, AddressError, domain_key, parse_path
from gmta.mail.envelope import Envelope, RecipientState
from gmta.mail.message import FileBody, Message, split_header
from gmta.mail.reply import Reply
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.trace import authentication_results, drop_forged, received
from gmta.mail.verdict import Kind, Verdict, verdict_reply
from gmta.plugins import PluginFailure
from gmta.queue.admin import ask
from gmta.queue.store import Event, Store, StoreError, StoreFull
from gmta.receive.authentication import Authentication, Mechanisms
from gmta.receive.limits import within
from gmta.services.files import NO_ROOM, start_writing_out, write_all
from gmta.smtp import events
from gmta.smtp.server import Bounds

PIECE = 256 * 1024  # octets written to that file at a time
UNKNOWN_IP = "0.0.0.0"  # of a client whose proxy does not know it: in no network
MEMORY = 64 * 1024  # octets of a message kept in memory; past that it goes to a file


class Pipeline:
    """What all receptions of a worker share."""

    def __init__(self, config: Any, plugins: Any, store: Store, services: Any, ids: Any,
                 accept: Callable[[Envelope, Message], None]) -> None:
        self.config = config
        self.plugins = plugins
        self.store = store
        self.services = services
        self.ids = ids
        self.accept = accept
        self.hostname: str = services.hostname
        self.mechanisms = Mechanisms(plugins)
        self.message_size: int = config.limits.message_size
        limits = config.limits
        self.bounds = Bounds(limits.command_line, limits.text_line, limits.header_size, limits.header_fields)
        self.recipients: int = config.limits.recipients
        self.recipients_refused: int = config.limits.recipients_refused

    def may_etrn(self, ip: str) -> bool:
        """Whether a client there may ask for the mail of relay_to."""
        networks = self.config.domains.etrn_from
        return bool(networks) and within(ip, networks)

    def size_limit(self, session: Session) -> int:
        """Octets a message of this session may have: the smallest that configuration and plugins say."""
        limit = self.message_size
        if self.plugins.has("get_size_limit"):
            for _, value in self.plugins.get("get_size_limit", session):
                limit = min(limit, value)
        return limit


class Reception:
    """One connection's dialogue above the protocol."""

    __slots__ = ("_authentication", "_failure", "_file", "_forwarded", "_held", "_path", "_pieces", "_refused", "_written", "closing", "pipeline", "session", "transaction")

    def __init__(self, pipeline: Pipeline, session: Session) -> None:
        self.pipeline = pipeline
        self.session = session
        self.transaction: Transaction | None = None
        self.closing = False
        self._pieces: list[bytes] = []
        self._written = 0  # octets of the message
        self._held = 0  # of those, in _pieces
        self._file = -1
        self._path = ""
        self._refused = 0
        self._authentication: Authentication | None = None
        self._failure: Reply | None = None
        self._forwarded: dict[str, str] | None = None

    # -- hooks ------------------------------------------------------------------------------------------------------

    def _check(self, hook: str, *args: Any) -> Reply | None:
        plugins = self.pipeline.plugins
        if not plugins.has(hook):
            return None
        return self._refusal(hook.partition("_")[2], plugins.check(hook, *args))

    def _refusal(self, stage: str, verdict: Verdict | None) -> Reply | None:
        if verdict is None or verdict.kind is Kind.ACCEPT:
            return None
        if verdict.kind is Kind.DISCONNECT or verdict.reply.code == 421:  # RFC 5321 section 3.8: whoever says 421 closes
            self.closing = True
        return self._tell(stage, verdict_reply(verdict))

    def _tell(self, stage: str, reply: Reply) -> Reply:
        pipeline, transaction = self.pipeline, self.transaction
        pipeline.services.log.info("refused", session=self.session.id, ip=self.session.peer_ip, stage=stage, reply=str(reply),
                                   sender=f"<{transaction.sender}>" if transaction else None)
        if pipeline.plugins.has("on_refused"):
            pipeline.plugins.on("on_refused", self.session, transaction, stage, reply)
        return reply

    def connected(self) -> Reply | None:
        """Asks check_connect; the refusal that takes the banner's place, or None."""
        if self.pipeline.plugins.has("on_session_opened"):
            self.pipeline.plugins.on("on_session_opened", self.session)
        return self._check("check_connect", self.session)

    def answer(self, event: events.Event) -> Reply:
        """The reply to an event; `closing` tells whether to hang up after it."""
        return _ANSWERS[type(event)](self, event)

    def _hello(self, event: events.Hello) -> Reply:
        session = self.session
        session.helo, session.esmtp = event.name, event.esmtp
        self.forget()
        return self._check("check_helo", session) or replies.OK

    def _mail(self, event: events.Mail) -> Reply:
        pipeline = self.pipeline
        try:
            if not pipeline.store.has_room(pipeline.message_size):
                return self._tell("mail", replies.STORE_FULL)
        except StoreError as error:
            return self._tell("mail", _trouble(error))
        transaction = Transaction(pipeline.ids.new(), event.sender, size=event.size, body=event.body, smtputf8=event.smtputf8,
                                  ret=event.ret, envid=event.envid, auth=event.auth, requiretls=event.requiretls)
        if self.session.iprev is not None and not self.session.trusted:
            transaction.auth_results.append(self.session.iprev)
        self.transaction = transaction
        self._refused = 0
        refusal = self._check("check_mail", self.session, transaction)
        if refusal is not None:
            self.transaction = None
            return refusal
        return replies.MAIL_OK

    def _rcpt(self, event: events.Rcpt) -> Reply:
        transaction = self.transaction
        assert transaction is not None
        pipeline = self.pipeline
        if len(transaction.recipients) >= pipeline.recipients:  # RFC 5321 section 4.5.3.1.10
            self._refused += 1
            if self._refused > pipeline.recipients_refused:
                self.closing = True
                return self._tell("rcpt", replies.RECIPIENT_FLOOD)
            return replies.TOO_MANY_RECIPIENTS
        recipient = Recipient(event.recipient, notify=event.notify, orcpt=event.orcpt)
        verdict = pipeline.plugins.permit("permit_rcpt", self.session, transaction, recipient)
        if verdict is None:
            return self._tell("rcpt", replies.NOT_PERMITTED)
        if verdict.replace is not None and len(verdict.replace) == 1:
            recipient.address = verdict.replace[0]
        recipient.transport = verdict.transport
        refusal = self._refusal("rcpt", verdict) or self._check("check_rcpt", self.session, transaction, recipient)
        if refusal is not None:
            return refusal
        for address in (recipient.address,) if verdict.replace is None else verdict.replace:
            transaction.recipients.append(Recipient(address, original=event.recipient, transport=verdict.transport,
                                                    notify=event.notify, orcpt=event.orcpt))
        return replies.RCPT_OK

    def _data(self, event: events.Event) -> Reply:
        refusal = self._check("check_data", self.session, self.transaction)
        return refusal or replies.START_MAIL_INPUT

    def _auth(self, event: events.Event) -> Reply:
        if isinstance(event, events.Auth):
            self._authentication = Authentication(self.pipeline, self.session, event.mechanism, self._tell, self._refusal)
        assert self._authentication is not None
        reply = self._authentication.answer(event)
        if reply.code != 334:
            self._authentication = None
        return reply

    def _may(self, policy: str) -> bool:
        """Whether this client is told what the listener's key `policy` is about."""
        listener = self.pipeline.config.listeners.get(self.session.listener)
        said = getattr(listener, policy, "no")
        return said == "yes" or (said == "trusted" and self.session.trusted)

    def _ask(self, text: str) -> tuple[Address, Verdict | None] | None:
        """(address, what permit_rcpt says of it) for the argument of VRFY or EXPN (RFC 5321 section 3.5.1), None where it can't be read."""
        pipeline = self.pipeline
        local = pipeline.config.domains.local
        try:
            if text.startswith("<"):
                name = parse_path(text, postmaster=True)[0]
            elif "@" in text:
                name = Address.parse(text)
            elif len(local) == 1:
                name = Address.make(text, next(iter(local)))  # a user's name alone
            else:
                return None
        except AddressError:
            return None
        inquiry = Transaction(pipeline.ids.new(), NULL)
        return name, pipeline.plugins.permit("permit_rcpt", self.session, inquiry, Recipient(name))

    def _vrfy(self, event: events.Vrfy) -> Reply:
        if not self._may("vrfy"):
            return replies.CANNOT_VRFY  # RFC 5321 section 7.3
        asked = self._ask(event.argument)
        if asked is None:
            return replies.CANNOT_VRFY
        address, verdict = asked
        if verdict is None:
            return self._tell("vrfy", replies.NOT_PERMITTED)
        return self._refusal("vrfy", verdict) or Reply(250, "2.1.5", f"<{address}>")

    def _expn(self, event: events.Expn) -> Reply:
        if not self._may("expn"):
            return replies.NOT_IMPLEMENTED
        asked = self._ask(event.argument)
        if asked is None or (verdict := asked[1]) is None:
            return self._tell("expn", replies.NO_SUCH_LIST)
        refusal = self._refusal("expn", verdict)
        return refusal or Reply(250, "2.1.5", *(f"<{one}>" for one in verdict.replace or asked[:1]))  # RFC 5321 section 3.5.2

    def _etrn(self, event: events.Etrn) -> Reply:
        """Makes what waits for a domain of relay_to due now (RFC 1985)."""
        pipeline = self.pipeline
        if not pipeline.may_etrn(self.session.peer_ip):
            return self._tell("etrn", replies.ETRN_DENIED)
        name = event.node
        if name.startswith("#") or not name.lstrip("@"):
            return replies.ETRN_BAD_NODE
        key = domain_key(name.lstrip("@"))
        domains = [domain for domain in pipeline.config.domains.relay_to
                   if domain == key or (name.startswith("@") and domain.endswith("." + key))]  # RFC 1985 section 5.3: @ asks for subdomains too
        if not domains:
            return self._tell("etrn", replies.ETRN_DENIED)
        try:
            count = ask(pipeline.services, os.path.join(pipeline.config.gmta.data_dir, "queue"),
                        lambda admin: sum(admin.retry(domain=domain) for domain in domains))
        except StoreError as error:
            pipeline.services.log.info("etrn", session=self.session.id, domain=key, error=str(error))
            return replies.ETRN_FAILED
        pipeline.services.log.info("etrn", session=self.session.id, domain=key, messages=count)
        if not count:
            return Reply(251, "2.0.0", f"No messages are waiting for {key}")
        return Reply(253, "2.0.0", f"{count} messages for {key} are due now")

    def _xclient(self, event: events.XClient) -> Reply:
        """The session is another client's from now on: a proxy that may say so has told us (Postfix XCLIENT_README)."""
        session, said = self.session, event.attributes
        self.forget()
        session.notes.clear()
        self.pipeline.services.log.info("xclient", session=session.id, by=session.peer_ip, **{name.lower(): said[name] for name in said})
        if "ADDR" in said:
            session.peer_ip = said["ADDR"] or UNKNOWN_IP
            session.peer_name, session.iprev = "", None
        if "NAME" in said:
            session.peer_name = said["NAME"]
        if said.get("PORT"):
            session.peer_port = int(said["PORT"])
        if "HELO" in said:
            session.helo = said["HELO"]
        if "PROTO" in said:
            session.esmtp = said["PROTO"].upper() == "ESMTP"
        if "LOGIN" in said:
            session.user = said["LOGIN"] or None
        if said.get("DESTADDR"):
            session.local_ip = said["DESTADDR"]
        if said.get("DESTPORT"):
            session.local_port = int(said["DESTPORT"])
        return Reply(220, None, f"{self.pipeline.hostname} ESMTP gmta")

    def _xforward(self, event: events.XForward) -> Reply:
        """What is known of a message's first client: for the log and the history, no rule looks at it."""
        self._forwarded = (self._forwarded or {}) | {name.lower(): value for name, value in event.attributes.items() if value}
        self.pipeline.services.log.info("xforward", session=self.session.id, **self._forwarded)
        return replies.OK

    def _reset(self, event: events.Event) -> Reply:
        self.forget()
        return replies.RESET_OK

    def _quit(self, event: events.Event) -> Reply:
        self.closing = True
        return replies.CLOSING

    # -- message octets ---------------------------------------------------------------------------------------------

    def body(self, data: bytes) -> None:
        """Takes a piece of the message; where the spool can't, the rest is read and dropped, and the answer at the end says so."""
        if self._failure is not None:
            return
        try:
            self._keep(data)
        except (StoreError, OSError) as error:
            self._failure = _trouble(error)
            self.pipeline.services.log.error("can't spool", session=self.session.id, error=str(error))

    def _keep(self, data: bytes) -> None:
        self._pieces.append(data)
        self._held += len(data)
        self._written += len(data)
        if self._written <= MEMORY or (self._held < PIECE and self._file >= 0):
            return
        if self._file < 0:
            assert self.transaction is not None
            self._path = self.pipeline.store.new_spool_file(self.transaction.id)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._spool()

    def _spool(self) -> None:
        """Writes what is held, in a native thread."""
        pieces, self._pieces, self._held = self._pieces, [], 0
        error = gevent.get_hub().threadpool.apply(_write, (self._file, pieces))
        if error is not None:
            raise error

    def forget(self) -> None:
        """Drops the transaction with what it has spooled."""
        if self.transaction is not None:
            self.transaction = self._forwarded = None
        self._failure = None
        self._pieces = []
        self._written = self._held = 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._path:
            try:
                os.unlink(self._path)
            except OSError:
                pass
            self._path = ""

    def _message(self) -> Message:
        if self._file < 0:
            return Message.from_bytes(self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces))
        if self._pieces:
            self._spool()
        os.close(self._file)
        self._file = -1
        with open(self._path, "rb", buffering=0) as file:
            head = file.read(1 << 21)
        header, separator = split_header(head)
        start = header + separator
        return Message(head[:header], head[header:start], FileBody(self._path, start, self._written - start))

    def _end(self, event: events.BodyEnd) -> Reply:
        """The final dot: checks, trace, signatures, and the queue; 250 only when the store says so (RFC 5321 section 4.2.5)."""
        try:
            if event.fault is not None:
                self.closing = self.closing or event.close
                return self._tell("message", event.fault)
            if self._failure is not None:
                return self._tell("message", self._failure)
            return self._take(self._message())
        except (StoreError, OSError) as error:
            self.pipeline.services.log.error("can't queue", session=self.session.id, error=str(error))
            return self._tell("message", _trouble(error))
        finally:
            self.forget()

    def _take(self, message: Message) -> Reply:
        pipeline, session, transaction = self.pipeline, self.session, self.transaction
        assert transaction is not None
        plugins, now = pipeline.plugins, pipeline.services.clock()
        transaction.message = message
        refused: dict[Recipient, Verdict] = {}
        if plugins.has("check_message"):
            answer = plugins.check("check_message", session, transaction, message)
            if isinstance(answer, dict):
                refused = answer
                # one reply for all (RFC 5321 section 4.1.1.4): what may be tried again, or is everybody's, is the whole message's
                whole = [verdict for verdict in refused.values() if verdict.kind is not Kind.REJECT]
                everybody = refused.keys() >= set(transaction.recipients)
                answer = next(iter(whole or refused.values())) if whole or everybody else None
            refusal = self._refusal("message", answer)
            if refusal is not None:
                return refusal
        try:
            if plugins.has("edit_message"):
                message = plugins.edit("edit_message", session, transaction, message)
            drop_forged(message, pipeline.hostname)
            if plugins.has("get_headers"):
                for _, fields in plugins.get("get_headers", session, transaction, message):
                    for name, value in reversed(fields):
                        message.prepend(name, value)
            if not session.trusted:
                message.prepend("Authentication-Results", authentication_results(pipeline.hostname, transaction.auth_results))
            message.prepend("Received", received(session, transaction, pipeline.hostname, now))
            if plugins.has("get_signatures"):
                for _, fields in plugins.get("get_signatures", session, transaction, message):
                    for name, value in reversed(fields):
                        message.prepend(name, value)
        except PluginFailure as failure:
            return self._tell("message", failure.reply)
        envelope = self._envelope(transaction, message, now, refused)
        history = [Event(transaction.id, now, "received", {**envelope.facts, "size": envelope.size, "sender": str(transaction.sender)})]
        if transaction.changes:
            history.append(Event(transaction.id, now, "edited", {"changes": transaction.changes}))
        pipeline.store.put(envelope, message, history)
        self._path = ""  # the store's now
        pipeline.services.log.info("queued", session=session.id, ip=session.peer_ip, id=transaction.id, sender=f"<{transaction.sender}>",
                                   recipients=len(envelope.recipients), size=envelope.size)
        if plugins.has("on_queued"):
            plugins.on("on_queued", envelope)
        pipeline.accept(envelope, message)
        return Reply(250, "2.0.0", f"queued as {transaction.id}")

    def _envelope(self, transaction: Transaction, message: Message, now: float, refused: dict[Recipient, Verdict]) -> Envelope:
        session = self.session
        facts: dict[str, Any] = {"ip": session.peer_ip, "helo": session.helo, "protocol": session.protocol, "session": session.id}
        if session.user is not None:
            facts["user"] = session.user
        if session.trusted:
            facts["trusted"] = True
        if session.tls is not None:
            facts["tls"] = f"{session.tls.version} {session.tls.cipher}"
        if transaction.requiretls:
            facts["requiretls"] = True
        if self._forwarded:
            facts["forwarded"] = self._forwarded
        states = []
        once: dict[Any, Recipient] = {}
        for recipient in transaction.recipients:  # named twice, delivered once
            once.setdefault((recipient.address, recipient.transport), recipient)
        expanded = _expanded(once.values())
        if expanded:
            facts["expanded"] = [[str(original), orcpt] for original, orcpt in expanded.items()]
        for number, recipient in enumerate(once.values()):
            verdict = refused.get(recipient)
            transport = "fail" if verdict is not None else recipient.transport or ""
            notify = recipient.notify
            if expanded and recipient.original in expanded:  # RFC 3461 section 5.2.7.3: success was reported by the expansion
                notify = notify - {"SUCCESS"} or frozenset({"NEVER"})
            states.append(RecipientState(number, recipient.address, str(recipient.original), recipient.orcpt, notify, transport,
                                         fixed_transport=bool(transport), next_attempt_at=now, refused="" if verdict is None else str(verdict.reply)))
        return Envelope(transaction.id, transaction.sender, states, message.size, now, transaction.ret, transaction.envid,
                        transaction.body, transaction.smtputf8, facts, sorted(transaction.tags))


def _expanded(recipients: Iterable[Recipient]) -> dict[Address, str]:
    """{address as given in RCPT: its ORCPT} of aliases with several recipients whose senders asked to be told of success."""
    asked: dict[Address, list[Recipient]] = {}
    for recipient in recipients:
        if "SUCCESS" in recipient.notify:
            asked.setdefault(recipient.original, []).append(recipient)
    return {original: group[0].orcpt for original, group in asked.items() if len(group) > 1}


def _trouble(error: Exception) -> Reply:
    """The answer where the store or the spool fails: no room, or a fault of ours."""
    full = isinstance(error, StoreFull) or getattr(error, "errno", 0) in NO_ROOM
    return replies.STORE_FULL if full else replies.LOCAL_ERROR


def _write(descriptor: int, pieces: list[bytes]) -> OSError | None:
    """Runs in a native thread; an error is given back, since the pool would print it."""
    try:
        for piece in pieces:
            write_all(descriptor, piece)
        start_writing_out(descriptor)  # the sync at the end has less to wait for
    except OSError as error:
        return error
    return None


def _same(reply: Reply) -> Callable[[Reception, Any], Reply]:
    return lambda reception, event: reply


_ANSWERS: dict[type, Callable[[Reception, Any], Reply]] = {
    events.Hello: Reception._hello, events.Mail: Reception._mail, events.Rcpt: Reception._rcpt, events.Data: Reception._data,
    events.BdatStart: Reception._data, events.BodyEnd: Reception._end, events.ChunkEnd: _same(replies.CHUNK_OK),
    events.Reset: Reception._reset, events.Quit: Reception._quit, events.Auth: Reception._auth, events.AuthResponse: Reception._auth,
    events.Vrfy: Reception._vrfy, events.Expn: Reception._expn, events.Etrn: Reception._etrn, events.Help: _same(replies.HELP),
    events.XClient: Reception._xclient, events.XForward: Reception._xforward, events.Noop: _same(replies.OK), events.StartTls: _same(replies.READY_FOR_TLS),
}
