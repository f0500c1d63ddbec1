"""Daemons as child processes that can be found again by a later process: started, asked, stopped.

A child holds a lock on its file in `run/` for as long as it lives, whoever started it; the file says its process id. So
a daemon is never started twice, and an id that was given to another process is never signalled.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hedgerow.errors import HedgerowError, Unavailable

POLL_S = 0.05
STOP_TIMEOUT_S = 20.0
"""From SIGTERM to SIGKILL; longer than a drain."""
KILL_TIMEOUT_S = 5.0
TAIL_BYTES = 4096


class Child:
    """The daemon `name` of the home folder `home`, running or not. Its output goes to `log`."""

    def __init__(self, home: Path, name: str) -> None:
        self.name = name
        self.log = home / "logs" / f"{name}.log"
        self._lock = home / "run" / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, None when it does not run."""
        if self._process is not None:
            self._process.poll()  # reaps it, or its lock would be free and its id still taken
        try:
            with self._lock.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return int(stream.read() or b"0") or None
        except FileNotFoundError:
            pass
        return None

    def start(self, command: Sequence[str]) -> None:
        """Start it; raises `Unavailable` if it runs already."""
        for file in (self.log, self._lock):
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a+b") as lock, self.log.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Unavailable(f"{self.name} runs already (process {self.pid})") from error
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # an interrupt from the terminal is ours to pass on, in order
            )
            lock.truncate(0)
            lock.write(str(self._process.pid).encode())

    def wait_ready(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return when `ready` says so; raises `HedgerowError` with the end of the log if it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self.pid is None:  # asked first: somebody else may answer at its address
                raise HedgerowError(f"{self.name} ended while it started: {self.tail()}")
            if ready():
                return
            if time.monotonic() > deadline:
                raise HedgerowError(f"{self.name} was not ready within {timeout_s:g} s: {self.tail()}")
            time.sleep(POLL_S)  # polls: being ready is only known by asking

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end and wait; by force after `timeout_s`. Idempotent."""
        if not self._signal(signal.SIGTERM, timeout_s):
            self.kill()

    def kill(self) -> None:
        """End it as a crash would, and wait. Idempotent."""
        if not self._signal(signal.SIGKILL, KILL_TIMEOUT_S):
            raise HedgerowError(f"{self.name} (process {self.pid}) does not end")

    def tail(self) -> str:
        """The last line of its log and where the rest is, for messages."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                lines = stream.read().decode(errors="replace").split("\n")
        except FileNotFoundError:
            lines = []
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{last} (log: {self.log})"

    def _signal(self, number: signal.Signals, timeout_s: float) -> bool:
        """Send a signal if it runs; whether it has ended within `timeout_s`."""
        pid = self.pid
        with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
            if pid is not None and number is signal.SIGKILL:
                os.killpg(pid, number)  # it leads a group of its own; what it started must not stay behind
            elif pid is not None:
                os.kill(pid, number)
        deadline = time.monotonic() + timeout_s
        while self.pid is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)  # polls: it may be another process's child, which cannot be waited for
        return True
