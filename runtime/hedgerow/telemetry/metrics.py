"""Metrics in Prometheus' form, read off what is counted anyway at the moment when somebody asks.

A request costs integer additions (`hedgerow.statistics`) and nothing else; each function here gives the metrics of one
part of the runtime. Names and labels are in ``runtime/METRICS.md``, which a test holds against this. Label values are
names of models, releases, remotes and addresses that the operator has set up, and words of ours; no caller can make
one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder

from hedgerow import __version__
from hedgerow.backend import Backend
from hedgerow.host.model_host import ModelHost
from hedgerow.http2.shedding import Shedding
from hedgerow.lifecycle import InFlight
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.statistics import OTHER, BatchCounts, Histogram, RemoteCounts

OTHER_MODEL: Final = "(other)"
"""Label of what is counted for no model in particular; no model can be called so."""
BATCH_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows."""

Source = Callable[[], Iterable[Metric]]
"""Gives metrics as they are now, from memory, on the event loop."""


@runtime_checkable
class _CountsConnections(Protocol):
    """What a transport may tell of itself."""

    connections: set[object]
    calls: InFlight
    shedding: Shedding


@runtime_checkable
class _CountsCalls(Protocol):
    """What a remote may tell of itself."""

    counts: RemoteCounts

    @property
    def limit(self) -> int:
        """Requests that may be in flight."""
        ...

    def endpoint_states(self) -> Mapping[str, int]:
        """How many endpoints are in each state."""
        ...


class Metrics:
    """All metrics of this process, by `sources`. Belongs to the event loop on which the sources' facts change."""

    def __init__(self, *sources: Source) -> None:
        self._sources = [_build, ProcessCollector(registry=None).collect, *sources]

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's `Collector`."""
        for source in self._sources:
            yield from source()

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics as text, and its content type, in the form that a caller with this Accept header likes best."""
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # it names a version that is none
            encode, kind = choose_encoder("")
        return encode(self), kind


def of_server(server: Server) -> Iterator[Metric]:
    """What callers got, as the service sees it."""
    requests = CounterMetricFamily(
        "hedgerow_requests", "Requests for inference, by gRPC status.", labels=("model", "version", "status")
    )
    duration = HistogramMetricFamily(
        "hedgerow_request_duration_seconds",
        "Time of answered requests, from received to answered.",
        labels=("model", "version"),
    )
    for key, counts in server.service.statistics.items():
        labels = (OTHER_MODEL, "") if key == OTHER else key
        answered = counts.success.count
        if answered or key != OTHER:
            requests.add_metric((*labels, "OK"), answered)
        for status, count in counts.statuses.items():
            requests.add_metric((*labels, status), count)
        if answered:
            duration.add_metric(labels, *_cumulative(counts.success, 1e-9))
    yield requests
    yield duration
    yield _gauge("hedgerow_requests_inflight", "Requests being worked on.", server.service.inflight.count)
    yield _gauge("hedgerow_draining", "1 while the server is shutting down.", int(server.service.draining))
    connections = GaugeMetricFamily("hedgerow_connections", "Open connections of callers.")
    calls = GaugeMetricFamily("hedgerow_calls", "Open calls of any kind.")
    shed = CounterMetricFamily(
        "hedgerow_calls_shed",
        "Calls refused as they opened, because the loop was too late for their deadlines; nothing else counts them.",
    )
    if isinstance(server.listener, _CountsConnections):
        connections.add_metric((), len(server.listener.connections))
        calls.add_metric((), server.listener.calls.count)
        shed.add_metric((), server.listener.shedding.refused)
    yield connections
    yield calls
    yield shed


def of_router(router: Router) -> Iterator[Metric]:
    """Who answered and why, and what the gates judged."""
    answers = CounterMetricFamily(
        "hedgerow_answers",
        "Requests by the tier that answered, how the answer came about, and what kept a better one away.",
        labels=("model", "release", "tier", "outcome", "reason"),
    )
    escalations = CounterMetricFamily(
        "hedgerow_escalations",
        "Requests sent to the cloud with an answer of the edge in hand.",
        labels=("model", "release"),
    )
    confidence = HistogramMetricFamily(
        "hedgerow_gate_confidence", "How sure the edge's answers were, as gates judged.", labels=("model", "release")
    )
    threshold = GaugeMetricFamily(
        "hedgerow_gate_threshold", "The confidence that the gate asks for.", labels=("model", "release")
    )
    for model, route in router.counts.items():
        for release, counts in route.releases.items():
            for key, count in counts.answers.items():
                answers.add_metric((model, release, *key), count)
            escalations.add_metric((model, release), counts.escalations)
            if counts.threshold is not None:
                confidence.add_metric((model, release), *_cumulative(counts.confidence, 1))
                threshold.add_metric((model, release), counts.threshold)
    yield from (answers, escalations, confidence, threshold)


def of_host(host: ModelHost, models: Iterable[str]) -> Iterator[Metric]:
    """Those of `models` that are loaded on this machine: their queues, batches and engines."""
    labels = ("model", "version")
    info = GaugeMetricFamily(
        "hedgerow_model_info", "1 for each model that is loaded.", labels=(*labels, "engine", "precision")
    )
    ready = GaugeMetricFamily("hedgerow_model_ready", "Whether the model answers; 0 while it hangs.", labels=labels)
    queue = GaugeMetricFamily("hedgerow_queue_length", "Requests that wait for the model.", labels=labels)
    inflight = GaugeMetricFamily("hedgerow_model_inflight", "Requests that wait for the model or run.", labels=labels)
    hung = GaugeMetricFamily("hedgerow_model_hung_instances", "Instances of the model that hang.", labels=labels)
    faults = CounterMetricFamily(
        "hedgerow_model_faults",
        "Requests on which the model crashed, hung or answered with nonsense.",
        labels=labels,
    )
    waited = SummaryMetricFamily("hedgerow_queue_wait_seconds", "Time that requests waited.", labels=labels)
    ran = SummaryMetricFamily("hedgerow_engine_run_seconds", "Time of the engine's runs.", labels=labels)
    rows = HistogramMetricFamily("hedgerow_batch_rows", "Rows of the engine's runs, padding included.", labels=labels)
    for staged in filter(None, map(host.serving, models)):
        batcher, properties = staged.batcher, staged.metadata.properties
        key = staged.file.model, staged.file.version
        info.add_metric((*key, properties.get("engine", ""), properties.get("precision", "")), 1)
        ready.add_metric(key, int(not batcher.stuck))
        queue.add_metric(key, batcher.waiting)
        inflight.add_metric(key, batcher.inflight)
        hung.add_metric(key, batcher.hung)
        faults.add_metric(key, batcher.faults)
        waited.add_metric(key, batcher.counts.queue.count, batcher.counts.queue.ns / 1e9)
        runs = [compute.infer for compute in batcher.counts.executions.values()]
        ran.add_metric(key, sum(run.count for run in runs), sum(run.ns for run in runs) / 1e9)
        rows.add_metric(key, *_cumulative(_batch_rows(batcher.counts), 1))
    yield from (info, ready, queue, inflight, hung, faults, waited, ran, rows)
    yield _gauge("hedgerow_models_memory_bytes", "Memory that the open models are taken to need.", host.memory_bytes)
    yield _gauge("hedgerow_models_left_running", "Models that were let go and still run something.", host.left_running)
    yield _gauge("hedgerow_models_hung_loads", "Models that hang in being loaded or closed.", host.hung_loads)


def of_remotes(remotes: Sequence[Backend]) -> Iterator[Metric]:
    """The ways to other servers."""
    labels = ("remote",)
    up = GaugeMetricFamily("hedgerow_remote_up", "1 while the remote can be asked; 0: circuit open.", labels=labels)
    inflight = GaugeMetricFamily("hedgerow_remote_inflight", "Requests that are with the remote.", labels=labels)
    latency = GaugeMetricFamily(
        "hedgerow_remote_latency_seconds", "Quantiles of its latency of late.", labels=(*labels, "quantile")
    )
    requests = CounterMetricFamily("hedgerow_remote_requests", "Requests that it was to answer.", labels=labels)
    retries = CounterMetricFamily("hedgerow_remote_retries", "Requests that were sent again.", labels=labels)
    hedges = CounterMetricFamily(
        "hedgerow_remote_hedges", "Requests sent to a second endpoint while the first was slow.", labels=labels
    )
    sent = CounterMetricFamily("hedgerow_remote_sent_bytes", "Bytes of requests to the remote.", labels=labels)
    received = CounterMetricFamily("hedgerow_remote_received_bytes", "Bytes of its answers.", labels=labels)
    limit = GaugeMetricFamily(
        "hedgerow_remote_limit",
        "Requests for its slowest model that it may have; by the pace of its answers.",
        labels=labels,
    )
    endpoints = GaugeMetricFamily(
        "hedgerow_remote_endpoints",
        "The remote's endpoints, by what keeps them from being asked.",
        labels=(*labels, "state"),
    )
    for remote in remotes:
        key, snapshot = (remote.name,), remote.snapshot("")
        up.add_metric(key, int(snapshot.healthy))
        inflight.add_metric(key, snapshot.inflight)
        for quantile, seconds in (("0.5", snapshot.latency_p50_s), ("0.95", snapshot.latency_p95_s)):
            if seconds is not None:
                latency.add_metric((*key, quantile), seconds)
        if isinstance(remote, _CountsCalls):
            requests.add_metric(key, remote.counts.requests)
            retries.add_metric(key, remote.counts.retries)
            hedges.add_metric(key, remote.counts.hedges)
            sent.add_metric(key, remote.counts.sent_bytes)
            received.add_metric(key, remote.counts.received_bytes)
            limit.add_metric(key, remote.limit)
            for state, count in remote.endpoint_states().items():
                endpoints.add_metric((*key, state), count)
    yield from (up, inflight, latency, requests, retries, hedges, sent, received, limit, endpoints)


def _build() -> Iterator[Metric]:
    info = GaugeMetricFamily("hedgerow_build_info", "1; the label says which Hedgerow this is.", labels=("version",))
    info.add_metric((__version__,), 1)
    yield info


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _cumulative(histogram: Histogram, unit: float) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus has them, each holding those below too, and the sum; values times `unit`."""
    below, buckets = 0, []
    for bound, count in zip((*histogram.bounds, None), histogram.buckets, strict=True):
        below += count
        buckets.append(("+Inf" if bound is None else f"{bound * unit:g}", float(below)))
    return buckets, histogram.sum * unit


def _batch_rows(counts: BatchCounts) -> Histogram:
    histogram = Histogram(BATCH_BOUNDS)
    for size, compute in counts.executions.items():
        histogram.add(size, compute.infer.count)
    return histogram
