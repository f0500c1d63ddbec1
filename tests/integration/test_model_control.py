"""Loading models from outside: a configuration is taken if it changes nothing, and refused by name if it would."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from simulators.triton_models import TritonModels

from hedgerow.config import ServerSettings
from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.server import Server

CALL_S = 60.0
ROW = {"data_type": "TYPE_INT32", "dims": [-1, 16]}
SIMPLE = {
    "name": "simple",
    "platform": "python",
    "input": [{"name": "INPUT0", **ROW}, {"name": "INPUT1", **ROW}],
    "output": [{"name": "OUTPUT0", **ROW}, {"name": "OUTPUT1", **ROW}],
}
INVALID, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED


@pytest.fixture(params=["", "triton"])
async def stub(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    backend = TritonModels()
    settings = ServerSettings(port=0, compatibility=request.param)
    async with (
        Server(backend, settings, control=backend) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield oip_pb2_grpc.GRPCInferenceServiceStub(channel)


def load(stub: Any, model: str = "simple", **parameters: str) -> Any:
    message = oip_pb2.RepositoryModelLoadRequest(model_name=model)
    for key, value in parameters.items():
        message.parameters[key.replace("_", ":")].string_param = value
    return stub.RepositoryModelLoad(message, timeout=CALL_S)


async def ready(stub: Any) -> bool:
    answer = await stub.ModelReady(oip_pb2.ModelReadyRequest(name="simple"), timeout=CALL_S)
    return bool(answer.ready)


@pytest.mark.parametrize("config", ["{}", json.dumps(SIMPLE), json.dumps({"name": "simple", "max_batch_size": 0})])
async def test_a_configuration_that_changes_nothing_is_taken(stub: Any, config: str) -> None:
    await stub.RepositoryModelUnload(oip_pb2.RepositoryModelUnloadRequest(model_name="simple"), timeout=CALL_S)
    assert not await ready(stub)
    await load(stub, config=config)
    assert await ready(stub)


@pytest.mark.parametrize(
    ("parameters", "status", "words"),
    [
        ({"config": '{"max_batch_size":"16"}'}, UNIMPLEMENTED, "max_batch_size"),
        ({"config": json.dumps({"input": [{"name": "other"}]})}, UNIMPLEMENTED, "input"),
        ({"config": '{"instance_group":[]}'}, UNIMPLEMENTED, "instance_group"),
        ({"config": '"parameters": {}'}, INVALID, "JSON"),
        ({"config": "[" * 60_000}, INVALID, "JSON"),
        ({"config": " " * 70_000}, INVALID, "at most"),
        ({"file_1/model.onnx": "a"}, UNIMPLEMENTED, "'file:1/model.onnx'"),
    ],
)
async def test_what_would_change_a_model_is_refused_by_name_and_the_model_left_alone(
    stub: Any, parameters: dict[str, str], status: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await load(stub, **parameters)
    assert refused.value.code() is status
    assert words in (refused.value.details() or "")
    assert await ready(stub)


async def test_an_unknown_model_is_told_in_the_words_that_clients_look_for() -> None:
    backend = TritonModels()
    for compatibility, words in (("", "there is no model 'none'"), ("triton", "failed to load 'none'")):
        settings = ServerSettings(port=0, compatibility=compatibility)  # type: ignore[arg-type] # one of the two
        async with (
            Server(backend, settings, control=backend) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await load(oip_pb2_grpc.GRPCInferenceServiceStub(channel), "none")
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            assert (refused.value.details() or "").startswith(words)
