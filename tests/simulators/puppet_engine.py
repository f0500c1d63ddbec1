"""A model's process whose model does what its input says: crash, hang, eat memory. ``COMMAND`` starts it.

The model takes `do` (BYTES, a word and its argument) and `x` (INT64, any size), and gives `y`: `x`, unless told else.
A file whose text is a word is a model that does that when it is opened.
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


class Puppet:
    inputs = (TensorSpec("do", "BYTES", (1,)), TensorSpec("x", "INT64", (-1,)))
    outputs = (TensorSpec("y", "INT64", (-1,)),)

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        y = do(inputs["do"][0].decode())
        return {"y": inputs["x"] if y is None else y}

    def close(self) -> None:
        """Nothing to free."""


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
        case "open":
            pass
        case _:
            raise EngineFault(f"the puppet does not know {word!r}")
    return None


PACKAGE = "numpy"
EXTRA = "dev"
PLATFORM = "puppet"


def open_model(path: Path, *, streams: int, threads: int) -> Puppet:
    """A puppet, if it can be opened."""
    do(path.read_text(encoding="utf-8"))
    return Puppet()


if __name__ == "__main__":
    setattr(engines, "load", lambda name: sys.modules["__main__"])  # noqa: B010 (mypy minds the plain assignment)
    isolated.main(sys.argv[1:])
