"""plugins/mailboxes.py: who is a recipient in the local domains."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from gmta.mail.address import Address
from gmta.mail.envelope import RecipientState
from gmta.mail.session import Recipient, Session, Transaction
from gmta.mail.verdict import Kind, Verdict
from gmta.services import aliases as alias_files
from gmta.services.aliases import Specials, special_local
from gmta_plugins import mailboxes
from gmta_plugins.mailboxes import parse_aliases, parse_mailboxes
from tests.http_peer import HttpPeer, Step

LOCAL = ["example.test", "other.test"]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Log:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, event: str, **fields: Any) -> None:
        self.errors.append(event)


def make(**keys: Any) -> tuple[mailboxes.Plugin, Any]:
    config = SimpleNamespace(domains=SimpleNamespace(local=frozenset(LOCAL)), sections={"domains": {"local": ", ".join(LOCAL)}})
    services = SimpleNamespace(config=config, clock=Clock(), log=Log())
    return mailboxes.Plugin(mailboxes.Config(**keys), services), services


def ask(plugin: mailboxes.Plugin, address: Address | str) -> Verdict | None:
    if isinstance(address, str):
        address = Address.parse(address)
    return plugin.permit_rcpt(Session("s"), Transaction("t", Address.parse("a@b.test")), Recipient(address))


def ends(verdict: Verdict | None, given: str) -> list[str]:
    """Where an accepted recipient goes."""
    assert verdict is not None and verdict.kind is Kind.ACCEPT, verdict
    return [given] if verdict.replace is None else [str(address) for address in verdict.replace]


def refused(verdict: Verdict | None, enhanced: str) -> None:
    assert verdict is not None and verdict.kind is Kind.REJECT, verdict
    assert (verdict.reply.code, verdict.reply.enhanced) == (550, enhanced)


def test_listed() -> None:
    plugin, _ = make(mailboxes=["alice@example.test", "bob"])
    assert ends(ask(plugin, "alice@example.test"), "alice@example.test") == ["alice@example.test"]
    assert ends(ask(plugin, "Alice@EXAMPLE.test"), "x") == ["alice@example.test"]
    assert ends(ask(plugin, "bob@other.test"), "bob@other.test") == ["bob@other.test"]
    refused(ask(plugin, "alice@other.test"), "5.1.1")
    refused(ask(plugin, "carol@example.test"), "5.1.1")


def test_foreign_domains_are_not_ours() -> None:
    plugin, _ = make(accept="any", catch_all="all@example.test")
    for address in ("a@foreign.test", "a@sub.example.test", "a@xexample.test", "a@[127.0.0.1]"):
        assert ask(plugin, address) is None


def test_any() -> None:
    plugin, _ = make(accept="any")
    assert ends(ask(plugin, "who.ever@example.test"), "who.ever@example.test") == ["who.ever@example.test"]


@pytest.mark.parametrize("local", [
    "user%foreign.test", "foreign.test!user", '"user@foreign.test"', '"|program"', "|program", "/etc/passwd",
    '"../../escape"', '".hidden"', '"a b"', '":include:/etc/passwd"', '"a:b"', '"a\\\\b"', "~root", "-option", '"a..b"', "a/b",
    '"a\\"b"', '"<a>"', "`id`",
])
@pytest.mark.parametrize("keys", [{}, {"accept": "any"}, {"accept": "any", "catch_all": "all@example.test"}])
def test_unsafe_names_need_a_listing(local: str, keys: dict[str, Any]) -> None:
    plugin, _ = make(**keys)
    refused(ask(plugin, f"{local}@example.test"), "5.1.3")


def test_unsafe_name_that_is_listed() -> None:
    plugin, _ = make(mailboxes=["a/b@example.test"])
    assert ends(ask(plugin, "a/b@example.test"), "a/b@example.test") == ["a/b@example.test"]


def test_postmaster_is_always_there() -> None:
    plugin, _ = make()
    assert ends(ask(plugin, "PostMaster@other.test"), "x") == ["postmaster@other.test"]
    assert ends(ask(plugin, Address("Postmaster", "")), "x") == ["postmaster@example.test"]
    assert ask(plugin, Address("other", "")) is None


def test_postmaster_survives_its_alias(tmp_path: Any) -> None:
    file = tmp_path / "aliases"
    file.write_text("postmaster: gone\n")
    plugin, _ = make(aliases_file=str(file))
    assert ends(ask(plugin, "postmaster@example.test"), "postmaster@example.test") == ["postmaster@example.test"]
    file.write_text("postmaster: root@foreign.test\n")
    plugin, _ = make(aliases_file=str(file))
    assert ends(ask(plugin, Address("Postmaster", "")), "x") == ["root@foreign.test"]


def test_detail() -> None:
    plugin, _ = make(mailboxes=["alice@example.test", "bob+x@example.test"])
    assert ends(ask(plugin, "alice+lists@example.test"), "x") == ["alice@example.test"]
    assert ends(ask(plugin, "bob+x@example.test"), "bob+x@example.test") == ["bob+x@example.test"]
    refused(ask(plugin, "bob+y@example.test"), "5.1.1")
    plugin, _ = make(mailboxes=["alice@example.test"], detail_separator="")
    refused(ask(plugin, "alice+lists@example.test"), "5.1.1")
    plugin, _ = make(accept="any", detail_separator="-")
    assert ends(ask(plugin, "alice-lists@example.test"), "x") == ["alice@example.test"]


def test_catch_all_comes_after_the_exact_match() -> None:
    plugin, _ = make(mailboxes=["alice@example.test", "all@example.test"], catch_all="all@example.test")
    assert ends(ask(plugin, "alice@example.test"), "alice@example.test") == ["alice@example.test"]
    assert ends(ask(plugin, "nobody@other.test"), "x") == ["all@example.test"]
    plugin, _ = make(catch_all="all@example.test")
    assert ends(ask(plugin, "nobody@example.test"), "x") == ["all@example.test"]
    assert ends(ask(plugin, "all@example.test"), "all@example.test") == ["all@example.test"]
    plugin, _ = make(catch_all="archive@foreign.test")
    assert ends(ask(plugin, "nobody@example.test"), "x") == ["archive@foreign.test"]


def aliases(tmp_path: Any, text: str, **keys: Any) -> tuple[mailboxes.Plugin, Any]:
    file = tmp_path / "aliases"
    file.write_text(text)
    return make(aliases_file=str(file), mailboxes=["alice@example.test", "bob@example.test"], **keys)


def test_alias_chain(tmp_path: Any) -> None:
    plugin, _ = aliases(tmp_path, "# all\nteam: staff,\n  guest@foreign.test\nstaff: alice, Bob, alice\n"
                                  "sales@other.test: team@example.test\n")
    assert ends(ask(plugin, "team@example.test"), "x") == ["alice@example.test", "bob@example.test", "guest@foreign.test"]
    assert ends(ask(plugin, "Team+x@example.test"), "x") == ["alice@example.test", "bob@example.test", "guest@foreign.test"]
    assert ends(ask(plugin, "sales@other.test"), "x")[0] == "alice@example.test"
    refused(ask(plugin, "sales@example.test"), "5.1.1")


def test_unknown_user_behind_an_alias_is_refused(tmp_path: Any) -> None:
    plugin, _ = aliases(tmp_path, "team: alice, more\nmore: gone\n")
    refused(ask(plugin, "team@example.test"), "5.1.1")


def test_self_alias_keeps_a_copy(tmp_path: Any) -> None:
    plugin, _ = aliases(tmp_path, "joe: joe, joe@foreign.test\n")
    assert ends(ask(plugin, "joe@example.test"), "x") == ["joe@example.test", "joe@foreign.test"]


@pytest.mark.parametrize("text", ["a: b\nb: a\n", "a: b\nb: c\nc: b\n", "a: b+x\nb: a+y\n"])
@pytest.mark.parametrize("keys", [{}, {"accept": "any"}])
def test_loop(tmp_path: Any, text: str, keys: dict[str, Any]) -> None:
    plugin, _ = aliases(tmp_path, text, **keys)
    refused(ask(plugin, "a@example.test"), "5.4.6")


def test_long_chains_end(tmp_path: Any) -> None:
    plugin, _ = aliases(tmp_path, "".join(f"n{n}: n{n + 1}\n" for n in range(2000)))
    refused(ask(plugin, "n0@example.test"), "5.4.6")


def test_doubling_aliases_are_cheap(tmp_path: Any) -> None:
    """Each level names the next twice: 2**40 walks without a memory of what is done."""
    plugin, _ = aliases(tmp_path, "".join(f"n{n}: n{n + 1}, n{n + 1}+x\n" for n in range(40)) + "n40: alice\n")
    assert ends(ask(plugin, "n0@example.test"), "x") == ["alice@example.test"]


def test_file_is_read_again(tmp_path: Any) -> None:
    file = tmp_path / "mailboxes"
    file.write_text("alice@example.test\n")
    plugin, services = make(mailboxes_file=str(file))
    refused(ask(plugin, "dave@example.test"), "5.1.1")
    file.write_text("alice@example.test\ndave@example.test # new\n")
    services.clock.now += 2
    assert ends(ask(plugin, "dave@example.test"), "dave@example.test") == ["dave@example.test"]
    file.write_text("not an address@@\nalice@@\n")
    services.clock.now += 2
    assert ends(ask(plugin, "dave@example.test"), "dave@example.test") == ["dave@example.test"]
    assert services.log.errors
    file.unlink()
    services.clock.now += 2
    assert ends(ask(plugin, "dave@example.test"), "dave@example.test") == ["dave@example.test"]


def test_bad_files_stop_the_start(tmp_path: Any) -> None:
    with pytest.raises(OSError):
        make(mailboxes_file=str(tmp_path / "missing"))
    for text in ("a: |program\n", 'a: "|program with blanks"\n', "a: /var/file\n", "a b\n", "a:\n", " a: b\n", "a: b@@c\n"):
        with pytest.raises(ValueError, match="aliases:1"):
            aliases(tmp_path, text)


def test_alias_syntax(tmp_path: Any) -> None:
    (tmp_path / "list").write_text("# people\ncarol@x.test\ndave@x.test, erin@x.test\n")
    found = parse_aliases('a: b\nA: c\n"with blank": d\ne: :include:list\n', "aliases", tmp_path)
    assert found == {"a": ["b", "c"], "with blank": ["d"], "e": ["carol@x.test", "dave@x.test", "erin@x.test"]}


def test_include_needs_its_key() -> None:
    with pytest.raises(ValueError, match="allow_include"):
        parse_aliases("a: :include:list\n", "aliases")


def test_include_of_itself_ends(tmp_path: Any) -> None:
    (tmp_path / "list").write_text(":include:list\n")
    with pytest.raises(ValueError, match="too deep"):
        parse_aliases("a: :include:list\n", "aliases", tmp_path)


def test_mailboxes_syntax() -> None:
    assert parse_mailboxes("\n# none\nAlice@Example.test  rest\nbob\n", "f") == {"alice@example.test", "bob"}


# --- commands, files, accounts ------------------------------------------------------------------------------------

SPECIAL = 'tickets: "|/bin/ticket --queue \'a, b\'", joe@example.test\nbox: /srv/box, /dev/null\ntwice: tickets, box\nlist: :include:list\n'


def test_commands_and_files_are_errors_without_their_keys(tmp_path: Any) -> None:
    for text in ("a: |/bin/x\n", 'a: "|/bin/x y"\n', "a: /srv/box\n"):
        with pytest.raises(ValueError, match=r"aliases:1: .*command_transport, file_transport"):
            parse_aliases(text, "aliases")
    with pytest.raises(ValueError, match="aliases:1"):
        parse_aliases("a: /srv/box\n", "aliases", special="|")
    for text in ("a: |\n", "a: /\n", 'a: "|x\ty"\n'):
        with pytest.raises(ValueError, match="aliases:1"):
            parse_aliases(text, "aliases", special="|/")


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "large"])
def test_whoever_keeps_a_list_holds_up_nobody(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It may be a user's own: a FIFO there would have each worker wait, and the next start."""
    monkeypatch.setattr(alias_files, "MAX_LIST", 100)
    {"fifo": os.mkfifo, "directory": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path),
     "large": lambda path: path.write_text("a\n" * 100)}[kind](tmp_path / "list")
    with pytest.raises((ValueError, OSError)):
        parse_aliases("a: :include:list\n", "aliases", tmp_path)


def test_lists_that_include_without_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias_files, "MAX_INCLUDED", 30)
    for name, other in ("ab", "bc", "cd"):
        (tmp_path / name).write_text(f":include:{other}\n" * 20)
    (tmp_path / "d").write_text("joe\n")
    with pytest.raises(ValueError, match="includes too many"):
        parse_aliases("a: :include:a\n", "aliases", tmp_path)


def test_who_runs_commands_reads_no_lists(tmp_path: Any) -> None:
    """There is nothing for it in them, and it may be root's process."""
    (tmp_path / "aliases").write_text("a: :include:none\nb: |/bin/x\n")
    assert list(Specials(str(tmp_path / "aliases"), "|", lambda: 0.0)) == ["|/bin/x"]


def test_an_included_list_runs_nothing(tmp_path: Any) -> None:
    for target in ("|/bin/x", "/srv/box"):
        (tmp_path / "list").write_text(f"joe\n{target}\n")
        with pytest.raises(ValueError, match=r"list:2: .* in no :include:"):
            parse_aliases("a: :include:list\n", "aliases", tmp_path, special="|/")


def make_special(tmp_path: Any, **keys: Any) -> mailboxes.Plugin:
    (tmp_path / "list").write_text("ann@far.example\n")
    (tmp_path / "aliases").write_text(SPECIAL)
    config = SimpleNamespace(domains=SimpleNamespace(local=frozenset(LOCAL)), sections={"domains": {"local": ", ".join(LOCAL)}},
                             transports={"commands": {}, "files": {}})
    services = SimpleNamespace(config=config, clock=Clock(), log=Log())
    return mailboxes.Plugin(mailboxes.Config(**{"aliases_file": str(tmp_path / "aliases"), "allow_include": True, "accept": "any",
                                                "command_transport": "commands", "file_transport": "files", **keys}), services)


def test_commands_and_files_are_recipients_with_a_route(tmp_path: Any) -> None:
    plugin = make_special(tmp_path)
    command, box, null = special_local("|/bin/ticket --queue 'a, b'"), special_local("/srv/box"), special_local("/dev/null")
    assert len({command, box, null}) == 3 and len(command) == 25
    assert ends(ask(plugin, "tickets@example.test"), "") == [f"{command}@example.test", "joe@example.test"]
    assert ends(ask(plugin, "twice@example.test"), "") == [f"{name}@example.test" if "@" not in name else name
                                                           for name in (command, "joe@example.test", box, null)]
    routes = {name: plugin.get_route(None, RecipientState(0, Address(name, "example.test"))) for name in (command, box, null, "joe", "|joe", command + "x")}  # type: ignore[attr-defined]
    assert routes == {command: "commands", box: "files", null: "files", "joe": None, "|joe": None, command + "x": None}
    assert plugin.get_route(None, RecipientState(0, Address(command, "far.example"))) is None  # type: ignore[attr-defined]


def test_nobody_names_a_command_from_outside(tmp_path: Any) -> None:
    plugin = make_special(tmp_path)
    for target in ("|/bin/ticket --queue 'a, b'", "/srv/box"):
        refused(ask(plugin, Address(special_local(target), "example.test")), "5.1.3")


def test_who_has_no_commands_is_not_asked_for_routes() -> None:
    assert not hasattr(make()[0], "get_route")


def test_the_transport_has_to_be_there(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"command_transport: there is no \[transport:x\]"):
        make_special(tmp_path, command_transport="x")


def test_accounts_of_this_machine() -> None:
    plugin, services = make(accept="system")
    assert ends(ask(plugin, "Nobody+x@example.test"), "") == ["nobody@example.test"]
    refused(ask(plugin, "no-such-account@example.test"), "5.1.1")
    refused(ask(plugin, "root@example.test"), "5.1.1")
    services.clock.now += 61
    assert ends(ask(plugin, "nobody@example.test"), "nobody@example.test") == ["nobody@example.test"]


def test_accounts_that_can_not_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(mailboxes, "find_account", fails)
    verdict = ask(make(accept="system")[0], "joe@example.test")
    assert verdict is not None and verdict.kind is Kind.DEFER and verdict.reply.code == 451


def test_a_directory_that_hangs_takes_no_thread_from_others(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Messages that come in write their files in the hub's threads, and there are few of them."""
    answers = threading.Event()

    def hangs(name: str) -> None:
        answers.wait(30)
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(mailboxes, "find_account", hangs)
    plugin = make(accept="system")[0]
    asking = [gevent.spawn(ask, plugin, f"joe{number}@example.test") for number in range(20)]
    gevent.sleep(0)
    other = gevent.spawn(gevent.get_hub().threadpool.apply, int)
    other.join(5)
    held_up = not other.ready()
    answers.set()
    gevent.joinall([*asking, other])
    assert not held_up and {one.value.reply.code for one in asking} == {451}
    assert not capfd.readouterr().err  # a line of the log is enough


def test_an_included_list_is_read_again_when_it_changes(tmp_path: Any) -> None:
    (tmp_path / "aliases").write_text("list: :include:members\n")
    (tmp_path / "members").write_text("ann@far.example\n:include:more\n")
    (tmp_path / "more").write_text("ben@far.example\n")
    plugin, services = make(aliases_file=str(tmp_path / "aliases"), allow_include=True)
    assert ends(ask(plugin, "list@example.test"), "") == ["ann@far.example", "ben@far.example"]
    for name, text, found in (("more", "cat@far.example\n", ["ann@far.example", "cat@far.example"]), ("members", "dan@far.example\n", ["dan@far.example"]),
                              ("members", "eve@far.example, fay@far.example\n", ["eve@far.example", "fay@far.example"])):
        (tmp_path / name).write_text(text)
        services.clock.now += 2
        assert ends(ask(plugin, "list@example.test"), "") == found
    (tmp_path / "members").unlink()
    services.clock.now += 2
    assert ends(ask(plugin, "list@example.test"), "") == ["eve@far.example", "fay@far.example"] and len(services.log.errors) == 1
    (tmp_path / "aliases").write_text("list: gil@far.example\n")  # the list is not missed any more
    services.clock.now += 2
    assert ends(ask(plugin, "list@example.test"), "") == ["gil@far.example"] and len(services.log.errors) == 1


# --- aliases of a web service -------------------------------------------------------------------------------------


@pytest.fixture
def service() -> Iterator[HttpPeer]:
    made = HttpPeer()
    yield made
    made.close()


def answer(*targets: str, **more: Any) -> Step:
    return Step(200, body=json.dumps({"to": targets, **more}).encode())


def test_the_service_is_asked_for_what_the_file_has_not(service: HttpPeer, tmp_path: Any) -> None:
    (tmp_path / "aliases").write_text("filed: user\n")
    service.steps = [Step(404), answer("one@far.example", "second@example.test"), answer("user@example.test")]
    plugin, _ = make(aliases_url=service.url(), aliases_authorization="Bearer token", aliases_file=str(tmp_path / "aliases"), mailboxes=["user"])
    assert ends(ask(plugin, "filed@example.test"), "filed@example.test") == ["user@example.test"]
    assert not [one for one in service.heard if b"filed" in one.body]
    assert ends(ask(plugin, "Team@example.test"), "Team@example.test") == ["one@far.example", "user@example.test"]
    assert [json.loads(one.body) for one in service.heard[1:]] == [{"address": "team@example.test"}, {"address": "second@example.test"}]
    assert service.heard[0].headers["authorization"] == "Bearer token"


def test_what_the_service_said_holds_for_a_while(service: HttpPeer) -> None:
    service.steps = [answer("far@far.example"), Step(204)]
    plugin, services = make(aliases_url=service.url(), mailboxes=["team"])
    for _ in range(3):
        assert ends(ask(plugin, "team@example.test"), "") == ["far@far.example"]
    assert len(service.heard) == 1
    services.clock.now += mailboxes.ALIAS_S
    assert ends(ask(plugin, "team@example.test"), "team@example.test") == ["team@example.test"]
    assert len(service.heard) == 2


def test_a_service_that_names_its_own_question_keeps_the_mailbox(service: HttpPeer) -> None:
    service.steps = [answer("joe@example.test", "joe@far.example")]
    plugin, _ = make(aliases_url=service.url())
    assert sorted(ends(ask(plugin, "joe@example.test"), "")) == ["joe@example.test", "joe@far.example"]


def test_aliases_of_the_service_that_loop(service: HttpPeer) -> None:
    service.steps = [answer("b@example.test"), answer("a@example.test")]
    plugin, _ = make(aliases_url=service.url())
    refused(ask(plugin, "a@example.test"), "5.4.6")


@pytest.mark.parametrize("step", [Step(500), Step(302, headers={"Location": "/elsewhere"}), Step(401), Step(200, body=b"no json"), Step(200, body=b"[]"),
                                  Step(200, body=b'{"to": "a@b.test"}'), Step(200, body=b'{"to": [5]}'), answer("|rm -rf /"), answer("/etc/passwd"),
                                  answer(":include:/etc/passwd"), answer("no address"), Step(200, body=b"\xff"), Step(200, body=b"x" * 300_000), Step(200, cut=5),
                                  Step(raw=b"nonsense\r\n\r\n")])
def test_a_service_out_of_order_defers(service: HttpPeer, step: Step) -> None:
    service.steps = [step]
    plugin, services = make(aliases_url=service.url(), accept="any")
    verdict = ask(plugin, "joe@example.test")
    assert verdict is not None and (verdict.kind, verdict.reply.code, verdict.reply.enhanced) == (Kind.DEFER, 451, "4.3.0")
    assert services.log.errors == ["aliases can't be looked up"]


def test_names_that_mean_more_are_asked_of_nobody(service: HttpPeer) -> None:
    plugin, _ = make(aliases_url=service.url(), accept="any")
    for name in ("a/b@example.test", '"|x"@example.test', '".."@example.test', "a%b@example.test", "a!b@example.test"):
        refused(ask(plugin, name), "5.1.3")
    assert not service.heard


@pytest.mark.parametrize("url", ["http://far.example/", "ftp://127.0.0.1/", "far.example"])
def test_the_services_url(url: str) -> None:
    with pytest.raises(ValueError, match="an https URL"):
        mailboxes.Config(aliases_url=url)
