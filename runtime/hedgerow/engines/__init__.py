"""Engines: ways to run a model file. One module an engine, found by its file name, its package imported when chosen.

A new engine is a new file here with what `Engine` asks for; it is under the contract tests from then on.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from hedgerow.errors import ConfigError, MissingExtra
from hedgerow.tensors import TensorSpec


class Session(Protocol):
    """A model file, open and ready to run. `run` may be called from several threads at once."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the model takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the model gives."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """The named outputs, as arrays of their own, in the representation of `hedgerow.tensors.Tensor`.

        Takes every input in that representation; raises `EngineFault` with a public message, the engine's own as cause.
        """
        ...

    def close(self) -> None:
        """Free the model; idempotent. Nothing may be running."""
        ...


class Engine(Protocol):
    """What a module of this package offers."""

    @property
    def PACKAGE(self) -> str:  # noqa: N802 a constant of the module
        """The package it needs."""
        ...

    @property
    def EXTRA(self) -> str:  # noqa: N802 a constant of the module
        """The extra of hedgerow that brings the package."""
        ...

    @property
    def PLATFORM(self) -> str:  # noqa: N802 a constant of the module
        """What OIP's model metadata calls it."""
        ...

    def open_model(self, path: Path, *, streams: int, threads: int) -> Session:
        """Load the file, for `streams` calls at once with `threads` threads each.

        Raises `EngineFault` if it cannot be served.
        """
        ...


def known() -> tuple[str, ...]:
    """Names of all engines, installed or not."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def available() -> tuple[str, ...]:
    """Names of the engines whose package is installed."""
    return tuple(name for name in known() if _installed(_module(name)))


def load(name: str) -> Engine:
    """The engine called `name`; raises `ConfigError` if there is none, `MissingExtra` if it is not installed."""
    if name not in known():
        raise ConfigError(f"there is no engine {name!r}; there are: {', '.join(known())}")
    engine = _module(name)
    if not _installed(engine):
        raise MissingExtra(f"the engine {name} is not installed; pip install 'hedgerow[{engine.EXTRA}]' brings it")
    return engine


def _module(name: str) -> Engine:
    return cast("Engine", importlib.import_module(f"{__name__}.{name}"))


def _installed(engine: Engine) -> bool:
    return importlib.util.find_spec(engine.PACKAGE) is not None
