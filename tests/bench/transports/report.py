"""Tables for people from the JSON of a run. Pure; `python -m bench.transports.report FILE.json` prints them."""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.transports.kinds import KINDS, REFERENCE
from bench.transports.loads import CALLS

Run = Mapping[str, Any]


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    before, after = results["load_average"]
    lines = [
        f"`{results['command']}`: {results['rounds']} interleaved rounds of {results['seconds']:g} s a load.",
        f"{results['machine']}; {', '.join(results['packages'])}; load average {before} before, {after} after.",
        f"Medians of the rounds (lowest to highest). Ratios are to {KINDS[REFERENCE].title} in the same round.",
    ]
    for name, call in CALLS.items():
        runs = [run for run in results["runs"] if run["call"] == name]
        if runs:
            lines += ["", f"### {call.title}", "", *_loads(runs)]
    if results["idle"]:
        rows = [[KINDS[kind].title, f"{each / 1024:.1f}"] for kind, each in results["idle"].items()]
        lines += ["", "### 10,000 idle connections", "", *_table(["server", "resident KB a connection"], rows)]
    if results["failures"]:
        lines += ["", "### Loads that failed", ""]
        lines += [f"- {KINDS[one['kind']].title}, {one['round']}: {one['error']}" for one in results["failures"]]
    if results["soundness"]:
        lines += ["", "### Soundness", "", *_soundness(results["soundness"])]
    return "\n".join(lines) + "\n"


def _loads(runs: Sequence[Run]) -> list[str]:
    reference = {_place(run): run["rate"] for run in runs if run["kind"] == REFERENCE}
    groups: dict[tuple[str, int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["kind"], run["inflight"], run["connections"]), []).append(run)
    rows = []
    for (kind, inflight, connections), group in groups.items():
        ratios = [run["rate"] / reference[_place(run)] for run in group if _place(run) in reference]
        missing = sum(run["missing"] for run in group)
        rows.append(
            [
                KINDS[kind].title,
                f"{inflight} over {connections}",
                *(spread([run[name] for run in group]) for name in ("rate",)),
                spread(ratios) if ratios else "",
                *(spread([run[name] for run in group]) for name in ("p50_ms", "p99_ms", "cpu_us")),
                f"**{missing}**" if missing else "0",
            ]
        )
    head = ["server", "in flight", "requests/s", "ratio", "p50 ms", "p99 ms", "CPU µs", "missing"]
    return _table(head, sorted(rows, key=lambda row: (int(row[1].split()[0]), int(row[1].split()[2]))))


def _place(run: Run) -> tuple[int, int, int]:
    return run["round"], run["inflight"], run["connections"]


def _soundness(found: Mapping[str, Mapping[str, Run]]) -> list[str]:
    """A row a probe that some server fails, and all that was found of each server below."""
    names = list(dict.fromkeys(name for outcomes in found.values() for name in outcomes))
    failed = [name for name in names if any(not outcomes.get(name, {"ok": True})["ok"] for outcomes in found.values())]
    head = ["probe", *(KINDS[kind].title for kind in found)]
    rows = [
        [
            name.replace("_", " "),
            *("" if name not in o else "passes" if o[name]["ok"] else "**fails**" for o in found.values()),
        ]
        for name in failed
    ]
    lines = [f"{len(names)} probes; these are failed by some server:", "", *_table(head, rows)]
    for kind, outcomes in found.items():
        bad = {name: one for name, one in outcomes.items() if not one["ok"]}
        lines += ["", f"{KINDS[kind].title}: {len(bad)} of {len(outcomes)} failed.", ""]
        lines += [f"- {name.replace('_', ' ')}: {one['remark'].replace('|', '/')}" for name, one in bad.items()]
    return lines


def spread(values: Sequence[float]) -> str:
    """The median, with lowest and highest."""
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    """With three digits that count, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|", *lines]


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")  # noqa: T201
