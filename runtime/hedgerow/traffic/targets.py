"""The targets of a split: who shares the requests for a model, by which weights, and whether they are interchangeable.

Interfaces are compared at the first use, before weights change, and whenever `look` is called. Before anything was
agreed on, and if none keeps to it any more, a difference is a `ConfigError` that names it; else only the target that
differs is left out.
"""

import asyncio
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec.structs import replace

from hedgerow.backend import Backend, Deadline
from hedgerow.config import Settings
from hedgerow.errors import ConfigError, DeadlineExceeded, HedgerowError, ModelNotFound, Unavailable
from hedgerow.tensors import ModelMetadata
from hedgerow.traffic.agreement import settle

MAX_WEIGHT = 1e9
LOOK_PAUSE_S = 1.0
"""Least time between two looks at the interfaces that nothing has come of."""
LOOK_TIMEOUT_S = 2.0
"""That a target may take to say its interface."""
LOOK_SHARE = 0.5
"""Of what is left to the caller who has to wait for that."""

log = logging.getLogger(__name__)


class SplitTargetSettings(Settings, frozen=True, kw_only=True):
    """One of those that share a model's requests."""

    model: str
    """Its name where it is served."""
    version: str = ""
    """Empty: the one that is served there."""
    weight: Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)] = 1.0


class SplitSettings(Settings, frozen=True, kw_only=True):
    """Who shares the requests for a model."""

    targets: Annotated[dict[str, SplitTargetSettings], msgspec.Meta(min_length=1, max_length=64)]
    """By a name that answers tell."""

    def over(self, backend: Backend, *, local: bool) -> tuple["SplitTarget", ...]:
        """The targets that these settings mean, all of them in `backend`."""
        return tuple(
            SplitTarget(name, backend, one.model, one.version, one.weight, local=local)
            for name, one in self.targets.items()
        )


@dataclass(frozen=True, slots=True)
class SplitTarget:
    """A model of a backend, in one version or (empty) that which is served, and its weight to begin with.

    `local`: whether it may have requests that must not leave the device, because it does not leave it or sees to it.
    """

    name: str
    backend: Backend
    model: str
    version: str = ""
    weight: float = 1.0
    local: bool = False


class Targets:
    """The targets of `model`. Belongs to one event loop."""

    def __init__(self, model: str, targets: Sequence[SplitTarget]) -> None:
        self._model = model
        self.by_name = {target.name: target for target in targets}
        if len(self.by_name) < len(targets):
            raise ConfigError(f"split of {model}: two targets have the same name")
        self.weights = self._checked({target.name: target.weight for target in targets})
        self.odd: Mapping[str, str] = {}
        """Why targets must not be asked, by name."""
        self.problem = ""
        """Why none must be."""
        self._known: dict[str, ModelMetadata] = {}
        self._interface: ModelMetadata | None = None
        self._looking = asyncio.Lock()
        self._looked_at = -math.inf

    @property
    def active(self) -> list[SplitTarget]:
        """Those that get requests."""
        return [target for name, target in self.by_name.items() if self.weights[name] > 0]

    def versions(self, target: SplitTarget) -> tuple[str, ...]:
        """In which a target can be asked, as far as is known; the last is the one that it serves."""
        if target.version:
            return (target.version,)
        known = self._known.get(target.name)
        return () if known is None else known.versions

    async def interface(self, deadline: Deadline) -> ModelMetadata:
        """What all have in common; raises what keeps that from being known. The heaviest one's version is the last."""
        if self._interface is None:
            await self._look_within(deadline, again=False)
            assert self._interface is not None
        return self._interface

    async def having(self, version: str, deadline: Deadline) -> list[SplitTarget]:
        """Those that get requests and have a version; raises `ModelNotFound`."""
        for again in (True, False):
            if names := [target for target in self.active if version in self.versions(target)]:
                return names
            if again and time.monotonic() - self._looked_at >= LOOK_PAUSE_S:  # it may be a new one
                await self._look_within(deadline, again=True)
        raise ModelNotFound(f"there is no model {self._model!r} in version {version!r} here")

    def knows(self, target: SplitTarget, version: str) -> bool:
        """Whether what is known of a target is of the model that answers as `version`, as far as can be told."""
        known = self._known.get(target.name)
        return known is not None and (not known.versions or version in known.versions)

    def in_common(self, targets: Iterable[SplitTarget]) -> ModelMetadata:
        """What some of them have in common; to be asked for after `interface`."""
        assert self._interface is not None
        return self._in_common(self._interface, targets)

    async def set_weights(self, weights: Mapping[str, float]) -> None:
        """Have other weights, of all targets. Raises `ConfigError`, and leaves all as it is, if they cannot be."""
        checked = self._checked(weights)
        async with self._looking:
            await self._ask_all(LOOK_TIMEOUT_S)
            agreed, odd = settle(self._heaviest_first(checked), self._interface)
            if odd:
                name, text = next(iter(odd.items()))
                raise ConfigError(f"split of {self._model}: {name} does not have the others' interface: {text}")
            self.weights = checked
            self._settled(agreed, odd)

    async def look(self) -> None:
        """Ask for all interfaces and compare them; raises if nothing is agreed on then."""
        async with self._looking:
            await self._look(LOOK_TIMEOUT_S)

    async def _look_within(self, deadline: Deadline, *, again: bool) -> None:
        """`look` for a caller, unless another has just done so."""
        try:
            async with asyncio.timeout(None if math.isinf(deadline.at) else deadline.remaining), self._looking:
                recent = time.monotonic() - self._looked_at < LOOK_PAUSE_S
                if self._interface is not None and (recent or not again):
                    return
                if self.problem and recent:
                    raise ConfigError(self.problem)
                await self._look(min(LOOK_TIMEOUT_S, LOOK_SHARE * deadline.remaining))
        except TimeoutError:
            raise DeadlineExceeded(f"the deadline passed before the targets of {self._model} were compared") from None

    async def _look(self, timeout_s: float) -> None:
        failures = await self._ask_all(timeout_s)
        self._looked_at = time.monotonic()
        before = self.odd
        try:
            agreed, odd = settle(self._heaviest_first(self.weights), self._interface)
        except ConfigError as error:
            self._interface, self.odd, self.problem = None, {}, f"split of {self._model}: {error}"
            raise ConfigError(self.problem) from None
        if agreed is None:
            raise failures[0]
        self._settled(agreed, odd)
        for name in odd.keys() - before.keys():
            log.error("split of %s: %s is left out: %s", self._model, name, odd[name])
        for name in before.keys() - odd.keys():
            log.warning("split of %s: %s has the others' interface again", self._model, name)

    def _settled(self, agreed: ModelMetadata | None, odd: Mapping[str, str]) -> None:
        self.odd, self.problem = odd, ""
        self._interface = agreed and self._in_common(agreed, (one for one in self.active if one.name not in odd))

    async def _ask_all(self, timeout_s: float) -> list[HedgerowError]:
        """Know the interfaces of all as they are now, or were; what kept them from being asked."""
        failures: list[HedgerowError] = []

        async def ask(target: SplitTarget) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    self._known[target.name] = await target.backend.metadata(target.model, target.version)
            except HedgerowError as error:
                failures.append(error)
            except TimeoutError:
                failures.append(Unavailable(f"{target.name} does not say its interface in time"))

        async with asyncio.TaskGroup() as group:
            for target in self.by_name.values():
                group.create_task(ask(target))
        return failures

    def _heaviest_first(self, weights: Mapping[str, float]) -> dict[str, ModelMetadata]:
        """The interfaces of those that get requests; the others are held against that of the heaviest."""
        names = sorted((name for name in self._known if weights[name] > 0), key=lambda name: -weights[name])
        return {name: self._known[name] for name in names}

    def _in_common(self, interface: ModelMetadata, targets: Iterable[SplitTarget]) -> ModelMetadata:
        known: list[ModelMetadata] = []
        versions: dict[str, None] = {}
        for target in sorted(targets, key=lambda one: self.weights[one.name]):
            known += [self._known[target.name]] if target.name in self._known else []
            for version in self.versions(target):
                versions.pop(version, None)
                versions[version] = None
        shared = set.intersection(*(set(one.properties.items()) for one in known)) if known else set()
        platforms = {one.platform for one in known}
        return replace(
            interface,
            name=self._model,
            versions=tuple(versions),
            platform=platforms.pop() if len(platforms) == 1 else "",
            properties=dict(sorted(shared)),
        )

    def _checked(self, weights: Mapping[str, float]) -> dict[str, float]:
        where = f"split of {self._model}"
        if weights.keys() != self.by_name.keys():
            raise ConfigError(f"{where}: expected weights of {', '.join(self.by_name)}, got {', '.join(weights)}")
        for name, weight in weights.items():
            if not 0 <= weight <= MAX_WEIGHT:
                raise ConfigError(f"{where}: the weight of {name} is {weight}; expected 0 to {MAX_WEIGHT:g}")
        if not any(weights.values()):
            raise ConfigError(f"{where}: no weight is above 0")
        return {name: float(weights[name]) for name in self.by_name}
