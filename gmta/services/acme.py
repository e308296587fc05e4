"""Certificates obtained and renewed by ACME (RFC 8555), for the names that `Config.obtained` has, with certbot's package `acme`.

One worker of all runs `Acme`: number 0, and of two such during a reload the one that has the lock. It answers the authority's challenges
itself, on sockets that the supervisor has bound: http-01 (RFC 8555 section 8.3) or tls-alpn-01 (RFC 8737). A certificate lies in one file
together with its key, which is replaced as a whole; services.tls sees that in every worker. Until there is one, `provide` puts a
self-signed one in its place. Renewal is when the authority says (RFC 9773), or when a third of the lifetime is left.
Failure: logged, and tried again after a pause that grows; what is there stays in use. The package is imported with `Acme`, not with this file.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import random
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gevent
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from gevent.ssl import SSLContext

import gmta
from gmta.services.files import sync_directory, write_new

if TYPE_CHECKING:
    from gmta.config import Config
    from gmta.services import Services

PLACEHOLDER_DAYS = 3650  # nobody verifies it, so let it last
PAUSES_S = (60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0)  # between tries; authorities bound failures an hour
AGAIN_S = 60.0  # a worker that starts does not ask sooner after the one before it has
LEFT = 1 / 3  # of the lifetime when a certificate is renewed
LAST = 1 / 10  # the authority's wish for a later renewal ends here
LOOK_S = 86400.0  # certificates are looked at, and the authority asked about renewal, at least so often
SETTLED_S = 3600.0  # a new certificate is not looked at sooner, whatever it says
LOCK_S = 2.0
SLEEP_S = 3600.0  # the clock may be set meanwhile
ORDER_S = 300.0  # for an authority to look and to sign
LONGEST_S = 900.0  # for all that is asked of it at a time
REQUEST_S = 30.0
PEER_S = 10.0  # for who connects to the challenge's address
PEERS = 200
HEAD = 8192
ALPN = "acme-tls/1"
IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")  # RFC 8737 section 3
PATH = b"/.well-known/acme-challenge/"


# --- certificates -----------------------------------------------------------------------------------------------


class Held:
    """A certificate and its key, as they are in a file: PEM, the key first. names: of hosts, in the certificate."""

    def __init__(self, pem: bytes) -> None:
        """Raises ValueError where that is not what it is."""
        try:
            self.key: Any = load_pem_private_key(pem, None)
            self.certificate = x509.load_pem_x509_certificates(pem)[0]
            other = _public(self.key.public_key()) != _public(self.certificate.public_key())
            names = self.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName)
            self.placeholder = self.certificate.issuer == self.certificate.subject  # then it is ours, and no authority's
        except (TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
                x509.InvalidVersion) as error:
            raise ValueError(str(error)) from error
        if other:
            raise ValueError("the certificate is of another key")
        self.names = {name.lower() for name in names}

    @property
    def ends_at(self) -> float:
        """When it ends, in Unix seconds."""
        return self.certificate.not_valid_after_utc.timestamp()

    def left_at(self, part: float) -> float:
        """When that part of its lifetime is left."""
        return self.ends_at - part * (self.ends_at - self.certificate.not_valid_before_utc.timestamp())


def provide(certificates: Mapping[str, Sequence[str]]) -> None:
    """Puts a self-signed certificate where there is none yet. certificates: file -> names. Several workers may do so at once.

    Raises OSError.
    """
    for path, names in certificates.items():
        if os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        partial = f"{path}.{os.getpid()}.new"
        _discard(partial)
        write_new(partial, _key_pem(key) + self_signed(key, names, days=PLACEHOLDER_DAYS).public_bytes(Encoding.PEM))
        try:
            os.link(partial, path)  # never over one that is there by now
        except FileExistsError:
            pass
        finally:
            os.unlink(partial)
        sync_directory(os.path.dirname(path))


def self_signed(key: ec.EllipticCurvePrivateKey, names: Sequence[str], *, days: float, extension: x509.ExtensionType | None = None) -> x509.Certificate:
    """A certificate by nobody, for these names. extension: one more, critical."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
    now = datetime.datetime.now(datetime.UTC)
    builder = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
               .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
               .not_valid_after(now + datetime.timedelta(days=days))
               .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), critical=False))
    if extension is not None:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(key, hashes.SHA256())


def _key_pem(key: Any) -> bytes:
    octets: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return octets


def _load(context: ssl.SSLContext, folder: str, pem: bytes) -> None:
    """Has a TLS context take a key and its certificates, by a file, since ssl takes no octets. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="load-") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


def _public(key: Any) -> bytes:
    octets: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return octets


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _replace(path: str, octets: bytes) -> None:
    """Puts a file of mode 0600 in the place of another, whole and durable."""
    partial = path + ".new"
    _discard(partial)
    write_new(partial, octets)
    os.replace(partial, path)
    sync_directory(os.path.dirname(path))


# --- challenges -------------------------------------------------------------------------------------------------


class HttpAnswers:
    """Answers http-01: the key authorization of a token, to whoever asks for it (RFC 8555 section 8.3)."""

    def __init__(self) -> None:
        self._answers: dict[bytes, bytes] = {}

    def add(self, name: str, token: str, authorization: str) -> None:
        """Answers for a name from now on."""
        self._answers[PATH + token.encode()] = authorization.encode()

    def clear(self) -> None:
        """Answers nobody any more."""
        self._answers.clear()

    def serve(self, sock: Any) -> None:
        """One client. Raises OSError."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) < HEAD:
            data = sock.recv(HEAD)
            if not data:
                return
            head += data
        words = head.split(b"\r\n", 1)[0].split(b" ")
        target = words[1] if len(words) == 3 and words[0] in (b"GET", b"HEAD") else b""
        answer = self._answers.get(target)
        status, body = (b"200 OK", answer) if answer is not None else (b"404 Not Found", b"not here\n")
        sock.sendall(b"HTTP/1.1 %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                     % (status, len(body), body if words[0] != b"HEAD" else b""))


class TlsAnswers:
    """Answers tls-alpn-01: a certificate that has the key authorization's hash, to who asks for the protocol (RFC 8737 section 3)."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._contexts: dict[str, SSLContext] = {}
        self._front: SSLContext | None = None

    def add(self, name: str, token: str, authorization: str) -> None:
        """Answers for a name from now on."""
        key = ec.generate_private_key(ec.SECP256R1())
        digest = b"\x04\x20" + hashlib.sha256(authorization.encode()).digest()  # an OCTET STRING
        certificate = self_signed(key, [name], days=7, extension=x509.UnrecognizedExtension(IDENTIFIER, digest))
        context = SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([ALPN])
        _load(context, self._folder, _key_pem(key) + certificate.public_bytes(Encoding.PEM))
        self._contexts[name] = context
        if self._front is None:
            self._front = SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._front.set_alpn_protocols([ALPN])
            self._front.sni_callback = self._choose

    def _choose(self, tls_object: Any, name: str | None, _: Any) -> int | None:
        context = self._contexts.get((name or "").lower())
        if context is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        tls_object.context = context
        return None

    def clear(self) -> None:
        """Answers nobody any more."""
        self._contexts.clear()
        self._front = None

    def serve(self, sock: Any) -> None:
        """One client, whose handshake is all there is to it. Raises OSError."""
        if self._front is not None:
            with self._front.wrap_socket(sock, server_side=True) as tls:
                if tls.selected_alpn_protocol() == ALPN:
                    tls.recv(1)  # the authority closes


class Responder:
    """Serves the challenge's addresses. sockets: listening ones."""

    def __init__(self, answers: HttpAnswers | TlsAnswers, sockets: Sequence[Any]) -> None:
        self._answers = answers
        self._sockets = sockets
        self._peers: dict[Any, None] = {}  # the oldest first
        self._acceptors: list[Any] = []

    def start(self) -> None:
        """Takes connections from now on."""
        self._acceptors = [gevent.spawn(self._accept, sock) for sock in self._sockets]

    def stop(self) -> None:
        """Takes no more, and closes the sockets."""
        gevent.killall(self._acceptors)
        gevent.killall(list(self._peers))
        for sock in self._sockets:
            sock.close()

    def _accept(self, listening: Any) -> None:
        while True:
            try:
                accepted, _ = listening.accept()
            except OSError:
                gevent.sleep(0.1)
                continue
            if len(self._peers) >= PEERS:  # or who connects and says nothing would keep the authority out
                oldest = next(iter(self._peers))
                del self._peers[oldest]
                oldest.kill(block=False)
            peer = gevent.spawn(self._serve, accepted)
            self._peers[peer] = None
            peer.rawlink(self._left)

    def _left(self, peer: Any) -> None:
        self._peers.pop(peer, None)

    def _serve(self, accepted: Any) -> None:
        try:
            with gevent.Timeout(PEER_S, False), accepted:
                self._answers.serve(accepted)
        except OSError:
            pass  # the authority says what it did not like


# --- the authority ----------------------------------------------------------------------------------------------


class AcmeError(Exception):
    """The authority did not give what was asked for; the text says why. slow: not to be asked again soon."""

    def __init__(self, text: str, slow: bool = False) -> None:
        super().__init__(text)
        self.slow = slow


class Authority:
    """An account at an ACME server (RFC 8555 section 7.3), which signs what `obtain` asks for. folder: where the account's key is kept."""

    def __init__(self, settings: Any, folder: str, answers: HttpAnswers | TlsAnswers) -> None:
        import josepy
        from acme import challenges, client, crypto_util, errors, messages

        self._josepy, self._client, self._messages, self._challenges = josepy, client, messages, challenges
        self._make_csr = crypto_util.make_csr
        self._errors = errors
        self._settings = settings
        self._answers = answers
        where = hashlib.sha256(settings.directory.encode()).hexdigest()[:12]
        self._file = os.path.join(folder, f"account-{where}.json")

    def obtain(self, names: Sequence[str], key_pem: bytes) -> bytes:
        """The chain for these names and that key, in PEM; raises AcmeError."""
        return self._told(lambda: self._obtain(names, key_pem))

    def renewal(self, pem: bytes) -> tuple[float | None, float]:
        """When the authority wants a certificate renewed (None: it does not say), and when to ask again. Raises AcmeError."""

        def ask() -> tuple[float | None, float]:
            network = self._network(None)
            directory = self._client.ClientV2.get_directory(self._settings.directory, network)
            at, again_at = self._client.ClientV2(directory, network).renewal_time(pem)  # a new draw from the window at each call
            return None if at is None else at.timestamp(), again_at.timestamp()

        return self._told(ask)

    def _told(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns; whatever the package raises for what a server says becomes an AcmeError."""
        limit = gevent.Timeout(LONGEST_S)
        try:
            with limit:
                return ask()
        except AcmeError:
            raise
        except gevent.Timeout as timeout:
            if timeout is not limit:
                raise
            raise AcmeError(f"no answer within {LONGEST_S:g} s") from None  # REQUEST_S is for each piece of one
        except self._errors.ValidationError as error:
            raise AcmeError("; ".join(f"{one.body.identifier.value}: {challenge.error.detail or challenge.error}"
                                      for one in error.failed_authzrs for challenge in one.body.challenges if challenge.error is not None)) from error
        except self._errors.TimeoutError as error:
            raise AcmeError(f"no decision within {ORDER_S:.0f} s") from error
        except self._messages.Error as error:
            raise AcmeError(str(error), error.code == "rateLimited") from error  # RFC 8555 section 6.6
        except self._errors.ARIError as error:
            raise AcmeError(str(error.args[0])) from error
        except Exception as error:  # the package checks little of what a stranger's server says
            raise AcmeError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error

    def _network(self, key: Any) -> Any:
        return self._client.ClientNetwork(key, alg=self._josepy.ES256, verify_ssl=self._settings.ca_file or True, user_agent=f"gmta/{gmta.__version__}",
                                          timeout=int(REQUEST_S))

    def _obtain(self, names: Sequence[str], key_pem: bytes) -> bytes:
        account = self._account()
        key = self._josepy.JWK.from_json(account["key"])
        network = self._network(key)
        client = self._client.ClientV2(self._client.ClientV2.get_directory(self._settings.directory, network), network)
        csr = self._make_csr(key_pem, list(names))
        try:
            order = self._order(client, csr, key, account)
        except self._messages.Error as error:
            if error.code != "accountDoesNotExist" or not account["uri"]:
                raise
            order = self._order(client, csr, key, account | {"uri": ""})  # the server has forgotten it
        end = datetime.datetime.now() + datetime.timedelta(seconds=ORDER_S)
        try:
            for one in order.authorizations:
                if one.body.status == self._messages.STATUS_PENDING:
                    self._answer(client, one.body, key)
            order = client.poll_authorizations(order, end)
            chain: str = client.finalize_order(order, end).fullchain_pem
        finally:
            self._answers.clear()
        return chain.encode()

    def _order(self, client: Any, csr: bytes, key: Any, account: Mapping[str, Any]) -> Any:
        """An order by the account."""
        self._log_in(client, key, account)
        return client.new_order(csr)

    def _answer(self, client: Any, authorization: Any, key: Any) -> None:
        """Makes the answer to a challenge ready, and says so."""
        name, kind = authorization.identifier.value, self._settings.challenge
        for offered in authorization.challenges:
            facts = offered.chall.to_partial_json()
            if facts.get("type") == kind:
                token = str(facts["token"])
                # RFC 8555 section 8.1
                answer = f"{token}.{self._josepy.b64encode(key.thumbprint(hash_function=hashes.SHA256)).decode()}"
                self._answers.add(name, token, answer)
                client.answer_challenge(offered, self._challenges.HTTP01Response(key_authorization=answer))  # all are an empty object on the wire
                return
        raise AcmeError(f"{name}: the authority offers no {kind}, only "
                        + ", ".join(str(offered.chall.to_partial_json().get("type")) for offered in authorization.challenges))

    # -- the account ------------------------------------------------------------------------------------------------

    def _account(self) -> dict[str, Any]:
        """The account's file; a new key where there is none."""
        try:
            with open(self._file, encoding="utf-8") as file:
                found = json.load(file)
            return {name: found[name] for name in ("directory", "uri", "contact", "key")}
        except (ValueError, TypeError, KeyError) as error:
            raise AcmeError(f"{self._file} is damaged; without it a new account is made") from error
        except FileNotFoundError:
            key = self._josepy.JWKEC(key=ec.generate_private_key(ec.SECP256R1()))
            made = {"directory": self._settings.directory, "uri": "", "contact": "", "key": key.to_json()}
            self._save(made)  # before the server knows it
            return made

    def _save(self, account: Mapping[str, Any]) -> None:
        _replace(self._file, json.dumps(account, indent=1).encode())

    def _log_in(self, client: Any, key: Any, account: Mapping[str, Any]) -> None:
        """Has the client speak for the account: the one that there is, or a new one."""
        contact, uri = self._settings.contact, account["uri"]
        if not uri:
            binding = None
            if self._settings.eab_key_id:  # RFC 8555 section 7.3.4
                binding = self._messages.ExternalAccountBinding.from_data(key.public_key(), self._settings.eab_key_id, self._settings.eab_secret,
                                                                          client.directory)
            elif client.external_account_required():
                raise AcmeError("the authority wants an external account: eab_key_id and eab_secret", slow=True)
            asked = self._messages.NewRegistration.from_data(email=contact or None, external_account_binding=binding, terms_of_service_agreed=True)
            client.net.account = None
            try:
                uri = client.new_account(asked).uri
            except self._errors.ConflictError as known:  # made before, but our file does not say so
                uri = known.location
            self._save({**account, "uri": uri, "contact": contact})
        registration = self._messages.RegistrationResource(uri=uri, body=self._messages.Registration())
        client.net.account = registration
        if account["uri"] and contact != account["contact"]:
            client.update_registration(registration, self._messages.Registration.from_data(email=contact) if contact
                                       else self._messages.Registration.from_data(contact=()))
            self._save({**account, "contact": contact})


# --- the keeper -------------------------------------------------------------------------------------------------


class Kept:
    """A certificate that is kept: its file, its names, and when it is to be looked at again. failures: since it was last right."""

    __slots__ = ("failures", "look_at", "names", "path", "renew_at")

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        self.path = path
        self.names = names
        self.failures = 0
        self.look_at = 0.0
        self.renew_at = 0.0


class Acme:
    """Keeps the certificates of a configuration. sockets: where challenges are answered, listening; none: they could not be bound.

    rng: a number from 0 to 1, for jitter. authority: whom to ask, default the one of the configuration.
    """

    def __init__(self, config: Config, services: Services, sockets: Sequence[Any], *, rng: Callable[[], float] = random.random,
                 authority: Any = None) -> None:
        self._services = services
        self._log = services.log
        self._settings = config.acme
        self._folder = os.path.join(config.gmta.data_dir, "acme")
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        answers = HttpAnswers() if config.acme.challenge == "http-01" else TlsAnswers(self._folder)
        self._responder = Responder(answers, sockets)
        self._can_answer = bool(sockets)
        self._authority = authority or Authority(config.acme, self._folder, answers)
        self._rng = rng
        self.kept = [Kept(path, names) for path, names in config.obtained.items()]
        self._greenlet: Any = None
        self._lock = -1
        self._no_lock: int | None = None  # why, as it was said last

    def start(self) -> None:
        """Begins, in a greenlet of its own, as soon as no other worker does it."""
        self._greenlet = gevent.spawn(self._run)

    def stop(self) -> None:
        """Ends, and leaves it to another worker."""
        if self._greenlet is not None:
            self._greenlet.kill()
        self._responder.stop()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _run(self) -> None:
        while not self._has_lock():
            gevent.sleep(LOCK_S)
        self._responder.start()
        while True:
            now = self._services.clock()
            for one in self.kept:
                if now >= one.look_at:
                    self.look_after(one)
            wait_s = min(one.look_at for one in self.kept) - self._services.clock()
            gevent.sleep(min(max(wait_s, 1.0), SLEEP_S))

    def _has_lock(self) -> bool:
        """Whether nobody else keeps certificates now."""
        try:
            if self._lock < 0:
                self._lock = os.open(os.path.join(self._folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the worker that this one takes over from has it
            return False
        except OSError as error:
            if error.errno != self._no_lock:
                self._log.error("no certificate is looked after", error=f"{self._folder}: {error.strerror}")
            self._no_lock = error.errno
            return False
        return True

    def look_after(self, one: Kept) -> None:
        """Renews a certificate where it is time, and says when to look again. Raises nothing."""
        now = self._services.clock()
        held, why = self._held(one)
        if not why and held is not None:
            why = self._due(one, held, now)
        if not why:
            return
        key = f"acme:{one.path}"
        tried_at = self._services.state.get(key, 0.0) if not one.failures else 0.0
        if 0 <= now - tried_at < AGAIN_S:
            one.look_at = tried_at + AGAIN_S
            return
        self._services.state.set(key, now, AGAIN_S)
        try:
            self._renew(one, held)
            self._services.state.delete(key)
        except (AcmeError, OSError, ValueError) as error:
            slow = isinstance(error, AcmeError) and error.slow
            pause_s = PAUSES_S[-1 if slow else min(one.failures, len(PAUSES_S) - 1)] * (1 + self._rng() / 4)
            one.failures += 1
            one.look_at = now + pause_s
            days = None if held is None or held.placeholder else round((held.ends_at - now) / 86400, 1)
            self._log.error("no certificate", names=one.names, reason=why, error=str(error), failures=one.failures, next_try_s=round(pause_s), days_left=days)

    def _held(self, one: Kept) -> tuple[Held | None, str]:
        """What is in the file, and why that won't do, or ""."""
        try:
            with open(one.path, "rb") as file:
                held = Held(file.read())
        except (OSError, ValueError) as error:
            return None, f"the file can't be used: {error}"
        if held.placeholder:
            return held, "there is none yet"
        if held.names != set(one.names):
            return held, f"the one there is for {', '.join(sorted(held.names))}"
        return held, ""

    def _due(self, one: Kept, held: Held, now: float) -> str:
        """Why a certificate is to be renewed now, or "" where not, and when to look again."""
        at, wish_at, again_at = held.left_at(LEFT), None, now + LOOK_S
        if now < held.left_at(LAST):
            try:
                wish_at, again_at = self._authority.renewal(held.certificate.public_bytes(Encoding.PEM))
            except AcmeError as error:
                self._log.warning("authority does not say when to renew", names=one.names, error=str(error))
        if wish_at is not None:  # RFC 9773 section 4.2
            at = min(wish_at, held.left_at(LAST))
        else:
            at -= self._rng() * (held.left_at(LEFT) - held.left_at(1)) / 20  # not all at once, where many came at once
        one.renew_at = at
        if now >= at:
            return f"it ends on {held.certificate.not_valid_after_utc:%Y-%m-%d}"
        one.failures = 0
        one.look_at = min(at, max(now + 60.0, min(again_at, now + LOOK_S)))
        return ""

    def _renew(self, one: Kept, held: Held | None) -> None:
        if not self._can_answer:
            raise AcmeError("nobody listens at [acme] address: it could not be bound when gmta started")
        began = time.monotonic()
        keep = self._settings.keep_key and held is not None
        key = held.key if keep and held is not None else ec.generate_private_key(ec.SECP256R1())
        pem = _key_pem(key) + self._authority.obtain(one.names, _key_pem(key))
        new = Held(pem)
        if new.names != set(one.names):
            raise AcmeError(f"the certificate that came is for {', '.join(sorted(new.names)) or 'nobody'}")
        _load(SSLContext(ssl.PROTOCOL_TLS_SERVER), self._folder, pem)  # or the next start would be stopped by it
        self._services.batch("acme").submit(lambda: _replace(one.path, pem))
        one.failures = 0
        one.look_at = self._services.clock() + SETTLED_S
        self._log.info("certificate obtained", names=one.names, issuer=new.certificate.issuer.rfc4514_string(),
                       ends=f"{new.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}", took_s=round(time.monotonic() - began, 1))
