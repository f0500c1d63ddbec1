"""The remote before servers of other houses: what they leave out, how they refuse, how their streams end."""

from contextlib import AsyncExitStack

import grpc
import pytest
from msgspec.structs import replace
from simulators.cloud import LONG_S, MODEL, Cloud
from simulators.foreign import Context, Foreign, refuses, says
from simulators.places import until
from simulators.remotes import ANSWER, REQUEST, ask, reached, streamed

from hedgerow.backend import Deadline
from hedgerow.errors import (
    BackendUnavailable,
    EngineFault,
    Forbidden,
    HedgerowError,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import Target


async def test_typed_answers_of_servers_without_an_index_are_as_good_as_any(stack: AsyncExitStack) -> None:
    typed = oip_pb2.ModelInferResponse(
        model_name=MODEL,
        outputs=[
            oip_pb2.ModelInferResponse.InferOutputTensor(
                name="logits",
                datatype="FP32",
                shape=[1, 4],
                contents=oip_pb2.InferTensorContents(fp32_contents=[0, 0, 0, 1]),
            )
        ],
    )
    foreign = await stack.enter_async_context(Foreign({"ModelInfer": says(typed)}))
    remote = await reached(stack, foreign.target, failures_to_open=1)
    assert await remote.models() == ()
    await ask(remote)
    assert remote.snapshot(MODEL).healthy, "not to know a call is no fault"


async def test_a_server_with_a_model_of_others_that_is_not_ready_is_used_for_ours(stack: AsyncExitStack) -> None:
    metadata = oip_pb2.ModelMetadataResponse(name=MODEL)

    async def ready(raw: bytes, context: Context) -> oip_pb2.ModelReadyResponse:
        if oip_pb2.ModelReadyRequest.FromString(raw).name != MODEL:  # as KServe does it
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return oip_pb2.ModelReadyResponse(ready=True)

    server = Foreign(
        {
            "ServerReady": says(oip_pb2.ServerReadyResponse(ready=False)),
            "ModelReady": ready,
            "ModelMetadata": says(metadata),
            "ModelInfer": says(ANSWER),
        }
    )
    foreign = await stack.enter_async_context(server)
    remote = await reached(stack, foreign.target, failures_to_open=1)
    await until(lambda: remote._pool.endpoints[0].open)  # nobody has asked for a model yet
    remote._models.get("somebody else's", "", whatever_age=True)
    remote._models.get(MODEL, "", whatever_age=True)
    await until(lambda: not remote._pool.endpoints[0].open)
    assert await remote.ready(MODEL)
    assert not await remote.ready("somebody else's")
    assert (await remote.infer(REQUEST, Deadline.after(LONG_S))).version == "7"


async def test_mlservers_word_for_not_ready_is_not_held_against_the_request(stack: AsyncExitStack) -> None:
    refusal = refuses(grpc.StatusCode.INVALID_ARGUMENT, f"Model {MODEL} is not ready yet.")
    loading = await stack.enter_async_context(
        Foreign({"ModelInfer": refusal, "ModelReady": says(oip_pb2.ModelReadyResponse(ready=False))})
    )
    spare = await stack.enter_async_context(Cloud())
    remote = await reached(stack, loading.target, max_retries=0)
    with pytest.raises(BackendUnavailable, match=f"{MODEL} is not ready"):
        await ask(remote)
    assert remote.snapshot(MODEL).healthy
    both = await reached(stack, Target(address=loading.target, zone="near"), Target(address=spare.target))
    await ask(both)
    assert spare.asked == 1
    loading.answers["ModelReady"] = says(oip_pb2.ModelReadyResponse(ready=True))
    with pytest.raises(InvalidInput, match="not ready yet"):
        await ask(remote)


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (InvalidInput("no such thing"), InvalidInput),
        (ModelNotFound("no such thing"), ModelNotFound),
        (Overloaded("no such thing"), Overloaded),
        (Unavailable("no such thing"), BackendUnavailable),
        (Forbidden("no such thing"), Forbidden),
        (EngineFault("no such thing"), EngineFault),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else None,
)
async def test_an_error_in_a_stream_keeps_what_it_means(
    stack: AsyncExitStack, raised: HedgerowError, arrives: type[HedgerowError]
) -> None:
    cloud = await stack.enter_async_context(Cloud())
    remote = await reached(stack, cloud.target)
    cloud.raises = [raised]
    with pytest.raises(HedgerowError, match="cloud: no such thing") as error:
        await streamed(remote)
    assert type(error.value) is arrives


def tokens(text: str, *, final: bool | None = None) -> oip_pb2.ModelInferResponse:
    """An answer with `text`, none if it is empty, marked as Triton does it."""
    response = oip_pb2.ModelInferResponse(model_name=MODEL, model_version="1")
    if text:
        response.outputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(text.encode())
    if final is not None:
        response.parameters["triton_final_response"].bool_param = final
    return response


async def test_tritons_marks_of_the_end_are_neither_asked_for_nor_passed_on(stack: AsyncExitStack) -> None:
    said = [tokens("a", final=False), tokens("b", final=False), tokens("", final=True)]
    triton = Foreign({}, [oip_pb2.ModelStreamInferResponse(infer_response=one) for one in said])
    remote = await reached(stack, (await stack.enter_async_context(triton)).target)
    asked = replace(REQUEST, parameters={"triton_enable_empty_final_response": True, "temperature": 0.5})
    answers = await streamed(remote, asked)
    assert [one.output("text").tolist() for one in answers] == [[b"a"], [b"b"]]
    assert [dict(one.parameters) for one in answers] == [{}, {}]
    assert [sorted(one.parameters) for one in triton.asked_in_streams] == [["temperature"]]


async def test_an_error_without_a_status_in_tritons_stream_is_an_engines(stack: AsyncExitStack) -> None:
    triton = Foreign({}, [oip_pb2.ModelStreamInferResponse(error_message="boom")])
    remote = await reached(stack, (await stack.enter_async_context(triton)).target)
    with pytest.raises(EngineFault, match="cloud: boom"):
        await streamed(remote)


@pytest.mark.parametrize("version", ["", "1", "v2.0"])
async def test_bare_answers_in_a_stream_are_understood_as_mlserver_gives_them(
    stack: AsyncExitStack, version: str
) -> None:
    said = [tokens("a"), tokens("b")]
    for one in said:
        one.model_version = version
    mlserver = await stack.enter_async_context(Foreign({}, said))
    remote = await reached(stack, mlserver.target)
    answers = await streamed(remote)
    assert [(one.model, one.version, one.output("text").tolist()) for one in answers] == [
        (MODEL, version, [b"a"]),
        (MODEL, version, [b"b"]),
    ]
