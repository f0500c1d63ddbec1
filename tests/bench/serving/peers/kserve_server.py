"""KServe's Python server, its gRPC side."""

# mypy: disable-error-code="import-not-found, misc"

import asyncio
import logging
from typing import Any

import kserve
from engine import Model, read_job

job = read_job()


class Served(kserve.Model):
    def __init__(self) -> None:
        super().__init__(job.model)
        self.engine = Model(job)
        self.ready = True

    async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        array = payload.inputs[0].as_numpy()
        if job.threaded:
            answer = await asyncio.get_running_loop().run_in_executor(self.engine.pool, self.engine, array)
        else:
            answer = self.engine(array)
        output = kserve.InferOutput(job.output, list(answer.shape), "FP32")
        output.set_data_from_numpy(answer, binary_data=True)
        return kserve.InferResponse(payload.id, job.model, [output])


if __name__ == "__main__":
    logging.getLogger("kserve").setLevel(logging.WARNING)  # it says a line a request
    kserve.ModelServer(
        http_port=job.other_ports[0], grpc_port=job.port, workers=1, access_log_format="", enable_latency_logging=False
    ).start([Served()])
