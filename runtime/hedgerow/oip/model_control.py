"""The calls by which models are listed, loaded and unloaded; what a caller may want of a load is in `overrides`."""

from hedgerow.backend import Backend, ModelControl
from hedgerow.config import ServerSettings
from hedgerow.errors import Forbidden, HedgerowError
from hedgerow.identity import Identify, Tokens, bearer, token_digest
from hedgerow.oip.hops import counting_hops
from hedgerow.oip.model_metadata import config_to_proto
from hedgerow.oip.overrides import check_config, wanted_config
from hedgerow.proto import oip_pb2
from hedgerow.rpc import Call, Handler


class ModelControlCalls:
    """The calls of OIP's model repository extension, over `control`; None: callers may not manage models.

    Where the settings have a control token, managing takes that; elsewhere, whatever `identify` wants of everyone.
    """

    def __init__(
        self, backend: Backend, control: ModelControl | None, settings: ServerSettings, identify: Identify
    ) -> None:
        self._backend = backend
        self._control = control
        self._identify = identify
        self._compatibility = settings.compatibility
        token = settings.control_token
        self._managers = Tokens([(token_digest(token), "control")]) if token else None

    @property
    def handlers(self) -> dict[str, Handler]:
        """By method."""
        return {
            "RepositoryIndex": counting_hops(self.repository_index),
            "RepositoryModelLoad": self.repository_model_load,
            "RepositoryModelUnload": self.repository_model_unload,
        }

    async def repository_index(
        self, request: oip_pb2.RepositoryIndexRequest, call: Call
    ) -> oip_pb2.RepositoryIndexResponse:
        """Every model and its state."""
        self._allowed(call)
        index = oip_pb2.RepositoryIndexResponse.ModelIndex
        return oip_pb2.RepositoryIndexResponse(
            models=[
                index(
                    name=state.name,
                    version=state.version,
                    state="READY" if state.ready else "UNAVAILABLE",
                    reason=state.reason,
                )
                for state in await self._backend.models()
                if state.ready or not request.ready
            ]
        )

    async def repository_model_load(
        self, request: oip_pb2.RepositoryModelLoadRequest, call: Call
    ) -> oip_pb2.RepositoryModelLoadResponse:
        """Load or reload a model from where it was configured, as it was configured: see `overrides`."""
        control, model = self._allowed(call), request.model_name
        try:
            wanted = wanted_config(request.parameters)
            if wanted.ByteSize():
                check_config(wanted, config_to_proto(await self._backend.metadata(model)))
            await control.load(model)
        except HedgerowError as error:
            if self._compatibility == "triton":
                text = f"failed to load {model!r}: {error}"
                raise type(error)(text, retry_after_s=error.retry_after_s) from error
            raise
        return oip_pb2.RepositoryModelLoadResponse()

    async def repository_model_unload(
        self, request: oip_pb2.RepositoryModelUnloadRequest, call: Call
    ) -> oip_pb2.RepositoryModelUnloadResponse:
        """Stop serving a model."""
        await self._allowed(call).unload(request.model_name)
        return oip_pb2.RepositoryModelUnloadResponse()

    def _allowed(self, call: Call) -> ModelControl:
        if self._control is None:
            raise Forbidden("this server does not let its callers manage models")
        if self._managers is None:
            self._identify(call)  # raises where nobody is answered who proves nothing
        elif self._managers.owner(bearer(call.metadata)) is None:
            raise Forbidden("managing models needs this server's control token, as authorization: Bearer TOKEN")
        return self._control
