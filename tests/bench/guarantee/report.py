"""A page for people from the JSON of a run. Pure; `python -m bench.guarantee.report FILE.json` prints it."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.guarantee.rivals import METHODS

ENOUGH = 20
"""Samples times ε from which the share sent to the cloud is held against the oracle's."""
GOAL_OVER_ORACLE = 1.15


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [
        "# The guarantee, measured",
        "",
        f"`{results['command']}`, {results['started']}. {results['machine']}.",
        "",
        f"δ = {results['delta']:g}; seed {results['seed']}; {results['draws']} calibration sets a row, drawn with",
        "replacement from a pool whose own risk is the truth. *Broken*: the gate's real risk in the pool is above ε;",
        "where the promise is kept, it is so in at most δ of the draws (by chance in no more than the number in",
        "brackets, one time in a thousand). *Risk*: median and largest. *To the cloud*: the median, and as a multiple",
        "of what the oracle sends, which knows the pool.",
        "",
        *_goals(results),
    ]
    for task in results["tasks"]:
        lines += [
            "",
            f"## {task['name']}",
            "",
            f"{task['about']}. The edge disagrees with the cloud on {task['risk']:.2%}.",
        ]
        for run in task["runs"]:
            oracle = run["oracle"]
            lines += [
                "",
                f"ε = {run['epsilon']:.1%}, n = {run['samples']:,}; the oracle sends {oracle['share']:.1%} there.",
                "",
                f"| threshold | broken (≤ {run['allowed']}) | risk, median / max | to the cloud | of the oracle's |",
                "|---|---:|---:|---:|---:|",
                *(_row(METHODS[name][0], found, run) for name, found in run["methods"].items()),
            ]
    return "\n".join(lines) + "\n"


def _row(title: str, found: Mapping[str, float], run: Mapping[str, Any]) -> str:
    broken = f"{found['broken']:g} of {run['draws']}"
    if found["broken"] > run["allowed"]:
        broken = f"**{broken}**"
    return (
        f"| {title} | {broken} | {found['risk_median']:.2%} / {found['risk_max']:.2%} | {found['share_median']:.1%} "
        f"| {found['over_oracle']:.2f} |"
    )


def _goals(results: Mapping[str, Any]) -> Iterator[str]:
    runs = [(task["name"], run) for task in results["tasks"] for run in task["runs"]]
    kept = [run["methods"]["hedgerow"]["broken"] <= run["allowed"] for _, run in runs]
    yield f"- The promise is kept in {sum(kept)} of {len(kept)} rows."
    enough = [(name, run) for name, run in runs if run["samples"] * run["epsilon"] >= ENOUGH]
    near = [run["methods"]["hedgerow"]["over_oracle"] <= GOAL_OVER_ORACLE for _, run in enough]
    yield f"- Where n·ε ≥ {ENOUGH}: at most {GOAL_OVER_ORACLE} times the oracle's in {sum(near)} of {len(near)} rows."
    for (name, run), good in zip(enough, near, strict=True):
        if not good:
            ratio = run["methods"]["hedgerow"]["over_oracle"]
            yield f"  Not on {name}, ε = {run['epsilon']:.1%}, n = {run['samples']:,}: {ratio:.2f} times."


if __name__ == "__main__":
    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
