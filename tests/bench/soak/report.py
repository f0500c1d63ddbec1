"""A page for people from the JSON of a soak. Pure; `python -m bench.soak.report FILE.json` prints it."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.soak.verdict import TIMED, Minutes, findings

MEMORY = ("rss_mb", "rss_most_mb", "pss_mb", "uss_mb")
COLUMNS = (
    *("minute", "RSS MB, least", "most", "PSS MB", "USS MB", "descriptors", "threads", "CPU %", "log kB", "mood ms"),
    *("lag p99 ms", *(f"{kind} p50 / p99 ms" for kind in TIMED), "failures", "events"),
)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    minutes: Minutes = results["minutes"]
    besides = results.get("failures_besides", 0)  # older results have none
    lines = [
        "# A soak",
        "",
        f"`{results['command']}`, {results['started']}: {len(minutes)} minutes at {results['rate']:g} requests/s.",
        results["machine"],
        "",
        "Times of requests count from when they were due.",
        "RSS: least and most of a minute, looked at each second; the rest of the memory at its end.",
        "Mood: how late a thread of the generator wakes from a nap of 5 ms, p99.",
        "",
        "| rule | outcome | figures |",
        "|---|---|---|",
        *(f"| {one.rule} | {_bold(one.outcome)} | {one.figures} |" for one in findings(minutes, besides)),
        "",
        "## Minute by minute",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---:" * (len(COLUMNS) - 1) + "|---|",
        *(_minute(number, minute) for number, minute in enumerate(minutes, 1)),
        "",
        "## What each kind met",
        "",
        *_kinds(minutes),
        "",
        "Answered by: " + ", ".join(f"{who} {count:,}" for who, count in _summed(minutes, "tiers").most_common()) + ".",
    ]
    if results["failures"]:
        lines += ["", "## The first failures", "", *(f"- {failure}" for failure in results["failures"])]
    return "\n".join(lines) + "\n"


def _bold(outcome: str) -> str:
    return outcome if outcome == "held" else f"**{outcome}**"


def _minute(number: int, minute: Mapping[str, Any]) -> str:
    agent = minute["agent"]
    cells = [
        str(number),
        *(f"{agent[name]:.1f}" for name in MEMORY),
        *(f"{agent[name]:g}" for name in ("descriptors", "threads")),
        f"{agent['cpu_percent']:.1f}",
        f"{agent['log_kb']:.0f}",
        f"{minute['mood_p99_ms']:.2f}",
        f"{minute.get('lag_p99_ms', 0):.2f}",
        *(_times(minute["kinds"].get(kind, {})) for kind in TIMED),
        str(minute["failures"]),
        ", ".join(minute["events"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _times(kind: Mapping[str, Any]) -> str:
    return f"{kind['p50_ms']:.2f} / {kind['p99_ms']:.2f}" if "p50_ms" in kind else ""


def _kinds(minutes: Minutes) -> list[str]:
    names = sorted({name for minute in minutes for name in minute["kinds"]})
    lines = ["| kind | outcomes |", "|---|---|"]
    for name in names:
        outcomes = _summed([minute["kinds"].get(name, {}) for minute in minutes], "outcomes")
        lines.append(f"| {name} | " + ", ".join(f"{what} {count:,}" for what, count in outcomes.most_common()) + " |")
    return lines


def _summed(rows: Minutes, key: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row.get(key, {}))
    return total


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")  # noqa: T201
