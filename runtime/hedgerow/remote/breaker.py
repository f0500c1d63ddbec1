"""What keeps a bad remote from costing every request: a circuit breaker and a retry budget. Pure: no IO, no clock."""

from dataclasses import dataclass


@dataclass(slots=True)
class Breaker:
    """Opens after `failures_to_open` failures in a row, or when tripped; whoever probes the remote closes it.

    Just closed, it is on trial: the first failure opens it again, the first success ends the trial.
    """

    failures_to_open: int
    open: bool = False
    reason: str = ""
    """Why it opened, or why the last failure was one."""
    _failures: int = 0

    def succeeded(self) -> None:
        """Count a success."""
        self._failures = 0

    def failed(self, reason: str) -> bool:
        """Count a failure; whether it opened the breaker."""
        self._failures += 1
        return self._failures >= self.failures_to_open and self.trip(reason)

    def trip(self, reason: str) -> bool:
        """Open at once, for a failure that leaves no doubt; whether the breaker was closed."""
        was_closed, self.open, self.reason = not self.open, True, reason
        return was_closed

    def close(self) -> bool:
        """Close, on trial; whether the breaker was open."""
        was_open, self.open = self.open, False
        if was_open:
            self._failures = self.failures_to_open - 1
        return was_open


class RetryBudget:
    """Lets at most a share of the requests be retried, so that retries cannot multiply an overload (Envoy's rule)."""

    def __init__(self, share: float, burst: int) -> None:
        self._share = share
        self._burst = float(burst)
        self._tokens = float(burst)

    def requested(self) -> None:
        """Count a request."""
        self._tokens = min(self._burst, self._tokens + self._share)

    def spend(self) -> bool:
        """Take one retry out of the budget; False if there is none."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
