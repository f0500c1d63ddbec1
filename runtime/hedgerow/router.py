"""The router: the backend made of backends. Asks the policy, runs the plan, judges, falls back, explains the answer.

Steps 3 to 8 of a request's life: facts → `Policy` → the edge's answer → its gate → the cloud with what is left of the
deadline → the best answer there is. The policy is asked again before each attempt, with the facts of that moment.
What is known of a request meanwhile is its `Journey`.
"""

import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from hedgerow.backend import Deadline, ModelState, Snapshot
from hedgerow.config import Settings
from hedgerow.errors import (
    BackendUnavailable,
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    NotFound,
    Unsupported,
)
from hedgerow.gate import Gate, Guarantee, confidence
from hedgerow.journey import FAILED, Journey, Route, status
from hedgerow.judge import NO_RELEASE, Judges, Verdict
from hedgerow.latency import LatencyWindow
from hedgerow.lifecycle import InFlight
from hedgerow.parameters import DEGRADED, REASON, privacy
from hedgerow.policies import Privacy, Tier
from hedgerow.statistics import RouteCounts
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata

log = logging.getLogger(__name__)


class RouteSettings(Settings, frozen=True, kw_only=True):
    """How requests for one model travel."""

    cloud_model: str = ""
    """The model's name in the cloud; empty: the same."""
    policy: str = "edge_first"
    require_cloud: bool = False
    """Refuse, rather than degrade, where the cloud should have answered and could not."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """An escalated request with both answers: what teaches, and what audits the gate."""

    request: InferRequest
    edge: InferResponse
    cloud: InferResponse
    confidence: float
    privacy: Privacy


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
        allowed = privacy(request)
        started = time.monotonic()
        with self._inflight[request.model]:
            journey = Journey(route, request, deadline, allowed, await self._verdict(route, "", deadline))
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

    async def _travel(self, journey: Journey) -> InferResponse:
        """Make the plan's next attempt, and so on, until there is a good answer or nothing left to try."""
        while (attempt := journey.next_attempt()) is not None:
            try:
                if attempt.tier is Tier.CLOUD:
                    return await self._ask_cloud(journey)
                good = await self._ask_edge(journey) or journey.takes_unjudged(attempt)
            except HedgerowError as error:
                journey.failed(attempt.tier, error)
                if attempt.tier is Tier.CLOUD and isinstance(error, NotFound | InvalidInput | Forbidden | Unsupported):
                    self._say_misfit(journey.route.model, str(error))
                continue
            if good and not attempt.degraded:  # else it is held, in case there is nothing better
                assert journey.held is not None
                return journey.explained(journey.held, Tier.EDGE)
        return journey.settle()

    async def _ask_edge(self, journey: Journey) -> bool:
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
        if journey.verdict.is_of_another(answer):  # swapped since the request set out
            journey.verdict = await self._verdict(route, answer.version, journey.deadline, answer.source)
        gate = journey.verdict.gate
        if gate is None:
            return False
        sure = confidence(gate, answer)
        self.counts[route.model].of(answer.version).judged(sure, gate.threshold)
        return journey.judged(gate, sure)

    async def _ask_cloud(self, journey: Journey) -> InferResponse:
        route, request = journey.route, journey.request
        assert route.cloud is not None
        there = replace(request, model=route.model_in_cloud, version="")
        if journey.held is not None:
            self.counts[route.model].of(journey.held.version).escalations += 1
        answer = await route.cloud.infer(there, Deadline(journey.deadline.at - journey.reserve_s))
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
        return journey.explained(replace(answer, model=request.model, id=request.id), Tier.CLOUD)

    async def _verdict(
        self, route: Route, version: str, deadline: Deadline, student: ModelMetadata | None = None
    ) -> Verdict:
        cloud, cloud_model = route.cloud, route.model_in_cloud
        return await self._judges.find(route.model, version, route.edge, cloud, cloud_model, deadline, student)

    def _count(self, journey: Journey, error: HedgerowError | None = None) -> None:
        release = "" if journey.held is None else journey.held.version
        counts = self.counts[journey.route.model].of(release)
        if error is not None:
            counts.answered("", FAILED, status(error))
        else:
            counts.answered(journey.tier or "", *journey.outcome())

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
