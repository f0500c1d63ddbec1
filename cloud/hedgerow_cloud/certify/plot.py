"""The curve of risk over coverage as a picture: what was seen, its upper bound, and the threshold that was chosen."""

from pathlib import Path

import numpy as np

from hedgerow.errors import InvalidInput, MissingExtra
from hedgerow.gate import Guarantee
from hedgerow_cloud.certify.bounds import BOUNDS, upper
from hedgerow_cloud.certify.guarantee import Sample

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Raise `InvalidInput` unless a picture can be written to `path`."""
    if path.suffix not in SUFFIXES:
        raise InvalidInput(f"{path}: a picture ends in {' or '.join(SUFFIXES)}")


def draw(path: Path, data: Sample, guarantee: Guarantee) -> None:
    """Write the curve for `guarantee`, which `data` has borne out, to `path`."""
    check(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("pictures need matplotlib: pip install 'hedgerow[cloud]' brings it") from error
    scores = guarantee.gate.scores(data.output)
    losses = data.losses[np.argsort(-scores, kind="stable")]
    n = len(losses)
    coverage = np.arange(1, n + 1) / n
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    bound = upper(BOUNDS[guarantee.bound], losses, guarantee.delta)
    seen = np.cumsum(losses) / n
    axes.plot(coverage, seen, color="tab:blue", label="seen on the calibration set")
    axes.fill_between(coverage, seen, bound, color="tab:blue", alpha=0.2, linewidth=0, label="up to its upper bound")
    axes.axhline(guarantee.epsilon, color="tab:red", linewidth=1, label=f"ε = {guarantee.epsilon:g}")
    axes.axvline(1 - guarantee.escalated, color="black", linestyle=":", label=f"λ = {guarantee.gate.threshold:.4f}")
    axes.set(
        xlabel="share of the requests answered on the device",
        ylabel="share of all requests that are lost by it",
        xlim=(0, 1),
        ylim=(0, max(4 * guarantee.epsilon, 1.2 * float(seen[-1]))),
        title=f"{guarantee.risk}, by {guarantee.score_name}, n = {guarantee.samples}, δ = {guarantee.delta:g}",
    )
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
