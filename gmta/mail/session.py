"""A connection and the transactions in it, as hooks see them.

Session lives as long as the connection; a Transaction is born at MAIL and replaced, never cleaned, at RSET, EHLO or the
end of data. Only the pipeline changes them; hooks read, add notes, tags and AuthResults. RFC 5321 section 4.1.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gmta.mail.address import Address

if TYPE_CHECKING:
    from gmta.mail.message import Message


class TlsInfo:
    """Facts of a TLS session: version ("TLSv1.3"), cipher name, key bits, server_name (SNI), verified client name.

    bindings: what ties an authentication to this channel, by type: tls-exporter (RFC 9266), tls-server-end-point (RFC 5929).
    """

    __slots__ = ("bindings", "bits", "cipher", "client_name", "server_name", "version")

    def __init__(self, version: str, cipher: str, bits: int, server_name: str = "", client_name: str = "",
                 bindings: dict[str, bytes] | None = None) -> None:
        self.version = version
        self.cipher = cipher
        self.bits = bits
        self.server_name = server_name
        self.client_name = client_name
        self.bindings = bindings or {}


class AuthResult:
    """One method's result for Authentication-Results (RFC 8601 section 2.2).

    method "spf", result "pass", properties like (("smtp.mailfrom", "example.org"),), reason or "".
    """

    __slots__ = ("method", "properties", "reason", "result")

    def __init__(self, method: str, result: str, properties: tuple[tuple[str, str], ...] = (), reason: str = "") -> None:
        self.method = method
        self.result = result
        self.properties = properties
        self.reason = reason

    def __repr__(self) -> str:
        return f"AuthResult({self.method}={self.result})"


class Session:
    """One connection.

    id: short unique text for logs.  listener: section name.  role: "mx", "submission" or "local" (gmta's own mail).
    peer_name: verified reverse name or "".  iprev: how that was found out (RFC 8601 section 2.7.3), None where nobody asked.  user: None until AUTH.  trusted: authenticated or from [domains] relay_from.
    opened_at: Unix seconds.  notes: one value a plugin, keyed by its name.
    """

    __slots__ = ("_notes", "esmtp", "helo", "id", "iprev", "listener", "local_ip", "local_port", "opened_at", "peer_ip",
                 "peer_name", "peer_port", "relay_network", "role", "tls", "user")

    def __init__(self, id: str, *, role: str = "mx", listener: str = "mx", peer_ip: str = "", peer_port: int = 0,
                 local_ip: str = "", local_port: int = 0, relay_network: bool = False, opened_at: float = 0.0) -> None:
        self.id = id
        self.role = role
        self.listener = listener
        self.peer_ip = peer_ip
        self.peer_port = peer_port
        self.peer_name = ""
        self.iprev: AuthResult | None = None
        self.local_ip = local_ip
        self.local_port = local_port
        self.helo = ""
        self.esmtp = False
        self.tls: TlsInfo | None = None
        self.user: str | None = None
        self.relay_network = relay_network
        self.opened_at = opened_at
        self._notes: dict[str, Any] | None = None

    @property
    def trusted(self) -> bool:
        """True for an authenticated user and for clients of [domains] relay_from."""
        return self.relay_network or self.user is not None

    @property
    def notes(self) -> dict[str, Any]:
        """What plugins keep about this session, keyed by plugin name."""
        if self._notes is None:
            self._notes = {}
        return self._notes

    @property
    def protocol(self) -> str:
        """The with-protocol of Received (RFC 3848): SMTP, ESMTP, ESMTPS, ESMTPA, ESMTPSA, or the UTF8 forms' stem."""
        if not self.esmtp:
            return "SMTP"
        return "ESMTP" + ("S" if self.tls else "") + ("A" if self.user is not None else "")


class Recipient:
    """One recipient of a transaction, as the pipeline keeps it.

    address: where it goes (after aliases).  original: as given in RCPT.  transport: chosen by permit_rcpt or None.
    notify: subset of {"SUCCESS", "FAILURE", "DELAY"} or {"NEVER"}, empty for the default (RFC 3461 section 4.1).
    orcpt: "type;xtext-decoded address" or "" (RFC 3461 section 4.2).
    """

    __slots__ = ("address", "notify", "orcpt", "original", "transport")

    def __init__(self, address: Address, *, original: Address | None = None, transport: str | None = None,
                 notify: frozenset[str] = frozenset(), orcpt: str = "") -> None:
        self.address = address
        self.original = original if original is not None else address
        self.transport = transport
        self.notify = notify
        self.orcpt = orcpt

    def __repr__(self) -> str:
        return f"Recipient({self.address})"


class Transaction:
    """One mail transaction (RFC 5321 section 3.3).

    id: the queue id that the message will have.  size: declared SIZE in octets or None.  body: "7BIT", "8BITMIME" or
    "BINARYMIME".  ret: "FULL", "HDRS" or "".  auth: the AUTH= parameter, None if absent.  tags: words for other plugins and for routing.
    requiretls: it must not leave without verified TLS (RFC 8689).  changes: what edit_message hooks did to the message, for its history.
    """

    __slots__ = ("_changes", "_notes", "_tags", "auth", "auth_results", "body", "envid", "id", "message", "recipients", "requiretls",
                 "ret", "sender", "size", "smtputf8")

    def __init__(self, id: str, sender: Address, *, size: int | None = None, body: str = "7BIT", smtputf8: bool = False,
                 ret: str = "", envid: str = "", auth: str | None = None, requiretls: bool = False) -> None:
        self.id = id
        self.sender = sender
        self.size = size
        self.body = body
        self.smtputf8 = smtputf8
        self.ret = ret
        self.envid = envid
        self.auth = auth
        self.requiretls = requiretls
        self.recipients: list[Recipient] = []
        self.auth_results: list[AuthResult] = []
        self.message: Message | None = None
        self._tags: set[str] | None = None
        self._notes: dict[str, Any] | None = None
        self._changes: list[str] | None = None

    @property
    def tags(self) -> set[str]:
        """Words that plugins leave for one another ("spam", "whitelisted")."""
        if self._tags is None:
            self._tags = set()
        return self._tags

    @property
    def changes(self) -> list[str]:
        """What edit_message hooks did to the message, each in a few words; a hook that changes something adds its own."""
        if self._changes is None:
            self._changes = []
        return self._changes

    @property
    def notes(self) -> dict[str, Any]:
        """What plugins keep about this transaction, keyed by plugin name."""
        if self._notes is None:
            self._notes = {}
        return self._notes
