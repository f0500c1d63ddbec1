"""What every peer runs: the same model by the same engine with the same options. Stands alone: peers' venvs import it.

A peer's job is in `bench.json` in its working folder; see `Job`. It is written by `bench.serving.servers`.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

JOB_FILE = "bench.json"


@dataclass(frozen=True, slots=True)
class Job:
    """A model to serve, and where.

    `threads`: of the engine, for one request. `workers`: requests that should run at the same time, as processes or
    threads, whichever the peer has; 1: the model takes microseconds, so it is best run where the request is.
    """

    model: str
    path: str
    input: str
    output: str
    input_shape: list[int]
    output_shape: list[int]
    threads: int
    workers: int
    port: int
    other_ports: list[int]
    upstream: str = ""

    @property
    def threaded(self) -> bool:
        """Whether to run the model off the event loop."""
        return self.workers > 1


def read_job(folder: Path | None = None) -> Job:
    """The job of this process."""
    return Job(**json.loads(((folder or Path()) / JOB_FILE).read_text()))


class Model:
    """The model of `job`: one float32 array in, one out, both with the batch first."""

    def __init__(self, job: Job) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = job.threads
        self._session = onnxruntime.InferenceSession(job.path, options, providers=["CPUExecutionProvider"])
        self._input, self._output = job.input, [job.output]
        self.pool = ThreadPoolExecutor(job.workers)
        """For the peers that run it off their event loop."""

    def __call__(self, array: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[np.float32]]":
        return self._session.run(self._output, {self._input: array})[0]  # type: ignore[no-any-return]
