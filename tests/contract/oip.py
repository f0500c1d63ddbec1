"""What every server that speaks the Open Inference Protocol for us has to conform to, seen by stock clients.

A subclass gives a `target` fixture; everything else is here. The stock client is NVIDIA's tritonclient, in the same
process as our own stubs; raw gRPC says what a stock client would not.
"""

import asyncio
import queue
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from hedgerow.proto import oip_pb2, oip_pb2_grpc
from hedgerow.tensors import InferRequest, request_to_proto, tensor

SERVICE = "inference.GRPCInferenceService"
WAIT_S = 30.0


@dataclass(frozen=True)
class Target:
    """A server under the contract. Its model answers the same inputs with the same outputs."""

    address: str
    model: str
    inputs: Callable[[], Mapping[str, NDArray[Any]]]
    """Makes valid inputs."""
    max_message_bytes: int
    """What the server was told to take at most."""


def request(target: Target) -> oip_pb2.ModelInferRequest:
    """A valid request, raw."""
    tensors = tuple(tensor(name, array) for name, array in target.inputs().items())
    return request_to_proto(InferRequest(model=target.model, inputs=tensors))


def triton_inputs(target: Target) -> list[Any]:
    """The same inputs as tritonclient wants them."""
    inputs = []
    for message, (name, array) in zip(request(target).inputs, target.inputs().items(), strict=True):
        inputs.append(triton.InferInput(name, list(array.shape), message.datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


# Ways to spoil a request. Each gives the words that the error must contain.
Words = tuple[str, ...]


def wrong_rank(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].shape.append(1)
    return message.inputs[0].name, "expected", "got", str(list(message.inputs[0].shape))


def wrong_dimension(message: oip_pb2.ModelInferRequest) -> Words:
    """As many elements, in rows of half the length."""
    shape = message.inputs[0].shape
    assert shape[-1] % 2 == 0
    shape[0], shape[-1] = 2 * shape[0], shape[-1] // 2
    return message.inputs[0].name, "expected", "got", str(list(shape))


def wrong_datatype(message: oip_pb2.ModelInferRequest) -> Words:
    first = message.inputs[0]
    was, first.datatype = first.datatype, "FP64"
    message.raw_input_contents[0] = bytes(8 * int(np.prod(first.shape)))
    return first.name, f"expected {was}", "got FP64"


def unheard_of_datatype(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].datatype = "FP33"
    return message.inputs[0].name, "FP33"


def too_few_bytes(message: oip_pb2.ModelInferRequest) -> Words:
    message.raw_input_contents[0] = message.raw_input_contents[0][:-1]
    return message.inputs[0].name, "expected", "got"


def too_many_bytes(message: oip_pb2.ModelInferRequest) -> Words:
    message.raw_input_contents[0] += b"\0"
    return message.inputs[0].name, "expected", "got"


def negative_dimension(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].shape[0] = -1
    return message.inputs[0].name, "-1"


def dimensions_that_overflow(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].shape[:] = [2**32, 2**32, 2**32]
    return message.inputs[0].name, str(2**32)


def raw_and_typed(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].contents.fp64_contents.append(1.0)
    return message.inputs[0].name, "both"


def one_raw_too_many(message: oip_pb2.ModelInferRequest) -> Words:
    message.raw_input_contents.append(b"")
    return f"expected one raw entry for each of {len(message.inputs)}", f"got {len(message.inputs) + 1}"


def missing_input(message: oip_pb2.ModelInferRequest) -> Words:
    name = message.inputs[0].name
    del message.inputs[0], message.raw_input_contents[0]
    return name, "missing"


def extra_input(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs.add(name="surplus", datatype="FP32", shape=[1])
    message.raw_input_contents.append(bytes(4))
    return ("there is no input 'surplus'",)


def duplicate_input(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs.append(message.inputs[0])
    message.raw_input_contents.append(message.raw_input_contents[0])
    return message.inputs[0].name, "once"


def unknown_output(message: oip_pb2.ModelInferRequest) -> Words:
    message.outputs.add(name="surplus")
    return ("there is no output 'surplus'",)


def duplicate_output(message: oip_pb2.ModelInferRequest) -> Words:
    message.outputs.add(name="twice")
    message.outputs.add(name="twice")
    return "twice", "once"


def valueless_parameter(message: oip_pb2.ModelInferRequest) -> Words:
    message.parameters["empty"].SetInParent()
    return ("empty",)


def no_model(message: oip_pb2.ModelInferRequest) -> Words:
    message.model_name = ""
    return ("names no model",)


def unknown_model(message: oip_pb2.ModelInferRequest) -> Words:
    message.model_name = "no-such-model"
    return ("no-such-model",)


def unknown_version(message: oip_pb2.ModelInferRequest) -> Words:
    message.model_version = "31337"
    return ("31337",)


def very_long_name(message: oip_pb2.ModelInferRequest) -> Words:
    message.model_name = (
        "\N{LATIN SMALL LETTER O WITH DIAERESIS}" * 20_000
    )  # must not burst the trailers it is named in
    return ()


def shared_memory(message: oip_pb2.ModelInferRequest) -> Words:
    message.inputs[0].parameters["shared_memory_region"].string_param = "region"
    return message.inputs[0].name, "shared memory"


BAD = [
    *(
        (spoil, grpc.StatusCode.INVALID_ARGUMENT)
        for spoil in (
            wrong_rank, wrong_dimension, wrong_datatype, unheard_of_datatype, too_few_bytes, too_many_bytes,
            negative_dimension, dimensions_that_overflow, raw_and_typed, one_raw_too_many, missing_input, extra_input,
            duplicate_input, unknown_output, duplicate_output, valueless_parameter, no_model,
        )
    ),
    (unknown_model, grpc.StatusCode.NOT_FOUND),
    (unknown_version, grpc.StatusCode.NOT_FOUND),
    (very_long_name, grpc.StatusCode.NOT_FOUND),
    (shared_memory, grpc.StatusCode.UNIMPLEMENTED),
]  # fmt: skip


class OipContract:
    """The contract. Each test leaves the server as it found it; the ones with bad input check that it still serves."""

    @pytest.fixture
    def client(self, target: Target) -> Iterator[triton.InferenceServerClient]:
        with triton.InferenceServerClient(target.address) as client:
            yield client

    @pytest.fixture
    def stub(self, target: Target) -> Iterator[oip_pb2_grpc.GRPCInferenceServiceStub]:
        with grpc.insecure_channel(target.address) as channel:
            yield oip_pb2_grpc.GRPCInferenceServiceStub(channel)

    def test_the_server_says_that_it_is_alive_ready_and_who_it_is(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        metadata = client.get_server_metadata()
        assert metadata.name
        assert metadata.version
        # Nothing that is not there: a client would go and use it.
        assert set(metadata.extensions) <= {"model_configuration", "parameters", "statistics", "model_repository"}

    def test_an_unknown_model_or_version_is_not_ready_without_being_an_error(self, client: Any, target: Target) -> None:
        assert client.is_model_ready(target.model)
        assert not client.is_model_ready("no-such-model")
        assert not client.is_model_ready(target.model, "no-such-version")

    def test_a_version_that_the_metadata_lists_can_be_asked_for(self, client: Any, target: Target) -> None:
        for version in client.get_model_metadata(target.model).versions:
            assert client.is_model_ready(target.model, version)
            client.infer(target.model, triton_inputs(target), model_version=version)

    def test_the_metadata_tells_what_the_model_really_takes(self, client: Any, target: Target) -> None:
        metadata = client.get_model_metadata(target.model)
        config = client.get_model_config(target.model).config
        assert metadata.name == config.name == target.model
        given = target.inputs()
        assert {spec.name for spec in metadata.inputs} == set(given)
        for spec, configured in zip(metadata.inputs, config.input, strict=True):
            assert list(configured.dims) == list(spec.shape)
            assert all(size in {-1, got} for size, got in zip(spec.shape, given[spec.name].shape, strict=True)), (
                spec.name
            )

    def test_a_stock_client_gets_every_output_under_its_own_id(self, client: Any, target: Target) -> None:
        result = client.infer(target.model, triton_inputs(target), request_id="my-id")
        response = result.get_response()
        assert (response.id, response.model_name) == ("my-id", target.model)
        assert response.model_version
        outputs = {spec.name: spec for spec in client.get_model_metadata(target.model).outputs}
        assert [output.name for output in response.outputs] == list(outputs)
        for name, spec in outputs.items():
            array = result.as_numpy(name)
            assert array is not None
            assert all(size in {-1, got} for size, got in zip(spec.shape, array.shape, strict=True)), name

    def test_only_the_outputs_asked_for_come_and_in_that_order(self, client: Any, target: Target) -> None:
        names = [spec.name for spec in client.get_model_metadata(target.model).outputs][::-1]
        for asked in (names, names[:1]):
            outputs = [triton.InferRequestedOutput(name) for name in asked]
            response = client.infer(target.model, triton_inputs(target), outputs=outputs).get_response()
            assert [output.name for output in response.outputs] == asked

    def test_typed_contents_and_raw_contents_mean_the_same(self, stub: Any, target: Target) -> None:
        raw, typed = request(target), request(target)
        del typed.raw_input_contents[:]
        for message, array in zip(typed.inputs, target.inputs().values(), strict=True):
            fields = {
                "BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents",
                "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
            }  # fmt: skip
            default = "uint_contents" if message.datatype.startswith("UINT") else "int_contents"
            getattr(message.contents, fields.get(message.datatype, default)).extend(array.ravel().tolist())
        assert stub.ModelInfer(typed).raw_output_contents == stub.ModelInfer(raw).raw_output_contents

    async def test_many_requests_at_once_get_their_own_answers(self, target: Target) -> None:
        async with triton_aio.InferenceServerClient(target.address) as client:
            expected = (await client.infer(target.model, triton_inputs(target))).get_response().raw_output_contents
            results = await asyncio.gather(
                *(client.infer(target.model, triton_inputs(target), request_id=f"id-{i}") for i in range(32))
            )
        assert [result.get_response().id for result in results] == [f"id-{i}" for i in range(32)]
        assert all(result.get_response().raw_output_contents == expected for result in results)

    @pytest.mark.parametrize(("spoil", "status"), [pytest.param(*bad, id=bad[0].__name__) for bad in BAD])
    def test_bad_input_is_named_and_harms_nobody(
        self, spoil: Callable[[Any], Words], status: grpc.StatusCode, stub: Any, target: Target
    ) -> None:
        message = request(target)
        words = spoil(message)
        said = refused(lambda: stub.ModelInfer(message, timeout=WAIT_S), status)
        for word in words:
            assert word in said
        still_serves(stub, target)

    def test_garbage_is_the_senders_fault(self, stub: Any, target: Target) -> None:
        with grpc.insecure_channel(target.address) as channel:
            for method in ("ModelInfer", "ModelMetadata", "ModelReady"):
                call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
                garbage = partial(call, b"\xff\xff garbage", timeout=WAIT_S)
                said = refused(garbage, grpc.StatusCode.INVALID_ARGUMENT)
                assert f"inference.{method}Request" in said
        still_serves(stub, target)

    def test_an_oversize_message_is_refused_before_it_is_read(self, stub: Any, target: Target) -> None:
        message = request(target)
        message.parameters["padding"].string_param = "x" * target.max_message_bytes
        said = refused(lambda: stub.ModelInfer(message, timeout=WAIT_S), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "larger than max" in said
        still_serves(stub, target)

    def test_an_expired_deadline_is_said_by_the_server_itself(self, stub: Any, target: Target) -> None:
        message = request(target)
        message.parameters["timeout"].int64_param = 1  # microsecond, the protocol's own parameter
        said = refused(lambda: stub.ModelInfer(message, timeout=WAIT_S), grpc.StatusCode.DEADLINE_EXCEEDED)
        assert "deadline passed" in said
        still_serves(stub, target)

    def test_a_stream_outlives_a_bad_request_and_keeps_the_order(self, client: Any, target: Target) -> None:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(20):
            model = "no-such-model" if i == 7 else target.model
            client.async_stream_infer(model, triton_inputs(target), request_id=f"id-{i}")
        for i in range(20):
            result, error = answers.get(timeout=WAIT_S)
            if i == 7:
                assert isinstance(error, InferenceServerException)
                assert "no-such-model" in str(error)
            else:
                assert error is None
                assert result.get_response().id == f"id-{i}"
        client.stop_stream()

    def test_statistics_count_what_succeeded_and_what_failed(self, client: Any, stub: Any, target: Target) -> None:
        def totals() -> tuple[int, int]:
            stats = client.get_inference_statistics(target.model).model_stats
            assert {one.name for one in stats} == {target.model}
            return (
                sum(one.inference_stats.success.count for one in stats),
                sum(one.inference_stats.fail.count for one in stats),
            )

        success, fail = totals()
        client.infer(target.model, triton_inputs(target))
        bad = request(target)
        wrong_rank(bad)
        refused(lambda: stub.ModelInfer(bad), grpc.StatusCode.INVALID_ARGUMENT)
        assert totals() == (success + 1, fail + 1)
        everything = client.get_inference_statistics().model_stats
        assert target.model in {one.name for one in everything}
        assert all(
            one.inference_stats.success.ns >= one.inference_stats.compute_infer.ns > 0
            for one in everything
            if one.inference_stats.success.count
        )

    def test_health_speaks_for_the_server_and_the_service(self, target: Target) -> None:
        with grpc.insecure_channel(target.address) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE):
                answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
            refused(lambda: health.Check(unknown, timeout=WAIT_S), grpc.StatusCode.NOT_FOUND)

    def test_reflection_is_enough_to_call_without_a_proto_file(self, target: Target) -> None:
        with grpc.insecure_channel(target.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            methods = pool.FindServiceByName(SERVICE).methods_by_name
            assert methods["ModelInfer"].input_type.fields_by_name["raw_input_contents"].number == 7
            assert "Watch" in pool.FindServiceByName("grpc.health.v1.Health").methods_by_name


def refused(call: Callable[[], object], status: grpc.StatusCode) -> str:
    """What the server says when it refuses `call` with `status`."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is status, caught.value.details()
    return caught.value.details() or ""


def still_serves(stub: Any, target: Target) -> None:
    assert stub.ModelInfer(request(target), timeout=WAIT_S).model_name == target.model
