"""BentoML over HTTP, with the bodies of `litserve_server`."""

# mypy: disable-error-code="import-not-found, misc, untyped-decorator"

import base64

import bentoml
import numpy as np
from engine import Model, read_job

job = read_job()


@bentoml.service(name="bench", workers=job.workers, logging={"access": {"enabled": False}})
class Served:
    def __init__(self) -> None:
        self.engine = Model(job)

    @bentoml.api(route="/predict")
    def predict(self, data: str) -> dict[str, str]:
        array = np.frombuffer(base64.b64decode(data), np.float32).reshape(job.input_shape)
        return {"data": base64.b64encode(self.engine(array).tobytes()).decode()}
