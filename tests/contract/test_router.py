"""The router under the OIP contract, with a device's host on one side and a cloud over gRPC on the other.

Whoever answers, and on whatever way, the caller must not be able to tell from anything but the parameters.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contract.oip import OipContract, Target, triton_inputs
from numpy.typing import NDArray
from simulators import cloud, models
from simulators.background import in_background
from simulators.cloud import Cloud

from hedgerow.config import ServerSettings
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.journey import Route
from hedgerow.parameters import DEGRADED, TIER
from hedgerow.remote.backend import RemoteBackend
from hedgerow.router import Router
from hedgerow.server import Server

MODEL = "digits"
CLASSES = (3, 5, 8)
ALL_PASS, NONE_PASSES = 0.0, 1.1
"""Thresholds."""
MAX_MESSAGE_BYTES = 2**20


def inputs() -> Mapping[str, NDArray[Any]]:
    return {"pixels": models.pixels(*CLASSES)}


@dataclass(frozen=True)
class Site:
    """A router that serves at `address`, and the cloud behind it."""

    address: str
    cloud: Cloud


@asynccontextmanager
async def running(folder: Path, *, student: bool, threshold: float) -> AsyncIterator[Site]:
    """A router over a host, with a `student` or empty, and a cloud that knows the model by another name."""
    async with AsyncExitStack() as stack:
        host = ModelHost(HostSettings(workers=1))
        stack.push_async_callback(host.close)
        if student:
            path = models.classifier(folder / "student.onnx", extra=True)
            await host.load_file(ModelFile(MODEL, "1", path))
        behind = await stack.enter_async_context(Cloud())
        remote = await stack.enter_async_context(RemoteBackend("cloud", behind.target))
        router = Router({MODEL: Route(model=MODEL, edge=host, cloud=remote, cloud_model=cloud.MODEL)})
        router.set_gate(MODEL, "1", Gate(threshold=threshold), None)
        settings = ServerSettings(port=0, max_message_bytes=MAX_MESSAGE_BYTES)
        server = await stack.enter_async_context(Server(router, settings))
        yield Site(server.address, behind)


@pytest.fixture(scope="class")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """What the test class describes."""
    kind, folder = request.cls, tmp_path_factory.mktemp("site")
    with in_background(lambda: running(folder, student=kind.student, threshold=kind.threshold)) as site:
        yield site


class RouterContract(OipContract):
    """The contract, and that the answers come from where the subclass says."""

    student: bool
    threshold: float
    tier: str

    @pytest.fixture
    def target(self, site: Site) -> Target:
        return Target(site.address, MODEL, inputs, MAX_MESSAGE_BYTES)

    def test_the_answers_come_from_where_they_should(self, client: Any, target: Target, site: Site) -> None:
        before = site.cloud.asked
        result = client.infer(target.model, triton_inputs(target))
        assert tuple(result.as_numpy("label")) == CLASSES
        parameters = result.get_response().parameters
        assert parameters[TIER].string_param == self.tier
        assert not parameters[DEGRADED].bool_param
        assert site.cloud.asked - before == (self.tier == "cloud")


class TestRouterThatAnswersOnTheEdge(RouterContract):
    student, threshold, tier = True, ALL_PASS, "edge"


class TestRouterThatEscalates(RouterContract):
    student, threshold, tier = True, NONE_PASSES, "cloud"


class TestRouterWithoutAReleaseOnTheDevice(RouterContract):
    """Metadata, checks and errors are the cloud's too."""

    student, threshold, tier = False, ALL_PASS, "cloud"
