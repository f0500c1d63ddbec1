"""What is known of the models behind a remote: the metadata of those that were asked for, and whether one is ready."""

import math
import time
from collections.abc import Awaitable, Callable

from google.protobuf.message import Message

from hedgerow.errors import DeadlineExceeded, HedgerowError, NotFound, Unavailable
from hedgerow.oip.model_metadata import metadata_from_proto
from hedgerow.proto import oip_pb2
from hedgerow.remote.connection import parsed
from hedgerow.tensors import ModelMetadata

MAX_KNOWN_MODELS = 64
"""Models whose metadata is kept."""

Ask = Callable[[str, Message], Awaitable[bytes]]
"""Calls one method of OIP; raises the errors of `hedgerow.errors`."""


class KnownModels:
    """Metadata by model and version, at most `max_age_s` old where it can be had. `server` is the name for errors."""

    def __init__(self, server: str, max_age_s: float) -> None:
        self._server = server
        self._max_age_s = max_age_s
        # With when they were last heard of; the watchers keep them fresh.
        self._known: dict[tuple[str, str], tuple[float, ModelMetadata | None]] = {}

    def get(self, model: str, version: str, *, whatever_age: bool) -> ModelMetadata | None:
        """The metadata if it is fresh enough; from now on it is kept fresh."""
        at, metadata = self._known.setdefault((model, version), (-math.inf, None))
        if len(self._known) > MAX_KNOWN_MODELS:
            del self._known[next(iter(self._known))]
        return metadata if whatever_age or time.monotonic() - at < self._max_age_s else None

    async def learn(self, ask: Ask, model: str, version: str) -> ModelMetadata | None:
        """The remote's metadata of a model, remembered; None if it has no such model."""
        request = oip_pb2.ModelMetadataRequest(name=model, version=version)
        try:
            raw = await ask("ModelMetadata", request)
        except NotFound:
            self._known.pop((model, version), None)
            return None
        metadata = metadata_from_proto(parsed(oip_pb2.ModelMetadataResponse.FromString, raw, self._server))
        if (model, version) in self._known:
            self._known[model, version] = (time.monotonic(), metadata)
        return metadata

    async def ready(self, ask: Ask, model: str, version: str) -> bool:
        """Whether the remote has the model ready; False for one that it does not know."""
        try:
            raw = await ask("ModelReady", oip_pb2.ModelReadyRequest(name=model, version=version))
        except NotFound:  # KServe's way to say no
            return False
        return parsed(oip_pb2.ModelReadyResponse.FromString, raw, self._server).ready

    async def examine(self, ask: Ask, *, server_ready: bool) -> str:
        """What keeps the remote from answering; with nothing in the way, news of the models that were asked for.

        A server is ready when all of its models are; ours may be nevertheless.
        """
        asked = tuple(self._known)
        if not server_ready and not any([await self.ready(ask, *one) for one in asked]):
            return "it is not ready"
        for model, version in asked:
            try:
                await self.learn(ask, model, version)
            except (Unavailable, DeadlineExceeded):
                raise
            except HedgerowError:  # about one model, which says nothing about the others
                continue
        return ""
