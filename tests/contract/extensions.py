"""Rules about what the protocol leaves to the server: extensions of Triton's, health, reflection."""

import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from contract.rules import Rules, must, outputs, should
from contract.target import SERVICE, WAIT_S, Target, channel, outcome, refused, request
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from hedgerow.proto import oip_pb2

EXTENSIONS: dict[str, tuple[str, Any]] = {
    "model_configuration": ("ModelConfig", oip_pb2.ModelConfigRequest),
    "statistics": ("ModelStatistics", oip_pb2.ModelStatisticsRequest),
    "model_repository": ("RepositoryIndex", oip_pb2.RepositoryIndexRequest),
    "system_shared_memory": ("SystemSharedMemoryStatus", oip_pb2.SystemSharedMemoryStatusRequest),
}
"""A call that shows whether the extension is there."""
STREAM_IDS = [f"id-{i}" for i in range(12)]
BAD_ID = STREAM_IDS[5]
SHARED_MEMORY = Path("/dev/shm")


def is_loopback(address: str) -> bool:
    return address.rpartition(":")[0] in {"127.0.0.1", "[::1]", "localhost"}


def lies(parameters: Any, region: str, byte_size: int, offset: int) -> None:
    """Say in a tensor's `parameters` where it lies."""
    parameters["shared_memory_region"].string_param = region
    parameters["shared_memory_byte_size"].int64_param = byte_size
    parameters["shared_memory_offset"].int64_param = offset


class ExtensionRules(Rules):
    """Not applicable where a server does not have the extension."""

    @must
    def test_the_extensions_that_are_listed_are_there(self, stub: Any) -> None:
        listed = stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=WAIT_S).extensions
        for extension in set(listed) & set(EXTENSIONS):
            method, message = EXTENSIONS[extension]
            _, status, _ = outcome(partial(getattr(stub, method), message(), timeout=WAIT_S))
            assert status is not grpc.StatusCode.UNIMPLEMENTED, extension

    @should
    def test_a_stream_answers_each_request_and_outlives_a_bad_one(self, stub: Any, target: Target) -> None:
        def messages() -> Iterator[oip_pb2.ModelInferRequest]:
            for identity in STREAM_IDS:
                message = request(target)
                message.id = identity
                if identity == BAD_ID:
                    message.model_name = "no-such-model"
                yield message

        answers = self.implemented(lambda: list(stub.ModelStreamInfer(messages(), timeout=WAIT_S)))
        assert len(answers) == len(STREAM_IDS)
        failed = [answer for answer in answers if answer.error_message]
        assert len(failed) == 1
        assert "no-such-model" in failed[0].error_message
        good = {answer.infer_response.id for answer in answers if not answer.error_message}
        assert good == set(STREAM_IDS) - {BAD_ID}

    @should
    def test_the_configuration_agrees_with_the_metadata(self, stub: Any, target: Target, metadata: Any) -> None:
        asked = oip_pb2.ModelConfigRequest(name=target.model)
        config = self.implemented(lambda: stub.ModelConfig(asked, timeout=WAIT_S)).config
        assert config.name == target.model
        for configured, specs in ((config.input, metadata.inputs), (config.output, metadata.outputs)):
            assert {one.name for one in configured} == {spec.name for spec in specs}

    @should
    def test_a_classification_gives_the_best_as_text(self, stub: Any, target: Target, metadata: Any) -> None:
        if "classification" not in stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=WAIT_S).extensions:
            pytest.skip("the server does not have it")
        numeric = [spec.name for spec in metadata.outputs if spec.datatype != "BYTES"]
        if not numeric:
            pytest.skip("the model gives no numbers")
        message = request(target)
        message.outputs.add(name=numeric[0]).parameters["classification"].int64_param = 1
        answer = stub.ModelInfer(message, timeout=WAIT_S)
        assert answer.outputs[0].datatype == "BYTES"
        for text in outputs(answer)[numeric[0]].ravel():
            value, _, rest = text.decode().partition(":")
            float(value)
            assert rest.partition(":")[0].isdigit()

    @should
    def test_tensors_may_lie_in_shared_memory(self, stub: Any, target: Target) -> None:
        extensions = stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=WAIT_S).extensions
        if "system_shared_memory" not in extensions or not is_loopback(target.address):
            pytest.skip("the server does not have it, or is not on this machine")
        message = request(target)
        expected = stub.ModelInfer(message, timeout=WAIT_S)
        given = message.raw_input_contents[0]
        name, size = expected.outputs[0].name, len(expected.raw_output_contents[0])
        path = SHARED_MEMORY / f"oip-{uuid.uuid4().hex}"
        path.write_bytes(given + bytes(size))
        region: dict[str, Any] = {"name": path.name, "byte_size": len(given) + size}
        try:
            stub.SystemSharedMemoryRegister(
                oip_pb2.SystemSharedMemoryRegisterRequest(key=f"/{path.name}", **region), timeout=WAIT_S
            )
            del message.raw_input_contents[0]
            lies(message.inputs[0].parameters, path.name, len(given), 0)
            lies(message.outputs.add(name=name).parameters, path.name, size, len(given))
            answer = stub.ModelInfer(message, timeout=WAIT_S)
            assert list(answer.outputs[0].shape) == list(expected.outputs[0].shape)
            assert not any(answer.raw_output_contents)
            assert path.read_bytes() == given + expected.raw_output_contents[0]
            asked = oip_pb2.SystemSharedMemoryUnregisterRequest(name=path.name)
            stub.SystemSharedMemoryUnregister(asked, timeout=WAIT_S)
            refused(lambda: stub.ModelInfer(message, timeout=WAIT_S), grpc.StatusCode.NOT_FOUND)
        finally:
            path.unlink()

    @should
    def test_statistics_count_what_succeeded(self, stub: Any, target: Target) -> None:
        asked = oip_pb2.ModelStatisticsRequest(name=target.model)

        def successes() -> int:
            stats = self.implemented(lambda: stub.ModelStatistics(asked, timeout=WAIT_S)).model_stats
            assert {one.name for one in stats} == {target.model}
            return sum(one.inference_stats.success.count for one in stats)

        before = successes()
        stub.ModelInfer(request(target), timeout=WAIT_S)
        assert successes() == before + 1

    @should
    def test_health_speaks_for_the_server_and_the_service(self, target: Target) -> None:
        with channel(target.address) as to:
            health: Any = health_pb2_grpc.HealthStub(to)
            for service in ("", SERVICE):
                asked = health_pb2.HealthCheckRequest(service=service)
                answer = self.implemented(partial(health.Check, asked, timeout=WAIT_S))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
            refused(lambda: health.Check(unknown, timeout=WAIT_S), grpc.StatusCode.NOT_FOUND)

    @should
    def test_reflection_is_enough_to_call_without_a_proto_file(self, target: Target) -> None:
        with channel(target.address) as to:
            database = ProtoReflectionDescriptorDatabase(to)
            assert SERVICE in self.implemented(database.get_services)
            pool = descriptor_pool.DescriptorPool(database)
            methods = pool.FindServiceByName(SERVICE).methods_by_name
            assert methods["ModelInfer"].input_type.fields_by_name["raw_input_contents"].number == 7
