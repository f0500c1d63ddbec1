"""Settings of the endpoint for large models."""

import os
from pathlib import Path
from typing import Annotated, Final

import msgspec

from hedgerow.config import Count, ServerSettings, Settings
from hedgerow.errors import ConfigError
from hedgerow.host.settings import HostSettings
from hedgerow.processes.port import SHARED
from hedgerow.processes.supervisor import SupervisorSettings
from hedgerow.telemetry.settings import MetricsSettings, TracingSettings
from hedgerow.traffic.tenants import TenantsSettings

CORES_PER_PROCESS: Final = 4
MAX_PROCESSES: Final = 4
"""That are started unasked."""


class ServeSettings(Settings, frozen=True, kw_only=True):
    """The large models: `hedgerow-cloud serve --config FILE`."""

    models: dict[str, str]
    """Files by the name they are served under; relative to the folder of the settings."""
    server: ServerSettings = ServerSettings(port=8003)
    """Its limits hold for each process."""
    processes: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """That speak OIP on the one port, on Linux. 0: one for every `CORES_PER_PROCESS` cores that there are for us, and
    `MAX_PROCESSES` at most, since the models need cores too; each takes about 200 MB."""
    supervisor: SupervisorSettings = SupervisorSettings()
    """How those are started, and started again."""
    replicas: Count = 1
    host: HostSettings = HostSettings()
    """How each replica runs its models."""
    metrics: MetricsSettings = MetricsSettings(listen="127.0.0.1:9465")
    tracing: TracingSettings = TracingSettings()
    tenants: TenantsSettings | None = None
    """Who asks, and how much they may of each process; absent: no quotas, and callers are who they say."""

    def located(self, base: Path) -> "ServeSettings":
        """The settings with the models' files as replicas find them, whatever folder they run in.

        Relative paths begin at `base`. Raises `ConfigError` naming a file that is not there.
        """
        if not self.models:
            raise ConfigError("models: name at least one model and its file")
        if self.server.model_control or self.server.control_token:
            raise ConfigError("server.model_control: the models are those of the settings; callers cannot manage them")
        files = {name: (base / path).resolve() for name, path in self.models.items()}
        for name, file in files.items():
            if not file.is_file():
                raise ConfigError(f"models.{name}: there is no file {file}")
        return msgspec.structs.replace(self, models={name: str(file) for name, file in files.items()})

    @property
    def fronts(self) -> int:
        """How many processes are to speak OIP."""
        if not SHARED:
            return 1
        return self.processes or max(1, min(MAX_PROCESSES, len(os.sched_getaffinity(0)) // CORES_PER_PROCESS))
