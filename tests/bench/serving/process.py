"""A server's process and all that it started: ended by pid, and what they cost read from /proc. Linux only."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hedgerow.config import environment

STOP_S = 15.0
POLL_S = 0.05
LOG_LINES = 15
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    ticks: int
    started: int
    """Ticks after boot: tells a process from a later one of the same pid."""


class Process:
    """A command that runs in `folder` in a process group of its own, with its output in the file `log` there."""

    def __init__(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the command itself is."""
        return self._process.poll() is None

    def log_tail(self) -> list[str]:
        """The last lines that it wrote."""
        return self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]

    def cpu_s(self) -> float:
        """CPU seconds of the tree so far, user and system, children that ended included."""
        return sum(stat.ticks for stat in self._tree().values()) / TICKS_PER_S

    def rss_bytes(self) -> int:
        """Resident bytes of the tree; pages that its processes share count once for each."""
        total = 0
        for pid in self._tree():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return total

    def stop(self) -> None:
        """End it in good order, then whatever of its tree is left."""
        tree = self._tree()
        if self.running:
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        deadline = time.monotonic() + STOP_S
        while (left := _alive(tree)) and self._process.returncode is not None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # children that came after the tree was read
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tree(self) -> dict[int, _Stat]:
        everything = {int(path.name): stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(path))}
        tree = {pid: stat for pid, stat in everything.items() if pid == self._process.pid}
        while more := {pid: stat for pid, stat in everything.items() if stat.parent in tree and pid not in tree}:
            tree.update(more)
        return tree


def _stat(path: Path) -> _Stat | None:
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return None
    return None if fields[0] == "Z" else _Stat(int(fields[1]), sum(map(int, fields[11:15])), int(fields[19]))


def _alive(tree: Mapping[int, _Stat]) -> list[int]:
    return [pid for pid, stat in tree.items() if (now := _stat(Path(f"/proc/{pid}"))) and now.started == stat.started]
