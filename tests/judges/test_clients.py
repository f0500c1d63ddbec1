"""Stock clients of other houses, unchanged, against our server with the models that Triton's examples call."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from judges.foreign import PEERS, place
from simulators.triton_models import TritonModels

from hedgerow import transports
from hedgerow.config import ServerSettings, environment
from hedgerow.server import Server
from hedgerow.shared_memory.regions import SharedMemorySettings

pytestmark = pytest.mark.slow

PROTO = Path(__file__).parents[2] / "protos" / "oip.proto"
SUMS = list(range(100, 132, 2))
WAIT_S = 100.0

EXAMPLES = {
    "grpc_client": "",
    "grpc_explicit_byte_content_client": "",
    "grpc_explicit_int8_content_client": "",
    "grpc_explicit_int_content_client": "",
    "reuse_infer_objects_client -i grpc": "",
    "simple_grpc_aio_infer_client": "",
    "simple_grpc_aio_sequence_stream_infer_client": "",
    "simple_grpc_async_infer_client": "",
    "simple_grpc_custom_args_client": "",
    "simple_grpc_custom_repeat": "",
    "simple_grpc_health_metadata": "",
    "simple_grpc_infer_client": "",
    "simple_grpc_keepalive_client": "",
    "simple_grpc_model_control": "max_batch_size and the model's files must be the caller's to change",
    "simple_grpc_sequence_stream_infer_client": "",
    "simple_grpc_sequence_sync_infer_client": "",
    "simple_grpc_shm_client": "",
    "simple_grpc_shm_string_client": "",
    "simple_grpc_string_infer_client": "",
}
"""tritonclient's examples, with what is not there yet that they want. Left out: those that want a GPU, HTTP, pictures
or a fixed port."""


@pytest.fixture(params=transports.known())
async def address(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    backend = TritonModels()
    settings = ServerSettings(port=0, transport=request.param, compatibility="triton")
    async with Server(backend, settings, control=backend, shared_memory=SharedMemorySettings()) as server:
        yield server.address


async def run(*command: object, **variables: str) -> str:
    """What a command prints; the test fails with all of it if the command does."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment(**variables),
    )
    try:
        async with asyncio.timeout(WAIT_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()
    return said.decode()


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=wants, raises=AssertionError, strict=True)] if wants else [])
        for name, wants in EXAMPLES.items()
    ],
)
async def test_tritonclients_example_runs_to_its_end(example: str, address: str) -> None:
    name, *arguments = example.split()
    file = place("triton-client", "src", "python", "examples", f"{name}.py")
    await run(place("triton", "bin", "python"), file, *arguments, "-u", address)


async def test_kserves_client_gets_its_answers(address: str) -> None:
    said = await run(place("kserve", "bin", "python"), PEERS / "kserve_client.py", address)
    told = json.loads(said.splitlines()[-1])
    assert told == {
        "live": True, "ready": True, "model": True, "unknown": False, "id": "from-kserve", "sums": SUMS
    }  # fmt: skip


async def test_a_node_client_made_from_our_proto_file_gets_its_answers(address: str) -> None:
    told = json.loads(await run("node", place("node", "client.js"), address, PROTO))
    assert told == {
        "live": True,
        "id": "from-node",
        "sums": SUMS,
        "code": 5,
        "details": "Request for unknown model: there is no model 'no-such-model'",
        "streamed": "from-node",
    }


@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "streaming"])
async def test_perf_analyzer_measures_without_an_error(streaming: bool, address: str, tmp_path: Path) -> None:
    tool, report = place("perf_analyzer", "perf_analyzer"), tmp_path / "report.csv"
    shapes = ("--shape", "INPUT0:1,16", "--shape", "INPUT1:1,16")
    brief = ("--measurement-interval", "300", "--max-trials", "10", "--stability-percentage", "1000")
    load = ("--concurrency-range", "1:2:1", *(("--streaming",) if streaming else ()))
    libraries = str(place("perf_analyzer", "lib"))
    command = (tool, "-i", "grpc", "-u", address, "-m", "simple", *shapes, *brief, *load, "-f", report)
    said = await run(*command, LD_LIBRARY_PATH=libraries)
    assert "Failed" not in said
    rows = report.read_text(encoding="utf-8").splitlines()[1:]
    assert sorted(row.split(",")[0] for row in rows) == ["1", "2"]
    assert all(float(row.split(",")[1]) > 0 for row in rows), said
