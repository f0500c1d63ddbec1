"""Proving a staged model before it counts: its probe vectors, its latency and its memory, on this very hardware."""

import logging
import os
import statistics
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hedgerow.backend import Deadline
from hedgerow.errors import InvalidRelease, ProbeMismatch
from hedgerow.host.model_host import Staged
from hedgerow.release import Manifest
from hedgerow.tensors import InferRequest, Tensor, TensorSpec, tensor
from hedgerow_edge.slots import Held

PROVE_TIMEOUT_S = 120.0
"""For all probes together."""
MAX_PROBE_BYTES = 256 * 2**20
"""Of the probe arrays, unpacked."""
LATENCY_RUNS = 15
LATENCY_ROUNDS = 3
"""The best round counts: other load on the device only ever adds to what the model itself takes."""
_STATM = Path("/proc/self/statm")

Arrays = Mapping[str, NDArray[Any]]

_log = logging.getLogger(__name__)


async def prove(staged: Staged, held: Held, memory_before: int | None) -> None:
    """Return if `staged` reproduces the release's probe vectors within the manifest's limits.

    `memory_before` is `resident_bytes()` from before it was loaded. Raises `ProbeMismatch` or `InvalidRelease`.
    """
    manifest, deadline = held.manifest, Deadline.after(PROVE_TIMEOUT_S)
    if manifest.probes is not None:
        arrays = _read(held.folder / manifest.probes.file, manifest)
        inputs = {name.removeprefix("in."): array for name, array in arrays.items() if name.startswith("in.")}
        expected = {name.removeprefix("out."): array for name, array in arrays.items() if name.startswith("out.")}
        whole = _request(staged, inputs)
        if _fits(whole, staged.metadata.inputs):
            _compare(manifest, expected, await _answer(staged, whole, deadline))
        else:  # a model that takes one row at a time
            for row in range(min(len(array) for array in inputs.values())):
                got = await _answer(staged, _row(staged, inputs, row), deadline)
                _compare(manifest, {name: array[row : row + 1] for name, array in expected.items()}, got, f" {row}")
        await _check_latency(staged, manifest, inputs, deadline)
    _check_memory(manifest, memory_before)


def resident_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _read(file: Path, manifest: Manifest) -> Arrays:
    """The arrays of an .npz, none of which may be a pickle or unpack beyond all measure."""
    try:
        with zipfile.ZipFile(file) as archive:
            if (size := sum(entry.file_size for entry in archive.infolist())) > MAX_PROBE_BYTES:
                raise InvalidRelease(f"{manifest.name}: its probes unpack to {size} bytes; over {MAX_PROBE_BYTES}")
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InvalidRelease(f"{manifest.name}: its probes cannot be read: {error}") from error
    for prefix in ("in.", "out."):
        if not any(name.startswith(prefix) and array.ndim and len(array) for name, array in found.items()):
            raise InvalidRelease(f'{manifest.name}: its probes hold no array named "{prefix}<tensor>" with rows')
    return found


def _request(staged: Staged, inputs: Arrays) -> InferRequest:
    datatypes = {spec.name: spec.datatype for spec in staged.metadata.inputs}
    tensors = (tensor(name, array, datatypes.get(name, "")) for name, array in inputs.items())
    return InferRequest(model=staged.file.model, inputs=tuple(tensors))


def _row(staged: Staged, inputs: Arrays, row: int) -> InferRequest:
    return _request(staged, {name: array[row : row + 1] for name, array in inputs.items()})


def _fits(request: InferRequest, specs: tuple[TensorSpec, ...]) -> bool:
    """Whether the sizes of the whole arrays are what the model takes; what else is wrong the model will say."""
    shapes = {spec.name: spec.shape for spec in specs}
    return all(_fits_shape(one, shapes.get(one.name, one.shape)) for one in request.inputs)


def _fits_shape(one: Tensor, shape: tuple[int, ...]) -> bool:
    return len(shape) != len(one.shape) or all(want in {-1, got} for want, got in zip(shape, one.shape, strict=True))


async def _answer(staged: Staged, request: InferRequest, deadline: Deadline) -> Arrays:
    response = await staged.infer(request, deadline)
    return {output.name: output.array for output in response.outputs}


def _compare(manifest: Manifest, expected: Arrays, got: Arrays, which: str = "") -> None:
    assert manifest.probes is not None
    for name, want in expected.items():
        have = got.get(name)
        problem = ""
        if have is None:
            problem = "the model has no such output"
        elif have.shape != want.shape:
            problem = f"shape {list(have.shape)}, expected {list(want.shape)}"
        elif want.dtype.kind not in "fiub":  # text is the same or it is not
            problem = "" if [_text(item) for item in have.flat] == [_text(item) for item in want.flat] else "other text"
        elif not np.allclose(have, want, atol=manifest.probes.atol, rtol=manifest.probes.rtol):
            off = float(np.max(np.abs(have.astype(np.float64) - want.astype(np.float64))))
            problem = (
                f"off by up to {off:.3g}, allowed are {manifest.probes.atol:g} + {manifest.probes.rtol:g} relative"
            )
        if problem:
            raise ProbeMismatch(
                f"{manifest.name} does not reproduce its probes{which} here: output {name!r}: {problem}"
            )


def _text(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)


async def _check_latency(staged: Staged, manifest: Manifest, inputs: Arrays, deadline: Deadline) -> None:
    """Hold the median time of one row, or of the whole where the model takes no single rows, against the limit."""
    limit_ms = manifest.limits.latency_ms
    if limit_ms is None:
        return
    request = _row(staged, inputs, 0)
    if not _fits(request, staged.metadata.inputs):
        request = _request(staged, inputs)
    best_ms = float("inf")
    for _ in range(LATENCY_ROUNDS):
        times_s = []
        for _ in range(LATENCY_RUNS):
            started = time.perf_counter()
            await staged.infer(request, deadline)
            times_s.append(time.perf_counter() - started)
        best_ms = min(best_ms, 1000 * statistics.median(times_s))
        if best_ms <= limit_ms:
            return
    raise ProbeMismatch(f"{manifest.name} takes {best_ms:.1f} ms for a probe here, allowed are {limit_ms:g} ms")


def _check_memory(manifest: Manifest, before: int | None) -> None:
    """Hold what the process grew by against the limit."""
    limit_mb, now = manifest.limits.memory_mb, resident_bytes()
    if limit_mb is None:
        return
    if before is None or now is None:
        _log.warning("%s: this system does not tell its memory, so its limit is not checked", manifest.name)
    elif (grown_mb := (now - before) / 1e6) > limit_mb:
        raise ProbeMismatch(f"{manifest.name} takes {grown_mb:.1f} MB of memory here, allowed are {limit_mb:g} MB")
