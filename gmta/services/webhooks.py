"""Webhooks out: a signed POST to a URL that somebody configured, and what came of it.

`Endpoint.post` sends one request by the Standard Webhooks scheme (headers webhook-id, webhook-timestamp, webhook-signature). The host
is resolved by services.resolver, every address judged, and the connection made to that very address, so that a name that changes
between look and use leads nowhere (SSRF). Redirects are not followed, TLS is verified, an answer is read to MAX_ANSWER octets,
connections are kept. What to send, when to try again and what an answer means for mail is the caller's.

urllib3 does HTTP; its sockets yield to the loop where the process is monkey-patched, and the deadline of a whole request holds there.
Failure: `post` raises PostFailed, `Secrets` and `Endpoint` raise ValueError for what can't be used. RFC 9110, RFC 2104.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import http.client
import ipaddress
import re
import ssl
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

import gevent
import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProtocolError
from urllib3.exceptions import SSLError as TlsError

from gmta.services.dns import Resolver, Status, is_public
from gmta.services.tls import client_context

PREFIX = "whsec_"
MAX_ANSWER = 64 * 1024  # octets
MAX_ADDRESSES = 4  # tried in one request
TOLERANCE_S = 300.0
BLOCK = 64 * 1024
KEPT = 256  # connections to one address
USER_AGENT = "gmta"

_ID = re.compile(r"[!-~]+\Z")
_SECONDS = re.compile(r"[0-9]{1,15}\Z")


class PostFailed(Exception):
    """No answer. taken: whether the endpoint may have the request all the same."""

    def __init__(self, reason: str, *, taken: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.taken = taken


class Body(Protocol):
    """What is posted: its length, and its octets as often as they are asked for."""

    length: int

    def pieces(self) -> Iterator[bytes]:
        """The octets from the start; raises OSError."""

    def close(self) -> None:
        """Nobody asks for it any more."""


class BytesBody:
    """A body in memory."""

    __slots__ = ("data", "length")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.length = len(data)

    def pieces(self) -> Iterator[bytes]:
        """The octets in one piece."""
        yield self.data

    def close(self) -> None:
        """Nothing to do."""


@dataclass(slots=True)
class Answer:
    """An endpoint's answer. headers: names in lower case.  body: its first MAX_ANSWER octets.  remote: address and port."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    remote: str

    def retry_after_s(self, now: float, most_s: float) -> float | None:
        """The pause it asks for (RFC 9110 section 10.2.3), within a second and most_s; None where it names none that makes sense."""
        text = self.headers.get("retry-after", "").strip()
        if text.isascii() and text.isdigit():
            seconds = float(text[:12])
        else:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - now
            except (TypeError, ValueError, IndexError, OverflowError):
                return None
        return min(max(seconds, 1.0), most_s)


class Secrets:
    """Keys of the form `whsec_` + base64; the first is the current one, the others still hold while endpoints change over."""

    __slots__ = ("_keys",)

    def __init__(self, texts: Iterable[str]) -> None:
        self._keys = [_key(text) for text in texts]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def sign(self, id: str, timestamp: int, pieces: Iterable[bytes]) -> str:
        """The value of webhook-signature: one signature a key, blank-separated."""
        start = f"{id}.{timestamp}.".encode("ascii")
        macs = [hmac.new(key, start, hashlib.sha256) for key in self._keys]
        for piece in pieces:
            for mac in macs:
                mac.update(piece)
        return " ".join("v1," + b64encode(mac.digest()).decode("ascii") for mac in macs)

    def verify(self, id: str, timestamp: str, signature: str, pieces: Iterable[bytes], now: float) -> str:
        """"" where the signature holds for the body, else why it does not."""
        if _ID.match(id) is None or _SECONDS.match(timestamp) is None:
            return "webhook-id or webhook-timestamp is malformed"
        if abs(now - int(timestamp)) > TOLERANCE_S:
            return f"webhook-timestamp is more than {TOLERANCE_S:g} seconds away from now"
        given = [one.encode("ascii", "replace") for one in signature.split() if one.startswith("v1,")]
        if not given:
            return "there is no signature of version v1"
        right = [one.encode("ascii") for one in self.sign(id, int(timestamp), pieces).split()]
        if any(hmac.compare_digest(one, other) for one in given for other in right):
            return ""
        return "no signature fits: another secret, or a changed id, timestamp or body"


def _key(text: str) -> bytes:
    try:
        key = b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.startswith(PREFIX) or not 16 <= len(key) <= 128:
        raise ValueError(f"secret: expected {PREFIX} and 24 to 64 octets in base64")
    return key


class Endpoint:
    """A URL to post to.

    allow_private: addresses that are not the internet's may be spoken to.  ca_file: authorities, default the system's.  secrets:
    none: unsigned.  authorization: value of that header, or "".  connect_s: for one address; request_s: for all of a request.
    """

    def __init__(self, url: str, resolver: Resolver, clock: Callable[[], float], *, secrets: Secrets, allow_private: bool = False,
                 ca_file: str = "", authorization: str = "", connect_s: float = 10.0, request_s: float = 30.0) -> None:
        self.host, self._port, self._target, self._tls = split_url(url)
        self._resolver = resolver
        self._clock = clock
        self._secrets = secrets
        self._allow_private = allow_private
        self._connect_s = connect_s
        self._request_s = request_s
        self._context: ssl.SSLContext | None = client_context(True, ca_file=ca_file or None) if self._tls else None
        host = f"[{self.host}]" if ":" in self.host else self.host
        self._headers = {"Host": host if self._port == (443 if self._tls else 80) else f"{host}:{self._port}", "User-Agent": USER_AGENT,
                         "Accept": "application/json", "Accept-Encoding": "identity"}
        if authorization:
            if re.search(r"[^\t -~]", authorization):
                raise ValueError("authorization: expected one line of ASCII")
            self._headers["Authorization"] = authorization
        try:
            self._literal = str(ipaddress.ip_address(self.host))
        except ValueError:
            self._literal = ""
        self._pools: dict[str, Any] = {}

    @property
    def refused(self) -> bool:
        """Whether the URL names an address that may not be spoken to."""
        return bool(self._literal) and not (self._allow_private or is_public(self._literal))

    def headers(self, id: str, content_type: str, body: Body, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """All headers of a request made now; raises OSError where the body can't be read."""
        headers = {**self._headers, "Content-Type": content_type, "Content-Length": str(body.length)}
        if id:
            timestamp = int(self._clock())
            headers |= {"webhook-id": id, "webhook-timestamp": str(timestamp)}
            if self._secrets:
                headers["webhook-signature"] = self._secrets.sign(id, timestamp, body.pieces())
        if extra:
            headers.update(extra)
        return headers

    def post(self, id: str, content_type: str, body: Body, extra: Mapping[str, str] | None = None,
             again: Mapping[str, str] | None = None, heavy: Callable[[Callable[[], Any]], Any] | None = None) -> Answer:
        """Sends a request and reads the answer; raises PostFailed, OSError where the body can't be read.

        id: the same for every try; "": no webhook, the headers of the scheme are left out.  extra: further headers.  again: headers that mark a second try, where a kept connection broke
        and nobody knows whether the first one got through.  heavy: runs the signing of a large body outside the loop.
        """
        limit = gevent.Timeout(self._request_s)
        limit.start()
        try:
            addresses = self._addresses()
            headers = heavy(lambda: self.headers(id, content_type, body, extra)) if heavy else self.headers(id, content_type, body, extra)
            reason = ""
            for address in addresses:
                try:
                    return self._post(address, headers, body, again, limit)
                except PostFailed as failure:
                    if failure.taken:
                        raise
                    reason = failure.reason
            raise PostFailed(reason)
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            raise PostFailed(f"no answer within {self._request_s:g} s", taken=True) from timeout
        finally:
            limit.close()

    def close(self) -> None:
        """Closes kept connections."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()

    def _addresses(self) -> list[str]:
        """Where the host is now, as far as it may be spoken to; raises PostFailed."""
        if self._literal:
            found: tuple[str, ...] = (self._literal,)
        else:
            answer = self._resolver.addresses(self.host)
            if answer.status is not Status.FOUND:
                raise PostFailed(f"{self.host} can't be resolved: {answer.reason or answer.status}")
            found = answer.v4 + answer.v6
        good = [address for address in found if self._allow_private or is_public(address)]
        if not good:
            raise PostFailed(f"{self.host} is at {found[0]}, which is no public address (allow_private)")
        for gone in self._pools.keys() - set(found):
            self._pools.pop(gone).close()
        return good[:MAX_ADDRESSES]

    def _pool(self, address: str) -> Any:
        pool = self._pools.get(address)
        if pool is None:
            options: dict[str, Any] = {"maxsize": KEPT, "timeout": urllib3.Timeout(connect=self._connect_s, read=self._request_s),
                                       "blocksize": BLOCK}
            if self._tls:
                pool = urllib3.HTTPSConnectionPool(address, self._port, ssl_context=self._context, server_hostname=self.host, assert_hostname=self.host, **options)
            else:
                pool = urllib3.HTTPConnectionPool(address, self._port, **options)
            self._pools[address] = pool
        return pool

    def _post(self, address: str, headers: dict[str, str], body: Body, again: Mapping[str, str] | None, limit: gevent.Timeout) -> Answer:
        pool = self._pool(address)
        for fresh in (False, True):
            made = pool.num_connections
            data: Any = body.data if isinstance(body, BytesBody) else body.pieces()
            try:
                response = pool.urlopen("POST", self._target, body=data, headers=headers, retries=False, redirect=False,
                                        assert_same_host=False, preload_content=False, decode_content=False)
                break
            except (NewConnectionError, ConnectTimeoutError, TlsError) as error:
                raise PostFailed(f"{address}: {_words(error)}") from error
            except ProtocolError as error:
                if fresh or pool.num_connections != made or not isinstance(error.args[-1], (ConnectionError, http.client.RemoteDisconnected)):
                    raise PostFailed(f"{address}: {_words(error)}", taken=True) from error
                pool.close()  # a kept connection ended while we spoke; the next one is new
                if self._pools.get(address) is pool:  # another request, whose connection ended too, may have been here
                    del self._pools[address]
                pool = self._pool(address)
                headers = {**headers, **(again or {})}
            except (HTTPError, http.client.HTTPException, ValueError) as error:
                raise PostFailed(f"{address}: {_words(error)}", taken=True) from error
        return Answer(response.status, {name.lower(): value for name, value in response.headers.items()}, _read(response, limit),
                      f"{address}:{self._port}")


def _read(response: Any, limit: gevent.Timeout) -> bytes:
    """The first octets of the answer; the connection is kept where that was all of it. What breaks here, or takes past the limit, is not
    missed: the status is there."""
    data = b""
    done = False
    try:
        while len(data) <= MAX_ANSWER:
            piece = response.read(MAX_ANSWER + 1 - len(data), decode_content=False)
            if not piece:
                done = True
                response.release_conn()
                return data
            data += piece
    except (HTTPError, http.client.HTTPException, OSError, ValueError):
        pass
    except gevent.Timeout as timeout:
        if timeout is not limit:
            raise
    finally:
        if not done:
            response.close()
    return data[:MAX_ANSWER]


def _words(error: BaseException) -> str:
    """An error of urllib3 for people, in short."""
    inner = error.args[-1] if error.args else error
    text = str(inner) or type(inner).__name__
    return re.sub(r"[^ -~]", "?", re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?|HTTPS?Connection(?:Pool)?\([^)]*\):? ?", "", text))[:200]


def split_url(url: str) -> tuple[str, int, str, bool]:
    """(host, port, path with query, whether TLS) of an http or https URL; raises ValueError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[^!-~]", url):
        raise ValueError("url: expected http://… or https://…, ASCII")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("url: expected no user, password or fragment; `authorization` is for credentials")
    tls = parts.scheme == "https"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return parts.hostname, port or (443 if tls else 80), target, tls
