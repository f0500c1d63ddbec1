"""Settings of the device's daemon: one TOML file and the environment (`hedgerow.config`).

::

    [device]
    fleet = "home"

    [cloud]
    target = "10.0.0.5:8001"

    [link]
    host = "10.0.0.5"

    [trust]
    release_root = "release.root.json"
    director_root = "director.root.json"

or, without any fleet, with model files of one's own::

    [models.digits]
    path = "digits.onnx"
    gate = { score = "max_probability", output = "logits", threshold = 0.9 }

Paths are relative to the folder of the file.
"""

from pathlib import Path
from typing import Annotated

import msgspec

from hedgerow.cache import CacheSettings
from hedgerow.config import BrokerSettings, ServerSettings, Settings, variable
from hedgerow.errors import ConfigError
from hedgerow.gate import Gate
from hedgerow.host.settings import HostSettings
from hedgerow.remote.backend import RemoteSettings, Target
from hedgerow.router import RouteSettings
from hedgerow.shared_memory.regions import SharedMemorySettings
from hedgerow.telemetry.settings import LogSettings, MetricsSettings, TracingSettings
from hedgerow.traffic.shadow import ShadowSettings
from hedgerow.traffic.split import SplitSettings
from hedgerow.traffic.tenants import TenantsSettings
from hedgerow_edge.installer import UpdateSettings
from hedgerow_edge.samples import SampleSettings

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern="^[A-Za-z0-9_-]+$")]
"""Of a model, here and in releases."""


class DeviceSettings(Settings, frozen=True, kw_only=True):
    """Who this device is."""

    id: str = ""
    """Empty: one is made up at the first start and kept in the state folder."""
    fleet: str = "default"
    profile: str = ""
    """Name of a hardware profile; empty: the one that fits what is found."""
    state: str = ""
    """Folder of everything that the device keeps; empty: XDG's state folder."""


class LinkSettings(BrokerSettings, frozen=True, kw_only=True):
    """The broker that leads to the fleet."""

    enabled: bool | None = None
    """Unset: if the roots of trust are given."""


class TrustSettings(Settings, frozen=True, kw_only=True):
    """The root metadata of the fleet's two repositories, given to the device when it is made."""

    release_root: str = ""
    director_root: str = ""


class CloudSettings(RemoteSettings, frozen=True, kw_only=True):
    """The endpoint that answers what the device does not, and how it is reached."""

    target: Annotated[str, msgspec.Meta(pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]+$")] = ""
    """"host:port" of any server that speaks OIP over gRPC; empty: there is none."""
    targets: tuple[Target, ...] = ()
    """Several endpoints in place of `target`, each with its zone."""


class StaticModel(Settings, frozen=True, kw_only=True):
    """A model file that is served as it is, with no release and no updates."""

    path: str
    engine: str = "onnxruntime"
    version: str = "1"
    precision: str = ""
    pinned: bool = False
    """Never unloaded to make room for another model."""
    gate: Gate | None = None
    """None: its answers are never good enough on their own where there is a cloud."""


class AgentSettings(Settings, frozen=True, kw_only=True):
    """`hedgerow-edge --config FILE`."""

    device: DeviceSettings = DeviceSettings()
    server: ServerSettings = ServerSettings()
    shared_memory: SharedMemorySettings | None = None
    """Whether callers' tensors may lie in shared memory of this machine, and how much; absent: not."""
    host: HostSettings = HostSettings()
    link: LinkSettings = LinkSettings()
    trust: TrustSettings = TrustSettings()
    cloud: CloudSettings = CloudSettings()
    routes: dict[Name, RouteSettings] = msgspec.field(default_factory=dict)
    """By model; a model without an entry travels by the defaults."""
    models: dict[Name, StaticModel] = msgspec.field(default_factory=dict)
    splits: dict[Name, SplitSettings] = msgspec.field(default_factory=dict)
    """By the model that callers name."""
    shadows: dict[Name, ShadowSettings] = msgspec.field(default_factory=dict)
    """By the model on the device whose requests are shown to another one."""
    tenants: TenantsSettings | None = None
    """Who asks, and how much they may; unset: no quotas, and callers are who they say."""
    cache: CacheSettings = CacheSettings()
    """Of answers on the device."""
    samples: SampleSettings = SampleSettings()
    updates: UpdateSettings = UpdateSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    tracing: TracingSettings = TracingSettings()

    @property
    def linked(self) -> bool:
        """Whether there is a fleet."""
        if self.link.enabled is None:
            return bool(self.trust.release_root or self.trust.director_root)
        return self.link.enabled

    def roots(self, base: Path) -> tuple[bytes, bytes]:
        """The release repository's and the director's root metadata; raises `ConfigError`."""
        contents = []
        for key, name in (("release_root", self.trust.release_root), ("director_root", self.trust.director_root)):
            if not name:
                raise ConfigError(f"trust.{key}: is needed to take updates; or set link.enabled = false")
            try:
                contents.append((base / name).read_bytes())
            except OSError as error:
                raise ConfigError(f"trust.{key}: cannot read {base / name}: {error.strerror}") from error
        return contents[0], contents[1]

    def state(self, base: Path) -> Path:
        """The state folder."""
        if self.device.state:
            return base / Path(self.device.state).expanduser()
        return Path(variable("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hedgerow-edge"
