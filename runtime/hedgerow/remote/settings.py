"""How a remote is reached, how much it may cost, and when it is given up."""

from typing import Annotated, Literal

import msgspec

from hedgerow.config import Count, Seconds, Settings, Share

ADDRESS = r"(\[[0-9a-fA-F:]+\]|[^\s:/@]+):[0-9]+"


class Target(Settings, frozen=True, kw_only=True):
    """One place where the remote is: any server that speaks OIP over gRPC."""

    address: Annotated[str, msgspec.Meta(pattern=rf"^(dns:(///)?)?{ADDRESS}$")]
    """"host:port": one endpoint. "dns:host:port": one for each address that the name has, asked again periodically."""
    zone: str = ""
    """Where it stands: a site, a region. Compared with `RemoteSettings.zone`."""


class RemoteSettings(Settings, frozen=True, kw_only=True):
    """How a remote is reached and when it is given up; times and breakers are each endpoint's own."""

    ca_file: str = ""
    """PEM file of the authority that signed the endpoints' certificates; empty: no TLS."""
    cert_file: str = ""
    """PEM file with a certificate of ours, for endpoints that ask who we are (`tenants.trusted_routers` there)."""
    key_file: str = ""
    token: str = ""
    """What endpoints know us by (`tenants.named` there), sent with every call as "authorization: Bearer TOKEN"; empty:
    nothing. A secret: beyond this machine take `ca_file` with it, or anyone on the way can read it."""
    zone: str = ""
    """Where we are: endpoints of the same zone are preferred while most of them are well. Empty: no preference."""
    resolve_s: Seconds = 30.0
    """How often the addresses of "dns:" targets are asked for; sooner when one of them fails."""
    timeout_s: Seconds = 10.0
    """The longest one call may take, whatever the caller's deadline allows."""
    connect_timeout_s: Seconds = 1.0
    failures_to_open: Count = 3
    """Failures in a row that open the breaker; a refused connection opens it at once."""
    probe_timeout_s: Seconds = 2.0
    probe_min_s: Seconds = 0.2
    """First pause between probes while the breaker is open; each is twice the one before, up to `probe_max_s`."""
    probe_max_s: Seconds = 5.0
    heartbeat_s: Seconds = 20.0
    """How often an endpoint is asked while all is well, its metadata with it."""
    max_retries: Annotated[int, msgspec.Meta(ge=0)] = 2
    """Retries of one request, each at another endpoint if there is one."""
    retry_share: Share = 0.2
    """Retries and hedges, as a share of the requests."""
    retry_burst: Annotated[int, msgspec.Meta(ge=0)] = 3
    retry_pause_s: Seconds = 0.025
    """Longest pause before a retry at the same endpoint, unless it asks for another."""
    hedge_after_quantile: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    """A second endpoint is asked when the first takes longer than this quantile of the latency; 0: never."""
    hedge_min_s: Seconds = 0.01
    """Hedges never start sooner than this."""
    hedge_share: Share = 0.05
    """Hedges, as a share of the requests."""
    adaptive_limit: bool = True
    """Whether requests are refused that are not expected to be answered in their time; see `limits`."""
    limit_min: Count = 4
    """Requests for one model that may be in flight whatever is expected of them."""
    limit_max: Count = 1024
    """Requests that may be in flight."""
    max_hops: Count = 4
    """Routers that a request may pass; one that has passed as many is not sent on, so that routers cannot loop."""
    forward_tenant: bool = False
    """Whether the endpoints are told who asks (`Origin.tenant`)."""
    transport: Literal["native", "grpcio"] = "native"
    """What speaks gRPC to the endpoints: our own client, or grpc.aio."""
    max_message_bytes: Count = 2**31 - 1
