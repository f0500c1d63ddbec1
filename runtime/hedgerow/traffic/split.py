"""Split: requests for one model go to several targets, by weight; in front of a backend that answers all other models.

The life of a request: the target is chosen (`rendezvous`), by the request's `STICKY` or else its tenant, so
that who was with one release stays there, or in turn where it says neither; one that is not healthy is passed over, and
the answer says so; it comes back under the name that the caller used. The rules:

- weights change while requests are in flight, which finish where they are, and move as few callers as can be;
- targets must be interchangeable (`targets`); `run` compares them after one has answered in another version,
  and at intervals;
- where no target is healthy, the one is asked that would have been: its own refusal says best when to come again;
- a request that must not leave the device goes only to targets that are marked `local`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from hedgerow.backend import Backend, Deadline, ModelState, Snapshot
from hedgerow.errors import ConfigError, Forbidden, HedgerowError, InvalidInput, Unavailable
from hedgerow.latency import LatencyWindow
from hedgerow.lifecycle import InFlight
from hedgerow.parameters import PRIVACY, SPLIT, SPLIT_REASON, STICKY
from hedgerow.policies import Privacy
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata, Parameter
from hedgerow.traffic.facts import privacy
from hedgerow.traffic.rendezvous import Points, by_key, by_point
from hedgerow.traffic.targets import (
    LOOK_PAUSE_S,
    LOOK_TIMEOUT_S,
    SplitSettings,
    SplitTarget,
    SplitTargetSettings,
    Targets,
)

__all__ = ["ModelSplit", "Split", "SplitSettings", "SplitTarget", "SplitTargetSettings", "TargetCounts"]

LOOK_S = 30.0
"""Between two looks at the targets' interfaces where nothing has changed."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class TargetCounts:
    """What came of the requests that were a target's to answer."""

    answered: int = 0
    failed: int = 0
    passed_over: int = 0


class ModelSplit:
    """The requests for one model. Belongs to one event loop; see `Split`."""

    def __init__(self, model: str, targets: Sequence[SplitTarget]) -> None:
        self._model = model
        self._targets = Targets(model, targets)
        self._points = Points()
        self._look_again = asyncio.Event()
        self._inflight = InFlight()
        self._latency = LatencyWindow()
        self.counts = {target.name: TargetCounts() for target in targets}
        """By target."""

    @property
    def backends(self) -> Sequence[Backend]:
        """Of all targets."""
        return [target.backend for target in self._targets.by_name.values()]

    @property
    def weights(self) -> Mapping[str, float]:
        """By target."""
        return self._targets.weights

    async def set_weights(self, weights: Mapping[str, float]) -> None:
        """Share requests by `weights`, which name every target, from now on.

        Raises `ConfigError`, and leaves everything as it is, if they cannot be or a target that is to get requests has
        another interface. One that cannot be asked for it now gets requests when it is healthy.
        """
        await self._targets.set_weights(weights)

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`."""
        target, explanation = await self._choose(request, deadline)
        started = time.monotonic()
        try:
            with self._inflight:
                answer = await target.backend.infer(_there(request, target), deadline)
        except HedgerowError:
            self.counts[target.name].failed += 1
            raise
        self._latency.add(time.monotonic() - started)
        self.counts[target.name].answered += 1
        return self._returned(request, target, answer, explanation)

    async def stream(self, request: InferRequest, deadline: Deadline) -> AsyncGenerator[InferResponse, None]:
        """See `Backend`; all answers to a request come from one target."""
        target, explanation = await self._choose(request, deadline)
        answers = target.backend.stream(_there(request, target), deadline)
        try:
            with self._inflight:
                async for answer in answers:
                    yield self._returned(request, target, answer, explanation)
        except HedgerowError:
            self.counts[target.name].failed += 1
            raise
        finally:
            if isinstance(answers, AsyncGenerator):
                await answers.aclose()
        self.counts[target.name].answered += 1

    async def metadata(self, version: str = "") -> ModelMetadata:
        """See `Backend`: what the targets have in common. The heaviest one's version is the last."""
        deadline = Deadline.after(LOOK_TIMEOUT_S)
        interface = await self._targets.interface(deadline)
        if not version:
            return interface
        those = await self._targets.having(version, deadline)
        return replace(self._targets.in_common(those), versions=(version,))

    async def ready(self, version: str = "") -> bool:
        """See `Backend`: whether a target that gets requests is."""
        if self._targets.problem:
            return False
        for target in self._targets.active:
            if target.name in self._targets.odd or (version and target.version not in {"", version}):
                continue
            if await target.backend.ready(target.model, target.version or version):
                return True
        return False

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`: each version that gets requests, once."""
        problem = ""
        try:
            await self._targets.interface(Deadline.after(LOOK_TIMEOUT_S))
        except HedgerowError as error:
            problem = str(error)
        states: dict[str, ModelState] = {}
        for target in self._targets.active:
            version = (self._targets.versions(target) or ("",))[-1]
            reason = problem or self._unfit(target)
            if not reason and not await target.backend.ready(target.model, target.version):
                reason = "not ready"
            if version not in states or not states[version].ready:
                states[version] = ModelState(self._model, version, not reason, reason)
        return tuple(states.values())

    def snapshot(self) -> Snapshot:
        """See `Backend`."""
        reasons = {target.name: self._unfit(target) for target in self._targets.active}
        healthy = not all(reasons.values())
        return Snapshot(
            healthy=healthy,
            inflight=self._inflight.count,
            latency_p50_s=self._latency.quantile(0.5),
            latency_p95_s=self._latency.quantile(0.95),
            reason="" if healthy else "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        )

    async def run(self) -> None:
        """Compare the targets' interfaces, when one has changed and at intervals, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._look_again.wait()
            except TimeoutError:
                pass
            self._look_again.clear()
            try:
                await self._targets.look()
            except ConfigError as error:
                log.error("%s", error)  # noqa: TRY400 (its message says it all)
            except HedgerowError as error:
                log.debug("split of %s: %s", self._model, error)  # whose outage it is has said so
            await asyncio.sleep(LOOK_PAUSE_S)

    async def _choose(self, request: InferRequest, deadline: Deadline) -> tuple[SplitTarget, dict[str, Parameter]]:
        """The target for `request`, and what its answer is to say of the choice."""
        sticky = request.parameters.get(STICKY, "") or request.origin.tenant
        if not isinstance(sticky, str):
            raise InvalidInput(f"{STICKY} is {sticky!r}; it must be a text")
        await self._targets.interface(deadline)
        weights = await self._allowed(request, deadline)
        key = f"{self._model}\0{sticky}".encode() if sticky else b""  # or the same callers were first with every model
        name, point = (by_key(weights, key), 0.0) if key else by_point(weights, self._points.take())
        target = self._targets.by_name[name]
        reason = self._unfit(target)
        if not reason:
            return target, {SPLIT: name}
        others = [one for other in weights if (one := self._targets.by_name[other]) is not target]
        fit = [one for one in others if not self._unfit(one)]
        if not fit and name not in self._targets.odd:
            return target, {SPLIT: name}
        fit = fit or [one for one in others if one.name not in self._targets.odd]
        if not fit:
            raise Unavailable(f"{name}, which alone could answer, is left out: {reason}")
        left = {one.name: weights[one.name] for one in fit}
        chosen = by_key(left, key) if key else by_point(left, point)[0]
        self.counts[name].passed_over += 1
        return self._targets.by_name[chosen], {SPLIT: chosen, SPLIT_REASON: f"{name} is passed over: {reason}"}

    async def _allowed(self, request: InferRequest, deadline: Deadline) -> Mapping[str, float]:
        """The weights, all above 0, of the targets that `request` may go to."""
        targets = self._targets.active
        if request.version:
            targets = await self._targets.having(request.version, deadline)
        if request.parameters and privacy(request) is Privacy.EDGE_ONLY:
            targets = [target for target in targets if target.local]
            if not targets:
                raise Forbidden(f"what the request says of {PRIVACY} rules out all targets of {self._model}")
        return {target.name: self._targets.weights[target.name] for target in targets}

    def _unfit(self, target: SplitTarget) -> str:
        """Why a target should not be asked now, in words; empty if it can be."""
        if reason := self._targets.odd.get(target.name, ""):
            return reason
        snapshot = target.backend.snapshot(target.model)
        return "" if snapshot.healthy else snapshot.reason or "it is not healthy"

    def _returned(
        self, request: InferRequest, target: SplitTarget, answer: InferResponse, explanation: Mapping[str, Parameter]
    ) -> InferResponse:
        """`answer` under the caller's names."""
        if not self._targets.knows(target, answer.version):
            self._look_again.set()
        return replace(answer, model=request.model, id=request.id, parameters={**answer.parameters, **explanation})


class Split:
    """`backend`, with some models split. Closing it closes all backends. Belongs to one event loop; `run` watches."""

    def __init__(self, backend: Backend, splits: Mapping[str, Sequence[SplitTarget]]) -> None:
        self._backend = backend
        self.splits: Mapping[str, ModelSplit] = {model: ModelSplit(model, targets) for model, targets in splits.items()}
        """By model."""

    @property
    def name(self) -> str:
        """See `Backend`."""
        return self._backend.name

    async def run(self) -> None:
        """Watch over the targets until cancelled. Without it, they are compared at the first use and before changes."""
        async with asyncio.TaskGroup() as group:
            for model, split in self.splits.items():
                group.create_task(split.run(), name=f"split-{model}")

    async def models(self) -> Sequence[ModelState]:
        """See `Backend`."""
        states = [state for state in await self._backend.models() if state.name not in self.splits]
        for split in self.splits.values():
            states += await split.models()
        return states

    async def ready(self, model: str, version: str = "") -> bool:
        """See `Backend`."""
        split = self.splits.get(model)
        return await (self._backend.ready(model, version) if split is None else split.ready(version))

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        """See `Backend`."""
        split = self.splits.get(model)
        return await (self._backend.metadata(model, version) if split is None else split.metadata(version))

    async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
        """See `Backend`. The answer's parameters name the target."""
        return await (self.splits.get(request.model) or self._backend).infer(request, deadline)

    def stream(self, request: InferRequest, deadline: Deadline) -> AsyncIterator[InferResponse]:
        """See `Backend`."""
        return (self.splits.get(request.model) or self._backend).stream(request, deadline)

    def snapshot(self, model: str) -> Snapshot:
        """See `Backend`."""
        split = self.splits.get(model)
        return self._backend.snapshot(model) if split is None else split.snapshot()

    async def close(self) -> None:
        """See `Backend`."""
        backends = [self._backend, *(backend for split in self.splits.values() for backend in split.backends)]
        for backend in {id(one): one for one in backends}.values():
            await backend.close()


def _there(request: InferRequest, target: SplitTarget) -> InferRequest:
    """`request` as the target is asked."""
    parameters = request.parameters
    if STICKY in parameters:
        parameters = {name: value for name, value in parameters.items() if name != STICKY}
    return replace(request, model=target.model, version=target.version or request.version, parameters=parameters)
