"""Large models on Ray Serve: the same contract as on a device, and what only Ray can get wrong."""

import asyncio
import logging
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from contract.oip import OipContract, Target, refused, request
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from simulators.background import in_background
from simulators.collector import collecting
from simulators.models import CLASSES, FEATURES, classifier, slow

from hedgerow import release
from hedgerow.backend import Deadline
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, HedgerowError
from hedgerow.lifecycle import supervise
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.server import Server
from hedgerow_cloud.cluster import local_ray
from hedgerow_cloud.local.broker import free_port
from hedgerow_cloud.serving.backend import PING_TIMEOUT_S
from hedgerow_cloud.serving.deployment import deployed
from hedgerow_cloud.serving.endpoint import serve
from hedgerow_cloud.serving.settings import ServeSettings

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(180)]

MODEL = "digits"
SLOW = "slow"
SLOW_STEPS = 10_000
"""About ten seconds."""
MAX_MESSAGE_BYTES = 2**20
START_S = 120.0
RECOVERY_S = 30.0
STOP_S = 60.0
TRACE = "0af7651916cd43dd8448eb211c80319c"
SPANS = ("inference.GRPCInferenceService/ModelInfer", f"serve {MODEL}", f"replica {MODEL}")
"""From a call to the engine's process."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("teacher") / "teacher.onnx", sure=8.0)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture(scope="module")
def address(file: Path, ray: None) -> Iterator[str]:
    late = slow(file.with_name("slow.onnx"), steps=SLOW_STEPS)
    settings = ServeSettings(
        models={MODEL: str(file), SLOW: str(late)}, server=ServerSettings(port=0, max_message_bytes=MAX_MESSAGE_BYTES)
    )

    @asynccontextmanager
    async def serving() -> AsyncIterator[Server]:
        stop = asyncio.Event()
        async with (
            deployed(settings) as backend,
            Server(backend, settings.server) as server,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(supervise(stop, watch=backend.watch()))
            yield server
            stop.set()

    with in_background(serving) as server:
        yield server.address


def inputs() -> Mapping[str, NDArray[Any]]:
    return {"pixels": np.eye(3, FEATURES, dtype=np.float32)}


def replicas() -> list[dict[str, str]]:
    from ray.util import list_named_actors

    return [actor for actor in list_named_actors(all_namespaces=True) if actor["name"].startswith("SERVE_REPLICA")]


@pytest.mark.parametrize(
    ("models", "complaint"),
    [
        ({MODEL: "nowhere.onnx"}, r"^models\.digits: there is no file .*nowhere\.onnx$"),
        ({}, "^models: name at least one"),
    ],
)
async def test_a_file_that_is_not_there_is_named_before_anything_starts(
    models: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hedgerow_cloud.serving.endpoint.local_ray", lambda: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match=complaint):
        await serve(ServeSettings(models=models), tmp_path, asyncio.Event())


def test_a_file_that_cannot_be_loaded_is_named_in_one_line(tmp_path: Path, ray: None) -> None:
    """First of those that deploy, since one Ray has one deployment of ours."""

    async def deploy(path: Path) -> None:
        async with deployed(ServeSettings(models={MODEL: str(path)})):
            pass

    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"no model")
    with pytest.raises(HedgerowError, match=r"^the models do not start on Ray Serve: .*cannot load garbage\.onnx.*$"):
        asyncio.run(deploy(garbage))


class TestRayServe(OipContract):
    @pytest.fixture
    def target(self, address: str) -> Target:
        return Target(address, MODEL, inputs, MAX_MESSAGE_BYTES)


def test_a_stock_client_gets_what_the_file_answers_and_the_digest_of_the_file(address: str, file: Path) -> None:
    with triton.InferenceServerClient(address) as client:
        pixels = np.random.default_rng(0).random((5, FEATURES), np.float32)
        given = triton.InferInput("pixels", [5, FEATURES], "FP32")
        given.set_data_from_numpy(pixels)
        answer = client.infer(MODEL, [given], request_id="seven").as_numpy("logits")
        assert np.allclose(answer, pixels[:, :CLASSES] * 8, atol=1e-5)
    with grpc.insecure_channel(address) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)  # the stock client drops what it does not know
        properties = stub.ModelMetadata(oip_pb2.ModelMetadataRequest(name=MODEL), timeout=5).properties
        assert properties["sha256"] == release.describe(file.parent, file.name).sha256


def test_arrays_too_large_for_the_call_itself_arrive_whole(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        pixels = np.random.default_rng(1).random((1500, FEATURES), np.float32)
        assert pixels.nbytes > 200_000
        message = request(Target(address, MODEL, lambda: {"pixels": pixels}, MAX_MESSAGE_BYTES))
        answer = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message, timeout=30)
        logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, CLASSES)
        assert np.allclose(logits, pixels[:, :CLASSES] * 8, atol=1e-5)


def test_the_deadline_ends_the_wait_and_the_next_request_is_answered(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        late = request(Target(address, SLOW, inputs, MAX_MESSAGE_BYTES))
        late.parameters["timeout"].int64_param = 300_000  # microseconds; the server's clock decides, not the client's
        began = time.monotonic()
        refused(lambda: stub.ModelInfer(late, timeout=30), grpc.StatusCode.DEADLINE_EXCEEDED)
        assert 0.25 < time.monotonic() - began < 2
        message = request(Target(address, MODEL, inputs, MAX_MESSAGE_BYTES))
        assert stub.ModelInfer(message, timeout=30).model_name == MODEL


def test_a_replica_that_dies_is_unavailable_at_once_and_comes_back(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    import ray as ray_api

    with grpc.insecure_channel(address) as channel, caplog.at_level(logging.INFO):
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = request(Target(address, MODEL, inputs, MAX_MESSAGE_BYTES))
        ready = oip_pb2.ModelReadyRequest(name=MODEL)
        (before,) = replicas()
        in_flight = stub.ModelInfer.future(request(Target(address, SLOW, inputs, MAX_MESSAGE_BYTES)), timeout=60)
        with pytest.raises(grpc.FutureTimeoutError):
            in_flight.result(0.5)
        ray_api.kill(ray_api.get_actor(before["name"], before["namespace"]))
        began = time.monotonic()
        refused(in_flight.result, grpc.StatusCode.UNAVAILABLE)
        refused(lambda: stub.ModelInfer(message, timeout=30), grpc.StatusCode.UNAVAILABLE)
        assert not stub.ModelReady(ready, timeout=5).ready
        assert time.monotonic() - began < PING_TIMEOUT_S
        while not stub.ModelReady(ready, timeout=5).ready:
            assert time.monotonic() - began < RECOVERY_S
            time.sleep(0.1)  # between two looks: there is nothing to wait on from outside
        assert stub.ModelInfer(message, timeout=30).model_name == MODEL
        assert [one["name"] for one in replicas()] != [before["name"]]
    said = [record.getMessage() for record in caplog.records if record.name == "hedgerow_cloud.serving.backend"]
    assert len(said) == 2, said  # once when it was gone, once when it was back


def test_the_daemon_serves_by_two_processes_that_are_watched_and_traced_and_a_signal_ends_it_and_all_of_ray(
    file: Path, tmp_path: Path
) -> None:
    """Ray installs a SIGTERM handler of its own that would exit at once, with requests in flight."""
    port, watched = free_port(), free_port()
    config = tmp_path / "serve.toml"
    with collecting() as (collector, endpoint):
        config.write_text(
            f'processes = 2\n[models]\n{MODEL} = "{file}"\n[server]\nport = {port}\n'
            f'[metrics]\nlisten = "127.0.0.1:{watched}"\n[tracing]\nendpoint = "{endpoint}"\n',
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "hedgerow_cloud.daemons", "serve", "--config", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as daemon:
            try:
                until(lambda: page(watched, "readyz") == "ready\n", START_S)
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
                    message = request(Target("", MODEL, inputs, MAX_MESSAGE_BYTES))
                    traced = (("traceparent", f"00-{TRACE}-b7ad6b7169203331-01"),)
                    assert stub.ModelInfer(message, timeout=30, metadata=traced).model_name == MODEL
                until(lambda: samples(watched, "hedgerow_process_up") == {"1": 1, "2": 1}, START_S)
                until(lambda: samples(watched, "hedgerow_remote_up") == {"1": 1, "2": 1}, START_S)
                until(lambda: sum(samples(watched, "hedgerow_requests_total").values()) == 1, START_S)
                until(lambda: len(collector.spans) >= len(SPANS), RECOVERY_S)  # they are sent every few seconds
                family = descendants(daemon.pid)
                assert len(family) > 3 + 2  # the parts of Ray, and the two
                daemon.send_signal(signal.SIGTERM)
                output, _ = daemon.communicate(timeout=STOP_S)
            finally:
                daemon.kill()
    assert daemon.returncode == 0, output
    assert "Traceback" not in output
    assert "(raylet)" not in output
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]
    by_name = {span.name: span for span in collector.spans}
    assert set(by_name) == set(SPANS)
    assert {span.trace_id.hex() for span in by_name.values()} == {TRACE}
    assert [by_name[name].parent_span_id for name in SPANS[1:]] == [by_name[name].span_id for name in SPANS[:-1]]


def until(done: Callable[[], bool], within_s: float) -> None:
    deadline = Deadline.after(within_s)
    while not done():
        deadline.check("it came about")
        time.sleep(0.1)  # another process's doing


def page(port: int, path: str) -> str:
    """What is there, or nothing while there is not."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def samples(port: int, name: str) -> dict[str, float]:
    """By process."""
    families = text_string_to_metric_families(page(port, "metrics"))
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["process"]: sample.value for sample in found}


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those they started, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    found = [int(child) for child in children]
    return found + [inner for child in found for inner in descendants(child)]
