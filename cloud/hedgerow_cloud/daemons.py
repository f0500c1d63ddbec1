"""The cloud's daemons, one process each: ``hedgerow-cloud broker|fleet|serve --config FILE``."""

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from hedgerow import lifecycle
from hedgerow.config import load
from hedgerow.errors import ConfigError, HedgerowError, MissingExtra
from hedgerow.telemetry.logs import configure_logging

_log = logging.getLogger(__name__)


async def fleet(config: Path, stop: asyncio.Event) -> None:
    """The fleet service: gRPC for operators, MQTT for devices."""
    from hedgerow.durable import hold
    from hedgerow.link import Link, Topics
    from hedgerow_cloud.fleet.blobs import Blobs
    from hedgerow_cloud.fleet.distribute import Distributor
    from hedgerow_cloud.fleet.service import FleetServer, FleetService
    from hedgerow_cloud.fleet.store import Store
    from hedgerow_cloud.publish.provision import open_repositories
    from hedgerow_cloud.settings import FleetSettings

    settings = load(FleetSettings, config)
    home = Path(settings.home)
    releases, director = open_repositories(home)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(home / "lock"))
        except BlockingIOError as error:
            raise ConfigError(f"home: another fleet service uses {home}") from error
        blobs = Blobs(home / "blobs")
        store = Store(home / "fleet.db", sample_bytes=settings.sample_bytes, max_devices=settings.max_devices)
        stack.enter_context(contextlib.closing(store))
        link = Link(settings.broker, f"hedgerow-fleet-{settings.fleet}")
        distributor = Distributor(link, Topics(settings.fleet), store, blobs, releases, director)
        service = FleetService(
            store=store,
            blobs=blobs,
            releases=releases,
            director=director,
            distributor=distributor,
            incoming=home / "incoming",
            max_release_bytes=settings.max_release_bytes,
        )
        await asyncio.to_thread(service.recover)
        async with FleetServer(service, settings.server, ready=lambda: link.connected):
            await lifecycle.supervise(
                stop, link=link.run(), distributor=distributor.run(), refresh=distributor.refresh(settings.refresh_s)
            )


async def serve(config: Path, stop: asyncio.Event) -> None:
    """Large models on Ray Serve."""
    from hedgerow_cloud.serving import endpoint
    from hedgerow_cloud.serving.settings import ServeSettings

    await endpoint.serve(load(ServeSettings, config), config.parent, stop)


def broker(config: Path) -> int:
    """Become the embedded MQTT broker, which needs no event loop of ours; returns only an exit code, on an error."""
    configure_logging()
    try:
        from hedgerow_cloud.local import broker as embedded
        from hedgerow_cloud.settings import EmbeddedBrokerSettings

        settings = load(EmbeddedBrokerSettings, config)
        embedded.run(Path(settings.home), settings.port)
    except HedgerowError as error:
        _log.error("%s", error)
    return lifecycle.EXIT_CONFIG


LOOPS: dict[str, Callable[[Path, asyncio.Event], Awaitable[None]]] = {"fleet": fleet, "serve": serve}


def main() -> None:
    """Run the daemon that the command line names."""
    parser = argparse.ArgumentParser(prog="hedgerow-cloud", description=__doc__)
    parser.add_argument("daemon", choices=["broker", *LOOPS])
    parser.add_argument("--config", type=Path, required=True, help="its settings, TOML")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args()
    options.config = options.config.absolute()
    if options.daemon == "broker":
        sys.exit(broker(options.config))

    async def run(stop: asyncio.Event) -> None:
        try:
            await LOOPS[options.daemon](options.config, stop)
        except ImportError as error:
            extra = "cloud" if options.daemon == "serve" else "fleet"
            raise MissingExtra(f"{error.name} is not installed; pip install 'hedgerow[{extra}]' brings it") from error

    sys.exit(lifecycle.run(run, log_level=options.log_level))


if __name__ == "__main__":
    main()
