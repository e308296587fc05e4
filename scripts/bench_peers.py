"""What stands around the servers that scripts/bench measures: those who take mail, DNS, keys, PostgreSQL, and how processes are read.

`Sink` (smtp-sink) and `Hooks` (HTTP) count the messages that they take. All listen on loopback alone and end with `close`. What is not
installed ends the run; bench asks before.
"""

from __future__ import annotations

import glob
import mmap
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
SOURCE_PATH = ":".join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *sorted(glob.glob("/usr/lib/postgresql/*/bin"))])
# Not under .test: libunbound, which opendkim uses, answers for that by itself
DOMAIN, SELECTOR = "load.example", "s2048"
SPREAD = 50  # domains, each with an MX host of its own
SPREAD_NET = "127.0.58"
SIGNATURES = 50  # of a stranger's message in deaf


def program(name: str) -> str:
    """A program's path; ends the run where it is missing."""
    found = shutil.which(name, path=SOURCE_PATH)
    if found is None:
        sys.exit(f"bench: {name} is not installed")
    return found


def free_port() -> int:
    """A loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], host: str = "127.0.0.1") -> None:
    """Until a server answers with a banner."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with socket.create_connection((host, port), 1) as connection:
                if connection.recv(4):
                    return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server does not answer")


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def cpu_s(root: int) -> float:
    """CPU seconds of a process family, with those that have ended and were waited for."""
    total = 0
    for pid in family(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(int(field) for field in fields[11:15])
    return total / TICK


def memory_kb(root: int, *, alone: bool = False) -> int:
    """Proportional set size of a process, with its family."""
    total = 0
    for pid in [root] if alone else family(root):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        match = re.search(r"^Pss:\s+(\d+)", text, re.M)
        total += int(match[1]) if match else 0
    return total


# --- who takes mail -----------------------------------------------------------------------------------------------


class Sink:
    """smtp-sink at one port of some addresses, and how many messages it has taken."""

    def __init__(self, port: int, hosts: Sequence[str] = ("127.0.0.1",), *, lmtp: bool = False) -> None:
        self._counts = [0] * len(hosts)
        user = ["-u", "nobody"] if os.getuid() == 0 else []
        self._processes = [subprocess.Popen([program("smtp-sink"), "-c", *user, *(["-L"] if lmtp else []), f"{host}:{port}", "1024"],
                                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for host in hosts]
        threading.Thread(target=self._read, daemon=True).start()
        try:
            for host, process in zip(hosts, self._processes, strict=True):
                wait_for_port(port, process, host)
        except RuntimeError as error:
            self.close()
            sys.exit(f"bench: smtp-sink: {error}")

    @property
    def count(self) -> int:
        """Messages taken so far."""
        return sum(self._counts)

    def _read(self) -> None:
        poll = select.epoll()
        numbers = {}
        for number, process in enumerate(self._processes):
            assert process.stdout is not None
            numbers[process.stdout.fileno()] = number
            poll.register(process.stdout, select.EPOLLIN)
        rests = [b""] * len(numbers)
        while numbers:
            for file, _ in poll.poll():
                piece = os.read(file, 65536)
                number = numbers[file]
                if not piece:
                    poll.unregister(file)
                    del numbers[file]
                    continue
                said, _, rests[number] = (rests[number] + piece).rpartition(b"\r")
                found = re.findall(rb"mesg=(\d+)", said)
                if found:
                    self._counts[number] = int(found[-1])

    def close(self) -> None:
        """Ends it."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()


class Hooks:
    """An HTTP/1.1 server in a process of its own that says 204 to each request, and how many it has had."""

    def __init__(self, port: int) -> None:
        self._shared = mmap.mmap(-1, 8)
        listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._pid = os.fork()
        if not self._pid:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._serve(listener)
            finally:
                os._exit(1)
        listener.close()

    @property
    def count(self) -> int:
        """Requests answered so far."""
        return int(memoryview(self._shared).cast("Q")[0])

    def _serve(self, listener: socket.socket) -> None:
        poll, counter = select.epoll(), memoryview(self._shared).cast("Q")
        clients: dict[int, tuple[socket.socket, Requests]] = {}
        poll.register(listener, select.EPOLLIN)
        while True:
            for file, _ in poll.poll():
                if file == listener.fileno():
                    client = listener.accept()[0]
                    clients[client.fileno()] = client, Requests()
                    poll.register(client, select.EPOLLIN)
                    continue
                client, requests = clients[file]
                try:
                    piece = client.recv(262144)
                except OSError:
                    piece = b""
                if not piece:
                    poll.unregister(client)
                    del clients[file]
                    client.close()
                elif ended := requests.ended(piece):
                    counter[0] += ended
                    client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n" * ended)

    def close(self) -> None:
        """Ends it."""
        os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)


class Requests:
    """The requests on one connection, by their Content-Length."""

    _length = re.compile(rb"\ncontent-length: *(\d+)", re.I)

    def __init__(self) -> None:
        self._header = b""  # of a request, as far as it has come
        self._missing = 0  # octets of a body

    def ended(self, piece: bytes) -> int:
        """How many requests these octets complete."""
        ended = 0
        while piece:
            if self._missing:
                used = min(self._missing, len(piece))
                self._missing -= used
                piece = piece[used:]
            else:
                self._header, end, piece = (self._header + piece).partition(b"\r\n\r\n")
                if not end:
                    break
                match = self._length.search(self._header)
                self._header, self._missing = b"", int(match[1]) if match else 0
            ended += not self._missing
        return ended


class DeafNames:
    """A name server that is there and never answers: a socket that nobody reads."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Ends it."""
        self._socket.close()


class Names:
    """unbound with these records, at `address` and, for programs that know port 53 only, at `host`."""

    host = "127.0.57.53"

    def __init__(self, directory: Path, records: Sequence[str]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        lines = "\n".join(f"  local-data: '{record}'" for record in records)
        interfaces = [self.address.replace(":", "@"), *([f"{self.host}@53"] if os.getuid() == 0 else [])]
        (directory / "unbound.conf").write_text(f"""
server:
{chr(10).join(f"  interface: {interface}" for interface in interfaces)}
  access-control: 127.0.0.0/8 allow
  do-daemonize: no
  chroot: ""
  username: ""
  directory: "{directory}"
  pidfile: ""
  use-syslog: no
  local-zone: "." static
{lines}
remote-control:
  control-enable: no
""")
        self._process = subprocess.Popen([program("unbound"), "-d", "-c", str(directory / "unbound.conf")], stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()


def spread_hosts() -> list[str]:
    """Where the MX hosts of the job spread are."""
    return [f"{SPREAD_NET}.{number + 1}" for number in range(SPREAD)]


def spread_records() -> list[str]:
    """Their domains: d0 to d49 of DOMAIN, an MX host each."""
    records = []
    for number, host in enumerate(spread_hosts()):
        domain = f"d{number}.{DOMAIN}"
        records += [f"{domain}. IN MX 10 mx.{domain}.", f"mx.{domain}. IN A {host}"]
    return records


class Signature:
    """An RSA-2048 key in `directory`, and a message of 5 KB signed with it, as smtp-source takes it."""

    def __init__(self, directory: Path) -> None:
        from base64 import b64encode

        import dkim
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        key = rsa.generate_private_key(65537, 2048)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
        public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self._public = b64encode(public).decode("ascii")
        self.key = directory / "keys" / DOMAIN / f"{SELECTOR}.pem"
        self.key.parent.mkdir(parents=True)
        self.key.write_bytes(private)
        self.key.chmod(0o640 if os.getuid() == 0 else 0o600)
        fields = {"From": f"Load <load@{DOMAIN}>", "To": "<auth@bench.test>", "Subject": "a signed message", "Date": time.strftime(
            "%a, %d %b %Y %H:%M:%S +0000", time.gmtime()), "Message-ID": f"<signed.1@{DOMAIN}>", "MIME-Version": "1.0",
            "Content-Type": "text/plain; charset=us-ascii"}
        text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        text += "\r\n" + "".join(f"Line {number:04d} of a body that is five kilobytes long in all, as others are.\r\n" for number in range(68))
        signature = dkim.sign(text.encode(), SELECTOR.encode(), DOMAIN.encode(), private, canonicalize=(b"relaxed", b"relaxed"),
                              include_headers=[name.lower().encode() for name in fields])
        self.message = directory / "signed.eml"
        self._signature, self._text = signature, text.encode()
        self.message.write_bytes((signature + self._text).replace(b"\r\n", b"\n"))
        self.message.chmod(0o644)

    def records(self) -> list[str]:
        """What DNS has to say for the message to pass SPF, DKIM and DMARC."""
        text = f"v=DKIM1; k=rsa; p={self._public}"
        return [f'{SELECTOR}._domainkey.{DOMAIN}. IN TXT {" ".join(chr(34) + text[at:at + 250] + chr(34) for at in range(0, len(text), 250))}',
                f'{DOMAIN}. IN TXT "v=spf1 ip4:127.0.0.1 -all"', f'_dmarc.{DOMAIN}. IN TXT "v=DMARC1; p=reject; adkim=s; aspf=s"',
                f'mx.{DOMAIN}. IN TXT "v=spf1 a -all"', f"mx.{DOMAIN}. IN A 127.0.0.1", f"{DOMAIN}. IN MX 10 mx.{DOMAIN}."]

    def strange(self, number: int) -> tuple[str, bytes]:
        """(sender, message with CRLF) of a domain of its own, with SIGNATURES signatures whose keys it would take as many questions to have."""
        domain = f"s{number}.{DOMAIN}"
        fields = b"".join(self._signature.replace(SELECTOR.encode(), f"{SELECTOR}-{one}".encode()) for one in range(SIGNATURES))
        return f"load@{domain}", (fields + self._text).replace(DOMAIN.encode(), domain.encode())


class Database:
    """PostgreSQL as it comes (so it syncs), in `directory`; `process` is the postmaster, `url` has the password."""

    def __init__(self, directory: Path) -> None:
        owner: dict[str, Any] = {}
        if os.getuid() == 0:
            postgres = pwd.getpwnam("postgres")
            owner = {"user": postgres.pw_uid, "group": postgres.pw_gid, "extra_groups": []}
        data, word, password = directory / "postgresql", directory / "password", secrets.token_hex(16)
        data.mkdir(mode=0o700)
        word.touch(mode=0o600)
        word.write_text(password)
        if owner:
            for path in (data, word):
                os.chown(path, owner["user"], owner["group"])
        subprocess.run([program("initdb"), "-D", str(data), "-U", "gmta", "-A", "scram-sha-256", "--pwfile", str(word),
                        "-E", "UTF8", "--locale", "C.UTF-8"], check=True, cwd=data, stdout=subprocess.DEVNULL, **owner)
        port = free_port()
        self.url = f"postgresql://gmta:{password}@127.0.0.1:{port}/postgres"
        with open(directory / "postgresql.log", "wb") as log:
            self.process = subprocess.Popen([program("postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", ""], stdout=log,
                                            stderr=log, cwd=data, start_new_session=True, **owner)
        end = time.monotonic() + 30
        while subprocess.run([program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)], check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                sys.exit("bench: PostgreSQL does not start:\n" + (directory / "postgresql.log").read_text()[-2000:])
            time.sleep(0.05)

    def close(self) -> None:
        """Ends it, and the sessions that are left."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait()
