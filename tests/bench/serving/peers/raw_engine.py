"""No server: threads that call the engine. ``raw_engine.py FOLDER SECONDS THREADS…`` prints a JSON line for each."""

# mypy: disable-error-code="import-not-found"

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from engine import Model, read_job


def measure(folder: Path, seconds: float, callers: int) -> dict[str, float]:
    """Fields of `bench.serving.load.Result` for `callers` threads, which share the cores with the engine's own."""
    engine = Model(replace(read_job(folder), threads=max(1, (os.cpu_count() or 1) // callers)))
    array = np.load(folder / "request.npy")
    engine(array)
    took_s: list[list[float]] = [[] for _ in range(callers)]
    until = time.perf_counter() + seconds

    def call(took_s: list[float]) -> None:
        before = time.perf_counter()
        while before < until:
            engine(array)
            after = time.perf_counter()
            took_s.append(after - before)
            before = after

    threads = [threading.Thread(target=call, args=(each,)) for each in took_s]
    started, cpu_s = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    every_s = np.concatenate(took_s)
    p50_s, p99_s = np.percentile(every_s, (50, 99))
    return {
        "rate": every_s.size / elapsed_s,
        "p50_ms": p50_s * 1e3,
        "p99_ms": p99_s * 1e3,
        "requests": every_s.size,
        "cpu_us": cpu_s / every_s.size * 1e6,
    }


if __name__ == "__main__":
    where, how_long = Path(sys.argv[1]), float(sys.argv[2])
    for count in map(int, sys.argv[3:]):
        print(json.dumps({"inflight": count, **measure(where, how_long, count)}), flush=True)  # noqa: T201
