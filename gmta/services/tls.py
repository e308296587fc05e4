"""TLS contexts for listeners and for outgoing connections, made once and shared by all connections; sockets yield to the loop.

Certificates are read here; when TLS is offered or demanded is decided by listeners and transports. With no certificate
configured a listener offers no STARTTLS: `server_context` is not called. Failure: a certificate or key that can't be read or
do not belong together raises TlsError with the file's name. RFC 3207, RFC 8314, RFC 8996 (no TLS before 1.2).
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from gevent.ssl import SSLContext

from gmta.mail.session import TlsInfo

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TlsError(ValueError):
    """The certificate, key or setting can't be used."""


def minimum(version: str) -> ssl.TLSVersion:
    """The ssl constant of "1.2" or "1.3"; raises TlsError for anything else (RFC 8996)."""
    try:
        return _VERSIONS[version]
    except KeyError:
        raise TlsError(f"minimum_version must be 1.2 or 1.3, not {version}") from None


def server_context(certificate: str, key: str | None, minimum_version: str = "1.2",
                   names: Mapping[str, tuple[str, str]] | None = None) -> ssl.SSLContext:
    """A listener's context from PEM files; `key` may be in the certificate's file.

    names: {server name: (certificate, key)} for other certificates by SNI (RFC 6066 section 3).
    """
    context = _server_context(certificate, key, minimum_version)
    if names:
        others = {name.lower(): _server_context(*files, minimum_version) for name, files in names.items()}

        def choose(tls_object: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            other = others.get(name.lower().rstrip(".")) if name else None
            if other is not None:
                tls_object.context = other

        context.sni_callback = choose
    return context


def _server_context(certificate: str, key: str | None, minimum_version: str) -> ssl.SSLContext:
    context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum(minimum_version)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"certificate {certificate} with key {key or certificate}: {error}") from error
    return context


def client_context(verify: bool = False, *, match_name: bool = True, ca_file: str | None = None,
                   minimum_version: str = "1.2") -> ssl.SSLContext:
    """A context for outgoing connections.

    Opportunistic TLS verifies nothing and takes small keys and old ciphers too: all of it still beats clear text (RFC 7435).
    verify: the chain must lead to `ca_file` or to the system's authorities, and with match_name the certificate must be for the
    host; without it the caller compares names.
    """
    context = SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = minimum(minimum_version)
    context.options |= ssl.OP_NO_COMPRESSION
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("DEFAULT:@SECLEVEL=1")
        return context
    context.check_hostname = match_name
    try:
        if ca_file:
            context.load_verify_locations(ca_file)
        else:
            context.load_default_certs()
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"authorities {ca_file}: {error}") from error
    return context


def tls_info(tls_socket: ssl.SSLSocket, server_name: str = "") -> TlsInfo:
    """The facts of an established session, for the Session and the Received field."""
    name, _, bits = tls_socket.cipher() or ("", "", 0)
    return TlsInfo(tls_socket.version() or "", name, bits or 0, server_name)
