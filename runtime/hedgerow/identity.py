"""Who is calling: by a token, by a certificate, or as the caller says.

What is proved here is a name, for quotas (`hedgerow.traffic.tenants`) and for managing models. The rules:

- tokens are known by their SHA-256 digests alone. Who guesses learns nothing from how long a refusal takes: digests are
  looked up under a key of this process's own, and what is found is compared in constant time;
- a certificate's name is its first URI, or else its first DNS name, or else its common name. Whoever signs certificates
  vouches for all three.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from hedgerow.errors import ConfigError
from hedgerow.rpc import Call
from hedgerow.tensors import TENANT_KEY

AUTHORIZATION: Final = "authorization"
"""In a call's metadata: "Bearer TOKEN" (RFC 6750)."""
_KEY_BYTES: Final = 32

Identify = Callable[[Call], str]
"""Gives the tenant that a call is for; empty: nobody in particular. Raises `Unauthenticated` and `Forbidden`."""


class Tokens:
    """Whose tokens are whose: `owners` by the SHA-256 digests of their tokens, in hexadecimal."""

    def __init__(self, owners: Iterable[tuple[str, str]]) -> None:
        self._key = secrets.token_bytes(_KEY_BYTES)
        self._owners: dict[bytes, tuple[str, str]] = {}
        for digest, owner in owners:
            _, before = self._owners.setdefault(self._blinded(digest), (digest, owner))
            if before != owner:
                raise ConfigError(f"{before} and {owner} have the same token, {digest[:8]}…")

    def owner(self, token: str) -> str | None:
        """Whose `token` is; None: nobody's."""
        digest = token_digest(token)
        known, owner = self._owners.get(self._blinded(digest), ("", ""))
        return owner if hmac.compare_digest(known, digest) else None

    def _blinded(self, digest: str) -> bytes:
        return hashlib.blake2b(digest.encode(), key=self._key, digest_size=_KEY_BYTES).digest()


def token_digest(token: str) -> str:
    """What stands for `token` where it must not be read: its SHA-256 digest, in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def bearer(metadata: Mapping[str, str]) -> str:
    """The token that a caller brought; empty: none."""
    scheme, _, token = metadata.get(AUTHORIZATION, "").partition(" ")
    return token.strip() if scheme.casefold() == "bearer" else ""


def certificate_name(uris: Sequence[str], dns: Sequence[str], common: Sequence[str]) -> str:
    """The name of a certificate with these alternative names and common names; empty: it has none."""
    return next(filter(None, (*uris, *dns, *common)), "")


def name_of_peer(certificate: Mapping[str, Any] | None) -> str:
    """The name of a `certificate` as Python's `ssl` describes verified ones; empty for None."""
    names: dict[str, list[str]] = {}
    if certificate is not None:
        subject = [pair for part in certificate.get("subject", ()) for pair in part]
        for kind, value in (*certificate.get("subjectAltName", ()), *subject):
            names.setdefault(kind, []).append(value)
    return certificate_name(names.get("URI", ()), names.get("DNS", ()), names.get("commonName", ()))


def as_said(call: Call) -> str:
    """The tenant that the caller says, which nobody has checked."""
    return call.metadata.get(TENANT_KEY, "")
