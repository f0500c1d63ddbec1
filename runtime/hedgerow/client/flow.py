"""Which requests of a stream over gRPC still wait for answers, and what an answer means to the caller. No IO.

The protocol has neither statuses nor an end for the answers to one request. So each request asks to be told of its last
answer, as Triton does it; from a server that does not know of that, the first answer is taken for the only one.
"""

from collections.abc import Callable
from typing import Final

import grpc

from hedgerow.client.interface import Outcome
from hedgerow.client.plans import Ask, Refused, message, result
from hedgerow.errors import EngineFault, HedgerowError, InvalidInput
from hedgerow.oip.messages import response_from_proto
from hedgerow.parameters import FINAL, FINAL_ASKED, STATUS
from hedgerow.proto import oip_pb2
from hedgerow.remote.connection import parsed
from hedgerow.rpc import failed

SERVER: Final = "the server"


class Flow:
    """One stream. `sent` and `heard` may be called in different threads; `finished` is called as a request is."""

    def __init__(self, failed: Callable[[str, HedgerowError], HedgerowError], finished: Callable[[], object]) -> None:
        self._failed = failed
        self._finished = finished
        self._open: dict[str, Ask | Refused] = {}
        self.broken: Exception | None = None
        """What the caller's own iterable raised."""

    def sent(self, item: Ask | Refused) -> bytes:
        """The message for `item`, which is open from now on."""
        request = item.request
        # Without inputs, a request that can't be written is refused by the server too, in its place among the others.
        written = oip_pb2.ModelInferRequest(model_name=request.model, model_version=request.version, id=request.id)
        if isinstance(item, Ask):
            try:
                written = message(item)
                written.parameters[FINAL_ASKED].bool_param = True
            except InvalidInput as error:
                item = Refused(request, error)
        self._open[request.id] = item
        return written.SerializeToString()

    def heard(self, raw: bytes) -> Outcome | None:
        """What an answer means to the caller; None: nothing. Raises `EngineFault` for what is no answer at all."""
        answer = parsed(oip_pb2.ModelStreamInferResponse.FromString, raw, SERVER)
        response = answer.infer_response
        marked = FINAL in response.parameters
        # A server that repeats no ids answers one request after the other.
        identity = response.id or next(iter(list(self._open)), "")
        item = self._open.get(identity)
        if item is not None and (answer.error_message or not marked or response.parameters[FINAL].bool_param):
            del self._open[identity]
            self._finished()
        if isinstance(item, Refused):
            return self._failed(identity, item.error)
        if answer.error_message:
            name = response.parameters[STATUS].string_param if STATUS in response.parameters else ""
            status = grpc.StatusCode.__members__.get(name, grpc.StatusCode.UNKNOWN)
            return self._failed(identity, failed(status, answer.error_message))
        if marked and not response.outputs:
            return None
        if marked:
            del response.parameters[FINAL]
        try:
            return result(response_from_proto(response))
        except EngineFault as error:
            return self._failed(identity, error)
