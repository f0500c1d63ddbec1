"""A TCP proxy with a stated round-trip time: the link to the cloud, for demonstrations and tests without root.

Each direction holds every byte back for half the round trip, in order, and counts it. A second port answers each
connection with the counts as one JSON object: ``{"up_bytes": ..., "down_bytes": ..., "connections": ...}``.

    python -m hedgerow_cloud.local.linkshaper --listen 9001 --to 127.0.0.1:8001 --rtt-ms 40 --stats 9002
"""

import argparse
import asyncio
import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Self

READ_BYTES = 64 * 1024
IN_FLIGHT_BLOCKS = 64
"""Blocks held back in one direction of one connection; more, and the sender has to wait."""


@dataclass(slots=True)
class Counts:
    """What went through: towards the target (`up`) and back (`down`)."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0


class LinkShaper:
    """Listens on `host:listen` and forwards to `target`, `rtt_s` seconds there and back; as a context manager.

    Port 0 chooses a free one: see `port` and `stats_port` once entered.
    """

    def __init__(self, target: tuple[str, int], *, rtt_s: float, listen: int = 0, stats: int = 0) -> None:
        self.counts = Counts()
        self.port = listen
        self.stats_port = stats
        self._target = target
        self._one_way_s = rtt_s / 2
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        forwarding = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        counting = await asyncio.start_server(self._answer_counts, "127.0.0.1", self.stats_port)
        self._servers = [forwarding, counting]
        self.port, self.stats_port = (server.sockets[0].getsockname()[1] for server in self._servers)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._forward(near_in, near_out)
        except asyncio.CancelledError:
            pass  # the shaper is being left; asyncio's stream server would report it as a fault
        finally:
            near_out.close()
            self._connections.discard(task)

    async def _forward(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.counts.connections += 1
        try:
            far_in, far_out = await asyncio.open_connection(*self._target)
        except OSError:
            return
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(near_in, far_out, "up_bytes"))
                group.create_task(self._pump(far_in, near_out, "down_bytes"))
        except* OSError:
            pass  # one side went away; both are closed, as a cut link would
        finally:
            far_out.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counter: str) -> None:
        """Carry bytes from `source` to `sink`, late; an end of stream is carried over too."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT_BLOCKS)
        loop = asyncio.get_running_loop()

        async def release() -> None:
            while True:
                due, block = await held.get()
                await asyncio.sleep(due - loop.time())
                if not block:
                    raise ConnectionResetError("end of stream")
                sink.write(block)
                await sink.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(release())
            while block := await source.read(READ_BYTES):
                setattr(self.counts, counter, getattr(self.counts, counter) + len(block))
                await held.put((loop.time() + self._one_way_s, block))
            await held.put((loop.time() + self._one_way_s, b""))

    async def _answer_counts(self, _: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        out.write(json.dumps(asdict(self.counts)).encode() + b"\n")
        with contextlib.suppress(OSError):
            await out.drain()
        out.close()


async def read_counts(stats_port: int) -> Counts:
    """The counts of the shaper that answers on `stats_port`; raises OSError when it does not run."""
    source, sink = await asyncio.open_connection("127.0.0.1", stats_port)
    try:
        return Counts(**json.loads(await source.readline()))
    finally:
        sink.close()


async def _run(listen: int, target: str, rtt_ms: float, stats: int) -> None:
    host, _, port = target.rpartition(":")
    async with LinkShaper((host, int(port)), rtt_s=rtt_ms / 1000, listen=listen, stats=stats):
        await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A TCP proxy with a stated round-trip time.")
    parser.add_argument("--listen", type=int, required=True, help="loopback port to listen on")
    parser.add_argument("--to", required=True, help="host:port to forward to")
    parser.add_argument("--rtt-ms", type=float, required=True, help="round-trip time, milliseconds")
    parser.add_argument("--stats", type=int, required=True, help="loopback port that answers the counts")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(options.listen, options.to, options.rtt_ms, options.stats))
