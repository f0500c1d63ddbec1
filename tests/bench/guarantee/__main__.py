"""``scripts/bench guarantee``: whether the promise is kept, and at what price. See `--help`."""

import argparse
import datetime as dt
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.guarantee import pools
from bench.guarantee.draws import measure
from bench.guarantee.report import markdown
from bench.serving.__main__ import _names as names
from bench.serving.rounds import say

from hedgerow_cloud.certify.bounds import samples_needed

CACHE = Path.home() / ".cache" / "hedgerow-bench"
EPSILONS = (0.005, 0.01, 0.02, 0.05)
SAMPLES = (1000, 4000)
DRAWS, DELTA, SEED = 200, 0.05, 1


def main(arguments: Sequence[str]) -> int:
    """Measure, save and print."""
    options = _parser().parse_args(arguments)
    cache = options.cache.expanduser().absolute()
    out: Path = (options.out or cache / "guarantee.json").absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": shlex.join(["scripts/bench", "guarantee", *arguments]),
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        "delta": DELTA,
        "draws": options.draws,
        "seed": SEED,
        "tasks": [],
    }
    for name in options.tasks or pools.known():
        say(f"{name}: the pool")
        pool = pools.load(name, cache)
        task: dict[str, Any] = {"name": name, "about": pool.about, "risk": float(pool.wrong.mean()), "runs": []}
        results["tasks"].append(task)
        for samples in SAMPLES:
            for epsilon in EPSILONS:
                if samples < samples_needed(epsilon, DELTA):
                    continue
                say(f"{name}: ε = {epsilon:g}, n = {samples}")
                run = measure(pool, samples=samples, draws=options.draws, epsilon=epsilon, delta=DELTA, seed=SEED)
                task["runs"].append(run)
                out.write_text(json.dumps(results, indent=1) + "\n")
                out.with_suffix(".md").write_text(markdown(results))
    sys.stdout.write(markdown(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench guarantee", description=__doc__)
    parser.add_argument("--tasks", type=names(pools.known()), help=f"by commas: {', '.join(pools.known())}")
    parser.add_argument("--draws", type=int, default=DRAWS, help="calibration sets a row")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for the pools")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in the cache); the page goes beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
