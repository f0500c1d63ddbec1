"""``scripts/bench serving``: our servers and the peers, on the same models, under the same load. See `--help`."""

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

from bench.serving import load
from bench.serving.environments import Environments, PeerUnavailable
from bench.serving.models import Model, makers
from bench.serving.report import markdown
from bench.serving.rounds import RAW, RAW_TITLE, Plan, Rounds, say
from bench.serving.servers import SERVERS

CACHE = Path.home() / ".cache" / "hedgerow-bench"
INFLIGHT = (1, 8, 32)
SHARES = (0.5, 0.8)
ROUNDS = 3
SECONDS = 5.0
QUICK_SERVERS = ("agent", "bare", "floor", "echo", "router", "passthrough", RAW)
"""Those that need nothing installed."""
QUICK_MODELS = ("tiny",)
QUICK_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    """Measure, save and print; the exit code (1: a server failed, 2: nothing could be measured)."""
    options = _parser().parse_args(arguments)
    if problem := load.missing_tools():
        say(problem)
        return 2
    options.cache = options.cache.expanduser().absolute()
    out = options.out or options.cache / "serving.json"
    environments = Environments(options.cache)
    cores = os.cpu_count() or 1
    wanted = options.models or (QUICK_MODELS if options.quick else tuple(makers(cores)))
    models, failures = _models(wanted, cores, options.cache / "models", environments)
    plan = Plan(
        servers=options.only or (QUICK_SERVERS if options.quick else (*SERVERS, RAW)),
        models=models,
        rounds=1 if options.quick else options.rounds,
        seconds=QUICK_SECONDS if options.quick else options.seconds,
        inflight=INFLIGHT,
        shares=SHARES,
        cores=cores,
    )
    rounds = Rounds(plan, options.cache, environments)
    rounds.findings.failures += failures
    results: dict[str, Any] = {
        "command": shlex.join(["scripts/bench", "serving", *arguments]),
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "machine": _machine(cores),
        "models": [model.name for model in models],
        "titles": {RAW: RAW_TITLE, **{name: server.title for name, server in SERVERS.items()}},
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended then, too
    try:
        rounds.run()
    except KeyboardInterrupt:
        say("interrupted: what was measured is saved")
    results["machine"]["load_after"] = round(os.getloadavg()[0], 2)
    results["runs"] = rounds.findings.runs
    results["failures"] = rounds.findings.failures
    results["versions"] = _versions(plan.servers, environments)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    out.with_suffix(".md").write_text(table)
    sys.stdout.write(table)
    return 1 if rounds.findings.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench serving", description=__doc__)
    names, models = (*SERVERS, RAW), tuple(makers(1))
    parser.add_argument("--quick", action="store_true", help="one short round on tiny, of what needs no installing")
    parser.add_argument("--only", type=_names(names), help=f"servers, separated by commas: {', '.join(names)}")
    parser.add_argument("--models", type=_names(models), help=f"models, separated by commas: {', '.join(models)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for the peers' environments and the models")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in the cache); the table goes beside it")
    return parser


def _names(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return read


def _models(
    names: Sequence[str], cores: int, folder: Path, environments: Environments
) -> tuple[list[Model], list[dict[str, Any]]]:
    """The models, and those that could not be made as failures."""
    folder.mkdir(parents=True, exist_ok=True)
    models: list[Model] = []
    failures = []
    for name in names:
        try:
            models.append(makers(cores)[name](folder, environments))
        except PeerUnavailable as error:
            failures.append({"round": 0, "model": name, "server": "none", "error": str(error), "log": []})
    return models, failures


def _machine(cores: int) -> dict[str, Any]:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.partition(": ")[2],
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _versions(servers: Sequence[str], environments: Environments) -> dict[str, dict[str, str]]:
    """By venv; ours is called hedgerow."""
    found = {}
    for venv in dict.fromkeys(SERVERS[name].venv for name in servers if name != RAW):
        try:
            found[venv or "hedgerow"] = environments.versions(venv)
        except PeerUnavailable as error:
            say(f"versions of {venv} are unknown: {error}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
