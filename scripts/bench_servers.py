"""The servers that scripts/bench measures: gmta and Postfix, each with a private configuration and spool on loopback ports.

`Setup` says for which job; a server writes its configuration, starts, and tells what it has used. Both sync as they do by default.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from bench_peers import (
    DOMAIN,
    SELECTOR,
    Database,
    DeafNames,
    Names,
    Signature,
    cpu_s,
    free_port,
    memory_kb,
    program,
    wait_for_port,
)


@dataclass
class Setup:
    """What a server is started for. boxes: names of the Maildirs.  idle: sessions that stay.  nodes: how many share one queue."""

    job: str
    boxes: tuple[str, ...]
    sink_port: int
    idle: int = 0
    nodes: int = 1
    signature: Signature | None = None
    names: Names | DeafNames | None = None
    database: Database | None = None


class Server(ABC):
    """A server in a fresh directory; mail for bench.test goes to `mail`/NAME/new, all other to the sink."""

    name = ""

    def __init__(self, directory: Path, setup: Setup) -> None:
        self.directory = directory
        self.setup = setup
        self.ports = [free_port() for _ in range(setup.nodes)]
        self.mail = directory / "mail"
        self.processes: list[subprocess.Popen[bytes]] = []

    @abstractmethod
    def commands(self) -> list[list[str]]:
        """Writes what the server needs; what starts each node in the foreground."""

    def start(self) -> None:
        """Starts it and waits for the banner."""
        commands = self.commands()
        with open(self.directory / "output", "ab") as output:
            self.processes = [subprocess.Popen(command, stdout=output, stderr=output, cwd=self.directory,
                                               start_new_session=True) for command in commands]  # master signals its whole process group
        try:
            for port, process in zip(self.ports, self.processes, strict=True):
                wait_for_port(port, process)
        except RuntimeError as error:
            self.stop()
            sys.exit(f"bench: {self.name}: {error}\n{self.said()}")

    def said(self) -> str:
        """What its logs complain of first, and their ends."""
        texts = [file.read_text(errors="replace") for file in [self.directory / "output", *self.directory.glob("log*")] if file.exists()]
        complaints = [line for text in texts for line in text.splitlines() if re.search(r"error|warning|panic|fatal|Traceback", line)]
        return "\n".join([*complaints[:20], *(text[-2000:] for text in texts)])

    def stop(self) -> None:
        """SIGTERM, and to the end."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def cpu_s(self) -> float:
        """CPU seconds so far of all its processes, the database's too."""
        return sum(cpu_s(process.pid) for process in self.processes) + self.database_cpu_s()

    def database_cpu_s(self) -> float:
        """The database's part of them."""
        return cpu_s(self.setup.database.process.pid) if self.setup.database is not None else 0.0

    def memory_kb(self) -> int:
        """Proportional set size of all its processes."""
        return sum(memory_kb(process.pid) for process in self.processes)


class Gmta(Server):
    """This repository's gmta, by the Python that runs it or $GMTA_PYTHON."""

    name = "gmta"

    def commands(self) -> list[list[str]]:
        python = os.environ.get("GMTA_PYTHON", sys.executable)
        return [[python, "-m", "gmta", "serve", "-c", str(self._configuration(node))] for node in range(len(self.ports))]

    def data(self, node: int = 0) -> Path:
        """A node's data_dir."""
        return self.directory / f"var{node + 1}"

    def _configuration(self, node: int) -> Path:
        setup, port = self.setup, self.setup.sink_port
        plugins, more = "", ""
        if setup.job in ("auth", "deaf"):
            plugins = ", spf, dkim_verify, dmarc"
        elif setup.job == "sign":
            plugins, more = ", dkim_sign", f"[plugin:dkim_sign]\nkeys = {self.directory}/keys/{{domain}}/{{selector}}.pem\n"
        outbound = {
            "spread": f"type = relay\nport = {port}\nallow_loopback = yes",
            "lmtp": f"type = lmtp\nhost = 127.0.0.1:{port}",
            "webhook": f"type = webhook\nurl = http://127.0.0.1:{port}/mail\nallow_private = yes\nsecret = whsec_{b64encode(bytes(24)).decode()}",
        }.get(setup.job, f"type = relay\nhost = 127.0.0.1:{port}")
        if setup.names is not None:
            more += f"[dns]\nservers = {setup.names.address}\n"
        if setup.database is not None:
            more += f"[queue]\nstore = {setup.database.url}\nnode = n{node + 1}\n"
        path = self.directory / f"config{node + 1}.ini"
        path.touch(mode=0o600)
        path.write_text(f"""
[gmta]
hostname = mx{node + 1}.bench.test
workers = {max(1, (os.cpu_count() or 1) // len(self.ports))}
data_dir = {self.data(node)}
log_file = {self.directory}/log{node + 1}
[listener:mx]
address = 127.0.0.1:{self.ports[node]}
[domains]
local = bench.test
relay_from = {"" if setup.job == "auth" else "127.0.0.1" if setup.job == "deaf" else "127.0.0.0/8"}
[plugins]
enable = mailboxes, access, received_limit{plugins}
{more}
[plugin:mailboxes]
accept = any
[transport:mailbox]
type = maildir
path = {self.mail}/{{local}}
[transport:outbound]
{outbound}
[route]
local = mailbox
* = outbound
""")
        return path


class Postfix(Server):
    """Postfix as Debian builds it; no chroot, its own queue, the virtual(8) agent for Maildirs."""

    name = "postfix"

    def commands(self) -> list[list[str]]:
        if os.getuid() != 0:
            sys.exit("bench: Postfix needs root (or --servers gmta)")
        nobody = pwd.getpwnam("nobody")
        postfix = pwd.getpwnam("postfix")
        config = self.directory / "conf"
        for path, owner in ((config, 0), (self.directory / "queue", 0), (self.directory / "data", postfix.pw_uid),
                            (self.mail, nobody.pw_uid)):
            path.mkdir(parents=True)
            os.chown(path, owner, -1)
        daemons = subprocess.run([program("postconf"), "-h", "daemon_directory"], capture_output=True, text=True,
                                 check=True).stdout.strip()
        command = [f"{daemons}/master", "-c", str(config), "-d"]
        milters, policy, before = self._beside()
        boxes = ", ".join(f"{name}@bench.test={name}/" for name in self.setup.boxes)
        next_hop = f"smtp:[127.0.0.1]:{self.setup.sink_port}"
        lookups = "smtp_dns_support_level = disabled\nsmtp_host_lookup = native"
        if self.setup.job == "lmtp":
            next_hop = f"lmtp:inet:127.0.0.1:{self.setup.sink_port}"
        elif self.setup.job == "spread":
            lookups = f"smtp_tcp_port = {self.setup.sink_port}"
        (config / "main.cf").write_text(f"""
compatibility_level = 3.6
queue_directory = {self.directory}/queue
data_directory = {self.directory}/data
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
myhostname = mx.bench.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
virtual_mailbox_domains = bench.test
virtual_mailbox_base = {self.mail}
virtual_mailbox_maps = inline:{{{boxes}}}
virtual_mailbox_limit = 0
virtual_uid_maps = static:{nobody.pw_uid}
virtual_gid_maps = static:{nobody.pw_gid}
transport_maps = inline:{{sink.test={next_hop}}}
message_size_limit = 36700160
smtpd_client_connection_count_limit = 0
smtpd_peername_lookup = no
{lookups}
maillog_file = {self.directory}/log
maillog_file_prefixes = {self.directory}
{milters}
""")
        services = [f"127.0.0.1:{self.ports[0]} inet n - n - {self.setup.idle + 100 if self.setup.idle else '-'} smtpd",
                    "pickup unix n - n 60 1 pickup", "cleanup unix n - n - 0 cleanup", "qmgr unix n - n 300 1 qmgr",
                    "tlsmgr unix - - n 1000? 1 tlsmgr", "rewrite unix - - n - - trivial-rewrite",
                    "bounce unix - - n - 0 bounce", "defer unix - - n - 0 bounce", "trace unix - - n - 0 bounce",
                    "verify unix - - n - 1 verify", "flush unix n - n 1000? 0 flush", "proxymap unix - - n - - proxymap",
                    "proxywrite unix - - n - 1 proxymap", "smtp unix - - n - - smtp", "relay unix - - n - - smtp",
                    "lmtp unix - - n - - lmtp", "error unix - - n - - error", "retry unix - - n - - error", "discard unix - - n - - discard",
                    "local unix - n n - - local", "virtual unix - n n - - virtual", "anvil unix - - n - 1 anvil",
                    "scache unix - - n - 1 scache", "showq unix n - n - - showq",
                    "postlog unix-dgram n - n - 1 postlogd", *policy]
        (config / "master.cf").write_text("\n".join(services) + "\n")
        subprocess.run([program("postfix"), "-c", str(config), "check"], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        return [[*before, *command]]

    def _beside(self) -> tuple[str, list[str], list[str]]:
        """(lines of main.cf, lines of master.cf, what stands before the command) where there is DNS: for milters and policy service, and itself."""
        if self.setup.names is None:
            return "", [], []
        folder, starts, milters = self.directory, [], []
        settings, policy = "", []
        run = folder / "run"
        run.mkdir()
        run.chmod(0o777)
        (folder / "resolv.conf").write_text(f"nameserver {Names.host}\n")
        (folder / "nobody").write_text("192.0.2.1\n")
        shared = "Syslog no\nAuthservID mx.bench.test\nUMask 000\nUserID opendkim\n"
        if self.setup.job == "sign" and self.setup.signature is not None:
            key = self.setup.signature.key
            shutil.chown(key, group="opendkim")
            (folder / "opendkim.conf").write_text(f"Mode s\nSocket local:{run}/dkim\nDomain {DOMAIN}\nSelector {SELECTOR}\nKeyFile {key}\n"
                                                  f"Canonicalization relaxed/relaxed\nRequireSafeKeys no\nInternalHosts 127.0.0.1\n{shared}")
            starts, milters = [f"{program('opendkim')} -f -x {folder}/opendkim.conf"], ["dkim"]
        elif self.setup.job == "auth":
            (folder / "opendkim.conf").write_text(f"Mode v\nSocket local:{run}/dkim\nNameservers {Names.host}\nAlwaysAddARHeader yes\n"
                                                  f"InternalHosts {folder}/nobody\nExternalIgnoreList {folder}/nobody\n{shared}")
            (folder / "opendmarc.conf").write_text(f"Socket local:{run}/dmarc\nUMask 000\nAuthservID mx.bench.test\nTrustedAuthservIDs mx.bench.test\n"
                                                   f"IgnoreHosts {folder}/nobody\nSyslog no\nRejectFailures true\nUserID opendmarc\nPidFile {run}/pid\n")
            (folder / "spf.conf").write_text("debugLevel = 0\nTestOnly = 1\nHELO_reject = Fail\nMail_From_reject = Fail\nPermError_reject = False\n"
                                             "TempError_Defer = False\nskip_addresses = 192.0.2.0/24\nHeader_Type = SPF\n")
            starts = [f"{program('opendkim')} -f -x {folder}/opendkim.conf", f"{program('opendmarc')} -f -c {folder}/opendmarc.conf"]
            milters = ["dkim", "dmarc"]
            settings = "smtpd_recipient_restrictions = reject_unauth_destination, check_policy_service unix:private/policyd-spf\nmynetworks =\n"
            policy = [f"policyd-spf unix - n n - 0 spawn user=nobody argv={program('policyd-spf')} {folder}/spf.conf"]
        waits = " ".join(f"for i in $(seq 100); do [ -S {run}/{name} ] && break; sleep .1; done;" for name in milters)
        script = f'mount --bind {folder}/resolv.conf /etc/resolv.conf || exit; {" ".join(f"{start} &" for start in starts)} {waits} exec "$@"'
        if milters:
            settings += f"smtpd_milters = {' '.join(f'unix:{run}/{name}' for name in milters)}\nmilter_default_action = tempfail\n"
        return settings, policy, ["unshare", "-m", "sh", "-c", script, "sh"]


SERVERS = {server.name: server for server in (Gmta, Postfix)}
