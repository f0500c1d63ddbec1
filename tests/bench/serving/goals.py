"""What we mean to reach, as ratios within one run, and whether we did. Pure."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = {"agent": "the agent with router, gate and metrics", "bare": "the bare service"}
PEERS = ("kserve", "mlserver", "ray", "litserve", "bentoml", "triton", "triton-batching", "pytriton")
RAW = "raw"

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Goal:
    """`ratio`, of what `what` says, has to be `least` or more, or `most` or less."""

    what: str
    ratio: float
    least: float | None = None
    most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return (self.least is None or self.ratio >= self.least) and (self.most is None or self.ratio <= self.most)


def goals(runs: Runs) -> list[Goal]:
    """Those that `runs` tell something of."""
    return [goal for part in (_tiny, _pictures, _fronts, _large) for goal in part(runs)]


def _tiny(runs: Runs) -> Iterator[Goal]:
    here = [run for run in runs if run["model"] == "tiny"]
    for ours, title in OURS.items():
        for peer, least in (("kserve", 4.0), ("mlserver", 4.0), ("triton-batching", 1.0)):
            rates = [_of(here, server, "rate", inflight=32) for server in (ours, peer)]
            yield from _goal(f"tiny, 32 in flight: {title} ÷ {peer}, requests/s", rates, least=least)
        waits = [_of(here, ours, "p50_ms", inflight=1), _best(here, PEERS, "p50_ms", min, inflight=1)]
        yield from _goal(f"tiny, 1 in flight: {title} ÷ the best peer, p50", waits, most=1.0)


def _pictures(runs: Runs) -> Iterator[Goal]:
    for model in _models(runs, "efficientnet"):
        here = [run for run in runs if run["model"] == model]
        for ours, title in OURS.items():
            rate = _of(here, ours, "rate", inflight=8)
            yield from _goal(
                f"{model}, 8 in flight: {title} ÷ the engine alone at its best, requests/s",
                [rate, _best(here, [RAW], "rate", max)],
                least=0.95,
            )
            yield from _goal(
                f"{model}, 8 in flight: {title} ÷ the best peer, requests/s",
                [rate, _best(here, PEERS, "rate", max, inflight=8)],
                least=1.1,
            )


def _fronts(runs: Runs) -> Iterator[Goal]:
    for model in _models(runs, ""):
        here = [run for run in runs if run["model"] == model]
        for inflight in (8, 32):
            costs = [_of(here, server, "cpu_us", inflight=inflight) for server in ("router", "passthrough")]
            yield from _goal(f"{model}, {inflight} in flight: our router ÷ a pass-through, CPU added", costs, most=0.5)


def _large(runs: Runs) -> Iterator[Goal]:
    for model in _models(runs, "identity"):
        here = [run for run in runs if run["model"] == model]
        for inflight in (1, 8):
            rates = [_of(here, server, "rate", inflight=inflight) for server in ("bare", "echo")]
            yield from _goal(f"{model}, {inflight} in flight: the bare service ÷ a grpc.aio echo", rates, least=0.8)


def _models(runs: Runs, prefix: str) -> list[str]:
    return [name for name in dict.fromkeys(run["model"] for run in runs) if name.startswith(prefix)]


def _of(runs: Runs, server: str, figure: str, **load: Any) -> float | None:
    """The median over the rounds."""
    found = [
        run[figure]
        for run in runs
        if run["server"] == server and all(run.get(name) == value for name, value in load.items())
    ]
    return statistics.median(found) if found else None


def _best(
    runs: Runs, servers: Iterable[str], figure: str, best: Callable[[Iterable[float]], float], **load: Any
) -> float | None:
    """The best of the medians, over servers and, where none is named, numbers in flight."""
    loads = (
        [load] if load else [{"inflight": inflight} for inflight in {run.get("inflight") for run in runs} if inflight]
    )
    found = [_of(runs, server, figure, **one) for server in servers for one in loads]
    known = [value for value in found if value is not None]
    return best(known) if known else None


def _goal(what: str, figures: Sequence[float | None], **limits: float) -> Iterator[Goal]:
    ours, theirs = figures
    if ours is not None and theirs:
        yield Goal(what, ours / theirs, **limits)
