"""gmta sends to Postfix and Exim, found through MX records in unbound: STARTTLS, DANE in a signed zone, MTA-STS over HTTPS.

Names stand at addresses of loopback; all hosts listen on one port. The zones are signed here and served by unbound itself, which
validates them by their trust anchors.
"""

from __future__ import annotations

import datetime
import email
import email.policy
import json
import os
import pwd
import re
import shutil
import smtplib
import socket
import sqlite3
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.dnssec
import dns.dnssectypes
import dns.name
import dns.rdatatype
import dns.zone
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gmta.services.dns import Resolver, Status
from gmta.testing.authority import Authority, Issued
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, program, until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.getuid() != 0, reason="Postfix's master process needs root")]

RIGHT, WRONG, CLEAR, WEB, EXIM = "127.0.0.31", "127.0.0.32", "127.0.0.33", "127.0.0.34", "127.0.0.35"
FILE = "version: STSv1\r\nmode: {}\r\nmx: *.sts.example\r\nmax_age: 86400\r\n"
STS = {"enforced": "enforce", "broken": "enforce", "trial": "testing", "unserved": None}
SECURE = ("right", "wrong", "dark", "cleartext", "none")
EIGHT_BITS = "MIME-Version: 1.0\r\nContent-Type: text/html; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n"
HEADERS = "/^(Content-Type|Subject):/ INFO\n"


def answers(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


# --- DNS --------------------------------------------------------------------------------------------------------------


@dataclass
class Signed:
    """A signed zone. text: as a zone file; anchor: the DS record that vouches for it."""

    text: str
    anchor: str


def sign(origin: str, records: str, *, spoil: str = "", honest: bool = True) -> Signed:
    """Signs a zone. spoil: a name whose TLSA records are changed afterwards; honest=False: the anchor is of another key."""
    zone = dns.zone.from_text(f"$TTL 60\n@ SOA ns.{origin}. x.{origin}. 1 3600 600 86400 60\n@ NS ns\nns A 127.0.0.1\n{records}", origin,
                              relativize=False)
    private = ec.generate_private_key(ec.SECP256R1())
    key = dns.dnssec.make_dnskey(private.public_key(), dns.dnssec.Algorithm.ECDSAP256SHA256, flags=257)
    now = datetime.datetime.now(datetime.UTC)
    dns.dnssec.sign_zone(zone, keys=[(private, key)], add_dnskey=True, dnskey_ttl=60, inception=now - datetime.timedelta(days=1),
                         expiration=now + datetime.timedelta(days=7))
    text = zone.to_text(relativize=False)
    if spoil:
        lines = [f"{line[:-4]}beef" if line.startswith(f"{spoil}.") and " TLSA " in line and " RRSIG " not in line else line
                 for line in text.splitlines()]
        assert lines != text.splitlines()
        text = "\n".join(lines)
    if not honest:
        key = dns.dnssec.make_dnskey(ec.generate_private_key(ec.SECP256R1()).public_key(), dns.dnssec.Algorithm.ECDSAP256SHA256, flags=257)
    anchor = dns.dnssec.make_ds(dns.name.from_text(origin), key, dns.dnssectypes.DSDigest.SHA256)
    return Signed(text + "\n", f"{origin}. DS {anchor.to_text()}")


class Unbound:
    """unbound with the given zones on a port of loopback."""

    def __init__(self, directory: Path, zones: dict[str, Signed | str]) -> None:
        self.port = free_port()
        config = [f"""
server:
  directory: "{directory}"
  chroot: ""
  username: ""
  pidfile: ""
  interface: 127.0.0.1@{self.port}
  do-daemonize: no
  use-syslog: no
  logfile: "unbound.log"
  do-not-query-localhost: no
  module-config: "validator iterator"
  trust-anchor-signaling: no
  root-key-sentinel: no
"""]
        for origin, zone in zones.items():
            text = zone if isinstance(zone, str) else zone.text
            (directory / f"{origin}.zone").write_text(text)
            if isinstance(zone, Signed):
                config[0] += f'  trust-anchor: "{zone.anchor}"\n'
            config.append(f'auth-zone:\n  name: "{origin}."\n  zonefile: "{directory}/{origin}.zone"\n  for-downstream: no\n  for-upstream: yes\n')
        (directory / "unbound.conf").write_text("".join(config) + "remote-control:\n  control-enable: no\n")
        self.process = subprocess.Popen([program("unbound"), "-d", "-c", str(directory / "unbound.conf")])
        self.resolver = Resolver([self.address], timeout_s=3.0, cache_size=0)
        until(lambda: self.resolver.look_up("secure.example", "SOA").status is Status.FOUND, "answer of unbound")

    @property
    def address(self) -> str:
        """As [dns] servers takes it."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait(DEADLINE_S)


# --- Postfix ----------------------------------------------------------------------------------------------------------


class Postfix:
    """Postfix at three addresses: a right certificate, one for another name, none. It takes mail for every domain given."""

    def __init__(self, directory: Path, port: int, right: Issued, wrong: Issued, domains: list[str]) -> None:
        self.directory = directory
        self.mail = directory / "mail"
        nobody, owner = pwd.getpwnam("nobody"), pwd.getpwnam("postfix")
        config = directory / "conf"
        for path, uid in ((config, 0), (directory / "queue", 0), (directory / "data", owner.pw_uid), (self.mail, nobody.pw_uid)):
            path.mkdir(parents=True)
            os.chown(path, uid, -1)
        daemons = subprocess.run([program("postconf"), "-h", "daemon_directory"], capture_output=True, text=True, check=True).stdout.strip()
        (config / "headers").write_text(HEADERS)
        (config / "main.cf").write_text(f"""
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
myhostname = postfix.example
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
alias_maps =
alias_database =
virtual_mailbox_domains = inline:{{{", ".join(f"{domain}=x" for domain in domains)}}}
virtual_mailbox_base = {self.mail}
virtual_mailbox_maps = static:inbox/
virtual_uid_maps = static:{nobody.pw_uid}
virtual_gid_maps = static:{nobody.pw_gid}
smtpd_peername_lookup = no
smtpd_tls_security_level = may
smtpd_tls_loglevel = 1
smtpd_tls_received_header = yes
smtpd_client_connection_count_limit = 0
smtpd_recipient_restrictions = check_recipient_access inline:{{{{nobody@to-none.secure.example = REJECT no such user}}}}
strict_7bit_headers = yes
strict_8bitmime_body = yes
strict_mime_encoding_domain = yes
header_checks = regexp:{config}/headers
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
""")
        services = [f"{RIGHT}:{port} inet n - n - - smtpd -o smtpd_tls_chain_files={right[1]},{right[0]}",
                    f"{WRONG}:{port} inet n - n - - smtpd -o smtpd_tls_chain_files={wrong[1]},{wrong[0]}",
                    f"{CLEAR}:{port} inet n - n - - smtpd -o smtpd_tls_security_level=none",
                    "cleanup unix n - n - 0 cleanup", "qmgr unix n - n 300 1 qmgr", "tlsmgr unix - - n 1000? 1 tlsmgr",
                    "rewrite unix - - n - - trivial-rewrite", "bounce unix - - n - 0 bounce", "defer unix - - n - 0 bounce",
                    "trace unix - - n - 0 bounce", "verify unix - - n - 1 verify", "flush unix n - n 1000? 0 flush",
                    "proxymap unix - - n - - proxymap", "error unix - - n - - error", "retry unix - - n - - error",
                    "virtual unix - n n - - virtual", "anvil unix - - n - 1 anvil", "postlog unix-dgram n - n - 1 postlogd"]
        (config / "master.cf").write_text("\n".join(services) + "\n")
        subprocess.run([program("postfix"), "-c", str(config), "check"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([f"{daemons}/master", "-c", str(config), "-d"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: answers(RIGHT, port) and answers(CLEAR, port), "banner of Postfix")

    def got(self, subject: str) -> list[bytes]:
        """The delivered messages of that subject."""
        return delivered(self.mail / "inbox", subject)

    def log(self) -> str:
        """What Postfix said."""
        return (self.directory / "log").read_text()

    def close(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait(DEADLINE_S)


def delivered(maildir: Path, subject: str) -> list[bytes]:
    """The messages of that subject in a Maildir."""
    found = [path.read_bytes() for path in sorted((maildir / "new").glob("*"))]
    return [message for message in found if f"\nSubject: {subject}\n".encode() in message]


# --- Exim -------------------------------------------------------------------------------------------------------------


class Exim:
    """Exim at one address, with GnuTLS. It takes mail for one domain, and nobody there."""

    def __init__(self, directory: Path, port: int, issued: Issued, domain: str) -> None:
        self.mail = directory / "mail"
        self._directory = directory
        owner = pwd.getpwnam("Debian-exim")
        for path in (directory, directory / "spool", self.mail):
            path.mkdir()
            os.chown(path, owner.pw_uid, owner.pw_gid)
        binary = shutil.copy(program("exim4"), directory / "exim4")  # it starts itself as that account, which may have no way to the checkout
        (config := directory / "conf").write_text(f"""
exim_path = {binary}
keep_environment =
primary_hostname = exim.example
spool_directory = {directory}/spool
log_file_path = {directory}/%slog
pid_file_path = {directory}/pid
local_interfaces = {EXIM}
daemon_smtp_ports = {port}
host_lookup =
smtp_accept_queue_per_connection = 0
tls_advertise_hosts = *
tls_certificate = {issued[0]}
tls_privatekey = {issued[1]}
log_selector = +tls_cipher +received_recipients +smtp_connection
acl_smtp_rcpt = recipients

begin acl
recipients:
  deny local_parts = nobody
       message = no such user here
  accept domains = {domain}
  deny message = not for us

begin routers
inbox:
  driver = accept
  transport = maildir

begin transports
maildir:
  driver = appendfile
  maildir_format
  directory = {self.mail}
  envelope_to_add
  return_path_add
""")
        for path in map(Path, issued):
            path.chmod(0o644)
        self.process = subprocess.Popen([binary, "-bdf", "-C", str(config)])
        until(lambda: self._running() and answers(EXIM, port), "banner of Exim")

    def _running(self) -> bool:
        assert self.process.poll() is None, self.log()
        return True

    def log(self) -> str:
        """What Exim said."""
        return "".join(path.read_text() for path in sorted(self._directory.glob("*log")))

    def got(self, subject: str) -> list[bytes]:
        """The delivered messages of that subject."""
        return delivered(self.mail, subject)

    def close(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait(DEADLINE_S)


# --- policy files -----------------------------------------------------------------------------------------------------


class Web:
    """The policy hosts of the domains in STS, over HTTPS."""

    def __init__(self, issued: Issued) -> None:
        self.asked: list[str] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host = self.headers["Host"]
                web.asked.append(host)
                mode = STS.get(host.split(".")[1].removeprefix("to-"))
                if mode is None or self.path != "/.well-known/mta-sts.txt":
                    self.send_error(404)
                    return
                body = FILE.format(mode).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((WEB, 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*issued)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server.server_address[1])

    def close(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()


# --- the world --------------------------------------------------------------------------------------------------------


class World:
    """All of it, and a gmta that sends there."""

    def __init__(self, directory: Path, ends: ExitStack) -> None:
        """ends: where what must be ended at the end is put."""
        self.directory = directory
        for name in ("dns", "gmta"):
            (directory / name).mkdir()
        authority = Authority(directory)
        self.port = free_port()
        right = authority.issue("right.secure.example", "enforced.sts.example")
        wrong = authority.issue("somebody.example")
        exim = authority.issue("exim.secure.example")
        self.web = Web(authority.issue(*(f"mta-sts.to-{name}.sts.example" for name in STS)))
        ends.callback(self.web.close)
        self.unbound = Unbound(directory / "dns", self._zones(right, exim))
        ends.callback(self.unbound.close)
        domains = [f"{name}.secure.example" for name in SECURE] + [f"{name}.sts.example" for name in STS] + ["plain.example", "noteven.example"]
        self.postfix = Postfix(directory / "postfix", self.port, right, wrong, [f"to-{domain}" for domain in domains])
        ends.callback(self.postfix.close)
        self.exim = Exim(directory / "exim", self.port, exim, "to-exim.secure.example")
        ends.callback(self.exim.close)
        self.gmta = Gmta(directory / "gmta")
        ends.callback(self.gmta.stop)
        self.gmta.serve(self.gmta.configuration(f"""
[domains]
relay_from = 127.0.0.0/8
[transport:outbound]
type = relay
port = {self.port}
allow_loopback = yes
ca_file = {authority.file}
sts_port = {self.web.port}
[route]
* = outbound
[dns]
servers = {self.unbound.address}
probe_signed = secure.example
probe_bogus = bogus.example
[tlsrpt]
send = yes
"""))

    def _zones(self, right: Issued, exim: Issued) -> dict[str, Signed | str]:
        port = self.port
        good, exim_record = ("TLSA {} {} {} {}".format(*issued.tlsa()) for issued in (right, exim))
        bad = "TLSA 3 1 1 " + "ab" * 32
        secure = f"""
to-right MX 10 right
right A {RIGHT}
_{port}._tcp.right {good}
to-wrong MX 10 wrong
wrong A {WRONG}
_{port}._tcp.wrong {bad}
to-dark MX 10 dark
dark A {RIGHT}
_{port}._tcp.dark {good}
to-cleartext MX 10 cleartext
cleartext A {CLEAR}
_{port}._tcp.cleartext {bad}
to-none MX 10 none
none A {WRONG}
to-exim MX 10 dead
to-exim MX 20 exim
dead A 127.0.0.99
exim A {EXIM}
_{port}._tcp.exim {exim_record}
"""
        plain = f"""$TTL 60
@ SOA ns.plain.example. x.plain.example. 1 3600 600 86400 60
@ NS ns
ns A 127.0.0.1
mx A {WRONG}
_{port}._tcp.mx {bad}
"""
        names = "".join(f"""
to-{name}.sts MX 10 {name}.sts
{name}.sts A {RIGHT if name == "enforced" else WRONG}
_mta-sts.to-{name}.sts TXT "v=STSv1; id=1"
_smtp._tls.to-{name}.sts TXT "v=TLSRPTv1; rua=mailto:tls@to-{name}.sts.example"
mta-sts.to-{name}.sts A {WEB}
""" for name in STS)
        sts = f"""$TTL 60
@ SOA ns.example. x.example. 1 3600 600 86400 60
@ NS ns
ns A 127.0.0.1
to-plain MX 10 mx.plain
to-noteven MX 10 noteven
noteven A {CLEAR}
{names}
"""
        return {"secure.example": sign("secure.example", secure, spoil=f"_{port}._tcp.dark.secure.example"),
                "bogus.example": sign("bogus.example", "@ A 192.0.2.1\n", honest=False), "plain.example": plain, "example": sts}

    def send(self, subject: str, *to: str, lines: int = 3, sender: str = "sender@example.test", envid: str = "",
             more: str = "") -> str:
        """Hands a message in; returns its queue id. more: text behind its lines."""
        with smtplib.SMTP("127.0.0.1", self.gmta.port) as client:
            client.ehlo("client.example.test")
            client.mail(sender, ["BODY=8BITMIME", *([f"ENVID={envid}"] if envid else [])])
            for recipient in to:
                client.rcpt(recipient)
            text = f"From: {sender}\r\nSubject: {subject}\r\n{EIGHT_BITS}\r\n" + "..line\r\n" * lines + more
            code, said = client.data(text.encode())
            assert code == 250, said
        return said.decode().rpartition(" ")[2]

    def got(self, domain: str, subject: str) -> list[bytes]:
        """The messages of that subject that its host delivered."""
        return (self.exim if domain.startswith("exim.") else self.postfix).got(subject)

    def outcome(self, queue_id: str) -> dict[str, Any]:
        """The first outcome in the message's history."""
        found: list[dict[str, Any]] = []

        def settled() -> bool:
            events = json.loads(self.gmta.command("trace", queue_id, "--json").stdout or b"[]")
            found[:] = [event["data"] | {"kind": event["kind"]} for event in events if event["kind"] in ("delivered", "deferred", "failed")]
            return bool(found)

        until(settled, f"outcome of {queue_id}")
        return found[0]

    def log(self) -> str:
        """gmta's log so far."""
        return (self.gmta.directory / "gmta.log").read_text()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="gmta-") as folder, ExitStack() as ends:
        directory = Path(folder)
        directory.chmod(0o755)
        yield World(directory, ends)


def test_unbound_is_what_the_tests_need(world: World) -> None:
    look_up = world.unbound.resolver.look_up
    assert look_up("right.secure.example", "A").secure and look_up("to-right.secure.example", "MX").secure
    assert look_up("nothing.secure.example", "A").secure and not look_up("mx.plain.example", "A").secure
    assert look_up("bogus.example", "A").status is Status.TEMPORARY
    assert look_up(f"_{world.port}._tcp.dark.secure.example", "TLSA").status is Status.TEMPORARY


@pytest.mark.parametrize(("domain", "kind", "tls", "says"), [
    ("right.secure.example", "delivered", "verified:dane-ee", ""), ("wrong.secure.example", "deferred", "", "none of those in TLSA"),
    ("dark.secure.example", "deferred", "", "TLSA"), ("cleartext.secure.example", "deferred", "", "offers no TLS"),
    ("exim.secure.example", "delivered", "verified:dane-ee", ""),
    ("none.secure.example", "delivered", "unverified", ""), ("plain.example", "delivered", "unverified", ""), ("noteven.example", "delivered", "", ""),
    ("enforced.sts.example", "delivered", "verified:mta-sts", ""), ("broken.sts.example", "deferred", "", "not for broken.sts.example"),
    ("trial.sts.example", "delivered", "unverified", ""), ("unserved.sts.example", "delivered", "unverified", "")])
def test_what_comes_to_the_peer_and_how(world: World, domain: str, kind: str, tls: str, says: str) -> None:
    outcome = world.outcome(world.send(domain, f"user@to-{domain}"))
    assert outcome["kind"] == kind and says in outcome["reply"]
    assert outcome.get("tls", "").rpartition(" ")[2] == tls
    if kind == "deferred":
        assert not world.got(domain, domain)
        return
    until(lambda: len(world.got(domain, domain)) == 1, "message in the peer's Maildir")
    (message,) = world.got(domain, domain)
    assert message.endswith(b"\n\n" + b"..line\n" * 3)
    assert bool(re.search(rb"using TLSv1\.|\(TLS1\.", message.partition(b"\n\n")[0])) == bool(tls)


@pytest.mark.parametrize("domain", ["none.secure.example", "exim.secure.example"])
def test_recipients_that_the_peer_refuses(world: World, domain: str) -> None:
    """The message is out with its envelope before the answers come, and the peer throws it away where nobody takes it."""
    for subject, names, kinds in (("mixed", ("nobody", "user"), {"failed", "delivered"}), ("refused", ("nobody",), {"failed"}),
                                  ("fine again", ("user",), {"delivered"})):
        queue_id = world.send(subject, *(f"{name}@to-{domain}" for name in names))
        world.outcome(queue_id)
        events = json.loads(world.gmta.command("trace", queue_id, "--json").stdout)
        assert {event["kind"] for event in events} & {"failed", "delivered", "deferred"} == kinds
        assert all("no such user" in event["data"]["reply"] for event in events if event["kind"] == "failed")
        until(lambda subject=subject, kinds=kinds: len(world.got(domain, subject)) == ("delivered" in kinds), subject)  # type: ignore[misc]


def test_a_report_is_read_by_postfix(world: World) -> None:
    """What two peers refuse goes back to a sender at Postfix, whose strict reader of MIME takes it and finds its parts."""
    refused = ["nobody@to-none.secure.example", "nobody@to-exim.secure.example"]
    queue_id = world.send("to be refused", *refused, sender="user@to-right.secure.example", envid="a+2Bb", more="grüße\r\n")
    subject = "Undelivered mail returned to sender"
    reports: dict[str, EmailMessage] = {}

    def came() -> bool:
        for raw in world.postfix.got(subject):
            parsed = email.message_from_bytes(raw, policy=email.policy.default)
            assert isinstance(parsed, EmailMessage)
            if f"Queue id: {queue_id}".encode() in raw:
                reports[str(parsed["Message-ID"])] = parsed
        return len(reports) == 2  # one a host

    until(came, "report at Postfix")
    found: dict[str, dict[str, str]] = {}
    for parsed in reports.values():
        assert not parsed.defects and parsed.get_content_type() == "multipart/report"
        assert parsed["Content-Type"].params["report-type"] == "delivery-status" and parsed["Return-Path"] == "<>"
        human, machine, returned = parsed.iter_parts()
        assert [part.get_content_type() for part in (human, machine, returned)] == ["text/plain", "message/delivery-status", "message/rfc822"]
        message, recipient = ({name: str(value) for name, value in block.items()} for block in machine.get_payload())
        assert message["Reporting-MTA"] == "dns; mx.example.test" and message["Original-Envelope-Id"] == "a+b"
        original = returned.get_content()
        assert original["Subject"] == "to be refused" and original.get_content() == "..line\n" * 3 + "grüße\n"
        assert parsed["Content-Transfer-Encoding"] == returned["Content-Transfer-Encoding"] == "8bit"
        assert recipient["Final-Recipient"].removeprefix("rfc822;") in human.get_content()
        found[recipient["Final-Recipient"].removeprefix("rfc822;")] = recipient
    assert sorted(found) == sorted(refused)
    seen: dict[str, list[str]] = {}  # by Postfix's queue id: its log of the header fields that it came across
    for queue_id, value in re.findall(r"cleanup\[\d+\]: (\w+): info: header (?:Content-Type|Subject): ([^;]+?)(?:;| from )", world.postfix.log()):
        seen.setdefault(queue_id, []).append(value)
    parts = [subject, "multipart/report", "text/plain", "message/delivery-status", "message/rfc822", "to be refused", "text/html"]
    assert list(seen.values()).count(parts) == 2, seen
    assert {recipient["Action"] for recipient in found.values()} == {"failed"}
    assert found[refused[0]]["Remote-MTA"] == "dns; none.secure.example" and found[refused[1]]["Remote-MTA"] == "dns; exim.secure.example"
    assert all("no such user" in recipient["Diagnostic-Code"] and recipient["Status"].startswith("5.") for recipient in found.values())


def test_self_test_and_reports(world: World) -> None:
    for name in ("enforced", "broken", "trial", "unserved"):
        world.send("counted", f"user@to-{name}.sts.example")  # one that is not tried again so soon was counted before

    def counted() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        database = sqlite3.connect(world.gmta.directory / "var/state.db")
        try:
            rows = database.execute("SELECT key, value FROM state WHERE key LIKE 'tlsrpt%'").fetchall()
        except sqlite3.OperationalError:  # it is only being made
            rows = []
        finally:
            database.close()
        facts = {key.rpartition(":")[2]: json.loads(value) for key, value in rows if key.startswith("tlsrpt-facts:")}
        for key, _ in rows:
            if key.startswith("tlsrpt:"):
                _, _, domain, fact = key.split(":")
                found.setdefault(domain.removeprefix("to-").removesuffix(".sts.example"), set()).add(
                    f"{facts[fact]['policy']['policy-type']} {facts[fact]['result']}".strip())
        return found

    wanted = {"enforced": {"sts"}, "broken": {"sts certificate-host-mismatch"}, "trial": {"sts certificate-host-mismatch"},
              "unserved": {"sts sts-policy-fetch-error", "no-policy-found"}}
    until(lambda: counted() == wanted, f"counters {wanted}")
    assert "dnssec validation works" in world.log() and "verified:mta-sts" in world.log()


@pytest.mark.parametrize("domain", ["none.secure.example", "exim.secure.example"])
def test_many_messages_over_few_connections(world: World, domain: str) -> None:
    def connections() -> int:
        return world.postfix.log().count(" connect from ") + world.exim.log().count("SMTP connection from ")

    before = connections()
    for number in range(30):
        world.send(f"many {number % 3}", f"user@to-{domain}", lines=1 if number % 3 else 20_000)
    until(lambda: sum(len(world.got(domain, f"many {number}")) for number in range(3)) == 30, "30 messages")
    assert all(message.endswith(b"\n\n" + b"..line\n" * 20_000) for message in world.got(domain, "many 0"))
    assert connections() - before < 25, "connections are kept for the next message"
