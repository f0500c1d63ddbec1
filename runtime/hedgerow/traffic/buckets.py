"""How much a tenant may ask for, and when it may come again. Pure: no IO; the time is given, in monotonic seconds.

Invariants, held by property tests:

- in any stretch of t seconds no more than rate times t and the burst is taken, but for a billionth of the burst;
- who comes back after the wait that was said gets in, if nobody has taken anything of the same allowance meanwhile;
- a refusal takes nothing: who never heeds the wait still gets the whole rate, and no more.
"""

import math
from dataclasses import dataclass

ROUNDING = 1e-9
"""Of a burst, that may be missing: waits are computed, and their sums are not exact."""
INFLIGHT_RETRY_S = 0.1
"""When to come again if too much is in flight: nobody knows when that ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """What may be asked for; infinity: any amount."""

    requests_per_s: float = math.inf
    burst_requests: float = math.inf
    bytes_per_s: float = math.inf
    burst_bytes: float = math.inf
    max_inflight: float = math.inf


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, in words, and after how many seconds it could be otherwise; infinity: never."""

    reason: str
    retry_after_s: float


class TokenBucket:
    """Holds up to `burst` tokens, full at first, and gets `rate` of them a second."""

    __slots__ = ("_at", "_burst", "_level", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = self._level = burst
        self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` could be taken; 0: now, infinity: never."""
        missing = amount - self._fill(now)
        if missing <= ROUNDING * self._burst:
            return 0.0
        return missing / self._rate if amount <= self._burst else math.inf

    def take(self, amount: float, now: float) -> None:
        """Take `amount`, for which there must be no wait."""
        self._level = self._fill(now) - amount

    def change(self, rate: float, burst: float, now: float) -> None:
        """Have another rate and burst; what was taken stays taken."""
        level = self._fill(now)
        self._rate, self._burst, self._level = rate, burst, min(burst, level)

    def _fill(self, now: float) -> float:
        if now > self._at:
            self._level = min(self._burst, self._level + (now - self._at) * self._rate)
            self._at = now
        return self._level


class Allowance:
    """What is left of a quota."""

    def __init__(self, quota: Quota, now: float) -> None:
        self._quota = quota
        self._requests = _bucket(quota.requests_per_s, quota.burst_requests, now)
        self._bytes = _bucket(quota.bytes_per_s, quota.burst_bytes, now)
        self.inflight = 0

    def refusal(self, size: int, now: float) -> Refusal | None:
        """Why a request of `size` bytes may not be taken on now; None if it may."""
        quota = self._quota
        if self.inflight >= quota.max_inflight:
            return Refusal(f"{quota.max_inflight:g} requests in flight are the limit", INFLIGHT_RETRY_S)
        if self._requests is not None and (wait_s := self._requests.wait_s(1, now)):
            return Refusal(f"{quota.requests_per_s:g} requests/s are the limit", wait_s)
        if self._bytes is not None and (wait_s := self._bytes.wait_s(size, now)):
            if math.isinf(wait_s):
                return Refusal(f"the request has {size} bytes, at once there may be {quota.burst_bytes:g}", wait_s)
            return Refusal(f"{quota.bytes_per_s:g} bytes/s are the limit", wait_s)
        return None

    def enter(self, size: int, now: float) -> None:
        """A request that was not refused begins."""
        self.inflight += 1
        if self._requests is not None:
            self._requests.take(1, now)
        if self._bytes is not None:
            self._bytes.take(size, now)

    def leave(self) -> None:
        """A request that has begun ends."""
        self.inflight -= 1

    def change(self, quota: Quota, now: float) -> None:
        """Be an allowance of another quota; what was taken stays taken, and what is in flight counts."""
        self._quota = quota
        self._requests = _changed(self._requests, quota.requests_per_s, quota.burst_requests, now)
        self._bytes = _changed(self._bytes, quota.bytes_per_s, quota.burst_bytes, now)


def _bucket(rate: float, burst: float, now: float) -> TokenBucket | None:
    return None if math.isinf(rate) else TokenBucket(rate, burst, now)


def _changed(bucket: TokenBucket | None, rate: float, burst: float, now: float) -> TokenBucket | None:
    if bucket is None or math.isinf(rate):
        return _bucket(rate, burst, now)
    bucket.change(rate, burst, now)
    return bucket
