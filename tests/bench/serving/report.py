"""A table for people from the JSON of a run. Pure; `python -m bench.serving.report FILE.json` prints it."""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.serving.goals import Goal, goals

Runs = Sequence[Mapping[str, Any]]
"""Of one server, model and load: one a round."""
FRONTS = ("router", "passthrough")


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# Serving, measured",
        "",
        f"`{results['command']}`, {results['started']}, {results['rounds']} rounds of {results['seconds']:g} s a load.",
        _machine(results["machine"]),
        "",
        "Clients and servers share the cores, so only figures of one run compare.",
        "Medians of the rounds (lowest to highest). CPU is that of the server's processes, a request.",
        "An open loop's latency counts from when a request was due.",
        *_goals(results["runs"]),
    ]
    for model in results["models"]:
        runs = [run for run in results["runs"] if run["model"] == model]
        lines += ["", f"## {model}", "", *_closed(runs, results["titles"])]
        lines += ["", *_open(runs, results["titles"])]
        lines += _added(runs)
    if results["failures"]:
        lines += ["", "## What failed", ""]
    for failure in results["failures"]:
        lines.append(f"- {failure['server']}, {failure['model']}, round {failure['round']}: {failure['error']}")
        lines += ["", *(f"      {line}" for line in failure["log"]), ""]
    lines += ["", "## Versions", ""]
    for server, versions in results["versions"].items():
        lines.append(f"- {server}: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    return "\n".join(lines) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']} GB, Linux {machine['kernel']}, "
        f"Python {machine['python']}; load average {machine['load_before']} before, {machine['load_after']} after."
    )


def _goals(runs: Runs) -> list[str]:
    rows = (
        [goal.what, f"{goal.ratio:.2f}", f"≥ {goal.least:g}" if goal.least else f"≤ {goal.most:g}", _said(goal)]
        for goal in goals(runs)
    )
    table = _table(["goal", "ratio", "wanted", "reached"], rows)
    return ["", "## Goals", "", *table] if table else []


def _said(goal: Goal) -> str:
    return "yes" if goal.reached else "**no**"


def _closed(runs: Runs, titles: Mapping[str, str]) -> list[str]:
    return _table(
        ["server", "in flight", "requests/s", "p50 ms", "p99 ms", "CPU µs", "RSS MB", "missing or wrong"],
        (
            [
                titles[server],
                str(inflight),
                *(_spread(group, name) for name in ("rate", "p50_ms", "p99_ms", "cpu_us", "rss_mb")),
                _faults(group),
            ]
            for (server, inflight), group in _groups(runs, "server", "inflight").items()
            if inflight
        ),
    )


def _open(runs: Runs, titles: Mapping[str, str]) -> list[str]:
    return _table(
        [
            "server",
            "of capacity",
            "offered/s",
            "p50 ms",
            "p99 ms",
            "CPU µs",
            "missing or wrong",
            "sent late, p50 ms",
            "generator CPU µs",
        ],
        (
            [
                titles[server],
                f"{share:.0%}",
                *(_spread(group, name) for name in ("offered", "p50_ms", "p99_ms", "cpu_us")),
                _faults(group),
                _spread(group, "lag_p50_ms"),
                _spread(group, "generator_cpu_us"),
            ]
            for (server, share), group in _groups(runs, "server", "share").items()
            if share
        ),
    )


def _added(runs: Runs) -> list[str]:
    """What a front costs, as the ratio of ours to the plain one, at each number in flight."""
    groups = _groups([run for run in runs if run["server"] in FRONTS], "inflight", "server")
    lines = []
    for inflight in sorted({key[0] for key in groups if key[0]}):
        ours, plain = (groups.get((inflight, front)) for front in FRONTS)
        if ours and plain:
            ratio = _median(ours, "cpu_us") / _median(plain, "cpu_us")
            lines.append(
                f"- {inflight} in flight: the router adds {_median(ours, 'cpu_us'):.0f} µs of CPU a request, "
                f"a pass-through {_median(plain, 'cpu_us'):.0f} µs: a ratio of {ratio:.2f}"
            )
    return ["", "In front of a remote:", "", *lines] if lines else []


def _groups(runs: Runs, *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(key) for key in keys), []).append(run)
    return groups


def _median(runs: Runs, name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def _spread(runs: Runs, name: str) -> str:
    values = [run[name] for run in runs]
    middle = _number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _faults(runs: Runs) -> str:
    faults = sum(run["missing"] + run["wrong"] for run in runs)
    return f"**{faults}** of {sum(run['requests'] for run in runs)}" if faults else "0"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|", *lines] if lines else []


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")  # noqa: T201
