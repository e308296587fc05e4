"""A remote mail host on loopback that says what a test wants said: by a script, or well-behaved but for a few replies.

    with Peer(script) as peer:                              # plays the script on its first connection
    with Peer(first, second) as peer:                       # one a connection; past the last one it is well-behaved
    with Peer(keywords=["PIPELINING"], replies={"RCPT TO:<no": "550 5.1.1 no"}) as peer:
        ...                                                 # [transport:outbound] host = {peer.address}
    assert peer.messages == [...] and peer.commands(0) == [...]
    peer.check()                                            # every script was played as it stands

A script has one step a line; empty lines and those that begin with # are passed over:

    S: 250-mx.example           said; several in a row go out in one write. \\xNN and \\n stand for octets
    C: ^MAIL FROM:<             a line that is heard, as a regular expression
    MESSAGE                     everything up to the final dot, or the octets of a BDAT line that was heard last
    STARTTLS [garbage|close]    the handshake after a 220, or what it gets in its place
    PLAY                        well-behaved from here on
    DROP                        closed from this side
    END                         the other side closes, saying nothing more but QUIT
    HANG                        nothing, until the other side goes away
    REFUSE                      as the only step: nobody listens here

replies: start of a command (`greeting`, `too many`, and `final` or `final0`, `final1` … for the ends of data) -> reply, or None to
close. A well-behaved host knows SMTP or LMTP as far as its keywords go. What the other side does besides is in `sessions`. The peer has
threads of its own, so it serves programs, threads and greenlets alike. Failure: `check` raises AssertionError.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Mapping, Sequence

PATIENCE_S = 20.0
_STEP = re.compile(r"(?:([SC]): ?(.*)|([A-Z]+)(?: (.*))?)\Z")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|n)")
_WORDS = frozenset({"MESSAGE", "STARTTLS", "PLAY", "DROP", "END", "HANG", "REFUSE"})


class _Gone(Exception):
    """The other side has closed the connection."""


class _Problem(Exception):
    """The other side did not do what the script wants."""


def parse(script: str) -> list[tuple[str, str]]:
    """The steps of a script as (word, argument); raises ValueError."""
    steps: list[tuple[str, str]] = []
    for line in script.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _STEP.match(line)
        if match is None or (match[3] and match[3] not in _WORDS):
            raise ValueError(f"no step of a script: {line!r}")
        word, argument = (match[1], match[2]) if match[1] else (match[3], match[4] or "")
        if word == "S" and steps and steps[-1][0] == "S":
            steps[-1] = ("S", steps[-1][1] + argument + "\r\n")
        else:
            steps.append((word, argument + "\r\n" if word == "S" else argument))
    return steps


class Session:
    """One connection. commands: lines heard.  messages: octets of each message, dots undone.  problem: why a script did not go on."""

    def __init__(self, peer: Peer, sock: socket.socket, steps: list[tuple[str, str]]) -> None:
        self.commands: list[str] = []
        self.messages: list[bytes] = []
        self.problem = ""
        self.tls = False
        self.server_name = ""
        self.ended = False
        self._peer = peer
        self._socket = sock
        self._steps = steps
        self._buffer = b""
        self._accepted = 0
        self._chunks = b""

    def run(self) -> None:
        """Plays to the end."""
        try:
            for word, argument in self._steps:
                if not self._step(word, argument):
                    break
            else:
                if self._steps:  # the script is over: what still comes is answered politely, and nothing is taken
                    self._play(spent=True)
        except _Problem as problem:
            self.problem = str(problem)
        except (_Gone, OSError):
            pass
        finally:
            self.ended = True
            self._socket.close()

    def _step(self, word: str, argument: str) -> bool:
        """One step; False where it ends the session."""
        if word == "S":
            self._send(_ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else "\n", argument).encode("latin-1"))
        elif word == "C":
            try:
                heard = self._line()
            except _Gone:
                raise _Problem(f"closed in place of /{argument}/") from None
            if not re.search(argument, heard, re.I):
                raise _Problem(f"wanted /{argument}/, heard {heard[:200]!r}")
        elif word == "MESSAGE":
            self._message()
        elif word == "STARTTLS":
            return self._start_tls(argument)
        elif word == "PLAY":
            self._play(greeted=bool(self.commands))
            return False
        elif word == "DROP":
            return False
        elif word == "END":
            self._wait_for_end()
            return False
        else:
            self._hang()
            return False
        return True

    # --- octets -----------------------------------------------------------------------------------------------------

    def _send(self, octets: bytes) -> None:
        self._socket.sendall(octets)

    def _fill(self) -> None:
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            raise _Problem(f"nothing for {PATIENCE_S:.0f} s") from None
        except OSError:
            data = b""
        if not data:
            raise _Gone
        self._buffer += data

    def _line(self) -> str:
        while b"\n" not in self._buffer:
            self._fill()
        raw, self._buffer = self._buffer.split(b"\n", 1)
        if not raw.endswith(b"\r") or b"\r" in raw[:-1]:
            raise _Problem(f"a line that does not end in CRLF: {raw[:200]!r}")
        line = raw[:-1].decode("utf-8", "backslashreplace")
        self.commands.append(line)
        return line

    def _message(self) -> None:
        """The octets of a chunk, or everything up to the final dot."""
        chunk = re.match(r"BDAT (\d+)( LAST)?\Z", self.commands[-1], re.I) if self.commands else None
        if chunk is not None:
            size = int(chunk[1])
            while len(self._buffer) < size:
                self._fill()
            self._chunks += self._buffer[:size]
            self._buffer = self._buffer[size:]
            if chunk[2]:
                self.messages.append(self._chunks)
                self._chunks = b""
            return
        while (end := (b"\r\n" + self._buffer).find(b"\r\n.\r\n")) < 0:
            self._fill()
        wire, self._buffer = self._buffer[:end], self._buffer[end + 3:]
        self.messages.append(re.sub(rb"(?m)^\.", b"", wire))

    def _start_tls(self, how: str) -> bool:
        if how:
            if how == "garbage":
                self._send(b"this is no TLS\r\n" * 3)
            return False
        context = self._peer.context
        assert context is not None, "the peer has no certificate"
        if self._buffer:
            raise _Problem(f"octets before the handshake: {self._buffer[:80]!r}")
        context.sni_callback = self._take_name
        try:
            self._socket = context.wrap_socket(self._socket, server_side=True)
        except (OSError, ValueError) as error:
            raise _Gone from error
        self.tls = True
        return True

    def _take_name(self, tls_object: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        self.server_name = name or ""

    def _wait_for_end(self) -> None:
        try:
            while True:
                line = self._line()
                if line.upper() != "QUIT":
                    raise _Problem(f"wanted the end of the connection, heard {line[:200]!r}")
                self._send(b"221 2.0.0 bye\r\n")
        except _Gone:
            return

    def _hang(self) -> None:
        while True:
            self._fill()

    # --- a host that knows how to behave ------------------------------------------------------------------------------

    def _say(self, command: str, standard: str) -> bool:
        """The reply that the test has set for a command, or the standard one; False where it is to close."""
        said = self._reply(command, standard)
        if said is None:
            return False
        self._send("".join(f"{line}\r\n" for line in said.split("\n")).encode("latin-1"))
        return True

    def _play(self, *, greeted: bool = False, spent: bool = False) -> None:
        """Converses until the other side has enough. spent: takes nothing any more."""
        if not spent and not greeted and not self._say("greeting", "220 peer.example ESMTP"):
            return
        while True:
            line = self._line()
            verb = line[:4].upper()
            if verb == "QUIT":
                self._send(b"221 2.0.0 bye\r\n")
                return
            if not self._answer(verb, line, spent=spent):
                return

    def _answer(self, verb: str, line: str, *, spent: bool) -> bool:
        if spent and verb not in ("RSET", "NOOP"):
            return self._say("", "503 5.5.1 bad sequence of commands")
        if verb in ("EHLO", "LHLO"):
            offers_tls = self._peer.context is not None and not self.tls
            return self._say(line, _ehlo(["peer.example", *self._peer.keywords, *(["STARTTLS"] if offers_tls else [])]))
        if verb == "MAIL":
            self._accepted = 0
            return self._say(line, "250 2.1.0 ok")
        if verb == "RCPT":
            most = self._peer.rcpt_max
            if most and self._accepted >= most:
                return self._say("too many", "452 4.5.3 too many recipients")
            said = self._reply(line, "250 2.1.5 ok")
            self._accepted += bool(said and said.startswith("2"))
            return self._say(line, "250 2.1.5 ok")
        if verb == "STAR" and self._peer.context is not None and not self.tls:
            if not self._say(line, "220 2.0.0 go"):
                return False
            return not (self._reply(line, "220") or "").startswith("220") or self._start_tls("")
        if verb == "DATA":
            said = self._reply(line, "354 go on" if self._accepted else "554 5.5.1 no valid recipients")
            if not self._say(line, said or ""):
                return False
            if said is not None and said.startswith("354"):
                self._message()
                return self._final(line)
            return True
        if verb == "BDAT":
            taken = self._reply(line, "")
            if taken:  # refused: a host that does not know BDAT does not read the chunk either
                return self._say(line, taken)
            self._message()
            if not self._accepted:
                self.messages.pop()
                return self._say("no recipients", "503 5.5.1 no valid recipients")
            return self._final(line)
        return self._say(line, "250 2.0.0 ok")

    def _reply(self, command: str, standard: str) -> str | None:
        """What `_say` would say."""
        for start, reply in self._peer.replies.items():
            if command.upper().startswith(start.upper()):
                return reply
        return standard

    def _final(self, line: str) -> bool:
        """The reply to the end of data, with LMTP one a recipient."""
        for number in range(self._accepted if self._peer.lmtp else 1):
            if not self._say(f"final{number}", "250 2.0.0 taken"):
                return False
        return True


class Peer:
    """The host. scripts: one a connection, as above.  keywords: of the well-behaved host.  tls: (certificate, key) files for STARTTLS,
    which is offered then.

    rcpt_max: recipients in a transaction, 0 for any number.  host: an address of loopback; port: 0 for any.  sessions: in the order of their connections.
    """

    def __init__(self, *scripts: str, keywords: Sequence[str] = ("PIPELINING", "8BITMIME", "SIZE 100000"),
                 replies: Mapping[str, str | None] | None = None, lmtp: bool = False, rcpt_max: int = 0,
                 tls: tuple[str, str] | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self._scripts = [parse(script) for script in scripts]
        self.keywords = list(keywords)
        self.replies: dict[str, str | None] = dict(replies or {})
        self.lmtp = lmtp
        self.rcpt_max = rcpt_max
        self.sessions: list[Session] = []
        self.context: ssl.SSLContext | None = None
        if tls is not None:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(*tls)
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self.host, self.port = self._socket.getsockname()[:2]
        self._closing = False
        self._thread: threading.Thread | None = None
        if not (self._scripts and self._scripts[0] and self._scripts[0][0][0] == "REFUSE"):
            self._socket.listen(64)
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()

    @property
    def address(self) -> str:
        """As `host` of a transport takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many there were."""
        return len(self.sessions)

    @property
    def messages(self) -> list[bytes]:
        """The octets of all messages, in the order of the connections."""
        return [message for session in self.sessions for message in session.messages]

    def commands(self, number: int = -1) -> list[str]:
        """The lines that were heard on a connection."""
        return self.sessions[number].commands

    def check(self) -> None:
        """Every script was begun and went as it stands; raises AssertionError."""
        problems = [f"connection {number}: {session.problem}" for number, session in enumerate(self.sessions, 1) if session.problem]
        if len(self.sessions) < len(self._scripts) and self._thread is not None:
            problems.append(f"{len(self.sessions)} connections for {len(self._scripts)} scripts")
        assert not problems, "; ".join(problems)

    def close(self) -> None:
        """Listens no more and ends what is under way."""
        self._closing = True
        if self._thread is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._socket.close()
        for session in self.sessions:
            try:
                session._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            sock.settimeout(PATIENCE_S)
            number = len(self.sessions)
            steps = self._scripts[number] if number < len(self._scripts) else [("PLAY", "")]
            session = Session(self, sock, steps)
            self.sessions.append(session)
            threading.Thread(target=session.run, daemon=True).start()


def _ehlo(lines: Sequence[str]) -> str:
    return "\n".join(f"250{' ' if number == len(lines) - 1 else '-'}{line}" for number, line in enumerate(lines))


__all__ = ["Peer", "Session", "parse"]

