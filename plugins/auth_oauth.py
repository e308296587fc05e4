"""Knows users by OAuth tokens: OAUTHBEARER and XOAUTH2, the token judged by its issuer (RFC 7662) or by the issuer's keys (RFC 7517).

Hooks: permit_auth, get_auth_mechanisms (OAUTHBEARER, XOAUTH2).  Keys: introspection_url, client_id, client_secret; or jwks_url; issuer,
audience, scope, user_claim, ca_file, request_timeout.  Replies: none of its own; 454 4.7.0 from the core where the issuer can't be asked.

A signed token (RFC 7519) must be of the issuer, for the audience, in time, and by RS256, RS384, RS512, PS256, ES256, ES384 or EdDSA;
keys are asked for again when one is missing, at most once a minute. An introspected one must be active. Either has the user in
`user_claim`, and it must be the user that the client names, if it names one.
"""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import urlencode

import urllib3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from pydantic import Field, model_validator

from gmta import Credentials, Duration, PluginConfig, Session, Verdict, accept, hookimpl
from gmta.config import ExistingFile
from gmta.services.passwords import user_key

LONGEST = 256 * 1024
KEYS_S = 3600.0
AGAIN_S = 60.0
SKEW_S = 30.0
HASHES: dict[str, type[hashes.HashAlgorithm]] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
CURVES: dict[str, tuple[type[ec.EllipticCurve], str, int]] = {"P-256": (ec.SECP256R1, "ES256", 32), "P-384": (ec.SECP384R1, "ES384", 48)}


class Config(PluginConfig):
    """[plugin:auth_oauth]"""

    introspection_url: str = Field("", description="where tokens are judged")
    client_id: str = Field("", description="who asks there")
    client_secret: str = Field("", description="its password")
    jwks_url: str = Field("", description="where the issuer's keys are, for tokens that are signed")
    issuer: str = Field("", description="`iss` of tokens; needed with jwks_url")
    audience: str = Field("", description="`aud` of tokens; needed with jwks_url")
    scope: str = Field("", description="a scope that tokens must have")
    user_claim: str = Field("email", description="where a token has the user")
    ca_file: ExistingFile = Field("", description="authorities for the issuer's certificate; default: the system's")
    request_timeout: Duration = Field("10s", gt=0, description="for a whole request")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _is_one(self) -> Config:
        if bool(self.introspection_url) == bool(self.jwks_url):
            raise ValueError("one of introspection_url and jwks_url")
        if self.jwks_url and not (self.issuer and self.audience):
            raise ValueError("issuer and audience with jwks_url, or anybody's token would do")
        for url in (self.introspection_url, self.jwks_url):
            if url and not url.startswith(("https://", "http://127.0.0.1:", "http://127.0.0.1/", "http://[::1]:", "http://localhost:")):
                raise ValueError("https URLs, or http on this machine")
        return self


class OAuthError(Exception):
    """The issuer can't be asked, or answers oddly."""


class Plugin:
    """A client of one issuer."""

    def __init__(self, config: Config, services: Any) -> None:
        self._config = config
        self._clock = services.clock
        self._pool = urllib3.PoolManager(maxsize=20, retries=False, ca_certs=config.ca_file or None,
                                         timeout=urllib3.Timeout(total=config.request_timeout))
        self._keys: list[dict[str, Any]] = []
        self._keys_at = self._asked_at = 0.0

    @hookimpl
    def get_auth_mechanisms(self) -> list[str]:
        """Those that have a token."""
        return ["OAUTHBEARER", "XOAUTH2"]

    @hookimpl
    def permit_auth(self, session: Session, credentials: Credentials) -> Verdict | None:
        """accept() for a good token of the user; raises OAuthError where the issuer does not say."""
        if credentials.mechanism not in ("OAUTHBEARER", "XOAUTH2"):
            return None
        config = self._config
        claims = self._introspected(credentials.secret) if config.introspection_url else self._signed(credentials.secret)
        if claims is None or not self._fits(claims):
            return None
        user = claims.get(config.user_claim)
        if not isinstance(user, str) or not user or not user.isprintable():
            return None
        if credentials.user and user_key(credentials.user) != user_key(user):
            return None
        credentials.user = user_key(user)
        return accept()

    def _fits(self, claims: dict[str, Any]) -> bool:
        """Whether issuer, audience, scope and times are right (RFC 7519 section 4.1)."""
        config, now = self._config, self._clock()
        audience = claims.get("aud", [])
        scope = claims.get("scope", "")
        limits = (claims.get("exp"), claims.get("nbf", 0))
        if config.jwks_url and limits[0] is None:
            return False
        end, start = (limits[0] if limits[0] is not None else now + 1), limits[1]
        if not all(isinstance(time, (int, float)) and not isinstance(time, bool) for time in (end, start)):
            return False
        return bool(start - SKEW_S <= now < end + SKEW_S
                    and (not config.issuer or claims.get("iss") == config.issuer)
                    and (not config.audience or config.audience == audience or (isinstance(audience, list) and config.audience in audience))
                    and (not config.scope or config.scope in (scope.split() if isinstance(scope, str) else scope)))

    def _introspected(self, token: str) -> dict[str, Any] | None:
        """What the issuer says of a token (RFC 7662 section 2.2), None where it is not active."""
        config = self._config
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
        if config.client_id:
            headers |= urllib3.make_headers(basic_auth=f"{config.client_id}:{config.client_secret}")
        found = self._fetch("POST", config.introspection_url, headers, urlencode({"token": token, "token_type_hint": "access_token"}))
        return found if isinstance(found, dict) and found.get("active") is True else None

    def _signed(self, token: str) -> dict[str, Any] | None:
        """The claims of a token that the issuer has signed (RFC 7515 section 5.2)."""
        try:
            head, body, mark = token.split(".")
            header, claims, signature = json.loads(_decode(head)), json.loads(_decode(body)), _decode(mark)
        except (ValueError, RecursionError):
            return None
        if not isinstance(header, dict) or not isinstance(claims, dict) or "crit" in header:
            return None
        signed = f"{head}.{body}".encode()
        for fresh in (False, True):
            if any(_verifies(key, header, signed, signature) for key in self._known_keys(fresh)
                   if header.get("kid") is None or key.get("kid") in (None, header["kid"])):
                return claims
        return None

    def _known_keys(self, again: bool) -> list[dict[str, Any]]:
        """The issuer's keys. again: one was missing."""
        now = self._clock()
        asked = bool(self._keys) and 0 <= now - self._asked_at <= AGAIN_S  # an issuer that is down is asked no oftener
        if (again or not 0 <= now - self._keys_at <= KEYS_S) and not asked:
            self._asked_at = now
            try:
                found = self._fetch("GET", self._config.jwks_url, {"Accept": "application/json"})
            except OAuthError:
                if not self._keys:
                    raise
                return self._keys
            keys = found.get("keys") if isinstance(found, dict) else None
            if not isinstance(keys, list):
                raise OAuthError("what jwks_url gives is no set of keys")
            self._keys, self._keys_at = [key for key in keys if isinstance(key, dict)], self._clock()
        return self._keys

    def _fetch(self, method: str, url: str, headers: dict[str, str], body: str | None = None) -> Any:
        """The JSON that comes back with 200."""
        try:
            answer = self._pool.request(method, url, body=body, headers=headers, redirect=False, preload_content=False)
            try:
                octets = answer.read(LONGEST + 1)
            finally:
                answer.close()
        except urllib3.exceptions.HTTPError as error:
            raise OAuthError(f"{type(error).__name__} at the issuer") from None
        if answer.status != 200 or len(octets) > LONGEST:
            raise OAuthError(f"the issuer answers {answer.status}")
        try:
            return json.loads(octets)
        except ValueError:
            raise OAuthError("the issuer's answer is no JSON") from None


def _decode(text: str) -> bytes:
    """Octets from base64url without padding (RFC 7515 section 2); raises ValueError."""
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _number(text: Any) -> int:
    return int.from_bytes(_decode(text), "big")


def _verifies(key: dict[str, Any], header: dict[str, Any], signed: bytes, signature: bytes) -> bool:
    """Whether the key has made the signature, by an algorithm that is the key's own (never the header's word alone)."""
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or key.get("use", "sig") != "sig" or key.get("alg", algorithm) != algorithm:
        return False
    kind, name = key.get("kty"), key.get("crv")
    try:
        if kind == "RSA" and algorithm[:2] in ("RS", "PS") and algorithm[2:] in HASHES:
            hash_ = HASHES[algorithm[2:]]()
            pad: Any = padding.PKCS1v15() if algorithm[0] == "R" else padding.PSS(padding.MGF1(hash_), hash_.digest_size)
            public = rsa.RSAPublicNumbers(_number(key["e"]), _number(key["n"])).public_key()
            if public.key_size < 2048:  # RFC 7518 section 3.3
                return False
            public.verify(signature, signed, pad, hash_)
        elif kind == "EC" and name in CURVES and CURVES[name][1] == algorithm:
            curve, _, size = CURVES[name]
            if len(signature) != 2 * size:
                return False
            r, s = (int.from_bytes(half, "big") for half in (signature[:size], signature[size:]))
            numbers = ec.EllipticCurvePublicNumbers(_number(key["x"]), _number(key["y"]), curve())
            numbers.public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(HASHES[algorithm[2:]]()))
        elif kind == "OKP" and name == "Ed25519" and algorithm == "EdDSA":
            ed25519.Ed25519PublicKey.from_public_bytes(_decode(key["x"])).verify(signature, signed)
        else:
            return False
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return False
    return True
