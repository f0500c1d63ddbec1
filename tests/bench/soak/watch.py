"""The agent from outside: what /proc says of its process. And the machine's mood. Linux only."""

import asyncio
import threading
import time
from pathlib import Path

from bench.serving.process import PAGE_BYTES, TICKS_PER_S

NAP_S = 0.005
LOOK_S = 1.0
KB, MB = 1024, 1024 * 1024


async def watched(pid: int, seconds: float) -> dict[str, float]:
    """`seen` after `seconds`, with the least and the most of the resident set in them.

    The least is what tells of leaks: it leaves out what large requests take for a moment. Raises `OSError` if there is
    no such process.
    """
    until = time.monotonic() + seconds
    resident_mb = []
    while time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
        resident_mb.append(int(_text(pid, "statm").split()[1]) * PAGE_BYTES / MB)
    return {**seen(pid), "rss_mb": min(resident_mb), "rss_most_mb": max(resident_mb)}


def seen(pid: int) -> dict[str, float]:
    """Memory in MB, open descriptors, threads, CPU seconds so far. Raises `OSError` if there is no such process."""
    memory = _fields(_text(pid, "smaps_rollup"))
    fields = _text(pid, "stat").rpartition(")")[2].split()
    return {
        "pss_mb": memory["Pss"] / KB,
        "uss_mb": (memory["Private_Clean"] + memory["Private_Dirty"]) / KB,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(fields[17]),
        "cpu_s": (int(fields[11]) + int(fields[12])) / TICKS_PER_S,
    }


def _text(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def _fields(text: str) -> dict[str, int]:
    """Of lines such as "Rss:     1234 kB", after a first one that is none."""
    words = (line.split() for line in text.splitlines()[1:])
    return {name.rstrip(":"): int(value) for name, value, *_ in words}


class Mood:
    """How much later than asked a thread of ours wakes from naps of `NAP_S`: what the machine does to any process."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._nap, daemon=True)
        self._thread.start()

    def take(self) -> list[float]:
        """Seconds too late, of each nap since the last time."""
        late, self._late = self._late, []
        return late

    def close(self) -> None:
        """No more naps."""
        self._done.set()
        self._thread.join()

    def _nap(self) -> None:
        while not self._done.is_set():
            before = time.monotonic()
            time.sleep(NAP_S)
            self._late.append(time.monotonic() - before - NAP_S)
