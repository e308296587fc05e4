"""The gmta command on a queue made by hand: what it prints as text and as JSON, and its exit status."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from gmta.cli import COMMANDS, main, sendmail
from gmta.cli.output import age_text, clean, size_text, time_text, value_text
from gmta.cli.queue import queue
from gmta.mail.address import Address
from gmta.mail.envelope import HELD, Envelope, RecipientState
from gmta.mail.message import Message
from gmta.queue import schema
from gmta.queue.ids import IdSource
from gmta.queue.maildrop import prepare
from gmta.queue.sqlite import SqliteStore
from gmta.queue.store import Event, Store, StoreError
from gmta.services.log import NullLog
from gmta.services.postgres import Database

START = 1_700_000_000.0
CONFIG = """
[gmta]
hostname = mx.example.test
data_dir = var
workers = 1
[listener:mx]
address = 127.0.0.1:2525, [::1]:2525
[domains]
local = example.test
[plugins]
enable = mailboxes, access
path = own
[plugin:mailboxes]
accept = any
[transport:mailbox]
type = maildir
path = var/mail/{domain}/{local}
[transport:outbound]
type = relay
host = 192.0.2.1:25
username = u
password = sesame
[route]
local = mailbox
nowhere.test = fail
* = outbound
"""


class Site:
    """A configuration, its queue, and the command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.ini"
        self.config.write_text(CONFIG)
        (directory / "own").mkdir()
        self.ids = IdSource(lambda: START, "AAAAA")

    def put(self, *recipients: RecipientState, sender: str = "alice@sender.test", octets: bytes = b"Subject: x\r\n\r\nbody\r\n",
            store: Store | None = None) -> str:
        """Queues a message; its id."""
        own = store or self.store()
        queue_id = self.ids.new()
        message = Message.from_bytes(octets)
        envelope = Envelope(queue_id, Address.parse(sender), list(recipients), message.size, START, facts={"ip": "192.0.2.7"})
        own.put(envelope, message, [Event(queue_id, START, "received", {"ip": "192.0.2.7", "sender": sender})])
        if store is None:
            own.close()
        return queue_id

    def store(self) -> Store:
        return SqliteStore(str(self.directory / "var/queue"), instance_tag="AAAAA", log=NullLog(), clock=lambda: START)

    def run(self, *arguments: str, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [*arguments, "-c", str(self.config)])
        assert result.exit_code == status, (result.output, result.stderr, result.exception)
        return result

    def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", status=status).stdout)


class Cluster(Site):
    """The same with its queue on PostgreSQL, which shows where things are, too: `json` leaves that away."""

    def __init__(self, directory: Path, url: str) -> None:
        super().__init__(directory)
        self.url = url
        self.use(url)
        store = self.store()
        store.next_due_at()  # with a database come its tables
        store.close()

    def use(self, url: str) -> None:
        self.config.write_text(f"{CONFIG}[queue]\nstore = {url}\n")

    def store(self, node: str = "one") -> Store:
        from gmta.queue.postgres import PostgresStore

        database = Database(self.url, name=f"test/{next(_NUMBERS)}", log=NullLog())
        return PostgresStore(database, str(self.directory / "var/queue"), node=node, log=NullLog(), clock=lambda: START)

    def json(self, *arguments: str, status: int = 0) -> Any:
        return _without_nodes(super().json(*arguments, status=status))


_NUMBERS = itertools.count()


def _without_nodes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nodes(one) for key, one in value.items() if key not in ("node", "nodes")}
    return [_without_nodes(one) for one in value] if isinstance(value, list) else value


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def cluster(tmp_path: Path, database_url: str) -> Cluster:
    return Cluster(tmp_path, database_url)


@pytest.fixture(params=["site", "cluster"])
def queued(request: pytest.FixtureRequest) -> Site:
    """A queue of either kind."""
    found: Site = request.getfixturevalue(request.param)
    return found


def to(address: str, number: int = 0, **state: Any) -> RecipientState:
    return RecipientState(number, Address.parse(address), next_attempt_at=START, **state)


# --- the queue --------------------------------------------------------------------------------------------------


def test_list_has_a_line_for_each_fact_and_one_of_sums(queued: Site) -> None:
    first = queued.put(to("bob@one.test", attempts=3, transport="outbound", next_hop="one.test", last_reply="451 4.7.1 try \x1b[2Jlater"),
                     to("eve@two.test", 1, status=HELD))
    second = queued.put(to("bob@one.test"), sender="")
    lines = queued.run("queue", "list").stdout.splitlines()
    assert lines == [
        f"{first}        {20} {time_text(START)} <alice@sender.test> (held)",
        f"    bob@one.test queued attempts=3 next={time_text(START)} via=outbound:one.test (451 4.7.1 try \\x1b[2Jlater)",
        "    eve@two.test held",
        f"{second}        {20} {time_text(START)} <>",
        "    bob@one.test queued",
        "-- 40 B in 2 messages"]
    assert [row["id"] for row in queued.json("queue", "list")] == [first, second]
    (row,) = queued.json("queue", "list", "--sender", "<>")
    assert row == {"id": second, "sender": "", "size": 20, "received_at": START, "held": False, "recipients": [
        {"address": "bob@one.test", "status": "queued", "attempts": 0, "next_attempt_at": START, "transport": "", "next_hop": "",
         "last_reply": ""}]}


def test_an_empty_queue(queued: Site) -> None:
    assert queued.run("queue", "list").stdout == "The queue is empty\n"
    assert queued.json("queue", "list") == []
    assert queued.json("queue", "stats") == {"messages": 0, "octets": 0, "oldest": None, "recipients": {}, "lanes": {}, "maildrop": 0, "under_way": 0, "attempts": [], "closed": []}
    assert queued.json("queue", "delete", "--all") == {"changed": 0}
    queued.run("queue", "delete", "0123456789ABCDEF", status=1)
    queued.run("queue", "delete", status=2)


def test_stats_show_what_living_workers_have_under_way(site: Site) -> None:
    for store in [site.store() for _ in range(3)]:  # all open at once: a shard each
        store.close()
    ended = subprocess.Popen(["true"])
    ended.wait()
    directory = str(site.directory / "var/queue")
    now = time.time()

    def attempt(name: str, since: float) -> dict[str, Any]:
        return {"id": name, "to": ["a@one.test", "b@one.test"], "transport": "outbound", "next_hop": "one.test", "since": since}

    closed = {"lane": "outbound:dead.test", "until": START, "reason": "no\x1b connection"}
    for number, shown in enumerate((
            {"at": now, "pid": os.getpid(), "under_way": 5, "attempts": [attempt("YOUNG", now - 30)], "closed": [closed]},
            {"at": now, "pid": os.getpid(), "under_way": 2, "attempts": [attempt("OLD", now - 7000)], "closed": []},
            {"at": now, "pid": ended.pid, "under_way": 9, "attempts": [attempt("DEAD", now)], "closed": []}), 1):
        Path(schema.shard_path(directory, number, "now")).write_text(json.dumps(shown))
    found = site.json("queue", "stats")
    assert (found["under_way"], [one["id"] for one in found["attempts"]], found["closed"]) == (7, ["OLD", "YOUNG"], [closed])
    said = site.run("queue", "stats").stdout
    assert f"closed outbound:dead.test: until {time_text(START)} (no\\x1b connection)\nin flight: 7\n" in said
    assert "attempt OLD: for 1h56m to a@one.test, b@one.test via outbound:one.test\n" in said
    Path(schema.shard_path(directory, 1, "now")).write_text("{broken")
    assert site.json("queue", "stats")["under_way"] == 2


def test_what_waits_in_the_maildrop_is_told(site: Site) -> None:
    (site.directory / "var").mkdir()
    maildrop = Path(prepare(str(site.directory / "var")))
    for name in ("1K8919P2I00H1996.mail", "1K8919P2I00H1997.tmp", "taken/1K8919P2I00H1998"):
        (maildrop / name).write_bytes(b"")
    assert site.run("queue", "list").stdout == "-- 2 more in the maildrop, for the server to pick up\nThe queue is empty\n"
    assert site.json("queue", "stats")["maildrop"] == 2
    assert "maildrop: 2 to pick up\n" in site.run("queue", "stats").stdout


def test_messages_of_all_shards_are_listed_by_age(site: Site) -> None:
    stores = [site.store(), site.store()]
    queued = [site.put(to(f"u{number}@one.test"), store=stores[number % 2]) for number in range(6)]
    for store in stores:
        store.close()
    assert [row["id"] for row in site.json("queue", "list")] == queued


@pytest.mark.parametrize("domain", ["bücher.example", "BÜCHER.example", "xn--bcher-kva.example", "xn--bcher-kva.example."])
def test_a_domain_is_found_in_either_spelling(queued: Site, domain: str) -> None:
    if domain.startswith("BÜ"):
        domain = domain.replace("BÜCHER", "bücher").upper().replace("Ü", "ü")
    queued.put(to("x@xn--bcher-kva.example"))
    queued.put(to("x@notbücher.example"))
    assert len(queued.json("queue", "list", "--domain", domain)) == 1


def test_show_cat_and_stats(queued: Site) -> None:
    queue_id = queued.put(to("bob@one.test", transport="outbound", next_hop="one.test"))
    text = queued.run("queue", "show", queue_id).stdout
    assert f"id: {queue_id}\nsender: <alice@sender.test>\nsize: 20\n" in text
    assert "ip: 192.0.2.7\n" in text and "recipient: bob@one.test queued via=outbound:one.test\n" in text
    shown = queued.json("queue", "show", queue_id)
    assert shown["facts"] == {"ip": "192.0.2.7"} and shown["recipients"][0]["address"] == "bob@one.test"
    assert queued.run("queue", "cat", queue_id).stdout_bytes == b"Subject: x\r\n\r\nbody\r\n"
    for command in ("show", "cat"):
        assert "is not queued" in queued.run("queue", command, "0123456789ABCDEF", status=1).stderr
    counts = queued.json("queue", "stats")
    assert counts == {"messages": 1, "octets": 20, "oldest": START, "recipients": {"queued": 1}, "lanes": {"outbound:one.test": 1}, "maildrop": 0,
                      "under_way": 0, "attempts": [], "closed": []}
    said = queued.run("queue", "stats").stdout
    assert "messages: 1\nsize: 20 B\n" in said and "queued: 1 recipient\nlane outbound:one.test: 1 waiting\n" in said


def test_changers_count_what_they_changed(queued: Site) -> None:
    first, second = queued.put(to("a@one.test")), queued.put(to("b@two.test"))
    assert queued.json("queue", "hold", first) == {"changed": 1}
    assert queued.json("queue", "hold", "--all") == {"changed": 1}
    assert queued.json("queue", "release", "--domain", "two.test") == {"changed": 1}
    assert queued.run("queue", "retry", first, status=1).stdout == "0 changed\n"  # it is held
    assert queued.run("queue", "retry", second).stdout == "1 changed\n"
    assert queued.json("queue", "bounce", "--sender", "Alice@Sender.test") == {"changed": 2}
    (row, _) = queued.json("queue", "list")
    assert row["recipients"][0] | {"next_attempt_at": 0} == {
        "address": "a@one.test", "status": "queued", "attempts": 0, "next_attempt_at": 0, "transport": "fail", "next_hop": "", "last_reply": ""}
    assert queued.json("queue", "delete", first, second) == {"changed": 2}
    assert queued.json("queue", "list") == []
    assert [event["kind"] for event in queued.json("trace", first)] == ["received", "held", "bounced", "deleted"]


def test_a_long_queue_is_changed_in_slices(queued: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gmta.queue.admin.SLICE", 3)
    monkeypatch.setattr("gmta.queue.pgadmin.SLICE", 3)
    store = queued.store()
    for number in range(8):
        queued.put(to(f"u{number}@one.test"), store=store)
    store.close()
    assert queued.json("queue", "hold", "--all") == {"changed": 8}
    assert all(row["held"] for row in queued.json("queue", "list"))


def test_a_broken_shard_is_said_in_one_line(site: Site) -> None:
    site.put(to("a@one.test"))
    Path(schema.shard_path(str(site.directory / "var/queue"), 1, "db")).write_bytes(b"no database at all" * 100)
    result = site.run("queue", "list", status=1)
    assert result.stderr == "the queue can't be read or changed: file is not a database\n"


def test_trace(queued: Site) -> None:
    queue_id = queued.put(to("a@one.test"), sender="")
    line = queued.run("trace", queue_id).stdout.replace(" node=one", "")
    assert line == f'{time_text(START, "milliseconds")} received ip=192.0.2.7 sender=""\n'
    assert queued.json("trace", queue_id) == [{"id": queue_id, "at": START, "kind": "received", "data": {"ip": "192.0.2.7", "sender": ""}}]
    assert queued.json("trace", "0123456789ABCDEF", status=1) == []
    assert "no history" in queued.run("trace", "0123456789ABCDEF", status=1).stderr


# --- the cluster ------------------------------------------------------------------------------------------------


def test_a_command_shows_where_a_message_is(cluster: Cluster) -> None:
    store = cluster.store("two")
    claimed, waiting = cluster.put(to("a@one.test"), store=store), cluster.put(to("b@one.test"))
    store.publish({"under_way": 1, "attempts": [{"id": claimed, "to": ["a@one.test"], "transport": "outbound", "next_hop": "one.test", "since": START}],
                   "closed": [{"lane": "outbound:dead.test", "until": START, "reason": "x"}]})
    store.changed_outside()  # after what was published
    found = json.loads(cluster.run("queue", "list", "--json").stdout)
    assert [(row["id"], row["recipients"][0]["node"]) for row in found] == [(claimed, "two"), (waiting, "")]
    assert "a@one.test queued on=two\n" in cluster.run("queue", "list").stdout
    stats = json.loads(cluster.run("queue", "stats", "--json").stdout)
    assert stats["nodes"] == {"two": {"workers": 1, "under_way": 1, "draining": False}} and stats["attempts"][0]["node"] == "two"
    said = cluster.run("queue", "stats").stdout
    assert "node two: 1 worker, 1 in flight\n" in said and "via outbound:one.test on two\n" in said
    assert "node=two" in cluster.run("trace", claimed).stdout and "node=one" in cluster.run("trace", waiting).stdout
    store.close()


def test_mailq_shows_the_whole_cluster(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [cluster.put(to("a@one.test")), cluster.put(to("b@one.test"), store=(store := cluster.store("two")))]
    store.close()
    assert sendmail.run("mailq", ["-C", str(cluster.config)]) == 0
    said = capsys.readouterr().out
    assert all(queue_id in said for queue_id in ids) and "in 2 Requests" in said
    assert sendmail.run("sendmail", ["-C", str(cluster.config), "-q"]) == 0
    assert all(row["recipients"][0]["next_attempt_at"] == 0 for row in cluster.json("queue", "list"))
    cluster.use("postgresql://gmta@127.0.0.1:1/mail")
    assert sendmail.run("mailq", ["-C", str(cluster.config)]) == 75
    assert "mailq: the queue can't be read or changed: " in capsys.readouterr().err


def test_a_large_message_is_read_whatever_its_size(cluster: Cluster) -> None:
    octets = b"Subject: x\r\n\r\n" + os.urandom(300_000).hex().encode()
    queue_id = cluster.put(to("a@one.test"), octets=octets)
    assert cluster.run("queue", "cat", queue_id).stdout_bytes == octets
    assert cluster.run("queue", "delete", queue_id).stdout == "1 changed\n"
    with psycopg.connect(cluster.url) as connection:
        assert connection.execute("SELECT count(*) FROM chunk").fetchone() == (0,)


def test_a_change_is_heard_of_by_every_node(cluster: Cluster) -> None:
    one, two = cluster.store("one"), cluster.store("two")
    queue_id = cluster.put(to("a@one.test"), store=one)
    one.changed_outside(), two.changed_outside()
    assert cluster.run("queue", "retry", queue_id).stdout == "1 changed\n"
    assert one.changed_outside() and two.changed_outside() and not two.changed_outside()
    one.close()
    two.close()


def test_nodes_are_listed_drained_and_forgotten(cluster: Cluster) -> None:
    store = cluster.store("two")
    cluster.put(to("a@one.test"), store=store)
    rows = {row["node"]: row for row in json.loads(cluster.run("node", "list", "--json").stdout)}
    assert rows["two"] | {"since": 0} == {"node": "two", "state": "up", "workers": 1, "claimed": 1, "since": 0}
    assert rows["one"] == {"node": "one", "state": "down", "workers": 0, "claimed": 0, "since": None}
    assert cluster.run("node", "drain", "two").stdout == "two drains\n"
    assert cluster.run("node", "drain", "two").stdout == "two drains already\n"
    assert cluster.run("node", "list").stdout.splitlines()[1].startswith("two draining 1 1 ")
    store.changed_outside()
    with pytest.raises(StoreError, match="drained"):
        store.has_room(1000)
    assert store.due(START + 1e6, 10) == []
    assert cluster.run("node", "resume", "two").stdout == "two takes mail\n"
    store.changed_outside()
    assert store.has_room(1000)
    assert "has workers that live" in cluster.run("node", "forget", "two", status=1).stderr
    store.close()
    assert cluster.run("node", "forget", "two").stdout == "two is forgotten\n"
    said = cluster.run("node", "drain", "tow", status=1).stderr
    assert said == "the queue can't be read or changed: there is no node 'tow': expected one of one\n"


def test_nodes_of_files_are_none(site: Site) -> None:
    assert "[queue] store is sqlite" in site.run("node", "list", status=1).stderr


def test_a_database_that_cannot_be_reached_is_said_in_one_line(cluster: Cluster) -> None:
    cluster.use("postgresql://gmta@127.0.0.1:1/mail")
    for command in (["queue", "list"], ["queue", "stats"], ["queue", "hold", "--all"], ["trace", "X"], ["node", "list"]):
        said = cluster.run(*command, status=1).stderr
        assert said.startswith("the queue can't be read or changed: ") and "127.0.0.1" in said and "refused" in said and said.count("\n") == 1


def test_a_database_without_tables_is_said_so(cluster: Cluster, postgresql: Any) -> None:
    cluster.use(postgresql.create())
    assert "no tables yet" in cluster.run("queue", "list", status=1).stderr


def test_the_databases_password_is_not_shown(cluster: Cluster) -> None:
    cluster.use("postgresql://gmta:sesame@127.0.0.1:1/mail")
    assert "sesame" not in cluster.run("check").stdout and "sesame" not in cluster.run("check", "--json").stdout
    assert "sesame" not in cluster.run("queue", "list", status=1).stderr


# --- the configuration ------------------------------------------------------------------------------------------


def test_check_shows_settings_in_force_and_hides_secrets(site: Site) -> None:
    found = site.json("check")
    assert found["settings"]["gmta"]["hostname"] == "mx.example.test"
    assert found["settings"]["listener:mx"]["address"] == ["127.0.0.1:2525", "[::1]:2525"]
    assert found["settings"]["limits"]["recipients"] == 1000
    assert found["settings"]["plugin:mailboxes"]["accept"] == "any"
    assert found["settings"]["transport:outbound"]["password"] == "(hidden)"
    assert found["settings"]["route"] == {"local": "mailbox", "nowhere.test": "fail", "*": "outbound"}
    assert found["hooks"]["permit_rcpt"] == ["mailboxes", "access"]
    text = site.run("check").stdout
    assert "sesame" not in text
    assert "[route]\nlocal = mailbox\n" in text and "permit_rcpt: mailboxes, access\n" in text
    assert "address = 127.0.0.1:2525, [::1]:2525\n" in text


@pytest.mark.parametrize("command", [["check"], ["plugins"], ["route", "a@b.test"], ["serve"], ["queue", "list"], ["trace", "X"]])
def test_a_bad_configuration_is_status_78_with_every_error(site: Site, command: list[str]) -> None:
    site.config.write_text(CONFIG.replace("workers = 1", "workers = many\nhostnam = x"))
    said = site.run(*command, status=78).stderr
    assert f"{site.config}:5: [gmta] workers: expected a whole number, not 'many'" in said
    assert "[gmta] hostnam: unknown key (did you mean hostname?)" in said


@pytest.mark.parametrize("command", [["check"], ["plugins"], ["route", "a@b.test"]])
def test_so_is_what_only_plugins_can_tell(site: Site, command: list[str]) -> None:
    site.config.write_text(CONFIG.replace("accept = any", "accept = all").replace("type = relay", "type = rely"))
    said = site.run(*command, status=78).stderr
    assert "[plugin:mailboxes] accept: expected one of" in said
    assert "[transport:outbound] type: expected a transport that a plugin has, not 'rely'" in said


def test_a_configuration_that_is_not_there(site: Site) -> None:
    site.config.unlink()
    assert "can't be read" in site.run("check", status=78).stderr


def test_plugins_are_told_with_their_keys_even_one_that_cannot_be_imported(site: Site) -> None:
    (site.directory / "own/mine.py").write_text('"""Mine.\n\n    Indented."""\nfrom gmta import PluginConfig\n'
                                                'class Config(PluginConfig):\n    api_secret: str = "s"\n    word: str\n'
                                                'class Plugin:\n    pass\n')
    (site.directory / "own/broken.py").write_text("raise RuntimeError('not today')\n")
    found = {plugin["name"]: plugin for plugin in site.json("plugins")}
    assert found["mailboxes"]["enabled"] and not found["mine"]["enabled"]
    assert found["mine"]["where"].endswith("own/mine.py") and found["mine"]["doc"] == "Mine.\n\nIndented."
    keys = {key["name"]: key["default"] for key in found["mine"]["keys"]}
    assert keys["api_secret"] == "(hidden)" and keys["word"] == ""
    assert "not today" in found["broken"]["doc"] and found["broken"]["keys"] == []
    text = site.run("plugins").stdout
    assert "\n* mailboxes (bundled)\n" in text and "    key accept = listed" in text


@pytest.mark.parametrize("address,status,way", [
    ("you@example.test", 0, {"address": "you@example.test", "transport": "mailbox", "next_hop": ""}),
    ("<you@example.test>", 0, {"address": "you@example.test", "transport": "mailbox", "next_hop": ""}),
    ("x@other.test", 1, {"address": "x@other.test", "transport": "outbound", "next_hop": ""}),
    ("x@nowhere.test", 1, {"address": "x@nowhere.test", "transport": "", "next_hop": "", "outcome": "failed",
                           "reply": "550 5.7.1 Mail for this recipient is not delivered (route: fail)"}),
])
def test_route(site: Site, address: str, status: int, way: dict[str, str]) -> None:
    found = site.json("route", address, status=status)
    assert found["accepted"] == (status == 0)
    assert found["reply"].startswith("250 " if status == 0 else "550 5.7.1 ")
    assert found["recipients"] == [way]
    first, second = site.run("route", address, status=status).stdout.splitlines()
    assert first.startswith("accepted: 250" if status == 0 else "refused: 550 5.7.1")
    assert second.startswith(f"{way['address']}: ")


def test_route_of_what_is_no_address_is_a_usage_error(site: Site) -> None:
    assert "not of the form" in site.run("route", "nonsense at all", status=2).stderr


# --- the command itself -----------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    runner = CliRunner()
    assert runner.invoke(main, ["--version"]).output == "gmta 0.1.0\n"
    said = runner.invoke(main, ["--help"]).output
    assert all(f"\n  {name} " in said for name in COMMANDS)
    assert runner.invoke(main, ["nonsense"]).exit_code == 2


def test_every_command_is_documented() -> None:
    docs = (Path(__file__).parents[2] / "docs/commands.md").read_text()
    assert all(f"    gmta {name} " in docs for name in COMMANDS if name != "queue")
    assert all(f"    gmta queue {name} " in docs for name in queue.commands)


def test_a_command_imports_only_what_it_needs(site: Site) -> None:
    program = ("import sys\nfrom gmta.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
               "print([m for m in ('gevent', 'pluggy', 'rich', 'spf', 'dkim', 'gmta.supervisor', 'gmta.cli.check') if m in sys.modules])\n")
    said = subprocess.run([sys.executable, "-c", program, "queue", "list", "-c", str(site.config)], capture_output=True, text=True, check=True)
    assert said.stdout == "The queue is empty\n[]\n"


def test_a_terminal_gets_tables(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    queue_id = site.put(to("bob@[192.0.2.9]", attempts=1, last_reply="451 no [bold]markup[/bold]"))
    for module in ("gmta.cli.queue", "gmta.cli.check", "gmta.cli.output"):
        monkeypatch.setattr(f"{module}.on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    said = site.run("queue", "list").stdout
    assert queue_id in said and "bob@[192.0.2.9]" in said and "451 no [bold]markup[/bold]" in said
    assert said.endswith("-- 20 B in 1 message\n")
    assert "received" in site.run("trace", queue_id).stdout
    assert "messages" in site.run("queue", "stats").stdout
    assert "permit_rcpt" in site.run("check").stdout


@pytest.mark.parametrize("text,shown", [
    ("plain [x] ü", "plain [x] ü"), ("a\x1b[31mb", "a\\x1b[31mb"), ("two\nlines\r", "two\\nlines\\r"), ("\u202e", "\\u202e"),
    ("\udce4", "\\udce4"), ("\u2028", "\\u2028")])
def test_clean(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_figures_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 15_000, 36_700_160, 1 << 50)] == ["0 B", "1023 B", "1.0 KB", "15 KB", "35 MB", "1024.0 TB"]
    assert [age_text(s) for s in (-1, 0.5, 59, 60, 3661, 86400 * 3 + 61)] == ["0s", "0s", "59s", "1m", "1h1m", "3d1m"]
    assert [value_text(v) for v in (True, None, ["a", 1], {"b", "a"}, {"k": "ü"})] == ["yes", "", "a, 1", "a, b", '{"k": "ü"}']
    monkeypatch.setenv("TZ", "Etc/GMT-2")
    time.tzset()
    try:
        assert time_text(1_800_000_000.0) == "2027-01-15T10:00:00+02:00"
        assert time_text(1e300) == "1e+300"
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()


def test_a_queue_of_another_account_is_said_to_be_so(site: Site) -> None:
    site.put(to("a@one.test"))
    if os.geteuid() == 0:
        directory = site.directory / "var"
        pid = os.fork()
        if not pid:  # a child without root's rights
            status = 99
            try:
                os.setgid(65534)
                os.setuid(65534)
                try:
                    from gmta.queue.admin import QueueAdmin

                    QueueAdmin(str(directory / "queue"))
                except PermissionError:
                    status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    else:
        (site.directory / "var").chmod(0)
        try:
            assert "Permission denied" in site.run("queue", "list", status=1).stderr
        finally:
            (site.directory / "var").chmod(0o700)
