"""Requests sent one after the other over gRPC, and what came back: who answered, how fast, how well."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hedgerow.client import Client
from hedgerow.errors import HedgerowError
from hedgerow.parameters import PRIVACY
from hedgerow.policies import Privacy

TIMEOUT_S = 10.0

Progress = Callable[[int, int], None]
"""Takes the requests done and the requests in all."""


@dataclass(slots=True)
class Traffic:
    """What came back, a value a request; `failures` has the errors of those that got no answer (their answer is -1)."""

    answers: list[int] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    degraded: list[bool] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.answers)

    def accuracy(self, labels: NDArray[np.int64]) -> float:
        """Share of right answers."""
        return float(np.mean(np.array(self.answers) == labels))

    def unlike(self, other: "Traffic") -> int:
        """Answers that differ from those of `other` to the same requests."""
        return int(np.sum(np.array(self.answers) != np.array(other.answers)))

    def share(self, tier: str) -> float:
        """Share answered by `tier`."""
        return self.tiers.count(tier) / len(self)

    def latency_ms(self, quantile: float) -> float:
        """That quantile of the time a request took, in milliseconds."""
        return float(np.quantile(self.latencies_s, quantile)) * 1000

    def ask(self, client: Client, model: str, image: NDArray[np.float32], privacy: Privacy) -> None:
        """Send one image, shape (features,), and note what comes back. An error is noted, not raised."""
        began = time.monotonic()
        try:
            result = client.infer(model, image[None], parameters={PRIVACY: privacy.value}, timeout_s=TIMEOUT_S)
        except HedgerowError as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            answer, tier, degraded, release = -1, "", False, ""
        else:
            answer = int(next(iter(result.outputs.values())).argmax())
            tier, degraded, release = result.tier or "", result.degraded, result.release or ""
        self.latencies_s.append(time.monotonic() - began)
        self.answers.append(answer)
        self.tiers.append(tier)
        self.degraded.append(degraded)
        self.releases.append(release)


def stream(
    client: Client,
    model: str,
    images: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    privacy: Privacy,
    progress: Progress | None = None,
) -> Traffic:
    """Send `images` one after the other, each when the answer to the one before is here."""
    traffic = Traffic()
    for image in images:
        traffic.ask(client, model, image, privacy)
        if progress is not None:
            progress(len(traffic), len(images))
    return traffic
