"""A model's process whose model does what its input says: crash, hang, eat memory. ``COMMAND`` starts it.

The model takes `do` (BYTES, a word and its argument) and `x` (INT64, any size), and gives `y`: `x`, unless told else.
A file whose text is a word is a model that does that when it is opened, and a second line one that does that when it
is closed.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow import engines
from hedgerow.errors import EngineFault, InvalidInput
from hedgerow.isolation import child as isolated
from hedgerow.tensors import TensorSpec

COMMAND = (sys.executable, __file__)
TWO = threading.Barrier(2)
EATEN: list[bytes] = []
SEEN: list[int] = []
"""The sizes of `x` in all runs so far."""
WITHOUT_WORD = {13: "crash", 14: "raise"}
"""What the model does when it is told nothing, by the size of `x`; else nothing."""


class Puppet:
    inputs = (TensorSpec("do", "BYTES", (1,)), TensorSpec("x", "INT64", (-1,)))
    outputs = (TensorSpec("y", "INT64", (-1,)),)

    def __init__(self, at_close: str = "") -> None:
        self._at_close = at_close

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        SEEN.append(inputs["x"].size)
        y = do(inputs["do"][0].decode() or WITHOUT_WORD.get(inputs["x"].size, "open"))
        return {"y": inputs["x"] if y is None else y}

    def close(self) -> None:
        do(self._at_close)


def do(line: str) -> NDArray[Any] | None:
    """What `line` says."""
    word, _, argument = line.partition(" ")
    match word:
        case "pid":
            return np.array([os.getpid()])
        case "descriptors":
            return np.array([len(list(Path("/proc/self/fd").iterdir()))])
        case "crash":
            ctypes.string_at(0)
        case "exit":
            os._exit(int(argument))
        case "hang":  # as an engine does that never comes back to Python, interpreter lock and all
            Path(argument).touch()
            ctypes.PyDLL(None).pause()
        case "wait":  # as an engine does that hangs and lets others run, until there is such a file
            while not Path(argument).exists():
                time.sleep(0.01)
        case "touch":
            Path(argument).touch()
        case "seen":
            return np.array(SEEN)
        case "eat":
            EATEN.append(b"\1" * int(argument))
        case "eat-on":
            while True:
                EATEN.append(b"\1" * int(argument))
                time.sleep(0.01)
        case "meet":
            TWO.wait(60)
        case "say":
            sys.stderr.write(argument + "\n")
            sys.stderr.flush()
        case "babble":
            os.write(2, (argument + "\n").encode() * 10_000)
        case "grow":
            return np.zeros(int(argument), np.int64)
        case "wrong-type":
            return np.zeros(1, np.float32)
        case "raise":
            raise RuntimeError("a secret")
        case "refuse":
            raise InvalidInput("not like this")
        case "garbage":  # over every socket that it has, as a process whose memory is spoilt may
            for descriptor in range(3, 32):
                try:
                    if Path(f"/proc/self/fd/{descriptor}").is_socket():
                        os.write(descriptor, b"\xff" * 100)
                except OSError:
                    continue
        case "open" | "":
            pass
        case _:
            raise EngineFault(f"the puppet does not know {word!r}")
    return None


PACKAGE = "numpy"
EXTRA = "dev"
PLATFORM = "puppet"


def open_model(path: Path, *, streams: int, threads: int) -> Puppet:
    """A puppet, if it can be opened."""
    at_open, _, at_close = path.read_text(encoding="utf-8").partition("\n")
    do(at_open)
    return Puppet(at_close)


if __name__ == "__main__":
    setattr(engines, "load", lambda name: sys.modules["__main__"])  # noqa: B010 (mypy minds the plain assignment)
    isolated.main(sys.argv[1:])
