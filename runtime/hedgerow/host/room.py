"""Who is unloaded to make room in memory for another model. Pure: no IO, no clock.

- What somebody uses stays, and so does what is pinned. Of the rest, what was used longest ago goes first.
- No more is unloaded than has to be; and nothing at all if even that would not make enough room.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

from hedgerow.errors import ModelNotReady
from hedgerow.host.settings import ModelFile

MEMORY_FACTOR = 1.5
"""Memory that an open model takes, as a multiple of its file: the weights, often once more in the layout of the
kernels, and what is between the layers."""
ROOM_RETRY_S = 1.0
"""When to ask again for a model that is being loaded, or that there is no room for."""


class Open(Protocol):
    """A model that is open."""

    file: ModelFile
    memory_bytes: int
    """What it is taken to need."""
    used: int
    """The larger, the more recently."""

    @property
    def users(self) -> int:
        """Requests that wait for it or run."""
        ...


M = TypeVar("M", bound=Open)


def leaving(
    newcomer: ModelFile, memory_bytes: int, serving: Iterable[M], *, taken_bytes: int, budget_bytes: int
) -> list[M]:
    """Those of `serving` to unload so that `newcomer`, which needs `memory_bytes`, fits; `budget_bytes` 0: no limit.

    Raises `ModelNotReady` if it cannot be made to fit.
    """
    missing = taken_bytes + memory_bytes - budget_bytes if budget_bytes else 0
    idle = [one for one in serving if not one.users and not one.file.pinned and one.file.model != newcomer.model]
    if missing > sum(one.memory_bytes for one in idle):  # all of them would go for nothing
        raise ModelNotReady(
            f"there is no room for {newcomer.model}: it needs about {memory_bytes} bytes, and"
            f" {taken_bytes} of {budget_bytes} are taken by models in use",
            retry_after_s=ROOM_RETRY_S,
        )
    chosen: list[M] = []
    for oldest in sorted(idle, key=lambda one: one.used):
        if missing <= 0:
            break
        missing -= oldest.memory_bytes
        chosen.append(oldest)
    return chosen
