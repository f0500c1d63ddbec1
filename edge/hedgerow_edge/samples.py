"""What may leave this device as training data, and how: from the router's observations through the outbox to the fleet.

The privacy rule, enforced here and nowhere later:

- nothing is kept unless the device's settings say `samples.collect = "escalated"`; when they stop saying so, what
  still waits is deleted;
- a request marked "no-learning" or "edge-only" is never kept, nor is one whose class is not known here;
- only requests that were escalated, and so have left the device once, are kept.

A caller's request never waits for this: an observation goes into a small queue in memory, or is dropped.
"""

import asyncio
import hashlib
import logging
import random
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

from google.protobuf.message import DecodeError
from msgspec.structs import replace

from hedgerow.config import Count, Seconds, Settings
from hedgerow.errors import HedgerowError, InvalidInput, LinkError
from hedgerow.link import Link
from hedgerow.oip.messages import request_to_proto, response_to_proto
from hedgerow.policies import Privacy
from hedgerow.proto.link_pb2 import Request, Sample, SampleUpload
from hedgerow.proto.oip_pb2 import ModelInferRequest
from hedgerow.router import Observation
from hedgerow.tensors import Tensor
from hedgerow_edge.exchange import Exchange
from hedgerow_edge.store import Outboxed, Store

MAX_MESSAGE_BYTES = 48 * 2**10
"""Samples that travel together; what does not fit on its own is not kept."""
OVERHEAD_BYTES = 16
"""Of a sample inside a message, and more than of the message around them."""
MAX_PENDING = 256
"""Observations in memory that wait for the disk."""
UPLOAD_TIMEOUT_S = 20.0

_log = logging.getLogger(__name__)


class SampleSettings(Settings, frozen=True, kw_only=True):
    """Which requests may become training data, and how many may wait for the link."""

    collect: Literal["none", "escalated"] = "none"
    max_count: Count = 5_000
    max_bytes: Count = 64 * 2**20
    """Of the outbox on disk; the oldest samples make room."""
    remember_sent: Count = 50_000
    """Digests of sent samples that are remembered, so that the same input is not sent again."""
    retry_s: Seconds = 30.0
    """How long the uploader waits after a failure; drawn between half of it and the whole."""


class Collector:
    """Turns observations into samples in the outbox while `run` runs. `observe` is for `Router.observe`."""

    def __init__(self, store: Store, settings: SampleSettings) -> None:
        self._store = store
        self._settings = settings
        self._pending: deque[tuple[Observation, int]] = deque()
        self._pending_news = asyncio.Event()
        self._complaint = ""
        self.kept = asyncio.Event()
        """Set whenever there may be something new in the outbox; whoever empties that clears it."""
        self.dropped = 0
        """Samples lost since the start: too large, too many, or the disk failed."""

    def observe(self, observation: Observation) -> None:
        """Take note of an escalated request if it may be kept; never blocks."""
        if self._settings.collect != "escalated" or observation.privacy is not Privacy.DEFAULT:
            return
        if _bytes((*observation.request.inputs, *observation.edge.outputs, *observation.cloud.outputs)) > (
            MAX_MESSAGE_BYTES
        ):
            self._drop(1, f"a request to {observation.request.model} is too large for a message")
        elif len(self._pending) >= MAX_PENDING:
            self._drop(1, "more come than the disk takes")
        else:
            self._pending.append((observation, time.time_ns() // 1_000_000))
            self._pending_news.set()

    async def run(self) -> None:
        """Write what was observed until cancelled."""
        if self._settings.collect == "none":
            await self._delete_all()
            return
        while True:
            await self._pending_news.wait()
            self._pending_news.clear()
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            await asyncio.to_thread(self._keep, batch)
            self.kept.set()

    async def _delete_all(self) -> None:
        try:
            if deleted := await asyncio.to_thread(self._store.delete_samples):
                _log.info("samples.collect is none: %d waiting samples deleted", deleted)
        except sqlite3.Error as error:  # at the next start, then; they are not sent in any case
            _log.warning("samples that wait cannot be deleted: %s", error)

    def _keep(self, batch: Sequence[tuple[Observation, int]]) -> None:
        samples = []
        for observation, unix_ms in batch:
            sample = to_sample(observation, unix_ms)
            content = sample.SerializeToString()
            if len(content) + OVERHEAD_BYTES > MAX_MESSAGE_BYTES:
                self._drop(1, f"a request to {observation.request.model} is too large for a message")
            else:
                samples.append(Outboxed(observation.request.model, sample.digest, content))
        limits = self._settings
        try:
            pushed_out = self._store.add_samples(samples, max_count=limits.max_count, max_bytes=limits.max_bytes)
        except sqlite3.Error as error:
            self._drop(len(samples), f"the disk does not take them ({error})")
            return
        if pushed_out:
            self._drop(pushed_out, "the outbox is full and the oldest make room")
        elif samples and self._complaint:
            _log.info("samples are kept again; %d were lost since the start", self.dropped)
            self._complaint = ""

    def _drop(self, count: int, why: str) -> None:
        self.dropped += count
        if why != self._complaint:
            _log.warning("samples are lost: %s", why)
            self._complaint = why


class Uploader:
    """Empties the outbox into the fleet while `run` runs; a sample is forgotten when the fleet says it is stored."""

    def __init__(
        self, store: Store, exchange: Exchange, link: Link, settings: SampleSettings, kept: asyncio.Event
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._link = link
        self._settings = settings
        self._kept = kept
        self._alone = False
        self._failing = False

    async def run(self) -> None:
        """Send until cancelled; nothing if nothing may be collected any more."""
        while self._settings.collect != "none":
            await self._link.wait_connected()
            self._kept.clear()
            try:
                some = await self._send_some()
            except (HedgerowError, sqlite3.Error) as error:
                if not self._failing:
                    _log.warning("samples cannot be sent: %s", error)
                self._failing = True
                await asyncio.sleep(self._settings.retry_s * random.uniform(0.5, 1))  # noqa: S311  jitter is no secret
                continue
            if self._failing:
                _log.info("samples can be sent again")
                self._failing = False
            if not some:
                await self._kept.wait()

    async def _send_some(self) -> bool:
        """Send one message of samples; whether there were any."""
        batch = await asyncio.to_thread(self._store.oldest_samples, MAX_MESSAGE_BYTES, OVERHEAD_BYTES)
        if self._alone:
            batch = batch[:1]
        if not batch:
            return False
        model = batch[0].model
        samples = [sample for sample in map(_read, batch) if sample is not None]
        if broken := {sample.digest for sample in batch} - {sample.digest for sample in samples}:
            _log.warning("%d waiting samples of %s are damaged on the disk and deleted", len(broken), model)
            await asyncio.to_thread(self._store.forget_samples, model, broken, remember=self._settings.remember_sent)
            return True
        upload = SampleUpload(model=model, samples=samples)
        try:
            response = await self._exchange.ask(Request(samples=upload), timeout_s=UPLOAD_TIMEOUT_S)
            arrived = {sample.digest for sample in batch} & set(response.receipt.digests)
            self._alone = False
        except InvalidInput as error:
            if len(batch) > 1:  # one by one, to find those that the fleet will not have
                self._alone = True
                return True
            _log.warning("the fleet will not have a sample of %s; it is deleted: %s", model, error)
            arrived = {batch[0].digest}
        if not arrived:
            raise LinkError("the fleet acknowledged none of them")
        await asyncio.to_thread(self._store.forget_samples, model, arrived, remember=self._settings.remember_sent)
        return True


def to_sample(observation: Observation, unix_ms: int) -> Sample:
    """The sample that `observation` makes. Ids and parameters stay here: they may say more than the answer needs."""
    request = request_to_proto(observation.request)
    request.parameters.clear()
    request.id = ""
    edge, cloud = (replace(answer, id="", parameters={}) for answer in (observation.edge, observation.cloud))
    return Sample(
        digest=input_digest(request),
        request=request.SerializeToString(),
        edge_response=response_to_proto(edge).SerializeToString(),
        cloud_response=response_to_proto(cloud).SerializeToString(),
        confidence=observation.confidence,
        release=f"{observation.edge.model}/{observation.edge.version}",
        unix_ms=unix_ms,
    )


def input_digest(request: ModelInferRequest) -> str:
    """SHA-256 (hex) of a request's inputs, in whatever order they came: name, datatype, shape and raw content."""
    whole = hashlib.sha256()
    for tensor, content in sorted(
        zip(request.inputs, request.raw_input_contents, strict=True), key=lambda pair: pair[0].name
    ):
        head = f"{len(tensor.name)} {tensor.name} {tensor.datatype} {list(tensor.shape)} {len(content)} "
        whole.update(head.encode())
        whole.update(content)
    return whole.hexdigest()


def _read(waiting: Outboxed) -> Sample | None:
    """The sample that waits; None if it is not what was written."""
    try:
        sample = Sample.FromString(waiting.content)
    except DecodeError:
        return None
    return sample if sample.digest == waiting.digest else None


def _bytes(tensors: Sequence[Tensor]) -> int:
    """A lower bound of what tensors take in a message; BYTES elements are counted as pointers."""
    return sum(tensor.array.nbytes for tensor in tensors)
