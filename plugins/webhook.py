"""Transport `webhook`: POSTs messages to a URL. As a plugin: asks a URL after the dot whether to take a message, and tells one of events.

Hooks: get_transports; check_message (where `wait = yes`); on_queued, on_delivery, on_bounced, on_worker_started, on_worker_stopping (where
`events_url`).
Keys of [transport:NAME]: url, format, secret, allow_private, authorization, ca_file, connect_timeout, request_timeout, client_errors,
original, detail_separator.  Keys of [plugin:webhook]: the same for the question, wait; events_url, events, events_secret,
events_queue, events_lifetime.  What is sent: docs/webhook.md, docs/webhook.schema.json.

Replies of the transport: 250 2.0.0 for a 2xx; 554 5.3.0 for 410, and for another 3xx or 4xx where `client_errors = fail`; 451 4.3.0
for 408, 425, 429, 5xx and an endpoint that breaks off or says nothing, 451 4.4.1 where there is no connection (both deferred;
Retry-After is obeyed).  Replies after the dot: what the endpoint says, by default 550 5.7.1 and 451 4.7.1; 451 4.3.0 where it says
nothing that can be understood (with `on_error = ignore` the message is taken).

One delivery is one request for all its recipients (format raw: one each), under an id that is the same at every try. Messages past
LARGE octets are put together in a native thread, in a file without a name, so that memory stays flat. HTTP is gmta.services.webhooks'.

An event is kept in a file (gmta.services.outbox) until the endpoint has it, and has the same id at every try, from whichever worker. What a
worker that was killed had recorded but not told is told from the queue's history, with less in it. So an event comes at least once, unless
events_queue of them wait or it is older than events_lifetime: those are dropped, and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from base64 import b64encode
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import gevent
from pydantic import AfterValidator, Field

import gmta
from gmta import Duration, PluginConfig, Verdict, defer, hookimpl, reject
from gmta.config import ExistingFile
from gmta.mail import mime
from gmta.mail.address import Address, domain_key
from gmta.mail.message import Message
from gmta.mail.session import AuthResult, Recipient, Session, Transaction
from gmta.services.outbox import Found, Outbox
from gmta.services.webhooks import Answer, Body, BytesBody, Endpoint, PostFailed, Secrets, split_url

LARGE = 256 * 1024  # octets from which a request is put together outside the loop
MAX_TEXT = 1024 * 1024  # octets; a longer text is an attachment
MAX_PENDING = 1000  # reports of messages that are between check and queue
PAUSES_S = (1.0, 5.0, 30.0, 120.0, 600.0)  # between the tries of an event that the endpoint can't take
DOWN_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # between the tries of all where the endpoint is down
SENDERS = 8
BEAT_S = 5.0
SAID_S = 15.0
MOMENT_S = 2.0  # between a record in the queue and the file of a worker that lives
LAST_S = 3.0  # for events that wait when the worker ends
OUTBOX = "events"  # directory
HISTORY = {"delivered": "delivered", "deferred": "deferred", "failed": "bounced"}  # kinds in the queue's history, and events
REPORT = "report"  # the note that whoever reads bounces and complaints leaves on a transaction

_AGAIN = frozenset({408, 425, 429})  # RFC 9110 section 15.5.9, RFC 8470, RFC 6585
_OVERLOADED = frozenset({429, 502, 503, 504})  # the endpoint's trouble as a whole, not this message's
_RESULTS = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^;"])+')
_PAIR = re.compile(r'([\w.-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"]*))', re.A)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]+")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _url(value: str) -> str:
    if value:
        split_url(value)
    return value


def _secret(value: list[str]) -> list[str]:
    Secrets(value)
    return value


Url = Annotated[str, AfterValidator(_url)]
Signing = Annotated[list[str], AfterValidator(_secret)]


class Target(PluginConfig):
    """The keys that say where requests go and what they hold."""

    url: Url = Field("", description="http:// or https://")
    format: Literal["json", "multipart", "raw"] = Field("json", description="raw: the message itself (message/rfc822)")
    secret: Signing = Field([], description="whsec_…; several while endpoints change over, the first is the new one")
    allow_private: bool = Field(False, description="the URL may lead to addresses that are not the internet's")
    authorization: str = Field("", description="value of the header Authorization")
    ca_file: ExistingFile = Field("", description="authorities to verify by; default: the system's")
    connect_timeout: Duration = Field(10.0, description="for a connection to one address")
    request_timeout: Duration = Field(30.0, description="for a request and its answer")
    original: Literal["undecodable", "always", "never"] = Field("undecodable", description="when json and multipart hold the whole message too")
    detail_separator: str = "+"


class Config(Target):
    """Keys of [plugin:webhook]."""

    wait: bool = Field(False, description="ask `url` after the dot: its answer is the verdict")
    events_url: Url = Field("", description="is told of what became of mail")
    events: list[Literal["delivered", "deferred", "bounced", "complained"]] = Field(["delivered", "deferred", "bounced", "complained"], description="which events")
    events_secret: Signing = Field([], description="default: `secret`")
    events_queue: int = Field(10_000, ge=1, description="events that may wait in a worker; past that the oldest are dropped")
    events_lifetime: Duration = Field(86400.0, gt=0, description="how long an event is tried where the endpoint is down")


class TransportConfig(Target):
    """[transport:NAME] of type webhook."""

    client_errors: Literal["fail", "defer"] = Field("fail", description="what 3xx and 4xx mean, but 408, 410, 425, 429")


# --- what is sent ---------------------------------------------------------------------------------------------------


class SpooledBody:
    """A body in a file without a name."""

    __slots__ = ("_file", "length")

    def __init__(self, file: Any) -> None:
        self._file = file
        self.length: int = file.tell()

    def pieces(self) -> Iterator[bytes]:
        """The octets from the start."""
        self._file.seek(0)
        return iter(lambda: self._file.read(mime.PIECE), b"")

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()


class MessageBody:
    """The message itself."""

    __slots__ = ("_message", "length")

    def __init__(self, message: Message) -> None:
        self._message = message
        self.length = message.size

    def pieces(self) -> Iterator[bytes]:
        """The octets from the start."""
        return self._message.chunks()

    def close(self) -> None:
        """Nothing to do: the queue's."""


@dataclass(slots=True)
class Request:
    """One request: everything but its headers of the moment."""

    id: str
    content_type: str
    body: Body
    extra: dict[str, str]


class Writer:
    """Puts requests together. data_dir: where those of large messages lie while they are sent."""

    def __init__(self, config: Target, hostname: str, data_dir: str, heavy: Callable[[Callable[[], Any]], Any]) -> None:
        self._config = config
        self._ours = domain_key(hostname)
        self._data_dir = data_dir
        self._heavy = heavy

    def request(self, facts: dict[str, Any], message: Message, extra: dict[str, str]) -> Request:
        """The request of a message in the configured format; raises OSError. facts: id, envelope and the like; `authentication` None:
        take it from the message."""
        id: str = facts["id"]
        if self._config.format == "raw":
            envelope = json.dumps({"from": facts["envelope"]["from"], "to": facts["envelope"]["to"]})  # ASCII, as headers are
            return Request(id, "message/rfc822", MessageBody(message), {**extra, "gmta-envelope": envelope})
        boundary = f"gmta-{secrets.token_hex(16)}" if self._config.format == "multipart" else ""
        body = self._heavy(lambda: self._spool(facts, message, boundary)) if message.size > LARGE else self._join(facts, message, boundary)
        return Request(id, f'multipart/form-data; boundary="{boundary}"' if boundary else "application/json", body, extra)

    def _join(self, facts: dict[str, Any], message: Message, boundary: str) -> Body:
        out: list[bytes] = []
        self._write(out.append, facts, message, boundary)
        return BytesBody(b"".join(out))

    def _spool(self, facts: dict[str, Any], message: Message, boundary: str) -> Body:
        """In a native thread."""
        file = tempfile.TemporaryFile(dir=self._data_dir)  # noqa: SIM115 - it lives as long as the body
        try:
            self._write(file.write, facts, message, boundary)
            return SpooledBody(file)
        except BaseException:
            file.close()
            raise

    def _write(self, write: Callable[[bytes], Any], facts: dict[str, Any], message: Message, boundary: str) -> None:
        with mime.parts_of(message) as root:
            self._write_document(write, facts, message, root, boundary)

    def _write_document(self, write: Callable[[bytes], Any], facts: dict[str, Any], message: Message, root: mime.Part, boundary: str) -> None:
        document, attached, undecodable = self._document(facts, message, root)
        whole = self._config.original == "always" or (self._config.original == "undecodable" and bool(undecodable))
        if boundary:
            write(f'--{boundary}\r\nContent-Disposition: form-data; name="payload"\r\nContent-Type: application/json\r\n\r\n'.encode("ascii"))
        write(_encode(document)[:-1].encode("utf-8", "replace"))
        write(b',"attachments":[')
        for number, part in enumerate(attached):
            facts_of: dict[str, Any] = {"name": part.filename, "type": part.type, "disposition": part.disposition or "attachment",
                        "content_id": part.content_id, "charset": part.charset, "opaque": part.opaque}
            write(b"," if number else b"")
            if boundary:
                facts_of |= {"part": f"attachment-{number + 1}", "size": sum(map(len, part.octets()))}
                write(_encode(facts_of).encode("utf-8", "replace"))
                continue
            write(_encode(facts_of)[:-1].encode("utf-8", "replace") + b',"content":"')
            size = 0
            for piece in part.base64():
                size += len(piece) // 4 * 3 - piece[-2:].count(b"=")
                write(piece)
            write(b'","size":%d}' % size)
        write(b"]")
        if whole and not boundary:
            write(b',"original":"')
            for piece in _base64(message.chunks(mime.PIECE)):
                write(piece)
            write(b'"')
        write(b"}")
        if boundary:
            self._write_parts(write, attached, message if whole else None, boundary)

    @staticmethod
    def _write_parts(write: Callable[[bytes], Any], attached: list[mime.Part], message: Message | None, boundary: str) -> None:
        """The parts behind the document (RFC 7578)."""
        for number, part in enumerate(attached):
            name = re.sub(r'["\r\n]', lambda match: f"%{ord(match[0]):02X}", part.filename or f"attachment-{number + 1}")  # RFC 7578 section 4.2
            write(f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="attachment-{number + 1}"; filename="{_UNSAFE.sub("", name)}"\r\n'
                  f"Content-Type: {part.type}\r\n\r\n".encode("utf-8", "replace"))
            for piece in part.octets():
                write(piece)
        if message is not None:
            write(f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="original"; filename="message.eml"\r\n'
                  "Content-Type: message/rfc822\r\n\r\n".encode("ascii"))
            for piece in message.chunks():
                write(piece)
        write(f"\r\n--{boundary}--\r\n".encode("ascii"))

    def _document(self, facts: dict[str, Any], message: Message, root: mime.Part) -> tuple[dict[str, Any], list[mime.Part], list[str]]:
        """(all of the JSON but attachments and original, the attachments, what could not be decoded whole)."""
        undecodable: list[str] = []
        headers: list[list[str]] = []
        first: dict[str, str] = {}
        raw: dict[str, bytes] = {}
        for name, value in mime.header_fields(message.header):
            text, whole = mime.field_text(value)
            headers.append([name, text])
            lower = name.lower()
            if lower not in first:
                first[lower], raw[lower] = text, value
            if not whole:
                undecodable.append(f"header {name}")
        attached: list[mime.Part] = []
        found: dict[str, list[str]] = {"text/plain": [], "text/html": []}
        opaque = False
        for part in root.walk():
            texts = found.get(part.type)
            opaque = opaque or part.opaque
            if texts is None or part.size > MAX_TEXT or part.disposition == "attachment" or part.filename:
                if not part.opaque or part.size:
                    attached.append(part)
                continue
            text, whole = part.text()
            texts.append(text)
            if not whole:
                undecodable.append("text" if part.type == "text/plain" else "html")
        document = dict(facts)
        document["subject"] = first.get("subject", "")
        for key in ("from", "to", "cc", "reply-to"):
            value_of = raw.get(key)
            document[key.replace("-", "_")] = [{"name": name, "address": address} for name, address in mime.addresses(value_of)] if value_of else []
        document["date"] = first.get("date", "")
        document["message_id"] = first.get("message-id", "")
        document["text"] = "\n".join(found["text/plain"]) if found["text/plain"] else None
        document["html"] = "\n".join(found["text/html"]) if found["text/html"] else None
        if document["authentication"] is None:
            document["authentication"] = self._authentication(first.get("authentication-results", ""))
        document["size"] = message.size
        document["opaque"] = opaque
        document["undecodable"] = undecodable
        document["headers"] = headers
        return document, attached, undecodable

    def _authentication(self, field: str) -> list[dict[str, Any]]:
        """Our own Authentication-Results as JSON (RFC 8601); others' words are among the headers."""
        parts = _RESULTS.findall(field)
        words = parts[0].split() if parts else []
        if not words or domain_key(words[0].strip('"')) != self._ours:
            return []
        results = []
        for part in parts[1:]:
            pairs = [(name, re.sub(r"\\(.)", r"\1", quoted) if quoted else plain) for name, quoted, plain in _PAIR.findall(part)]
            if pairs:
                (method, result), *rest = pairs
                results.append(_result(method, result, dict(rest).get("reason", ""), [pair for pair in rest if pair[0] != "reason"]))
        return results


def _result(method: str, result: str, reason: str, properties: Any) -> dict[str, Any]:
    return {"method": method, "result": result, "reason": reason, "properties": dict(properties)}


def _base64(pieces: Iterator[bytes]) -> Iterator[bytes]:
    kept = b""
    for piece in pieces:
        kept += piece
        whole = len(kept) - len(kept) % 3
        yield b64encode(kept[:whole])
        kept = kept[whole:]
    yield b64encode(kept)


def envelope_facts(sender: Address, recipients: list[tuple[Address, str]], separator: str, client: dict[str, Any]) -> dict[str, Any]:
    """The envelope as JSON. recipients: (address, the one given in RCPT)."""
    return {"from": str(sender), "to": [str(address) for address, _ in recipients],
            "recipients": [_recipient(address, original, separator) for address, original in recipients], "client": client}


def _recipient(address: Address, original: str, separator: str) -> dict[str, str]:
    user, detail = address.split_detail(separator)
    return {"address": str(address), "original": original or str(address), "user": user, "detail": detail}


def make_endpoint(services: Any, config: Target, url: str, signed_with: list[str]) -> Endpoint:
    """The endpoint at a URL by a section's keys; raises ValueError."""
    endpoint = Endpoint(url, services.resolver, services.clock, secrets=Secrets(signed_with), allow_private=config.allow_private,
                        ca_file=config.ca_file, authorization=config.authorization, connect_s=config.connect_timeout,
                        request_s=config.request_timeout)
    if endpoint.refused:
        services.log.warning("webhook goes nowhere: its address is private", url=url, key="allow_private")
    return endpoint


# --- delivery -------------------------------------------------------------------------------------------------------


class Webhook:
    """The transport."""

    Config = TransportConfig
    concurrency = 32

    def __init__(self, name: str, config: TransportConfig, services: Any) -> None:
        if not config.url:
            raise ValueError("url: expected http://… or https://…")
        self.name = name
        self._config = config
        self._services = services
        core = services.config
        self._most_s = max(core.queue.retry)
        self._endpoint = make_endpoint(services, config, config.url, config.secret)
        self._writer = Writer(config, services.hostname, core.gmta.data_dir, self._heavy)

    def requests(self, delivery: Any) -> Iterator[tuple[list[Any], Request]]:
        """(recipients, request) of a delivery, each good until the next; raises OSError."""
        groups = [[one] for one in delivery.recipients] if self._config.format == "raw" else [delivery.recipients]
        for group in groups:
            request = self._request(delivery, group)
            try:
                yield group, request
            finally:
                request.body.close()

    def headers(self, request: Request) -> dict[str, str]:
        """The headers of a request, signed now."""
        return self._endpoint.headers(request.id, request.content_type, request.body, request.extra)

    def deliver(self, delivery: Any) -> dict[int, gmta.Outcome]:
        """One request for all recipients, or one each."""
        outcomes: dict[int, gmta.Outcome] = {}
        try:
            for group, request in self.requests(delivery):
                outcomes |= dict.fromkeys([one.number for one in group], self._post(request))
        except OSError as error:
            self._services.log.error("webhook not put together", id=delivery.envelope.id, error=str(error))
        return outcomes

    def close(self) -> None:
        """Closes kept connections."""
        self._endpoint.close()

    def _request(self, delivery: Any, recipients: list[Any]) -> Request:
        envelope = delivery.envelope
        attempt = max(one.attempts for one in recipients) + 1
        again = attempt > 1 or not delivery.first_attempt
        client = {key: envelope.facts.get(key, "") for key in ("ip", "helo", "protocol", "user", "tls")}
        facts = {"id": request_id(envelope.id, [one.number for one in recipients]), "type": "message", "queue_id": envelope.id,
                 "transport": delivery.transport, "received_at": envelope.received_at,
                 "envelope": envelope_facts(envelope.sender, [(one.address, one.original) for one in recipients],
                                            self._config.detail_separator, client),
                 "tags": list(envelope.tags), "authentication": None}
        return self._writer.request(facts, delivery.message, {"gmta-attempt": str(attempt), "gmta-retry": "yes" if again else "no"})

    def _post(self, request: Request) -> gmta.Outcome:
        try:
            answer = self._endpoint.post(request.id, request.content_type, request.body, request.extra, {"gmta-retry": "yes"},
                                         heavy=self._heavy if request.body.length > LARGE else None)  # who signs
        except PostFailed as failure:
            return gmta.deferred(_shown(failure.reason), enhanced="4.3.0" if failure.taken else "4.4.1", recipient_fault=failure.taken)
        return self._outcome(answer)

    def _outcome(self, answer: Answer) -> gmta.Outcome:
        status = answer.status
        said = _shown(f"{self._endpoint.host} answered {status} {_first_line(answer)}".rstrip())
        if 200 <= status < 300:
            return gmta.delivered(said, enhanced="2.0.0", remote=answer.remote)
        if status == 410 or (300 <= status < 500 and status not in _AGAIN and self._config.client_errors == "fail"):
            return gmta.failed(said, enhanced="5.3.0", code=554, remote=answer.remote)
        pause_s = answer.retry_after_s(self._services.clock(), self._most_s) if status in (429, 503) else None
        return gmta.deferred(said, enhanced="4.3.0", remote=answer.remote, retry_after_s=pause_s, recipient_fault=status not in _OVERLOADED)

    def _heavy(self, call: Callable[[], Any]) -> Any:
        return self._services.batch(f"webhook:{self.name}").submit(call)


def request_id(queue_id: str, numbers: list[int]) -> str:
    """What names a message for these recipients: the queue id alone for its first one, else with their numbers, as 0-2_7.

    Another set of recipients must be another id, or an endpoint that drops what it knows would drop somebody's only copy.
    """
    if numbers == [0]:
        return queue_id
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return "_".join([queue_id, *(str(first) if first == last else f"{first}-{last}" for first, last in ranges)])


def _first_line(answer: Answer) -> str:
    """What an answer says in words, where it is a line or two of text."""
    if len(answer.body) > 1000 or b"<" in answer.body:
        return ""
    return answer.body.decode("utf-8", "replace").strip()[:200]


def _shown(text: str) -> str:
    return _UNSAFE.sub(" ", text).encode("ascii", "backslashreplace").decode("ascii")[:300]


# --- the plugin -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Event:
    """One event on its way. tries: that have failed.  again: somebody may have it already."""

    id: str
    at: float
    body: bytes
    tries: int = 0
    again: bool = False


class Teller:
    """Sends events, some at a time, each until the endpoint has it or refuses it; where the endpoint is down one of them probes it.

    Until `keep_in` they are in memory alone.
    """

    def __init__(self, config: Config, services: Any, endpoint: Endpoint) -> None:
        self._config = config
        self._services = services
        self._endpoint = endpoint
        self._outbox: Outbox | None = None
        self.closed = False
        self._kept: OrderedDict[str, _Event] = OrderedDict()  # all that is not done, oldest first
        self._ready: deque[_Event] = deque()
        self._senders: set[Any] = set()
        self._down = 0  # tries in a row that the endpoint was down for
        self._pause_s = 0.0
        self._probing = False
        self._troubled = ""
        self._said_at = float("-inf")

    def tell(self, id: str, body: bytes, *, wait: bool = False) -> None:
        """Takes an event. wait: until it is kept."""
        self._take(_Event(id, self._services.clock(), body))
        if self._outbox is not None:
            try:
                self._outbox.keep(id, body, wait=wait)
            except OSError:
                pass  # it is in memory, and `beat` says so

    def take_over(self, events: Iterable[_Event]) -> None:
        """Takes what another process had."""
        for event in events:
            if event.id not in self._kept:
                self._take(event)
                if self._outbox is not None:
                    self._outbox.keep(event.id, event.body)

    def _take(self, event: _Event) -> None:
        while len(self._kept) >= self._config.events_queue:
            self._done(next(iter(self._kept.values())))
            self._services.metrics.counter("webhook_events_dropped").inc()
            self._say("more than events_queue wait")
        self._kept[event.id] = event
        self._put(event)

    def _put(self, event: _Event) -> None:
        if event.id in self._kept:
            self._ready.append(event)
            if len(self._senders) < SENDERS and not self._probing and not self.closed:
                self._start()

    def _start(self) -> None:
        sender = self._services.spawn(self._send_all)
        self._senders.add(sender)
        sender.link(self._senders.discard)

    def _done(self, event: _Event) -> None:
        if self._kept.pop(event.id, None) is not None and self._outbox is not None:
            self._outbox.done(event.id)

    def _say(self, trouble: str) -> None:
        """A log line for trouble, a few a minute at most."""
        now = self._services.clock()
        if trouble != self._troubled and not self._said_at <= now < self._said_at + SAID_S:
            self._services.log.warning("webhook events in trouble", reason=trouble, waiting=len(self._kept))
            self._troubled, self._said_at = trouble, now

    def _send_all(self) -> None:
        """Sends what is ready, until nothing is."""
        while self._ready and not self._probing:
            event = self._ready.popleft()
            if event.id not in self._kept:
                continue  # dropped
            if self._down:
                self._probing = True
                try:
                    gevent.sleep(self._pause_s)
                    self._send(event)
                finally:
                    self._probing = False
                for _ in range(min(SENDERS - len(self._senders), len(self._ready)) if not self._down else 0):
                    self._start()
            else:
                self._send(event)

    def _send(self, event: _Event) -> None:
        """One try, and what follows from it."""
        again = event.again or event.tries > 0
        mark = {"gmta-attempt": str(event.tries + 1), "gmta-retry": "yes" if again else "no"}
        pause_s = None
        down = False
        try:
            answer = self._endpoint.post(event.id, "application/json", BytesBody(event.body), mark, {"gmta-retry": "yes"})
        except PostFailed as failure:
            reason, down = failure.reason, True
        else:
            reason = f"answered {answer.status}"
            if answer.status in _AGAIN or answer.status >= 500:
                down = answer.status in _OVERLOADED
                pause_s = answer.retry_after_s(self._services.clock(), DOWN_S[-1]) if down else None
            else:
                if not 200 <= answer.status < 300:
                    self._services.log.warning("webhook event refused", event=event.id, reason=reason)
                self._down = 0
                self._done(event)
                return
        event.tries += 1
        if down:
            self._pause_s = pause_s or DOWN_S[min(self._down, len(DOWN_S) - 1)]
            self._down += 1
            self._say(_shown(f"{self._endpoint.host}: {reason}"))
            if self._services.clock() - event.at > self._config.events_lifetime:
                self._give_up(event, reason)
            else:
                self._ready.append(event)  # another one probes next: it may be this one that the endpoint breaks at
        else:
            self._down = 0
            event.again = True
            if event.tries > len(PAUSES_S):
                self._give_up(event, reason)
            else:
                self._services.spawn(self._later, PAUSES_S[event.tries - 1], event)

    def _later(self, pause_s: float, event: _Event) -> None:
        gevent.sleep(pause_s)
        self._put(event)

    def _give_up(self, event: _Event, reason: str) -> None:
        self._services.log.warning("webhook event given up", event=event.id, reason=_shown(reason))
        self._services.metrics.counter("webhook_events_dropped").inc()
        self._done(event)

    def beat(self) -> Found | None:
        """Shows that this process lives, and gives what others left that do not."""
        outbox = self._outbox
        if outbox is None:
            return None
        outbox.beat(lambda: [(event.id, event.at, event.body) for event in list(self._kept.values())])
        try:
            found = outbox.take_over()
        except OSError:
            found = None
        if outbox.trouble:
            self._say(f"they can't be kept: {outbox.trouble}")
        return found or None

    def keep_in(self, outbox: Outbox) -> None:
        """Keeps in files what is told from now on."""
        self._outbox = outbox
        for event in self._kept.values():
            outbox.keep(event.id, event.body)

    def known(self) -> set[str]:
        """The events that processes know, or knew lately. Raises OSError."""
        return set() if self._outbox is None else self._outbox.known()

    def release(self, found: Found) -> None:
        """What was found is kept here now. Raises OSError."""
        if self._outbox is not None:
            self._outbox.release(found)

    def stop(self) -> None:
        """Gives the events that wait a moment."""
        if self._senders:
            gevent.joinall(list(self._senders), timeout=LAST_S)

    def close(self) -> None:
        """Leaves the rest for the next process."""
        self.closed = True
        gevent.killall(list(self._senders), timeout=1.0)
        if self._outbox is not None:
            try:
                self._outbox.close()
                return
            except OSError as error:
                self._say(f"they can't be kept: {error}")
        if self._kept:
            self._services.log.warning("webhook events dropped", events=len(self._kept))


class Plugin:
    """Asks and tells, and offers the transport type."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._asked: Endpoint | None = None
        self._teller: Teller | None = None
        self._wanted = frozenset(config.events) if config.events_url else frozenset()
        if config.wait != bool(config.url):
            raise ValueError("url and wait: expected both or neither; what only receives mail is a [transport:NAME] of type webhook")
        if config.wait:
            self._asked = make_endpoint(services, config, config.url, config.secret)
        if config.events_url:
            endpoint = make_endpoint(services, config, config.events_url, config.events_secret or config.secret)
            self._teller = Teller(config, services, endpoint)
        self._writer = Writer(config, services.hostname, services.config.gmta.data_dir, self._heavy)
        self._reports: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()

    @hookimpl
    def get_transports(self, config: Any) -> dict[str, Any]:
        """{type name: transport class}."""
        return {"webhook": Webhook}

    # -- the question ---------------------------------------------------------------------------------------------

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> Verdict | dict[Recipient, Verdict] | None:
        """Asks the endpoint, where it is to be asked."""
        verdict = self._ask(self._asked, session, transaction, message) if self._asked is not None and session.role != "local" else None
        report = transaction.notes.get(REPORT) if "complained" in self._wanted or "bounced" in self._wanted else None
        if report and not isinstance(verdict, Verdict):
            self._reports[transaction.id] = report
            if len(self._reports) > MAX_PENDING:
                self._reports.popitem(last=False)
        return verdict

    def _ask(self, endpoint: Endpoint, session: Session, transaction: Transaction, message: Message) -> Verdict | dict[Recipient, Verdict] | None:
        tls = session.tls
        client = {"ip": session.peer_ip, "helo": session.helo, "protocol": session.protocol, "user": session.user or "",
                  "tls": f"{tls.version} {tls.cipher}" if tls is not None else ""}
        recipients = [(one.address, str(one.original)) for one in transaction.recipients]
        facts = {"id": f"{transaction.id}_check", "type": "message.check", "queue_id": transaction.id, "transport": "",
                 "received_at": self._services.clock(),
                 "envelope": envelope_facts(transaction.sender, recipients, self._config.detail_separator, client),
                 "tags": sorted(transaction.tags), "authentication": [_shown_result(one) for one in transaction.auth_results]}
        try:
            request = self._writer.request(facts, message, {})
            try:
                answer = endpoint.post(request.id, request.content_type, request.body, request.extra,
                                       heavy=self._heavy if request.body.length > LARGE else None)
            finally:
                request.body.close()
            if not 200 <= answer.status < 300:
                raise PostFailed(f"{endpoint.host} answered {answer.status} {_first_line(answer)}")
            return self._understand(answer, transaction)
        except (PostFailed, OSError, ValueError, RecursionError) as failure:
            self._services.log.warning("webhook gave no verdict", id=transaction.id, session=session.id, reason=_shown(str(failure)))
            if self._config.on_error == "ignore":
                return None
            return defer("The message can't be judged now", 451, "4.3.0")

    def _understand(self, answer: Answer, transaction: Transaction) -> Verdict | dict[Recipient, Verdict] | None:
        """The verdict that an answer means; raises ValueError where it means none."""
        if not answer.body.strip() or "json" not in answer.headers.get("content-type", "json"):
            return None
        said = json.loads(answer.body)
        if not isinstance(said, dict):
            raise ValueError("the answer is no JSON object")
        verdict = _verdict_of(said)
        if verdict is not None:
            return verdict
        tags = said.get("tags") or []
        if isinstance(tags, list):
            transaction.tags.update(tag for tag in tags if isinstance(tag, str) and re.fullmatch(r"[\w.:-]{1,60}", tag, re.A))
        some = said.get("recipients") or {}
        if not isinstance(some, dict):
            raise ValueError("recipients is no JSON object")
        verdicts = {address.lower(): _verdict_of(one) for address, one in some.items()}
        found: dict[Recipient, Verdict] = {}
        for recipient in transaction.recipients:
            one = verdicts.get(str(recipient.address).lower()) or verdicts.get(str(recipient.original).lower())
            if one is not None:
                found[recipient] = one
        return found or None

    # -- events ---------------------------------------------------------------------------------------------------

    @hookimpl
    def on_worker_started(self, worker: Any) -> None:
        """From now on events outlive the worker, and those of workers that are gone are told."""
        if self._teller is not None:
            outbox = Outbox(os.path.join(self._services.config.gmta.data_dir, OUTBOX), self._services.batch, self._services.clock)
            self._teller.keep_in(outbox)
            self._services.spawn(self._beat, self._teller, worker)

    def _beat(self, teller: Teller, worker: Any) -> None:
        while not teller.closed:
            try:
                found = teller.beat()
                if found is not None:
                    self._recover(teller, worker, found)
            except Exception as error:  # a damaged shard, a disk that fails: those who live go on
                self._services.log.error("webhook events not taken over", error=str(error))
            gevent.sleep(BEAT_S)

    def _recover(self, teller: Teller, worker: Any, found: Found) -> None:
        """Takes over what dead workers had to tell, and what they had recorded when they died and not come to tell."""
        teller.take_over([_Event(id, at, body, again=True) for id, (at, body) in found.entries.items()])
        missed = []
        if found.since is not None:
            happened = worker.happened(found.since, list(HISTORY), self._config.events_queue)
            gevent.sleep(MOMENT_S)
            known = found.known | teller.known()
            for event, came in happened:
                kind = HISTORY[event.kind]
                to = str(event.data.get("to", ""))
                id = event_id(event.queue_id, to, kind, int(event.data.get("attempts", 0)))
                if kind in self._wanted and id not in known:
                    data = {"queue_id": event.queue_id, "sender": str(came.get("sender", "")), "recipient": to, "original": to, "tags": [],
                            "received_at": None, "remote": "", "elapsed_s": None, "next_attempt_at": None}
                    data |= {key: event.data[key] for key in ("transport", "next_hop", "attempts", "reply", "remote") if key in event.data}
                    missed.append(_Event(id, event.at, self._body(id, kind, event.at, data), again=True))
        teller.take_over(missed)
        self._services.log.info("webhook events taken over", waiting=len(found.entries), from_history=len(missed))
        teller.release(found)

    @hookimpl
    def on_queued(self, envelope: Any) -> None:
        """Tells what a report that was taken is about; who sent it hears 250 when that is kept."""
        for number, report in enumerate(self._reports.pop(envelope.id, ())):
            kind = str(report.get("event", ""))
            if kind in self._wanted:
                self._tell(f"{envelope.id}_report-{number}", kind, {**report, "queue_id": envelope.id}, wait=True)

    @hookimpl
    def on_delivery(self, envelope: Any, recipient: Any, outcome: Any, elapsed_s: float) -> None:
        """delivered, deferred."""
        kind = outcome.status.value
        if kind in self._wanted:
            self._tell(event_id(envelope.id, str(recipient.address), kind, recipient.attempts), kind, {
                **_about(envelope, recipient), "reply": str(outcome.reply), "remote": outcome.remote, "elapsed_s": round(elapsed_s, 3),
                "next_attempt_at": recipient.next_attempt_at if kind == "deferred" else None})

    @hookimpl
    def on_bounced(self, envelope: Any, recipients: Any) -> None:
        """bounced."""
        if "bounced" in self._wanted:
            for recipient in recipients:
                self._tell(event_id(envelope.id, str(recipient.address), "bounced", recipient.attempts), "bounced",
                           {**_about(envelope, recipient), "reply": recipient.last_reply})

    @hookimpl
    def on_worker_stopping(self, worker: Any) -> None:
        """Gives the events that wait a moment."""
        if self._teller is not None:
            self._teller.stop()

    def close(self) -> None:
        """What is not told yet is left for another worker."""
        if self._teller is not None:
            self._teller.close()

    def _tell(self, id: str, kind: str, data: dict[str, Any], *, wait: bool = False) -> None:
        if self._teller is not None:
            self._teller.tell(id, self._body(id, kind, self._services.clock(), data), wait=wait)

    @staticmethod
    def _body(id: str, kind: str, at: float, data: dict[str, Any]) -> bytes:
        when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return _encode({"id": id, "type": kind, "timestamp": when, "data": data}).encode("utf-8", "replace")

    def _heavy(self, call: Callable[[], Any]) -> Any:
        return self._services.batch("webhook").submit(call)


def event_id(queue_id: str, address: str, kind: str, attempts: int) -> str:
    """What names an event, whoever tells it. attempts: those of the recipient until then."""
    recipient = hashlib.sha256(address.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return f"{queue_id}_{recipient}_{kind}-{attempts}"


def _shown_result(result: AuthResult) -> dict[str, Any]:
    return _result(result.method, result.result, result.reason, result.properties)


def _about(envelope: Any, recipient: Any) -> dict[str, Any]:
    return {"queue_id": envelope.id, "sender": str(envelope.sender), "recipient": str(recipient.address),
            "original": recipient.original or str(recipient.address), "transport": recipient.transport, "next_hop": recipient.next_hop,
            "attempts": recipient.attempts, "received_at": envelope.received_at, "tags": list(envelope.tags)}


def _verdict_of(said: Any) -> Verdict | None:
    """accept is None; raises ValueError for what is no verdict."""
    if not isinstance(said, dict):
        raise ValueError("a verdict is no JSON object")
    action, text = said.get("action", "accept"), said.get("text", "")
    if action == "accept":
        return None
    code, enhanced = said.get("code"), said.get("enhanced")
    if not isinstance(text, str) or not isinstance(code, int | None) or not isinstance(enhanced, str | None):
        raise ValueError("text, code or enhanced is of the wrong type")
    if action == "reject":
        return reject(_shown(text) or "The message is not wanted here", code or 550, enhanced or "5.7.1")
    if action == "defer":
        return defer(_shown(text) or "Not now", code or 451, enhanced or "4.7.1")
    raise ValueError(f"unknown action {str(action)[:20]!r}")
