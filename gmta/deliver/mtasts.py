"""MTA-STS: the policy that a domain publishes about TLS with its mail hosts, fetched over HTTPS and kept as long as it says.

`MtaSts.policy` gives what holds for a domain now. A policy is fetched anew when its DNS record shows another id, and now and then
before it ends; where that fails the old one goes on to hold, so that who can disturb DNS or HTTPS can't get rid of it. What a policy
means for a host is tlspolicy's. Policies are in services.state: all workers know them, and they outlive a restart.

Failure: nothing raises. A domain that has no policy, or one that could not be fetched when nothing was known, has None; what went
wrong is told to `report` (RFC 8460). RFC 8461.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import gevent
import urllib3
from gevent.event import AsyncResult
from urllib3.util import Timeout

from gmta.services.dns import Status, texts

MAX_BODY = 64 * 1024  # RFC 8461 section 3.3
FETCH_S = 30.0  # RFC 8461 section 3.3 says a minute; the mail is waiting
MAX_AGE_S = 31557600  # RFC 8461 section 3.2
REFRESH_S = 86400.0  # a policy older than that, or than half its life, is fetched anew
FAILED_S = 300.0  # RFC 8461 section 3.3: at most one fetch in five minutes where they fail
MAX_PATTERNS = 100

_RECORD = re.compile(rb"v=STSv1[ \t]*(?:;|\Z)")
_ID = re.compile(rb"[A-Za-z0-9]{1,32}\Z")
_PATTERN = re.compile(r"(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?\Z")


class Policy(NamedTuple):
    """A policy. mode: enforce, testing or none.  mx: host names, `*.` for one label.  lines: as it was served, for reports."""

    mode: str
    mx: tuple[str, ...]
    max_age_s: int
    id: str = ""
    fetched_at: float = 0.0
    lines: tuple[str, ...] = ()

    def allows(self, host: str) -> bool:
        """Whether a mail host is one of the policy's (RFC 8461 section 4.1)."""
        host = host.lower()
        return any(host == pattern or (pattern.startswith("*.") and host.partition(".")[2] == pattern[2:]) for pattern in self.mx)


class FetchFailed(Exception):
    """There is no policy to be had. result: as in a TLS report (RFC 8460 section 4.3)."""

    def __init__(self, text: str, result: str = "sts-policy-fetch-error") -> None:
        super().__init__(text)
        self.result = result


class Fetch(Protocol):
    """Gets the policy file of a domain."""

    def __call__(self, domain: str) -> bytes:
        """The body of https://mta-sts.DOMAIN/.well-known/mta-sts.txt; raises FetchFailed."""


def parse(body: bytes) -> Policy:
    """A policy from its file (RFC 8461 section 3.2); raises ValueError."""
    fields: dict[str, str] = {}
    mx: list[str] = []
    lines = [line.strip() for line in body.decode("utf-8").replace("\r\n", "\n").split("\n")]
    for line in lines:
        if not line:
            continue
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            raise ValueError(f"line {line[:60]!r}")
        if key == "mx":
            mx.append(value.lower())
        else:
            fields.setdefault(key, value)  # RFC 8461 section 3.2: the first counts, unknown ones are passed over
    mode, age = fields.get("mode", ""), fields.get("max_age", "")
    if fields.get("version") != "STSv1":
        raise ValueError("no version STSv1")
    if mode not in ("enforce", "testing", "none"):
        raise ValueError(f"mode {mode[:60]!r}")
    if not age.isascii() or not age.isdigit() or len(age) > 10:
        raise ValueError(f"max_age {age[:60]!r}")
    if mode != "none" and not mx:
        raise ValueError("no mx")
    if len(mx) > MAX_PATTERNS or not all(_PATTERN.match(pattern) for pattern in mx):
        raise ValueError("a bad mx")
    return Policy(mode, tuple(mx), min(int(age), MAX_AGE_S), lines=tuple(line[:200] for line in lines if line)[:200])


class MtaSts:
    """Policies of domains. resolver, state, log, clock: as in services.  report(domain, result, reason): a fetch has failed."""

    def __init__(self, resolver: Any, state: Any, log: Any, clock: Callable[[], float], fetch: Fetch,
                 report: Callable[[str, str, str], None] | None = None) -> None:
        self._resolver = resolver
        self._state = state
        self._log = log
        self._clock = clock
        self._fetch = fetch
        self._report = report
        self._flights: dict[str, AsyncResult] = {}

    def policy(self, domain: str) -> Policy | None:
        """The policy that holds for a domain now; callers at one moment share one fetch."""
        while (flight := self._flights.get(domain)) is not None:
            found: tuple[Policy | None] | None = flight.get()
            if found is not None:
                return found[0]
        flight = self._flights[domain] = AsyncResult()
        done: tuple[Policy | None] | None = None  # whoever is killed on the way leaves it to the next
        try:
            done = (self._find(domain),)
            return done[0]
        finally:
            del self._flights[domain]
            flight.set(done)

    def _find(self, domain: str) -> Policy | None:
        now = self._clock()
        known = self._known(domain, now)
        policy_id = self._published(domain)
        if policy_id is None:
            return known  # RFC 8461 section 3.1: without a record a policy that is known still holds
        if known is not None and known.id == policy_id and now < known.fetched_at + min(REFRESH_S, known.max_age_s / 2):
            return known
        failed_key = f"mta-sts-failed:{domain}"
        if self._state.get(failed_key) == policy_id:
            return known
        try:
            policy = self._fetched(domain)._replace(id=policy_id, fetched_at=now)
        except FetchFailed as failure:
            self._state.set(failed_key, policy_id, FAILED_S)
            self._log.warning("mta-sts policy can't be fetched", domain=domain, reason=str(failure), kept=known is not None)
            if self._report is not None:
                self._report(domain, failure.result, str(failure))
            return known
        self._state.set(f"mta-sts:{domain}", list(policy), policy.max_age_s)
        self._log.info("mta-sts policy", domain=domain, mode=policy.mode, mx=policy.mx, max_age_s=policy.max_age_s, policy=policy_id)
        return policy

    def _known(self, domain: str, now: float) -> Policy | None:
        """The policy that was fetched before and has not ended."""
        kept = self._state.get(f"mta-sts:{domain}")
        if kept is None:
            return None
        mode, mx, max_age_s, policy_id, fetched_at, lines = kept
        return Policy(mode, tuple(mx), max_age_s, policy_id, fetched_at, tuple(lines)) if now < fetched_at + max_age_s else None

    def _published(self, domain: str) -> str | None:
        """The id of the domain's record; None where there is not exactly one (RFC 8461 section 3.1)."""
        answer = self._resolver.txt(f"_mta-sts.{domain}")
        if answer.status is not Status.FOUND:
            return None
        records = [text for text in texts(answer) if _RECORD.match(text)]
        if len(records) != 1:
            return None
        fields = [(name.strip(), value.strip()) for name, _, value in (field.partition(b"=") for field in records[0].split(b";"))]
        found = next((value for name, value in fields if name == b"id"), b"")
        return found.decode("ascii") if _ID.match(found) else None

    def _fetched(self, domain: str) -> Policy:
        """The policy as the domain serves it now; raises FetchFailed."""
        body = self._fetch(domain)
        try:
            return parse(body)
        except ValueError as error:
            raise FetchFailed(f"not a policy: {error}"[:200], "sts-policy-invalid") from error


class HttpsFetch:
    """Fetches policy files: no redirect, a certificate of an authority for mta-sts.DOMAIN, text/plain, bounded in size and time.

    addresses(host): where it is, [] where that can't be said.  context: verifies against authorities.
    """

    def __init__(self, addresses: Callable[[str], list[str]], context: Callable[[], ssl.SSLContext], *, port: int = 443) -> None:
        self._addresses = addresses
        self._context = context
        self._port = port

    def __call__(self, domain: str) -> bytes:
        """The body of the policy file; raises FetchFailed."""
        host = f"mta-sts.{domain}"
        addresses = self._addresses(host)
        if not addresses:
            raise FetchFailed(f"{host} has no address to ask")
        reason = ""
        with gevent.Timeout(FETCH_S, FetchFailed(f"{host} does not answer in time")):
            for address in addresses[:3]:
                try:
                    return self._get(host, address)
                except ssl.SSLError as error:
                    raise FetchFailed(f"TLS with {host}: {error}"[:200], "sts-webpki-invalid") from error
                except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                    cause = error.__cause__ or error.__context__
                    if isinstance(error, urllib3.exceptions.SSLError) or isinstance(cause, ssl.SSLError):
                        raise FetchFailed(f"TLS with {host}: {error}"[:200], "sts-webpki-invalid") from error
                    reason = f"{host}[{address}]: {error}"
        raise FetchFailed(reason[:200])

    def _get(self, host: str, address: str) -> bytes:
        pool = urllib3.HTTPSConnectionPool(
            address, self._port, ssl_context=self._context(), server_hostname=host, assert_hostname=host, retries=False,
            timeout=Timeout(connect=10.0, read=10.0), maxsize=1)
        try:
            response = pool.request("GET", "/.well-known/mta-sts.txt", headers={"Host": host}, redirect=False, preload_content=False,
                                    decode_content=False)
            try:
                if response.status != 200:  # RFC 8461 section 3.3: redirects are not followed either
                    raise FetchFailed(f"{host} answers {response.status}")
                kind = response.headers.get("Content-Type", "text/plain").partition(";")[0].strip().lower()
                if kind != "text/plain":
                    raise FetchFailed(f"{host} serves {kind[:60]}, not text/plain")
                body = b""
                while len(body) <= MAX_BODY and (piece := response.read(MAX_BODY + 1 - len(body))):
                    body += piece
            finally:
                response.close()
        finally:
            pool.close()
        if len(body) > MAX_BODY:
            raise FetchFailed(f"{host} serves more than {MAX_BODY} octets")
        return body
