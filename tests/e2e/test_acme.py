"""Certificates from a real ACME server: Pebble, which looks at our challenges through DNS of our own; openssl sees what is served."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from gmta.testing.authority import Authority
from gmta.testing.zone import Zone
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, listens, program, until

pytestmark = pytest.mark.e2e


class Pebble:
    """The server. url: its directory; ca_file: whose certificate it has itself; challenge_port: where it looks, whatever the challenge."""

    def __init__(self, directory: Path, records: dict[str, dict[str, object]], secrets: dict[str, str]) -> None:
        self.port, self.challenge_port = free_port(), free_port()
        self.management_port = free_port()
        self.url = f"https://localhost:{self.port}/dir"
        self._directory = directory / "pebble"
        self._directory.mkdir()
        authority = Authority(self._directory, "Of the directory")
        self.ca_file = authority.file
        certificate, key = authority.issue("localhost", "127.0.0.1")
        (self._directory / "config.json").write_text(json.dumps({"pebble": {
            "listenAddress": f"127.0.0.1:{self.port}", "managementListenAddress": f"127.0.0.1:{self.management_port}",
            "certificate": certificate, "privateKey": key, "httpPort": self.challenge_port, "tlsPort": self.challenge_port,
            "externalAccountBindingRequired": bool(secrets), "externalAccountMACKeys": secrets}}))
        self._dns = Zone(records).serve()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts it; it knows nobody."""
        # by default it waits some seconds before it looks, refuses one nonce of twenty, and trusts old authorizations
        env = {**os.environ, "PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"}
        with open(self._directory / "log", "ab") as log:
            self._process = subprocess.Popen([program("pebble"), "-strict", "-config", str(self._directory / "config.json"), "-dnsserver", self._dns.address],
                                             env=env, stdout=log, stderr=log)
        until(lambda: listens(self.port) and listens(self.management_port), "Pebble")

    def log(self) -> str:
        """What it said."""
        return (self._directory / "log").read_text()

    def end(self) -> None:
        """Ends it; what it knew is lost."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(DEADLINE_S)

    def close(self) -> None:
        """Ends it and its DNS."""
        self.end()
        self._dns.close()


Start = Callable[..., Pebble]


@pytest.fixture
def pebble(directory: Path) -> Iterator[Start]:
    """Starts Pebble; names are this machine's."""
    started: list[Pebble] = []

    def start(*names: str, secrets: dict[str, str] | None = None) -> Pebble:
        started.append(Pebble(directory, {name: {"A": "127.0.0.1"} for name in names}, secrets or {}))
        return started[-1]

    yield start
    for server in started:
        server.close()


def configuration(gmta: Gmta, server: Pebble, keys: str = "", more: str = "") -> str:
    """keys: of [acme]; more: before it, of [gmta] and then sections."""
    return gmta.configuration(f"""
[gmta]
workers = 2
{more}
[acme]
terms_agreed = yes
directory = {server.url}
ca_file = {server.ca_file}
address = 127.0.0.1:{server.challenge_port}
{keys}
""")


def served(port: int, name: str = "mx.example.test") -> x509.Certificate:
    """The certificate that openssl is shown there after STARTTLS."""
    done = subprocess.run([program("openssl"), "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{port}", "-servername", name], input=b"QUIT\r\n",
                          capture_output=True, timeout=DEADLINE_S, check=False)
    return x509.load_pem_x509_certificate(done.stdout)


def names(certificate: x509.Certificate) -> list[str]:
    return sorted(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName))


def obtained(gmta: Gmta, name: str = "mx.example.test") -> x509.Certificate:
    """The certificate for a name, once it is Pebble's."""
    found: list[x509.Certificate] = []

    def ready() -> bool:
        found.append(served(gmta.port, name))
        return "Pebble" in found[-1].issuer.rfc4514_string()

    until(ready, "certificate")
    return found[-1]


@pytest.mark.parametrize("challenge", ["http-01", "tls-alpn-01"])
def test_certificates_of_both_challenges(gmta: Gmta, pebble: Start, challenge: str) -> None:
    """One for the names of [tls], another by SNI, in every worker, without a restart; mail is served before."""
    server = pebble("mx.example.test", "mx2.example.test", "mail.other.example")
    gmta.serve(configuration(gmta, server, f"challenge = {challenge}\nnames = mx.example.test, mx2.example.test\ncontact = postmaster@example.test",
                             "[tls:mail.other.example]"))
    assert names(obtained(gmta)) == ["mx.example.test", "mx2.example.test"]
    assert names(obtained(gmta, "mail.other.example")) == ["mail.other.example"]
    for worker in range(8):
        assert "Pebble" in served(gmta.port, "mx2.example.test").issuer.rfc4514_string(), worker
    for file in (gmta.directory / "var/acme").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert sorted(file.name.partition("-")[0] for file in (gmta.directory / "var/acme").iterdir()) == [
        "account", "lock", "mail.other.example.pem", "mx.example.test.pem"]
    # the chain leads to the authority's root
    context = ssl._create_unverified_context()
    with socket.create_connection(("127.0.0.1", server.management_port), DEADLINE_S) as link, context.wrap_socket(link) as tls:
        tls.sendall(b"GET /roots/0 HTTP/1.0\r\n\r\n")
        root = gmta.directory / "root.pem"
        root.write_bytes(b"".join(iter(lambda: tls.recv(65536), b"")).partition(b"\r\n\r\n")[2])
    done = subprocess.run([program("openssl"), "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{gmta.port}", "-CAfile", str(root),
                           "-verify_return_error", "-verify_hostname", "mx2.example.test"], input=b"QUIT\r\n", capture_output=True, timeout=DEADLINE_S, check=False)
    assert b"Verify return code: 0 (ok)" in done.stdout, done.stdout


def test_an_external_account_that_changes_and_is_forgotten(gmta: Gmta, pebble: Start) -> None:
    """A reload with other names: obtained anew at once, by an account that is written to elsewhere, or that the server knows no more."""
    secret = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    server = pebble("mx.example.test", "mx2.example.test", secrets={"kid-1": secret})
    account = f"eab_key_id = kid-1\neab_secret = {secret}\nkeep_key = yes"
    gmta.serve(configuration(gmta, server, account))
    first = obtained(gmta)
    assert names(first) == ["mx.example.test"]

    def reload(contact: str, *wanted: str) -> None:
        gmta.config.write_text(configuration(gmta, server, f"{account}\nnames = {' '.join(wanted)}\ncontact = {contact}"))
        assert gmta.process is not None
        gmta.process.send_signal(signal.SIGHUP)
        kept = gmta.directory / "var/acme/mx.example.test.pem"
        until(lambda: names(x509.load_pem_x509_certificate(kept.read_bytes())) == sorted(wanted), "other certificate")
        (file,) = (gmta.directory / "var/acme").glob("account-*")
        assert json.loads(file.read_text())["contact"] == contact
        new = x509.load_pem_x509_certificate(kept.read_bytes())
        assert new.public_key() == first.public_key()
        until(lambda: served(gmta.port) == new, "other certificate in use")

    reload("postmaster@example.test", "mx.example.test", "mx2.example.test")
    reload("", "mx.example.test")
    server.end()
    server.start()
    reload("hostmaster@example.test", "mx.example.test", "mx2.example.test")
    assert "no certificate" not in (gmta.directory / "gmta.log").read_text()


def test_mail_goes_on_without_an_authority(gmta: Gmta, pebble: Start) -> None:
    """Nobody at the directory's address, and the challenge's taken: STARTTLS is there with a certificate of our own, and the log says why."""
    server = pebble("mx.example.test")
    server.end()
    with socket.create_server(("127.0.0.1", server.challenge_port)):
        gmta.serve(configuration(gmta, server, "", "[listener:mx]\ntls = required"))
        certificate = served(gmta.port)
    assert certificate.issuer == certificate.subject and names(certificate) == ["mx.example.test"]
    assert f"[acme] address: can't listen on 127.0.0.1:{server.challenge_port}: Address already in use" in (gmta.directory / "output").read_text()
    until(lambda: 'error="nobody listens at [acme] address' in (gmta.directory / "gmta.log").read_text(), "error")
    server.start()
