"""What is lifted out of a message and put in again is what protobuf itself would read and write."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.proto import oip_pb2
from hedgerow.wire import PIECE_BYTES, RAW_INPUTS, RAW_OUTPUTS, joined, lift, serialised, size_of

RAWS = st.lists(st.binary(max_size=300), max_size=4)

LARGE = b"large" * PIECE_BYTES


def message(raws: list[bytes]) -> oip_pb2.ModelInferRequest:
    whole = oip_pb2.ModelInferRequest(model_name="m", id="i" * 200, raw_input_contents=raws)
    whole.inputs.add(name="x", datatype="FP32", shape=[2, 300]).contents.fp32_contents.extend([1.0, 2.0])
    whole.parameters["double"].double_param = 1.5
    whole.parameters["int"].int64_param = -1
    return whole


@given(RAWS)
def test_what_is_lifted_is_all_there_was_and_the_rest_is_untouched(raws: list[bytes]) -> None:
    head, lifted = lift(message(raws).SerializeToString(), RAW_INPUTS)
    assert [bytes(raw) for raw in lifted] == raws
    assert oip_pb2.ModelInferRequest.FromString(head) == message([])


@given(RAWS, RAWS)
def test_fields_may_stand_anywhere(first: list[bytes], last: list[bytes]) -> None:
    fields = oip_pb2.ModelInferRequest(raw_input_contents=first).SerializeToString()
    head, lifted = lift(fields + message(last).SerializeToString(), RAW_INPUTS)
    assert [bytes(raw) for raw in lifted] == first + last
    assert oip_pb2.ModelInferRequest.FromString(head) == message([])


@given(st.lists(st.binary(max_size=300) | st.just(LARGE), max_size=4))
def test_what_is_serialised_is_what_protobuf_reads(raws: list[bytes]) -> None:
    head = oip_pb2.ModelInferResponse(model_name="m").SerializeToString()
    sent = serialised([head], RAW_OUTPUTS, [memoryview(raw) for raw in raws])
    whole = oip_pb2.ModelInferResponse.FromString(joined(sent))
    assert whole == oip_pb2.ModelInferResponse(model_name="m", raw_output_contents=raws)
    assert size_of(sent) == len(joined(sent))


def test_what_may_still_be_written_to_is_copied_and_what_may_not_is_sent_from_where_it_lies() -> None:
    lasting, changing = memoryview(LARGE), memoryview(bytearray(LARGE))
    sent = serialised([], RAW_OUTPUTS, [lasting, changing])
    changing[:] = bytes(len(changing))
    assert isinstance(sent, list)
    assert sent[1] is lasting
    assert oip_pb2.ModelInferResponse.FromString(joined(sent)).raw_output_contents == [LARGE, LARGE]


@given(st.binary(max_size=60))
def test_what_cannot_be_lifted_cannot_be_parsed(noise: bytes) -> None:
    try:
        head, lifted = lift(noise, RAW_INPUTS)
    except DecodeError:
        if not has_groups(noise):
            with pytest.raises(DecodeError):
                oip_pb2.ModelInferRequest.FromString(noise)
    else:
        assert len(head) + sum(map(len, lifted)) <= len(noise)


def has_groups(raw: bytes) -> bool:
    """Whether some byte could begin a group, which protobuf skips and we refuse: nobody sends them."""
    return any(byte & 7 in {3, 4} for byte in raw)


def test_a_message_that_is_cut_off_is_not_lifted() -> None:
    whole = message([b"a" * 300]).SerializeToString()
    for size in range(1, len(whole)):
        try:
            lift(whole[:size], RAW_INPUTS)
        except DecodeError:
            continue
        oip_pb2.ModelInferRequest.FromString(whole[:size])
