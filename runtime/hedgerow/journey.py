"""One request on its way through the router: what was tried, what is in hand, and how its answer is explained.

Without IO: the router asks whom the policy says, and this says what is known, what counts, and why.
"""

from typing import Final

import msgspec
from msgspec.structs import replace

from hedgerow import policies
from hedgerow.backend import Backend, Deadline
from hedgerow.errors import (
    DeadlineExceeded,
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    NotFound,
    Unavailable,
)
from hedgerow.gate import Gate
from hedgerow.judge import NO_RELEASE, Verdict
from hedgerow.parameters import CONFIDENCE, DEGRADED, PREFIX, REASON, RELEASE, SPLIT, SPLIT_REASON, TIER
from hedgerow.policies import Attempt, Facts, Plan, Policy, Privacy, Tier
from hedgerow.tensors import InferRequest, InferResponse, Parameter

CONFIDENT: Final = "confident"
"""Outcomes, as they are counted: the edge's answer passed its gate;"""
UNJUDGED: Final = "unjudged"
"""the edge's answer needed no gate;"""
ESCALATED: Final = "escalated"
"""the cloud's, after one of the edge that was not good enough;"""
FALLBACK: Final = "fallback"
"""the cloud's, after the edge had failed;"""
DIRECT: Final = "direct"
"""the cloud's, which was asked first;"""
SECOND_BEST: Final = "degraded"
"""one that is not good enough, with the reason why there is no better;"""
FAILED: Final = "failed"
"""none, with the error's status for a reason."""

RETURN_RESERVE = 0.1
"""The share of the remaining deadline that the cloud is not given while an answer of the edge is in hand: time to
return that one, also on a device that is busy and to a caller whose clock started earlier. Within these bounds:"""
RETURN_RESERVE_MIN_S = 0.01
RETURN_RESERVE_MAX_S = 0.25

_NOT_PLANNED: Final = Plan(())
_NOT_TRIED: Final[frozenset[Tier]] = frozenset()


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests for `model` may go, and by which policy."""

    model: str
    edge: Backend
    cloud: Backend | None = None
    cloud_model: str = ""
    policy: Policy = msgspec.field(default_factory=lambda: policies.load("edge_first"))
    require_cloud: bool = False

    @property
    def model_in_cloud(self) -> str:
        """The model's name there."""
        return self.cloud_model or self.model


class Journey(msgspec.Struct):
    """A request, and what has become of it so far."""

    route: Route
    request: InferRequest
    deadline: Deadline
    privacy: Privacy
    verdict: Verdict
    plan: Plan = _NOT_PLANNED
    tried: frozenset[Tier] = _NOT_TRIED
    held: InferResponse | None = None
    """The edge's answer, once there is one."""
    confidence: float | None = None
    why: list[str] = []
    errors: list[HedgerowError] = []
    tier: Tier | None = None
    """Who gave the answer, once there is one."""
    degraded: bool = False

    def next_attempt(self) -> Attempt | None:
        """What the policy says to try now; None if nothing is left."""
        self.plan = self.route.policy(self.facts())
        for attempt in self.plan.attempts:
            if attempt.tier not in self.tried:
                self.tried |= {attempt.tier}
                return attempt
        return None

    def facts(self) -> Facts:
        """What the policy may know."""
        route, verdict = self.route, self.verdict
        return Facts(
            model=route.model,
            remaining_s=max(0.0, self.deadline.remaining - self.reserve_s),
            edge=route.edge.snapshot(route.model),
            cloud=None if route.cloud is None else route.cloud.snapshot(route.model_in_cloud),
            privacy=self.privacy,
            gate_reason=verdict.reason,
            gate_refused=verdict.refused,
            tried=self.tried,
        )

    @property
    def reserve_s(self) -> float:
        """What the cloud is not given of what is left."""
        if self.held is None:
            return 0.0
        return min(max(RETURN_RESERVE_MIN_S, RETURN_RESERVE * self.deadline.remaining), RETURN_RESERVE_MAX_S)

    def judged(self, gate: Gate, confidence: float) -> bool:
        """Whether `gate` lets the edge's answer pass, with that `confidence`."""
        passed = gate.passes(confidence)
        self.confidence = confidence
        self.why.append(f"confidence {confidence:.3f} {'≥' if passed else '<'} {gate.threshold:.3f}")
        return passed

    def takes_unjudged(self, attempt: Attempt) -> bool:
        """Whether the edge's answer will do that no gate has passed: only where there is none, and no need of one."""
        verdict = self.verdict
        return not attempt.gated and verdict.gate is None and not verdict.refused and not self.route.require_cloud

    def failed(self, tier: Tier, error: HedgerowError) -> None:
        """`tier` could not answer. Raises `error` if no other could do better."""
        if self.held is None and self._is_final(tier, error):
            raise error
        self.errors.append(error)
        self.why.append(_in_words(tier, error))

    def explained(self, answer: InferResponse, tier: Tier, *, degraded: bool = False) -> InferResponse:
        """`answer`, of `tier`, as it is returned."""
        theirs, parameters = answer.parameters, dict[str, Parameter]()
        if theirs:
            parameters = {
                key: value
                for key, value in theirs.items()
                if not key.startswith(PREFIX) or key in {SPLIT, SPLIT_REASON}
            }
            if theirs.get(DEGRADED) is True:  # by a router behind us, whose second best does not get better here
                degraded = True
                self.why.append(f"{tier}: {theirs.get(REASON, 'second best')}")
        self.tier, self.degraded = tier, degraded
        parameters[TIER] = tier.value
        parameters[REASON] = self._reason() or f"{tier} first"
        parameters[DEGRADED] = degraded
        if self.confidence is not None:
            parameters[CONFIDENCE] = self.confidence
        if self.held is not None:
            parameters[RELEASE] = f"{self.route.model}/{self.held.version}"
        return replace(answer, parameters=parameters)

    def settle(self) -> InferResponse:
        """The answer in hand, marked degraded, when nothing better can be had; or a clear error if it will not do."""
        reasons = self._reason(all_of_them=True)
        retry_after_s = max((error.retry_after_s or 0.0 for error in self.errors), default=0.0) or None
        if self.held is None:
            kinds = {type(error) for error in self.errors}
            alone = len(kinds) == 1 and not issubclass(next(iter(kinds)), NotFound)
            kind = next(iter(kinds)) if alone else Unavailable
            raise kind(reasons, retry_after_s=retry_after_s)
        if self.route.require_cloud:
            if self.privacy is Privacy.EDGE_ONLY:
                raise Forbidden(f"{self.route.model} requires the cloud, which this request rules out: {reasons}")
            raise Unavailable(f"{self.route.model} requires the cloud: {reasons}", retry_after_s=retry_after_s)
        return self.explained(self.held, Tier.EDGE, degraded=True)

    def outcome(self) -> tuple[str, str]:
        """How the answer came about, and of one that is second best why, in a few words that can be counted."""
        if self.degraded:
            return SECOND_BEST, self._kept_from_cloud()
        if self.tier is Tier.EDGE:
            return UNJUDGED if self.confidence is None else CONFIDENT, ""
        if self.held is not None:
            return ESCALATED, ""
        return FALLBACK if self.errors else DIRECT, ""

    def _reason(self, *, all_of_them: bool = False) -> str:
        """Why this answer, in words; of a degraded one also what keeps a better one away."""
        why, planned = self.why, self.plan.reasons
        reasons = [*why, *planned] if self.degraded or all_of_them else why or planned
        return reasons[0] if len(reasons) == 1 else "; ".join(dict.fromkeys(reasons))

    def _is_final(self, tier: Tier, error: HedgerowError) -> bool:
        if isinstance(error, ModelNotFound):
            return tier is Tier.EDGE and bool(self.request.version)  # versions are the edge's
        if isinstance(error, DeadlineExceeded):
            return self.deadline.expired
        return isinstance(error, InvalidInput | Forbidden)

    def _kept_from_cloud(self) -> str:
        if self.errors:
            return status(self.errors[-1])
        if self.tier is Tier.CLOUD:
            return "cloud"
        if self.privacy is Privacy.EDGE_ONLY:
            return "privacy"
        cloud = self.route.cloud
        if cloud is None:
            return "no_cloud"
        return "policy" if cloud.snapshot(self.route.model_in_cloud).healthy else status(Unavailable(""))


def status(error: HedgerowError) -> str:
    """The status of `error` as it is counted."""
    return error.status.name.lower()


def _in_words(tier: Tier, error: HedgerowError) -> str:
    if tier is Tier.EDGE:
        return NO_RELEASE if isinstance(error, ModelNotFound | ModelNotReady) else f"edge failed: {error}"
    return str(error) if isinstance(error, Unavailable | DeadlineExceeded) else f"cloud failed: {error}"
