"""Pools: what two real models say to many inputs. What happens in a pool is taken for the truth about it.

A pool is made once and kept in the cache. Calibration sets are drawn from it with replacement, so that each draw is
what the mathematics asks for: independent samples of a distribution whose risk is known, the pool's own.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench.guarantee import tasks
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Pool:
    """Logits of both models, shape (n, classes) each, and in words what they were computed from."""

    edge: NDArray[np.float32]
    cloud: NDArray[np.float32]
    about: str

    def __len__(self) -> int:
        return len(self.edge)

    @property
    def wrong(self) -> NDArray[np.float64]:
        """1 where they differ, shape (n,)."""
        return np.asarray(self.edge.argmax(axis=1) != self.cloud.argmax(axis=1), np.float64)


def known() -> tuple[str, ...]:
    """Names of all tasks."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(tasks.__path__)))


def load(name: str, cache: Path) -> Pool:
    """The pool of a task, made now if it is not in the `cache`."""
    file = cache / "guarantee" / f"{name}.npz"
    if not file.exists():
        make: Callable[[Path], Pool] = importlib.import_module(f"{tasks.__name__}.{name}").make
        pool = make(cache)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, edge=pool.edge, cloud=pool.cloud, about=pool.about)
    with np.load(file) as archive:
        return Pool(archive["edge"], archive["cloud"], str(archive["about"]))
