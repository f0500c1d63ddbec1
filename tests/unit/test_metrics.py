"""What is counted, and its form for Prometheus: nobody else can make it grow, and what is written about it is true."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import DeadlineExceeded, InvalidInput, Overloaded
from hedgerow.host.model_host import ModelHost
from hedgerow.processes import pages
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.statistics import MAX_COUNTED, MAX_RELEASES, OTHER, Histogram, RouteCounts, Statistics
from hedgerow.telemetry import metrics
from hedgerow.tensors import ModelMetadata
from hedgerow_edge.front import Front
from hedgerow_edge.metrics import DeviceMetrics
from hedgerow_edge.settings import AgentSettings

RUNTIME = Path(__file__).parents[2] / "runtime"
OF_THE_PROCESS = "process_"
NONE = "\N{EN DASH}"
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum")}


class NoInstalls:
    def status(self) -> list[object]:
        return []


def metadata(name: str, version: str = "1") -> ModelMetadata:
    return ModelMetadata(name, (version,), "python", (), ())


@pytest.fixture
async def families() -> list[Metric]:
    """All of them, over parts in which nothing has happened yet."""
    router, host = Router({}), ModelHost()
    device = DeviceMetrics(NoInstalls(), None)  # type: ignore[arg-type]
    everything = metrics.Metrics(
        lambda: metrics.of_server(Server(router, ServerSettings())),
        lambda: metrics.of_router(router),
        lambda: metrics.of_host(host, ()),
        lambda: metrics.of_remotes(()),
        Front(AgentSettings(), host).metrics,
        lambda: pages.of_processes([0], ()),
        device,
    )
    found = list(everything.collect())
    await host.close()
    return found


def exported(families: list[Metric]) -> dict[str, Metric]:
    return {family.name + ("_total" if family.type == "counter" else ""): family for family in families}


def series(families: list[Metric]) -> set[str]:
    """The names under which values can be asked for."""
    return {name + suffix for name, family in exported(families).items() for suffix in SUFFIXES.get(family.type, ("",))}


@given(st.lists(st.floats(0, 1), max_size=50))
def test_a_histogram_holds_each_value_in_the_bucket_that_its_bound_names(values: list[float]) -> None:
    histogram = Histogram((0.25, 0.5, 0.75))
    for value in values:
        histogram.add(value)
    assert histogram.count == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    buckets, _ = metrics._cumulative(histogram, 1)
    for bound, count in buckets[:-1]:
        assert count == sum(value <= float(bound) for value in values)
    assert buckets[-1] == ("+Inf", len(values))


def test_a_server_that_makes_up_versions_cannot_make_the_counts_grow() -> None:
    statistics = Statistics()
    for number in range(2 * MAX_COUNTED):
        with statistics.request(Deadline.never()) as watch:
            watch.asks(metadata("m"))
            watch.answered(f"made-up-{number}", 1)
    counted = dict(statistics.items())
    assert len(counted) == MAX_COUNTED + 1
    assert sum(counts.success.count for counts in counted.values()) == 2 * MAX_COUNTED


def test_a_device_that_takes_a_release_a_day_keeps_only_the_last_ones() -> None:
    counts = RouteCounts()
    for release in range(3 * MAX_RELEASES):
        counts.of(str(release)).answered("edge", "confident", "")
    assert list(counts.releases) == [str(release) for release in range(2 * MAX_RELEASES, 3 * MAX_RELEASES)]


@pytest.mark.parametrize(
    ("error", "deadline", "status"),
    [
        (InvalidInput(""), Deadline.never(), "INVALID_ARGUMENT"),
        (Overloaded(""), Deadline.never(), "RESOURCE_EXHAUSTED"),
        (DeadlineExceeded(""), Deadline.never(), "DEADLINE_EXCEEDED"),
        (ZeroDivisionError(), Deadline.never(), "INTERNAL"),
        (asyncio.CancelledError(), Deadline.never(), "CANCELLED"),
        (asyncio.CancelledError(), Deadline.after(0), "DEADLINE_EXCEEDED"),
    ],
)
def test_a_failure_counts_under_the_status_that_the_caller_got(
    error: BaseException, deadline: Deadline, status: str
) -> None:
    statistics = Statistics()

    def request() -> None:
        with statistics.request(deadline) as watch:
            watch.asks(metadata("m"))
            raise error

    with pytest.raises(type(error)):
        request()
    assert statistics.of("m", "1").statuses == {status: 1}
    assert statistics.of(*OTHER).statuses == {}


def test_what_is_counted_for_no_model_is_not_listed_as_one() -> None:
    statistics = Statistics()
    with pytest.raises(Overloaded), statistics.request(Deadline.never()):
        raise Overloaded("full")
    assert statistics.counted() == set()
    assert statistics.of(*OTHER).statuses == {"RESOURCE_EXHAUSTED": 1}


def rows(text: str) -> Iterator[tuple[str, ...]]:
    for line in text.splitlines():
        if line.startswith("| `"):
            yield tuple(cell.strip() for cell in line.strip("|").split("|"))


def test_the_table_of_metrics_says_what_is_exported(families: list[Metric]) -> None:
    written = set(rows((RUNTIME / "METRICS.md").read_text(encoding="utf-8")))
    assert written == {
        (f"`{name}`", family.type, ", ".join(family._labelnames) or NONE, family.documentation)  # type: ignore[attr-defined]
        for name, family in exported(families).items()
        if not name.startswith(OF_THE_PROCESS)
    }


def test_every_metric_on_the_dashboard_exists(families: list[Metric]) -> None:
    dashboard = json.loads((RUNTIME / "grafana" / "hedgerow.json").read_text(encoding="utf-8"))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if "query" in variable["query"]
    ]
    asked = {name for query in queries for name in re.findall(r"\b(?:hedgerow|process)_\w+", query)}
    assert len(asked) > 15
    assert asked <= series(families)


def test_the_dashboard_has_no_panel_without_a_query_or_twice_the_same_place() -> None:
    dashboard = json.loads((RUNTIME / "grafana" / "hedgerow.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] for panel in panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_names_follow_prometheus_conventions(families: list[Metric]) -> None:
    for name, family in exported(families).items():
        assert re.fullmatch(r"(hedgerow|process)_[a-z_]+", name)
        assert (family.type == "counter") == name.endswith("_total")
        assert family.documentation


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "text/plain;version=0.0.4",
        "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2",
        "application/openmetrics-text;version=nonsense",
        "text/plain;version=;;=,,",
    ],
)
def test_whatever_a_scraper_says_it_takes_it_gets_metrics(accept: str) -> None:
    body, kind = metrics.Metrics().page(accept)
    assert kind.split(";")[0] in {"text/plain", "application/openmetrics-text"}
    assert "hedgerow_build_info" in body.decode()
    if kind.startswith("text/plain"):
        assert "hedgerow_build_info" in {family.name for family in text_string_to_metric_families(body.decode())}
