"""Servers and clients of other houses, each from an environment of its own below one folder.

`tests/judges/prepare FOLDER` fills the folder; the environment variable HEDGEROW_JUDGES names it. Whoever is not
there is skipped, and the test says so.
"""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from hedgerow.config import environment, variable

PEERS = Path(__file__).with_name("peers")
START_S = 60.0
STOP_S = 20.0


def place(*parts: str) -> Path:
    """Where a judge is; skips the test if it is not there."""
    folder = variable("HEDGEROW_JUDGES")
    path = Path(folder, *parts)
    if not folder or not path.exists():
        pytest.skip(f"no {'/'.join(parts)} below HEDGEROW_JUDGES ({folder or 'not set'}): see tests/judges/prepare")
    return path


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@asynccontextmanager
async def mlserver(folder: Path) -> AsyncIterator[str]:
    """MLServer with the model `mixed`; its address."""
    port = free_port()
    tensors = [
        {"name": "numbers", "datatype": "FP32", "shape": [-1, 4]},
        {"name": "text", "datatype": "BYTES", "shape": [-1, 2]},
    ]
    model = {
        "name": "mixed",
        "implementation": "mlserver_mixed.Mixed",
        "inputs": tensors,
        "outputs": tensors,
        "parameters": {"version": "1"},
    }
    server = {
        "host": "127.0.0.1", "grpc_port": port, "http_port": free_port(), "metrics_port": free_port(),
        "parallel_workers": 0, "grpc_max_message_length": 2**30,
    }  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(server), encoding="utf-8")
    async with process(port, folder, str(place("mlserver", "bin", "mlserver")), "start", ".", PYTHONPATH=str(PEERS)):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def kserve(folder: Path) -> AsyncIterator[str]:
    """KServe with the model `mixed`; its address."""
    port = free_port()
    command = (str(place("kserve", "bin", "python")), str(PEERS / "kserve_mixed.py"))
    ports = (f"--http_port={free_port()}", f"--grpc_port={port}")
    async with process(port, folder, *command, *ports):
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def process(port: int, folder: Path, *command: str, **variables: str) -> AsyncIterator[None]:
    """A server in a process of its own, from when it listens on `port`; its log is in `folder`."""
    with (folder / "log").open("wb") as log:
        running = await asyncio.create_subprocess_exec(
            *command, cwd=folder, stdout=log, stderr=log, env=environment(**variables)
        )
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.wait_for(channel.channel_ready(), START_S)
        yield
    except TimeoutError:
        sys.stderr.write((folder / "log").read_text(encoding="utf-8"))
        raise
    finally:
        if running.returncode is None:
            running.terminate()
        try:
            await asyncio.wait_for(running.wait(), STOP_S)
        except TimeoutError:
            running.kill()
            await running.wait()
