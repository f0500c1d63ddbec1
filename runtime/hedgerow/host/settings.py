"""What runs on this machine, and how: the files of models, and the settings of the host and its batches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from hedgerow.config import Count, Seconds, Settings
from hedgerow.isolation.session import IsolationSettings


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that can answer for `model` in `version`. A given `sha256` must be the file's."""

    model: str
    version: str
    path: Path
    engine: str = "onnxruntime"
    sha256: str = ""
    precision: str = ""
    labels: tuple[str, ...] = ()
    """Names of the classes; none may have a comma in it."""
    pinned: bool = False
    """Never unloaded to make room for another model."""


class BatchSettings(Settings, frozen=True, kw_only=True):
    """How requests for one model are queued and put together."""

    max_batch_size: Count = 32
    """Rows of one run; 1: never together. A request with more runs alone."""
    max_batch_bytes: Count = 2 * 2**20
    """Of inputs that are put together for one run. Rows that are larger run one by one: for a processor, putting them
    together costs more than it saves, and the memory for it stays with the engine. An accelerator may want more."""
    max_delay_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """How long a free instance waits for more rows; 0: it takes what has arrived."""
    preferred_sizes: tuple[Count, ...] = ()
    """Batches are padded to the next of these, for engines that compile anew for each size."""
    instances: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Batches that run at the same time; 0: as the host's `workers` says."""
    queue_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Requests that wait; more are refused. 0: as the host says."""
    priority_levels: Count = 3
    """Levels that a request's `priority` may name, 1 the highest; 0, or one beyond them, is the middle."""
    ageing_s: Seconds = 1.0
    """How much longer than a request of the next higher level one waits at most, all else being equal."""
    inline_below_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0005
    """Runs that are proved to be shorter are made on the event loop (see `pace.Inlining`); 0: none."""
    hang_after_s: Seconds = 30.0
    """A run that takes longer is given up: it hangs."""


class HostSettings(Settings, frozen=True, kw_only=True):
    """How models are run on this machine."""

    workers: Count = 2
    """Batches of one model that run at the same time."""
    engine_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads that an engine uses for one batch; 0: the machine's cores shared among the workers."""
    queue_size: Count = 512
    """Requests for one model that wait for a worker; more are refused."""
    batching: BatchSettings = BatchSettings()
    models: dict[str, BatchSettings] = msgspec.field(default_factory=dict)
    """By model, in place of `batching`."""
    isolation: dict[str, IsolationSettings] = msgspec.field(default_factory=dict)
    """Models that run in a process of their own, by name."""
    drain_s: Seconds = 10.0
    """How long requests in flight may take when their model is replaced or unloaded or the host closed. What takes
    longer is left to end by itself."""
    loaders: Count = 4
    """Models that are loaded or closed at the same time."""
    load_timeout_s: Seconds = 300.0
    """Of loading a model, checksum and warming included, or closing it. After that it is given up, and what it has
    taken of this process is lost until it comes back."""
    max_hung_loads: Count = 4
    """Models that were given up and have not come back. With so many, no more are loaded in this process."""
    memory_budget_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """What all open models together may take; 0: no limit. See `room.MEMORY_FACTOR`. Leave room for a swap, during
    which a model is open twice."""

    def batch_settings(self, model: str) -> BatchSettings:
        """Those of `model`, with real `instances` and `queue_size`."""
        settings = self.models.get(model, self.batching)
        if model in self.isolation:  # the event loop must not wait for a process that may hang
            settings = msgspec.structs.replace(settings, inline_below_s=0.0)
        return msgspec.structs.replace(
            settings, instances=settings.instances or self.workers, queue_size=settings.queue_size or self.queue_size
        )
