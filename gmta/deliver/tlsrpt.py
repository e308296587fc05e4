"""TLS reports: sessions with other domains' mail hosts are counted, and once a day their owners are told, where they ask for it.

`note` counts one session, good or bad, for a domain that publishes where reports go; the counters are in services.state, so all
workers count together. `send_due` makes yesterday's reports and leaves them in the maildrop, as a local program would: they are
received, signed and sent like any mail. One worker of all sends each. Only reports by mail are sent; HTTPS addresses are passed over.

Failure: nothing raises. A report that can't be written is tried again with the next look; one that is past two days is forgotten.
RFC 8460.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

import gevent

from gmta.deliver.mtasts import Policy
from gmta.deliver.nexthop import Target
from gmta.deliver.tlspolicy import DomainPolicy, TlsRule
from gmta.mail.address import Address, AddressError, parse_mailbox
from gmta.mail.trace import date
from gmta.queue import maildrop
from gmta.queue.ids import IdSource
from gmta.services.dns import Status, texts

DAY_S = 86400
KEEP_S = 3 * DAY_S
LOOK_S = 600.0
SPREAD_S = 4 * 3600  # RFC 8460 section 4.1: some time after midnight, not everybody at once
MAX_DETAILS = 1000  # failures told apart in a report
MAX_ADDRESSES = 10
MAX_DOMAINS = 100_000  # of a day
MAX_KNOWN = 10_000

_RECORD = re.compile(rb"v=TLSRPTv1[ \t]*;[ \t]*rua=([^;]+)(?:;.*)?\Z", re.S)

Submit = Callable[[Address, list[Address], bytes], None]


class TlsReports:
    """Counts and reports. keys: [tlsrpt].  submit(sender, recipients, octets): leaves a message to be sent; raises OSError."""

    def __init__(self, keys: Any, hostname: str, resolver: Any, state: Any, log: Any, clock: Callable[[], float], submit: Submit,
                 spawn: Callable[..., Any]) -> None:
        self._organization = keys.organization or hostname
        self._sender = Address.parse(keys.sender or f"postmaster@{hostname}")
        self._hostname = hostname
        self._resolver = resolver
        self._state = state
        self._log = log
        self._clock = clock
        self._submit = submit
        self._spawn = spawn
        self._known: set[str] = set()  # what of the day is written down
        self._day = ""
        self._loop: Any = None

    def note(self, policy: DomainPolicy, rule: TlsRule, target: Target, result: str = "", reason: str = "", source: str = "") -> None:
        """Counts a session. result: "" for a good one, else its type (RFC 8460 section 4.3).  source: our address."""
        domain = policy.domain
        if not self._addresses(domain):
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
        if self._loop is None:
            self._loop = self._spawn(self._look_on)

    def fetch_failed(self, domain: str, result: str, reason: str) -> None:
        """An MTA-STS policy could not be had (RFC 8460 section 4.3.2.2)."""
        self.note(DomainPolicy(domain, sts=Policy("none", (), 0)), TlsRule(source="mta-sts"), Target("", "", 0), result, reason)

    def close(self) -> None:
        """Looks no more."""
        if self._loop is not None:
            self._loop.kill(block=False)

    # --- counting ---------------------------------------------------------------------------------------------------

    def _addresses(self, domain: str) -> list[Address]:
        """Where a domain wants its reports (RFC 8460 section 3)."""
        answer = self._resolver.txt(f"_smtp._tls.{domain}")
        if answer.status is not Status.FOUND:
            return []
        records = [text for text in texts(answer) if text.startswith(b"v=TLSRPTv1")]
        found = _RECORD.match(records[0]) if len(records) == 1 else None
        if found is None:
            return []
        addresses = []
        for uri in found[1].decode("utf-8", "replace").split(","):
            scheme, _, rest = uri.strip().partition(":")
            if scheme.lower() == "mailto":
                try:
                    addresses.append(parse_mailbox(unquote(rest.partition("?")[0])))
                except AddressError:
                    continue
        return addresses[:MAX_ADDRESSES]

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
        since_midnight = now % DAY_S
        prefix, sent_prefix = f"tlsrpt-domain:{day}:", f"tlsrpt-sent:{day}:"
        sent = {key for key, _ in self._state.scan(sent_prefix, MAX_DOMAINS)}
        for key, _ in self._state.scan(prefix, MAX_DOMAINS):
            domain = key.removeprefix(prefix)
            sent_key = sent_prefix + domain
            if since_midnight < _spread(self._hostname + domain) or sent_key in sent or self._state.add(sent_key, 1, KEEP_S) != 1:
                continue
            addresses = self._addresses(domain)
            if not addresses:  # perhaps DNS can't tell now: the next look asks again
                self._state.delete(sent_key)
                continue
            report_id = f"{day}.{domain}@{self._hostname}"
            report = self.report(day, domain, report_id)
            try:
                self._submit(self._sender, addresses, self._message(report, domain, report_id, addresses, now))
            except OSError as error:
                self._log.error("tls report can't be sent", domain=domain, error=str(error))
                self._state.delete(sent_key)
                continue
            self._log.info("tls report", domain=domain, to=[str(address) for address in addresses], day=day)

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

    def _message(self, report: dict[str, Any], domain: str, report_id: str, to: list[Address], now: float) -> bytes:
        """The mail that carries a report (RFC 8460 section 5.3)."""
        submitter = self._hostname
        begin = int(datetime.fromisoformat(report["date-range"]["start-datetime"]).timestamp())
        name = f"{submitter}!{domain}!{begin}!{begin + DAY_S - 1}.json.gz"
        packed = base64.encodebytes(gzip.compress(json.dumps(report, indent=1).encode(), mtime=begin)).decode("ascii")
        boundary = f"=_{hashlib.sha256(report_id.encode()).hexdigest()[:24]}"
        text = f"""From: {self._organization_phrase()}<{self._sender}>
To: {", ".join(str(address) for address in to)}
Subject: Report Domain: {domain} Submitter: {submitter} Report-ID: <{report_id}>
Date: {date(now)}
Message-ID: <tlsrpt.{report_id}>
Auto-Submitted: auto-generated
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

{packed}
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
