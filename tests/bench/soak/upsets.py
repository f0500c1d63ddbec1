"""What happens to a device besides requests one by one: streams, large tensors, slow readers, callers that come and go
or vanish, scrapes, models that are swapped, a cloud that dies. Each is a loop of its own."""

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from time import monotonic

import grpc
from bench.serving.senders import PREFACE
from bench.serving.wire import Grpc
from bench.soak.stage import LARGE_ELEMENTS, OTHER_SURE, SPARE, SURE, TOKEN, Stage
from bench.soak.tally import Tally
from bench.soak.traffic import PATIENCE_S, large_message, message, pixels
from simulators.models import CLASSES

from hedgerow.proto import oip_pb2

STREAMED = "/inference.GRPCInferenceService/ModelStreamInfer"
LOAD, UNLOAD = (f"/inference.GRPCInferenceService/RepositoryModel{what}" for what in ("Load", "Unload"))
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a channel of its own is a connection of its own
)
SLOW_S = 0.5
"""Between two answers that a slow reader takes."""
SLOW_ANSWERS = 12
LARGE_PATIENCE_S = 30.0
SCRAPE_S = 10.0
STREAM_REQUESTS = 10


@dataclass(frozen=True, slots=True)
class Periods:
    """Seconds between two of a kind."""

    stream: float = 2.0
    large: float = 5.0
    visitor: float = 1.0
    vanish: float = 5.0
    slow: float = 20.0
    scrape: float = 15.0
    swap: float = 180.0
    outage: float = 600.0
    down: float = 30.0
    """How long the cloud is away."""

    def within(self, seconds: float) -> "Periods":
        """The same for a run of `seconds`, with every kind in it more than once."""
        outage = min(self.outage, seconds / 3)
        return replace(self, swap=min(self.swap, seconds / 6), outage=outage, down=min(self.down, outage / 4))


class Upsets:
    """All of them, against the agent of `stage`; `channel` is a connection that stays."""

    def __init__(self, stage: Stage, channel: grpc.aio.Channel, periods: Periods, tally: Tally, seed: int = 2) -> None:
        self._stage = stage
        self._channel = channel
        self._periods = periods
        self._tally = tally
        self._random = random.Random(seed)
        self._large = cycle((large_message(hedgerow_privacy="edge-only"),) * 3 + (large_message(),))
        self._sure = cycle((OTHER_SURE, SURE))

    async def run(self) -> None:
        loops: Sequence[tuple[str, float, Callable[[], Awaitable[None]]]] = (
            ("stream", self._periods.stream, self.stream),
            ("1 MB", self._periods.large, self.large),
            ("visitor", self._periods.visitor, self.visitor),
            ("vanishing caller", self._periods.vanish, self.vanish),
            ("slow reader", self._periods.slow, self.slow),
            ("scrape", self._periods.scrape, self.scrape),
            ("swap", self._periods.swap, self.swap),
            ("outage", self._periods.outage, self.outage),
        )
        async with asyncio.TaskGroup() as group:
            for name, period_s, upset in loops:
                group.create_task(self._again_and_again(name, period_s, upset))

    async def stream(self) -> None:
        """Ten requests, the third of which is wrong: its error comes in its place."""
        bodies = [message("tiny", pixels(k)) for k in range(STREAM_REQUESTS)]
        bodies[2] = message("nobody", pixels(2))
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(STREAMED)
        answers = [raw async for raw in method(iter(bodies), timeout=PATIENCE_S)]
        errors = [bool(oip_pb2.ModelStreamInferResponse.FromString(raw).error_message) for raw in answers]
        expected = [k == 2 for k in range(STREAM_REQUESTS)]
        assert errors == expected, f"a stream's errors stand at {errors}"

    async def large(self) -> None:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(Grpc().path)
        raw = await method(next(self._large), timeout=LARGE_PATIENCE_S)
        assert len(raw) > 4 * LARGE_ELEMENTS, f"an answer of {len(raw)} bytes"

    async def visitor(self) -> None:
        """A connection for one request; now and then it leaves without waiting for the answer."""
        async with grpc.aio.insecure_channel(self._stage.agent.address, OPTIONS) as channel:
            method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(Grpc().path)
            call = method(message("tiny", pixels(self._random.randrange(CLASSES))), timeout=PATIENCE_S)
            if self._random.random() < 0.2:
                await asyncio.sleep(self._random.uniform(0, 0.01))
                return
            await call

    async def vanish(self) -> None:
        """Half of HTTP/2's greeting, or of a frame, and then a reset."""
        host, _, port = self._stage.agent.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(self._random.choice((b"", PREFACE[:10], PREFACE, PREFACE + b"\0\0\7\0", b"GET / HTTP/1.1\r\n")))
        await writer.drain()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.close()

    async def slow(self) -> None:
        """1 MB answers, taken one each `SLOW_S`; every other time the reader leaves in the middle."""
        async with grpc.aio.insecure_channel(self._stage.agent.address, OPTIONS) as channel:
            method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(STREAMED)
            body = large_message(hedgerow_privacy="edge-only")
            taken, enough = 0, self._random.choice((SLOW_ANSWERS // 2, SLOW_ANSWERS))
            async for _ in method(iter([body] * SLOW_ANSWERS), timeout=PATIENCE_S + 4 * SLOW_ANSWERS * SLOW_S):
                taken += 1
                if taken == enough:
                    break
                await asyncio.sleep(SLOW_S)
            assert taken == enough, f"{taken} answers to {SLOW_ANSWERS} requests"

    async def scrape(self) -> None:
        reader, writer = await asyncio.open_connection(*self._stage.metrics)
        try:
            async with asyncio.timeout(SCRAPE_S):
                writer.write(b"GET /metrics HTTP/1.1\r\nhost: soak\r\n\r\n")
                page = await reader.read()
        finally:
            writer.close()
        assert page.startswith(b"HTTP/1.1 200"), f"metrics answered {page[:60]!r}"

    async def swap(self) -> None:
        """The device's model is replaced under load; a second one goes and comes back."""
        self._stage.write_model(next(self._sure))
        await self._control(LOAD, oip_pb2.RepositoryModelLoadRequest(model_name="tiny").SerializeToString())
        await self._control(UNLOAD, oip_pb2.RepositoryModelUnloadRequest(model_name=SPARE).SerializeToString())
        await self._control(LOAD, oip_pb2.RepositoryModelLoadRequest(model_name=SPARE).SerializeToString())
        self._tally.event("models swapped")

    async def outage(self) -> None:
        """The cloud is killed, and comes back."""
        self._tally.event("cloud killed")
        await self._stage.kill_cloud()
        await asyncio.sleep(self._periods.down)
        await self._stage.cloud.start()
        self._tally.event("cloud back")

    async def _control(self, path: str, body: bytes) -> None:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(path)
        await method(body, timeout=LARGE_PATIENCE_S, metadata=(("authorization", f"Bearer {TOKEN}"),))

    async def _again_and_again(self, name: str, period_s: float, upset: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(period_s)
            started = monotonic()
            with self._judged(name):
                await upset()
                self._tally.met(name, "OK", monotonic() - started)

    @contextmanager
    def _judged(self, name: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            self._tally.failed(name, f"{error.code().name}: {error.details()}")
        except (AssertionError, OSError) as error:
            self._tally.failed(name, f"{type(error).__name__}: {error}")
