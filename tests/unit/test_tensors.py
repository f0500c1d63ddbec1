"""Requests and answers survive the wire bit by bit; what is malformed is named; our messages are the published ones."""

import struct
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2, service_pb2

from hedgerow.errors import EngineFault, HedgerowError, InvalidInput, Unsupported
from hedgerow.oip import messages
from hedgerow.oip.classification import classified
from hedgerow.oip.messages import (
    request_from_proto,
    request_to_proto,
    response_from_proto,
    response_to_proto,
)
from hedgerow.oip.model_metadata import config_to_proto, metadata_from_proto, metadata_to_proto
from hedgerow.proto import oip_pb2
from hedgerow.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Tensor,
    TensorSpec,
    check_request,
    datatype_of,
    numpy_dtype,
    tensor,
)

DATATYPES = (
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
)  # fmt: skip
TYPED_FIELD = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
PARAMETERS = st.dictionaries(
    st.text(max_size=20),
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    max_size=5,
)


@st.composite
def tensors(draw: st.DrawFn, datatypes: tuple[str, ...] = DATATYPES) -> Tensor:
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        array = np.empty(shape, object)
        for index in np.ndindex(shape):
            array[index] = draw(st.binary(max_size=12))
    else:
        array = draw(hnp.arrays(numpy_dtype(datatype), shape))  # NaN, infinities and extremes included
        if draw(st.booleans()):
            array = np.asfortranarray(array)  # not how the wire has it
    return Tensor(draw(st.text(min_size=1, max_size=8)), datatype, array)


def same(a: Tensor, b: Tensor) -> bool:
    if (a.name, a.datatype, a.shape, a.array.dtype) != (b.name, b.datatype, b.shape, b.array.dtype):
        return False
    if a.datatype == "BYTES":
        return bool(a.array.tolist() == b.array.tolist())
    return a.array.tobytes() == b.array.tobytes()  # NaN is NaN


UNIQUE = st.lists(tensors(), max_size=3, unique_by=lambda one: one.name).map(tuple)


@given(UNIQUE, st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=2).map(tuple), PARAMETERS, st.text())
def test_a_request_survives_the_wire(
    inputs: tuple[Tensor, ...], outputs: tuple[str, ...], parameters: dict[str, Any], identity: str
) -> None:
    sent = InferRequest(model="m", version="3", id=identity, inputs=inputs, outputs=outputs, parameters=parameters)
    # The same bytes must also be a request to everybody else.
    wire = request_to_proto(sent).SerializeToString()
    wire = service_pb2.ModelInferRequest.FromString(wire).SerializeToString()
    got = request_from_proto(oip_pb2.ModelInferRequest.FromString(wire))
    assert (got.model, got.version, got.id, got.outputs) == ("m", "3", identity, outputs)
    assert got.parameters == parameters
    assert {k: type(v) for k, v in got.parameters.items()} == {k: type(v) for k, v in parameters.items()}
    assert len(got.inputs) == len(inputs)
    assert all(map(same, got.inputs, inputs))


@given(UNIQUE, PARAMETERS)
def test_an_answer_survives_the_wire(outputs: tuple[Tensor, ...], parameters: dict[str, Any]) -> None:
    sent = InferResponse(model="m", version="3", id="i", outputs=outputs, parameters=parameters)
    wire = response_to_proto(sent).SerializeToString()
    got = response_from_proto(oip_pb2.ModelInferResponse.FromString(wire))
    assert (got.model, got.version, got.id, got.parameters) == ("m", "3", "i", parameters)
    assert all(map(same, got.outputs, outputs))


@given(tensors(tuple(TYPED_FIELD)))
def test_typed_contents_are_read_like_raw_ones(one: Tensor) -> None:
    message = oip_pb2.ModelInferRequest(model_name="m")
    entry = message.inputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
    getattr(entry.contents, TYPED_FIELD[one.datatype]).extend(one.array.ravel().tolist())
    (got,) = request_from_proto(oip_pb2.ModelInferRequest.FromString(message.SerializeToString())).inputs
    assert same(got, Tensor(one.name, one.datatype, one.array))
    # Foreign servers may answer in this form too.
    answer = oip_pb2.ModelInferResponse.FromString(
        oip_pb2.ModelInferResponse(
            outputs=[
                oip_pb2.ModelInferResponse.InferOutputTensor(
                    name=one.name, datatype=one.datatype, shape=one.shape, contents=entry.contents
                )
            ]
        ).SerializeToString()
    )
    assert same(response_from_proto(answer).outputs[0], got)


@given(
    st.sampled_from([*DATATYPES, "FP33", ""]),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=4),
    st.binary(max_size=64),
)
def test_no_bytes_and_no_shape_do_worse_than_a_named_refusal(datatype: str, shape: list[int], raw: bytes) -> None:
    message = oip_pb2.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    message.inputs.add(name="the-input", datatype=datatype, shape=shape)
    try:
        (one,) = request_from_proto(message).inputs
    except InvalidInput as error:
        assert "the-input" in str(error)  # noqa: PT017 (either outcome is right, and this is one of them)
    else:
        assert list(one.shape) == shape
        if datatype != "BYTES":
            assert one.array.nbytes == len(raw)


def test_a_large_input_is_a_view_on_the_received_bytes() -> None:
    sent = InferRequest(model="m", inputs=(tensor("x", np.ones((512, 512), np.float32)),))
    array = request_from_proto(request_to_proto(sent)).input("x")
    base = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base, bytes)
    assert not array.flags.writeable


def one_input(datatype: str = "FP32", shape: tuple[int, ...] = (2,), **contents: Any) -> oip_pb2.ModelInferRequest:
    message = oip_pb2.ModelInferRequest(model_name="m")
    entry = message.inputs.add(name="x", datatype=datatype, shape=shape)
    if contents:
        entry.contents.MergeFrom(oip_pb2.InferTensorContents(**contents))
    return message


def raw_input(datatype: str, shape: tuple[int, ...], raw: bytes) -> oip_pb2.ModelInferRequest:
    message = one_input(datatype, shape)
    message.raw_input_contents.append(raw)
    return message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (one_input(), "expected 2 elements in fp32_contents, got 0"),
        (one_input(fp32_contents=[1]), "expected 2 elements in fp32_contents, got 1"),
        (one_input(fp64_contents=[1, 2]), "expected FP32 in fp32_contents, got fp64_contents"),
        (one_input(fp32_contents=[1, 2], int_contents=[1]), "got int_contents"),
        (one_input("FP16", fp32_contents=[1, 2]), "expected FP16 as raw contents"),
        (one_input("BF16", uint_contents=[1, 2]), "expected BF16 as raw contents"),
        (one_input("INT8", int_contents=[1, 300]), "expected values of INT8, got 300"),
        (one_input("UINT16", uint_contents=[1, 70000]), "expected values of UINT16, got 70000"),
        (one_input(shape=(1,) * 33, fp32_contents=[1]), "expected at most 32 dimensions, got 33"),
        (raw_input("FP32", (2**62, 0), b""), "elements"),
        (raw_input("FP32", (2,), bytes(7)), r"expected 8 bytes \(2 elements of FP32\), got 7"),
        (raw_input("BOOL", (2,), b"\1\2"), "expected a BOOL to be the byte 0 or 1, got 2"),
        (raw_input("BYTES", (2,), bytes(7)), "expected 2 BYTES elements, got 7 bytes"),
        (raw_input("BYTES", (2**31,), bytes(16)), "too few for their lengths"),
        (raw_input("BYTES", (1,), struct.pack("<I", 9) + b"abc"), "expected element 0 to have 9 bytes, got 3"),
        (raw_input("BYTES", (2,), struct.pack("<I", 4) + bytes(4)), "expected 2 BYTES elements, got only 1"),
        (raw_input("BYTES", (1,), struct.pack("<I", 3) + b"abcd"), "got 1 bytes after them"),
    ],
)
def test_a_malformed_input_is_named_with_what_was_expected(message: oip_pb2.ModelInferRequest, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"input 'x': .*{words}"):
        request_from_proto(message)


def test_what_would_change_the_answer_and_is_not_done_here_is_refused() -> None:
    message = one_input(fp32_contents=[1, 2])
    asked = message.outputs.add(name="y")
    asked.parameters["classification"].int64_param = 0
    with pytest.raises(InvalidInput, match=r"'y'.*classification"):
        request_from_proto(message)
    del asked.parameters["classification"]
    asked.parameters["shared_memory_region"].string_param = "r"
    with pytest.raises(Unsupported, match=r"'y'.*shared_memory_region"):
        request_from_proto(message)


@pytest.mark.parametrize(
    ("array", "shape", "labels", "count", "wanted"),
    [
        (np.array([[0.5, 2, 2], [1, 0, -1]], np.float32), (-1, 3), "", 2,
         [["2.000000:1", "2.000000:2"], ["1.000000:0", "0.000000:1"]]),
        (np.array([[7, 9]], np.uint8), (-1, 2), "cat,dog", 5, [["9:1:dog", "7:0:cat"]]),
        (np.array([3, 1], np.int64), (2,), "cat", 2, ["3:0:cat", "1:1"]),
        (np.zeros((0, 4), np.float32), (-1, 4), "", 2, []),
        (np.zeros((2, 0), np.float32), (-1, -1), "", 2, [[], []]),
    ],
)  # fmt: skip
def test_an_output_as_classes_gives_the_largest_first(
    array: NDArray[Any], shape: tuple[int, ...], labels: str, count: int, wanted: list[Any]
) -> None:
    spec = TensorSpec("y", datatype_of(array.dtype), shape)
    metadata = ModelMetadata("m", ("1",), "", (), (spec,), {"labels": labels})
    message = oip_pb2.ModelInferRequest(model_name="m")
    message.outputs.add(name="y").parameters["classification"].int64_param = count
    response = InferResponse(model="m", version="1", outputs=(Tensor("y", spec.datatype, array),))
    got = classified(response, message, metadata).outputs[0]
    assert got.datatype == "BYTES"
    texts = [[e.decode() for e in row] if isinstance(row, list) else row.decode() for row in got.array.tolist()]
    assert texts == wanted
    text = InferResponse(model="m", version="1", outputs=(tensor("y", ["a"]),))
    with pytest.raises(InvalidInput, match=r"'y'.*classification"):
        classified(text, message, metadata)


def test_a_malformed_answer_is_the_servers_fault_not_the_callers() -> None:
    answer = oip_pb2.ModelInferResponse(raw_output_contents=[bytes(3)])
    answer.outputs.add(name="y", datatype="FP32", shape=[1])
    with pytest.raises(EngineFault, match="output 'y': expected 4 bytes"):
        response_from_proto(answer)
    wrong = InferResponse(model="m", version="1", outputs=(Tensor("y", "FP32", np.zeros(1)),))
    with pytest.raises(EngineFault, match="output 'y': expected an array of float32 for FP32, got float64"):
        response_to_proto(wrong)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (Tensor("x", "FP32", np.zeros(1)), "expected an array of float32"),
        (Tensor("x", "BYTES", np.array(["text"], object)), "expected BYTES elements to be bytes, got str"),
        (Tensor("x", "FP128", np.zeros(1)), "'FP128'"),
    ],
)
def test_an_array_is_never_sent_as_what_it_is_not(value: Tensor, fault: str) -> None:
    with pytest.raises(InvalidInput, match=f"input 'x': .*{fault}"):
        request_to_proto(InferRequest(model="m", inputs=(value,)))


def test_arrays_become_tensors_of_their_own_type() -> None:
    for datatype in set(DATATYPES) - {"BF16", "BYTES"}:
        assert datatype_of(numpy_dtype(datatype)) == datatype
    assert datatype_of(np.dtype(">f4")) == "FP32"
    big_endian = request_to_proto(InferRequest(model="m", inputs=(tensor("x", np.array([1.5], ">f4")),)))
    assert big_endian.raw_input_contents[0] == struct.pack("<f", 1.5)
    assert tensor("x", [["grün", "b"]]).array.tolist() == [["grün".encode(), b"b"]]
    with pytest.raises(InvalidInput, match="complex128"):
        tensor("x", [1j])
    with pytest.raises(InvalidInput, match="parameter 'p'"):
        request_to_proto(InferRequest(model="m", inputs=(), parameters={"p": 2**64}))


METADATA = ModelMetadata(
    "m",
    ("1", "2"),
    "onnx",
    (TensorSpec("a", "FP32", (-1, 4)), TensorSpec("b", "BYTES", (1,))),
    (TensorSpec("y", "BF16", (-1,)),),
    {"sha256": "00ff"},
)
A, B = tensor("a", np.zeros((7, 4), np.float32)), tensor("b", ["text"])


def test_the_interface_survives_the_wire_and_tells_the_configuration() -> None:
    wire = metadata_to_proto(METADATA).SerializeToString()
    assert metadata_from_proto(oip_pb2.ModelMetadataResponse.FromString(wire)) == METADATA
    config = model_config_pb2.ModelConfig.FromString(config_to_proto(METADATA).SerializeToString())
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("a", model_config_pb2.TYPE_FP32, [-1, 4]),
        ("b", model_config_pb2.TYPE_STRING, [1]),
    ]
    assert config.output[0].data_type == model_config_pb2.TYPE_BF16


def test_a_request_that_fits_passes_whatever_the_order_of_its_inputs() -> None:
    check_request(InferRequest(model="m", inputs=(A, B)), METADATA)
    check_request(InferRequest(model="m", inputs=(B, A), outputs=("y",)), METADATA)


@pytest.mark.parametrize(
    ("inputs", "outputs", "words"),
    [
        ((A,), (), r"input 'b' is missing: model m expects a FP32 \[-1, 4\], b BYTES \[1\]"),
        ((A, B, tensor("c", [1])), (), "there is no input 'c'"),
        ((A, B, A), (), "input 'a': expected each name once"),
        ((A, tensor("b", [1])), (), r"input 'b': expected BYTES \[1\], got INT64 \[1\]"),
        ((tensor("a", np.zeros((7, 3), np.float32)), B), (), r"input 'a': expected FP32 \[-1, 4\], got FP32 \[7, 3\]"),
        ((tensor("a", np.zeros(4, np.float32)), B), (), r"got FP32 \[4\]"),
        ((A, B), ("z",), r"there is no output 'z': model m gives y BF16 \[-1\]"),
        ((A, B), ("y", "y"), "output 'y': expected each name once"),
    ],
)
def test_a_request_that_does_not_fit_the_model_is_named(
    inputs: tuple[Tensor, ...], outputs: tuple[str, ...], words: str
) -> None:
    with pytest.raises(HedgerowError, match=words) as caught:
        check_request(InferRequest(model="m", inputs=inputs, outputs=outputs), METADATA)
    assert isinstance(caught.value, InvalidInput)


# A field of our own, which others skip as unknown.
OURS = {"inference.ModelMetadataResponse.properties": 1000}


def test_every_field_that_we_declare_is_the_published_one() -> None:
    published: dict[str, Descriptor | EnumDescriptor] = {}

    def collect(message: Any) -> None:
        published[message.full_name] = message
        for inner in message.nested_types:
            collect(inner)
        published.update((enum.full_name, enum) for enum in message.enum_types)

    for file in (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR):
        for message in file.message_types_by_name.values():
            collect(message)
        published.update((enum.full_name, enum) for enum in file.enum_types_by_name.values())

    def facts(field: Any) -> tuple[Any, ...]:
        kind = field.message_type or field.enum_type
        oneof = field.containing_oneof
        return field.number, field.type, field.is_repeated, kind and kind.full_name, oneof and oneof.name

    def compare(ours: Any) -> int:
        theirs = published[ours.full_name]
        assert isinstance(theirs, Descriptor)
        fields = [field for field in ours.fields if field.full_name not in OURS]
        for field in fields:
            assert facts(field) == facts(theirs.fields_by_name[field.name]), field.full_name
        maps = {field.message_type.full_name for field in ours.fields if field.full_name in OURS}
        return len(fields) + sum(compare(inner) for inner in ours.nested_types if inner.full_name not in maps)

    fields = sum(compare(message) for message in oip_pb2.DESCRIPTOR.message_types_by_name.values())
    assert fields > 100
    metadata = oip_pb2.ModelMetadataResponse.DESCRIPTOR
    assert {field.full_name: field.number for field in metadata.fields if field.full_name in OURS} == OURS
    for enum in oip_pb2.DESCRIPTOR.enum_types_by_name.values():
        theirs: Any = published[enum.full_name]
        assert {v.name: v.number for v in enum.values} == {v.name: v.number for v in theirs.values}
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        other = service.methods_by_name[method.name]
        assert (method.input_type.full_name, method.client_streaming, method.output_type.full_name) == (
            other.input_type.full_name, other.client_streaming, other.output_type.full_name
        )  # fmt: skip


def test_a_shape_that_is_refused_is_not_kept() -> None:
    before = messages._elements.cache_info().currsize
    one = oip_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1] * 10_000)
    with pytest.raises(InvalidInput, match="at most 32 dimensions, got 10000"):
        request_from_proto(oip_pb2.ModelInferRequest(model_name="m", inputs=[one], raw_input_contents=[bytes(4)]))
    assert messages._elements.cache_info().currsize == before
