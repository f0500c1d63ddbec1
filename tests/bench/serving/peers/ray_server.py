"""Ray Serve behind its own gRPC proxy. The OIP stubs are Hedgerow's, because Ray brings none."""

# mypy: disable-error-code="import-not-found, misc, untyped-decorator, attr-defined"

import signal
from typing import Any

import numpy as np
import ray
from engine import Job, Model, read_job
from ray import serve
from ray.serve.config import gRPCOptions

from hedgerow.proto import oip_pb2


@serve.deployment(max_ongoing_requests=128)
class Served:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.engine = Model(job)

    def ModelInfer(self, request: Any) -> Any:  # noqa: N802 (the method's name on the wire)
        given = request.inputs[0]
        answer = self.engine(np.frombuffer(request.raw_input_contents[0], np.float32).reshape(given.shape))
        return oip_pb2.ModelInferResponse(
            model_name=request.model_name,
            id=request.id,
            outputs=[{"name": self.job.output, "datatype": "FP32", "shape": answer.shape}],
            raw_output_contents=[answer.tobytes()],
        )


if __name__ == "__main__":
    job = read_job()
    ray.init(address="local", num_cpus=job.workers + 1, include_dashboard=False, log_to_driver=False)
    serve.start(
        http_options={"host": "127.0.0.1", "port": job.other_ports[0]},
        grpc_options=gRPCOptions(
            port=job.port,
            grpc_servicer_functions=[
                "hedgerow.proto.oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
            ],
        ),
    )
    serve.run(Served.options(num_replicas=job.workers).bind(job), name="bench")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()
