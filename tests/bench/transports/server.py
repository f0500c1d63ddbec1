"""The server that is measured, as a process: `python -m bench.transports.server KIND PORT SETTINGS_AS_JSON`.

The real `hedgerow.server.Server` over the models of `simulators.victims`: it can be attacked as well as timed.
"""

import asyncio
import importlib
import json
import signal
import sys
from pathlib import Path

import msgspec
from bench.transports.kinds import KINDS
from simulators.victims import MODELS, model

from hedgerow import transports
from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend
from hedgerow.server import Server

PEERS = Path(__file__).parent / "peers"


async def main(settings: ServerSettings) -> None:
    """Serve until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    backend = FunctionBackend(*(model(name, function) for name, function in MODELS.items()))
    async with Server(backend, settings):
        await stop.wait()


if __name__ == "__main__":
    kind = KINDS[sys.argv[1]]
    transports.__path__.append(str(PEERS))  # found by their file names, as any transport is
    factory = importlib.import_module("uvloop").new_event_loop if kind.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        values = {"port": int(sys.argv[2]), "transport": kind.transport, **json.loads(sys.argv[3])}
        runner.run(main(msgspec.convert(values, ServerSettings)))
