"""Models in processes of their own: one that crashes, hangs or eats memory takes nobody with it.

`open_isolated` gives an engine's session whose model runs in a child process (`child`). The rules:

- a run that crashes the process, or takes longer than `run_timeout_s`, is an `EngineFault`, and so are the others that
  were running in it; nothing is run twice;
- a process that uses more than `max_memory_bytes` is killed: right after the run where that shows, or in the middle of
  a long one;
- a process that has ended is started again as `restarts` says, and runs the model on zeros, in the shapes of the last
  run that was answered, before it takes runs: the first of them must not pay for what engines put off until then.
  Meanwhile runs are refused with `ModelNotReady` at once, because a thread that waited would be missing to other
  models; once it was given up, with `EngineFault`;
- no process outlives this one, whatever happens to it.

A model has one process, with a thread for each of its streams. A process for each stream would answer models that take
microseconds 2.5 times as fast (nobody waits for another's interpreter), but a model of 100 MB took 290 MiB instead of
159 and answered 1.5 times more slowly, its weights being twice in the caches; memory is what devices have least of.
"""

import logging
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.errors import EngineFault, HedgerowError, ModelNotReady
from hedgerow.isolation.child import Lane
from hedgerow.isolation.process import EXIT_S, IsolationSettings, Lost, ModelProcess
from hedgerow.restarts import Restarts
from hedgerow.tensors import TensorSpec, numpy_dtype

__all__ = ["IsolatedSession", "IsolationSettings", "open_isolated"]

COMMAND = (sys.executable, "-m", "hedgerow.isolation.child")
"""What starts a model's process."""

log = logging.getLogger(__name__)


class IsolatedSession:
    """A model file in a process of its own: an engine's session (`hedgerow.engines.Session`)."""

    def __init__(self, name: str, command: Sequence[str], streams: int, settings: IsolationSettings) -> None:
        self.inputs: tuple[TensorSpec, ...] = ()
        self.outputs: tuple[TensorSpec, ...] = ()
        self._datatypes: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self._name = name
        self._command = command
        self._streams = streams
        self._settings = settings
        self._restarts = Restarts(settings.restarts)
        self._changed = threading.Condition()
        self._child: ModelProcess | None = None
        self._ready = False
        self._loaded = False
        self._closed = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        """By input, of the last run that was answered; empty: do not warm."""
        self._start_at = 0.0
        self._start_s = 0.0
        """What a start takes: the last one."""
        self._why = ""  # in words: the error itself would hold on to the lane that it came over
        self._never_ran: Exception | None = None
        # All processes are started by one thread that stays: to the kernel, their parent is the thread and not we.
        self._keeper = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)

    def open(self) -> None:
        """Start the process and load the model; raises what the engine says, `EngineFault` if the process fails."""
        self._keeper.start()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed)
            problem, self._never_ran = self._never_ran, None
        if isinstance(problem, HedgerowError):
            raise problem
        if problem is not None:
            raise EngineFault(f"{self._name} cannot be loaded: {problem}") from problem

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """See `hedgerow.engines.Session`. Raises `ModelNotReady` while the process is being started again."""
        child, lane = self._take()
        try:
            arrays = child.run(lane, inputs, outputs, self._datatypes)
            self._shapes = {name: array.shape for name, array in inputs.items()}
        except HedgerowError:
            raise
        except Lost as lost:
            self._lose(child, lost)
            raise EngineFault(f"{self._name}: {lost}") from lost
        except BaseException:  # whoever ran next would get the answer that is still to come
            self._lose(child, Lost("a run was broken off"))
            raise
        finally:
            self._give_back(child, lane)
        try:
            child.look(now=time.monotonic())
        except Lost as lost:
            self._lose(child, lost)
        return arrays

    def close(self) -> None:
        """See `hedgerow.engines.Session`."""
        with self._changed:
            self._closed = True
            child, self._child = self._child, None
            self._changed.notify_all()
        if child is not None:
            self._discard(child, "it was closed")
        if threading.current_thread() is not self._keeper:
            self._keeper.join(EXIT_S)

    def _take(self) -> tuple[ModelProcess, Lane]:
        """A lane for one run."""
        with self._changed:
            while self._child is not None and self._ready and not self._child.idle:
                self._changed.wait()
            if self._closed:
                raise ModelNotReady(f"{self._name} is closed")
            if self._child is not None and self._ready:
                return self._child, self._child.idle.pop()
            wait_s = max(0.0, self._start_at + self._start_s - time.monotonic())
            if self._restarts.given_up:
                raise EngineFault(f"{self._name} keeps failing: {self._why}", retry_after_s=wait_s)
            raise ModelNotReady(f"{self._name} is being started again: {self._why}", retry_after_s=wait_s)

    def _give_back(self, child: ModelProcess, lane: Lane) -> None:
        with self._changed:
            if child is self._child:
                child.idle.append(lane)
                self._changed.notify()
                return
        lane.close()

    def _lose(self, child: ModelProcess | None, why: Exception) -> None:
        """Have `child` (None: it could not even be started) replaced, if that is not done yet."""
        with self._changed:
            if child is not self._child:
                return
            now = time.monotonic()
            self._child, self._why = None, str(why)
            self._start_at = self._restarts.ended(now)
            if not self._loaded:  # then it is not tried again: `open` raises
                self._closed, self._never_ran = True, why
            self._changed.notify_all()
        if child is not None:
            self._discard(child, str(why))
        if not self._closed:
            doing = "it keeps failing and is left alone" if self._restarts.given_up else "it is started again"
            log.warning("%s: %s; %s in %.1f s", self._name, why, doing, self._start_at - now)

    def _discard(self, child: ModelProcess, why: str) -> None:
        """End `child`, which nobody can take any more; the lanes in use are closed by those who use them."""
        child.kill(why)
        for lane in child.idle:
            lane.close()

    def _keep(self) -> None:
        """On the keeper's thread: start the process whenever there is none."""
        # Children inherit this: a terminal's Ctrl-C and a service manager's SIGTERM are for the server, which drains.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        while True:
            with self._changed:
                while not self._closed and (self._child is not None or self._start_at > time.monotonic()):
                    self._changed.wait(None if self._child else self._start_at - time.monotonic())
                if self._closed:
                    return
                self._ready = False
                problem: Lost | None = None
                try:
                    child = ModelProcess(self._name, self._command, self._streams, self._settings, self._ended)
                except (OSError, RuntimeError) as error:  # no descriptors, no memory, no more threads
                    problem = Lost(f"its process cannot be started: {error}")
                else:
                    self._child, lane = child, child.idle.pop(0)  # the first, over which it speaks up
            if problem is None:
                self._start(child, lane)
            else:
                self._lose(None, problem)

    def _start(self, child: ModelProcess, lane: Lane) -> None:
        """Wait until the model is open in `child`."""
        started = time.monotonic()
        try:
            opened = child.opened(lane)
            if self._loaded and (opened.inputs, opened.outputs) != (self.inputs, self.outputs):
                raise Lost("its file is another one now")  # noqa: TRY301 (a failed start like the others)
            self._warm(child, lane)
        except (Lost, HedgerowError) as error:
            self._lose(child, error)
            return
        finally:
            self._give_back(child, lane)
        with self._changed:
            if child is not self._child:
                return
            self.inputs, self.outputs = opened.inputs, opened.outputs
            self._datatypes = (_datatypes(opened.inputs), _datatypes(opened.outputs))
            if self._loaded:
                log.info("%s: its process runs again", self._name)
            self._start_s = time.monotonic() - started
            self._loaded = self._ready = True
            self._restarts.started()
            self._changed.notify_all()

    def _warm(self, child: ModelProcess, lane: Lane) -> None:
        """Run the model in `child` as it was last run; raises `Lost` if that ends it: the next one starts cold."""
        shapes, self._shapes = self._shapes, {}
        if not shapes:
            return
        zeros = {
            spec.name: np.full(shapes[spec.name], b"" if spec.datatype == "BYTES" else 0, numpy_dtype(spec.datatype))
            for spec in self.inputs
        }
        try:
            child.run(lane, zeros, [spec.name for spec in self.outputs], self._datatypes)
        except HedgerowError as error:
            log.info("%s: warming its process failed, so it starts cold: %s", self._name, error)
        self._shapes = shapes

    def _ended(self, child: ModelProcess) -> None:
        """On a thread of its own: the process of `child` is gone."""
        self._lose(child, Lost(child.ending()))


def open_isolated(
    engine: str,
    path: Path,
    *,
    streams: int,
    threads: int,
    name: str = "",
    settings: IsolationSettings | None = None,
    command: Sequence[str] = COMMAND,
) -> IsolatedSession:
    """As `hedgerow.engines.Engine.open_model` of the engine called `engine`, in a process of its own.

    `name` is what the log and the errors call the model, by default its file's name. `command` starts
    `child`, which gets its arguments behind it: a place for a wrapper such as ``nice`` that execs.
    """
    settings = settings or IsolationSettings()
    arguments = (*command, str(threads), str(settings.max_tensor_bytes), engine, str(path.absolute()))
    session = IsolatedSession(name or path.name, arguments, streams, settings)
    try:
        session.open()
    except BaseException:
        session.close()
        raise
    return session


def _datatypes(specs: Sequence[TensorSpec]) -> dict[str, str]:
    return {spec.name: spec.datatype for spec in specs}
