"""The endpoint for large models before there is any Ray: how many processes, and what their pages come to together."""

import asyncio
import logging
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

from hedgerow.processes.pages import merged
from hedgerow_cloud.serving import endpoint, settings
from hedgerow_cloud.serving.settings import MAX_PROCESSES, ServeSettings


class Page:
    """What one process has counted."""

    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> tuple[Metric, ...]:
        return self._families


def counted(answers: float) -> bytes:
    requests = CounterMetricFamily("hedgerow_requests", "Requests.", labels=("model",))
    requests.add_metric(("digits",), answers)
    return generate_latest(Page(requests, GaugeMetricFamily("hedgerow_calls", "Calls.", value=1)))


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_pages_of_all_processes_make_one_that_can_be_read(openmetrics: bool) -> None:
    page = Page(*merged({"1": counted(3), "2": counted(4)}))
    if openmetrics:
        text = exposition.generate_latest(page).decode()  # type: ignore[no-untyped-call]
        families = list(parser.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    else:
        families = list(text_string_to_metric_families(generate_latest(page).decode()))
    assert [family.name for family in families] == ["hedgerow_requests", "hedgerow_calls"]
    assert [(sample.labels, sample.value) for sample in families[0].samples] == [
        ({"process": "1", "model": "digits"}, 3),
        ({"process": "2", "model": "digits"}, 4),
    ]


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (4, 1), (9, 2), (256, MAX_PROCESSES)])
def test_the_models_keep_most_of_the_cores(cores: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(settings, "SHARED", True)
    assert ServeSettings(models={}).fronts == processes
    assert ServeSettings(models={}, processes=3).fronts == 3


async def test_where_ports_cannot_be_shared_one_process_serves_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Reached(Exception):
        pass

    def no_ray() -> None:
        raise Reached

    for module in (endpoint, settings):
        monkeypatch.setattr(module, "SHARED", False)
    monkeypatch.setattr(endpoint, "local_ray", no_ray)
    monkeypatch.setattr(endpoint, "held", lambda *_: pytest.fail("a port was held"))
    (tmp_path / "large.onnx").touch()
    with caplog.at_level(logging.INFO), pytest.raises(Reached):
        await endpoint.serve(ServeSettings(models={"m": "large.onnx"}, processes=4), tmp_path, asyncio.Event())
    assert "one serves" in caplog.text
