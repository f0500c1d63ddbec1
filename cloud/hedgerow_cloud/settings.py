"""Settings of the cloud's daemons: one TOML file each."""

from hedgerow.config import BrokerSettings, Count, Port, Seconds, ServerSettings, Settings

FLEET_PORT = 8002


class EmbeddedBrokerSettings(Settings, frozen=True, kw_only=True):
    """The embedded MQTT broker: `hedgerow-cloud broker --config FILE`. It listens on the loopback interface."""

    home: str
    """Folder of its configuration, log and retained messages."""
    port: Port = 1883


class FleetSettings(Settings, frozen=True, kw_only=True):
    """The fleet service: `hedgerow-cloud fleet --config FILE`."""

    home: str
    """Folder of its database, blobs, metadata and online keys."""
    fleet: str = "default"
    """Name of the fleet: the second level of every topic."""
    server: ServerSettings = ServerSettings(port=FLEET_PORT)
    broker: BrokerSettings = BrokerSettings()
    max_devices: Count = 10_000
    max_release_bytes: Count = 4 * 2**30
    sample_bytes: Count = 2**30
    """What all samples may take; the oldest make room."""
    refresh_s: Seconds = 3600.0
    """How often online metadata that nears its expiry is signed anew."""
