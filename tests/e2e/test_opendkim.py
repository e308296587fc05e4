"""gmta and opendkim: each verifies what the other signs, on generated messages with odd headers, folds, 8-bit and long lines.

opendkim runs in its test mode, without network: keys come from a file (`TestPublicKeys`), messages from files.
"""

from __future__ import annotations

import os
import pwd
import re
import smtplib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gmta.mail.message import Message
from gmta.verify.dkim import verify
from gmta.verify.signing import SigningKey
from tests.e2e.conftest import DEADLINE_S, Gmta, free_port, listens, program, until
from tests.engine.test_verify_dkim import ED, PLAIN, RSA, messages, pem, signed, write, zone

pytestmark = pytest.mark.e2e

# in all 2 x 25 x 20 messages
BATCH = settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate],
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large,
                                        HealthCheck.large_base_example])
MANY = st.lists(messages(), min_size=20, max_size=20)


def opendkim(directory: Path, settings_text: str, raws: list[bytes]) -> list[str]:
    """What opendkim says of each message: the fields that it would insert."""
    config = directory / "opendkim.conf"
    config.write_text(f"Syslog no\nRequireSafeKeys no\n{settings_text}")
    found = []
    files = []
    for number, raw in enumerate(raws):
        files.append(directory / f"{number}.eml")
        files[-1].write_bytes(raw)
    done = subprocess.run([program("opendkim"), "-x", str(config), "-vv", "-t", ",".join(map(str, files))], capture_output=True,
                          timeout=DEADLINE_S, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    said = done.stdout.decode("latin-1")
    found = re.findall(r"^### INSHEADER: idx=\d+ hname='([^']+)' hvalue='(.*?)'$", said, re.M | re.S)
    assert len(found) == len(raws), said
    return [f"{name}: {value}" for name, value in found]


def verdicts(directory: Path, raws: list[bytes]) -> list[list[str]]:
    """opendkim's dkim= results of each message."""
    keys = directory / "keys"
    keys.write_text("".join(f"{key.record_name} {key.record()}\n" for key in (RSA, ED)))
    return [re.findall(r"\bdkim=(\w+)", field) for field in opendkim(directory, f"Mode v\nTestPublicKeys {keys}\n", raws)]


def test_opendkim_verifies_what_we_sign(tmp_path: Path) -> None:
    raws = [signed(), signed(keys=(RSA, ED)), signed(keys=(ED,)), signed(identity_domain="sub.example.com"), signed().replace(b"Bye", b"bye")]
    assert verdicts(tmp_path, raws) == [["pass"], ["pass", "pass"], ["pass"], ["pass"], ["fail"]]


@BATCH
@given(raws=MANY)
def test_opendkim_verifies_generated_messages(tmp_path: Path, raws: list[bytes]) -> None:
    assert verdicts(tmp_path, [signed(raw, (RSA, ED)) for raw in raws]) == [["pass", "pass"]] * len(raws)


def sign_by_opendkim(directory: Path, key: SigningKey, canonicalization: str, raws: list[bytes]) -> list[bytes]:
    """The messages with opendkim's signature on top."""
    file = directory / "key.pem"
    file.write_bytes(pem(key))
    os.chmod(file, 0o600)
    fields = opendkim(directory, f"Mode s\nDomain {key.domain}\nSelector {key.selector}\nKeyFile {file}\nSignatureAlgorithm {key.algorithm}\n"
                                 f"Canonicalization {canonicalization}\nOversignHeaders From\n", raws)
    return [re.sub(r"\r?\n", "\r\n", field).encode("latin-1") + b"\r\n" + raw for field, raw in zip(fields, raws, strict=True)]


@pytest.mark.parametrize("key,canonicalization", [
    (RSA, "relaxed/relaxed"), (RSA, "relaxed/simple"), (RSA, "simple/relaxed"), (RSA, "simple/simple"), (ED, "relaxed/relaxed"), (ED, "relaxed/simple"),
    # no Ed25519 with a simple header: opendkim 2.11 itself refuses what it signs so
])
def test_we_verify_what_opendkim_signs(tmp_path: Path, key: SigningKey, canonicalization: str) -> None:
    (raw,) = sign_by_opendkim(tmp_path, key, canonicalization, [PLAIN])
    for octets, expected in ((raw, "pass"), (raw.replace(b"Bye", b"bye"), "fail"), (raw.replace(b"Subject: H", b"Subject: h"), "fail")):
        (result,) = verify(Message.from_bytes(octets), zone(RSA, ED), now=9e9)
        assert result.result == expected, result.steps


@BATCH
@given(raws=MANY, canonicalization=st.sampled_from(["relaxed/relaxed", "relaxed/simple"]))
def test_we_verify_generated_messages(tmp_path: Path, raws: list[bytes], canonicalization: str) -> None:
    """No simple header: as a milter, opendkim doesn't see the blanks behind a colon, and takes them for one."""
    for raw in sign_by_opendkim(tmp_path, RSA, canonicalization, raws):
        (result,) = verify(Message.from_bytes(raw), zone(RSA), now=9e9)
        assert result.result == "pass", (raw, result.steps)


# --- through a running server ---------------------------------------------------------------------------------------

ODD = PLAIN.replace(b"Subject: Hello", "Subject: Grüße =?utf-8?q?x?=\r\n\tfolded  twice".encode()) + b".\r\n..dots\r\n\xff\xfe \t \r\n" + b"x" * 3000 + b"\r\n\r\n"


def serve(gmta: Gmta, relay_from: str, dns: str) -> None:
    for key in (RSA, ED):
        write(gmta.directory / f"etc/dkim/{key.domain}/{key.selector}.pem", pem(key))
    gmta.serve(gmta.configuration(f"""
[domains]
relay_from = {relay_from}
[plugins]
enable = mailboxes, access, dkim_verify, arc, dkim_sign
[route]
* = mailbox
[dns]
servers = {dns}
"""))


def passed_on(gmta: Gmta, raw: bytes, port: int = 0) -> bytes:
    """The message as it is delivered."""
    with smtplib.SMTP("127.0.0.1", port or gmta.port, timeout=DEADLINE_S) as client:
        client.sendmail("alice@example.com", ["bob@example.test"], raw, mail_options=["BODY=8BITMIME"])
    (file,) = gmta.arrived("bob")
    return re.sub(rb"(?<!\r)\n", b"\r\n", file.read_bytes())


def test_what_a_running_server_signs(gmta: Gmta, tmp_path: Path) -> None:
    with zone(RSA, ED).serve() as server:
        serve(gmta, "127.0.0.0/8", server.address)
        raw = passed_on(gmta, ODD)
    assert raw.count(b"\r\nDKIM-Signature:") == 2
    assert verdicts(tmp_path, [raw]) == [["pass", "pass"]]


def test_what_opendkim_signed_is_judged_and_passed_on_unchanged(gmta: Gmta, tmp_path: Path) -> None:
    (raw,) = sign_by_opendkim(tmp_path, RSA, "simple/simple", [ODD])
    with zone(RSA, ED).serve() as server:
        serve(gmta, "192.0.2.0/24", server.address)
        arrived = passed_on(gmta, raw)
    assert re.search(rb"Authentication-Results: mx\.example\.test;\s+dkim=pass [^;]*header\.d=example\.com", arrived), arrived[:1000]
    assert arrived.endswith(raw)
    assert verdicts(tmp_path, [arrived]) == [["pass"]]


@contextmanager
def child(*command: str, port: int) -> Iterator[None]:
    """A program that listens on a port, ended behind it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: process.poll() is None and listens(port), f"{command[0]} on its port")
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@contextmanager
def postfix(directory: Path, port: int, next_port: int, milter_port: int) -> Iterator[None]:
    """Postfix with the milter, which relays everything to the next port."""
    config = directory / "conf"
    for path, owner in ((config, 0), (directory / "queue", 0), (directory / "data", pwd.getpwnam("postfix").pw_uid)):
        path.mkdir()
        os.chown(path, owner, -1)
    daemons = subprocess.run([program("postconf"), "-h", "daemon_directory"], capture_output=True, text=True, check=True).stdout.strip()
    (config / "main.cf").write_text(f"""
compatibility_level = 3.6
queue_directory = {directory}/queue
data_directory = {directory}/data
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
myhostname = relay.example.net
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
relayhost = [127.0.0.1]:{next_port}
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtpd_milters = inet:127.0.0.1:{milter_port}
milter_default_action = tempfail
maillog_file = {directory}/log
maillog_file_prefixes = {directory}
""")
    services = [f"127.0.0.1:{port} inet n - n - - smtpd", "cleanup unix n - n - 0 cleanup", "qmgr unix n - n 300 1 qmgr",
                "rewrite unix - - n - - trivial-rewrite", "bounce unix - - n - 0 bounce", "defer unix - - n - 0 bounce",
                "trace unix - - n - 0 bounce", "verify unix - - n - 1 verify", "smtp unix - - n - - smtp", "relay unix - - n - - smtp",
                "error unix - - n - - error", "retry unix - - n - - error", "anvil unix - - n - 1 anvil", "proxymap unix - - n - - proxymap",
                "postlog unix-dgram n - n - 1 postlogd"]
    (config / "master.cf").write_text("\n".join(services) + "\n")
    subprocess.run([program("postfix"), "-c", str(config), "check"], check=True, capture_output=True)
    with child(f"{daemons}/master", "-c", str(config), "-d", port=port):
        yield


@pytest.mark.skipif(os.geteuid() != 0, reason="Postfix needs root")
@pytest.mark.parametrize("canonicalization", ["relaxed/relaxed", "simple/simple"])
def test_signed_by_opendkim_relayed_by_postfix_and_gmta(gmta: Gmta, directory: Path, canonicalization: str) -> None:
    """opendkim as Postfix's milter; the signature verifies where gmta delivers."""
    port, milter_port = free_port(), free_port()
    key, config = directory / "key.pem", directory / "opendkim.conf"
    write(key, pem(RSA))
    config.write_text(f"Syslog no\nRequireSafeKeys no\nUserID root\nMode s\nDomain example.com\nSelector sel\nKeyFile {key}\n"
                      f"Canonicalization {canonicalization}\nOversignHeaders From\nSignatureAlgorithm rsa-sha256\n")
    with zone(RSA, ED).serve() as server, \
            child(program("opendkim"), "-f", "-x", str(config), "-p", f"inet:{milter_port}@127.0.0.1", port=milter_port), \
            postfix(directory, port, gmta.port, milter_port):
        serve(gmta, "192.0.2.0/24", server.address)
        arrived = passed_on(gmta, ODD.replace(b"x" * 3000, b"x" * 900), port)
    assert re.search(rb"Authentication-Results: mx\.example\.test;\s+dkim=pass [^;]*header\.s=sel", arrived), arrived[:1500]
    (result,) = verify(Message.from_bytes(arrived), zone(RSA), now=9e9)
    assert result.result == "pass", result.steps
