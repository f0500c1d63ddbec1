"""What every server that speaks the Open Inference Protocol for us has to conform to, seen by stock clients.

A subclass gives a `target` fixture; everything else is here. The rules for any server are in `contract.conformance`;
ours keep all of them, say what is wrong in the words of `contract.spoil`, and please the stock client, NVIDIA's
tritonclient, in the same process as our own stubs.
"""

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from contract.conformance import OipConformance
from contract.rules import must, ways
from contract.spoil import OURS_REFUSE, Spoil, Words, wrong_rank
from contract.target import SERVICE, WAIT_S, Target, refused, request, still_serves
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from hedgerow.parameters import TIER
from hedgerow.proto import oip_pb2

__all__ = ["SERVICE", "WAIT_S", "OipContract", "Target", "refused", "request", "still_serves", "triton_inputs"]


def triton_inputs(target: Target) -> list[Any]:
    """The target's inputs as tritonclient wants them."""
    inputs = []
    for message, (name, array) in zip(request(target).inputs, target.inputs().items(), strict=True):
        inputs.append(triton.InferInput(name, list(array.shape), message.datatype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


class OipContract(OipConformance):
    """The contract. Each test leaves the server as it found it; the ones with bad input check that it still serves."""

    @pytest.fixture
    def client(self, target: Target) -> Iterator[triton.InferenceServerClient]:
        with triton.InferenceServerClient(target.address) as client:
            yield client

    def check_words(self, said: str, words: Words) -> None:
        super().check_words(said, words)
        for word in words:
            assert word in said

    def implemented(self, call: Any) -> Any:
        """Nothing is optional here."""
        return call()

    @must
    def test_the_version_asked_for_is_what_answers(
        self, stub: Any, target: Target, metadata: oip_pb2.ModelMetadataResponse
    ) -> None:
        if stub.ModelInfer(request(target), timeout=WAIT_S).parameters[TIER].string_param == "cloud":
            pytest.skip("the model behind the router answers, under the version that it has there")
        super().test_the_version_asked_for_is_what_answers(stub, target, metadata)

    @must
    @ways(OURS_REFUSE)
    def test_what_is_not_done_here_is_refused(
        self, spoil: Spoil, status: grpc.StatusCode, stub: Any, target: Target, metadata: Any
    ) -> None:
        self.refuses(spoil, status, stub, target, metadata)

    def test_no_extension_is_listed_that_clients_would_miss(self, client: Any) -> None:
        metadata = client.get_server_metadata()
        assert set(metadata.extensions) <= {
            "classification", "model_configuration", "model_repository", "parameters", "statistics",
            "system_shared_memory",
        }  # fmt: skip

    def test_the_metadata_tells_what_the_model_really_takes(self, client: Any, target: Target) -> None:
        metadata = client.get_model_metadata(target.model)
        config = client.get_model_config(target.model).config
        given = target.inputs()
        assert {spec.name for spec in metadata.inputs} == set(given)
        for spec, configured in zip(metadata.inputs, config.input, strict=True):
            assert list(configured.dims) == list(spec.shape)
            assert all(size in {-1, got} for size, got in zip(spec.shape, given[spec.name].shape, strict=True)), (
                spec.name
            )

    def test_a_stock_client_gets_every_output_in_the_order_of_the_metadata(self, client: Any, target: Target) -> None:
        result = client.infer(target.model, triton_inputs(target))
        response = result.get_response()
        assert response.model_version
        names = [spec.name for spec in client.get_model_metadata(target.model).outputs]
        assert [output.name for output in response.outputs] == names
        assert all(result.as_numpy(name) is not None for name in names)

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

    def test_a_stream_keeps_the_order_of_its_requests(self, client: Any, target: Target) -> None:
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

    def test_statistics_count_what_failed_and_where_the_time_went(
        self, client: Any, stub: Any, target: Target, metadata: oip_pb2.ModelMetadataResponse
    ) -> None:
        def failures() -> int:
            stats = client.get_inference_statistics(target.model).model_stats
            return sum(one.inference_stats.fail.count for one in stats)

        before = failures()
        client.infer(target.model, triton_inputs(target))
        bad = request(target)
        wrong_rank(bad, metadata)
        refused(lambda: stub.ModelInfer(bad), grpc.StatusCode.INVALID_ARGUMENT)
        assert failures() == before + 1
        everything = client.get_inference_statistics().model_stats
        assert target.model in {one.name for one in everything}
        assert all(
            one.inference_stats.success.ns >= one.inference_stats.compute_infer.ns > 0
            for one in everything
            if one.inference_stats.success.count
        )

    def test_reflection_tells_of_health_too(self, target: Target) -> None:
        with grpc.insecure_channel(target.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            assert "Watch" in pool.FindServiceByName("grpc.health.v1.Health").methods_by_name
