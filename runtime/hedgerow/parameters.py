"""What callers may say in a request's parameters, and read in an answer's."""

from typing import Final

from hedgerow.errors import InvalidInput
from hedgerow.policies import Privacy
from hedgerow.tensors import InferRequest

TIER: Final = "hedgerow_tier"
"""In an answer: the `Tier` that gave it."""
REASON: Final = "hedgerow_reason"
"""In an answer: why it is this one, in words."""
CONFIDENCE: Final = "hedgerow_confidence"
"""In an answer: how sure the edge's answer was, in [0, 1]; absent if it was not judged."""
RELEASE: Final = "hedgerow_release"
"""In an answer: the release on the device that took part, as "model/counter"; absent if none did."""
DEGRADED: Final = "hedgerow_degraded"
"""In an answer: whether it is second best."""
PRIVACY: Final = "hedgerow_privacy"
"""In a request: a value of `Privacy`."""
STICKY: Final = "hedgerow_sticky"
"""In a request: a text; requests that bring the same one go to the same target of a split while the weights stand. Says
nothing where nothing is split."""
SPLIT: Final = "hedgerow_split"
"""In an answer: the name of the target that gave it, where there was a choice."""
SPLIT_REASON: Final = "hedgerow_split_reason"
"""In an answer: which target was passed over for that one, and why; absent if none was."""
FINAL_ASKED: Final = "triton_enable_empty_final_response"
"""In a streamed request: whether its last answer is to be marked as such (Triton's extension);"""
FINAL: Final = "triton_final_response"
"""in its answers: whether it is the last."""
STATUS: Final = "hedgerow_status"
"""In a streamed error: the name of its gRPC status, for which the protocol has no place in a stream."""
PREFIX: Final = "hedgerow"
"""How our parameters begin, well spelt or not."""

_PRIVACIES: Final = {privacy.value: privacy for privacy in Privacy}


def privacy(request: InferRequest) -> Privacy:
    """What the request allows; what is not known here is refused, be it name or value: it may forbid anything."""
    if not request.parameters:
        return Privacy.DEFAULT
    for name in request.parameters:
        if name not in {PRIVACY, STICKY} and name.casefold().startswith(PREFIX):
            raise InvalidInput(f"there is no parameter {name!r}; requests may have {PRIVACY!r} and {STICKY!r}")
    value = request.parameters.get(PRIVACY, "")
    known = _PRIVACIES.get(value) if isinstance(value, str) else None
    if known is None:
        raise InvalidInput(f"{PRIVACY} is {value!r}; it must be one of {', '.join(map(repr, _PRIVACIES))}")
    return known
