"""Fixtures that more than one suite uses."""

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from simulators import brokers

settings.register_profile("hedgerow", deadline=None)  # how long an example takes says more of the machine than of us
settings.load_profile("hedgerow")

# Whoever is started in the background of a shell ignores Ctrl-C, and so would all daemons that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """What a test opens and need not close: all of it is, in reverse order, at its end."""
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(params=brokers.KINDS)
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[brokers.Broker]:
    """A real broker that runs; the test runs once over each kind."""
    if reason := brokers.missing(request.param):
        pytest.skip(reason)
    async with brokers.running(request.param, tmp_path / "broker") as running:
        yield running
