"""Policies: pure functions from what is known of a request to a plan. One module a policy, found by its file name.

A policy neither waits nor asks: it gets `Facts` and returns a `Plan`. The router asks again after each attempt, with
the time that is left then. Invariants, held by property tests over every policy found:

- an edge-only request is never planned for the cloud;
- a plan names each tier at most once, and none that was tried;
- what a plan leaves out, it gives the reason for in words.

A new policy is a new file here with a function `plan`.
"""

import importlib
import math
import pkgutil
from enum import StrEnum
from typing import Protocol

import msgspec

from hedgerow.backend import Snapshot
from hedgerow.errors import ConfigError


class Tier(StrEnum):
    """Where an answer comes from."""

    EDGE = "edge"
    CLOUD = "cloud"


class Privacy(StrEnum):
    """What a request allows; the value of its parameter `hedgerow_privacy`."""

    DEFAULT = ""
    NO_LEARNING = "no-learning"
    """It may be escalated, and is never kept as a sample."""
    EDGE_ONLY = "edge-only"
    """It never leaves the device."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that a policy knows of one request, now.

    `cloud` is None where the route has none. `gate_reason` says why no gate can judge the edge's answers; empty: one
    can. `gate_refused` says that this is so although they are to be judged.
    """

    model: str
    remaining_s: float
    edge: Snapshot
    cloud: Snapshot | None
    privacy: Privacy = Privacy.DEFAULT
    gate_reason: str = ""
    gate_refused: bool = False
    tried: frozenset[Tier] = frozenset()


class Attempt(msgspec.Struct, frozen=True):
    """One tier to ask. `gated`: its answer must pass the gate. `degraded`: its answer is second best if it comes."""

    tier: Tier
    gated: bool = False
    degraded: bool = False


class Plan(msgspec.Struct, frozen=True):
    """Attempts in order, and `reasons`: what keeps it from being the plan one would wish for, in words."""

    attempts: tuple[Attempt, ...]
    reasons: tuple[str, ...] = ()


class Policy(Protocol):
    """A policy's `plan`."""

    def __call__(self, facts: Facts) -> Plan:
        """What to try, given `facts`."""
        ...


def cloud_barred(facts: Facts) -> str:
    """Why the cloud must not or cannot be asked now, in words; empty if it can, or has been."""
    if Tier.CLOUD in facts.tried:
        return ""
    if facts.privacy is Privacy.EDGE_ONLY:
        return "privacy: edge-only"
    if facts.cloud is None:
        return "no cloud configured"
    if not facts.cloud.healthy:
        return f"cloud unavailable: {facts.cloud.reason}" if facts.cloud.reason else "cloud unavailable"
    expected_s = facts.cloud.latency_p95_s
    if expected_s is not None and facts.remaining_s < expected_s:
        left_ms = math.floor(facts.remaining_s * 1000)
        return f"deadline too close: {left_ms} ms left, cloud p95 is {math.ceil(expected_s * 1000)} ms"
    return ""


def load(name: str) -> Policy:
    """The policy called `name`; raises `ConfigError` if there is none."""
    if name not in known():
        raise ConfigError(f"there is no policy {name!r}; there are: {', '.join(known())}")
    policy: Policy = importlib.import_module(f"{__name__}.{name}").plan
    return policy


def known() -> tuple[str, ...]:
    """Names of all policies."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
