"""What rules about a server are made of: how strict they are, and what each of them needs."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import pytest
from contract.spoil import Spoil, Words
from contract.target import WAIT_S, Target, channel, outcome
from numpy.typing import NDArray

from hedgerow.oip.messages import response_from_proto
from hedgerow.proto import oip_pb2, oip_pb2_grpc

T = TypeVar("T", bound=Callable[..., Any])
LEVEL = "oip_level"
"""The attribute of a rule that says how strict it is."""


def must(rule: T) -> T:
    """A rule that a server fails the suite by."""
    setattr(rule, LEVEL, "MUST")
    return rule


def should(rule: T) -> T:
    """A rule whose breach is shown."""
    setattr(rule, LEVEL, "SHOULD")
    return rule


def ways(spoils: list[tuple[Spoil, grpc.StatusCode]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("spoil", "status"), [pytest.param(*way, id=way[0].__name__) for way in spoils])


def outputs(response: oip_pb2.ModelInferResponse) -> dict[str, NDArray[Any]]:
    """The arrays of a well-formed answer."""
    for one in response.outputs:
        if not one.contents.ByteSize():
            one.ClearField("contents")  # MLServer sends them, empty, beside the raw ones
    return {one.name: one.array for one in response_from_proto(response).outputs}


class Rules:
    """Base of classes of rules."""

    @pytest.fixture
    def stub(self, target: Target) -> Iterator[Any]:
        with channel(target.address) as to:
            yield oip_pb2_grpc.GRPCInferenceServiceStub(to)

    @pytest.fixture
    def metadata(self, stub: Any, target: Target) -> oip_pb2.ModelMetadataResponse:
        answer: oip_pb2.ModelMetadataResponse = stub.ModelMetadata(
            oip_pb2.ModelMetadataRequest(name=target.model), timeout=WAIT_S
        )
        return answer

    def check_words(self, said: str, words: Words) -> None:
        """What an error has to say: for other servers, anything but a traceback."""
        assert "Traceback (most recent call last)" not in said

    def implemented(self, call: Callable[[], Any]) -> Any:
        """What the call of an optional method gives."""
        answer, status, said = outcome(call)
        if status is grpc.StatusCode.UNIMPLEMENTED:
            pytest.skip("the server does not have it")
        assert status is grpc.StatusCode.OK, said
        return answer
