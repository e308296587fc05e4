"""Sets message size limits by the role of the listener, below the core's `[limits] message_size`.

Hook: get_size_limit; the smallest answer of all plugins and the core wins, is advertised as SIZE, checked at MAIL and
enforced while the message streams in. Keys of `[plugin:size_limit]`: `mx`, `submission` (sizes such as 10MB) and
`authenticated` (takes the place of the role's for a session that has logged in); 0, the default, sets none.
Reply (given by the core): 552 5.3.4. RFC 1870 section 6.
"""

from __future__ import annotations

from typing import Any

from gmta import PluginConfig, Size, hookimpl
from gmta.mail.session import Session


class Config(PluginConfig):
    """Keys of [plugin:size_limit]; octets, 0 for no limit."""

    mx: Size = 0
    submission: Size = 0
    authenticated: Size = 0


class Plugin:
    """Answers from its keys alone."""

    def __init__(self, config: Config, services: Any) -> None:
        self._by_role = {"mx": config.mx, "submission": config.submission}
        self._authenticated = config.authenticated

    @hookimpl
    def get_size_limit(self, session: Session) -> int | None:
        """The limit in octets for this session, or None."""
        if session.user is not None and self._authenticated:
            return self._authenticated
        return self._by_role.get(session.role, 0) or None
