"""Two models on the same calibration inputs: files that run here, or a large one behind any OIP server.

::

    calibration.npz    an array for each input of the models, by its name, first dimension n; `labels` where there are
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from hedgerow import engines
from hedgerow.client import Client
from hedgerow.errors import InvalidInput

LABELS: Final = "labels"
SCHEME: Final = "grpc://"
BATCH_ROWS: Final = 32
"""Rows that a model is asked at once, where it takes batches."""
TIMEOUT_S: Final = 60.0
"""For each of them."""

Arrays = Mapping[str, NDArray[Any]]
Advance = Callable[[int, int], None]
"""Told how many samples were answered, of how many."""


@dataclass(frozen=True, slots=True)
class Data:
    """The calibration set: `inputs` by name, each of shape (n, ...), `labels` of shape (n,), and the file's digest."""

    inputs: Arrays
    labels: NDArray[np.integer[Any]] | None
    sha256: str

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model gave, output by output, and what it says of itself; empty where it does not say."""

    outputs: Arrays
    sha256: str
    engine: str
    precision: str

    def output(self, name: str) -> NDArray[Any]:
        """By name, or the only one there is; raises `InvalidInput` naming those there are."""
        if not name and len(self.outputs) == 1:
            return next(iter(self.outputs.values()))
        if name not in self.outputs:
            there = ", ".join(self.outputs)
            raise InvalidInput(f"the model has no output {name!r}; it has: {there}" if name else f"which of {there}?")
        return self.outputs[name]


def load(path: Path) -> Data:
    """The calibration set at `path`; raises `InvalidInput` if it is none."""
    try:
        content = path.read_bytes()
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, BadZipFile, EOFError, AttributeError) as error:
        raise InvalidInput(f"{path} cannot be read as an archive of arrays (numpy.savez): {error}") from error
    labels = arrays.pop(LABELS, None)
    sizes = {name: array.shape[:1] for name, array in arrays.items()}
    if not arrays or len(set(sizes.values())) != 1 or not all(sizes.values()):
        said = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items()) or "nothing"
        raise InvalidInput(f"{path}: expected inputs that all have the same number of samples first, found {said}")
    if labels is not None and (labels.dtype.kind not in "iu" or (labels.shape,) != (next(iter(sizes.values())),)):
        raise InvalidInput(f"{path}: {LABELS} must be integers, one a sample, not {labels.dtype} {list(labels.shape)}")
    return Data(arrays, labels, hashlib.sha256(content).hexdigest())


def of_file(path: Path, engine: str, precision: str, data: Data, advance: Advance) -> Answers:
    """What the model at `path` gives by `engine` on this machine; raises what the engine raises."""
    session = engines.load(engine).open_model(path, streams=1, threads=0)
    try:
        wanted = {spec.name for spec in session.inputs}
        _check_inputs(data, wanted, str(path))
        names = [spec.name for spec in session.outputs]
        whole = all(spec.shape[:1] == (-1,) for spec in session.inputs)
        parts = [session.run(part, names) for part in _parts(data, BATCH_ROWS if whole else 1, advance)]
    finally:
        session.close()
    return Answers(_joined(parts), hashlib.sha256(path.read_bytes()).hexdigest(), engine, precision)


def of_server(target: str, data: Data, advance: Advance) -> Answers:
    """What the model at ``grpc://HOST:PORT/MODEL`` gives; raises the errors of `hedgerow.client`."""
    address, _, model = target.removeprefix(SCHEME).partition("/")
    if not address or not model:
        raise InvalidInput(f"{target}: expected {SCHEME}HOST:PORT/MODEL")
    with Client(address, timeout_s=TIMEOUT_S) as client:
        metadata = client.metadata(model)
        _check_inputs(data, {spec.name for spec in metadata.inputs}, target)
        whole = all(spec.shape[:1] == (-1,) for spec in metadata.inputs)
        parts = [client.infer(model, part).outputs for part in _parts(data, BATCH_ROWS if whole else 1, advance)]
    said = metadata.properties
    return Answers(_joined(parts), said.get("sha256", ""), said.get("engine", ""), said.get("precision", ""))


def _check_inputs(data: Data, wanted: set[str], model: str) -> None:
    if data.inputs.keys() != wanted:
        raise InvalidInput(
            f"{model} takes {', '.join(sorted(wanted))}; the calibration set has {', '.join(sorted(data.inputs))}"
        )


def _parts(data: Data, rows: int, advance: Advance) -> Iterator[dict[str, NDArray[Any]]]:
    for start in range(0, len(data), rows):
        yield {name: array[start : start + rows] for name, array in data.inputs.items()}
        advance(min(start + rows, len(data)), len(data))


def _joined(parts: list[Any]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
