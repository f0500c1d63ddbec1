"""The model of a Triton with the Python backend: what arrives together is run as one batch."""

# mypy: disable-error-code="import-not-found, misc"

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as utils
from engine import Model, read_job


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.job = read_job(Path(args["model_repository"]).parent.parent)
        self.engine = Model(self.job)

    def execute(self, requests: list[Any]) -> list[Any]:
        arrays = [utils.get_input_tensor_by_name(request, self.job.input).as_numpy() for request in requests]
        if len(arrays) == 1:
            answers = [self.engine(arrays[0])]
        else:
            ends = np.cumsum([len(array) for array in arrays])[:-1]
            answers = np.split(self.engine(np.concatenate(arrays)), ends)
        return [utils.InferenceResponse([utils.Tensor(self.job.output, answer)]) for answer in answers]
