"""plugins/auth_ldap.py against OpenLDAP's slapd, a child with a configuration, ports and data of its own."""

from __future__ import annotations

import signal
import smtplib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmta.hookspecs import Credentials
from gmta.mail.verdict import Verdict
from gmta.testing import FakeClock, load_plugin, make_services, make_session
from gmta.testing.authority import Authority
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, listens, program, until

pytestmark = pytest.mark.e2e

BASE = "dc=example,dc=test"
ADMIN, ADMIN_SECRET = f"cn=reader,{BASE}", "reading"
SECRET = "sécret word"
ENTRIES = f"""
dn: {BASE}
objectClass: dcObject
objectClass: organization
dc: example
o: Example

dn: {ADMIN}
objectClass: organizationalRole
objectClass: simpleSecurityObject
cn: reader
userPassword: {ADMIN_SECRET}

dn: ou=people,{BASE}
objectClass: organizationalUnit
ou: people

dn: uid=alice,ou=people,{BASE}
objectClass: inetOrgPerson
uid: alice
cn: Alice
sn: A
mail: Alice@Example.test
mail: info@example.test
labeledURI: office@example.org
labeledURI: SMTP:Sales@example.org
userPassword: {SECRET}

dn: uid=star*(x)\\\\,ou=people,{BASE}
objectClass: inetOrgPerson
uid: star*(x)\\
cn: Star
sn: S
mail: star@example.test
userPassword: {SECRET}

dn: uid=one,ou=people,{BASE}
objectClass: inetOrgPerson
uid: one
uid: twin
cn: One
sn: O
mail: one@example.test
userPassword: {SECRET}

dn: uid=two,ou=people,{BASE}
objectClass: inetOrgPerson
uid: two
uid: twin
cn: Two
sn: T
mail: two@example.test
userPassword: {SECRET}

dn: uid=nameless,ou=people,{BASE}
objectClass: inetOrgPerson
uid: nameless
cn: Nameless
sn: N
userPassword: {SECRET}

dn: uid=locked,ou=people,{BASE}
objectClass: inetOrgPerson
uid: locked
cn: Locked
sn: L
mail: locked@example.test
"""


class Slapd:
    """A directory: plain with StartTLS on `port`, TLS at once on `tls_port`."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / "slapd"
        (self._folder / "data").mkdir(parents=True)
        self.port, self.tls_port = free_port(), free_port()
        self.authority = Authority(self._folder, "Directory authority")
        certificate, key = self.authority.issue("localhost", "127.0.0.1")
        self._config = self._folder / "slapd.conf"
        self._config.write_text(f"""
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
modulepath /usr/lib/ldap
moduleload back_mdb
pidfile {self._folder}/pid
argsfile {self._folder}/args
TLSCertificateFile {certificate}
TLSCertificateKeyFile {key}
TLSCACertificateFile {self.authority.file}
database mdb
suffix "{BASE}"
directory {self._folder}/data
access to attrs=userPassword by anonymous auth by * none
access to * by dn.exact="{ADMIN}" read by * none
""")
        self.elsewhere = socket.create_server(("127.0.0.1", 0))  # where a referral points
        self.elsewhere.setblocking(False)
        referral = f"""
dn: ou=elsewhere,{BASE}
objectClass: referral
objectClass: extensibleObject
ou: elsewhere
ref: ldap://127.0.0.1:{self.elsewhere.getsockname()[1]}/ou=elsewhere,{BASE}
"""
        (self._folder / "entries.ldif").write_text(ENTRIES + referral)
        subprocess.run([program("slapadd"), "-q", "-f", str(self._config), "-l", str(self._folder / "entries.ldif")], check=True,
                       capture_output=True, timeout=DEADLINE_S)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([program("slapd"), "-d", "0", "-f", str(self._config), "-h",
                                          f"ldap://127.0.0.1:{self.port} ldaps://127.0.0.1:{self.tls_port}"])
        until(lambda: listens(self.port) and listens(self.tls_port), "slapd")

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(DEADLINE_S)
            self._process = None

    def close(self) -> None:
        self.stop()
        self.elsewhere.close()


@pytest.fixture
def slapd(directory: Path) -> Iterator[Slapd]:
    """A directory with the entries above."""
    server = Slapd(directory)
    yield server
    server.close()


def client(slapd: Slapd, **keys: Any) -> Any:
    services = make_services(clock=FakeClock())
    return load_plugin("auth_ldap", services, **{
        "urls": f"ldap://localhost:{slapd.port}", "ca_file": slapd.authority.file, "bind_dn": ADMIN, "bind_password": ADMIN_SECRET,
        "base_dn": BASE, **keys})


def ask(plugin: Any, user: str = "alice@example.test", secret: str = SECRET) -> tuple[Verdict | None, str]:
    credentials = Credentials("PLAIN", user, secret)
    return plugin.permit_auth(make_session(role="submission", tls=True), credentials), credentials.user


def test_right_and_wrong(slapd: Slapd) -> None:
    for urls in (f"ldap://localhost:{slapd.port}", f"ldaps://localhost:{slapd.tls_port}", f"ldaps://127.0.0.1:{slapd.tls_port}"):
        plugin = client(slapd, urls=urls)
        verdict, user = ask(plugin, "ALICE@example.TEST")
        assert verdict is not None and user == "alice@example.test"
        assert ask(plugin, "info@example.test")[1] == "info@example.test"
        for name, secret in (("alice@example.test", "wrong"), ("alice@example.test", ""), ("alice@example.test", SECRET + "x"),
                             ("nobody@example.test", SECRET), ("", SECRET), ("locked@example.test", SECRET), ("locked@example.test", "")):
            assert ask(plugin, name, secret)[0] is None, (name, secret)
        assert ask(plugin)[0] is not None
        assert len(plugin._searching) == len(plugin._binding) == 1  # all by two connections


def test_names_are_values_and_nothing_more(slapd: Slapd) -> None:
    plugin = client(slapd, filter="(&(objectClass=inetOrgPerson)(uid={local}))")
    assert ask(plugin, "star*(x)\\")[1] == "star@example.test"
    assert ask(plugin, "alice@anywhere.example")[1] == "alice@example.test"
    for name in ("ali*", "*", "alice)(uid=*", "*)(|(uid=alice", "alice\\2a", "alice\0", "\\61lice", "al\\ice", "\u00e4", "{user}", "{local}"):
        assert ask(plugin, name)[0] is None, name
    assert ask(plugin, "twin")[0] is None  # of two, nobody knows which
    with pytest.raises(Exception, match="has no mail"):
        ask(plugin, "nameless")


def test_referrals_are_not_followed(slapd: Slapd) -> None:
    """Whoever writes to the directory would learn passwords."""
    plugin = client(slapd)
    assert ask(plugin)[0] is not None
    assert ask(plugin, "elsewhere@example.test")[0] is None
    with pytest.raises(Exception, match="referral"):
        ask(client(slapd, base_dn=f"ou=elsewhere,{BASE}"))
    with pytest.raises(BlockingIOError):
        slapd.elsewhere.accept()


def test_addresses_are_left_for_others(slapd: Slapd) -> None:
    plugin = client(slapd, address_attributes="mail, labeledURI")
    session = make_session(role="submission", tls=True)
    assert plugin.permit_auth(session, Credentials("LOGIN", "alice@example.test", SECRET)) is not None
    assert session.notes["addresses"] == ("alice@example.test", {"alice@example.test", "info@example.test", "office@example.org", "sales@example.org"})


def test_a_directory_that_is_down_or_not_the_one(slapd: Slapd, directory: Path) -> None:
    plugin = client(slapd)
    assert ask(plugin)[0] is not None
    slapd.stop()
    with pytest.raises(Exception, match="refused"):
        ask(plugin)
    slapd.start()
    assert ask(plugin)[0] is not None  # by a new connection: the kept ones are dead
    for keys in ({"ca_file": Authority(directory, "Another").file}, {"bind_password": "wrong"}, {"base_dn": "dc=elsewhere,dc=test"},
                 {"bind_dn": "", "bind_password": ""}):
        with pytest.raises(Exception, match=r"localhost|ended with"):
            ask(client(slapd, **keys))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        plugin = client(slapd, urls=f"ldaps://127.0.0.1:{closed.getsockname()[1]}, ldap://localhost:{slapd.port}")
        assert ask(plugin)[0] is not None


def test_over_the_whole_server(gmta: Gmta, slapd: Slapd) -> None:
    authority = Authority(gmta.directory)
    certificate, key = authority.issue("localhost")
    gmta.serve(gmta.configuration(f"""
[listener:submission]
address = 127.0.0.1:{gmta.submission_port}
role = submission
[tls]
certificate = {certificate}
key = {key}
[plugins]
enable = auth_ldap, sender_login, mailboxes, access
[plugin:auth_ldap]
urls = ldaps://localhost:{slapd.tls_port}
ca_file = {slapd.authority.file}
bind_dn = {ADMIN}
bind_password = {ADMIN_SECRET}
base_dn = {BASE}
address_attributes = mail
request_timeout = 5s
"""))

    def login(secret: str = SECRET) -> tuple[smtplib.SMTP, int]:
        link = smtplib.SMTP("localhost", gmta.submission_port, timeout=DEADLINE_S)
        link.starttls(context=ssl.create_default_context(cafile=authority.file))
        link.ehlo()
        return link, link.docmd("AUTH PLAIN " + smtplib.encode_base64(f"\0alice@example.test\0{secret}".encode(), eol=""))[0]

    link, code = login()
    assert code == 235
    for sender, expected in (("info@example.test", 250), ("one@example.test", 553)):
        assert link.docmd(f"MAIL FROM:<{sender}>")[0] == expected
        link.docmd("RSET")
    link.quit()
    link, code = login("wrong")
    assert code == 535
    slapd.signal(signal.SIGSTOP)  # takes connections and says nothing: 454 at the deadline, and others are served meanwhile
    hanging = threading.Thread(target=lambda: codes.append(login()[1]))
    codes: list[int] = []
    hanging.start()
    with smtplib.SMTP("127.0.0.1", gmta.port, timeout=DEADLINE_S) as other:
        other.sendmail("a@example.com", ["one@example.test"], "Subject: x\n\nx\n")
    assert codes == []
    hanging.join(DEADLINE_S)
    assert codes == [454]
    slapd.signal(signal.SIGCONT)
    slapd.stop()
    assert link.docmd("AUTH PLAIN " + smtplib.encode_base64(b"\0alice@example.test\0x", eol="")) == (454, b"4.7.0 Temporary authentication failure")
    link.close()
    assert SECRET not in (gmta.directory / "gmta.log").read_text()
