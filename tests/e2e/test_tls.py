"""TLS of a listener as openssl sees it: versions, ciphers, names, renewed files, resumption, the end of a session, client certificates."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from gmta.testing.authority import Authority
from tests.e2e.conftest import DEADLINE_S, Gmta, program, until

pytestmark = pytest.mark.e2e


class Site:
    """A server of one worker with two certificates and an authority for its clients."""

    def __init__(self, gmta: Gmta) -> None:
        self.gmta = gmta
        self.authority = Authority(gmta.directory)
        self.own, self.other = self.authority.issue("mx.example.test"), self.authority.issue("mail.other.example")
        gmta.serve(gmta.configuration(f"""
[listener:mx]
client_ca = {self.authority.file}
client_names = relay.partner.example
[tls]
certificate = {self.own[0]}
key = {self.own[1]}
[tls:mail.other.example]
certificate = {self.other[0]}
key = {self.other[1]}
[route]
* = mailbox
"""))

    def openssl(self, *how: str, say: str = "QUIT\r\n") -> str:
        """What openssl s_client says and hears after STARTTLS."""
        done = subprocess.run([program("openssl"), "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{self.gmta.port}", "-CAfile", self.authority.file, *how],
                              input=say.encode(), capture_output=True, timeout=DEADLINE_S, check=False, cwd=self.gmta.directory)
        return (done.stdout + done.stderr).decode("utf-8", "replace")

    def served(self, name: str) -> x509.Certificate:
        """The certificate for a name."""
        return x509.load_pem_x509_certificate(self.openssl("-servername", name, "-verify_return_error").encode())


@pytest.fixture
def site(gmta: Gmta) -> Site:
    return Site(gmta)


def test_versions_and_ciphers(site: Site) -> None:
    assert "Protocol  : TLSv1.3" in site.openssl() or "New, TLSv1.3" in site.openssl()
    assert "New, TLSv1.2, Cipher is ECDHE-ECDSA-" in site.openssl("-tls1_2")
    for refused in (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], ["-tls1_2", "-cipher", "AES128-SHA:AES256-GCM-SHA384:ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0"]):
        assert "Cipher is (NONE)" in site.openssl(*refused), refused


def test_certificates_by_name_and_renewed(site: Site) -> None:
    """RFC 6066 section 3: names in any case; one that is not known gets the default. A pair that is replaced is served without a reload."""
    for name in ("mail.other.example", "MAIL.Other.Example"):
        assert site.served(name) == site.other.certificate
    for name in ("mx.example.test", "elsewhere.example"):
        assert site.served(name) == site.own.certificate
    new = site.authority.issue("mail.other.example")
    for file, source in zip(site.other, new, strict=True):
        os.replace(source, file)
    until(lambda: site.served("mail.other.example") == new.certificate, "renewed certificate")
    assert site.served("mx.example.test") == site.own.certificate


@pytest.mark.parametrize("how", [["-tls1_2", "-no_ticket"], ["-tls1_2"]])
def test_sessions_that_ended_well_are_resumed(site: Site, how: list[str]) -> None:
    """By their number or a ticket; a session that was not ended by close_notify could not be."""
    first = site.openssl(*how, "-sess_out", "session", "-quiet")
    assert "221 2.0.0" in first and "unexpected eof" not in first
    assert "Reused, TLSv1.2" in site.openssl(*how, "-sess_in", "session")


def test_client_certificates(site: Site, tmp_path: Path) -> None:
    """Who is named may relay; others of the authority are served as ever; one of another authority is not."""
    say = "EHLO client.example.com\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@foreign.example>\r\nQUIT\r\n"

    def told(issued: tuple[str, str] | None, version: str) -> str:
        pair = ["-cert", issued[0], "-key", issued[1]] if issued else []
        return site.openssl("-quiet", version, *pair, say=say)

    stranger = Authority(tmp_path, "Another authority").issue("relay.partner.example")
    for version in ("-tls1_2", "-tls1_3"):
        assert "250 2.1.5" in told(site.authority.issue("relay.partner.example"), version)
        assert "550 5.7.1" in told(site.authority.issue("else.partner.example"), version)
        assert "550 5.7.1" in told(None, version)
        heard = told(stranger, version)
        assert "alert" in heard and "221" not in heard
