"""Asks a web service who may log in.

Hooks: permit_auth, get_auth_mechanisms (PLAIN, LOGIN).  Keys: url, authorization, ca_file, request_timeout.  Replies: none of its own;
454 4.7.0 from the core where the service can't be asked.

POST of JSON: {"user", "password", "ip", "helo", "mechanism", "tls", "listener"}. Answer 200 (or 204): right, and a JSON object may name
the `user` as it is to be known; 401, 403 or 404: wrong, other plugins are asked; anything else: the service is out of order. Passwords
go over HTTPS alone, but for a service on this machine; redirections are not followed.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import Field, field_validator

from gmta import Credentials, Duration, PluginConfig, Session, Verdict, accept, hookimpl
from gmta.config import ExistingFile
from gmta.services.ask import WebService, private_url

LONGEST = 64 * 1024


class Config(PluginConfig):
    """[plugin:auth_http]"""

    url: str = Field(description="what is asked; https, or http on this machine")
    authorization: str = Field("", description="value of the header Authorization")
    ca_file: ExistingFile = Field("", description="authorities that the service's certificate is verified by; default: the system's")
    request_timeout: Duration = Field("10s", gt=0, description="for a whole request")  # type: ignore[assignment]

    @field_validator("url")
    @classmethod
    def _is_private(cls, value: str) -> str:
        return private_url(value)


class HttpError(Exception):
    """The service can't be asked, or answers oddly."""


class Plugin:
    """A client of one service, with connections that are kept."""

    def __init__(self, config: Config, services: Any) -> None:
        self._service = WebService(config.url, config.authorization, config.ca_file, config.request_timeout)

    @hookimpl
    def get_auth_mechanisms(self) -> list[str]:
        """Those that have a password to pass on."""
        return ["PLAIN", "LOGIN"]

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """accept(), None for a wrong password; raises HttpError, ServiceError where the service does not know."""
        if credentials.mechanism not in ("PLAIN", "LOGIN"):
            return None
        asked = {"user": credentials.user, "password": credentials.secret, "ip": session.peer_ip, "helo": session.helo,
                 "mechanism": credentials.mechanism, "tls": session.tls is not None, "listener": session.listener}
        status, octets = self._service.ask(asked, LONGEST)
        if status in (401, 403, 404):
            return None
        if status not in (200, 204):
            raise HttpError(f"the service answers {status}")
        named = _named(octets)
        if named:
            credentials.user = named
        return accept()


def _named(octets: bytes) -> str:
    """The user that the answer names, or ""."""
    try:
        said = json.loads(octets) if octets.strip() else None
    except ValueError:
        return ""
    named = said.get("user") if isinstance(said, dict) else None
    return named if isinstance(named, str) and named.isprintable() else ""
