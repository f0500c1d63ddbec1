"""The router: the backend made of backends. Asks the policy, runs the plan, judges, falls back, explains the answer.

Steps 3 to 8 of a request's life: facts → `Policy` → the edge's answer → its gate → the cloud with what is left of the
deadline → the best answer there is. The policy is asked again before each attempt, with the facts of that moment.

What callers read in an answer's parameters, and may say in a request's, is named here.
"""

import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec.structs import replace

from hedgerow import policies
from hedgerow.backend import Backend, Deadline, ModelState, Snapshot
from hedgerow.config import Settings
from hedgerow.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    NotFound,
    Unavailable,
    Unsupported,
)
from hedgerow.gate import Gate, Guarantee, confidence
from hedgerow.judge import NO_RELEASE, Judges, Verdict
from hedgerow.lifecycle import InFlight
from hedgerow.policies import Attempt, Facts, Plan, Policy, Privacy, Tier
from hedgerow.remote.latency import LatencyWindow
from hedgerow.statistics import RouteCounts
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter

TIER: Final = "hedgerow_tier"
"""In an answer: the `Tier` that gave it."""
REASON: Final = "hedgerow_reason"
"""In an answer: why it is this one, in words."""
CONFIDENCE: Final = "hedgerow_confidence"
"""In an answer: how sure the edge's answer was, in [0, 1]; absent if it was not judged."""
RELEASE: Final = "hedgerow_release"
"""In an answer: the release on the device that took part, as "model/counter"; absent if none did."""
DEGRADED: Final = "hedgerow_degraded"
"""In an answer: whether it is second best."""
PRIVACY: Final = "hedgerow_privacy"
"""In a request: a value of `Privacy`."""
STICKY: Final = "hedgerow_sticky"
"""In a request: a text; requests that bring the same one go to the same target of a split while the weights stand. Says
nothing where nothing is split."""
SPLIT: Final = "hedgerow_split"
"""In an answer: the name of the target that gave it, where there was a choice."""
SPLIT_REASON: Final = "hedgerow_split_reason"
"""In an answer: which target was passed over for that one, and why; absent if none was."""
PREFIX: Final = "hedgerow"
"""How our parameters begin, well spelt or not."""

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

log = logging.getLogger(__name__)


class RouteSettings(Settings, frozen=True, kw_only=True):
    """How requests for one model travel."""

    cloud_model: str = ""
    """The model's name in the cloud; empty: the same."""
    policy: str = "edge_first"
    require_cloud: bool = False
    """Refuse, rather than degrade, where the cloud should have answered and could not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where requests for `model` may go, and by which policy."""

    model: str
    edge: Backend
    cloud: Backend | None = None
    cloud_model: str = ""
    policy: Policy = field(default_factory=lambda: policies.load("edge_first"))
    require_cloud: bool = False

    @property
    def model_in_cloud(self) -> str:
        """The model's name there."""
        return self.cloud_model or self.model


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """An escalated request with both answers: what teaches, and what audits the gate."""

    request: InferRequest
    edge: InferResponse
    cloud: InferResponse
    confidence: float
    privacy: Privacy


@dataclass(slots=True)
class _Journey:
    """One request on its way: what was tried, what is in hand, and why."""

    route: Route
    request: InferRequest
    deadline: Deadline
    privacy: Privacy
    verdict: Verdict
    plan: Plan = field(default_factory=lambda: Plan(()))
    tried: set[Tier] = field(default_factory=set)
    held: InferResponse | None = None
    """The edge's answer, once there is one."""
    confidence: float | None = None
    why: list[str] = field(default_factory=list)
    errors: list[HedgerowError] = field(default_factory=list)
    tier: Tier | None = None
    """Who gave the answer, once there is one."""
    degraded: bool = False

    def reason(self, *, degraded: bool = False) -> str:
        """Why this answer, in words; of a degraded one also what keeps a better one away."""
        reasons = (*self.why, *self.plan.reasons) if degraded else self.why or self.plan.reasons
        return "; ".join(dict.fromkeys(reasons))


class Router:
    """A `Backend` over `routes`, by the model's name. Closing it closes their backends."""

    def __init__(self, routes: Mapping[str, Route], *, name: str = "router") -> None:
        self._routes = dict(routes)
        self._name = name
        self._judges = Judges()
        self._observers: list[Callable[[Observation], None]] = []
        self._misfits: set[str] = set()
        """Models whose requests the cloud refused last, which was said."""
        self._inflight: defaultdict[str, InFlight] = defaultdict(InFlight)
        self._latency: defaultdict[str, LatencyWindow] = defaultdict(LatencyWindow)
        self.counts: defaultdict[str, RouteCounts] = defaultdict(RouteCounts)
        """By model."""

    def add_route(self, route: Route) -> None:
        """Have a route for one more model, or another for one; requests on their way finish on the one they took."""
        self._routes = {**self._routes, route.model: route}  # not in place: somebody may be iterating

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._name

    @property
    def routes(self) -> Mapping[str, Route]:
        """By model."""
        return self._routes

    def set_gate(self, model: str, version: str, gate: Gate | None, guarantee: Guarantee | None) -> None:
        """Judge the answers of `model` in `version` by `gate`, or without one by the guarantee's.

        To be set before the version is activated: an answer is judged by the gate of the version that gave it. Raises
        `InvalidRelease` for a gate that the guarantee does not cover.
        """
        self._judges.set(model, version, gate, guarantee)

    def drop_gate(self, model: str, version: str) -> None:
        """Forget the gate of a version that no longer answers."""
        self._judges.drop(model, version)

    def observe(self, callback: Callable[[Observation], None]) -> None:
        """Call `callback` with each escalated request that got both answers. It must not block."""
        self._observers.append(callback)

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`: every route, in the version that the edge has."""
        states = []
        for model, route in self._routes.items():
            on_edge = [state for state in await route.edge.models() if state.name == model]
            state = max(on_edge, key=lambda state: state.ready, default=ModelState(model, "", False, NO_RELEASE))
            if not state.ready and self.snapshot(model).healthy:
                state = replace(state, ready=True)
            states.append(state)
        return states

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`: if either tier is. Versions are the edge's."""
        route = self._routes.get(model)
        if route is None:
            return False
        if await route.edge.ready(model, version):
            return True
        return not version and route.cloud is not None and await route.cloud.ready(route.model_in_cloud)

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`: the edge's, or the cloud's while the edge has no model. Versions are the edge's: none then."""
        route = self._route(model)
        try:
            return await route.edge.metadata(model, version)
        except (ModelNotFound, ModelNotReady):
            if version or route.cloud is None:
                raise
        return replace(await route.cloud.metadata(route.model_in_cloud), name=model, versions=())

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`. The answer's parameters explain it."""
        route = self._route(request.model)
        privacy = _privacy(request)
        started = time.monotonic()
        with self._inflight[request.model]:
            journey = _Journey(route, request, deadline, privacy, await self._verdict(route, "", deadline))
            try:
                response = await self._travel(journey)
            except HedgerowError as error:
                self._count(journey, error)
                raise
        self._count(journey)
        self._latency[request.model].add(time.monotonic() - started)
        return response

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`: one answer a request, as `infer` gives it."""
        yield await self.infer(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        route = self._routes.get(model)
        if route is None:
            return Snapshot(healthy=False, reason="no such model")
        tiers = [route.edge.snapshot(model)]
        if route.cloud is not None:
            tiers.append(route.cloud.snapshot(route.model_in_cloud))
        healthy = any(tier.healthy for tier in tiers)
        return Snapshot(
            healthy=healthy,
            inflight=self._inflight[model].count,
            latency_p50_s=self._latency[model].quantile(0.5),
            latency_p95_s=self._latency[model].quantile(0.95),
            reason="" if healthy else "; ".join(tier.reason for tier in tiers),
        )

    async def close(self) -> None:
        """See `Backend`."""
        for route in self._routes.values():
            await route.edge.close()
            if route.cloud is not None:
                await route.cloud.close()

    async def _travel(self, journey: _Journey) -> InferResponse:
        """Make the plan's next attempt, and so on, until there is a good answer or nothing left to try."""
        while True:
            journey.plan = journey.route.policy(_facts(journey))
            attempt = next((a for a in journey.plan.attempts if a.tier not in journey.tried), None)
            if attempt is None:
                return _settle(journey)
            journey.tried.add(attempt.tier)
            try:
                if attempt.tier is Tier.CLOUD:
                    return await self._ask_cloud(journey)
                good = await self._ask_edge(journey) or _unjudged_is_good(journey, attempt)
            except HedgerowError as error:
                if _is_final(journey, attempt.tier, error):
                    raise
                journey.errors.append(error)
                journey.why.append(_in_words(attempt.tier, error))
                if attempt.tier is Tier.CLOUD and isinstance(error, NotFound | InvalidInput | Forbidden | Unsupported):
                    self._say_misfit(journey.route.model, str(error))
                continue
            if attempt.degraded:
                continue  # held, in case there is nothing better
            if good:
                assert journey.held is not None
                return _explained(journey, journey.held, Tier.EDGE)

    async def _ask_edge(self, journey: _Journey) -> bool:
        """Get the edge's answer in hand and judge it; whether it is good enough."""
        route, request, gate = journey.route, journey.request, journey.verdict.gate
        asked = request.outputs
        if asked and gate is not None and gate.output not in asked:
            # The gate needs to see what it judges, also where the caller does not ask for it.
            request = replace(request, outputs=(*asked, gate.output))
        answer = await route.edge.infer(request, journey.deadline)
        journey.held = answer
        if asked:
            journey.held = replace(answer, outputs=tuple(tensor for tensor in answer.outputs if tensor.name in asked))
        if answer.version != journey.verdict.version:  # swapped since the request set out
            journey.verdict = await self._verdict(route, answer.version, journey.deadline)
        gate = journey.verdict.gate
        if gate is None:
            return False
        journey.confidence = confidence(gate, answer)
        passed = gate.passes(journey.confidence)
        self.counts[route.model].of(answer.version).judged(journey.confidence, gate.threshold)
        journey.why.append(f"confidence {journey.confidence:.3f} {'≥' if passed else '<'} {gate.threshold:.3f}")
        return passed

    async def _ask_cloud(self, journey: _Journey) -> InferResponse:
        route, request = journey.route, journey.request
        assert route.cloud is not None
        there = replace(request, model=route.model_in_cloud, version="")
        if journey.held is not None:
            self.counts[route.model].of(journey.held.version).escalations += 1
        answer = await route.cloud.infer(there, Deadline(journey.deadline.at - _reserve_s(journey)))
        self._misfits.discard(route.model)
        second_best = answer.parameters.get(DEGRADED) is True  # says a router there
        if second_best and route.require_cloud:
            raise BackendUnavailable(
                f"{route.cloud.name} has a second best answer only: {answer.parameters.get(REASON)}"
            )
        if journey.held is not None and journey.confidence is not None and not second_best:
            self._tell(
                Observation(
                    request=request,
                    edge=journey.held,
                    cloud=answer,
                    confidence=journey.confidence,
                    privacy=journey.privacy,
                )
            )
        return _explained(journey, replace(answer, model=request.model, id=request.id), Tier.CLOUD)

    async def _verdict(self, route: Route, version: str, deadline: Deadline) -> Verdict:
        return await self._judges.find(route.model, version, route.edge, route.cloud, route.model_in_cloud, deadline)

    def _count(self, journey: _Journey, error: HedgerowError | None = None) -> None:
        release = "" if journey.held is None else journey.held.version
        counts = self.counts[journey.route.model].of(release)
        if error is not None:
            counts.answered("", FAILED, _status(error))
        elif journey.degraded:
            counts.answered(journey.tier or "", SECOND_BEST, _kept_from_cloud(journey))
        else:
            counts.answered(journey.tier or "", _outcome(journey), "")

    def _say_misfit(self, model: str, text: str) -> None:
        """Once: the cloud refuses what the edge has taken, so every escalation of this model may come to nothing."""
        if model not in self._misfits:
            self._misfits.add(model)
            log.error("%s: the cloud does not take what the edge takes: %s", model, text)

    def _tell(self, observation: Observation) -> None:
        for observer in self._observers:
            try:
                observer(observation)
            except Exception:  # whatever an observer gets wrong, the caller has an answer coming
                log.exception("an observer failed")

    def _route(self, model: str) -> Route:
        try:
            return self._routes[model]
        except KeyError:
            raise ModelNotFound(f"there is no model {model!r} here") from None


def _outcome(journey: _Journey) -> str:
    """How a good answer came about."""
    if journey.tier is Tier.EDGE:
        return UNJUDGED if journey.confidence is None else CONFIDENT
    if journey.held is not None:
        return ESCALATED
    return FALLBACK if journey.errors else DIRECT


def _kept_from_cloud(journey: _Journey) -> str:
    """What kept a better answer away, as one of a few words."""
    if journey.errors:
        return _status(journey.errors[-1])
    if journey.tier is Tier.CLOUD:
        return "cloud"
    if journey.privacy is Privacy.EDGE_ONLY:
        return "privacy"
    cloud = journey.route.cloud
    if cloud is None:
        return "no_cloud"
    return "policy" if cloud.snapshot(journey.route.model_in_cloud).healthy else _status(Unavailable(""))


def _status(error: HedgerowError) -> str:
    return error.status.name.lower()


def _privacy(request: InferRequest) -> Privacy:
    """What the request allows; what is not known here is refused, be it name or value: it may forbid anything."""
    for name in request.parameters:
        if name not in {PRIVACY, STICKY} and name.casefold().startswith(PREFIX):
            raise InvalidInput(f"there is no parameter {name!r}; requests may have {PRIVACY!r} and {STICKY!r}")
    value = request.parameters.get(PRIVACY, "")
    if value not in tuple(Privacy):
        known = ", ".join(repr(privacy.value) for privacy in Privacy)
        raise InvalidInput(f"{PRIVACY} is {value!r}; it must be one of {known}")
    return Privacy(value)


def _facts(journey: _Journey) -> Facts:
    route = journey.route
    return Facts(
        model=route.model,
        remaining_s=max(0.0, journey.deadline.remaining - _reserve_s(journey)),
        edge=route.edge.snapshot(route.model),
        cloud=None if route.cloud is None else route.cloud.snapshot(route.model_in_cloud),
        privacy=journey.privacy,
        gate_reason=journey.verdict.reason,
        gate_refused=journey.verdict.refused,
        tried=frozenset(journey.tried),
    )


def _reserve_s(journey: _Journey) -> float:
    """What the cloud is not given of what is left."""
    if journey.held is None:
        return 0.0
    return min(max(RETURN_RESERVE_MIN_S, RETURN_RESERVE * journey.deadline.remaining), RETURN_RESERVE_MAX_S)


def _unjudged_is_good(journey: _Journey, attempt: Attempt) -> bool:
    """Whether the edge's answer will do that no gate has passed: only where there is no gate, and no need of one."""
    verdict = journey.verdict
    return not attempt.gated and verdict.gate is None and not verdict.refused and not journey.route.require_cloud


def _is_final(journey: _Journey, tier: Tier, error: HedgerowError) -> bool:
    """Whether no other tier could do better than `error`."""
    if journey.held is not None:
        return False
    if isinstance(error, ModelNotFound):
        return tier is Tier.EDGE and bool(journey.request.version)  # versions are the edge's
    if isinstance(error, DeadlineExceeded):
        return journey.deadline.expired
    return isinstance(error, InvalidInput | Forbidden)


def _in_words(tier: Tier, error: HedgerowError) -> str:
    if tier is Tier.EDGE:
        return NO_RELEASE if isinstance(error, ModelNotFound | ModelNotReady) else f"edge failed: {error}"
    return str(error) if isinstance(error, Unavailable | DeadlineExceeded) else f"cloud failed: {error}"


def _settle(journey: _Journey) -> InferResponse:
    """The answer in hand, marked degraded, when nothing better can be had; or a clear error."""
    reasons = journey.reason(degraded=True)
    retry_after_s = max((error.retry_after_s or 0.0 for error in journey.errors), default=0.0) or None
    if journey.held is None:
        kinds = {type(error) for error in journey.errors}
        alone = len(kinds) == 1 and not issubclass(next(iter(kinds)), NotFound)
        kind = next(iter(kinds)) if alone else Unavailable
        raise kind(reasons, retry_after_s=retry_after_s)
    if journey.route.require_cloud:
        if journey.privacy is Privacy.EDGE_ONLY:
            raise Forbidden(f"{journey.route.model} requires the cloud, which this request rules out: {reasons}")
        raise Unavailable(f"{journey.route.model} requires the cloud: {reasons}", retry_after_s=retry_after_s)
    return _explained(journey, journey.held, Tier.EDGE, degraded=True)


def _explained(journey: _Journey, answer: InferResponse, tier: Tier, *, degraded: bool = False) -> InferResponse:
    parameters: dict[str, Parameter] = {
        key: value
        for key, value in answer.parameters.items()
        if not key.startswith(PREFIX) or key in {SPLIT, SPLIT_REASON}
    }
    if answer.parameters.get(DEGRADED) is True:  # by a router behind us, whose second best does not get better here
        degraded = True
        journey.why.append(f"{tier}: {answer.parameters.get(REASON, 'second best')}")
    parameters |= {TIER: tier.value, REASON: journey.reason(degraded=degraded) or f"{tier} first", DEGRADED: degraded}
    if journey.confidence is not None:
        parameters[CONFIDENCE] = journey.confidence
    if journey.held is not None:
        parameters[RELEASE] = f"{journey.route.model}/{journey.held.version}"
    journey.tier, journey.degraded = tier, degraded
    return replace(answer, parameters=parameters)
