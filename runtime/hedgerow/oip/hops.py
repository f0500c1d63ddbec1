"""How many routers a call has passed, for what is asked on its behalf: so that circles end."""

from google.protobuf.message import Message

from hedgerow.errors import InvalidInput
from hedgerow.rpc import Call, Handler
from hedgerow.tensors import HOPS, HOPS_KEY


def counting_hops(handle: Handler) -> Handler:
    """`handle`, whose questions to backends say how many routers the call has passed, so that circles end."""

    async def answer(request: Message, call: Call) -> Message:
        count_hops(call)
        answered: Message = await handle(request, call)
        return answered

    return answer


def count_hops(call: Call) -> int:
    """How many routers `call` has passed, for what is asked on its behalf."""
    said = call.metadata.get(HOPS_KEY, "0")
    if not said.isdecimal() or len(said) > 4:
        raise InvalidInput(f"{HOPS_KEY} is {said[:20]!r}; expected a small number")
    hops = int(said)
    HOPS.set(hops)
    return hops
