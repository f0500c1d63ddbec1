"""What is soaked: an agent with router, gate, metrics and model control, and a second one as the cloud behind it."""

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from bench.serving.servers import _free_ports
from bench.serving.wire import HOST
from onnx import TensorProto, helper
from simulators.agents import Agent
from simulators.models import classifier, save

MODEL, LARGE, SPARE = "tiny", "large", "spare"
TOKEN = "soak"
THRESHOLD = 0.5
SURE, OTHER_SURE, CLOUD_SURE = 8.0, 9.0, 80.0
"""How the logits are scaled: the device's model, what it is swapped with, and the cloud's, which is sure of more."""
LARGE_ELEMENTS = 2**18
"""Of float32: 1 MB."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The two agents, and the folder with the models."""

    folder: Path
    agent: Agent
    cloud: Agent

    @classmethod
    def prepare(cls, folder: Path) -> "Stage":
        """Models and settings in `folder`; nothing runs yet."""
        shutil.rmtree(folder, ignore_errors=True)
        models = folder / "models"
        models.mkdir(parents=True)
        (cloud_port,) = _free_ports(1)
        stage = cls(
            folder,
            Agent(
                folder / "agent",
                {
                    "device": {"id": "soak"},
                    "server": {"port": 0, "model_control": True, "control_token": TOKEN},
                    "cloud": {"target": f"{HOST}:{cloud_port}"},
                    "models": {
                        MODEL: {"path": str(models / "tiny.onnx"), "gate": {"threshold": THRESHOLD}},
                        LARGE: {"path": str(models / "large.onnx")},
                        SPARE: {"path": str(models / "spare.onnx"), "gate": {"threshold": 0.0}},
                    },
                },
            ),
            Agent(
                folder / "cloud",
                {
                    "device": {"id": "soak-cloud"},
                    "server": {"port": cloud_port},
                    "models": {
                        MODEL: {"path": str(models / "cloud.onnx")},
                        LARGE: {"path": str(models / "large.onnx")},
                    },
                },
            ),
        )
        classifier(models / "cloud.onnx", sure=CLOUD_SURE)
        classifier(models / "spare.onnx", sure=SURE)
        save(
            models / "large.onnx",
            [helper.make_node("Identity", ["x"], ["y"])],
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LARGE_ELEMENTS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", LARGE_ELEMENTS])],
        )
        stage.write_model(SURE)
        return stage

    @property
    def metrics(self) -> tuple[str, int]:
        """Where the agent's metrics are."""
        host, _, port = (self.agent.state / "metrics-address").read_text().strip().rpartition(":")
        return host, int(port)

    def write_model(self, sure: float) -> None:
        """The file of the device's model, in one step."""
        new = classifier(self.folder / "models" / "new.onnx", sure=sure)
        new.replace(self.folder / "models" / "tiny.onnx")

    async def kill_cloud(self) -> None:
        """As if the machine had lost its power."""
        self.cloud.process.send_signal(signal.SIGKILL)
        await self.cloud.ended()

    def log_bytes(self) -> int:
        """What the agent has logged so far."""
        return (self.agent.folder / "log").stat().st_size
