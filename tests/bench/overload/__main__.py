"""``scripts/bench overload``: how much a server still does when it is asked for far more than it can. See `--help`."""

import argparse
import datetime as dt
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.overload.report import markdown
from bench.overload.runs import MODELS, SERVERS, Plan, measure
from bench.serving.__main__ import _names as names
from bench.serving.environments import Environments, PeerUnavailable
from bench.serving.load import LoadFailure
from bench.serving.rounds import say
from bench.serving.wire import WrongAnswer

CACHE = Path.home() / ".cache" / "hedgerow-bench"
ROUNDS = 3
SECONDS = 10.0
QUICK_SERVERS = ("agent", "bare", "floor")
"""Those that need nothing installed."""
QUICK_SECONDS = 3.0
DEADLINE_S = 0.1


def main(arguments: Sequence[str]) -> int:
    """Measure, save and print; the exit code (1: a server failed)."""
    options = _parser().parse_args(arguments)
    cache = options.cache.expanduser().absolute()
    (cache / "models").mkdir(parents=True, exist_ok=True)
    out: Path = (options.out or cache / "overload.json").absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    environments = Environments(cache)
    servers = options.only or (QUICK_SERVERS if options.quick else tuple(SERVERS))
    plan = Plan(QUICK_SECONDS if options.quick else options.seconds, options.deadline_s)
    results: dict[str, Any] = {
        "command": shlex.join(["scripts/bench", "overload", *arguments]),
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        "deadline_s": plan.deadline_s,
        "seconds": plan.seconds,
        "rounds": 1 if options.quick else options.rounds,
        "titles": {name: SERVERS[name].title for name in servers},
        "runs": [],
        "failures": [],
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended then, too
    try:
        for number in range(1, results["rounds"] + 1):
            for model in options.models or tuple(MODELS):
                for name in servers:
                    say(f"round {number}: {model} on {name}")
                    where = {"round": number, "model": model, "server": name}
                    try:
                        phases = measure(name, model, plan, cache, environments, seed=number)
                    except (LoadFailure, PeerUnavailable, WrongAnswer, OSError) as error:
                        say(f"  failed: {error}")
                        results["failures"].append({**where, "error": str(error)})
                    else:
                        results["runs"].append({**where, "phases": phases})
                    out.write_text(json.dumps(results, indent=1) + "\n")
                    out.with_suffix(".md").write_text(markdown(results))
    except KeyboardInterrupt:
        say("interrupted: what was measured is saved")
    sys.stdout.write(markdown(results))
    return 1 if results["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench overload", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of what needs no installing")
    parser.add_argument("--only", type=names(tuple(SERVERS)), help=f"servers, by commas: {', '.join(SERVERS)}")
    parser.add_argument("--models", type=names(tuple(MODELS)), help=f"models, by commas: {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each overload")
    parser.add_argument("--deadline-s", type=float, default=DEADLINE_S, help="of each call")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for the peers' environments and the models")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in the cache); the page goes beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
