"""Submission as people's clients do it: swaks, curl, smtplib, msmtp, s-nail, mutt, nodemailer, Go and gsasl through STARTTLS and implicit TLS; Dovecot as
back end; haproxy in front; guessers; and nobody relays who may not."""

from __future__ import annotations

import base64
import json
import os
import pwd
import re
import smtplib
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmta.testing.authority import Authority
from gmta.testing.zone import Zone
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, listens, program, until

pytestmark = pytest.mark.e2e

USER, SECRET = "user@example.test", "sécret word"


class Site:
    """A server for mail clients: a certificate of its own authority, a user, one port for STARTTLS and one for TLS at once."""

    def __init__(self, gmta: Gmta, plugins: str = "auth_file", extra: str = "", listener: str = "") -> None:
        self.gmta = gmta
        self.tls_port = free_port()
        self.authority = Authority(gmta.directory)
        certificate, key = self.authority.issue("localhost", "127.0.0.1")
        gmta.config.write_text("[gmta]\nhostname = mx.example.test\n[plugin:auth_file]\nusers_file = users\n")
        added = subprocess.run([sys.executable, "-m", "gmta", "user", "add", USER, "--password-stdin", "-c", str(gmta.config)], input=f"{SECRET}\n".encode(),
                               capture_output=True, timeout=DEADLINE_S, check=False)
        assert added.returncode == 0, added.stderr
        gmta.serve(gmta.configuration(f"""
[gmta]
workers = 2
[listener:mx]
{listener}
[listener:submission]
address = 127.0.0.1:{gmta.submission_port}
role = submission
[listener:smtps]
address = 127.0.0.1:{self.tls_port}
role = submission
tls = implicit
[tls]
certificate = {certificate}
key = {key}
[plugins]
enable = {plugins}, mailboxes, access
[plugin:auth_file]
users_file = users
[route]
* = mailbox
{extra}
"""))

    def log(self) -> str:
        return (self.gmta.directory / "gmta.log").read_text()

    def run(self, *arguments: str, text: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A client, to its end; it must be content."""
        done = subprocess.run([program(arguments[0]), *arguments[1:]], input=text, capture_output=True, text=True, errors="replace", timeout=DEADLINE_S,
                              check=False, cwd=self.gmta.directory, env={**os.environ, "HOME": str(self.gmta.directory), "LC_ALL": "C.UTF-8", **(env or {})})
        assert done.returncode == 0, (arguments, done.stdout, done.stderr, self.log())
        return done

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.authority.file)


def message(to: str, subject: str) -> str:
    return f"From: {USER}\nTo: {to}\nSubject: {subject}\n\nHello\n"


def by_swaks(site: Site, to: str, implicit: bool) -> None:
    for mechanism in ("PLAIN", "LOGIN"):
        site.run("swaks", "--server", f"127.0.0.1:{site.tls_port if implicit else site.gmta.submission_port}", "--tls-on-connect" if implicit else "--tls",
                 "--tls-verify", "--tls-ca-path", site.authority.file, "--auth", mechanism, "--auth-user", USER, "--auth-password", SECRET,
                 "--from", USER, "--to", to, "--data", message(to, "swaks"))


def by_curl(site: Site, to: str, implicit: bool) -> None:
    (site.gmta.directory / "message").write_text(message(to, "curl"))
    url = f"smtps://localhost:{site.tls_port}" if implicit else f"smtp://localhost:{site.gmta.submission_port}"
    site.run("curl", "-sS", "--ssl-reqd", "--cacert", site.authority.file, "--url", url, "--user", f"{USER}:{SECRET}", "--mail-from", USER, "--mail-rcpt", to,
             "--upload-file", "message", "--crlf")


def by_smtplib(site: Site, to: str, implicit: bool) -> None:
    if implicit:
        client: smtplib.SMTP = smtplib.SMTP_SSL("localhost", site.tls_port, timeout=DEADLINE_S, context=site.context())
    else:
        client = smtplib.SMTP("localhost", site.gmta.submission_port, timeout=DEADLINE_S)
        client.starttls(context=site.context())
    with client:
        client.ehlo()
        assert client.docmd("AUTH PLAIN " + base64.b64encode(f"\0{USER}\0{SECRET}".encode()).decode())[0] == 235  # login() takes ASCII only
        client.sendmail(USER, [to], message(to, "smtplib"))


def by_msmtp(site: Site, to: str, implicit: bool) -> None:
    config = site.gmta.directory / "msmtprc"
    for mechanism in ("plain", "scram-sha-256", "scram-sha-256-plus"):
        config.write_text(f"""
account default
host localhost
port {site.tls_port if implicit else site.gmta.submission_port}
tls on
tls_starttls {'off' if implicit else 'on'}
tls_trust_file {site.authority.file}
auth {mechanism}
user {USER}
password {SECRET}
from {USER}
""")
        config.chmod(0o600)
        offered = subprocess.run([program("msmtp"), "--version"], capture_output=True, text=True, check=True).stdout.lower()
        if mechanism in offered:
            site.run("msmtp", "-C", str(config), to, text=message(to, f"msmtp {mechanism}"))


def by_s_nail(site: Site, to: str, implicit: bool) -> None:
    user, secret = (part.replace("@", "%40").replace(" ", "%20").replace("é", "%C3%A9") for part in (USER, SECRET))
    url = f"{'smtps' if implicit else 'smtp'}://{user}:{secret}@localhost:{site.tls_port if implicit else site.gmta.submission_port}"
    site.run("s-nail", "-:/", "-Sv15-compat", f"-Smta={url}", "-Ssmtp-auth=plain", *(() if implicit else ("-Ssmtp-use-starttls",)), f"-Stls-ca-file={site.authority.file}",
             "-Stls-ca-no-defaults", f"-Sfrom={USER}", "-Snosave", "-s", "s-nail", to, text="Hello\n")


def by_mutt(site: Site, to: str, implicit: bool) -> None:
    (site.gmta.directory / "muttrc").write_text(f"""
set smtp_url = "{'smtps' if implicit else 'smtp'}://{USER.replace('@', '%40')}@localhost:{site.tls_port if implicit else site.gmta.submission_port}/"
set smtp_pass = "{SECRET}"
set ssl_force_tls = yes
set ssl_ca_certificates_file = {site.authority.file}
set ssl_usesystemcerts = no
set from = {USER}
set copy = no
set charset = utf-8
""", encoding="utf-8")
    for mechanism in ("plain", "scram-sha-256"):
        site.run("mutt", "-n", "-F", "muttrc", "-e", f"set smtp_authenticators = {mechanism}", "-s", f"mutt {mechanism}", to, text="Hello\n")


def by_nodemailer(site: Site, to: str, implicit: bool) -> None:
    """Node.js, as web applications send."""
    (site.gmta.directory / "send.js").write_text(f"""
const transport = require("nodemailer").createTransport({{
  host: "localhost", port: {site.tls_port if implicit else site.gmta.submission_port}, secure: {str(implicit).lower()}, requireTLS: true,
  auth: {{user: {json.dumps(USER)}, pass: {json.dumps(SECRET)}}}, tls: {{ca: require("fs").readFileSync({json.dumps(site.authority.file)})}},
}});
transport.sendMail({{from: {json.dumps(USER)}, to: {json.dumps(to)}, subject: "nodemailer é", text: "Hello", attachments: [{{filename: "a", content: "x"}}]}})
  .then(() => process.exit(0), error => {{ console.error(error); process.exit(1); }});
""", encoding="utf-8")
    site.run("node", "send.js", env={"NODE_PATH": "/usr/share/nodejs"})


GO = r"""
package main

import (
	"crypto/tls"
	"crypto/x509"
	"net/smtp"
	"os"
)

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	host, port, implicit, ca, user, secret, to := "localhost", os.Args[1], os.Args[2] == "implicit", os.Args[3], os.Args[4], os.Args[5], os.Args[6]
	pem, err := os.ReadFile(ca)
	must(err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	config := &tls.Config{ServerName: host, RootCAs: roots}
	var client *smtp.Client
	if implicit {
		link, err := tls.Dial("tcp", host+":"+port, config)
		must(err)
		client, err = smtp.NewClient(link, host)
		must(err)
	} else {
		client, err = smtp.Dial(host + ":" + port)
		must(err)
		must(client.StartTLS(config))
	}
	must(client.Auth(smtp.PlainAuth("", user, secret, host)))
	must(client.Mail(user))
	must(client.Rcpt(to))
	body, err := client.Data()
	must(err)
	_, err = body.Write([]byte("From: " + user + "\r\nTo: " + to + "\r\nSubject: Go\r\n\r\nHello\r\n.\r\n"))
	must(err)
	must(body.Close())
	must(client.Quit())
}
"""


def by_go(site: Site, to: str, implicit: bool) -> None:
    """Go's net/smtp."""
    source, built = site.gmta.directory / "send.go", site.gmta.directory / "send-go"
    if not built.exists():
        source.write_text(GO)
        site.run("go", "build", "-o", str(built), str(source), env={"GOCACHE": str(site.gmta.directory / "go"), "GOTOOLCHAIN": "local"})
    site.run(str(built), str(site.tls_port if implicit else site.gmta.submission_port), "implicit" if implicit else "starttls", site.authority.file,
             USER, SECRET, to)


CLIENTS: dict[str, tuple[Callable[[Site, str, bool], None], int]] = {
    "swaks": (by_swaks, 2), "curl": (by_curl, 1), "smtplib": (by_smtplib, 1), "msmtp": (by_msmtp, 1), "s-nail": (by_s_nail, 1), "mutt": (by_mutt, 2),
    "nodemailer": (by_nodemailer, 1), "go": (by_go, 1)}


def test_clients_send_through_both_ports(gmta: Gmta) -> None:
    site = Site(gmta)
    for name, (send, count) in CLIENTS.items():
        for implicit in (False, True):
            local = f"{name}{'-tls' if implicit else ''}"
            send(site, f"{local}@example.test", implicit)
            for file in gmta.arrived(local, count):
                assert re.search(rb"with (?:ESMTP|UTF8SMTP)SA\b", file.read_bytes()), file.read_bytes()
    log = site.log()
    assert SECRET not in log and all(f"mechanism={name}" in log for name in ("PLAIN", "LOGIN", "SCRAM-SHA-256"))


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN", "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"])
def test_gsasl(gmta: Gmta, mechanism: str) -> None:
    """GNU SASL, which proves the channel too; with a wrong password it gets nowhere."""
    site = Site(gmta)
    common = ("gsasl", "--smtp", f"--connect=127.0.0.1:{gmta.submission_port}", f"--mechanism={mechanism}", f"--authentication-id={USER}",
              f"--x509-ca-file={site.authority.file}", "--hostname=localhost", "--service=smtp", *(("--no-cb",) if mechanism == "SCRAM-SHA-256" else ()))
    site.run(*common, f"--password={SECRET}")
    assert f"mechanism={mechanism}" in site.log()
    wrong = subprocess.run([program("gsasl"), *common[1:], "--password=wrong"], capture_output=True, timeout=DEADLINE_S, check=False, input=b"")
    assert b"535 5.7.8" in wrong.stdout + wrong.stderr


@pytest.mark.slow
def test_testssl_finds_nothing(gmta: Gmta) -> None:
    """testssl.sh on both ports: no finding of medium severity or worse, but for the certificate, which is a test's."""
    site = Site(gmta)
    scans = {}
    for port, how in ((gmta.submission_port, ["-P", "--starttls", "smtp"]), (site.tls_port, ["-S"])):  # what is the same for both, once
        report = gmta.directory / f"testssl-{port}.json"
        scans[report] = subprocess.Popen([program("testssl"), "--quiet", "--color", "0", "--warnings", "batch", "--nodns", "none", "--ip", "127.0.0.1",
                                          "-p", "-s", "-f", "-U", "--jsonfile", str(report), *how, f"localhost:{port}"],
                                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=gmta.directory)
    try:
        for report, scan in scans.items():
            said, _ = scan.communicate(timeout=300)
            findings = json.loads(report.read_text())
            tested = {finding["id"] for finding in findings}
            assert {"TLS1_2", "TLS1_3", "heartbleed", "ROBOT", "PFS", "cipherlist_3DES_IDEA", "secure_renego", "CCS", "LUCKY13"} <= tested, said
            assert tested & {"cipher_order", "cert_keySize"}, said
            bad = [finding for finding in findings if finding["severity"] in ("MEDIUM", "HIGH", "CRITICAL", "WARN", "FATAL")
                   and not finding["id"].startswith("cert") and finding["id"] != "engine_problem"  # the scanner's own OpenSSL
                   and not (finding["id"].startswith("sessionresumption") and finding["severity"] == "WARN")]  # unclear to it: each worker has sessions of its own
            assert bad == []
    finally:
        for scan in scans.values():
            if scan.poll() is None:
                scan.kill()
                scan.wait()


# --- Dovecot as back end ----------------------------------------------------------------------------------------------


@pytest.fixture
def dovecot(directory: Path) -> Iterator[Path]:
    """The socket of a Dovecot that knows one user."""
    folder = directory / "dovecot"
    folder.mkdir()
    root = os.getuid() == 0
    me = pwd.getpwuid(os.getuid()).pw_name
    (folder / "users").write_text(f"{USER}:{{PLAIN}}{SECRET}\n", encoding="utf-8")
    path = folder / "auth"
    config = folder / "dovecot.conf"
    config.write_text(f"""
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols =
ssl = no
auth_mechanisms = plain login
auth_failure_delay = 0
default_internal_user = {'dovecot' if root else me}
default_login_user = {'dovenull' if root else me}
default_internal_group = {'dovecot' if root else me}
passdb {{
  driver = passwd-file
  args = {folder}/users
}}
userdb {{
  driver = static
  args = uid=65534 gid=65534 home=/nonexistent
}}
service auth {{
  unix_listener {path} {{
    mode = 0666
  }}
}}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
""")
    process = subprocess.Popen([program("dovecot"), "-F", "-c", str(config)])
    try:
        until(path.exists, f"socket of Dovecot ({folder / 'log'})")
        yield path
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def test_dovecot_says_who_may_log_in(gmta: Gmta, dovecot: Path) -> None:
    site = Site(gmta, "auth_dovecot", f"[plugin:auth_dovecot]\nsocket = {dovecot}\n")
    by_swaks(site, "one@example.test", False)
    assert len(gmta.arrived("one", 2)) == 2
    with smtplib.SMTP("localhost", gmta.submission_port, timeout=DEADLINE_S) as client:
        client.starttls(context=site.context())
        client.ehlo()
        assert set(client.esmtp_features["auth"].split()) == {"PLAIN", "LOGIN"}
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            client.login(USER, "wrong")
        assert refused.value.smtp_code == 535


# --- behind haproxy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["send-proxy", "send-proxy-v2"])
def test_the_true_client_is_seen_behind_haproxy(gmta: Gmta, version: str) -> None:
    """By the trace, the log and SPF; who does not come through the proxy is turned away."""
    zone = Zone({"client.example": {"TXT": ["v=spf1 ip4:127.0.0.77 -all"]}, "proxy.example": {"TXT": ["v=spf1 ip4:127.0.0.1 -all"]}})
    front = free_port()
    config = gmta.directory / "haproxy.cfg"
    config.write_text(f"""
defaults
    mode tcp
    timeout connect 10s
    timeout client 30s
    timeout server 30s
listen smtp
    bind 127.0.0.1:{front}
    server gmta 127.0.0.1:{gmta.port} {version}
""")
    with zone.serve() as server:
        site = Site(gmta, "spf, auth_file", f"[dns]\nservers = {server.address}\n", listener="proxy_protocol = yes")
        process = subprocess.Popen([program("haproxy"), "-db", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            until(lambda: listens(front), "haproxy")
            for domain, result in (("client.example", "pass"), ("proxy.example", "fail")):
                with smtplib.SMTP("127.0.0.1", front, timeout=DEADLINE_S, source_address=("127.0.0.77", 0)) as client:
                    client.starttls(context=ssl._create_unverified_context())
                    if result == "pass":
                        client.sendmail(f"a@{domain}", ["one@example.test"], "Subject: x\n\nx\n")
                        continue
                    client.ehlo()
                    code, said = client.docmd(f"MAIL FROM:<a@{domain}>")
                    assert code == 550 and b"127.0.0.77" in said
            (file,) = gmta.arrived("one")
            assert re.search(rb"\[127\.0\.0\.77\].*spf=pass", file.read_bytes(), re.S)
            lines = [line for line in site.log().splitlines() if re.search("info (queued|refused)", line)]
            assert len(lines) == 2 and all(" ip=127.0.0.77 " in line for line in lines)
            with socket.create_connection(("127.0.0.1", gmta.port), DEADLINE_S) as bare:  # nobody gets past the proxy
                bare.sendall(b"EHLO client.example\r\n")
                assert bare.recv(1000).startswith(b"421 4.7.0")
            assert "no client behind a proxy" in site.log()
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def test_swaks_speaks_for_others(gmta: Gmta) -> None:
    """XCLIENT from a network that may, and a PROXY header that swaks writes itself."""
    site = Site(gmta, "auth_file", listener="xclient_from = 127.0.0.1")
    common = ("swaks", "--server", f"127.0.0.1:{gmta.port}", "--from", "a@example.com", "--body", "x")
    site.run(*common, "--to", "one@example.test", "--xclient-addr", "198.51.100.7", "--xclient-name", "client.example.com")
    assert b"client.example.com [198.51.100.7]" in gmta.arrived("one")[0].read_bytes()
    gmta.stop()
    gmta.serve(gmta.config.read_text().replace("xclient_from = 127.0.0.1", "proxy_protocol = yes"))
    for version in ("1", "2"):
        site.run(*common, "--to", f"two{version}@example.test", "--proxy-version", version, "--proxy-family", "TCP4" if version == "1" else "AF_INET",
                 "--proxy-source", "198.51.100.8", "--proxy-source-port", "4711", "--proxy-dest", "192.0.2.1", "--proxy-dest-port", "25",
                 *(("--proxy-protocol", "STREAM", "--proxy-command", "PROXY") if version == "2" else ()))
        assert b"[198.51.100.8]" in gmta.arrived(f"two{version}")[0].read_bytes()


# --- guessers ---------------------------------------------------------------------------------------------------------


def test_a_user_gets_in_while_guessers_hammer(gmta: Gmta) -> None:
    """Sixty guessers from as many addresses at one account: all are locked out, and the user is not."""
    site = Site(gmta, "auth_guard, auth_file", "[plugin:auth_guard]\nuser_failures = 5\ndelay = 200ms\n")
    ended = threading.Event()
    codes: list[int] = []

    def guess(number: int) -> None:
        while not ended.is_set():
            try:
                with smtplib.SMTP("127.0.0.1", gmta.submission_port, timeout=DEADLINE_S, source_address=(f"127.0.1.{number}", 0)) as client:
                    client.starttls(context=ssl._create_unverified_context())
                    client.ehlo()
                    for attempt in range(3):
                        codes.append(client.docmd("AUTH PLAIN " + base64.b64encode(f"\0{USER}\0{number}-{attempt}".encode()).decode())[0])
            except (smtplib.SMTPException, OSError):
                pass

    guessers = [threading.Thread(target=guess, args=(number,), daemon=True) for number in range(1, 61)]
    for guesser in guessers:
        guesser.start()
    try:
        until(lambda: 454 in codes and len(codes) > 120, "lock-out")
        for _ in range(3):
            by_smtplib(site, "one@example.test", False)
    finally:
        ended.set()
        for guesser in guessers:
            guesser.join(DEADLINE_S)
    assert len(gmta.arrived("one", 3)) == 3
    assert codes.count(535) < 60 * 4 and 235 not in codes


# --- no open relay ----------------------------------------------------------------------------------------------------

SHAPES = [
    "<victim@foreign.example>", "<victim%foreign.example@example.test>", "<victim%foreign.example@[127.0.0.1]>", "<foreign.example!victim@example.test>",
    "<foreign.example!victim>", "<@example.test:victim@foreign.example>", "<@example.test,@b.example:victim@foreign.example>", '<"victim@foreign.example"@example.test>',
    '<"victim@foreign.example">', "<victim@foreign.example@example.test>", "<victim@example.test@foreign.example>", '<"victim%foreign.example"@example.test>',
    "<victim@[127.0.0.1]>", "<victim@[203.0.113.1]>", "<victim@[IPv6:2001:db8::1]>", "<victim@foreign.example.>", "<victim@example.test.foreign.example>",
    "<victim@foreign.example.example.test>", "<victim@sub.example.test>", "<victim@xexample.test>", "<victim@example.tést>", "<victim@ехample.test>", "<victim@example。test>",
    "<victim@xn--example-.test>", "<victim@foreign.example%example.test>", "victim@foreign.example", "<victim@foreign.example> <user@example.test>", "<\"victim\"@foreign.example>",
    "<victim@foreign.example>,<user@example.test>", "<victim%foreign.example>", "<victim@>", "<victim@foreign.example\\@example.test>", "<victim@foreign.example:25>",
    "<victim@FOREIGN.example>", "<@foreign.example:victim@example.test@foreign.example>", "<victim@localhost>", "<victim@mx.example.test>", "<'victim@foreign.example'@example.test>",
    "<victim(@foreign.example)@foreign.example>", "<|/bin/sh@foreign.example>",
]


def test_nobody_relays_who_may_not(gmta: Gmta) -> None:
    """What is taken is taken for the local domain, as a mailbox of that very name, and nothing leaves."""
    gmta.start("[limits]\nerror_delay = 0s\nerrors_per_session = 1000\n", mailboxes="accept = listed\nmailboxes = user@example.test")
    assert len(SHAPES) >= 30
    accepted = []
    for sender in ("<a@example.com>", "<user@example.test>", "<>", "<a@[127.0.0.1]>"):
        with smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S) as client:
            client.ehlo("client.example.com")
            for shape in SHAPES:
                for extra in ("", " SMTPUTF8"):
                    client.docmd("RSET")
                    assert client.docmd(f"MAIL FROM:{sender}{extra}")[0] == 250
                    assert client.sock is not None
                    client.sock.sendall(f"RCPT TO:{shape}\r\n".encode())
                    code, said = client.getreply()
                    if code < 300:
                        accepted.append((shape, said))
    # the source route to a mailbox of ours is a mailbox of ours (RFC 5321 appendix C); none of these is one
    assert accepted == []


def test_starttls_within_the_first_seconds_of_a_new_certificate(gmta: Gmta) -> None:
    """A certificate that is renewed is served without a reload."""
    site = Site(gmta)
    certificate, key = next(gmta.directory.glob("*.crt")), next(gmta.directory.glob("*.key"))

    def served() -> bytes:
        with socket.create_connection(("127.0.0.1", site.tls_port), DEADLINE_S) as link, \
                ssl._create_unverified_context().wrap_socket(link) as tls:
            return tls.getpeercert(binary_form=True) or b""

    before = served()
    new = site.authority.issue("localhost", "127.0.0.1")
    os.replace(new[1], key)
    os.replace(new[0], certificate)
    assert before != new.der[0]
    until(lambda: all(served() == new.der[0] for _ in range(8)), "new certificate from every worker")
