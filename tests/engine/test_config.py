"""The configuration file: what it gives, what stands for what it lacks, and how exactly it complains."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest
from pydantic import BaseModel

from gmta import config
from gmta.config import Config, ConfigError, Section, load, validate

WHOLE = """\
[gmta]
hostname = mx.bench.test
data_dir = {dir}/var
workers = 2
[listener:mx]
address = 127.0.0.1:2510
role = mx
tls = off
[listener:submission]
address = 127.0.0.1:2587, [::1]:2587
role = submission
[domains]
local = bench.test, Bücher.example
relay_from = 127.0.0.0/8 ::1/128
[limits]
message_size = 50MB
connections = 12000
command_timeout = 1m30s
[queue]
store = sqlite
retry = 1s 2s 4s
[plugins]
enable = mailboxes, access, size_limit, received_limit
[plugin:mailboxes]
accept = any
[transport:mailbox]
type = maildir
path = {dir}/mail/{{domain}}/{{local}}
[transport:sink]
type = relay
host = 127.0.0.1
rate = 600/m
[route]
local = mailbox
user@bench.test = hold
.example.test = sink
* = sink
[dns]
servers = 127.0.0.1:5353
timeout = 2s
[metrics]
address = 127.0.0.1:9100
"""


def written(folder: Path, text: str, name: str = "config.ini") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def errors(folder: Path, text: str) -> list[str]:
    path = written(folder, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [error.replace(path, "F") for error in caught.value.errors]


def test_a_whole_file(tmp_path: Path) -> None:
    made = load(written(tmp_path, WHOLE.format(dir=tmp_path)))
    assert (made.gmta.hostname, made.gmta.workers, made.gmta.data_dir) == ("mx.bench.test", 2, f"{tmp_path}/var")
    assert made.listeners["mx"].addresses == [("127.0.0.1", 2510)]
    assert made.listeners["mx"].auth_required is False
    assert made.listeners["submission"].addresses == [("127.0.0.1", 2587), ("::1", 2587)]
    assert made.listeners["submission"].auth_required is True
    assert made.domains.local == {"bench.test", "xn--bcher-kva.example"}
    assert made.domains.relay_from == [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]
    assert (made.limits.message_size, made.limits.connections, made.limits.command_timeout) == (50 * 1024 ** 2, 12000, 90)
    assert made.queue.retry == [1, 2, 4]
    assert made.plugins.enable == ["mailboxes", "access", "size_limit", "received_limit"]
    assert made.plugin["mailboxes"]["accept"] == "any"
    assert made.transports["mailbox"]["path"].endswith("{domain}/{local}")
    assert made.route == {"local": "mailbox", "user@bench.test": "hold", ".example.test": "sink", "*": "sink"}
    assert (made.dns.timeout, made.dns.servers, made.metrics.address) == (2, ["127.0.0.1:5353"], ("127.0.0.1", 9100))


def test_an_empty_file_runs(tmp_path: Path) -> None:
    made = load(written(tmp_path, ""))
    assert made.gmta.hostname == config.domain_key(socket.getfqdn())
    assert made.gmta.workers >= 1
    assert made.gmta.data_dir == str(tmp_path / "var")
    assert made.listeners["mx"].addresses == [("127.0.0.1", 2525)]
    assert made.route == {"local": "mailbox", "*": "outbound"}
    assert made.domains.relay_from == []  # never an open relay by default
    assert made.limits.message_size == 35 * 1024 ** 2
    assert (made.limits.connections, made.limits.connections_per_ip, made.limits.connections_per_subnet) == (0, 50, 200)
    assert made.queue.retry == [300, 900, 1800, 3600, 7200, 14400]


def test_without_routes_the_first_maildir_and_the_first_relay_serve(tmp_path: Path) -> None:
    made = load(written(tmp_path, "[transport:out]\ntype=relay\n[transport:a]\ntype=maildir\n[transport:b]\ntype=maildir\n"))
    assert made.route == {"local": "a", "*": "out"}


@pytest.mark.parametrize(("text", "expected"), [
    ("[gmta]\nworker = 2\n", "F:2: [gmta] worker: unknown key (did you mean workers?)"),
    ("[gmta]\nworkers = many\n", "F:2: [gmta] workers: expected a whole number, not 'many'"),
    ("[gmta]\nworkers = 0\n", "F:2: [gmta] workers: expected greater than or equal to 1, not '0'"),
    ("[limit]\nhops = 5\n", "F:1: [limit]: unknown section (did you mean limits?)"),
    ("[limits]\nmessage_size = big\n", "F:2: [limits] message_size: expected a size such as 64KB, 35MB or 1GB, not 'big'"),
    ("\n[limits]\n; why\ndata_timeout = 5x\n",
     "F:4: [limits] data_timeout: expected a time such as 30s, 5m, 4h or 5d, not '5x'"),
    ("[listener:mx]\nrole = mx\n", "F:1: [listener:mx] address: expected to be given"),
    ("[listener:mx]\naddress = 1.2.3.4:25\ntls = startls\n",
     "F:3: [listener:mx] tls: expected one of 'starttls', 'required', 'implicit' or 'off', not 'startls' (did you mean starttls?)"),
    ("[listener:mx]\naddress = ::1:25\n",
     "F:2: [listener:mx] address: expected an address such as 127.0.0.1:2525 or [::1]:2525, not '::1:25'"),
    ("[domains]\nrelay_from = 10.0.0.1/8\n",
     "F:2: [domains] relay_from: expected a network such as 192.0.2.0/24 or 2001:db8::/32, not '10.0.0.1/8'"),
    ("[tls]\ncertificate = none.pem\n", "F:2: [tls] certificate: expected a file that exists and can be read, not 'none.pem'"),
    ("[queue]\nstore = mysql://u:hush@h/d\n", "F:2: [queue] store: expected sqlite or postgresql://…, not 'mysql://u:…@h/d'"),
    ("[queue]\nlease = 1s\n", "F:2: [queue] lease: expected greater than or equal to 2, not 1.0"),
    ("[transport:a]\npath = x\n", "F:1: [transport:a] type: expected to be given"),
    ("[transport:a]\ntype = relay\nrate = 0/s\n",
     "F:3: [transport:a] rate: expected a rate such as 10/s, 600/m or 1000/h, not '0/s'"),
    ("[transport:hook]\ntype = webhook\n[route]\n* = hok\n",
     "F:4: [route] *: expected a transport, fail, hold or discard, not 'hok' (did you mean hook?)"),
    ("[route]\na b = fail\n", "F:2: [route] a b: expected an address, a domain, .domain, local or * (bad domain)"),
    ("key = 1\n", "F:1: key: expected a [section] before the first key"),
    ("[gmta]\nnonsense\n", "F:2: expected key = value, not 'nonsense'"),
    ("[gmta]\nworkers = 1\nworkers = 2\n", "F:2: [gmta] workers: given again in line 3"),
    ("[gmta]\n[gmta]\n", "F:2: [gmta] stands already in line 1"),
    ("[gmta]\nhostname = ${GMTA_TEST_NOT_SET}\n",
     "F:2: [gmta] hostname: expected the environment variable GMTA_TEST_NOT_SET to be set"),
    ("[gmta]\ninclude = gone.ini\n", "F:2: [gmta] include: expected a file that exists, not 'gone.ini'"),
    ("[gmta]\nuser = nobody-of-that-name\n",
     "F:2: [gmta] user: expected an account of this machine, not 'nobody-of-that-name'"),
])
def test_what_is_wrong_is_told_exactly(tmp_path: Path, text: str, expected: str) -> None:
    assert errors(tmp_path, text) == [expected]


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    found = errors(tmp_path, "[gmta]\nworkers = x\nlogfile = y\n[queue]\nretry = 5m soon\n[rout]\n")
    assert [error.split(": expected")[0].split(": unknown")[0] for error in found] == [
        "F:2: [gmta] workers", "F:3: [gmta] logfile", "F:5: [queue] retry", "F:6: [rout]"]


def test_what_is_wrong_in_a_secret_file_is_not_shown(tmp_path: Path) -> None:
    written(tmp_path, "mysql://hush\n", "store")
    assert errors(tmp_path, "[queue]\nstore_file = store\n") == [
        "F:2: [queue] store_file: expected sqlite or postgresql://…, not what is in it"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load(str(tmp_path / "config.ini"))


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GMTA_CONFIG", raising=False)
    monkeypatch.setattr(config, "FILES", ("config.ini",))
    with pytest.raises(ConfigError, match="no configuration"):
        load(None)
    written(tmp_path, "[gmta]\nhostname = here.test\n")
    assert load(None).gmta.hostname == "here.test"
    monkeypatch.setenv("GMTA_CONFIG", written(tmp_path, "[gmta]\nhostname = env.test\n", "other.ini"))
    assert load(None).gmta.hostname == "env.test"


def test_continued_lines_comments_and_percent_signs(tmp_path: Path) -> None:
    made = load(written(tmp_path, "[plugins]\nenable =\n  one\n  # not two\n  three\n[plugin:x]\na:b = 50% ; kept\nCase = C\n"))
    assert made.plugins.enable == ["one", "three"]
    assert dict(made.plugin["x"]) == {"a:b": "50% ; kept", "Case": "C"}


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMTA_TEST_NAME", "env.test")
    made = load(written(tmp_path, "[gmta]\nhostname = mx.${GMTA_TEST_NAME}\n[plugin:x]\nk = $${HOME}\n"))
    assert made.gmta.hostname == "mx.env.test"
    assert made.plugin["x"]["k"] == "${HOME}"


def test_includes_override_and_keep_their_places(tmp_path: Path) -> None:
    written(tmp_path, "[limits]\nhops = 7\n", "conf.d/a.ini")
    other = written(tmp_path, "[limits]\nrecipients = few\n", "conf.d/b.ini")
    path = written(tmp_path, "[gmta]\ninclude = conf.d/*.ini\n[limits]\nhops = 5\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.errors == [f"{other}:2: [limits] recipients: expected a whole number, not 'few'"]
    written(tmp_path, "", "conf.d/b.ini")
    assert load(path).limits.hops == 7


class Keys(BaseModel):
    model_config = {"extra": "forbid"}
    password: str = ""
    users_file: config.Path = ""
    names: list[str] | None = None
    timeout: config.Duration = 5.0


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    written(tmp_path, "geheim \n", "pw")
    section = Section("transport:out", "F", 1, {"password_file": "pw", "users_file": "users", "names": "a, b\nc"})
    keys = validate(Keys, section, base=str(tmp_path))
    assert (keys.password, keys.users_file, keys.names) == ("geheim ", str(tmp_path / "users"), ["a", "b", "c"])


def test_a_secret_given_twice_or_not_readable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be read"):
        validate(Keys, Section("s", "F", 1, {"password_file": "gone"}), base=str(tmp_path))
    written(tmp_path, "x", "pw")
    with pytest.raises(ConfigError, match="only one of password and password_file"):
        validate(Keys, Section("s", "F", 1, {"password": "a", "password_file": "pw"}), base=str(tmp_path))


def test_a_snapshot_is_the_configuration_even_when_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMTA_TEST_NAME", "env.test")
    written(tmp_path, "secret\n", "pw")
    certificate = written(tmp_path, "-", "cert.pem")
    path = written(tmp_path, WHOLE.format(dir=tmp_path).replace("mx.bench.test", "${GMTA_TEST_NAME}")
                   + "[tls]\ncertificate = cert.pem\n[transport:t]\ntype = x\npassword_file = pw\n")
    made = load(path)
    keys = made.validate(Keys, made.transports["t"], ignore=config.TRANSPORT_KEYS)
    text = made.snapshot()
    monkeypatch.delenv("GMTA_TEST_NAME")
    for name in (path, certificate, str(tmp_path / "pw")):
        Path(name).unlink()
    again = Config.from_snapshot(text)
    for name in ("gmta", "tls", "domains", "limits", "queue", "plugins", "dns", "metrics", "listeners", "transports", "route"):
        assert getattr(again, name) == getattr(made, name), name
    assert again.validate(Keys, again.transports["t"], ignore=config.TRANSPORT_KEYS) == keys
    assert again.transports["sink"].where("host") == made.transports["sink"].where("host")
    assert again.snapshot() == text


@pytest.mark.parametrize(("text", "octets"), [("500", 500), ("64KB", 65536), ("64k", 65536), ("1.5 MB", 1572864), ("1GiB", 1 << 30)])
def test_sizes(text: str, octets: int) -> None:
    assert config._size(text) == octets


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), ("500ms", 0.5), ("5m", 300), ("1h30m", 5400), ("5d", 432000)])
def test_durations(text: str, seconds: float) -> None:
    assert config._duration(text) == seconds
