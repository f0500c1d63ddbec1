"""Metrics of what stands around a router: the cache, splits, shadows and quotas. See `hedgerow.telemetry.metrics`.

Of tenants, only those are told apart that the settings name, so that no caller makes a label.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hedgerow.cache import CachedBackend
from hedgerow.traffic.quotas import OTHERS, Quotas
from hedgerow.traffic.shadow import Mirror
from hedgerow.traffic.split import ModelSplit

OTHER_TENANTS: Final = "(others)"
"""Label of all tenants without a name in the settings; none of those can be called so."""


def of_cache(cache: CachedBackend | None) -> Iterator[Metric]:
    """Answers that were kept, and what that saved."""
    requests = CounterMetricFamily(
        "hedgerow_cache_requests", "Requests that were looked up in the cache.", labels=("model", "result")
    )
    size = GaugeMetricFamily("hedgerow_cache_bytes", "Bytes that the kept answers take.")
    entries = GaugeMetricFamily("hedgerow_cache_entries", "Answers that are kept.")
    left = CounterMetricFamily("hedgerow_cache_evictions", "Answers that are kept no longer.", labels=("reason",))
    if cache is not None:
        for model, counts in cache.counts.items():
            requests.add_metric((model, "hit"), counts.hits)
            requests.add_metric((model, "miss"), counts.misses)
            requests.add_metric((model, "shared"), counts.shared)
        size.add_metric((), cache.kept.bytes)
        entries.add_metric((), len(cache.kept))
        left.add_metric(("room",), cache.kept.evictions)
        left.add_metric(("age",), cache.kept.expired)
    yield from (requests, size, entries, left)


def of_splits(splits: Mapping[str, ModelSplit]) -> Iterator[Metric]:
    """Who has answered of those that share a model's requests; `splits` by model."""
    labels = ("model", "target")
    requests = CounterMetricFamily(
        "hedgerow_split_requests", "Requests that were a target's to answer.", labels=(*labels, "result")
    )
    weight = GaugeMetricFamily("hedgerow_split_weight", "What its share is in proportion to.", labels=labels)
    for model, split in splits.items():
        for target, counts in split.counts.items():
            requests.add_metric((model, target, "answered"), counts.answered)
            requests.add_metric((model, target, "failed"), counts.failed)
            requests.add_metric((model, target, "passed_over"), counts.passed_over)
        for target, value in split.weights.items():
            weight.add_metric((model, target), value)
    yield from (requests, weight)


def of_shadows(mirrors: Mapping[str, Mirror]) -> Iterator[Metric]:
    """How candidates do beside those who answer; `mirrors` by model."""
    requests = CounterMetricFamily(
        "hedgerow_shadow_requests", "Requests that a candidate was to see.", labels=("model", "result")
    )
    furthest = GaugeMetricFamily(
        "hedgerow_shadow_difference_max", "The largest difference of two numbers so far.", labels=("model",)
    )
    latency = GaugeMetricFamily(
        "hedgerow_shadow_latency_seconds",
        "Quantiles of the latency of late, of the requests that were sampled.",
        labels=("model", "side", "quantile"),
    )
    for model, mirror in mirrors.items():
        counts = mirror.counts
        requests.add_metric((model, "agreed"), counts.agreed)
        requests.add_metric((model, "differed"), counts.differed)
        requests.add_metric((model, "failed"), counts.failed.total())
        requests.add_metric((model, "dropped"), counts.dropped)
        requests.add_metric((model, "private"), counts.private)
        furthest.add_metric((model,), counts.furthest)
        for side, window in (("current", counts.current), ("candidate", counts.candidate)):
            for quantile in (0.5, 0.95):
                if (seconds := window.quantile(quantile)) is not None:
                    latency.add_metric((model, side, str(quantile)), seconds)
    yield from (requests, furthest, latency)


def of_quotas(quotas: Quotas | None) -> Iterator[Metric]:
    """Who keeps to what it may ask for."""
    requests = CounterMetricFamily(
        "hedgerow_quota_requests", "Requests, by what the tenant's quota said.", labels=("tenant", "result")
    )
    tracked = GaugeMetricFamily("hedgerow_quota_tracked", "Tenants without a name that are told apart now.")
    if quotas is not None:
        for tenant, counts in quotas.counts.items():
            name = OTHER_TENANTS if tenant == OTHERS else tenant
            requests.add_metric((name, "admitted"), counts.admitted)
            requests.add_metric((name, "refused"), counts.refused)
        tracked.add_metric((), quotas.tracked)
    yield from (requests, tracked)
