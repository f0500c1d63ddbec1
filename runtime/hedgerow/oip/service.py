"""The Open Inference Protocol over any Backend, call by call; `hedgerow.server` listens.

What stands here is said of the server and its models. Requests are answered by `inference`, streams of them by
`streaming`; models are loaded and unloaded by `model_control`. Errors become statuses in `hedgerow.rpc`.
"""

from collections.abc import Callable
from typing import Final

from hedgerow import __version__
from hedgerow.backend import Backend, ModelControl
from hedgerow.config import ServerSettings
from hedgerow.identity import Identify, as_said
from hedgerow.oip.hops import counting_hops
from hedgerow.oip.inference import Inference
from hedgerow.oip.model_control import ModelControlCalls
from hedgerow.oip.model_metadata import config_to_proto, metadata_to_proto
from hedgerow.oip.streaming import Streams
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call, Method, methods
from hedgerow.shared_memory.calls import SharedMemoryCalls
from hedgerow.shared_memory.tensors import SharedTensors
from hedgerow.statistics import BatchCounts

SERVICE: Final = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class OipService:
    """One handler a call of GRPCInferenceService, in its order. Once `draining` is set, nothing new is begun."""

    def __init__(
        self,
        backend: Backend,
        settings: ServerSettings,
        control: ModelControl | None,
        name: str,
        batches: Callable[[str], BatchCounts | None] = lambda _: None,
        identify: Identify = as_said,
        shared: SharedTensors | None = None,
    ) -> None:
        self._backend = backend
        self._batches = batches
        self._name = settings.compatibility or name
        self._inference = Inference(backend, settings, identify, shared)
        self.statistics = self._inference.statistics
        self.inflight = self._inference.inflight
        self._extensions = ["classification", "model_configuration", "parameters", "statistics"]
        if control is not None:
            self._extensions.append("model_repository")
        if shared is not None:
            self._extensions.append("system_shared_memory")
        self._streams = Streams(self._inference)
        self._model_control = ModelControlCalls(backend, control, settings, identify)
        self._shared_memory = SharedMemoryCalls(None if shared is None else shared.regions, identify)

    @property
    def methods(self) -> dict[str, Method]:
        """What to serve."""
        return methods(
            SERVICE,
            {
                "ServerLive": self.server_live,
                "ServerReady": counting_hops(self.server_ready),
                "ModelReady": counting_hops(self.model_ready),
                "ServerMetadata": self.server_metadata,
                "ModelMetadata": counting_hops(self.model_metadata),
                "ModelInfer": self._inference.model_infer,
                "ModelStreamInfer": self._streams.model_stream_infer,
                "ModelConfig": counting_hops(self.model_config),
                "ModelStatistics": counting_hops(self.model_statistics),
                **self._model_control.handlers,
                **self._shared_memory.handlers,
            },
            unparsed={"ModelInfer"},
            shed={"ModelInfer", "ModelStreamInfer"},
        )

    @property
    def draining(self) -> bool:
        """Whether nothing new is begun."""
        return self._inference.draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._inference.draining = draining

    def close(self) -> None:
        """Watch no more deadlines: once nothing is in flight."""
        self._inference.close()

    async def ready(self) -> bool:
        """Whether requests are taken and every model has a version that is ready."""
        if self.draining:
            return False
        states = await self._backend.models()
        return {state.name for state in states} == {state.name for state in states if state.ready}

    async def server_live(self, _: oip_pb2.ServerLiveRequest, __: Call) -> oip_pb2.ServerLiveResponse:
        """Live: we answer."""
        return oip_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _: oip_pb2.ServerReadyRequest, __: Call) -> oip_pb2.ServerReadyResponse:
        """Whether all models are ready, as the protocol has it."""
        return oip_pb2.ServerReadyResponse(ready=await self.ready())

    async def model_ready(self, request: oip_pb2.ModelReadyRequest, _: Call) -> oip_pb2.ModelReadyResponse:
        """Whether one model is ready; an unknown one is not, which is no error."""
        ready = not self.draining and await self._backend.ready(request.name, request.version)
        return oip_pb2.ModelReadyResponse(ready=ready)

    async def server_metadata(self, _: oip_pb2.ServerMetadataRequest, __: Call) -> oip_pb2.ServerMetadataResponse:
        """Name, version, and the extensions of the protocol that are really there."""
        return oip_pb2.ServerMetadataResponse(name=self._name, version=__version__, extensions=self._extensions)

    async def model_metadata(self, request: oip_pb2.ModelMetadataRequest, _: Call) -> oip_pb2.ModelMetadataResponse:
        """A model's interface."""
        return metadata_to_proto(await self._inference.interface(request.name, request.version))

    async def model_config(self, request: oip_pb2.ModelConfigRequest, _: Call) -> oip_pb2.ModelConfigResponse:
        """The model's interface in the form of Triton's configuration."""
        metadata = await self._inference.interface(request.name, request.version)
        return oip_pb2.ModelConfigResponse(config=config_to_proto(metadata))

    async def model_statistics(
        self, request: oip_pb2.ModelStatisticsRequest, _: Call
    ) -> oip_pb2.ModelStatisticsResponse:
        """What was counted of one model, or of all."""
        if request.name:
            metadata = await self._inference.interface(request.name, request.version)
            served = {(request.name, version) for version in metadata.versions or ("",)}
        else:
            served = {(state.name, state.version) for state in await self._backend.models()}
        wanted = [
            (model, version)
            for model, version in sorted(served | self.statistics.counted())
            if request.name in {"", model} and request.version in {"", version}
        ]
        messages = []
        for model, version in wanted:
            batches = self._batches(model)
            running = batches is not None and await self._backend.ready(model, version)
            messages.append(self.statistics.message(model, version, batches if running else None))
        return oip_pb2.ModelStatisticsResponse(model_stats=messages)
