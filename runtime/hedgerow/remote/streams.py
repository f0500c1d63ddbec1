"""What the messages of a stream say, in the dialects that there are. Pure.

Triton, OpenVINO Model Server and we stream `ModelStreamInferResponse`, which has an answer or an error; only ours says
the error's status, in a parameter. MLServer streams bare answers; an error ends its stream. Who asks Triton for the
last answer to be marked gets an empty one for it, so we do not ask: the stream of one request ends with its answers.
"""

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from msgspec.structs import replace

from hedgerow.oip.messages import response_from_proto
from hedgerow.parameters import FINAL, FINAL_ASKED, STATUS
from hedgerow.proto import oip_pb2
from hedgerow.remote.connection import meant, parsed
from hedgerow.rpc import failed
from hedgerow.tensors import InferRequest, InferResponse


def plain(request: InferRequest) -> InferRequest:
    """The request as it is streamed: without the wish to be told of the last answer, which is between others."""
    if FINAL_ASKED not in request.parameters:
        return request
    return replace(request, parameters={key: one for key, one in request.parameters.items() if key != FINAL_ASKED})


def streamed(raw: bytes, server: str) -> InferResponse | None:
    """The answer in a message of the stream; None where it only marks the end. Raises the error that it says."""
    message = _message(raw, server)
    response = message.infer_response
    if message.error_message:
        name = response.parameters[STATUS].string_param if STATUS in response.parameters else ""
        fault = failed(grpc.StatusCode.__members__.get(name, grpc.StatusCode.UNKNOWN), message.error_message)
        raise meant(fault)(f"{server}: {fault}")
    if FINAL in response.parameters:
        if not response.outputs:
            return None
        del response.parameters[FINAL]
    return response_from_proto(response)


def _message(raw: bytes, server: str) -> oip_pb2.ModelStreamInferResponse:
    # Read as the other message, an answer of MLServer's has its model's name for an error, and fields to spare.
    try:
        message = oip_pb2.ModelStreamInferResponse.FromString(raw)
        if not len(UnknownFieldSet(message)):
            return message
    except DecodeError:
        pass
    bare = parsed(oip_pb2.ModelInferResponse.FromString, raw, server)
    return oip_pb2.ModelStreamInferResponse(infer_response=bare)
