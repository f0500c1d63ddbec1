"""What `split`, `shadow` and `quotas` share: what callers may say, who may see a request, and how large it is."""

from collections.abc import Iterable

from hedgerow.parameters import PREFIX, PRIVACY, STICKY
from hedgerow.policies import Privacy
from hedgerow.tensors import InferRequest, Tensor


def privacy(request: InferRequest) -> Privacy:
    """What `request` allows; the strictest where it says what is not known here, which may forbid anything."""
    for name in request.parameters:
        if name not in {PRIVACY, STICKY} and name.casefold().startswith(PREFIX):
            return Privacy.EDGE_ONLY
    value = request.parameters.get(PRIVACY, "")
    return Privacy(value) if value in tuple(Privacy) else Privacy.EDGE_ONLY


def payload_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of what `tensors` hold."""
    return sum(
        sum(map(len, one.array.ravel().tolist())) if one.array.dtype == object else one.array.nbytes for one in tensors
    )
