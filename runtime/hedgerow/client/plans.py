"""What every client does, as generators of the steps to take: clients differ only in how they take them."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from hedgerow.backend import Deadline
from hedgerow.client.interface import InferOptions, Inputs, Options, Result
from hedgerow.client.retries import Retries
from hedgerow.errors import HedgerowError, InvalidInput, ModelNotFound, Unavailable
from hedgerow.oip.classification import CLASSIFICATION
from hedgerow.oip.messages import request_to_proto
from hedgerow.parameters import CONFIDENCE, DEGRADED, PRIVACY, REASON, RELEASE, TIER
from hedgerow.policies import Privacy
from hedgerow.proto import oip_pb2
from hedgerow.tensors import NOWHERE, InferRequest, InferResponse, ModelMetadata, Origin, Parameter, tensor

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Ask:
    """Have `request` answered, its outputs as that many `classes` unless 0. Gives an `InferResponse`."""

    request: InferRequest
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """A request of a stream that can't be asked; the stream gives `error` in its place."""

    request: InferRequest
    error: InvalidInput


@dataclass(frozen=True, slots=True)
class Describe:
    """Gives a model's `ModelMetadata`."""

    model: str
    version: str


@dataclass(frozen=True, slots=True)
class IsReady:
    """Gives whether a model, or the whole server, is ready."""

    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait. Gives nothing."""

    seconds: float


Step = Ask | Describe | IsReady | Pause
Plan = Generator[Step, Any, R]
"""It is sent what a step gives, or has the step's error raised in it."""


class Plans:
    """The plans of one client."""

    def __init__(self, timeout_s: float, attempts: int) -> None:
        self._timeout_s = timeout_s
        self._retries = Retries(attempts)
        self._interfaces: dict[tuple[str, str], ModelMetadata] = {}
        """By model and version: of those whose interface is needed to write a request."""

    def deadline(self, timeout_s: float | None) -> Deadline:
        """That of a call."""
        return Deadline.after(self._timeout_s if timeout_s is None else timeout_s)

    def infer(self, model: str, inputs: Inputs, options: InferOptions, deadline: Deadline) -> Plan[Result]:
        """One request, one answer."""
        ask = yield from self._ask(model, inputs, options, options.get("id", ""), deadline)
        try:
            return result((yield from self._persist(ask, deadline)))
        except InvalidInput:
            self._forget(ask.request.model, ask.request.version)
            raise

    def item(self, model: str, inputs: Inputs, options: Options, identity: str) -> Plan[Ask | Refused]:
        """One request of a stream."""
        deadline = self.deadline(None)
        try:
            return (yield from self._ask(model, inputs, options, identity, deadline))
        except InvalidInput as error:
            return Refused(InferRequest(model=model, version=options.get("version", ""), inputs=(), id=identity), error)

    def metadata(self, model: str, version: str, deadline: Deadline) -> Plan[ModelMetadata]:
        """A model's interface."""
        return cast("ModelMetadata", (yield from self._persist(Describe(model, version), deadline)))

    def ready(self, model: str, version: str) -> Plan[bool]:
        """Whether a model or all is ready."""
        try:
            return bool((yield IsReady(model, version)))
        except (Unavailable, ModelNotFound):  # some servers say so of an unknown model
            return False

    def failed(self, model: str, version: str, identity: str, error: HedgerowError) -> HedgerowError:
        """The error of one request of a stream, which notes whose it is."""
        self._forget(model, version)
        error.add_note(f"request {identity} of the stream")
        return error

    def _forget(self, model: str, version: str) -> None:
        """The model refused a request: it may have been replaced by one with another interface."""
        self._interfaces.pop((model, version), None)

    def _ask(
        self, model: str, inputs: Inputs, options: Options, identity: str, deadline: Deadline
    ) -> Generator[Step, Any, Ask]:
        version, outputs = options.get("version", ""), tuple(options.get("outputs", ()))
        if not isinstance(inputs, Mapping):
            inputs = {_sole_input((yield from self._interface(model, version, deadline))): inputs}
        classes = options.get("classes", 0)
        if classes < 0:
            raise InvalidInput(f"classes: expected the number of classes wanted, got {classes}")
        if classes and not outputs:
            outputs = tuple(spec.name for spec in (yield from self._interface(model, version, deadline)).outputs)
        request = InferRequest(
            model=model,
            version=version,
            id=identity,
            inputs=tuple([tensor(name, value) for name, value in inputs.items()]),
            outputs=outputs,
            parameters=_parameters(options),
            origin=origin(options),
        )
        return Ask(request, classes)

    def _interface(self, model: str, version: str, deadline: Deadline) -> Plan[ModelMetadata]:
        known = self._interfaces.get((model, version))
        if known is None:
            known = self._interfaces[model, version] = yield from self.metadata(model, version, deadline)
        return known

    def _persist(self, step: Ask | Describe, deadline: Deadline) -> Plan[Any]:
        """Take `step`, and again where `Retries` says so."""
        self._retries.called()
        attempt = 1
        while True:
            try:
                return (yield step)
            except HedgerowError as error:
                pause_s = self._retries.pause_s(error, attempt, deadline.remaining)
                if pause_s is None:
                    raise
            yield Pause(pause_s)
            attempt += 1


def message(ask: Ask) -> oip_pb2.ModelInferRequest:
    """The protocol's message for `ask`; raises `InvalidInput` where it has none."""
    written = request_to_proto(ask.request)
    if ask.classes:
        for output in written.outputs:
            output.parameters[CLASSIFICATION].int64_param = ask.classes
    return written


def result(response: InferResponse) -> Result:
    """`response` as callers see it."""
    said = response.parameters
    return Result(
        outputs={output.name: output.array for output in response.outputs},
        model=response.model,
        model_version=response.version,
        id=response.id,
        parameters=said,
        tier=_said(said, TIER, str),
        reason=_said(said, REASON, str),
        confidence=_said(said, CONFIDENCE, float),
        release=_said(said, RELEASE, str),
        degraded=_said(said, DEGRADED, bool) or False,
    )


def _said(parameters: Mapping[str, Parameter], key: str, kind: type[R]) -> R | None:
    value = parameters.get(key)
    return value if isinstance(value, kind) else None


def _sole_input(metadata: ModelMetadata) -> str:
    if len(metadata.inputs) != 1:
        names = ", ".join(spec.name for spec in metadata.inputs) or "none"
        raise InvalidInput(
            f"model {metadata.name} has {len(metadata.inputs)} inputs ({names}): give the arrays by name"
        )
    return metadata.inputs[0].name


def _parameters(options: Options) -> dict[str, Parameter]:
    parameters = dict(options.get("parameters", ()))
    if "priority" in options:
        parameters["priority"] = options["priority"]
    if "privacy" in options:
        try:
            parameters[PRIVACY] = Privacy(options["privacy"]).value
        except ValueError:
            known = ", ".join(repr(privacy.value) for privacy in Privacy)
            raise InvalidInput(f"privacy is {options['privacy']!r}; it must be one of {known}") from None
    return parameters


def origin(options: Options) -> Origin:
    """Where requests with `options` come from."""
    tenant, traceparent = options.get("tenant", ""), options.get("traceparent", "")
    if not (tenant or traceparent):
        return NOWHERE
    for name, value in (("tenant", tenant), ("traceparent", traceparent)):
        if not (value.isascii() and value.isprintable()):
            raise InvalidInput(f"{name} is {value!r}; it must be a line of printable ASCII")
    return Origin(tenant=tenant, traceparent=traceparent)
