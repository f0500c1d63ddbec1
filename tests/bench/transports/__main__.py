"""``scripts/bench transports``: ways to serve gRPC from Python, under the same load and the same attacks."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.serving.load import LoadFailure, missing_tools
from bench.transports import loads, soundness
from bench.transports.kinds import KINDS, PACKAGES
from bench.transports.report import markdown
from bench.transports.running import Running, installed, running

CACHE = Path.home() / ".cache" / "hedgerow-bench"
ROUNDS = 3
SECONDS = 2.0
WARM_UP_S = 0.5


def main(arguments: Sequence[str]) -> int:
    """Measure, save and print; the exit code (2: nothing could be measured)."""
    parser = argparse.ArgumentParser(prog="scripts/bench transports", description=__doc__)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0: no loads")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load")
    parser.add_argument("--no-soundness", dest="soundness", action="store_false", help="no probes, no idle connections")
    parser.add_argument("--out", type=Path, default=CACHE / "transports.json", help="the table goes beside it")
    options = parser.parse_args(arguments)
    if problem := missing_tools():
        say(problem)
        return 2
    kinds = options.only.split(",")
    packages = installed(CACHE)
    loads.allow_descriptors()
    results: dict[str, Any] = {
        "command": shlex.join(["scripts/bench", "transports", *arguments]),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}",
        "load_average": [round(os.getloadavg()[0], 2)],
        "packages": [*PACKAGES, *soundness.versions("grpcio", "h2")],
        "rounds": options.rounds,
        "seconds": options.seconds,
        "runs": [],
        "failures": [],
        "idle": {},
        "soundness": {},
    }
    for number in range(1, options.rounds + 1):
        for kind in kinds:
            say(f"round {number}: {kind}")
            try:
                with running(kind, packages) as server:
                    for run in measured(server, options.seconds):
                        results["runs"].append({"kind": kind, "round": number, **run})
            except (LoadFailure, OSError) as error:
                results["failures"].append({"kind": kind, "round": number, "error": str(error)})
    results["load_average"].append(round(os.getloadavg()[0], 2))
    for kind in kinds if options.soundness else ():
        try:
            with running(kind, packages) as server:
                results["idle"][kind] = loads.idle_bytes(server)
        except OSError as error:
            results["failures"].append({"kind": kind, "round": "idle connections", "error": str(error)})
        if KINDS[kind].sound:
            say(f"soundness: {kind}")
            results["soundness"][kind] = soundness.examined(kind, packages, say)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    options.out.with_suffix(".md").write_text(table)
    sys.stdout.write(table)
    return 0


def measured(server: Running, seconds: float) -> list[dict[str, Any]]:
    """One round of all loads on a server."""
    runs = []
    loads.closed(server, loads.CALLS["infer"], 8, 1, WARM_UP_S)
    for name, call in loads.CALLS.items():
        for inflight, connections in loads.SHAPES:
            found = loads.closed(server, call, inflight, connections, seconds)
            say(f"  {name} {inflight}/{connections}: {found.rate:,.0f}/s, {found.cpu_us:,.0f} µs")
            runs.append({"call": name, "inflight": inflight, "connections": connections, **asdict(found)})
    return runs


def say(text: str) -> None:
    """Progress, for whoever waits."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
