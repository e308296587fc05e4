"""TLS contexts for listeners and for outgoing connections, made once and shared by all connections; sockets yield to the loop.

Certificates are read here; when TLS is offered or demanded is decided by listeners and transports. With no certificate
configured a listener offers no STARTTLS: `server_context` is not called. Failure: a certificate or key that can't be read or
do not belong together raises TlsError with the file's name. RFC 3207, RFC 8314, RFC 8996 (no TLS before 1.2).
"""

from __future__ import annotations

import _ssl
import ctypes
import os
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from gevent.ssl import SSLContext

from gmta.mail.session import TlsInfo

LOOK_S = 1.0  # how often files are looked at, when sessions begin
SETTLE_S = 3.0  # who renews a certificate may put its files in place one after the other: at the start there is no old pair to go on with
# Mozilla's "intermediate", without the ones that need parameters for Diffie-Hellman; those of TLS 1.3 are OpenSSL's own
CIPHERS = ("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384:"
           "ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305")
_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TlsError(ValueError):
    """The certificate, key or setting can't be used."""


def minimum(version: str) -> ssl.TLSVersion:
    """The ssl constant of "1.2" or "1.3"; raises TlsError for anything else (RFC 8996)."""
    try:
        return _VERSIONS[version]
    except KeyError:
        raise TlsError(f"minimum_version must be 1.2 or 1.3, not {version}") from None


class ServerContext(SSLContext):
    """A listener's context with what of its certificate a channel can be bound to (RFC 5929 section 4), b"" for nothing."""

    end_point = b""


class ServerTls:
    """A listener's certificates as their files are now: `wrap_socket` begins a session with them.

    names: {server name: (certificate, key)} for other certificates by SNI (RFC 6066 section 3). client_ca: authorities of whose
    certificates clients are asked for one. Files that change are read again; where that fails, the old ones stay and the log says so.
    Raises TlsError where there is no pair to begin with, even after SETTLE_S.
    """

    def __init__(self, certificate: str, key: str | None, minimum_version: str = "1.2", names: Mapping[str, tuple[str, str]] | None = None,
                 client_ca: str = "", log: Any = None, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._files = (certificate, key, minimum_version, names, client_ca)
        self._log = log
        self._clock = clock
        self._looked_at = clock()
        while True:
            try:
                self._stamp = self._look()
                self._context = server_context(*self._files)
                break
            except TlsError:
                if clock() - self._looked_at >= SETTLE_S:
                    raise
            sleep(0.1)

    def _look(self) -> tuple[Any, ...]:
        """What tells whether the files are others than before."""
        certificate, key, _, names, client_ca = self._files
        paths = [certificate, key, client_ca, *(path for files in (names or {}).values() for path in files)]
        return tuple(map(_stamp, filter(None, paths)))

    def wrap_socket(self, sock: Any, **how: Any) -> Any:
        """A TLS socket on `sock`; the handshake is the caller's."""
        now = self._clock()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._refresh()
        return self._context.wrap_socket(sock, **how)

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._context = server_context(*self._files)
        except TlsError as error:
            if self._log is not None:
                self._log.error("certificates can't be read again", error=str(error))
        else:
            if self._log is not None:
                self._log.info("certificates read again", certificate=self._files[0])


def _stamp(path: str) -> tuple[int, ...]:
    """What is other once a file is; () where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    # not the time of the last change to the content: a copy may keep its original's, and permissions do not touch it
    return found.st_ctime_ns, found.st_size, found.st_ino


def close_notify(tls_socket: Any) -> None:
    """Tells the peer of a TLS session that nothing follows (RFC 8446 section 6.1), so that it knows what it has to be whole. Waits for nothing."""
    session = getattr(tls_socket, "_sslobj", None)
    if session is not None:
        try:
            session.shutdown()
        except (OSError, ValueError):
            pass  # what the peer has to say to that is not waited for


def server_context(certificate: str, key: str | None, minimum_version: str = "1.2",
                   names: Mapping[str, tuple[str, str]] | None = None, client_ca: str = "") -> ssl.SSLContext:
    """A listener's context from PEM files; `key` may be in the certificate's file. names, client_ca: see ServerTls."""
    context = _server_context(certificate, key, minimum_version, client_ca)
    if names:
        others = {name.lower(): _server_context(*files, minimum_version, client_ca) for name, files in names.items()}

        def choose(tls_object: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            other = others.get(name.lower().rstrip(".")) if name else None
            if other is not None:
                tls_object.context = other

        context.sni_callback = choose
    return context


def _server_context(certificate: str, key: str | None, minimum_version: str, client_ca: str = "") -> ServerContext:
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum(minimum_version)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(CIPHERS)
    try:
        context.load_cert_chain(certificate, key or None)
        context.end_point = _end_point(certificate)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise TlsError(f"certificate {certificate} with key {key or certificate}: {error}") from error
    if client_ca:
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"client_ca {client_ca}: {error}") from error
    return context


def _end_point(certificate: str) -> bytes:
    """tls-server-end-point data (RFC 5929 section 4.1); b"" where the certificate's signature has no hash of its own (Ed25519)."""
    # here, since a process that has no certificate to look into starts sooner without
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509 import load_pem_x509_certificate

    with open(certificate, "rb") as file:
        found = load_pem_x509_certificate(file.read())
    try:
        algorithm = found.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return b""
    if algorithm is None:
        return b""
    return found.fingerprint(SHA256() if algorithm.name in ("md5", "sha1") else algorithm)


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
    context = getattr(tls_socket, "context", None)
    if not isinstance(context, ServerContext):
        return TlsInfo(tls_socket.version() or "", name, bits or 0, server_name)
    client = _client_name(tls_socket.getpeercert() or {}) if context.verify_mode != ssl.CERT_NONE else ""
    bindings = {}
    exported = _exported(tls_socket) if tls_socket.version() == "TLSv1.3" else b""
    if exported:  # clients that bind at all take this one first: without it they are better off without any
        bindings["tls-exporter"] = exported
        if context.end_point:
            bindings["tls-server-end-point"] = context.end_point
    return TlsInfo(tls_socket.version() or "", name, bits or 0, server_name, client, bindings)


def _exported(tls_socket: Any) -> bytes:
    """tls-exporter data of a TLS 1.3 session (RFC 9266 section 2), b"" where it can't be had.

    Python's ssl has no way to it, so OpenSSL is asked itself. Where its session lies in Python's object has been the same since
    3.6; that it lies there now is seen by its neighbour, the context, before anything is done with it.
    """
    inner = getattr(tls_socket, "_sslobj", None)
    if inner is None or type(inner).__module__ != "_ssl" or type(inner).__name__ != "_SSLSocket" or type(inner).__basicsize__ < 48 or _export is None:
        return b""
    address = id(inner) + object.__basicsize__  # then: the socket, SSL *, the context
    word = ctypes.sizeof(ctypes.c_void_p)
    if ctypes.c_void_p.from_address(address + 2 * word).value != id(inner.context):
        return b""
    session = ctypes.c_void_p.from_address(address + word).value
    out = ctypes.create_string_buffer(32)
    return out.raw if session and _export(session, out, 32, _LABEL, len(_LABEL), b"", 0, 1) == 1 else b""


def _find_export() -> Callable[..., int] | None:
    """SSL_export_keying_material of the library that Python's ssl uses, or None."""
    try:
        found = ctypes.CDLL(_ssl.__file__).SSL_export_keying_material
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p,
                      ctypes.c_size_t, ctypes.c_int)
    function: Callable[..., int] = found
    return function


_export = _find_export() if sys.implementation.name == "cpython" else None
_LABEL = b"EXPORTER-Channel-Binding"


def _client_name(certificate: Mapping[str, Any]) -> str:
    """The name in a verified certificate: of a host, else of a mailbox, else the common name (RFC 6125 section 6.4.4)."""
    names = dict(reversed(certificate.get("subjectAltName", ())))
    subject = {kind: value for part in certificate.get("subject", ()) for kind, value in part}
    return str(names.get("DNS") or names.get("email") or subject.get("commonName") or "")
