"""Fixtures that more than one file of this suite uses."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from simulators import models
from simulators.cloud import Cloud
from simulators.devices import Device, a_device

from hedgerow import transports
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile


@pytest.fixture
async def host(stack: AsyncExitStack, tmp_path: Path) -> ModelHost:
    """A device's host, of `digits` 1 with a second output."""
    host = ModelHost(HostSettings(workers=1))
    stack.push_async_callback(host.close)
    await host.load_file(ModelFile("digits", "1", models.classifier(tmp_path / "1.onnx", extra=True), precision="fp32"))
    return host


@pytest.fixture
async def cloud(stack: AsyncExitStack) -> Cloud:
    """A cloud of our own that runs."""
    return await stack.enter_async_context(Cloud())


@pytest.fixture(params=transports.known())
async def device(request: pytest.FixtureRequest, stack: AsyncExitStack, tmp_path: Path, cloud: Cloud) -> Device:
    """A device before `cloud`; the test runs once over each transport."""
    return await a_device(stack, tmp_path, cloud.target, transport=request.param)
