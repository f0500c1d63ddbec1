"""When a call is tried again. No IO, no clock.

Inference has no effect but its answer, so a request may be sent again even where the first may have been executed. The
rules:

- only what the same request may get past: `Unavailable`; and `Overloaded`, if the server said when to come back;
- never before the moment that the server named, and after a random pause on top, or its callers would all come at once;
  where it named none, after a pause between nothing and a bound that doubles ("full jitter");
- never where the pause would outlast the deadline: the caller is told at once what is wrong;
- at most so often, and at most for a share of the client's calls: a server in trouble is not helped by more of them.

They are ours rather than gRPC's, which does not send a request again that is larger than its buffer of 256 KiB, waits
for the deadline where the server asks for more patience than there is, and varies its pauses by a fifth only.
"""

import random
import threading

from hedgerow.errors import HedgerowError, Overloaded, Unavailable
from hedgerow.remote.breaker import RetryBudget

MAX_ATTEMPTS = 3
RETRY_SHARE = 0.2
"""Retries for each call, in the long run."""
RETRY_BURST = 5
"""Retries that may be made before."""
FIRST_PAUSE_S = 0.1
"""Longest pause before the second attempt."""
MAX_PAUSE_S = 2.0


class Retries:
    """The retries of one client; threads may share it."""

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._budget = RetryBudget(RETRY_SHARE, RETRY_BURST)
        self._lock = threading.Lock()

    def called(self) -> None:
        """Count a call."""
        with self._lock:
            self._budget.requested()

    def pause_s(self, error: HedgerowError, attempt: int, remaining_s: float) -> float | None:
        """How long to wait before trying again after attempt number `attempt` failed so; None: not again."""
        asked_s = error.retry_after_s
        again = isinstance(error, Unavailable) or (isinstance(error, Overloaded) and asked_s is not None)
        if not again or attempt >= self._attempts:
            return None
        bound_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
        pause_s = (asked_s or 0.0) + random.uniform(0, bound_s)  # noqa: S311 (no secret)
        if pause_s >= remaining_s:
            return None
        with self._lock:
            return pause_s if self._budget.spend() else None
