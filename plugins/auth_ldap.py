"""Asks an LDAP directory who may log in: finds the user's entry, then binds as it with the password.

Hooks: permit_auth, get_auth_mechanisms (PLAIN, LOGIN).  Keys: urls, starttls, ca_file, bind_dn, bind_password, base_dn, filter,
user_attribute, address_attributes, connections, request_timeout.  Replies: none of its own; 454 4.7.0 from the core where no
directory can be asked, or where it can't say.

Needs the package ldap3 (the extra `ldap`). The user is whom `user_attribute` of the entry names. Passwords go under TLS alone, but to
a directory on this machine; certificates are verified, referrals are not followed. An empty password is asked of no directory: it
would be taken as an unauthenticated bind (RFC 4513 section 5.1.2). Where there is no such user a bind is tried all the same, so that
it takes as long. Connections are kept: some bound as `bind_dn` for searches, some for binds; the first of `urls` that answers is
used. RFC 4511, RFC 4513, RFC 4515 (filters).
"""

from __future__ import annotations

import math
import re
import secrets
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import gevent
from pydantic import Field, field_validator, model_validator

from gmta import Credentials, Duration, PluginConfig, Session, Verdict, accept, hookimpl
from gmta.config import ExistingFile
from gmta.services.passwords import user_key
from gmta.services.turns import Turns
from gmta.smtp.sasl import prepared

try:
    import ldap3
    from ldap3.core.exceptions import LDAPException
    from ldap3.operation.search import parse_filter
    from ldap3.utils.conv import escape_filter_chars
except ImportError as missing:
    raise ImportError("auth_ldap needs the package ldap3: pip install 'gmta[ldap]'") from missing

T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
IDLE_S = 60.0  # a connection unused for longer may have been forgotten on its way
_SMTP = re.compile(r"\Asmtp:", re.I)  # what proxyAddresses of Exchange begin with
SUCCESS, SIZE_LIMIT_EXCEEDED = 0, 4
# RFC 4511 appendix A: constraintViolation, noSuchObject, inappropriateAuthentication, invalidCredentials, insufficientAccessRights,
# unwillingToPerform. All are about this entry and password; other codes are about the directory.
REFUSED = frozenset({19, 32, 48, 49, 50, 53})


class Config(PluginConfig):
    """[plugin:auth_ldap]"""

    urls: list[str] = Field(min_length=1, description="ldaps://HOST[:PORT] or ldap://HOST[:PORT]; the first that answers is asked")
    starttls: bool = Field(True, description="StartTLS on ldap://; without it only on this machine")
    ca_file: ExistingFile = Field("", description="authorities that the directory's certificate is verified by; default: the system's")
    bind_dn: str = Field("", description="who searches; default: anonymous")
    bind_password: str = Field("", description="its password")
    base_dn: str = Field(description="where users are, at any depth")
    filter: str = Field("(mail={user})", description="which entry is a user's: {user}, {local} and {domain} of the name, escaped")
    user_attribute: str = Field("mail", min_length=1, description="what a user is known by")
    address_attributes: list[str] = Field([], description="addresses that sender_login lets the user send as")
    connections: int = Field(8, ge=1, le=100, description="logins that are asked for at a time, by each worker")
    request_timeout: Duration = Field("10s", gt=0, description="for a whole login")  # type: ignore[assignment]

    @field_validator("filter")
    @classmethod
    def _is_filter(cls, value: str) -> str:
        if "{user}" not in value and "{local}" not in value:
            raise ValueError("a filter with {user} or {local}")
        try:
            parse_filter(_filled(value, "user@example.org"), None, False, False, None, False)
        except LDAPException as error:
            raise ValueError(f"a filter as in RFC 4515: {error}") from None
        return value

    @model_validator(mode="after")
    def _is_private(self) -> Config:
        for url in self.urls:
            host = _Place.of(url).host
            if url.startswith("ldap:") and not self.starttls and host not in LOOPBACK:
                raise ValueError(f"{url}: passwords go under TLS, but for a directory on this machine: starttls = yes")
        if self.bind_dn and not self.bind_password:
            raise ValueError("a bind_password for bind_dn: without one the bind is anonymous")
        return self


class _Place(NamedTuple):
    """Where a directory is."""

    tls: bool
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> _Place:
        parts = urlsplit(url)
        if parts.scheme not in ("ldap", "ldaps") or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
            raise ValueError(f"{url}: ldaps://HOST[:PORT] or ldap://HOST[:PORT]")
        tls = parts.scheme == "ldaps"
        return cls(tls, parts.hostname, parts.port or (636 if tls else 389))


class _Entry(NamedTuple):
    """A user's entry. user: as it is to be known."""

    dn: str
    user: str
    addresses: frozenset[str]


class LdapError(Exception):
    """No directory can be asked, or it does not say."""


class Plugin:
    """A client of one directory, which may be on several hosts."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._services = services
        self._places = [_Place.of(url) for url in config.urls]
        self._wait_s = math.ceil(config.request_timeout)  # ldap3 takes whole seconds
        self._turns = Turns(config.connections, services.clock)
        self._searching: list[tuple[Any, float]] = []  # connections that nobody uses, and since when
        self._binding: list[tuple[Any, float]] = []

    @hookimpl
    def get_auth_mechanisms(self) -> list[str]:
        """Those that have a password to pass on."""
        return ["PLAIN", "LOGIN"]

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """accept(), None for a wrong password; raises LdapError where the directory does not know."""
        if credentials.mechanism not in ("PLAIN", "LOGIN") or not credentials.secret:
            return None
        config = self._config
        with (self._turns.turn(session.peer_ip, user_key(credentials.user), False),
              gevent.Timeout(config.request_timeout, LdapError(f"no answer within {config.request_timeout:g} s"))):
            entry = self._use(self._searching, True, lambda connection: self._find(connection, credentials.user))
            dn = entry.dn if entry is not None else f"cn={secrets.token_hex(8)},{config.base_dn}"
            secret = prepared(credentials.secret)  # RFC 4513 section 5.1.3
            right = self._use(self._binding, False, lambda connection: _bind(connection, dn, secret))
        if entry is None or not right:
            return None
        self._turns.was_right(session.peer_ip)
        credentials.user = entry.user
        if config.address_attributes:
            session.notes["addresses"] = (entry.user, entry.addresses)
        return accept()

    # --- connections -----------------------------------------------------------------------------------------------

    def _use(self, kept: list[tuple[Any, float]], bound: bool, act: Callable[[Any], T]) -> T:
        """Does something with a connection that nobody else uses meanwhile; one that was kept may be dead, then another is taken."""
        while True:
            fresh = not kept
            connection, since = (self._open(bound), 0.0) if fresh else kept.pop()
            if not fresh and not 0 <= self._services.clock() - since < IDLE_S:
                _end(connection)
                continue
            try:
                result = act(connection)
            except (LDAPException, OSError, ValueError) as error:
                _end(connection)
                if fresh:
                    raise LdapError(f"{type(error).__name__} at {connection.server.host}") from None  # its text may have what was sent
            except BaseException:
                _end(connection)
                raise
            else:
                kept.append((connection, self._services.clock()))
                return result

    def _open(self, bound: bool) -> Any:
        """A connection to the first directory that answers, moved to the front. bound: as bind_dn."""
        troubles: list[str] = []
        for place in list(self._places):
            try:
                connection = self._open_to(place, bound)
            except (LdapError, LDAPException, OSError, ValueError) as error:
                troubles.append(f"{place.host}: {error}")
                continue
            if place is not self._places[0]:
                self._places.remove(place)
                self._places.insert(0, place)
            return connection
        raise LdapError("; ".join(troubles))

    def _open_to(self, place: _Place, bound: bool) -> Any:
        config = self._config
        tls = ldap3.Tls(validate=ssl.CERT_REQUIRED, ca_certs_file=config.ca_file or None, sni=place.host)
        server = ldap3.Server(place.host, place.port, use_ssl=place.tls, tls=tls, get_info=ldap3.NONE,
                              connect_timeout=config.request_timeout / len(self._places))
        connection = ldap3.Connection(server, auto_bind=ldap3.AUTO_BIND_NONE, client_strategy=ldap3.SYNC, auto_referrals=False, read_only=True,
                                      check_names=False, auto_escape=False, auto_encode=False, auto_range=False, receive_timeout=self._wait_s)
        try:
            connection.open(read_server_info=False)
            if config.starttls and not place.tls and not connection.start_tls(read_server_info=False):
                raise LdapError("no StartTLS")
            if bound and config.bind_dn and not _bind(connection, config.bind_dn, config.bind_password.encode()):
                raise LdapError(f"{config.bind_dn} may not bind ({connection.result['description']})")
        except BaseException:
            _end(connection)
            raise
        return connection

    # --- what is asked ---------------------------------------------------------------------------------------------

    def _find(self, connection: Any, user: str) -> _Entry | None:
        """The one entry of a user; None where there is none, or more than one."""
        config = self._config
        _must_be_open(connection)
        connection.search(config.base_dn, _filled(config.filter, user), search_scope=ldap3.SUBTREE, size_limit=2, time_limit=self._wait_s,
                          attributes=[config.user_attribute, *config.address_attributes])
        code = connection.result["result"]
        if code not in (SUCCESS, SIZE_LIMIT_EXCEEDED):
            raise LdapError(f"a search ended with {connection.result['description']}")
        found = [one for one in connection.response if one["type"] == "searchResEntry"]
        if len(found) > 1 or code == SIZE_LIMIT_EXCEEDED:
            self._services.log.warning("several entries of one user", filter=config.filter, user=user, dn=[one["dn"] for one in found])
            return None
        if not found or not found[0]["dn"]:  # an empty name would bind as nobody
            return None
        values = {name.lower(): [value.decode("utf-8", "replace").strip() for value in raw] for name, raw in found[0]["raw_attributes"].items()}
        names = [user_key(name) for name in values.get(config.user_attribute.lower(), ()) if name and name.isprintable()]
        if not names:
            raise LdapError(f"{found[0]['dn']} has no {config.user_attribute}")
        typed = user_key(user)
        addresses = frozenset(user_key(_SMTP.sub("", value)) for name in config.address_attributes for value in values.get(name.lower(), ()))
        return _Entry(found[0]["dn"], typed if typed in names else names[0], addresses)


def _filled(pattern: str, user: str) -> str:
    """The filter for a name, which can't become more than a value (RFC 4515 section 3)."""
    local, at, domain = user.rpartition("@")
    if not at:
        local, domain = user, ""
    parts = {"{user}": user, "{local}": local, "{domain}": domain}
    filled = ""
    while pattern:
        for name, value in parts.items():
            if pattern.startswith(name):
                filled += escape_filter_chars(value)
                pattern = pattern[len(name):]
                break
        else:
            filled, pattern = filled + pattern[0], pattern[1:]
    return filled


def _must_be_open(connection: Any) -> None:
    """ldap3 opens a closed connection anew at its next use, and then without StartTLS."""
    if connection.closed:
        raise LdapError("the directory has ended the connection")


def _bind(connection: Any, dn: str, secret: bytes) -> bool:
    """Whether the password is that of the entry; raises LdapError where the directory does not say."""
    _must_be_open(connection)
    try:
        connection.rebind(user=dn, password=secret, authentication=ldap3.SIMPLE, read_server_info=False)
    finally:
        connection.password = None
    code = connection.result["result"]
    if code != SUCCESS and code not in REFUSED:
        raise LdapError(f"a bind ended with {connection.result['description']}")
    return bool(code == SUCCESS)


def _end(connection: Any) -> None:
    """Closes its socket."""
    connection.strategy.close()
    if connection.socket is not None:
        connection.socket.close()
