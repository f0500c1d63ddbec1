"""Hedgerow without an agent: `hedgerow.server.Server` over a `ModelHost`."""

# mypy: disable-error-code="import-not-found"

import asyncio
from pathlib import Path

from engine import read_job

from hedgerow import lifecycle
from hedgerow.config import ServerSettings
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.server import Server


async def main(stop: asyncio.Event) -> None:
    job = read_job()
    host = ModelHost(HostSettings(workers=job.workers, engine_threads=job.threads))
    try:
        await host.load_file(ModelFile(job.model, "1", Path(job.path)))
        lifecycle.settle()
        async with Server(host, ServerSettings(port=job.port)):
            await stop.wait()
    finally:
        await host.close()


if __name__ == "__main__":
    raise SystemExit(lifecycle.run(main))
