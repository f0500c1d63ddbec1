"""The running audit: does the promise still hold, here and now? Pure: no IO, no clock, no dice.

The world drifts, and a threshold that was right when it was certified may be wrong today. So the answers that the gate
lets pass are audited with a small chance, in the background: the cloud is asked as well, and what was lost by not
asking it at once is known. What is escalated shows it without a further question. Each request is worth 1/chance of its
kind, so that the risk R(λ) = E[loss · 1{score ≥ λ}] is seen without bias, of all levels λ at once, however the chance
changes.

For each level two wagers are held, which no one can win at without being right:

- that the risk is above ε. What they win if it is not stays below 1/δ for ever, with probability 1 - δ (an e-process:
  Waudby-Smith and Ramdas 2024). Since drift may begin at any time, a new wager is made every `BLOCK` requests with a
  share of the stake, 1/k(k + 1) for the k-th, which is 1 over all of them (an e-detector: Shin, Ramdas and Rinaldo
  2023). When they have won, the promise is broken, and the gate tightens at once.
- that it is below ε, made anew at each move. When it has won, the gate may loosen again, never below what was
  certified.

Both bet several sizes at once, because how large the risk is nobody knows. A request without a loss takes the same from
each wager, so that all but the losses is counting.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

BLOCK: Final = 1000
"""Requests between two wagers on drift."""
STAKES: Final = 2.0 ** np.arange(-2, 5)
"""Sizes of the bets that the risk is too high, in units of the smallest chance."""
SHARES: Final = np.array([0.05, 0.15, 0.3, 0.5, 0.7, 0.9])
"""Sizes of the bets that it is low enough, as shares of what can be bet."""
LEVELS: Final = 24
"""Thresholds that are watched, the certified one first; each leaves `STEP` of the way to 1 that the one before did."""
STEP: Final = 0.8
MARGIN: Final = 0.25
"""Where the gate tightens to, what was lost of late may be this much of ε at most: few losses have been seen by then,
and to be too strict for a while costs only requests to the cloud."""
WINDOWS: Final = (2_000.0, 8_000.0, 32_000.0, 128_000.0)
"""Requests that what was lost is remembered over, exponentially, the longest for people; when the gate tightens, nobody
knows since when the world is another one, and the window counts that looks the worst among those that have seen"""
ENOUGH: Final = 5.0
"""losses."""
SUSPICION: Final = 3.0
"""What a wager on drift must have won for audits to become more frequent."""
MAX_MOVES: Final = 100
"""Moves that are remembered."""


class Move(msgspec.Struct, frozen=True):
    """A change of the threshold: after how many requests, from where to where, and why, in words."""

    requests: float
    before: float
    after: float
    reason: str


class State(msgspec.Struct):
    """All that has to survive a restart."""

    guarantee: str
    """Digest of what is audited; another one begins anew."""
    requests: float = 0.0
    audits: int = 0
    losses: float = 0.0
    level: int = 0
    """Where the gate is, of `Audit.levels`."""
    idle: float = 0.0
    """Requests without a loss since the wagers were settled last."""
    blocks: int = 1
    too_high: list[list[float]] = []
    """Logarithms of what each bet holds, by level and size."""
    low_enough: list[list[float]] = []
    lost: list[list[float]] = []
    """What was lost of late, by window and level."""
    losing: list[float] = []
    """In how many audits, by window."""
    seen: list[float] = []
    """Over how many requests, by window."""
    moves: list[Move] = []


class Audit:
    """The audit of one gate that was certified at `threshold` to keep a marginal risk of `epsilon`.

    A promise of `delta` is given for the false alarms of its whole life. `chance` is how likely an answer that passes
    is audited, `alert_chance` where drift is suspected.
    """

    def __init__(
        self,
        guarantee: str,
        threshold: float,
        *,
        epsilon: float,
        delta: float,
        chance: float,
        alert_chance: float,
        state: State | None = None,
    ) -> None:
        self.levels = [*(1 - (1 - threshold) * STEP**step for step in range(LEVELS)), math.nextafter(1.0, 2.0)]
        self.epsilon, self.delta = epsilon, delta
        self._chance, self._alert_chance = chance, max(chance, alert_chance)
        self._edges = np.array(self.levels)
        self._stakes = np.minimum(STAKES * chance, 0.9 / epsilon)
        self._shares = SHARES / (1 / chance - epsilon)
        self._loses, self._wins = np.log1p(-self._stakes * epsilon), np.log1p(self._shares * epsilon)
        fresh = state is None or state.guarantee != guarantee or len(state.lost) != len(WINDOWS)
        self.state = State(guarantee) if fresh or state is None else state
        if fresh:
            self._lost = np.zeros((len(WINDOWS), len(self.levels)))
            self._losing, self._seen = np.zeros(len(WINDOWS)), np.zeros(len(WINDOWS))
            self._start_over()
            self._too_high = np.full((len(self.levels), len(self._stakes)), math.log(0.5 / len(self._stakes)))
        else:
            self._too_high = np.array(self.state.too_high)
            self._low_enough = np.array(self.state.low_enough)
            self._lost, self._losing, self._seen = map(np.array, (self.state.lost, self.state.losing, self.state.seen))

    @property
    def threshold(self) -> float:
        """What the gate has to ask for now."""
        return self.levels[self.state.level]

    @property
    def chance(self) -> float:
        """How likely the next answer that passes is to be audited."""
        return self._alert_chance if self.suspicion() >= SUSPICION else self._chance

    def suspicion(self) -> float:
        """What the wagers that the risk is too high, at the threshold of now, have made of one."""
        return float(np.exp(_total(self._too_high[self.state.level])))

    def risk(self) -> list[tuple[float, float]]:
        """Each level, and the share of all requests of late, in the longest window, that is lost at it."""
        return list(zip(self.levels, self._risks()[-1].tolist(), strict=True))

    def count(self, requests: float = 1.0) -> None:
        """That many were answered by whichever tier, and nothing is known to be lost; audits come besides."""
        state = self.state
        state.requests += requests
        state.idle += requests
        self._seen += requests
        if state.idle >= BLOCK:
            self._settle()

    def audited(self, score: float, loss: float, chance: float) -> Move | None:
        """An answer of `score`, which was looked at with that `chance` (1: escalated), lost `loss` in [0, 1].

        The request itself was counted. The move that follows from it, if one does.
        """
        state = self.state
        state.audits += 1
        if not loss:
            return None
        state.losses += loss
        self._settle()
        worth = np.where(score >= self._edges, loss / chance, 0.0)[:, None]
        self._too_high += np.log1p(self._stakes * (worth - self.epsilon)) - self._loses
        self._low_enough += np.log(np.maximum(1 + self._shares * (self.epsilon - worth), 1e-300)) - self._wins
        self._lost += worth[:, 0]
        self._losing += 1
        return self.move()

    def failed(self, chance: float) -> None:
        """An audit gave no answer: what it stands for is not known to be without loss."""
        self.state.idle -= 1 / chance
        self.state.requests -= 1 / chance
        self._seen = np.maximum(0.0, self._seen - 1 / chance)

    def move(self) -> Move | None:
        """Tighten or loosen the gate, if there is reason to; to be asked now and then, and after each loss."""
        self._settle()
        now = self.state.level
        goal = math.log(1 / self.delta)
        broken = [index for index in range(now, len(self.levels) - 1) if _total(self._too_high[index]) >= goal]
        if broken:
            risks = max(self._risks()[self._losing >= ENOUGH], key=lambda risk: risk[now], default=self._risks()[-1])
            after = next(
                (i for i in range(broken[-1] + 1, len(risks)) if risks[i] <= MARGIN * self.epsilon), len(risks) - 1
            )
            return self._moved(after, f"the risk is above {self.epsilon:.2%}: {risks[now]:.2%} of late")
        for index in range(now):
            if _total(self._low_enough[index]) >= goal:
                self._too_high[:] = self._stake()  # what was won before was paid out when the gate tightened
                return self._moved(index, f"the risk has been below {self.epsilon:.2%} again")
        return None

    def save(self) -> State:
        """What has to be kept."""
        self._settle()
        state = self.state
        state.too_high, state.low_enough = self._too_high.tolist(), self._low_enough.tolist()
        state.lost, state.losing, state.seen = self._lost.tolist(), self._losing.tolist(), self._seen.tolist()
        return state

    def _risks(self) -> NDArray[np.float64]:
        """What was lost of late, as a share of all requests, by window and level."""
        return np.asarray(self._lost / np.maximum(self._seen, 1.0)[:, None])

    def _moved(self, level: int, reason: str) -> Move:
        state = self.state
        move = Move(state.requests, self.levels[state.level], self.levels[level], reason)
        state.level = level
        state.moves = [*state.moves[-MAX_MOVES + 1 :], move]
        self._start_over()
        return move

    def _start_over(self) -> None:
        self._low_enough = np.full((len(self.levels), len(self._shares)), -math.log(len(self._shares)))

    def _settle(self) -> None:
        """Take what the requests without a loss take."""
        state = self.state
        requests, state.idle = state.idle, 0.0
        if not requests:
            return
        self._too_high += requests * self._loses
        self._low_enough += requests * self._wins
        keep = np.exp(-max(0.0, requests) / np.array(WINDOWS))
        self._lost *= keep[:, None]
        self._losing *= keep
        self._seen *= keep
        while state.requests >= state.blocks * BLOCK:
            np.logaddexp(self._too_high, self._stake(), out=self._too_high)

    def _stake(self) -> float:
        """The logarithm of what goes into each bet of the next wager on drift."""
        self.state.blocks += 1
        return -math.log(self.state.blocks * (self.state.blocks + 1) * len(self._stakes))


def _total(logs: NDArray[Any] | Sequence[float]) -> float:
    """The logarithm of the sum."""
    return float(np.logaddexp.reduce(logs))
