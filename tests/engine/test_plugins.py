"""The plugin engine: finding, making, ordering, and a broken plugin in every hook."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from gmta import Address, Credentials, Envelope, Message, Recipient, RecipientState, Session, Transaction
from gmta.config import ConfigError, load
from gmta.hookspecs import HOOKS
from gmta.mail.reply import OK
from gmta.mail.verdict import Kind, Verdict, delivered
from gmta.plugins import PluginFailure, PluginManager
from gmta.testing import MemoryLog


class World:
    """A configuration with plugins from files of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = MemoryLog()
        self.extra = ""
        (folder / "own").mkdir()

    def plugin(self, name: str, body: str) -> None:
        (self.folder / "own" / f"{name}.py").write_text(
            f'"""Plugin {name}."""\nimport gevent\nfrom gmta import *\nfrom gmta import hookimpl, PluginConfig\n'
            + textwrap.dedent(body), encoding="utf-8")

    def hook(self, name: str, hook: str, body: str) -> None:
        """A plugin with one hook that takes no arguments."""
        self.plugin(name, f"class Plugin:\n    def __init__(self, config, services): pass\n"
                          f"    @hookimpl\n    def {hook}(self):\n        {body}\n")

    def start(self, *enable: str) -> PluginManager:
        (self.folder / "config.ini").write_text(
            f"[plugins]\npath = own\nenable = {', '.join(enable)}\n"
            + ("" if "[transport:" in self.extra else "[transport:box]\ntype = box\n[route]\nlocal = box\n") + self.extra,
            encoding="utf-8")
        if not (self.folder / "own" / "box.py").exists():
            self.plugin("box", """
                class Box:
                    concurrency = 2
                    def __init__(self, name, config, services): self.name = name
                    def deliver(self, delivery): return {}
                class Plugin:
                    def __init__(self, config, services): pass
                    @hookimpl
                    def get_transports(self, config): return {"box": Box}
                """)
        return PluginManager(load(str(self.folder / "config.ini")), SimpleNamespace(), self.log)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def arguments(hook: str) -> tuple[Any, ...]:
    session = Session("s1")
    transaction = Transaction("q1", Address("a", "example.org"))
    message = Message.from_bytes(b"Subject: x\r\n\r\ny\r\n")
    recipient = Recipient(Address("b", "example.test"))
    state = RecipientState(0, Address("b", "example.test"))
    envelope = Envelope("q1", Address("a", "example.org"), [state])
    whole = (session, transaction, message)
    return {
        "on_worker_started": (None,), "on_worker_stopping": (None,), "check_connect": (session,), "check_helo": (session,),
        "permit_auth": (session, Credentials("PLAIN", "u", "s")), "get_size_limit": (session,), "get_auth_mechanisms": (session,),
        "check_mail": (session, transaction),
        "permit_rcpt": (session, transaction, recipient), "check_rcpt": (session, transaction, recipient),
        "check_data": (session, transaction), "check_message": whole, "edit_message": whole, "get_headers": whole,
        "get_signatures": whole, "get_transports": (None,), "get_route": (envelope, state), "on_session_opened": (session,),
        "on_session_closed": (session, "quit"), "on_refused": (session, transaction, "rcpt", OK), "on_queued": (envelope,),
        "on_delivery": (envelope, state, delivered(), 0.1), "on_bounced": (envelope, [state]),
    }[hook]


def call(plugins: PluginManager, hook: str) -> Any:
    """Calls a hook in the way of its kind; a PluginFailure is returned."""
    kind = hook.partition("_")[0]
    try:
        return getattr(plugins, kind)(hook, *arguments(hook))
    except PluginFailure as failure:
        return failure


BROKEN = {
    "raises": ("raise RuntimeError('broken')", "RuntimeError: broken"),
    "sleeps": ("gevent.sleep(3600)", "past its deadline of 0.01 s"),
    "nonsense": ("return 'nonsense'", None),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
}
CALLED = [hook for hook in HOOKS if hook != "get_transports"]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("hook", CALLED)
def test_a_broken_plugin_defers_and_is_named(world: World, hook: str, how: str) -> None:
    body, reason = BROKEN[how]
    world.hook("broken", hook, body)
    world.extra = "[plugin:broken]\ntimeout = 10ms\n"
    result = call(world.start("broken"), hook)
    if hook == "get_signatures" or hook.startswith("edit_"):
        assert isinstance(result, PluginFailure)
        assert (result.reply.code, result.reply.enhanced, result.plugin) == (451, "4.3.0", "broken")
    elif hook == "permit_auth":
        assert (result.kind, result.reply.code, result.reply.enhanced) == (Kind.DEFER, 454, "4.7.0")
    elif hook.startswith(("check_", "permit_")):
        assert (result.kind, result.reply.code, result.reply.enhanced) == (Kind.DEFER, 451, "4.3.0")
    else:
        assert result == ([] if hook.startswith("get_") else None)
    (_, event, fields), = world.log.lines
    assert (event, fields["plugin"], fields["hook"]) == ("plugin failed", "broken", hook)
    if reason is None:
        assert fields["reason"]
    else:
        assert fields["reason"] == reason
        assert "broken.py" in fields["traceback"]


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("hook", CALLED)
def test_on_error_ignore_goes_on_as_if_nothing_were_said(world: World, hook: str, how: str) -> None:
    world.hook("broken", hook, BROKEN[how][0])
    world.extra = "[plugin:broken]\ntimeout = 10ms\non_error = ignore\n"
    result = call(world.start("broken"), hook)
    kind = hook.partition("_")[0]
    if kind == "edit":
        assert result.header == b"Subject: x\r\n"
    else:
        assert result == ([] if kind == "get" else None)
    assert [event for _, event, _ in world.log.lines] == ["plugin failed"]


@pytest.mark.parametrize(("body", "reason"), [
    ("raise RuntimeError('broken')", "get_transports: RuntimeError: broken"),
    ("return 'nonsense'", "get_transports: expected {type: Transport class}, not a value of type str"),
])
def test_broken_transports_stop_the_start(world: World, body: str, reason: str) -> None:
    world.hook("broken", "get_transports", body)
    with pytest.raises(ConfigError) as caught:
        world.start("broken")
    assert caught.value.errors == [f"plugin broken: {reason}"]


@pytest.mark.parametrize(("hook", "body", "reason"), [
    ("check_rcpt", "return accept()", "a check_ hook can't accept"),
    ("check_message", "return {1: accept()}", "a check_ hook can't accept"),
    ("permit_rcpt", "return disconnect('no')", "a permit_ hook can't disconnect"),
    ("permit_rcpt", "return accept(transport='gone')", "no transport is named gone"),
    ("permit_rcpt", "return True", "expected a Verdict or None, not a value of type bool"),
    ("check_mail", "return reject('a', code=250)", "ValueError: reject() needs a code from 500 to 599, not 250"),
])
def test_a_verdict_that_does_not_fit_defers(world: World, hook: str, body: str, reason: str) -> None:
    world.hook("broken", hook, body)
    result = call(world.start("broken"), hook)
    assert (result.kind, result.reply.code) == (Kind.DEFER, 451)
    assert world.log.lines[0][2]["reason"] == reason


@pytest.mark.parametrize("hook", ["get_headers", "get_signatures"])
def test_a_field_that_would_make_a_second_one_is_refused(world: World, hook: str) -> None:
    world.hook("broken", hook, "return [('X-A', 'a\\r\\nBcc: b@example.test')]")
    assert call(world.start("broken"), hook) == [] or hook == "get_signatures"
    assert world.log.lines[0][2]["reason"] == "field 'X-A' can't be written"


def test_a_failure_of_one_does_not_hide_the_objection_before_it(world: World) -> None:
    world.hook("first", "check_rcpt", "return reject('no')")
    world.hook("broken", "check_rcpt", "raise RuntimeError")
    assert call(world.start("first", "broken"), "check_rcpt").kind is Kind.REJECT
    assert world.log.lines == []
    assert call(world.start("broken", "first"), "check_rcpt").kind is Kind.DEFER


def test_enable_is_the_order(world: World) -> None:
    world.hook("one", "permit_rcpt", "return reject('one')")
    world.hook("two", "permit_rcpt", "return reject('two')")
    world.hook("none", "permit_rcpt", "return None")
    assert call(world.start("none", "two", "one"), "permit_rcpt").reply.text == "two"
    plugins = world.start("none", "one", "two")
    assert call(plugins, "permit_rcpt").reply.text == "one"
    assert plugins.explain() == {"permit_rcpt": ["none", "one", "two"]}
    assert plugins.has("permit_rcpt") and not plugins.has("check_rcpt")


def test_nobody_answers(world: World) -> None:
    plugins = world.start()
    for hook in CALLED:
        result = call(plugins, hook)
        assert result == {"get": [], "edit": result}.get(hook.partition("_")[0])
    assert plugins.edit("edit_message", *arguments("edit_message")).body.size == 3


def test_edits_see_one_another_and_values_keep_their_plugin(world: World) -> None:
    for name in ("a", "b"):
        world.plugin(name, f"""
            class Plugin:
                def __init__(self, config, services): pass
                @hookimpl
                def edit_message(self, message):
                    return Message(message.header + b"X: {name}\\r\\n", message.separator, message.body)
                @hookimpl
                def get_size_limit(self): return {len(name)}
            """)
    plugins = world.start("b", "a")
    assert call(plugins, "edit_message").header == b"Subject: x\r\nX: b\r\nX: a\r\n"
    assert call(plugins, "get_size_limit") == [("b", 1), ("a", 1)]
    assert plugins.timings[("b", "edit_message")][0] == 1


def test_verdicts_about_recipients_add_up(world: World) -> None:
    world.hook("a", "check_message", "return {'x': reject('a')}")
    world.hook("b", "check_message", "return {'x': defer('b'), 'y': defer('b')}")
    found = call(world.start("a", "b"), "check_message")
    assert {key: verdict.kind for key, verdict in found.items()} == {"x": Kind.REJECT, "y": Kind.DEFER}
    world.hook("c", "check_message", "return reject('c')")
    assert isinstance(call(world.start("a", "c", "b"), "check_message"), Verdict)


def test_a_hook_takes_the_arguments_it_names(world: World) -> None:
    world.plugin("some", """
        class Plugin:
            def __init__(self, config, services): self.seen = None
            @hookimpl
            def on_refused(self, reply, session): self.seen = (session.id, reply.code)
        """)
    plugins = world.start("some")
    call(plugins, "on_refused")
    assert plugins.plugin("some").seen == ("s1", 250)


def test_deadlines_and_ends_of_callers_pass_through(world: World) -> None:
    world.hook("slow", "check_rcpt", "gevent.sleep(3600)")
    plugins = world.start("slow")
    outer = gevent.Timeout(0.01)
    with pytest.raises(gevent.Timeout) as caught, outer:
        call(plugins, "check_rcpt")
    assert caught.value is outer
    greenlet = gevent.spawn(call, plugins, "check_rcpt")
    gevent.sleep(0)
    greenlet.kill()
    assert isinstance(greenlet.value, gevent.GreenletExit)
    assert world.log.lines == []


def test_other_sessions_do_not_wait_for_a_hanging_plugin(world: World) -> None:
    world.hook("slow", "check_mail", "gevent.sleep(3600)")
    world.extra = "[plugin:slow]\ntimeout = 50ms\n"
    plugins = world.start("slow")
    hanging = [gevent.spawn(call, plugins, "check_mail") for _ in range(5)]
    gevent.sleep(0)
    assert call(plugins, "check_rcpt") is None
    assert not any(greenlet.ready() for greenlet in hanging)
    gevent.joinall(hanging)
    assert {greenlet.value.reply.code for greenlet in hanging} == {451}


def test_settings_reach_the_plugin_and_errors_name_their_place(world: World) -> None:
    world.plugin("keyed", """
        class Config(PluginConfig):
            words: list[str] = []
            number: int = 3
        class Plugin:
            def __init__(self, config, services): self.config = config
        """)
    world.extra = "[plugin:keyed]\nwords = a, b\ntimeout = 2s\n"
    config = world.start("keyed").settings("keyed")
    assert (config.words, config.number, config.timeout, config.on_error) == (["a", "b"], 3, 2, "defer")
    world.extra = "[plugin:keyed]\nnumber = x\nword = a\n"
    with pytest.raises(ConfigError) as caught:
        world.start("keyed")
    path = str(world.folder / "config.ini")
    assert [error.replace(path, "F") for error in caught.value.errors] == [
        "F:9: [plugin:keyed] number: expected a whole number, not 'x'",
        "F:10: [plugin:keyed] word: unknown key (did you mean words?)"]


@pytest.mark.parametrize(("body", "expected"), [
    ("class Plugin:\n    def __init__(self, config, services): raise OSError('gone')\n", "can't start: OSError: gone"),
    ("x = 1\n", "has no class Plugin"),
    ("import gmta_not_there\n", "can't start: ModuleNotFoundError"),
    ("class Config: pass\nclass Plugin:\n    def __init__(self, config, services): pass\n", "its Config is no PluginConfig"),
    ("class Plugin:\n    def __init__(self, config, services): pass\n    @hookimpl\n    def check_recpt(self): pass\n",
     "there is no hook check_recpt (did you mean check_rcpt?)"),
    ("class Plugin:\n    def __init__(self, config, services): pass\n    @hookimpl\n    def check_rcpt(self, rcpt): pass\n", "rcpt"),
    ("class Plugin:\n    def __init__(self, config, services): pass\n    @hookimpl(tryfirst=True)\n    def check_rcpt(self): pass\n",
     "the order of [plugins] enable is the only one"),
])
def test_a_plugin_that_is_none_stops_the_start(world: World, body: str, expected: str) -> None:
    world.plugin("bad", body)
    with pytest.raises(ConfigError) as caught:
        world.start("bad")
    assert len(caught.value.errors) == 1
    assert caught.value.errors[0].startswith("plugin bad") and expected in caught.value.errors[0]


def test_names_that_are_not_there(world: World) -> None:
    world.hook("greylist", "check_rcpt", "return None")
    world.extra = "[plugin:greylsit]\na = b\n[transport:x]\ntype = bix\n"
    with pytest.raises(ConfigError) as caught:
        world.start("graylist", "greylist", "greylist")
    text = "\n".join(caught.value.errors)
    assert "[plugins] enable: no plugin is named graylist (did you mean greylist?)" in text
    assert "[plugins] enable: greylist is named twice" in text
    assert "[plugin:greylsit]: no plugin is named greylsit (did you mean greylist?)" in text
    assert "[transport:x] type: expected a transport that a plugin has, not 'bix'" in text


def test_a_transport_needs_no_mention_in_enable(world: World) -> None:
    world.plugin("post", """
        class Keys(PluginConfig):
            host: str
        class Post:
            Config = Keys
            concurrency = 3
            def __init__(self, name, config, services): self.name, self.host, self.closed = name, config.host, False
            def deliver(self, delivery): return {}
            def close(self): self.closed = True
        class Plugin:
            def __init__(self, config, services): pass
            @hookimpl
            def get_transports(self): return {"post": Post, "courier": Post}
        """)
    world.extra = "[transport:a]\ntype = courier\nhost = h\nconcurrency = 7\nrate = 5/s\n"
    plugins = world.start()
    transport: Any = plugins.transports["a"]
    assert (transport.name, transport.host) == ("a", "h")
    assert not plugins.has("get_transports")
    plugins.close()
    assert transport.closed
    world.extra = "[transport:a]\ntype = courier\nhots = h\n"
    with pytest.raises(ConfigError) as caught:
        world.start()
    text = "\n".join(caught.value.errors)
    assert "[transport:a] host: expected to be given" in text
    assert "[transport:a] hots: unknown key (did you mean host?)" in text


def test_what_is_found_is_told(world: World) -> None:
    world.hook("mine", "check_rcpt", "return None")
    found = {plugin.name: plugin for plugin in world.start("mine").found()}
    assert found["mine"].enabled and found["mine"].doc == "Plugin mine."
    assert not found["box"].enabled and found["box"].where.endswith("box.py")
