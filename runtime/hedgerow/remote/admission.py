"""Which requests a remote is asked at all: not more than it may have in flight, and none in vain."""

from typing import Self

from hedgerow.errors import Overloaded
from hedgerow.lifecycle import InFlight
from hedgerow.remote.known import MAX_KNOWN_MODELS
from hedgerow.remote.limits import PaceLimit
from hedgerow.remote.settings import RemoteSettings


class Load:
    """What a remote has in flight for one model: each request is in it ``with`` it, and tells `limit` its end."""

    def __init__(self, limit: PaceLimit, whole: InFlight) -> None:
        self.limit = limit
        self.count = 0
        self._whole = whole

    def __enter__(self) -> Self:
        self.count += 1
        self._whole.enter()
        return self

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        self._whole.leave()


class Admission:
    """Admits requests to a remote. A model's pace is its own: the remote may be slow at one and quick at another."""

    def __init__(self, name: str, settings: RemoteSettings) -> None:
        self.inflight = InFlight()
        """All that is with the remote."""
        self._name = name
        self._settings = settings
        self._loads: dict[str, Load] = {}

    @property
    def limit(self) -> int:
        """Requests for the slowest model that may be in flight with one that has all of the settings' `timeout_s`."""
        if not self._settings.adaptive_limit:
            return self._settings.limit_max
        allowed = (load.limit.allowed(self._settings.timeout_s) for load in self._loads.values())
        return min(allowed, default=self._settings.limit_max)

    def admit(self, model: str, time_s: float) -> Load:
        """What a request that has `time_s` will be part of; raises `Overloaded` if it would be asked in vain."""
        if self.inflight.count >= self._settings.limit_max:
            raise Overloaded(f"{self._name}: {self.inflight.count} requests are in flight, which is the limit")
        load = self._loads.get(model) or self._new(model)
        if self._settings.adaptive_limit:
            count, allowed = load.count + 1, load.limit.allowed(time_s)
            if count > allowed:
                raise Overloaded(
                    f"{self._name}: {load.count} requests for {model} are in flight; one more has {time_s:.3g} s and "
                    f"would take about {load.limit.expected_s(count):.3g} s",
                    retry_after_s=load.limit.expected_s(count - allowed),
                )
        return load

    def _new(self, model: str) -> Load:
        if len(self._loads) >= MAX_KNOWN_MODELS:  # those with requests in flight are bounded by their number
            self._loads = {name: load for name, load in self._loads.items() if load.count}
        load = self._loads[model] = Load(PaceLimit(self._settings.limit_min, self._settings.limit_max), self.inflight)
        return load
