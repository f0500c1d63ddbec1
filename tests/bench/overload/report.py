"""A page for people from the JSON of a run. Pure; `python -m bench.overload.report FILE.json` prints it."""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.overload.outcomes import FIRST_S, IN_TIME, LATE

GOAL_GOODPUT = 0.9
GOAL_REFUSAL_MS = 5.0
OVER = "5x"
AFTER = "0.5x"
TOO_LATE = ("late", LATE, "gave up")
"""Outcomes of calls that the server got, and neither refused in time nor answered in time."""
COLUMNS = (
    *("server", "peak/s", "load", "sent/s", "good/s", "of peak", "refused p50 / p99 ms", "too late", "held", "unsent"),
    *("good p99 ms", "server CPU s/s", "generator CPU s/s", "lag p50 / p99 ms"),
)

Phases = Sequence[Mapping[str, Any]]
"""Of one server, model and load: one a round."""


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# Overload, measured",
        "",
        f"`{results['command']}`, {results['started']}, {results['rounds']} rounds of {results['seconds']:g} s a load.",
        f"{results['machine']}.",
        "",
        f"Each call has a deadline of {results['deadline_s'] * 1e3:.0f} ms, which its client keeps to.",
        "Good: right, and within it. The peak is the best goodput of closed loops of the same calls;",
        "loads are Poisson, in multiples of it.",
        f"A refusal is a status that says so within {IN_TIME:.0%} of the deadline; its time",
        "is the client's, from sending. Too late: sent, and neither refused by then nor answered by the deadline.",
        "Held: never sent, as the server's limit of streams, or a full connection, left no room by the deadline.",
        "Unsent: never sent either, as the generator had too many calls open. These are shares of the calls that",
        "were due; sent/s has neither of the two. Lag: how late the generator sent.",
        "Medians of the rounds; p99s are of all calls of a round.",
    ]
    for model in dict.fromkeys(run["model"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["model"] == model]
        lines += ["", f"## {model}", "", *_table(runs, results["titles"])]
        lines += ["", *_goals(runs, results["titles"]), "", *_statuses(runs, results["titles"])]
    if results["failures"]:
        lines += ["", "## What failed", ""]
        lines += [
            f"- {one['server']}, {one['model']}, round {one['round']}: {one['error']}" for one in results["failures"]
        ]
    return "\n".join(lines) + "\n"


def _table(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---" + "|---:" * (len(COLUMNS) - 3) + "|"]
    for server, title in titles.items():
        ours = [run for run in runs if run["server"] == server]
        for load in dict.fromkeys(phase["phase"] for run in ours for phase in run["phases"] if phase["offered"]):
            phases = [_phase(run, load) for run in ours]
            peak = statistics.median(_peak(run) for run in ours)
            share = statistics.median(_share(run, load) for run in ours)
            counts = sum((Counter(phase["outcomes"]) for phase in phases), Counter())
            unsent = sum(phase["unsent"] for phase in phases)
            due = counts.total() + unsent
            cells = [
                title,
                f"{peak:,.0f}",
                load,
                f"{_median(phases, 'sent'):,.0f}",
                f"{_median(phases, 'goodput'):,.0f}",
                f"{share:.0%}",
                _pair(phases, "refused_ms"),
                f"{sum(counts[name] for name in TOO_LATE) / due:.2%}",
                f"{counts['held'] / due:.2%}",
                f"{unsent / due:.2%}",
                _pair(phases, "good_ms").rpartition(" ")[2],
                f"{_per_s(phases):.2f}",
                f"{_median(phases, 'generator_cpu'):.2f}",
                _pair(phases, "lag_ms"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _goals(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    lines = [
        f"| server | goodput at {OVER} | refusals p99 at {OVER} | good in the first {FIRST_S:g} s at {AFTER} |",
        "|---|---:|---:|---:|",
        f"| goal | {GOAL_GOODPUT:.0%} | {GOAL_REFUSAL_MS:g} ms | |",
    ]
    for server, title in titles.items():
        ours = [run for run in runs if run["server"] == server]
        if not ours:
            continue
        share = statistics.median(_share(run, OVER) for run in ours)
        over, after = (
            [phase for run in ours for phase in run["phases"] if phase["phase"] == name] for name in (OVER, AFTER)
        )
        refusals = [phase["refused_ms"][1] for phase in over if "refused_ms" in phase]
        slow = f"{statistics.median(refusals):.1f} ms" if refusals else "none"
        first = sum(phase["first"]["good"] for phase in after) / sum(phase["first"]["sent"] for phase in after)
        met = "" if share >= GOAL_GOODPUT else "**"
        fast = "" if refusals and statistics.median(refusals) <= GOAL_REFUSAL_MS else "**"
        lines.append(f"| {title} | {met}{share:.0%}{met} | {fast}{slow}{fast} | {first:.1%} |")
    return lines


def _statuses(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    lines = [f"What the calls came to at {OVER}:", ""]
    for server, title in titles.items():
        total: Counter[str] = Counter()
        for run in runs:
            if run["server"] == server:
                total.update(_phase(run, OVER)["outcomes"])
        if total:
            shares = (f"{name} {count / total.total():.1%}" for name, count in total.most_common())
            lines.append(f"- {title}: " + ", ".join(shares))
    return lines


def _phase(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(phase for phase in run["phases"] if phase["phase"] == name)


def _peak(run: Mapping[str, Any]) -> float:
    return float(max(phase["goodput"] for phase in run["phases"] if not phase["offered"]))


def _share(run: Mapping[str, Any], load: str) -> float:
    return float(_phase(run, load)["goodput"]) / _peak(run)


def _median(phases: Phases, name: str) -> float:
    return float(statistics.median(phase[name] for phase in phases))


def _per_s(phases: Phases) -> float:
    return float(statistics.median(phase["server_cpu_s"] / phase["seconds"] for phase in phases))


def _pair(phases: Phases, name: str) -> str:
    pairs = [phase[name] for phase in phases if name in phase]
    if not pairs:
        return ""
    p50, p99 = (statistics.median(values) for values in zip(*pairs, strict=True))
    return f"{p50:.2f} / {p99:.2f}"


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")  # noqa: T201
