"""What can go wrong, as one tree.

::

    HedgerowError
    ├── InvalidInput            the caller's request is wrong              INVALID_ARGUMENT
    ├── NotFound                there is no such thing                     NOT_FOUND
    │   └── ModelNotFound       no such model or version
    ├── Unavailable             not now; try again                         UNAVAILABLE
    │   ├── ModelNotReady       loading, draining or being swapped
    │   └── BackendUnavailable  a remote is down, cut off or circuit-broken
    ├── Overloaded              a queue or a budget is full                RESOURCE_EXHAUSTED
    ├── DeadlineExceeded        the caller's time is up                    DEADLINE_EXCEEDED
    ├── Forbidden               the caller may not, or privacy says no     PERMISSION_DENIED
    ├── Unauthenticated         the caller does not prove who it is        UNAUTHENTICATED
    ├── Unsupported             this server does not do that               UNIMPLEMENTED
    ├── EngineFault             the engine crashed or answered nonsense    INTERNAL
    ├── ConfigError             a setting is missing or wrong              FAILED_PRECONDITION
    ├── MissingExtra            an optional package is not installed       FAILED_PRECONDITION
    ├── LinkError               the MQTT link is down or did not answer    UNAVAILABLE
    └── ReleaseError            a release cannot be used                   FAILED_PRECONDITION
        ├── InvalidRelease      its files or manifest are malformed
        ├── UntrustedRelease    signatures, versions or targeting are wrong
        ├── TransferFailed      its bytes could not be had intact
        └── ProbeMismatch       it does not reproduce its probe vectors here

The message of an error is public: it names what was wrong and never holds secrets or paths of the server. Anything
that is not a `HedgerowError` reaches callers as INTERNAL with an id that finds it in the log.
"""

from typing import ClassVar

import grpc


class HedgerowError(Exception):
    """Base of everything raised on purpose.

    `status` is the gRPC code callers see; `retryable` says whether the same request may succeed later, and
    `retry_after_s` how long to wait before, where that is known (it becomes gRPC's retry pushback).
    """

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InvalidInput(HedgerowError):
    """The request does not match the protocol or the model's metadata."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(HedgerowError):
    """What was asked for by name is not here: a device, a release, a file."""

    status = grpc.StatusCode.NOT_FOUND


class ModelNotFound(NotFound):
    """No model of that name, or not in that version."""


class Unavailable(HedgerowError):
    """Not now; the same request may succeed later."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class ModelNotReady(Unavailable):
    """The model is known but loading, draining or being swapped."""


class BackendUnavailable(Unavailable):
    """A remote backend is down, unreachable or held off by its circuit breaker."""


class Overloaded(HedgerowError):
    """A bounded queue or a budget is full."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class DeadlineExceeded(HedgerowError):
    """The caller's deadline passed before there was an answer."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Forbidden(HedgerowError):
    """The caller may not do this, or the request's privacy class rules it out."""

    status = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(HedgerowError):
    """The caller does not prove who it is, and has to."""

    status = grpc.StatusCode.UNAUTHENTICATED


class Unsupported(HedgerowError):
    """A well-formed request for something this server does not do."""

    status = grpc.StatusCode.UNIMPLEMENTED


class EngineFault(HedgerowError):
    """The engine raised or returned something that cannot be an answer."""


class ConfigError(HedgerowError):
    """A setting is missing, of the wrong type, out of range or unknown; the message names its key."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class MissingExtra(HedgerowError):
    """An optional package is needed; the message says which extra brings it."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class LinkError(HedgerowError):
    """The MQTT link is down, or the other side did not answer in time."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class ReleaseError(HedgerowError):
    """A release cannot be used."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class InvalidRelease(ReleaseError):
    """A release's manifest or files are malformed or do not belong together."""


class UntrustedRelease(ReleaseError):
    """Signatures, versions, expiry or targeting say that this must not run here."""


class TransferFailed(ReleaseError):
    """A release's bytes could not be had intact."""


class ProbeMismatch(ReleaseError):
    """A release does not reproduce its probe vectors on this hardware."""
