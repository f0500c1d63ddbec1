"""What a service counts of each model and version, in OIP's statistics extension."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hedgerow.proto import oip_pb2


@dataclass(slots=True)
class Total:
    """How often something happened and how many nanoseconds it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count it once more."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class Counts:
    """The totals of one model in one version. Times are measured where the service stands."""

    success: Total = field(default_factory=Total)
    """Whole requests, from parsed to answered."""
    fail: Total = field(default_factory=Total)
    infer: Total = field(default_factory=Total)
    """The backend's part of the successful ones: its queues, its network and its engine together."""
    last_unix_ms: int = 0


class Stopwatch:
    """One request being timed. `version` is the one it counts for: whoever serves it sets the answer's."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.infer_ns = 0

    @contextmanager
    def infer(self) -> Iterator[None]:
        """Time the backend's part."""
        started = time.perf_counter_ns()
        yield
        self.infer_ns += time.perf_counter_ns() - started


class Statistics:
    """Counts by (model, version). Only models that the backend knows get here, so callers cannot make it grow."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Counts] = {}

    @contextmanager
    def request(self, model: str, version: str) -> Iterator[Stopwatch]:
        """Time a request and count it; `version` as far as it is known before there is an answer."""
        watch, started = Stopwatch(version), time.perf_counter_ns()
        try:
            yield watch
        except BaseException:  # the caller's leaving too
            self._of(model, watch.version).fail.add(time.perf_counter_ns() - started)
            raise
        counts = self._of(model, watch.version)
        counts.success.add(time.perf_counter_ns() - started)
        counts.infer.add(watch.infer_ns)
        counts.last_unix_ms = time.time_ns() // 1_000_000

    def message(self, model: str, version: str) -> oip_pb2.ModelStatistics:
        """The statistics of one model and version, zeros if nothing has happened."""
        counts = self._counts.get((model, version), Counts())
        success, fail, infer = (
            oip_pb2.StatisticDuration(count=total.count, ns=total.ns)
            for total in (counts.success, counts.fail, counts.infer)
        )
        return oip_pb2.ModelStatistics(
            name=model,
            version=version,
            last_inference=counts.last_unix_ms,
            inference_count=counts.success.count,
            execution_count=counts.success.count,
            inference_stats=oip_pb2.InferStatistics(success=success, fail=fail, compute_infer=infer),
        )

    def counted(self) -> set[tuple[str, str]]:
        """The models and versions that something was counted for."""
        return set(self._counts)

    def _of(self, model: str, version: str) -> Counts:
        return self._counts.setdefault((model, version), Counts())
