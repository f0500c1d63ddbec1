"""LitServe over HTTP. Arrays travel as base64 of their bytes in JSON, which is the cheapest that it takes."""

# mypy: disable-error-code="import-not-found, misc"

import base64
from typing import Any

import litserve
import numpy as np
from engine import Model, read_job

job = read_job()


class Served(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.engine = Model(job)

    def decode_request(self, request: dict[str, str]) -> Any:
        return np.frombuffer(base64.b64decode(request["data"]), np.float32).reshape(job.input_shape)

    def predict(self, x: Any) -> Any:
        return self.engine(x)

    def encode_response(self, output: Any) -> dict[str, str]:
        return {"data": base64.b64encode(output.tobytes()).decode()}


if __name__ == "__main__":
    server = litserve.LitServer(Served(api_path="/predict"), accelerator="cpu", workers_per_device=job.workers)
    server.run(host="127.0.0.1", port=job.port, generate_client_file=False, log_level="warning")
