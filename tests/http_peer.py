"""A web server that follows a script: what webhooks are tested against. It runs in a native thread and remembers what it was told."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Heard:
    """A request. headers: names in lower case.  connection: number of the connection it came over."""

    target: str
    headers: dict[str, str]
    body: bytes
    connection: int


@dataclass
class Step:
    """What it does with a request: answer `status` with `headers` and `body`; or send `raw` and close; or hang until the peer leaves.

    cut: announces so many octets more than it sends, then closes.  unasked: closes the connection after the answer without a word.
    half: ends its side without a word, and reads on.  trickle: sends what `raw` has behind a header section an octet at a time.
    endless: repeats `body` until the peer leaves.  only: the webhook-id that it is for, others get 200.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    raw: bytes | None = None
    hang: bool = False
    cut: int = 0
    unasked: bool = False
    half: bool = False
    trickle: bool = False
    endless: bool = False
    only: str = ""


class HttpPeer:
    """Listens on loopback. steps: one a request; the last one repeats."""

    def __init__(self, steps: Iterable[Step] = (), *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self.steps = list(steps) or [Step()]
        self.heard: list[Heard] = []
        self._tls = tls
        self._more = threading.Condition()
        self._over = threading.Event()
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = self._listener.getsockname()[1]
        self._links: list[Any] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, path: str = "/in") -> str:
        """Its URL by address."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}{path}"

    def wait(self, count: int, timeout_s: float = 20.0) -> list[Heard]:
        """What was heard, as soon as that is `count` requests."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.heard) >= count, timeout_s), f"{len(self.heard)} requests, expected {count}"
            return list(self.heard)

    def close(self) -> None:
        """Ends it."""
        self._over.set()
        self._listener.close()
        for link in self._links:
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            link.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._links.append(link)
            threading.Thread(target=self._serve, args=(link, number), daemon=True).start()
            number += 1

    def _serve(self, link: Any, number: int) -> None:
        try:
            if self._tls is not None:
                link = self._tls.wrap_socket(link, server_side=True)
                self._links.append(link)
            reader = link.makefile("rb")
            while self._one(link, reader, number):
                pass
        except (OSError, ValueError):
            pass
        finally:
            link.close()

    def _one(self, link: Any, reader: Any, number: int) -> bool:
        line = reader.readline()
        if not line:
            return False
        headers: dict[str, str] = {}
        while (field_line := reader.readline().rstrip(b"\r\n")):
            name, _, value = field_line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        body = reader.read(int(headers.get("content-length", "0")))
        with self._more:
            step = self.steps[min(len(self.heard), len(self.steps) - 1)]
            if step.only not in ("", headers.get("webhook-id")):
                step = Step()
            self.heard.append(Heard(line.split()[1].decode("latin-1"), headers, body, number))
            self._more.notify_all()
        if step.half:
            link.shutdown(socket.SHUT_WR)
        if step.hang or step.half:
            reader.read(1)
            return False
        head, blank, rest = (step.raw or b"").rpartition(b"\r\n\r\n") if step.trickle else (b"", b"", b"")
        link.sendall(head + blank)
        for octet in rest:
            self._over.wait(0.05)
            link.sendall(bytes([octet]))
        if step.raw is not None:
            link.sendall(step.raw)
            return False
        length = "" if step.endless else f"Content-Length: {len(step.body) + step.cut}\r\n"
        fields = "".join(f"{name}: {value}\r\n" for name, value in step.headers.items())
        link.sendall(f"HTTP/1.1 {step.status} Said\r\n{length}{fields}\r\n".encode("latin-1") + step.body)
        while step.endless:
            link.sendall(step.body)
        return not (step.cut or step.unasked)
