"""What is counted while requests are answered: plain additions on the way, read by OIP's statistics and by metrics.

Callers and servers behind us cannot make any of it grow without bound: what there are too many of is counted together.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from hedgerow.backend import Deadline
from hedgerow.errors import DeadlineExceeded, HedgerowError
from hedgerow.host.batch import Outcome
from hedgerow.proto import oip_pb2
from hedgerow.tensors import ModelMetadata

MAX_COUNTED = 256
"""Models and versions that are counted each for itself. What comes after is counted as `OTHER`."""
OTHER: Final = ("", "")
"""Model and version of the requests for models that are not here, or not known when they were refused."""
MAX_RELEASES = 16
"""Releases of one model that a router counts for; the oldest is forgotten."""
DURATION_BOUNDS_NS: Final = tuple(
    round(1e9 * seconds)
    for seconds in (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
)
CONFIDENCE_BOUNDS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 0.999, 1.0)


@dataclass(slots=True)
class Total:
    """How often something happened and how many nanoseconds it took altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count it once more."""
        self.count += 1
        self.ns += ns


class Histogram:
    """How many values there were up to each of `bounds`, the last bucket those above all, and their `sum`."""

    __slots__ = ("bounds", "buckets", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.sum: float = 0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.buckets)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.buckets[bisect_left(self.bounds, value)] += times
        self.sum += times * value


@dataclass(slots=True)
class Compute:
    """Putting inputs together, the engine itself, and taking outputs apart."""

    input: Total = field(default_factory=Total)
    infer: Total = field(default_factory=Total)
    output: Total = field(default_factory=Total)

    def add(self, outcome: Outcome, count: int = 1) -> None:
        """Count a run for each of `count` who took part."""
        for total, ns in (
            (self.input, outcome.input_ns),
            (self.infer, outcome.infer_ns),
            (self.output, outcome.output_ns),
        ):
            total.count += count
            total.ns += count * ns


@dataclass(slots=True)
class BatchCounts:
    """What was run of one model in one version, in the sense of OIP's ModelStatistics."""

    rows: int = 0
    """`inference_count`."""
    queue: Total = field(default_factory=Total)
    """By request."""
    requests: Compute = field(default_factory=Compute)
    """By request; each counts the whole time of its batch."""
    executions: dict[int, Compute] = field(default_factory=dict)
    """`batch_stats`: by the rows that were run, padding included; their counts sum up to `execution_count`."""


@dataclass(slots=True)
class Counts:
    """The totals of one model in one version. Times are measured where the service stands."""

    success: Histogram = field(default_factory=lambda: Histogram(DURATION_BOUNDS_NS))
    """Whole requests, from received to answered, in nanoseconds."""
    fail: Total = field(default_factory=Total)
    statuses: dict[str, int] = field(default_factory=dict)
    """The failed ones by the name of their gRPC status."""
    infer: Total = field(default_factory=Total)
    """The backend's part of the successful ones: its queues, its network and its engine together."""
    last_unix_ms: int = 0


class Stopwatch:
    """One request being timed, from entering to leaving ``with``."""

    __slots__ = ("_deadline", "_infer_ns", "_model", "_started", "_statistics", "version")

    def __init__(self, statistics: "Statistics", deadline: Deadline) -> None:
        self._statistics = statistics
        self._deadline = deadline
        self._model, self.version = OTHER
        """The version that it counts for."""
        self._infer_ns = 0

    def asks(self, metadata: ModelMetadata) -> None:
        """It is a request for the model with this `metadata`."""
        self._model = metadata.name
        self.version = metadata.versions[-1] if metadata.versions else ""

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
        if error is not None:
            status = _status(error, self._deadline)
            counts.fail.add(taken)
            counts.statuses[status] = counts.statuses.get(status, 0) + 1
            return
        counts.success.add(taken)
        counts.infer.add(self._infer_ns)
        counts.last_unix_ms = time.time_ns() // 1_000_000


class Statistics:
    """Counts by (model, version), for the models that the backend knows, and for all others together."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Counts] = {OTHER: Counts()}

    def request(self, deadline: Deadline) -> Stopwatch:
        """What times a request whose caller waits until `deadline`, and counts it."""
        return Stopwatch(self, deadline)

    def message(self, model: str, version: str, batches: BatchCounts | None = None) -> oip_pb2.ModelStatistics:
        """The statistics of one model and version, zeros if nothing has happened; with what ran of it, where known.

        Without `batches`, each request is taken to be one run, and what the backend took is its inference.
        """
        counts = self._counts.get((model, version), Counts())
        success = oip_pb2.StatisticDuration(count=counts.success.count, ns=int(counts.success.sum))
        statistics = oip_pb2.ModelStatistics(
            name=model,
            version=version,
            last_inference=counts.last_unix_ms,
            inference_count=success.count,
            execution_count=success.count,
            inference_stats=oip_pb2.InferStatistics(success=success, fail=_duration(counts.fail)),
        )
        if batches is None:  # every part has happened as often: perf_analyzer holds the counts against each other
            none = oip_pb2.StatisticDuration(count=counts.infer.count)
            statistics.inference_stats.MergeFrom(
                oip_pb2.InferStatistics(
                    queue=none, compute_input=none, compute_infer=_duration(counts.infer), compute_output=none
                )
            )
            return statistics
        statistics.inference_count = batches.rows
        statistics.execution_count = sum(run.infer.count for run in batches.executions.values())
        statistics.inference_stats.queue.CopyFrom(_duration(batches.queue))
        statistics.inference_stats.MergeFrom(oip_pb2.InferStatistics(**_durations(batches.requests)))
        statistics.batch_stats.extend(
            oip_pb2.InferBatchStatistics(batch_size=size, **_durations(run))
            for size, run in sorted(batches.executions.items())
        )
        return statistics

    def counted(self) -> set[tuple[str, str]]:
        """The models and versions that something was counted for."""
        return self._counts.keys() - {OTHER}

    def items(self) -> Iterator[tuple[tuple[str, str], Counts]]:
        """All that was counted, `OTHER` among it."""
        yield from self._counts.items()

    def of(self, model: str, version: str) -> Counts:
        """The counts of one model and version, or those of `OTHER` if there are too many."""
        counts = self._counts.get((model, version))
        if counts is None:
            if len(self._counts) > MAX_COUNTED:
                return self._counts[OTHER]
            counts = self._counts[model, version] = Counts()
        return counts


@dataclass(slots=True)
class ReleaseCounts:
    """What a router did with the requests for one model in which one release of the device took part."""

    answers: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """By tier, outcome and reason (`hedgerow.router`)."""
    escalations: int = 0
    """Requests that went to the cloud with an answer of the edge in hand."""
    confidence: Histogram = field(default_factory=lambda: Histogram(CONFIDENCE_BOUNDS))
    """How sure the edge's answers were."""
    threshold: float | None = None
    """What the last of them was held against."""

    def answered(self, tier: str, outcome: str, reason: str) -> None:
        """Count a request that is done."""
        key = tier, outcome, reason
        self.answers[key] = self.answers.get(key, 0) + 1

    def judged(self, confidence: float, threshold: float) -> None:
        """Count an answer that a gate has judged."""
        self.confidence.add(confidence)
        self.threshold = threshold


class RouteCounts:
    """The counts of one model's route, by release; "" stands for none."""

    __slots__ = ("_releases",)

    def __init__(self) -> None:
        self._releases: dict[str, ReleaseCounts] = {}

    @property
    def releases(self) -> Mapping[str, ReleaseCounts]:
        """What was counted, of the last releases."""
        return self._releases

    def of(self, release: str) -> ReleaseCounts:
        """The counts of one release."""
        counts = self._releases.get(release)
        if counts is None:
            if len(self._releases) >= MAX_RELEASES:
                del self._releases[next(iter(self._releases))]
            counts = self._releases[release] = ReleaseCounts()
        return counts


@dataclass(slots=True)
class RemoteCounts:
    """What asking a remote took."""

    requests: int = 0
    """Requests for inference that were taken on; each may be sent more than once."""
    retries: int = 0
    hedges: int = 0
    sent_bytes: int = 0
    """Of the messages of requests, without what HTTP/2 and TLS add."""
    received_bytes: int = 0
    """Of the messages of answers."""


def _status(error: BaseException, deadline: Deadline) -> str:
    """The name of the gRPC status that the caller gets for `error`."""
    if isinstance(error, asyncio.CancelledError):  # the caller has left, or the transport has seen its time pass
        return DeadlineExceeded.status.name if deadline.expired else "CANCELLED"
    return (error.status if isinstance(error, HedgerowError) else HedgerowError.status).name


def _duration(total: Total) -> oip_pb2.StatisticDuration:
    return oip_pb2.StatisticDuration(count=total.count, ns=total.ns)


def _durations(compute: Compute) -> dict[str, oip_pb2.StatisticDuration]:
    return {
        "compute_input": _duration(compute.input),
        "compute_infer": _duration(compute.infer),
        "compute_output": _duration(compute.output),
    }
