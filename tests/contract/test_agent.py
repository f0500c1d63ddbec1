"""A device's daemon with a model file of its own, in a process of its own, under the OIP contract."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from contract.oip import OipContract, Target, triton_inputs
from numpy.typing import NDArray
from simulators import agents, models
from simulators.agents import Agent
from simulators.background import in_background

from hedgerow.parameters import DEGRADED, RELEASE, TIER

MODEL = "digits"
CLASSES = (3, 5, 8)
MAX_MESSAGE_BYTES = 2**20


def inputs() -> Mapping[str, NDArray[Any]]:
    return {"pixels": models.pixels(*CLASSES)}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("device")
    models.classifier(folder / "student.onnx", sure=20.0, extra=True)
    settings = {
        "server": {"port": 0, "max_message_bytes": MAX_MESSAGE_BYTES},
        "models": {MODEL: {"path": "student.onnx", "gate": {"output": "logits", "threshold": 0.9}}},
    }
    with in_background(lambda: agents.running(Agent(folder, settings))) as running:
        yield running
        # What callers got wrong is no fault of the device and must not look like one in its log.
        assert running.process.returncode is None
        assert " ERROR " not in running.log
        assert "Traceback" not in running.log


class TestAgent(OipContract):
    @pytest.fixture
    def target(self, agent: Agent) -> Target:
        return Target(agent.address, MODEL, inputs, MAX_MESSAGE_BYTES)

    def test_the_answers_are_the_devices_own_and_right(self, client: Any, target: Target) -> None:
        result = client.infer(target.model, triton_inputs(target))
        assert tuple(result.as_numpy("label")) == CLASSES
        parameters = result.get_response().parameters
        assert parameters[TIER].string_param == "edge"
        assert parameters[RELEASE].string_param == "digits/1"
        assert not parameters[DEGRADED].bool_param
