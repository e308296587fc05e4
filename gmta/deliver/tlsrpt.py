"""TLS reports: sessions with other domains' mail hosts are counted, and once a day their owners are told, where they ask for it.

`note` counts one session, good or bad, for a domain that publishes where reports go; the counters are in services.state, so all
workers count together. `send_due` makes yesterday's reports, one worker of all each. Those by mail are left in the maildrop, as a local
program would: they are received, signed and sent like any mail, whatever TLS with their domain comes to. Those by HTTPS are posted.

Failure: nothing raises. A report that can't be left or posted is tried again with the next look, until the day is over; what an HTTPS
host refuses for good is in the log. RFC 8460.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import unquote

import gevent
from gevent.pool import Pool

from gmta.deliver.mtasts import Policy
from gmta.deliver.nexthop import Target
from gmta.deliver.tlspolicy import DomainPolicy, TlsRule
from gmta.mail.address import Address, AddressError, parse_mailbox
from gmta.mail.trace import date
from gmta.queue import maildrop
from gmta.queue.ids import IdSource
from gmta.services.dns import Resolver, Status, texts
from gmta.services.webhooks import BytesBody, Endpoint, PostFailed, Secrets, split_url

DAY_S = 86400
KEEP_S = 3 * DAY_S
LOOK_S = 600.0
SPREAD_S = 4 * 3600  # RFC 8460 section 4.1: some time after midnight, not everybody at once
MAX_DETAILS = 1000  # failures told apart in a report
MAX_ADDRESSES = 10
MAX_URLS = 3
REPORTERS = 8  # domains reported to at a time
MAX_DOMAINS = 100_000  # of a day
MAX_KNOWN = 10_000

_RECORD = re.compile(rb"v=TLSRPTv1[ \t]*;")
_LATER = frozenset({408, 425, 429})

Submit = Callable[[Address, list[Address], bytes], None]
Post = Callable[[str, str, bytes], int]


class Recipients(NamedTuple):
    """Where a domain wants its reports."""

    addresses: list[Address]
    urls: list[str]


class TlsReports:
    """Counts and reports. keys: [tlsrpt].

    submit(sender, recipients, octets): leaves a message to be sent; raises OSError.  post(url, content type, octets): its HTTP status;
    raises PostFailed.
    """

    def __init__(self, keys: Any, hostname: str, resolver: Any, state: Any, log: Any, clock: Callable[[], float], submit: Submit, post: Post,
                 spawn: Callable[..., Any]) -> None:
        self._organization = keys.organization or hostname
        self._sender = Address.parse(keys.sender or f"postmaster@{hostname}")
        self._hostname = hostname
        self._resolver = resolver
        self._state = state
        self._log = log
        self._clock = clock
        self._submit = submit
        self._post = post
        self._spawn = spawn
        self._known: set[str] = set()  # what of the day is written down
        self._day = ""
        self._loop: Any = None

    def note(self, policy: DomainPolicy, rule: TlsRule, target: Target, result: str = "", reason: str = "", source: str = "") -> None:
        """Counts a session. result: "" for a good one, else its type (RFC 8460 section 4.3).  source: our address."""
        if self._loop is None:
            self._loop = self._spawn(self._look_on)
        domain = policy.domain
        if not any(self._recipients(domain)):
            return
        day = _day(self._clock())
        if day != self._day or len(self._known) > MAX_KNOWN:
            self._day = day
            self._known.clear()
        self._write_down(f"tlsrpt-domain:{day}:{domain}", 1)
        facts: dict[str, Any] = {"policy": _describe(policy, rule), "result": result}
        if result:
            facts |= {"host": target.name, "address": target.address, "source": source, "reason": reason[:200]}
        facts_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        self._write_down(f"tlsrpt-facts:{day}:{facts_id}", facts)
        self._state.count(f"tlsrpt:{day}:{domain}:{facts_id}", 1, KEEP_S)

    def fetch_failed(self, domain: str, result: str, reason: str) -> None:
        """An MTA-STS policy could not be had (RFC 8460 section 4.3.2.2)."""
        self.note(DomainPolicy(domain, sts=Policy("none", (), 0)), TlsRule(source="mta-sts"), Target("", "", 0), result, reason)

    def close(self) -> None:
        """Looks no more."""
        if self._loop is not None:
            self._loop.kill(block=False)

    # --- counting ---------------------------------------------------------------------------------------------------

    def _recipients(self, domain: str) -> Recipients:
        """Who wants reports about a domain (RFC 8460 section 3)."""
        found = Recipients([], [])
        answer = self._resolver.txt(f"_smtp._tls.{domain}")
        records = [text for text in texts(answer) if _RECORD.match(text)] if answer.status is Status.FOUND else []
        if len(records) != 1:
            return found
        for uri in _uris(records[0]):
            scheme, _, rest = uri.partition(":")
            try:
                if scheme.lower() == "mailto":
                    found.addresses.append(parse_mailbox(unquote(rest.partition("?")[0])))
                elif scheme.lower() == "https":
                    split_url(uri)
                    found.urls.append(uri)
            except (AddressError, ValueError):
                continue
        return Recipients(found.addresses[:MAX_ADDRESSES], found.urls[:MAX_URLS])

    def _write_down(self, key: str, value: Any) -> None:
        """Keeps a value for the report, once a day."""
        if key not in self._known:
            self._known.add(key)
            self._state.set(key, value, KEEP_S)

    # --- reporting --------------------------------------------------------------------------------------------------

    def _look_on(self) -> None:
        while True:
            self.send_due()
            gevent.sleep(LOOK_S)

    def send_due(self) -> None:
        """Sends yesterday's reports that nobody has sent, each at its own time of the day."""
        now = self._clock()
        day = _day(now - DAY_S)
        prefix, sent_prefix = f"tlsrpt-domain:{day}:", f"tlsrpt-sent:{day}:"
        sent = {key.removeprefix(sent_prefix) for key, _ in self._state.scan(sent_prefix, MAX_DOMAINS)}
        domains = [key.removeprefix(prefix) for key, _ in self._state.scan(prefix, MAX_DOMAINS)]
        due = [domain for domain in domains if domain not in sent and now % DAY_S >= _spread(self._hostname + domain)]
        Pool(REPORTERS).map(lambda domain: self._send(day, domain, now), due)

    def _send(self, day: str, domain: str, now: float) -> None:
        """Reports about a domain, where no other worker does."""
        sent_key = f"tlsrpt-sent:{day}:{domain}"
        if self._state.add(sent_key, 1, KEEP_S) != 1:
            return
        recipients = self._recipients(domain)
        done = any(recipients)  # else DNS perhaps can't tell now
        if done:
            report = self.report(day, domain, f"{day}.{domain}@{self._hostname}")
            packed = gzip.compress(json.dumps(report, indent=1).encode(), mtime=0)
            for way in ([""] if recipients.addresses else []) + recipients.urls:
                way_key = f"tlsrpt-done:{day}:{domain}:{hashlib.sha256(way.encode()).hexdigest()[:24]}"
                if self._state.get(way_key) is not None:
                    continue
                if self._posted(way, domain, packed) if way else self._mailed(recipients.addresses, domain, report, packed, now):
                    self._state.set(way_key, 1, KEEP_S)
                else:
                    done = False
        if not done:  # RFC 8460 section 5.4: tried again for up to a day
            self._state.set(sent_key, 1, LOOK_S)

    def _mailed(self, to: list[Address], domain: str, report: dict[str, Any], packed: bytes, now: float) -> bool:
        """Whether a report is on its way by mail."""
        try:
            self._submit(self._sender, to, self._message(report, packed, domain, to, now))
        except OSError as error:
            self._log.error("tls report can't be sent", domain=domain, error=str(error))
            return False
        self._log.info("tls report", domain=domain, to=[str(address) for address in to])
        return True

    def _posted(self, url: str, domain: str, packed: bytes) -> bool:
        """Whether nothing more is to be done about a report by HTTPS (RFC 8460 section 5.3)."""
        try:
            status = self._post(url, "application/tlsrpt+gzip", packed)
        except PostFailed as error:
            self._log.warning("tls report can't be posted", domain=domain, url=url, error=str(error))
            return False
        if 200 <= status < 300:
            self._log.info("tls report", domain=domain, url=url, status=status)
            return True
        self._log.warning("tls report refused", domain=domain, url=url, status=status)
        return status < 500 and status not in _LATER

    def report(self, day: str, domain: str, report_id: str) -> dict[str, Any]:
        """The report about a domain for a day (RFC 8460 section 4.4)."""
        policies: dict[str, dict[str, Any]] = {}
        prefix = f"tlsrpt:{day}:{domain}:"
        for key, count in self._state.scan(prefix):
            facts = self._state.get(f"tlsrpt-facts:{day}:{key.removeprefix(prefix)}")
            if facts is None:
                continue
            told = policies.setdefault(json.dumps(facts["policy"]), {
                "policy": facts["policy"] | {"policy-domain": domain},
                "summary": {"total-successful-session-count": 0, "total-failure-session-count": 0}})
            result = facts["result"]
            told["summary"][f"total-{'failure' if result else 'successful'}-session-count"] += int(count)
            details = told.setdefault("failure-details", []) if result else []
            if result and len(details) < MAX_DETAILS:
                detail = {"result-type": result, "sending-mta-ip": facts["source"], "receiving-mx-hostname": facts["host"],
                          "receiving-ip": facts["address"], "failed-session-count": int(count), "failure-reason-code": facts["reason"]}
                details.append({name: value for name, value in detail.items() if value != ""})
        begin = datetime.fromisoformat(day).replace(tzinfo=UTC)
        return {"organization-name": self._organization,
                "date-range": {"start-datetime": begin.strftime("%Y-%m-%dT%H:%M:%SZ"),
                               "end-datetime": (begin + timedelta(days=1, seconds=-1)).strftime("%Y-%m-%dT%H:%M:%SZ")},
                "contact-info": str(self._sender), "report-id": report_id, "policies": list(policies.values())}

    def _message(self, report: dict[str, Any], packed: bytes, domain: str, to: list[Address], now: float) -> bytes:
        """The mail that carries a report (RFC 8460 section 5.3).

        It is to arrive whatever is wrong with TLS there (RFC 8460 section 3); RFC 8689 section 3 has the field that says so.
        """
        submitter, report_id = self._hostname, report["report-id"]
        begin = int(datetime.fromisoformat(report["date-range"]["start-datetime"]).timestamp())
        name = f"{submitter}!{domain}!{begin}!{begin + DAY_S - 1}.json.gz"
        attached = base64.encodebytes(packed).decode("ascii")
        boundary = f"=_{hashlib.sha256(report_id.encode()).hexdigest()[:24]}"
        text = f"""From: {self._organization_phrase()}<{self._sender}>
To: {", ".join(str(address) for address in to)}
Subject: Report Domain: {domain} Submitter: {submitter} Report-ID: <{report_id}>
Date: {date(now)}
Message-ID: <tlsrpt.{report_id}>
Auto-Submitted: auto-generated
TLS-Required: No
TLS-Report-Domain: {domain}
TLS-Report-Submitter: {submitter}
MIME-Version: 1.0
Content-Type: multipart/report; report-type="tlsrpt"; boundary="{boundary}"

--{boundary}
Content-Type: text/plain; charset=us-ascii

This is an aggregate report about TLS with the mail hosts of {domain},
as {submitter} saw it from {report["date-range"]["start-datetime"]} to {report["date-range"]["end-datetime"]}.

--{boundary}
Content-Type: application/tlsrpt+gzip
Content-Transfer-Encoding: base64
Content-Disposition: attachment; filename="{name}"

{attached}
--{boundary}--
"""
        return text.replace("\n", "\r\n").encode("utf-8")

    def _organization_phrase(self) -> str:
        """The organization as the display name of From, where it can be one."""
        plain = re.sub(r"[^A-Za-z0-9 .,'&()-]", "", self._organization)
        return f'"{plain}" ' if plain else ""


def leave_in_maildrop(data_dir: str, clock: Callable[[], float]) -> Submit:
    """A `submit` that writes into the maildrop (gmta/queue/maildrop.py)."""
    ids = IdSource(clock)

    def submit(sender: Address, recipients: list[Address], octets: bytes) -> None:
        drop = maildrop.Drop(sender, recipients, frozenset({"NEVER"}))
        writer = maildrop.Sender(os.path.join(data_dir, maildrop.DIRECTORY), ids.new(), drop)
        try:
            writer.write(octets)
            writer.commit()
        finally:
            writer.abandon()

    return submit


def over_https(resolver: Resolver, clock: Callable[[], float], *, allow_private: bool, ca_file: str = "") -> Post:
    """A `post` to whoever the owner of a domain names: no redirects, and no addresses but the internet's."""

    def post(url: str, content_type: str, octets: bytes) -> int:
        try:
            endpoint = Endpoint(url, resolver, clock, secrets=Secrets(()), allow_private=allow_private, ca_file=ca_file)
        except ValueError as error:
            raise PostFailed(str(error)) from error
        try:
            return endpoint.post("", content_type, BytesBody(octets)).status
        finally:
            endpoint.close()

    return post


def _uris(record: bytes) -> Iterator[str]:
    """The URIs of a record's rua, in any place among its fields (RFC 8460 section 3)."""
    for field in record.decode("utf-8", "replace").split(";")[1:]:
        name, _, value = field.partition("=")
        if name.strip() == "rua":
            yield from [uri.strip() for uri in value.split(",")]
            return


def _describe(policy: DomainPolicy, rule: TlsRule) -> dict[str, Any]:
    """The policy that was applied, as in a report (RFC 8460 section 4.4)."""
    if rule.source == "dane":
        records = [f"{one.usage} {one.selector} {one.matching} {one.data.hex()}" for one in rule.tlsa]
        return {"policy-type": "tlsa", "policy-string": records, "mx-host": [rule.server_name]}
    if policy.sts is not None and (rule.source == "mta-sts" or rule.noted):
        return {"policy-type": "sts", "policy-string": list(policy.sts.lines), "mx-host": list(policy.sts.mx)}
    return {"policy-type": "no-policy-found"}


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _spread(text: str) -> float:
    """Seconds after midnight, always the same ones for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % SPREAD_S
