"""One page of metrics for several processes: what each has counted, told apart by the label `process`."""

from collections.abc import Container, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from hedgerow.processes.supervisor import Supervisor
from hedgerow.telemetry.diagnostics import Page
from hedgerow.telemetry.metrics import Metrics

LABEL = "process"
SUPERVISOR = "supervisor"
"""The label of the process that looks after the others; theirs are numbers, from 1 on, which restarts keep."""


class SupervisedMetrics(Metrics):
    """The metrics of a supervisor and its processes."""

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__()
        self._supervisor = supervisor
        self._own = Metrics()
        self._families: Sequence[Metric] = ()

    async def metrics(self, accept: str) -> Page:
        """The page for ``/metrics``. A process that does not answer at once is not on it."""
        reports = await self._supervisor.reports()
        pages = {SUPERVISOR: self._own.page()[0]} | {
            str(slot + 1): report.metrics for slot, report in sorted(reports.items())
        }
        self._families = (*of_processes(self._supervisor.restarted, reports), *merged(pages))
        return Page(*self.page(accept))

    def collect(self) -> Iterator[Metric]:
        """See `Metrics`: what was found when the page was asked for."""
        yield from self._families

    async def ready(self) -> bool:
        """Whether all have come to serve, and one of those that do now is ready."""
        return self._supervisor.serving.is_set() and any(
            report.ready for report in (await self._supervisor.reports()).values()
        )


def merged(pages: Mapping[str, bytes]) -> Sequence[Metric]:
    """The metrics of `pages`, each in Prometheus' text form, with the label `process` that says which it is from."""
    families: dict[str, Metric] = {}
    for process, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            one = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            one.samples += [sample._replace(labels={LABEL: process, **sample.labels}) for sample in family.samples]
    return tuple(families.values())


def of_processes(restarted: Sequence[int], up: Container[int]) -> Iterator[Metric]:
    """The processes themselves, by their place: how often each was started again, and which of them serve."""
    serves = GaugeMetricFamily("hedgerow_process_up", "1 while the process serves and says so.", labels=(LABEL,))
    restarts = CounterMetricFamily(
        "hedgerow_process_restarts", "How often the process was started again.", labels=(LABEL,)
    )
    for slot, count in enumerate(restarted):
        serves.add_metric((str(slot + 1),), int(slot in up))
        restarts.add_metric((str(slot + 1),), count)
    yield from (serves, restarts)
