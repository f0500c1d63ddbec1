"""The two wires that servers are asked over: a request as bytes that any load generator can send, and answers read."""

import base64
import json
import struct
import urllib.request
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from bench.serving.models import Model
from numpy.typing import NDArray

from hedgerow.proto import oip_pb2

HOST = "127.0.0.1"
ASK_S = 20.0
"""How long one checked answer may take."""
FRAME_HEADER_BYTES = 5
"""Of a gRPC message: compressed or not, and its length."""


class WrongAnswer(Exception):
    """A server answered, and not what is right."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What a load generator needs to know. Of HTTP/1.1 and JSON; `Grpc` is the other."""

    name: str = "http"
    path: str = "/predict"
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)

    def body(self, model: Model) -> bytes:
        """The body of a request to `model`, as it travels."""
        return json.dumps({"data": base64.b64encode(model.request.tobytes()).decode()}).encode()

    def array(self, answer: bytes) -> NDArray[Any]:
        """The floats in the body of an answer, flat."""
        return np.frombuffer(base64.b64decode(json.loads(answer)["data"]), np.float32)

    def ask(self, port: int, body: bytes) -> bytes:
        """The body of the answer to one request; raises `OSError` where there is none."""
        request = urllib.request.Request(f"http://{HOST}:{port}{self.path}", data=body, headers=dict(self.headers))
        with urllib.request.urlopen(request, timeout=ASK_S) as response:
            return bytes(response.read())

    def judge(self, model: Model, answer: bytes) -> None:
        """Raises `WrongAnswer`, saying what is wrong."""
        try:
            array = self.array(answer)
        except Exception as error:
            raise WrongAnswer(f"the answer cannot be read: {error!r:.200}") from error
        if problem := model.wrong(array):
            raise WrongAnswer(problem)


@dataclass(frozen=True, slots=True)
class Grpc(Wire):
    """The Open Inference Protocol over HTTP/2 in plain text. Bodies and answers have gRPC's header in front."""

    name: str = "grpc"
    path: str = "/inference.GRPCInferenceService/ModelInfer"
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/grpc"), ("te", "trailers"))

    def body(self, model: Model) -> bytes:
        return _framed(model.message())

    def array(self, answer: bytes) -> NDArray[Any]:
        response = oip_pb2.ModelInferResponse.FromString(answer[FRAME_HEADER_BYTES:])
        if response.raw_output_contents:
            return np.frombuffer(response.raw_output_contents[0], np.float32)
        return np.array(response.outputs[0].contents.fp32_contents, np.float32)

    def ask(self, port: int, body: bytes) -> bytes:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(f"{HOST}:{port}", options=options) as channel:
            method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(self.path)
            call = method.future(body[FRAME_HEADER_BYTES:], timeout=ASK_S)
            if call.code() is not grpc.StatusCode.OK:
                raise ConnectionError(f"{call.code().name}: {call.details()}")
            return _framed(call.result())


def _framed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


WIRES = {wire.name: wire for wire in (Wire(), Grpc())}
