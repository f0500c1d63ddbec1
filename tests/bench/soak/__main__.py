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
from collections.abc import AsyncIterator, Callable, Sequence
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
MINUTES = 60
RATE = 150.0
CHANNELS = 4
MINUTE_S = 60.0
END_S = 30.0
"""How long what is under way may take to end."""


def main(arguments: Sequence[str]) -> int:
    """Soak, save and print; the exit code (1: a rule was broken, or there is nothing to show)."""
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=__doc__)
    parser.add_argument("--minutes", type=int, default=MINUTES, help="at least one")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second, besides streams and the like")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for what the agents keep while they run")
    parser.add_argument("--out", type=Path, help="the JSON file (default: in the cache); the page goes beside it")
    options = parser.parse_args(arguments)
    if options.minutes < 1:
        parser.error("a soak takes a minute at least")
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
        "failures_besides": 0,
        "failures": [],
    }

    def save() -> None:
        out.write_text(json.dumps(results, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(results))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the agents are ended then, too
    with contextlib.suppress(KeyboardInterrupt):
        stage = Stage.prepare(options.cache / "soak")
        asyncio.run(soak(stage, options.minutes, options.rate, results, save))
    sys.stdout.write(markdown(results))
    found = findings(results["minutes"], results["failures_besides"])
    return 1 if not results["minutes"] or any(one.outcome == "broken" for one in found) else 0


async def soak(stage: Stage, minutes: int, rate: float, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Run for `minutes`; `results` grow by a row each minute, and are saved then, and at the end however it comes."""
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
        upsets = Upsets(stage, channels[0], Periods().within(minutes * MINUTE_S), tally)
        try:
            async with asyncio.timeout(None) as limit, asyncio.TaskGroup() as group:
                others = [
                    group.create_task(Traffic(channels, rate, tally).run()),
                    group.create_task(upsets.run()),
                ]
                async for minute in observed(stage, minutes, tally, mood):
                    results["minutes"].append(minute)
                    results["failures"] = tally.failures
                    save()
                for other in others:
                    other.cancel()
                limit.reschedule(asyncio.get_running_loop().time() + END_S)
        except TimeoutError:
            tally.failed("the soak", "it did not end")
        except Exception as error:
            tally.failed("the soak", repr(error))
            raise
        finally:
            results["failures_besides"] = tally.take().failures
            results["failures"] = tally.failures
            save()


async def observed(stage: Stage, minutes: int, tally: Tally, mood: Mood) -> AsyncIterator[dict[str, Any]]:
    """A row of the results each minute; where the agent is gone, that is a failure, and there are no more."""
    started, pid = time.monotonic(), stage.agent.process.pid
    try:
        before = seen(pid)
        for _ in range(minutes):
            now = await watched(pid, MINUTE_S)
            now["cpu_percent"] = (now["cpu_s"] - before["cpu_s"]) / MINUTE_S * 100
            now["log_kb"] = stage.log_bytes() / 1024
            before = now
            minute = {"at_s": time.monotonic() - started, "agent": now, **quantiles_ms("mood_", mood.take())}
            yield {**minute, **row(tally.take())}
    except OSError as error:
        tally.failed("the agent", f"it is gone: {error}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
