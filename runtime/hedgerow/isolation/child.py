"""The process that a model lives in, and how tensors reach it. Started and talked to by `session`.

``python -m hedgerow.isolation.child THREADS LIMIT_BYTES ENGINE FILE LANE...``; a lane is two descriptors,
``SOCKET:MEMORY``. It carries one run at a time:

- a socket that keeps messages apart, for small messages (msgpack): `Run` one way, `Opened`, `Answer` and `Failed` the
  other;
- memory that both processes map, for the tensors. Inputs lie at its start, outputs behind them. Either side makes it
  larger when it must, up to a limit; the kernel lets nobody make it smaller, so that neither can pull pages away from
  under the other.

What comes over a lane is checked by whoever reads it: a process whose model has gone wild may write anything.
"""

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from hedgerow import engines
from hedgerow.errors import EngineFault, HedgerowError, InvalidInput
from hedgerow.tensors import TensorSpec, numpy_dtype

MAX_FRAME_BYTES = 128 * 1024
"""Of a message; Linux lets an ordinary socket carry somewhat more."""
FIRST_BYTES = 64 * 1024
"""Of a lane's memory at the start."""
KEPT_BYTES = 32 * 1024 * 1024
"""Of a lane's memory that stays with it in any case; what larger runs took goes back after one that needs little."""
ALIGNMENT = 64
"""Where tensors may start, in bytes: a cache line, and the widest vectors."""
KILL_FIRST = 500
"""How much rather the kernel, short of memory, should kill this process than the server (-1000 to 1000)."""
PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""

_TEXTS = msgspec.msgpack.Decoder(list[bytes])


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in a lane's memory: `size` bytes from `at` on."""

    name: str
    shape: tuple[int, ...]
    at: int
    size: int


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run the model on `inputs`."""

    inputs: list[Placed]
    outputs: list[str]
    free_from: int
    """Where outputs may be written."""


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is open and has this interface."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model has run."""

    outputs: list[Placed]


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """It could not be opened or run: an error of `hedgerow.errors` by name, its message, and its cause for the log."""

    error: str
    message: str
    cause: str


class Lane:
    """One end of a lane. Not for several threads at once."""

    def __init__(self, channel: socket.socket, memory: int, limit_bytes: int) -> None:
        self.channel = channel
        self._memory = memory
        self._limit_bytes = limit_bytes
        self._map = mmap.mmap(memory, FIRST_BYTES)
        self._resident = 0

    @classmethod
    def create(cls, limit_bytes: int) -> tuple[Self, socket.socket, int]:
        """A lane's near end, the socket of its far end and its memory. `limit_bytes` bounds the memory."""
        memory = os.memfd_create("hedgerow-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, FIRST_BYTES)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(near, memory, limit_bytes), far, memory

    def send(self, message: msgspec.Struct) -> None:
        """Send `message`; OSError if the other end is gone."""
        self.channel.send(msgspec.msgpack.encode(message))

    def receive(self) -> bytes:
        """The next message, empty if the other end is gone; TimeoutError as the socket's own time-out says."""
        try:
            return self.channel.recv(MAX_FRAME_BYTES)
        except ConnectionError:  # it went before it had read what we sent
            return b""

    def put(
        self, arrays: Mapping[str, NDArray[Any]], datatypes: Mapping[str, str], at: int = 0
    ) -> tuple[list[Placed], int]:
        """Write `arrays` from `at` on; where they lie now, and where free memory begins.

        Raises OverflowError if they take more than the limit, and TypeError if an array is not of its datatype.
        """
        placed, flat = [], []
        for name, array in arrays.items():
            dtype, source = numpy_dtype(datatypes[name]), array
            if datatypes[name] == "BYTES":
                dtype, source = np.dtype(np.uint8), np.frombuffer(msgspec.msgpack.encode(array.ravel().tolist()), "u1")
            placed.append(Placed(name, array.shape, at, source.size * dtype.itemsize))
            flat.append((dtype, source))
            at += -(-placed[-1].size // ALIGNMENT) * ALIGNMENT
        self._reach(at)
        for place, (dtype, source) in zip(placed, flat, strict=True):
            np.copyto(np.ndarray(source.shape, dtype, self._map, place.at), source, casting="equiv")
        return placed, at

    def get(self, placed: Sequence[Placed], datatypes: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        """The arrays that lie there: read-only views on the memory, until it is written to again.

        Raises ValueError, KeyError, TypeError or OverflowError if nothing of the kind can lie there.
        """
        arrays = {}
        for place in placed:
            # numpy would take negative offsets and shapes without a word.
            if min(place.at, place.size, *place.shape) < 0:
                raise ValueError(f"{place.name!r} cannot lie at {place.at} in the shape {place.shape}")
            self._reach(place.at + place.size)
            if datatypes[place.name] == "BYTES":
                with memoryview(self._map) as view:
                    texts = _TEXTS.decode(view[place.at : place.at + place.size])
                array: NDArray[Any] = np.empty(len(texts), object)
                array[:] = texts
                array = array.reshape(place.shape)
            else:
                dtype = numpy_dtype(datatypes[place.name])
                if place.size != math.prod(place.shape) * dtype.itemsize:
                    raise ValueError(f"{place.name!r} cannot have {place.size} bytes in the shape {place.shape}")
                array = np.ndarray(place.shape, dtype, self._map, place.at)
            array.flags.writeable = False
            arrays[place.name] = array
        return arrays

    def tidy(self, placed: Sequence[Placed]) -> None:
        """Give memory back if the run whose outputs are `placed` needed little of what larger ones took before.

        No view may be in use.
        """
        used = max((place.at + place.size for place in placed), default=0)
        if self._resident > max(KEPT_BYTES, 4 * used):
            self._map.madvise(mmap.MADV_REMOVE, KEPT_BYTES, len(self._map) - KEPT_BYTES)
            self._resident = KEPT_BYTES
        self._resident = max(self._resident, used)

    def close(self) -> None:
        """Let go of the descriptors and the memory."""
        self.channel.close()
        os.close(self._memory)
        with contextlib.suppress(BufferError):  # an error somewhere still holds a view, and the memory goes with it
            self._map.close()

    def _reach(self, size: int) -> None:
        """Have at least `size` bytes mapped."""
        if size > self._limit_bytes:
            raise OverflowError(f"the tensors of a run take {size} bytes, and {self._limit_bytes} are allowed")
        if size > len(self._map):
            if os.fstat(self._memory).st_size < size:
                os.ftruncate(self._memory, min(self._limit_bytes, max(size, 2 * len(self._map))))
            self._map = mmap.mmap(self._memory, min(self._limit_bytes, os.fstat(self._memory).st_size))


def main(arguments: Sequence[str]) -> None:
    """Open the model and run it until the other end of the lanes is gone. Does not return."""
    # In case the parent dies while the model hangs; where nothing hangs, the lanes end with it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(KILL_FIRST), encoding="ascii")
    threads, limit_bytes, engine, file, *descriptors = arguments
    lanes = [
        Lane(socket.socket(fileno=int(channel)), int(memory), int(limit_bytes))
        for channel, memory in (text.split(":") for text in descriptors)
    ]
    try:
        session = engines.load(engine).open_model(Path(file), streams=len(lanes), threads=int(threads))
    except Exception as error:  # noqa: BLE001 (handed over)
        lanes[0].send(_failed(error))
        os._exit(1)
    lanes[0].send(Opened(session.inputs, session.outputs))
    for lane in lanes[1:]:
        threading.Thread(target=_serve, args=(lane, session), daemon=True).start()
    _serve(lanes[0], session)


def _serve(lane: Lane, session: engines.Session) -> None:
    """Answer what comes over `lane`; ends the process when its other end is gone."""
    inputs = {spec.name: spec.datatype for spec in session.inputs}
    outputs = {spec.name: spec.datatype for spec in session.outputs}
    decoder = msgspec.msgpack.Decoder(Run)
    while message := lane.receive():
        run = decoder.decode(message)
        try:
            reply: Answer | Failed = _run(lane, session, run, inputs, outputs)
        except Exception as error:  # noqa: BLE001 (handed over)
            reply = _failed(error)
        lane.send(reply)
    os._exit(0)  # as the parent does not wait for it, neither should a destructor of the engine


def _run(
    lane: Lane, session: engines.Session, run: Run, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> Answer:
    try:
        given = lane.get(run.inputs, inputs)
    except msgspec.MsgspecError as error:
        raise InvalidInput("expected BYTES elements to be bytes") from error
    arrays = session.run(given, run.outputs)
    try:
        return Answer(lane.put({name: arrays[name] for name in run.outputs}, outputs, run.free_from)[0])
    except OverflowError as error:
        raise EngineFault(str(error)) from error


def _failed(error: Exception) -> Failed:
    if isinstance(error, HedgerowError):
        return Failed(type(error).__name__, str(error), repr(error.__cause__))
    traceback.print_exception(error)
    return Failed(EngineFault.__name__, f"the model failed with {type(error).__name__}", repr(error))


if __name__ == "__main__":
    main(sys.argv[1:])
