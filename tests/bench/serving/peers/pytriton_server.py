"""PyTriton: Python callables bound into the tritonserver of its wheel, with its dynamic batching."""

# mypy: disable-error-code="import-not-found, misc, untyped-decorator"

from typing import Any

import numpy as np
from engine import Job, Model, read_job
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MAX_BATCH = 32


def callable_of(job: Job) -> Any:
    engine = Model(job)

    @batch
    def infer(**inputs: Any) -> dict[str, Any]:
        return {job.output: engine(inputs[job.input])}

    return infer


if __name__ == "__main__":
    job = read_job()
    http_port, metrics_port = job.other_ports[:2]
    config = TritonConfig(
        grpc_address="127.0.0.1",
        grpc_port=job.port,
        http_address="127.0.0.1",
        http_port=http_port,
        metrics_port=metrics_port,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name=job.model,
            infer_func=[callable_of(job) for _ in range(job.workers)],
            inputs=[Tensor(name=job.input, dtype=np.float32, shape=tuple(job.input_shape[1:]))],
            outputs=[Tensor(name=job.output, dtype=np.float32, shape=tuple(job.output_shape[1:]))],
            config=ModelConfig(max_batch_size=MAX_BATCH),
        )
        triton.serve()
