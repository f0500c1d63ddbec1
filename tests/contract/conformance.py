"""The Open Inference Protocol as rules that any server can be held to, by its address.

A subclass (or a plugin: see `contract.judge`) gives a `target` fixture. A rule's name says plainly what is asked;
`must` is what the protocol demands or what no client can do without, `should` is what good servers do. A rule that a
server leaves no room for is skipped with the reason: not applicable. Each leaves the server as it found it.
"""

from functools import partial
from typing import Any

import grpc
import numpy as np
import pytest
from contract.extensions import ExtensionRules
from contract.rules import must, outputs, should, ways
from contract.spoil import MUST_REFUSE, SHOULD_REFUSE, Spoil
from contract.target import (
    SERVICE,
    WAIT_S,
    Arrays,
    Target,
    channel,
    outcome,
    raw_contents,
    refused,
    request,
    still_serves,
)

from hedgerow.proto import oip_pb2
from hedgerow.tensors import numpy_dtype

TYPED = {
    "BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}  # fmt: skip
PARAMETERS = {
    "bool_param": True,
    "int64_param": -(2**63),
    "string_param": "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n",
    "double_param": -0.5,
    "uint64_param": 2**64 - 1,
}
"""The ends of their ranges."""
LARGE_BYTES = 5 * 2**20
"""More than gRPC takes by default."""


class OipConformance(ExtensionRules):
    """The rules."""

    # The server and its models.

    @must
    def test_the_server_is_live_and_ready_and_says_who_it_is(self, stub: Any) -> None:
        assert stub.ServerLive(oip_pb2.ServerLiveRequest(), timeout=WAIT_S).live
        assert stub.ServerReady(oip_pb2.ServerReadyRequest(), timeout=WAIT_S).ready
        metadata = stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=WAIT_S)
        assert metadata.name
        assert metadata.version

    @must
    def test_a_model_is_ready_in_every_version_that_its_metadata_lists(
        self, stub: Any, target: Target, metadata: Any
    ) -> None:
        for version in ("", *metadata.versions):
            asked = oip_pb2.ModelReadyRequest(name=target.model, version=version)
            assert stub.ModelReady(asked, timeout=WAIT_S).ready, version

    @must
    def test_an_unknown_model_or_version_is_never_ready(self, stub: Any, target: Target) -> None:
        for name, version in (("no-such-model", ""), (target.model, "no-such-version")):
            asked = oip_pb2.ModelReadyRequest(name=name, version=version)
            answer, status, said = outcome(partial(stub.ModelReady, asked, timeout=WAIT_S))
            assert status in {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}, said
            assert answer is None or not answer.ready, (name, version)

    @should
    def test_asking_whether_an_unknown_model_is_ready_is_no_error(self, stub: Any) -> None:
        assert not stub.ModelReady(oip_pb2.ModelReadyRequest(name="no-such-model"), timeout=WAIT_S).ready

    @must
    def test_the_metadata_describe_every_tensor(self, target: Target, metadata: Any) -> None:
        assert metadata.name == target.model
        assert metadata.inputs
        assert metadata.outputs
        for spec in (*metadata.inputs, *metadata.outputs):
            assert spec.name
            numpy_dtype(spec.datatype)
            assert all(size >= -1 for size in spec.shape), spec.name

    @must
    def test_an_unknown_model_or_version_has_no_metadata(self, stub: Any, target: Target) -> None:
        for name, version in (("no-such-model", ""), (target.model, "no-such-version")):
            asked = oip_pb2.ModelMetadataRequest(name=name, version=version)
            refused(partial(stub.ModelMetadata, asked, timeout=WAIT_S), grpc.StatusCode.NOT_FOUND)

    # Requests and answers.

    @must
    def test_the_answer_bears_the_id_of_the_request(self, stub: Any, target: Target) -> None:
        for identity in ("", "id", "\N{SNOWMAN}\0\n" + "x" * 10_000):
            message = request(target)
            message.id = identity
            if identity:  # an answer to a request without one may have one of its own
                assert stub.ModelInfer(message, timeout=WAIT_S).id == identity
            else:
                stub.ModelInfer(message, timeout=WAIT_S)

    @must
    def test_the_answer_names_the_model(self, stub: Any, target: Target) -> None:
        assert stub.ModelInfer(request(target), timeout=WAIT_S).model_name == target.model

    @must
    def test_a_listed_version_can_be_asked_for(self, stub: Any, target: Target, metadata: Any) -> None:
        for version in metadata.versions:
            self.answer_of(version, stub, target)

    @must
    def test_the_version_asked_for_is_what_answers(self, stub: Any, target: Target, metadata: Any) -> None:
        if not any(metadata.versions):
            pytest.skip("the model has no versions")
        for version in metadata.versions:
            assert self.answer_of(version, stub, target).model_version == version

    def answer_of(self, version: str, stub: Any, target: Target) -> oip_pb2.ModelInferResponse:
        message = request(target)
        message.model_version = version
        answer: oip_pb2.ModelInferResponse = stub.ModelInfer(message, timeout=WAIT_S)
        return answer

    @must
    def test_without_a_choice_every_output_comes_and_fits_the_metadata(
        self, stub: Any, target: Target, metadata: Any
    ) -> None:
        response = stub.ModelInfer(request(target), timeout=WAIT_S)
        arrays = outputs(response)
        assert set(arrays) == {spec.name for spec in metadata.outputs}
        datatypes = {one.name: one.datatype for one in response.outputs}
        for spec in metadata.outputs:
            assert datatypes[spec.name] == spec.datatype, spec.name
            shape = arrays[spec.name].shape
            assert len(shape) == len(spec.shape), spec.name
            assert all(size in {-1, got} for size, got in zip(spec.shape, shape, strict=True)), spec.name

    @must
    def test_only_the_outputs_asked_for_come(self, stub: Any, target: Target, metadata: Any) -> None:
        for spec in metadata.outputs:
            message = request(target)
            message.outputs.add(name=spec.name)
            assert set(outputs(stub.ModelInfer(message, timeout=WAIT_S))) == {spec.name}

    @should
    def test_outputs_come_in_the_order_asked_for(self, stub: Any, target: Target, metadata: Any) -> None:
        message = request(target)
        asked = [spec.name for spec in metadata.outputs][::-1]
        for name in asked:
            message.outputs.add(name=name)
        assert [one.name for one in stub.ModelInfer(message, timeout=WAIT_S).outputs] == asked

    @should
    def test_answers_are_raw_because_that_is_what_clients_read(self, stub: Any, target: Target) -> None:
        response = stub.ModelInfer(request(target), timeout=WAIT_S)
        assert len(response.raw_output_contents) == len(response.outputs)
        assert not any(one.HasField("contents") for one in response.outputs)

    @must
    def test_typed_and_raw_contents_mean_the_same(self, stub: Any, target: Target) -> None:
        message, arrays = request(target), target.inputs()
        if any(one.datatype not in TYPED for one in message.inputs):
            pytest.skip("FP16 and BF16 have no typed form")
        raw = outputs(stub.ModelInfer(message, timeout=WAIT_S))
        del message.raw_input_contents[:]
        for one in message.inputs:
            getattr(one.contents, TYPED[one.datatype]).extend(arrays[one.name].ravel().tolist())
        typed = outputs(stub.ModelInfer(message, timeout=WAIT_S))
        assert set(typed) == set(raw)
        for name, array in raw.items():
            np.testing.assert_array_equal(typed[name], array)

    @must
    @pytest.mark.parametrize("kind", ["bool_param", "int64_param", "string_param"])
    def test_parameters_are_taken(self, kind: str, stub: Any, target: Target) -> None:
        self.take_parameter(kind, stub, target)

    @should
    @pytest.mark.parametrize("kind", ["double_param", "uint64_param"])
    def test_later_kinds_of_parameters_are_taken(self, kind: str, stub: Any, target: Target) -> None:
        self.take_parameter(kind, stub, target)

    def take_parameter(self, kind: str, stub: Any, target: Target) -> None:
        message = request(target)
        for parameters in (message.parameters, message.inputs[0].parameters):
            setattr(parameters["of_no_meaning"], kind, PARAMETERS[kind])
        assert stub.ModelInfer(message, timeout=WAIT_S).model_name == target.model

    @must
    def test_what_is_not_finite_passes(self, stub: Any, target: Target) -> None:
        arrays = {name: array for name, array in target.inputs().items() if array.dtype.kind == "f"}
        if not arrays:
            pytest.skip("the model takes no floating-point numbers")
        for value in (np.nan, np.inf, -np.inf):
            self.passes({name: np.full_like(array, value) for name, array in arrays.items()}, stub, target)

    @must
    def test_text_passes_byte_for_byte(self, stub: Any, target: Target) -> None:
        arrays = {name: array for name, array in target.inputs().items() if array.dtype.kind == "O"}
        if not arrays:
            pytest.skip("the model takes no BYTES")
        for value in ("\N{SNOWMAN}".encode(), b"nul\0inside\0", b"\xff\xfe no UTF-8", b"", b"x" * 70_000):
            self.passes({name: np.full_like(array, value) for name, array in arrays.items()}, stub, target)

    @must
    def test_a_dimension_of_size_zero_passes_or_is_invalid(self, stub: Any, target: Target, metadata: Any) -> None:
        given = target.inputs()
        empty = {
            spec.name: np.take(given[spec.name], np.arange(0), axis=list(spec.shape).index(-1))
            for spec in metadata.inputs
            if -1 in spec.shape
        }
        if not empty:
            pytest.skip("the model has no free dimension")
        _, status, said = outcome(partial(self.passes, empty, stub, target))
        assert status in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}, said

    def passes(self, arrays: Arrays, stub: Any, target: Target) -> None:
        """Raise unless a request with `arrays` is answered, and by the same bits where the model is known to echo."""
        usual = outputs(stub.ModelInfer(request(target), timeout=WAIT_S))
        given = target.inputs()
        message = request(target)
        for index, one in enumerate(message.inputs):
            if one.name in arrays:
                one.shape[:] = arrays[one.name].shape
                message.raw_input_contents[index] = raw_contents(arrays[one.name])
        answer = outputs(stub.ModelInfer(message, timeout=WAIT_S))
        for name, array in arrays.items():
            if name in usual and np.array_equal(usual[name], given[name]):
                assert answer[name].shape == array.shape
                assert raw_contents(answer[name]) == raw_contents(array)

    @must
    def test_requests_at_once_get_their_own_answers(self, stub: Any, target: Target) -> None:
        calls = []
        for i in range(32):
            message = request(target)
            message.id = f"id-{i}"
            calls.append(stub.ModelInfer.future(message, timeout=WAIT_S))
        assert [call.result().id for call in calls] == [f"id-{i}" for i in range(32)]

    @must
    def test_a_field_of_a_later_protocol_is_passed_over(self, target: Target) -> None:
        later = b"\xfa\x7f\x05later"  # field 2047, five bytes
        with channel(target.address) as to:
            call: Any = to.unary_unary(f"/{SERVICE}/ModelInfer")
            answer = call(request(target).SerializeToString() + later, timeout=WAIT_S)
        assert oip_pb2.ModelInferResponse.FromString(answer).model_name == target.model

    @should
    def test_compressed_requests_are_taken(self, stub: Any, target: Target) -> None:
        answer = stub.ModelInfer(request(target), timeout=WAIT_S, compression=grpc.Compression.Gzip)
        assert answer.model_name == target.model

    @should
    def test_messages_may_be_larger_than_grpcs_default(self, stub: Any, target: Target) -> None:
        if target.max_message_bytes < 2 * LARGE_BYTES:
            pytest.skip("the server was told to take less")
        message = request(target)
        message.parameters["padding"].string_param = "x" * LARGE_BYTES
        assert stub.ModelInfer(message, timeout=WAIT_S).model_name == target.model

    # What is wrong.

    @must
    @ways(MUST_REFUSE)
    def test_bad_input_is_refused_and_harms_nobody(
        self, spoil: Spoil, status: grpc.StatusCode, stub: Any, target: Target, metadata: Any
    ) -> None:
        self.refuses(spoil, status, stub, target, metadata)

    @should
    @ways(SHOULD_REFUSE)
    def test_doubtful_input_is_refused(
        self, spoil: Spoil, status: grpc.StatusCode, stub: Any, target: Target, metadata: Any
    ) -> None:
        self.refuses(spoil, status, stub, target, metadata)

    def refuses(self, spoil: Spoil, status: grpc.StatusCode, stub: Any, target: Target, metadata: Any) -> None:
        message = request(target)
        words = spoil(message, metadata)
        self.check_words(refused(lambda: stub.ModelInfer(message, timeout=WAIT_S), status), words)
        still_serves(stub, target)

    @should
    def test_garbage_is_invalid(self, stub: Any, target: Target) -> None:
        with channel(target.address) as to:
            for method in ("ModelInfer", "ModelMetadata", "ModelReady"):
                call: Any = to.unary_unary(f"/{SERVICE}/{method}")
                said = refused(partial(call, b"\xff\xff garbage", timeout=WAIT_S), grpc.StatusCode.INVALID_ARGUMENT)
                self.check_words(said, (f"inference.{method}Request",))
        still_serves(stub, target)

    @must
    def test_an_unknown_method_is_unimplemented(self, stub: Any, target: Target) -> None:
        with channel(target.address) as to:
            for path in (f"/{SERVICE}/NoSuchMethod", "/no.such.Service/ModelInfer"):
                call: Any = to.unary_unary(path)
                refused(partial(call, b"", timeout=WAIT_S), grpc.StatusCode.UNIMPLEMENTED)
        still_serves(stub, target)
