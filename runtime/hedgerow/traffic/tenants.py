"""Tenants: who they are, how they are known, and what each may ask for. `quotas` holds them to it.

The rules of who is whom:

- what a caller says of itself (`TENANT_KEY` in the call's metadata) is believed where `identify_by` is "metadata",
  which has to be said where tenants are named: their allowances would be whoever's knows a name;
- else a caller is who its token or certificate says, and may say that or nothing. Who says another name is refused,
  not counted under its own: either it forges, or somebody has forgotten a setting;
- `trusted_routers` may say any name; where they say none, they are tenants like others;
- who proves nothing is one of the others, or with `require` nobody that is answered. A wrong token is refused always.

Who wants inference, shared memory or to manage models is asked who it is. Asking about models and health is free, as it
is of quotas.
"""

import math
from typing import Annotated, Literal

import msgspec

from hedgerow.config import Count, ServerSettings, Settings
from hedgerow.errors import ConfigError, Forbidden, Unauthenticated
from hedgerow.identity import Identify, Tokens, as_said, bearer
from hedgerow.rpc import Call
from hedgerow.tensors import TENANT_KEY
from hedgerow.traffic.buckets import Quota

MAX_SAID_CHARS = 40
"""Of what a caller says of itself, in the refusal."""

Rate = Annotated[float, msgspec.Meta(gt=0)]
Tenant = Annotated[str, msgspec.Meta(min_length=1, pattern=r"^[^(]")]
"""A name; what begins with a parenthesis is ours, on labels of metrics."""
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class QuotaSettings(Settings, frozen=True, kw_only=True):
    """What may be asked for; without a value: any amount."""

    requests_per_s: Rate | None = None
    burst_requests: Count | None = None
    """At once, after a pause; without a value: those of a second, at least one."""
    bytes_per_s: Rate | None = None
    """Of inputs."""
    burst_bytes: Count | None = None
    """At once, after a pause; without a value: those of a second. A request with more is refused for good."""
    max_inflight: Count | None = None

    @property
    def quota(self) -> Quota:
        """The quota that these settings mean."""
        requests_per_s, bytes_per_s = self.requests_per_s or math.inf, self.bytes_per_s or math.inf
        return Quota(
            requests_per_s=requests_per_s,
            burst_requests=self.burst_requests or max(1.0, requests_per_s),
            bytes_per_s=bytes_per_s,
            burst_bytes=self.burst_bytes or bytes_per_s,
            max_inflight=self.max_inflight or math.inf,
        )


class TenantSettings(QuotaSettings, frozen=True, kw_only=True):
    """A tenant with an allowance of its own, and what it proves itself by."""

    token_sha256: tuple[Digest, ...] = ()
    """SHA-256 digests of its tokens, in hexadecimal; several while one takes another's place. Of tokens that are random
    and long (``openssl rand -hex 32``): one that can be guessed can be found from its digest."""


class TenantsSettings(Settings, frozen=True, kw_only=True):
    """Who asks, and the quotas of all."""

    identify_by: Literal["certificate", "token", "metadata"] | None = None
    """How callers are known: by the name in their certificate (URI, or else DNS name, or else common name; needs
    `server.tls_client_ca_file`), by the token that they bring ("authorization: Bearer TOKEN"; beyond loopback only over
    TLS), or as they say ("hedgerow-tenant: NAME"), where only those reach the server who may be believed. Unset: as
    they say, as long as no tenant is named."""
    require: bool = False
    """Whether who proves nothing is refused; else it is one of the others."""
    trusted_routers: tuple[Tenant, ...] = ()
    """Names of callers who vouch for theirs (`forward_tenant` in a router's settings), whatever tenant they say."""
    named: dict[Tenant, TenantSettings] = msgspec.field(default_factory=dict)
    """By tenant."""
    others: QuotaSettings = QuotaSettings()
    """Of all tenants that are not named, together."""
    each: QuotaSettings = QuotaSettings()
    """Of each of them."""
    max_tracked: Count = 1024
    """Of them that are told apart: the one that came last the longest ago is forgotten."""


def identify(settings: TenantsSettings | None, server: ServerSettings) -> Identify:
    """How a server with these settings knows its callers; raises `ConfigError` for what would be a hole.

    Without settings of tenants there is nothing to gain by a name, and callers are who they say.
    """
    settings = settings or TenantsSettings()
    tokens = any(one.token_sha256 for one in settings.named.values())
    if settings.identify_by is None and (settings.named or settings.require or settings.trusted_routers):
        raise ConfigError(
            "tenants.identify_by: is needed where tenants are named, required or trusted: 'certificate', 'token', or "
            "'metadata' if only those reach the server who may be believed"
        )
    if tokens != (settings.identify_by == "token"):
        raise ConfigError(
            "tenants.named, token_sha256: is what tenants.identify_by = 'token' needs, and of use to it alone"
        )
    if settings.identify_by in {None, "metadata"}:
        if settings.require or settings.trusted_routers:
            raise ConfigError("tenants.require, tenants.trusted_routers: nothing is proved by metadata")
        return as_said
    if settings.identify_by == "certificate" and not (server.tls_cert_file and server.tls_client_ca_file):
        raise ConfigError(
            "tenants.identify_by: it takes server.tls_cert_file and server.tls_client_ca_file to ask for certificates"
        )
    return _Proofs(settings)


class _Proofs:
    """See `Identify`: callers are who they prove to be."""

    def __init__(self, settings: TenantsSettings) -> None:
        self._settings = settings
        self._trusted = frozenset(settings.trusted_routers)
        self._tokens = Tokens((digest, name) for name, one in settings.named.items() for digest in one.token_sha256)

    def __call__(self, call: Call) -> str:
        said = as_said(call)
        known = call.peer if self._settings.identify_by == "certificate" else self._owner(call)
        if said == known and (known or not self._settings.require):
            return known
        if not known:
            reason = f"{TENANT_KEY} is {_shown(said)} and nothing proves it" if said else "nothing says who is asking"
            raise Unauthenticated(f"{reason}: this server knows its callers by {self._proof}")
        if said and known not in self._trusted:
            raise Forbidden(f"{known!r} may not ask for tenant {_shown(said)}: it is none of tenants.trusted_routers")
        return said or known

    @property
    def _proof(self) -> str:
        return "certificate" if self._settings.identify_by == "certificate" else "authorization: Bearer TOKEN"

    def _owner(self, call: Call) -> str:
        token = bearer(call.metadata)
        owner = self._tokens.owner(token) if token else ""
        if owner is None:
            raise Unauthenticated("the token is none that this server knows")
        return owner


def _shown(said: str) -> str:
    return repr(said if len(said) <= MAX_SAID_CHARS else said[:MAX_SAID_CHARS] + "…")
