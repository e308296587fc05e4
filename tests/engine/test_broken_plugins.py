"""Every hook of a plugin that breaks: the answer that its kind fixes, its name in the log, and nobody else concerned."""

from __future__ import annotations

import contextlib
from typing import Any

import gevent
import pytest

from gmta import hookimpl
from gmta.hookspecs import HOOKS
from gmta.testing import MemoryServer

TALK = r"""
S: 220
C: EHLO client.example.com
S: 250
STARTTLS-COMMAND
C: EHLO client.example.com
S: 250
C: AUTH PLAIN \{base64 \0user@example.test\0secret}
S: 235
C: MAIL FROM:<a@example.com>
S: 250
C: RCPT TO:<user@example.test>
S: 250
C: DATA
S: 354
C: Subject: x
C:
C: x
C: .
S: 250
C: QUIT
S: 221
""".replace("STARTTLS-COMMAND", "C: STARTTLS\nS: 220\nSTARTTLS")
# hook: the line whose answer becomes the code; None where the client must not notice
TOLD: dict[str, tuple[str, int] | None] = {
    "check_connect": ("", 451), "check_helo": ("C: EHLO", 451), "permit_auth": ("C: AUTH", 454), "check_mail": ("C: MAIL", 451),
    "permit_rcpt": ("C: RCPT", 451), "check_rcpt": ("C: RCPT", 451), "check_data": ("C: DATA", 451), "check_message": ("C: .", 451),
    "edit_message": ("C: .", 451), "get_signatures": ("C: .", 451), "get_auth_mechanisms": None, "get_size_limit": None, "get_headers": None,
    "on_session_opened": None, "on_session_closed": None, "on_queued": None}
ELSEWHERE = {"on_worker_started", "on_worker_stopping", "get_transports", "get_route", "on_refused", "on_delivery", "on_bounced"}


def broken(hook: str, way: str) -> type:
    """A plugin class with one hook, broken in that way."""

    def fault(self: Any) -> Any:
        if way == "raises":
            raise ValueError("boom")
        if way == "hangs":
            gevent.sleep(3600)
        return "nonsense"

    fault.__name__ = hook
    return type("Plugin", (), {"__doc__": "Breaks.", "__init__": lambda self, config, services: None, hook: hookimpl(fault)})


def dialogue(told: tuple[str, int] | None) -> str:
    """The talk as it goes on up to the answer that is told."""
    if told is None:
        return TALK
    line, code = told
    end = f"S: {code}\n"
    if not line:
        return end + "EOF\n"
    lines = TALK.splitlines(keepends=True)
    at = next(number for number, one in enumerate(lines) if one.startswith(line))
    return "".join(lines[:at + 1]) + end + "CLOSE\n"


@pytest.mark.parametrize("way", ["raises", "hangs", "returns a string"])
@pytest.mark.parametrize("hook", TOLD)
def test_a_broken_hook_is_answered_as_its_kind_says(hook: str, way: str) -> None:
    with contextlib.closing(MemoryServer(broken(hook, way), keys={"timeout": "10ms"})) as server:
        played = server.play(dialogue(TOLD[hook]))
    failures = played.log.of("plugin failed")
    assert {(failure["plugin"], failure["hook"]) for failure in failures} == {("plugin", hook)}
    assert bool(played.queued) is (TOLD[hook] is None)


@pytest.mark.parametrize("way", ["raises", "hangs", "returns a string"])
def test_a_broken_observer_of_refusals_does_not_change_them(way: str) -> None:
    with contextlib.closing(MemoryServer(broken("on_refused", way), keys={"timeout": "10ms"})) as server:
        played = server.play("S: 220\nC: HELO c.example.com\nS: 250\nC: MAIL FROM:<a@example.com>\nS: 250\n"
                             "C: RCPT TO:<nobody@example.test>\nS: 550\nCLOSE\n")
    assert [failure["hook"] for failure in played.log.of("plugin failed")] == ["on_refused"]


def test_sessions_beside_a_hanging_one_go_on() -> None:
    """The plugin hangs for one sender; another session is served whole meanwhile."""

    class Plugin:
        """Hangs for one sender."""

        def __init__(self, config: Any, services: Any) -> None:
            self.hanging = 0

        @hookimpl
        def check_mail(self, transaction: Any) -> None:
            if transaction.sender.mailbox == "slow":
                self.hanging += 1
                gevent.sleep(3600)

    with contextlib.closing(MemoryServer(Plugin, keys={"timeout": "100ms"})) as server:
        slow = gevent.spawn(server.play, "S: 220\nC: HELO c.example.com\nS: 250\nC: MAIL FROM:<slow@example.com>\nS: 451\nCLOSE\n")
        gevent.sleep(0)
        assert server.plugins.plugin("plugin").hanging == 1
        server.play(TALK)
        assert not slow.ready()
        slow.get()


def test_every_hook_is_named_here_or_belongs_to_no_session() -> None:
    assert set(TOLD) | ELSEWHERE == set(HOOKS)
