"""An event loop with more to do than it can: who cannot wait is told at once, who can is answered."""

import asyncio
import contextlib
import time

import numpy as np
import pytest
from simulators import clients
from simulators.clients import HELD, Explaining
from simulators.places import until

from hedgerow.client import AsyncClient
from hedgerow.config import ServerSettings
from hedgerow.errors import DeadlineExceeded, Overloaded
from hedgerow.http2.shedding import CALM
from hedgerow.server import Server
from hedgerow.transports.native import NativeListener

WAIT_S = 60.0
PATIENT = CALM + 10
BUSY_S = 0.1
"""What the event loop is kept busy for at a time."""
IMPATIENT_S = 0.5
X = np.array([1.0], np.float32)


async def test_an_overloaded_loop_refuses_those_who_cannot_wait_and_answers_those_who_can() -> None:
    backend = Explaining()
    async with clients.served("native", backend) as client, asyncio.TaskGroup() as group, asyncio.timeout(WAIT_S):
        patient = [group.create_task(client.infer(HELD.name, {"x": X}, timeout_s=WAIT_S)) for _ in range(PATIENT)]
        await until(lambda: len(backend.requests) == PATIENT)

        async def asked_in_vain() -> None:
            while True:
                time.sleep(BUSY_S)  # noqa: ASYNC251 (what is meant to happen)
                with contextlib.suppress(DeadlineExceeded):  # before it was even sent
                    await client.infer("double", {"x": X}, timeout_s=IMPATIENT_S)

        with pytest.raises(Overloaded, match="too busy to answer before the deadline") as refused:
            await asked_in_vain()
        assert refused.value.retry_after_s
        backend.let.set()
        for task in patient:
            np.testing.assert_array_equal((await task).outputs["y"], X)
        assert (await client.infer("double", {"x": X}, timeout_s=WAIT_S)).outputs["y"] == 2


async def test_who_asks_after_the_health_of_a_server_that_sheds_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Server(Explaining(), ServerSettings(port=0)) as server, AsyncClient(server.address) as client:
        assert isinstance(server.listener, NativeListener)
        monkeypatch.setattr(server.listener.shedding, "refuses", lambda _: True)
        assert await client.ready(timeout_s=WAIT_S)
        with pytest.raises(Overloaded):
            await client.infer("double", {"x": X}, timeout_s=WAIT_S)
