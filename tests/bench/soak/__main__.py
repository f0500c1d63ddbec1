"""``scripts/bench soak``: an agent under mixed traffic for an hour, watched from outside. See `--help`."""

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
from bench.soak.report import markdown
from bench.soak.stage import Stage
from bench.soak.tally import Tally, quantiles_ms, row
from bench.soak.traffic import Traffic
from bench.soak.upsets import OPTIONS, Periods, Upsets
from bench.soak.verdict import findings
from bench.soak.watch import Mood, seen, watched

CACHE = Path.home() / ".cache" / "hedgerow-bench"
MINUTES = 60.0
RATE = 150.0
CHANNELS = 4
MINUTE_S = 60.0


def main(arguments: Sequence[str]) -> int:
    """Soak, save and print; the exit code (1: a rule was broken)."""
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second, besides streams and the like")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for what the agents keep while they run")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in the cache); the page goes beside it")
    options = parser.parse_args(arguments)
    options.cache = options.cache.expanduser().absolute()
    out = (options.out or options.cache / "soak.json").absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": shlex.join(["scripts/bench", "soak", *arguments]),
        "started": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"grpcio {grpc.__version__} as the client.",
        "rate": options.rate,
        "minutes": [],
        "failures": [],
    }

    def save() -> None:
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(results))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the agents are ended then, too
    with contextlib.suppress(KeyboardInterrupt):
        stage = Stage.prepare(options.cache / "soak")
        asyncio.run(soak(stage, options.minutes * MINUTE_S, options.rate, results, save))
    sys.stdout.write(markdown(results))
    return 1 if any(one.outcome == "broken" for one in findings(results["minutes"])) else 0


async def soak(stage: Stage, seconds: float, rate: float, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Run for `seconds`; `results` grow by a row a minute, and are saved each time."""
    tally, mood = Tally(), Mood()
    async with AsyncExitStack() as stack:
        stack.callback(mood.close)
        for agent in (stage.cloud, stage.agent):
            await agent.start()
            stack.push_async_callback(agent.kill)
            if not agent.address:
                raise RuntimeError(f"an agent did not start: {agent.log[-500:]}")
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(stage.agent.address, OPTIONS))
            for _ in range(CHANNELS)
        ]
        started, pid = time.monotonic(), stage.agent.process.pid
        before = seen(pid)
        try:
            async with asyncio.timeout(seconds + MINUTE_S / 2), asyncio.TaskGroup() as group:
                others = [
                    group.create_task(Traffic(channels, rate, tally).run()),
                    group.create_task(Upsets(stage, channels[0], Periods().within(seconds), tally).run()),
                ]
                while time.monotonic() < started + seconds:
                    now = await watched(pid, MINUTE_S)
                    now["cpu_percent"] = (now["cpu_s"] - before["cpu_s"]) / MINUTE_S * 100
                    now["log_kb"] = stage.log_bytes() / 1024
                    before = now
                    minute = {"at_s": time.monotonic() - started, "agent": now, **quantiles_ms("mood_", mood.take())}
                    results["minutes"].append({**minute, **row(tally.take())})
                    results["failures"] = tally.failures
                    save()
                for other in others:
                    other.cancel()
        except TimeoutError:
            tally.failed("the soak", "it did not end")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
