"""What a service counts of each model and version, in OIP's statistics extension."""

import time
from dataclasses import dataclass, field
from typing import Self

from hedgerow.proto import oip_pb2
from hedgerow.tensors import ModelMetadata


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
    """One request being timed, from entering to leaving ``with``."""

    __slots__ = ("_infer_ns", "_model", "_started", "_statistics", "version")

    def __init__(self, statistics: "Statistics", metadata: ModelMetadata) -> None:
        self._statistics = statistics
        self._model = metadata.name
        self.version = metadata.versions[-1] if metadata.versions else ""
        """The one it counts for."""
        self._infer_ns = 0

    def answered(self, version: str, ns: int) -> None:
        """The backend has answered by `version` and took `ns`."""
        self.version = version
        self._infer_ns += ns

    def __enter__(self) -> Self:
        self._started = time.perf_counter_ns()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        taken = time.perf_counter_ns() - self._started
        counts = self._statistics.of(self._model, self.version)
        if error is not None:  # the caller's leaving too
            counts.fail.add(taken)
            return
        counts.success.add(taken)
        counts.infer.add(self._infer_ns)
        counts.last_unix_ms = time.time_ns() // 1_000_000


class Statistics:
    """Counts by (model, version). Only models that the backend knows get here, so callers cannot make it grow."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Counts] = {}

    def request(self, metadata: ModelMetadata) -> Stopwatch:
        """What times a request to a model with this `metadata` and counts it."""
        return Stopwatch(self, metadata)

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

    def of(self, model: str, version: str) -> Counts:
        """The counts of one model and version."""
        return self._counts.setdefault((model, version), Counts())
