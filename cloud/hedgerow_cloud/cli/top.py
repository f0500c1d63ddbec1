"""`hedgerow top`: what devices do right now, from two readings of their metrics.

The arithmetic is pure: `report` turns two readings into facts. Reading and drawing stand around it.
"""

import http.client
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hedgerow.errors import Unavailable
from hedgerow_cloud.cli.console import printable, size, table

DEFAULT = "127.0.0.1:9464"
TIMEOUT_S = 3.0
MAX_PAGE_BYTES = 16 * 2**20
MAX_READERS = 16
"""Devices that are read at the same time."""
QUANTILES = {"p50_s": 0.5, "p95_s": 0.95, "p99_s": 0.99}
MODEL_COLUMNS = (
    *("device", "model", "version", "state", "req/s", "failed", "p50", "p95", "p99"),
    *("edge", "degraded", "queue", "in flight", "rows/run"),
)
REMOTE_COLUMNS = ("device", "remote", "state", "req/s", "in flight", "p50", "p95", "retries/s", "hedges/s", "sent/s")

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reading:
    """The metrics of a device at one moment (monotonic seconds)."""

    at: float
    samples: Mapping[str, Sequence[tuple[Labels, float]]]

    def sum(self, name: str, **labels: str) -> float:
        """Of all values under `name` that have these labels."""
        return sum(value for _, value in self.where(name, **labels))

    def where(self, name: str, **labels: str) -> Iterable[tuple[Labels, float]]:
        """The values under `name` that have these labels."""
        return ((own, value) for own, value in self.samples.get(name, ()) if labels.items() <= own.items())


@dataclass(frozen=True, slots=True)
class Model:
    """A model on a device. Rates are per second, shares of the answers in [0, 1]; None: nothing to tell from."""

    model: str
    version: str
    state: str
    requests_per_s: float
    failed_share: float | None
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    edge_share: float | None
    degraded_share: float | None
    queue: int
    inflight: int
    rows_per_run: float | None


@dataclass(frozen=True, slots=True)
class Remote:
    """A device's way to another server. Rates are per second."""

    remote: str
    up: bool
    requests_per_s: float
    inflight: int
    p50_s: float | None
    p95_s: float | None
    retries_per_s: float
    hedges_per_s: float
    sent_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Device:
    """What one device does; or, in words, why that is not known."""

    address: str
    error: str = ""
    models: Sequence[Model] = field(default_factory=tuple)
    remotes: Sequence[Remote] = field(default_factory=tuple)


def read(address: str) -> Reading:
    """The metrics at "host:port"; raises `Unavailable`."""
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics", headers={"Accept": "text/plain"})
        response = connection.getresponse()
        page = response.read(MAX_PAGE_BYTES)
        if response.status != http.HTTPStatus.OK:
            raise Unavailable(f"there are no metrics at {address}: {response.status} {response.reason}")
        return parse(page.decode(), time.monotonic())
    except OSError as error:
        raise Unavailable(f"nothing answers at {address}: {error.strerror or error}") from error
    except (http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"what answers at {address} gives no metrics") from error
    finally:
        connection.close()


def parse(page: str, at: float) -> Reading:
    """The reading in `page`, of the moment `at`; raises `ValueError`."""
    samples: dict[str, list[tuple[Labels, float]]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return Reading(at, samples)


def report(address: str, before: Reading, after: Reading) -> Device:
    """What the device at `address` did between two readings, and how it stands at the second."""
    since = _Since(before, after)
    names = {labels["model"] for labels, _ in after.where("hedgerow_model_info")}
    names |= {labels["model"] for labels, _ in after.where("hedgerow_answers_total")}
    remotes = {labels["remote"] for labels, _ in after.where("hedgerow_remote_up")}
    return Device(
        address,
        models=tuple(_model(since, name) for name in sorted(names)),
        remotes=tuple(_remote(since, name) for name in sorted(remotes)),
    )


def quantile(buckets: Iterable[tuple[float, float]], q: float) -> float | None:
    """The quantile `q` of a histogram given as (upper bound, count up to it), as Prometheus estimates it.

    None of an empty one; the highest finite bound for what lies above it.
    """
    below, floor = 0.0, 0.0
    ordered = sorted(buckets)
    rank = q * (ordered[-1][1] if ordered else 0.0)
    if not rank:
        return None
    for bound, count in ordered:
        if count >= rank:
            return floor if math.isinf(bound) else floor + (bound - floor) * (rank - below) / (count - below)
        below, floor = count, bound
    return floor


class Watch:
    """Devices, looked at again and again."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._before: dict[str, Reading] = {}

    def look(self) -> list[Device]:
        """What became of each device since the last look; of those not seen before, since they were started."""
        with ThreadPoolExecutor(min(MAX_READERS, len(self._addresses))) as readers:
            return list(readers.map(self._look_at, self._addresses))

    def _look_at(self, address: str) -> Device:
        try:
            after = read(address)
        except Unavailable as error:
            self._before.pop(address, None)
            return Device(address, error=str(error))
        before = self._before.get(address) or Reading(_started(after), {})
        self._before[address] = after
        return report(address, before, after)


def once(addresses: Sequence[str], interval_s: float) -> list[Device]:
    """What the devices do within `interval_s`; raises `Unavailable` if none can be read."""
    watch = Watch(addresses)
    watch.look()
    time.sleep(interval_s)  # what is shown is what happened meanwhile
    devices = watch.look()
    if all(device.error for device in devices):
        raise Unavailable("; ".join(device.error for device in devices))
    return devices


def follow(addresses: Sequence[str], interval_s: float) -> None:
    """Draw the devices on the terminal, anew every `interval_s`, until Ctrl-C."""
    watch = Watch(addresses)
    with Live(screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(_picture(watch.look(), interval_s), refresh=True)
                time.sleep(interval_s)  # between two pictures
        except KeyboardInterrupt:
            return


def show(devices: Sequence[Device]) -> None:
    """Print the devices once."""
    table(MODEL_COLUMNS, _model_rows(devices))
    if remotes := _remote_rows(devices):
        print()
        table(REMOTE_COLUMNS, remotes)
    for error in _errors(devices):
        print(printable(error))


class _Since:
    """What counters have gained between two readings."""

    def __init__(self, before: Reading, after: Reading) -> None:
        self._before = before
        self.after = after
        self.seconds = max(after.at - before.at, 1e-3)

    def gain(self, name: str, **labels: str) -> float:
        """Of all counters under `name` with these labels; one that fell has begun anew."""
        old = {tuple(own.items()): value for own, value in self._before.where(name, **labels)}
        return sum(_gain(old.get(tuple(own.items()), 0.0), value) for own, value in self.after.where(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """`gain` a second."""
        return self.gain(name, **labels) / self.seconds

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float]]:
        """A histogram's gains, by upper bound."""
        bounds = {own["le"] for own, _ in self.after.where(f"{name}_bucket", **labels)}
        return [(float(bound), self.gain(f"{name}_bucket", le=bound, **labels)) for bound in bounds]


def _model(since: _Since, name: str) -> Model:
    after = since.after
    loaded = [labels["version"] for labels, _ in after.where("hedgerow_model_info", model=name)]
    requests = since.gain("hedgerow_requests_total", model=name)
    answers = since.gain("hedgerow_answers_total", model=name)
    degraded = since.gain("hedgerow_answers_total", model=name, outcome="degraded")
    edge = since.gain("hedgerow_answers_total", model=name, tier="edge")
    edge -= since.gain("hedgerow_answers_total", model=name, tier="edge", outcome="degraded")
    buckets = since.buckets("hedgerow_request_duration_seconds", model=name)
    ready = after.sum("hedgerow_model_ready", model=name) > 0
    return Model(
        model=name,
        version=", ".join(loaded),
        state="ready" if ready else "hangs" if loaded else "not loaded",
        requests_per_s=requests / since.seconds,
        failed_share=_share(requests - since.gain("hedgerow_requests_total", model=name, status="OK"), requests),
        **{key: quantile(buckets, q) for key, q in QUANTILES.items()},
        edge_share=_share(edge, answers),
        degraded_share=_share(degraded, answers),
        queue=int(after.sum("hedgerow_queue_length", model=name)),
        inflight=int(after.sum("hedgerow_model_inflight", model=name)),
        rows_per_run=_share(
            since.gain("hedgerow_batch_rows_sum", model=name), since.gain("hedgerow_batch_rows_count", model=name)
        ),
    )


def _remote(since: _Since, name: str) -> Remote:
    after = since.after
    latency = {own["quantile"]: value for own, value in after.where("hedgerow_remote_latency_seconds", remote=name)}
    return Remote(
        remote=name,
        up=after.sum("hedgerow_remote_up", remote=name) > 0,
        requests_per_s=since.rate("hedgerow_remote_requests_total", remote=name),
        inflight=int(after.sum("hedgerow_remote_inflight", remote=name)),
        p50_s=latency.get("0.5"),
        p95_s=latency.get("0.95"),
        retries_per_s=since.rate("hedgerow_remote_retries_total", remote=name),
        hedges_per_s=since.rate("hedgerow_remote_hedges_total", remote=name),
        sent_bytes_per_s=since.rate("hedgerow_remote_sent_bytes_total", remote=name),
    )


def _started(reading: Reading) -> float:
    """When the device's process began, on our monotonic clock."""
    began_unix_s = reading.sum("process_start_time_seconds")
    return reading.at - max(0.0, time.time() - began_unix_s) if began_unix_s else reading.at


def _gain(before: float, after: float) -> float:
    return after - before if after >= before else after


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _picture(devices: Sequence[Device], interval_s: float) -> RenderableType:
    parts: list[RenderableType] = [Text(f"hedgerow top, every {interval_s:g} s; Ctrl-C ends it\n", style="dim")]
    for columns, rows in ((MODEL_COLUMNS, _model_rows(devices)), (REMOTE_COLUMNS, _remote_rows(devices))):
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in columns:
            drawn.add_column(column, no_wrap=True)
        for row in rows:
            drawn.add_row(*(_coloured(printable(cell)) for cell in row))
        parts += [drawn, Text()]
    return Group(*parts, *(Text(printable(error), style="red") for error in _errors(devices)))


def _coloured(cell: str) -> Text:
    return Text(cell, style={"ready": "green", "up": "green", "hangs": "red", "circuit open": "red"}.get(cell, ""))


def _errors(devices: Sequence[Device]) -> list[str]:
    return [device.error for device in devices if device.error]


def _model_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    return [
        (
            device.address,
            one.model,
            one.version or "-",
            one.state,
            f"{one.requests_per_s:.1f}",
            *(_percent(one.failed_share), _time(one.p50_s), _time(one.p95_s), _time(one.p99_s)),
            *(_percent(one.edge_share), _percent(one.degraded_share)),
            *(str(one.queue), str(one.inflight)),
            "-" if one.rows_per_run is None else f"{one.rows_per_run:.1f}",
        )
        for device in devices
        for one in device.models
    ]


def _remote_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    return [
        (
            device.address,
            one.remote,
            "up" if one.up else "circuit open",
            f"{one.requests_per_s:.1f}",
            str(one.inflight),
            *(_time(one.p50_s), _time(one.p95_s)),
            *(f"{one.retries_per_s:.1f}", f"{one.hedges_per_s:.1f}"),
            size(round(one.sent_bytes_per_s)),
        )
        for device in devices
        for one in device.remotes
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"
