r"""Dialogues: what a client says and what the server must answer, one behaviour a file; read here, and played over a socket.

A line is a comment (`#`), a setting (`requires: CHUNKING`), or a step. What the client sends: `C: line` (CRLF is added),
`SEND-RAW: octets` (nothing is added), with the escapes \r \n \t \0 \\ \xHH, \{text*N} (N times) and \{base64 text}. What the
server must do: `S: pattern` (one whole reply; `S*3: pattern` three), `HAS:` and `LACKS:` (lines of that reply), `EOF`. Besides: `STARTTLS`, `CLOSE`,
`WAIT: time`; and at the end what must be in the queue: `QUEUED: <sender> <recipient>`, `HAS:`, `LACKS:`, `BODY:`. docs/testing.md
has the whole of it. gmta.testing.server plays the same against a server in memory.
A file that can't be read as a dialogue raises DialogueError; a server that does otherwise, DialogueFailed (an AssertionError).
"""

from __future__ import annotations

import base64
import re
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gmta.mail.address import Address
from gmta.mail.message import Message

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|\{base64 ([^{}]*)\}|\{([^{}]*)\*([0-9]+)\}|(.)|\Z)", re.S)
_PLAIN = {"r": "\r", "n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
_STEP = re.compile(r"(C|S(?:\*[0-9]{1,4})?|SEND-RAW|HAS|LACKS|EOF|CLOSE|STARTTLS|WAIT|QUEUED|BODY|BODY-RAW)(?::(?: (.*))?)?\Z", re.S)
_SETTING = re.compile(r"([a-z-]+): *(.*)\Z")
_PATTERN = re.compile(r"[2-5x][0-9x]{2}(?: .*)?\Z")
_PATHS = re.compile(r"<([^<>]*)>")
_REPLY_LINE = re.compile(rb"([2-5][0-9][0-9])([ -])?(.*)\Z", re.S)
_MAX_REPLY_LINE = 512  # RFC 5321 section 4.5.3.1.5


class DialogueError(ValueError):
    """The text is no dialogue; the message names file and line."""


class DialogueFailed(AssertionError):
    """The server did not do what the dialogue says; the message has file, line and what was said until then."""


# --- steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """The client sends octets."""

    line: int
    octets: bytes


@dataclass(frozen=True, slots=True)
class Expect:
    """One reply comes. has, lacks: patterns that a line of it must, and none may, match."""

    line: int
    pattern: str
    has: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Eof:
    """The server ends the connection."""

    line: int


@dataclass(frozen=True, slots=True)
class Close:
    """The client goes away."""

    line: int


@dataclass(frozen=True, slots=True)
class StartTls:
    """The TLS handshake takes place now."""

    line: int


@dataclass(frozen=True, slots=True)
class Wait:
    """The client is silent for so long, by the server's clock."""

    line: int
    seconds: float


Step = Send | Expect | Eof | Close | StartTls | Wait


@dataclass(slots=True)
class Queued:
    """A message that must be in the queue. body: its octets, None where any will do."""

    line: int
    sender: str
    recipients: list[str]
    has: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    body: bytes | None = None

    def complaint(self, sender: Address, recipients: Iterable[Address], raw: bytes) -> str:
        """What is wrong with a message in this one's place, or ""."""
        given = [str(recipient) for recipient in recipients]
        if str(sender) != self.sender or given != self.recipients:
            return f"from <{sender}> to {' '.join(f'<{recipient}>' for recipient in given)}"
        message = Message.from_bytes(raw)
        fields = [re.sub(r"\s*\r\n\s+", " ", octets.decode("utf-8", "surrogateescape")).rstrip("\r\n") for _, octets in message.fields()]
        wrong = _lines_complaint(fields, self.has, self.lacks)
        body = b"".join(message.body.chunks())
        if not wrong and self.body is not None and body != self.body:
            wrong = f"body {_shown(body)}"
        return wrong


# --- the text ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Dialogue:
    """One dialogue. requires, unless: EHLO keywords that must, and must not, be offered.  listener: the section it is for.

    queued: messages that must be queued, in that order; None where the file does not say.
    """

    name: str
    steps: list[Step]
    requires: list[str]
    unless: list[str]
    listener: str
    queued: list[Queued] | None

    @property
    def waits(self) -> bool:
        """True where it needs a server whose clock can be set."""
        return any(isinstance(step, Wait) for step in self.steps)

    def missing(self, keywords: Iterable[str]) -> str:
        """Why it can't be played where EHLO says `keywords`, or "" where it can."""
        offered = {word.upper() for line in keywords for word in _with_parameters(line)}
        for wanted in self.requires:
            if wanted.upper() not in offered:
                return f"{wanted} is not offered"
        for unwanted in self.unless:
            if unwanted.upper() in offered:
                return f"{unwanted} is offered"
        return ""

    @classmethod
    def load(cls, path: str | Path) -> Dialogue:
        """The dialogue in a file; raises DialogueError and OSError."""
        return cls.parse(Path(path).read_text(encoding="utf-8"), str(path))

    @classmethod
    def parse(cls, text: str, name: str = "dialogue") -> Dialogue:
        """The dialogue in a text; raises DialogueError."""
        made = cls(name, [], [], [], "mx", None)
        target: Expect | Queued | None = None
        for number, line in enumerate(text.split("\n"), 1):
            try:
                target = made._take(number, line, target)
            except ValueError as error:
                raise DialogueError(f"{name}:{number}: {error}") from None
        if not made.steps:
            raise DialogueError(f"{name}: has no steps")
        return made

    def _take(self, number: int, line: str, target: Expect | Queued | None) -> Expect | Queued | None:
        """Takes one line; gives what a HAS or LACKS in the next one is about."""
        if not line.strip() or line.startswith("#"):
            return target
        match = _STEP.match(line)
        if match is None:
            self._set(line)
            return target
        word, text = match[1], match[2] or ""
        if word in ("EOF", "CLOSE", "STARTTLS") and ":" in line:
            raise ValueError(f"{word} takes nothing")
        if word in ("HAS", "LACKS", "BODY", "BODY-RAW"):
            self._detail(word, text, target)
            return target
        if word == "QUEUED":
            return self._queue(number, text)
        if self.queued is not None:
            raise ValueError("QUEUED stands at the end")
        if self.steps and isinstance(self.steps[-1], Eof | Close):
            raise ValueError("nothing comes after the end of the connection")
        if word.startswith("S") and word[1:2] in ("", "*"):
            if _PATTERN.match(text) is None:
                raise ValueError("expected a reply such as 250, 5xx or 250 2.1.0 *")
            expected = Expect(number, text)
            self.steps += [expected] * int(word[2:] or 1)
            return expected
        steps: dict[str, Callable[[], Step]] = {
            "C": lambda: Send(number, octets(text) + b"\r\n"), "SEND-RAW": lambda: Send(number, octets(text)),
            "EOF": lambda: Eof(number), "CLOSE": lambda: Close(number), "STARTTLS": lambda: StartTls(number),
            "WAIT": lambda: Wait(number, _seconds(text)),
        }
        self.steps.append(steps[word]())
        return None

    def _set(self, line: str) -> None:
        match = _SETTING.match(line)
        if match is None:
            raise ValueError(f"expected a step or a setting, not {line[:60]!r}")
        if self.steps:
            raise ValueError("settings stand before the first step")
        key, value = match[1], match[2].strip()
        if key == "requires":
            self.requires += [word.strip() for word in value.split(",")]
        elif key == "unless":
            self.unless += [word.strip() for word in value.split(",")]
        elif key == "listener":
            self.listener = value
        else:
            raise ValueError(f"there is no setting {key}: requires, unless, listener")

    def _queue(self, number: int, text: str) -> Queued | None:
        if self.queued is None:
            self.queued = []
        if text == "none":
            return None
        paths = _PATHS.findall(text)
        if len(paths) < 2 or _PATHS.sub("", text).strip():
            raise ValueError("expected none, or <sender> <recipient> ...")
        self.queued.append(Queued(number, paths[0], paths[1:]))
        return self.queued[-1]

    @staticmethod
    def _detail(word: str, text: str, target: Expect | Queued | None) -> None:
        if target is None:
            raise ValueError(f"{word} needs an S or QUEUED before it")
        if word == "HAS":
            target.has.append(text)
        elif word == "LACKS":
            target.lacks.append(text)
        elif isinstance(target, Queued):
            target.body = (target.body or b"") + octets(text) + (b"\r\n" if word == "BODY" else b"")
        else:
            raise ValueError(f"{word} needs a QUEUED before it")


def octets(text: str) -> bytes:
    """The octets that a step's text stands for; raises ValueError for a bad escape."""
    out, position = b"", 0
    for match in _ESCAPE.finditer(text):
        out += text[position:match.start()].encode()
        position = match.end()
        code, encoded, repeated, times, letter = match.groups()
        if code is not None:
            out += bytes([int(code, 16)])
        elif encoded is not None:
            out += base64.b64encode(octets(encoded))
        elif repeated is not None:
            out += octets(repeated) * int(times)
        elif letter in _PLAIN:
            out += _PLAIN[letter].encode()
        else:
            raise ValueError(f"there is no escape \\{letter or ''}")
    return out + text[position:].encode()


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+)(ms|s|m|h)", text)
    if match is None:
        raise ValueError("expected a time such as 30s or 5m")
    return float(match[1]) * _UNITS_S[match[2]]


def _with_parameters(line: str) -> list[str]:
    """"AUTH PLAIN LOGIN" as AUTH, AUTH PLAIN, AUTH LOGIN."""
    keyword, *parameters = line.split() or [""]
    return [keyword, *(f"{keyword} {parameter}" for parameter in parameters)]


# --- judging ----------------------------------------------------------------------------------------------------


def _glob(pattern: str) -> str:
    """The regular expression of a pattern in which `*` stands for anything."""
    return ".*".join(re.escape(part) for part in pattern.split("*"))


def _line_pattern(pattern: str) -> re.Pattern[str]:
    """Of a whole line."""
    return re.compile(_glob(pattern) + r"\Z", re.S)


def _reply_pattern(pattern: str) -> re.Pattern[str]:
    """Of the first words of a reply; x in the code stands for a digit."""
    return re.compile(pattern[:3].replace("x", "[0-9]") + _glob(pattern[3:]) + r"(?: .*)?\Z", re.S)


def _lines_complaint(lines: list[str], has: list[str], lacks: list[str]) -> str:
    for pattern in has:
        if not any(map(_line_pattern(pattern).match, lines)):
            return f"no line {pattern!r}"
    for pattern in lacks:
        for line in filter(_line_pattern(pattern).match, lines):
            return f"a line {line!r}"
    return ""


def _shown(data: bytes) -> str:
    return repr(data if len(data) <= 200 else data[:120] + b"..." + data[-60:])


class Replies:
    """Replies out of the server's octets, each a list of lines; what is no reply raises ValueError."""

    def __init__(self) -> None:
        self._buffer = b""
        self._lines: list[str] = []

    @property
    def rest(self) -> bytes:
        """Octets that are no whole line yet."""
        return self._buffer

    def feed(self, data: bytes) -> list[list[str]]:
        """The replies that are complete by now (RFC 5321 section 4.2)."""
        whole = []
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            match = _REPLY_LINE.match(line)
            if line == raw or match is None or (match[2] is None and match[3]) or b"\r" in line:
                raise ValueError(f"a malformed reply line {_shown(raw)}")
            if len(raw) + 1 > _MAX_REPLY_LINE:
                raise ValueError(f"a reply line of {len(raw) + 1} octets")
            if self._lines and self._lines[0][:3].encode() != match[1]:
                raise ValueError(f"a reply whose code changes: {_shown(raw)}")
            self._lines.append(f"{match[1].decode()} {match[3].decode('utf-8', 'replace')}")
            if match[2] != b"-":
                whole.append(self._lines)
                self._lines = []
        return whole


class Judge:
    """Compares one play with its dialogue; keeps what was said for the message of a DialogueFailed."""

    def __init__(self, dialogue: Dialogue) -> None:
        self.dialogue = dialogue
        self.replies: list[list[str]] = []
        self.octets = b""
        self._parser = Replies()
        self._judged = 0
        self._said: list[str] = []

    def heard(self, data: bytes, line: int) -> None:
        """Takes what the server sent; line: where the dialogue stands."""
        self.octets += data
        try:
            self.replies += self._parser.feed(data)
        except ValueError as error:
            raise self.failed(line, str(error)) from None

    def said(self, data: bytes) -> None:
        """Notes what the client sent."""
        self._said.append(f"C {_shown(data)}")

    @property
    def waiting(self) -> bool:
        """True where a reply has come that was not judged yet."""
        return self._judged < len(self.replies)

    def judge(self, step: Expect) -> None:
        """The next reply, which has come, against what was expected."""
        if not self.waiting:
            raise self.failed(step.line, f"expected {step.pattern}, got nothing")
        lines = self.replies[self._judged]
        self._judged += 1
        self._said += (f"S {line}" for line in lines)
        if _reply_pattern(step.pattern).match(lines[0]) is None:
            raise self.failed(step.line, f"expected {step.pattern}, got {lines[0]!r}")
        wrong = _lines_complaint([line[4:] for line in lines], step.has, step.lacks)
        if wrong:
            raise self.failed(step.line, f"the reply has {wrong}")

    def silence(self, line: int) -> None:
        """Nothing more may have been said."""
        if self.waiting:
            raise self.failed(line, f"a reply that was not expected: {self.replies[self._judged][0]!r}")
        if self._parser.rest and not self._parser.rest.startswith(b"\x15\x03"):  # but a TLS alert may
            raise self.failed(line, f"octets that are no reply: {_shown(self._parser.rest)}")

    def check_queue(self, found: list[tuple[Address, list[Address], bytes]]) -> None:
        """The messages in the queue against the dialogue's."""
        wanted = self.dialogue.queued
        if wanted is None:
            return
        for number, expected in enumerate(wanted):
            if number >= len(found):
                raise self.failed(expected.line, f"expected a message in the queue, there are {len(found)}")
            wrong = expected.complaint(*found[number])
            if wrong:
                raise self.failed(expected.line, f"the message has {wrong}")
        if len(found) > len(wanted):
            last = self.dialogue.steps[-1].line
            raise self.failed(last, f"expected {len(wanted)} messages in the queue, there are {len(found)}")

    def failed(self, line: int, reason: str) -> DialogueFailed:
        """The exception that says so."""
        said = "".join(f"\n    {words}" for words in self._said[-12:])
        return DialogueFailed(f"{self.dialogue.name}:{line}: {reason}{said}")


# --- over a socket ----------------------------------------------------------------------------------------------

_QUEUED_AS = re.compile(r"250 2\.0\.0 queued as (\S+)\Z")


def play_at(dialogue: Dialogue, address: tuple[str, int], *, timeout_s: float = 10.0,
            fetch: Callable[[str], tuple[Address, list[Address], bytes]] | None = None) -> list[list[str]]:
    """Plays against a running server; gives the replies. Raises DialogueFailed, OSError where nobody listens.

    timeout_s: how long each reply may take.  fetch: sender, recipients and octets of the message with that queue id; without it
    what the dialogue says about the queue is not looked at. A dialogue that `waits` can't be played here.
    """
    judge = Judge(dialogue)
    with socket.create_connection(address, timeout_s) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link: socket.socket = plain
        try:
            for step in dialogue.steps:
                if isinstance(step, Send):
                    judge.silence(step.line)
                    judge.said(step.octets)
                    _send(link, step.octets)
                elif isinstance(step, Expect):
                    while not judge.waiting and _hear(link, judge, step.line):
                        pass
                    judge.judge(step)
                elif isinstance(step, StartTls):
                    judge.silence(step.line)
                    link = _client_tls().wrap_socket(link, server_hostname="mx.example.test")
                elif isinstance(step, Wait):
                    raise judge.failed(step.line, "WAIT needs a server in memory")
                else:
                    break
            last = dialogue.steps[-1]
            if isinstance(last, Close):
                judge.silence(last.line)
            else:
                if not isinstance(last, Eof):
                    socket.socket.shutdown(link, socket.SHUT_WR)  # under TLS too: what the server still says must be readable
                while _hear(link, judge, last.line):
                    pass
                judge.silence(last.line)
        except TimeoutError:
            raise judge.failed(step.line, "nothing came in time") from None
        except ssl.SSLError as error:
            raise judge.failed(step.line, f"TLS: {error}") from None
        finally:
            link.close()
    if fetch is not None and dialogue.queued is not None:
        matches = (_QUEUED_AS.match(lines[0]) for lines in judge.replies)
        judge.check_queue([fetch(match[1]) for match in matches if match])
    return judge.replies


def _send(link: socket.socket, data: bytes) -> None:
    try:
        link.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # an EOF or a reply that is missing will tell


def _hear(link: socket.socket, judge: Judge, line: int) -> bool:
    """Takes what the server says next; False at its end."""
    try:
        data = link.recv(65536)
    except ConnectionResetError:
        data = b""
    judge.heard(data, line)
    return bool(data)


def _client_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def keywords_at(address: tuple[str, int], *, timeout_s: float = 10.0) -> list[str]:
    """The EHLO lines of a running server, for `Dialogue.missing`."""
    return [line[4:] for line in play_at(Dialogue.parse(GREETING), address, timeout_s=timeout_s)[1][1:]]


GREETING = "S: 220\nC: EHLO client.example.com\nS: 250\nC: QUIT\nS: 221\nEOF\n"
