"""A model's process as its parent sees it: one child from its start to its end, and the runs in it.

`session` decides when there is one, `child` is what runs in it. Runs may come from any thread,
each with a lane of its own.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import msgspec
from numpy.typing import NDArray

from hedgerow import errors
from hedgerow.config import Seconds, Settings
from hedgerow.errors import EngineFault, HedgerowError, InvalidInput
from hedgerow.isolation.child import Answer, Failed, Lane, Opened, Run
from hedgerow.restarts import RestartSettings

WATCH_S = 0.1
"""How often, at most, somebody who waits for a run looks at the process's memory."""
MAX_LINE_BYTES = 1000
"""Of a line that a model's process says; more becomes lines of its own."""
MAX_LINES = 100
"""That a model's process may say in LINES_S; the others are left out of the log."""
LINES_S = 60.0
EXIT_S = 5.0
"""How long a process may take to be gone once it is killed or has hung up."""

log = logging.getLogger(__name__)

_REPLY = msgspec.msgpack.Decoder(Opened | Answer | Failed)


class IsolationSettings(Settings, frozen=True, kw_only=True):
    """What a model's process may take, and how often it is started again."""

    run_timeout_s: Seconds = 30.0
    """Of one run; then the model is taken to hang."""
    start_timeout_s: Seconds = 120.0
    """Of starting the process and loading the model."""
    max_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Resident, what it shares with others (code, files, tensors on their way) aside; 0: no limit."""
    max_tensor_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024)] = 1024**3
    """Inputs and outputs of one run together."""
    restarts: RestartSettings = RestartSettings()


class Lost(Exception):
    """The process is of no more use; the message says why, after the model's name."""


class ModelProcess:
    """A model's process, from its start to its end. `ended` is called, on a thread of its own, when it is gone."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        lanes: int,
        settings: IsolationSettings,
        ended: Callable[["ModelProcess"], None],
    ) -> None:
        self._settings = settings
        self._why = ""
        self._looked = 0.0
        self.idle: list[Lane] = []
        try:
            with contextlib.ExitStack() as theirs:
                descriptors = []
                for _ in range(lanes):
                    lane, far, memory = Lane.create(settings.max_tensor_bytes)
                    self.idle.append(lane)
                    descriptors.append((theirs.enter_context(far).fileno(), memory))
                self._process = subprocess.Popen(
                    [*command, *(f"{channel}:{memory}" for channel, memory in descriptors)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[descriptor for pair in descriptors for descriptor in pair],
                )
            assert self._process.stdout is not None
            threading.Thread(
                target=self._listen, args=(name, self._process.stdout, ended), name=f"{name}-output", daemon=True
            ).start()
        except BaseException:
            for lane in self.idle:
                lane.close()
            raise

    def opened(self, lane: Lane) -> Opened:
        """The model's interface, once it is open; raises `Lost`, or what the engine said."""
        reply = self._reply(lane, self._settings.start_timeout_s, "open")
        if not isinstance(reply, Opened):
            raise Lost("its process answered nonsense")
        return reply

    def run(
        self,
        lane: Lane,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Sequence[str],
        datatypes: tuple[Mapping[str, str], Mapping[str, str]],
    ) -> dict[str, NDArray[Any]]:
        """What the model answers; raises `Lost`, or what the engine or the model's process said."""
        try:
            placed, free_from = lane.put(inputs, datatypes[0])
        except (OverflowError, TypeError, KeyError) as error:
            raise InvalidInput(str(error)) from error
        try:
            lane.send(Run(placed, list(outputs), free_from))
        except OSError:
            raise Lost(self.ending()) from None
        reply = self._reply(lane, self._settings.run_timeout_s, "answer")
        try:
            if not isinstance(reply, Answer) or {place.name for place in reply.outputs} != set(outputs):
                raise Lost("its process answered nonsense")
            arrays = {name: array.copy() for name, array in lane.get(reply.outputs, datatypes[1]).items()}
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise Lost("its process answered nonsense") from error
        lane.tidy(reply.outputs)
        return arrays

    def look(self, *, now: float) -> None:
        """Raise `Lost` if the process uses too much memory. Looks every WATCH_S at most."""
        if not self._settings.max_memory_bytes or now - self._looked < WATCH_S:
            return
        self._looked = now
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_bytes().split()
        except OSError:  # it is gone, as whoever waits for it will hear
            return
        used = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
        if used > self._settings.max_memory_bytes:
            raise Lost(f"its process used {used} bytes of memory; {self._settings.max_memory_bytes} are allowed")

    def kill(self, why: str) -> None:
        """End it, from any thread; `why` is what the others who wait for it are told."""
        self._why = self._why or why
        self._process.kill()

    def ending(self) -> str:
        """How it ended, for those who found it gone."""
        if not self._why:
            try:
                code = self._process.wait(EXIT_S)
            except subprocess.TimeoutExpired:
                return "its process hung up"
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return self._why or f"its process {how}"
        return self._why

    def _reply(self, lane: Lane, timeout_s: float, doing: str) -> Opened | Answer:
        until = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if now >= until:
                raise Lost(f"it did not {doing} within {timeout_s:g} s")
            lane.channel.settimeout(min(WATCH_S, until - now))
            try:
                message = lane.receive()
                break
            except TimeoutError:
                self.look(now=time.monotonic())
        if not message:
            raise Lost(self.ending())
        try:
            reply: Opened | Answer | Failed = _REPLY.decode(message)
        except msgspec.MsgspecError as error:
            raise Lost("its process answered nonsense") from error
        if isinstance(reply, Failed):
            raise _error(reply)
        return reply

    def _listen(self, name: str, output: IO[bytes], ended: Callable[["ModelProcess"], None]) -> None:
        """On a thread of its own: log what the process says, until it is gone."""
        since, said = time.monotonic(), 0
        with output:
            while line := output.readline(MAX_LINE_BYTES):
                if time.monotonic() - since > LINES_S:
                    since, said = time.monotonic(), 0
                said += 1
                if said <= MAX_LINES:
                    log.warning("%s: its process says: %s", name, line.decode(errors="replace").rstrip())
                elif said == MAX_LINES + 1:
                    log.warning("%s: its process says more than %d lines in %g s", name, MAX_LINES, LINES_S)
        self._process.wait()
        ended(self)


def _error(failed: Failed) -> HedgerowError:
    """The error that the model's process reports, its cause in words."""
    kind = getattr(errors, failed.error, EngineFault)
    error: HedgerowError = (kind if issubclass(kind, HedgerowError) else EngineFault)(failed.message)
    error.__cause__ = RuntimeError(failed.cause)
    return error
