"""What runs in a process of Ray Serve."""

import os
import platform
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from hedgerow.backend import Backend, Deadline
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.telemetry.settings import TracingSettings
from hedgerow.tensors import InferRequest, InferResponse, ModelMetadata

VERSION: Final = "1"
"""Large models are served in one version; which file that is, the metadata's sha256 says."""
_FIRST: Final = "Serve calls reconfigure first"


class Replica:
    """A `ModelHost`, and its methods for the handle of Ray Serve."""

    def __init__(self) -> None:
        self._host: ModelHost | None = None
        self._answers: Backend | None = None
        """The host, with spans around it where traces are asked for."""

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Load the models of `config`; called by Serve before the first request, and again for new ones."""
        host = self._host or ModelHost(msgspec.convert(config["host"], HostSettings), name="replica")
        for name, path in config["models"].items():
            await host.load_file(ModelFile(name, VERSION, Path(path)))
        tracing = msgspec.convert(config["tracing"], TracingSettings)
        if tracing.endpoint and self._answers is None:
            from hedgerow.telemetry.tracing import Tracing

            # Never closed, since Serve tells nobody of the end: spans of the last seconds may be lost.
            self._answers = Tracing(tracing, instance=f"{platform.node()}-{os.getpid()}").around(host, "replica")
        self._host, self._answers = host, self._answers or host

    async def interfaces(self) -> tuple[ModelMetadata, ...]:
        """The metadata of all models, and a sign of life."""
        host = self._loaded()
        return tuple([await host.metadata(state.name) for state in await host.models()])

    async def infer(self, request: InferRequest, timeout_s: float | None) -> InferResponse:
        """The answer; `timeout_s` is what is left of the deadline, since clocks differ between machines."""
        deadline = Deadline.never() if timeout_s is None else Deadline.after(timeout_s)
        assert self._answers is not None, _FIRST
        return replace(await self._answers.infer(request, deadline), source=None)  # which would travel with each answer

    def _loaded(self) -> ModelHost:
        assert self._host is not None, _FIRST
        return self._host
