"""Tells domain owners once a day what DMARC found in mail that bears their name, where their record asks for it (`rua`).

Hooks: check_message and on_refused (what `dmarc` has found is counted, whether the message was taken or not), on_worker_started,
on_worker_stopping. Stands behind `dmarc` in `[plugins] enable`, whose note it reads; without `dmarc` it counts nothing. Refuses
nothing itself. Not enabled by default: a report tells others who sends mail to you, and costs mail.

Rows are gathered in the shared state by policy domain and UTC day. Of the day before, one worker makes one XML report a domain, at an hour
that differs from domain to domain, and hands it in like a local program: it is signed, queued and sent as any mail. Only mailto: is
served. A destination outside the policy's organization gets it only where it says in DNS that it wants to (section 4 of the RFC), and
none whose size limit (`!10m`) the report exceeds. What is sent must itself pass DMARC: let `dkim_sign` sign for the sender's domain.

Keys of `[plugin:dmarc_reports]`: `sender` (default: postmaster at the host name), `organization`, `contact`, `exclude` (policy domains that
get none). Replies: none.

Failure: DNS that can't tell, or a message that can't be handed in, is tried again ten minutes later while the day lasts. What a worker has
counted and not yet written down (five seconds) is lost when it is killed. Past 2,000 rows a domain and worker, rows are told apart
by address and disposition alone, past 4,000, or 10,000 domains a day, not counted. RFC 9990; RFC 9989 section 4.7 for rua.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import gevent
from pydantic import Field, field_validator

import gmta
from gmta import PluginConfig, hookimpl
from gmta.config import Domain
from gmta.mail.address import Address, AddressError, parse_mailbox
from gmta.mail.message import Message
from gmta.mail.reply import Reply
from gmta.mail.session import Session, Transaction
from gmta.mail.trace import date
from gmta.services.dns import Status, texts
from gmta.verify import Lookups
from gmta.verify.dmarc import DmarcResult, is_aligned, organization_of, parse

DAY_S = 86400
KEEP_S = 3 * DAY_S
FLUSH_S = 5.0
LOOK_S = 600.0
SPREAD_S = 4 * 3600  # not everybody at midnight
MAX_ROWS = 2000  # of a domain, told apart in full
MAX_MARKS = 100_000  # of all domains, remembered by a worker
MAX_DOMAINS = 10_000  # of a worker and day: whoever has a zone can make any number of them
MAX_RUA = 4096  # octets of a record's destinations
DNS_S, STOP_DNS_S = 20.0, 2.0  # waiting for name servers, in all
MAX_SIGNATURES = 100  # RFC 9990 section 3.1.4
MAX_DESTINATIONS = 5
MAX_TEXT = 255

_NAMESPACE = "urn:ietf:params:xml:ns:dmarc-2.0"
_NO_XML = re.compile(r"[^\t -~\u00a0-\ud7ff\ue000-\ufffd]")
_URI = re.compile(r"mailto:([^!?\s]+)(?:\?[^!\s]*)?(?:!(\d{1,12})([kmgt]?))?\Z", re.I)  # RFC 9989 section 4.7: rua
_WIDE = {"pass": 0, "fail": 1}


class Config(PluginConfig):
    """Keys of [plugin:dmarc_reports]."""

    sender: str = Field("", description="From of the reports; default: postmaster at [gmta] hostname")
    organization: str = Field("", description="who reports; default: [gmta] hostname")
    contact: str = Field("", description="more for the owner's people, such as a URL")
    exclude: frozenset[Domain] = Field(frozenset(), description="policy domains that get no reports")

    @field_validator("sender")
    @classmethod
    def _check_sender(cls, value: str) -> str:
        if value:
            parse_mailbox(value)
        return value


class Plugin:
    """Counts in memory, writes down every few seconds, reports every day."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._hostname: str = services.hostname
        self._sender = Address.parse(config.sender or f"postmaster@{services.hostname}")
        self._waiting: dict[tuple[str, str, str], tuple[int, dict[str, Any]]] = {}  # (day, policy domain, mark of the row)
        self._policies: dict[tuple[str, str], DmarcResult] = {}
        self._marks: dict[tuple[str, str], set[str]] = {}  # rows of each domain's day that were told apart
        self._sleeps = False
        self._worker: Any = None
        self._loop: Any = None

    # --- counting ---------------------------------------------------------------------------------------------------

    @hookimpl
    def check_message(self, session: Session, transaction: Transaction, message: Message) -> None:
        """Counts what has come past dmarc."""
        self._note(session, transaction)

    @hookimpl
    def on_refused(self, session: Session, transaction: Transaction | None, stage: str, reply: Reply) -> None:
        """Counts what was refused before check_message came here."""
        if stage == "message" and transaction is not None and reply.permanent:
            self._note(session, transaction)

    def _note(self, session: Session, transaction: Transaction) -> None:
        found: tuple[DmarcResult, str, str] | None = transaction.notes.get("dmarc")
        if found is None or "dmarc_reports" in transaction.notes:
            return
        transaction.notes["dmarc_reports"] = True
        outcome, action, sealer = found
        if outcome.record is None or not outcome.record.rua or outcome.result not in _WIDE or outcome.policy_domain in self._config.exclude:
            return
        day = _day(self._services.clock())
        key = (day, outcome.policy_domain)
        if key not in self._marks and len(self._marks) >= MAX_DOMAINS:
            return
        self._policies[key] = outcome
        marks = self._marks.setdefault(key, set())
        row = _row(session, transaction, outcome, action, sealer)
        mark = _mark(row)
        if mark not in marks and len(marks) >= MAX_ROWS:
            row = _row(session, None, outcome, action, sealer)
            mark = _mark(row)
            if mark not in marks and len(marks) >= 2 * MAX_ROWS:
                return
        marks.add(mark)
        count, _ = self._waiting.get((*key, mark), (0, row))
        self._waiting[(*key, mark)] = (count + 1, row)
        if not self._sleeps:
            self._sleeps = True
            self._services.spawn(self._flush_soon)

    def _flush_soon(self) -> None:
        gevent.sleep(FLUSH_S)
        self._sleeps = False
        self.flush()

    def flush(self, wait_s: float = DNS_S) -> None:
        """Writes down what was counted; wait_s: for DNS, in all."""
        waiting, self._waiting = self._waiting, {}
        policies, self._policies = self._policies, {}
        state = self._services.state
        asks = Lookups(self._services.resolver, limit=10 * MAX_ROWS, seconds=wait_s)
        today = _day(self._services.clock())
        if sum(map(len, self._marks.values())) > MAX_MARKS:
            self._marks.clear()
        self._marks = {key: marks for key, marks in self._marks.items() if key[0] >= today}
        for (day, domain), outcome in policies.items():
            policy = _policy(outcome)
            if state.get(f"dmarc-policy:{day}:{domain}") != policy:
                state.set(f"dmarc-policy:{day}:{domain}", policy, KEEP_S)
        for (day, domain, mark), (count, row) in waiting.items():
            key = f"dmarc-row:{day}:{domain}:{mark}"
            if state.get(key) is None:
                state.set(key, self._judged(row, policies[day, domain], asks), KEEP_S)
            state.count(f"dmarc-count:{day}:{domain}:{mark}", count, KEEP_S)

    def _judged(self, row: dict[str, Any], outcome: DmarcResult, asks: Lookups) -> dict[str, Any]:
        """The row with which of both methods are aligned: DMARC itself is content with one that is."""
        record = outcome.record
        assert record is not None
        author = row["from"]

        def passes(method: str, strict: bool) -> str:
            results = [row["spf"]] if method == "spf" else row["dkim"]
            good = any(one and one[-1] == "pass" and is_aligned(asks, author, one[0], strict=strict) for one in results)
            return "pass" if good else "fail"

        return row | {"dkim_aligned": passes("dkim", record.strict_dkim), "spf_aligned": passes("spf", record.strict_spf)}

    # --- reporting --------------------------------------------------------------------------------------------------

    @hookimpl
    def on_worker_started(self, worker: Any) -> None:
        """Begins to look for reports that are due."""
        self._worker = worker
        self._loop = self._services.spawn(self._look_on)

    @hookimpl
    def on_worker_stopping(self, worker: Any) -> None:
        """Writes down what is counted."""
        if self._loop is not None:
            self._loop.kill(block=False)
        self.flush(STOP_DNS_S)

    def _look_on(self) -> None:
        while True:
            gevent.sleep(LOOK_S)
            self.send_due()

    def send_due(self) -> None:
        """Sends those reports about the day before that are due and that nobody has sent."""
        state, now = self._services.state, self._services.clock()
        day = _day(now - DAY_S)
        prefix = f"dmarc-policy:{day}:"
        for key, policy in state.scan(prefix):
            domain = key.removeprefix(prefix)
            sent = f"dmarc-sent:{day}:{domain}"
            if now % DAY_S < _spread(self._hostname + domain) or state.get(sent) or state.add(sent, 1, KEEP_S) != 1:
                continue
            done = False
            try:
                done = self._send(day, domain, policy)
            except OSError as error:
                self._services.log.error("dmarc report can't be sent", domain=domain, error=str(error))
            finally:
                if not done:  # a worker that stops meanwhile leaves it to the others
                    state.delete(sent)

    def _send(self, day: str, domain: str, policy: dict[str, str]) -> bool:
        """Sends a report to all who may have it; False where DNS can't tell now who that is. Raises OSError."""
        destinations = self.destinations(domain, policy["rua"])
        if destinations is None:
            return False
        if not destinations:
            return True
        begin = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
        report_id = f"{begin}.{domain}@{self._hostname}"
        xml = self.report(day, domain, policy, begin, report_id)
        if not xml:
            return True
        for address, most in destinations:
            octets = self._message(xml, domain, begin, report_id, address)
            if most is not None and len(octets) > most:  # RFC 9990 section 3.5
                self._services.log.info("dmarc report too big", domain=domain, to=str(address), size=len(octets))
                continue
            self._worker.submit(self._sender, [address], octets)
            self._services.log.info("dmarc report", domain=domain, to=str(address), day=day)
        return True

    def destinations(self, domain: str, rua: str) -> list[tuple[Address, int | None]] | None:
        """(address, octets it takes at most) of those in rua that may have reports about a policy domain; None where DNS can't tell now."""
        found: dict[Address, int | None] = {}
        asks = Lookups(self._services.resolver, limit=100, seconds=DNS_S)  # a slow zone does not hold up the others' reports
        own = organization_of(asks, domain)
        for address, most in _addresses(rua)[:MAX_DESTINATIONS]:
            theirs = organization_of(asks, address.host)
            if own is None or theirs is None:
                return None
            if theirs == own:
                found[address] = most
                continue
            answer = asks.look_up(f"{domain}._report._dmarc.{address.host}", "TXT")  # RFC 9990 section 4
            if answer.status is Status.TEMPORARY:
                return None
            records = [record for text in texts(answer) if (record := parse(text.decode("latin-1"))) is not None]  # section 4 step 6: without p= too
            if not records:
                continue
            instead = [one for record in records for one in _addresses(record.rua)]
            if not instead:
                found[address] = most
            elif all(one.host == address.host for one, _ in instead):  # section 4 step 9: never to a third
                found.update(instead[:MAX_DESTINATIONS])
        return list(found.items())

    def report(self, day: str, domain: str, policy: dict[str, str], begin: int, report_id: str) -> str:
        """The XML about a policy domain's day, or "" where nothing was counted (RFC 9990 section 3.1)."""
        state = self._services.state
        prefix = f"dmarc-count:{day}:{domain}:"
        rows = dict(state.scan(f"dmarc-row:{day}:{domain}:"))
        records = [_record(rows[key.replace("dmarc-count:", "dmarc-row:", 1)], int(count)) for key, count in state.scan(prefix)
                   if key.replace("dmarc-count:", "dmarc-row:", 1) in rows]
        if not records:
            return ""
        published = "".join(_element(name, policy[name]) for name in ("domain", "discovery_method", "p", "sp", "np", "fo", "adkim", "aspf", "testing")
                            if policy.get(name))
        contact = _element("extra_contact_info", self._config.contact) if self._config.contact else ""
        return (f'<?xml version="1.0" encoding="UTF-8"?>\n<feedback xmlns="{_NAMESPACE}">\n<version>1.0</version>\n<report_metadata>'
                + _element("org_name", self._config.organization or self._hostname) + _element("email", str(self._sender)) + contact
                + _element("report_id", report_id) + f"<date_range><begin>{begin}</begin><end>{begin + DAY_S - 1}</end></date_range>"
                + _element("generator", f"gmta {gmta.__version__}") + f"</report_metadata>\n<policy_published>{published}</policy_published>\n"
                + "\n".join(records) + "\n</feedback>\n")

    def _message(self, xml: str, domain: str, begin: int, report_id: str, to: Address) -> bytes:
        """The mail that carries a report (RFC 9990 section 3.5.2)."""
        name = f"{self._hostname}!{domain}!{begin}!{begin + DAY_S - 1}.xml.gz"
        packed = base64.encodebytes(gzip.compress(xml.encode(), mtime=begin)).decode("ascii")
        boundary = f"=_{hashlib.sha256(report_id.encode()).hexdigest()[:24]}"
        day = datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%d")
        text = f"""From: <{self._sender}>
To: <{to}>
Subject: Report Domain: {domain}
 Submitter: {self._hostname}
 Report-ID: <{report_id}>
Date: {date(self._services.clock())}
Message-ID: <{report_id}>
Auto-Submitted: auto-generated
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="{boundary}"

--{boundary}
Content-Type: text/plain; charset=us-ascii

This is a DMARC aggregate report about mail that bore the name of
{domain}
and came to
{self._hostname}
on {day} (UTC).

--{boundary}
Content-Type: application/gzip; name="{name}"
Content-Transfer-Encoding: base64
Content-Disposition: attachment; filename="{name}"

{packed}
--{boundary}--
"""
        return text.replace("\n", "\r\n").encode("utf-8")


# --- rows ---------------------------------------------------------------------------------------------------------


def _row(session: Session, transaction: Transaction | None, outcome: DmarcResult, action: str, sealer: str) -> dict[str, Any]:
    """What makes one row differ from another. transaction: None leaves out what the sender could vary at will."""
    if action == "reject" or action == "quarantine":
        disposition = action
    else:
        disposition = "pass" if outcome.result == "pass" else "none"
    reason = ""
    if outcome.result == "fail" and disposition != outcome.policy:
        testing = outcome.record is not None and outcome.record.testing and disposition == outcome.disposition
        reason = "trusted_forwarder" if sealer else "policy_test_mode" if testing else "local_policy"  # RFC 9990 section 3.1.6
    row: dict[str, Any] = {"ip": session.peer_ip, "disposition": disposition, "reason": reason, "comment": sealer, "from": outcome.domain,
                           "envelope": None, "dkim": [], "spf": None}
    if transaction is None:
        return row
    row["envelope"] = transaction.sender.host[:MAX_TEXT]
    identity = "smtp.mailfrom" if transaction.sender else "smtp.helo"
    for found in transaction.auth_results:
        properties = dict(found.properties)
        if found.method == "dkim" and "header.d" in properties and len(row["dkim"]) < MAX_SIGNATURES:
            row["dkim"].append([properties["header.d"][:MAX_TEXT], properties.get("header.s", "")[:MAX_TEXT], found.result])
        elif found.method == "spf" and identity in properties:
            row["spf"] = [properties[identity].rpartition("@")[2][:MAX_TEXT], found.result]
    row["dkim"].sort(key=lambda one: _WIDE.get(one[2], 2))
    return row


def _mark(row: dict[str, Any]) -> str:
    """What tells a row from others."""
    return hashlib.sha256(json.dumps(row, separators=(",", ":")).encode()).hexdigest()[:24]


def _policy(outcome: DmarcResult) -> dict[str, str]:
    """The published policy, as the report has it."""
    record = outcome.record
    assert record is not None
    return {"domain": outcome.policy_domain, "discovery_method": "treewalk", "p": record.p, "sp": record.sp or record.p,
            "np": record.np or record.sp or record.p, "fo": record.fo, "adkim": "s" if record.strict_dkim else "r",
            "aspf": "s" if record.strict_spf else "r", "testing": "y" if record.testing else "n",
            "rua": record.rua if len(record.rua) <= MAX_RUA else record.rua[:MAX_RUA].rpartition(",")[0]}


def _record(row: dict[str, Any], count: int) -> str:
    """One <record>, elements in the order of the schema."""
    reason = ""
    if row["reason"]:
        comment = _element("comment", row["comment"]) if row["comment"] else ""
        reason = f"<reason>{_element('type', row['reason'])}{comment}</reason>"
    envelope = "" if row["envelope"] is None else _element("envelope_from", row["envelope"])
    dkim = "".join(f"<dkim>{_element('domain', domain)}{_element('selector', selector)}{_element('result', result)}</dkim>"
                   for domain, selector, result in row["dkim"])
    spf = f"<spf>{_element('domain', row['spf'][0])}<scope>mfrom</scope>{_element('result', row['spf'][1])}</spf>" if row["spf"] else ""
    return (f"<record><row>{_element('source_ip', row['ip'])}<count>{count}</count><policy_evaluated>"
            f"{_element('disposition', row['disposition'])}{_element('dkim', row['dkim_aligned'])}{_element('spf', row['spf_aligned'])}{reason}"
            f"</policy_evaluated></row><identifiers>{_element('header_from', row['from'])}{envelope}</identifiers>"
            f"<auth_results>{dkim}{spf}</auth_results></record>")


def _element(name: str, text: str) -> str:
    """An element with text; what XML can't hold is a question mark."""
    text = _NO_XML.sub("?", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"<{name}>{text}</{name}>"


def _addresses(rua: str) -> list[tuple[Address, int | None]]:
    """(address, octets it takes at most) of the mailto: URIs of a record."""
    found: list[tuple[Address, int | None]] = []
    for uri in rua.split(","):
        match = _URI.match(uri.strip())
        if match is None:
            continue
        try:
            address = parse_mailbox(unquote(match[1]))
        except AddressError:
            continue
        if not address.is_literal and address.is_ascii:
            found.append((address, int(match[2]) * 1024 ** " kmgt".index((match[3] or " ").lower()) if match[2] else None))
    return found


def _day(at: float) -> str:
    """The UTC day of a time, as 2026-01-31."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _spread(name: str) -> float:
    """Seconds after midnight at which a domain's report goes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 * SPREAD_S
