"""What is said of a process, and where: its log, its metrics, its traces. Needs no OpenTelemetry and no Prometheus."""

from typing import Annotated, Literal

import msgspec

from hedgerow.config import Seconds, Settings, Share


class LogSettings(Settings, frozen=True, kw_only=True):
    """What is said, and how."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["text", "json"] = "text"


class MetricsSettings(Settings, frozen=True, kw_only=True):
    """Where metrics, liveness and readiness are served, for Prometheus and the like."""

    listen: Annotated[str, msgspec.Meta(pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]{1,5}$")] = "127.0.0.1:9464"
    """"host:port"; with port 0, any free one. Empty: nowhere. Whoever reaches it may read it."""


class TracingSettings(Settings, frozen=True, kw_only=True):
    """Where traces go."""

    endpoint: str = ""
    """A collector that takes OTLP over gRPC, as "http://host:4317" or "https://…"; empty: there are no traces."""
    sample: Share = 1.0
    """Share of the requests without a trace of their own that begin one; callers' traces are followed as they say."""
    service: str = "hedgerow"
    timeout_s: Seconds = 5.0
    """Of one attempt to send spans."""
