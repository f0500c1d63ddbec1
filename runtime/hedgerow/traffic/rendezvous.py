"""Which of some weighted choices a key gets, and which the next request without a key. Pure: no IO, no clock.

For keys, weighted rendezvous hashing (Thaler and Ravishankar 1998; weights as in Schindelhauer and Schomaker 2005):
each choice draws an exponential time from the key, the sooner the heavier it is, and the first one wins. Without keys,
the golden ratio's additive recurrence (Weyl), whose shares are right for any stretch of requests, up to a few.

Invariants, held by property tests:

- a choice of weight 0 gets nothing;
- a key's choice depends on nothing but the key, the names and the proportions of the weights;
- if one weight grows, keys move to that choice only; if it shrinks, from that choice only; if a choice is left out, the
  keys of the others stay where they are.
"""

import hashlib
import math
import random
from collections.abc import Mapping

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, made odd


def by_key(weights: Mapping[str, float], key: bytes) -> str:
    """The choice that `key` gets. `weights` by name, at least one of them above 0."""
    return min((name for name, weight in weights.items() if weight > 0), key=lambda name: _time(name, key, weights))


def by_point(weights: Mapping[str, float], point: float) -> tuple[str, float]:
    """The choice whose part of [0, 1) `point` lies in, and where in it: in [0, 1) again, for another choice.

    `weights` by name, at least one of them above 0.
    """
    left = point * sum(weights.values())
    chosen, place = "", 0.0
    for name, weight in weights.items():
        if weight > 0:
            chosen, place = name, min(left / weight, math.nextafter(1.0, 0.0))
            if left < weight:
                break
            left -= weight
    return chosen, place


class Points:
    """Points that cover [0, 1) evenly, each next to the largest gap. Two of these begin at different ones."""

    def __init__(self, start: int | None = None) -> None:
        self._at = random.getrandbits(_BITS) if start is None else start

    def take(self) -> float:
        """The next."""
        self._at = (self._at + _GOLDEN) % 2**_BITS
        return (self._at >> 11) / 2**53  # as many bits as a float has


def _time(name: str, key: bytes, weights: Mapping[str, float]) -> float:
    digest = hashlib.blake2b(f"{len(name)}:{name}".encode() + key, digest_size=_BITS // 8).digest()
    uniform = (int.from_bytes(digest) + 0.5) / 2**_BITS
    return -math.log(uniform) / weights[name]
