"""plugins/size_limit.py: limits by role."""

from __future__ import annotations

from gmta.mail.session import Session
from gmta_plugins import size_limit


def test_by_role() -> None:
    plugin = size_limit.Plugin(size_limit.Config(mx="10MB", submission="20MB", authenticated="30MB"), None)
    user = Session("s", role="submission")
    assert plugin.get_size_limit(Session("s")) == 10 * 1024 * 1024
    assert plugin.get_size_limit(user) == 20 * 1024 * 1024
    user.user = "alice"
    assert plugin.get_size_limit(user) == 30 * 1024 * 1024


def test_none_by_default() -> None:
    plugin = size_limit.Plugin(size_limit.Config(), None)
    assert plugin.get_size_limit(Session("s")) is None
    assert plugin.get_size_limit(Session("s", role="local")) is None
