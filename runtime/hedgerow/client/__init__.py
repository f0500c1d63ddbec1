"""What Python applications import: numpy in, numpy out, and the reason for each answer.

::

    with Client("localhost:8001") as client:
        result = client.infer("digits", {"image": image})
        print(result.outputs["logits"].argmax(), result.tier, result.confidence)

        with client.stream("digits", images) as answers:  # any number of requests, as they come
            for result in answers:
                print(result.id, result.outputs["logits"].argmax())

`AsyncClient` is the same with ``await``, ``async with`` and ``async for``. They talk to any OIP server; what a Hedgerow
router explains (`Result.tier` and so on) is None elsewhere. `LocalClient` and `AsyncLocalClient` are the same again
over a `Backend` in this process, without gRPC::

    @asynccontextmanager
    async def digits() -> AsyncIterator[Backend]:
        host = ModelHost()
        await host.load_file(ModelFile("digits", "1", Path("digits.onnx")))
        yield host
        await host.close()

    with LocalClient(digits()) as client:
        print(client.infer("digits", image).outputs["logits"].argmax())

Code that takes an `InferenceClient` or `AsyncInferenceClient` works with either. Errors are those of `hedgerow.errors`,
with the server's message. What fails because it was a bad moment is tried again: see `hedgerow.client.retries`.
"""

from hedgerow.client.interface import (
    DEFAULT_TIMEOUT_S,
    READ_AHEAD,
    Answers,
    AsyncAnswers,
    AsyncInferenceClient,
    InferenceClient,
    InferOptions,
    Inputs,
    Options,
    Result,
)
from hedgerow.client.local import AsyncLocalClient, LocalClient
from hedgerow.client.remote import AsyncClient, Client, ConnectionOptions
from hedgerow.client.retries import MAX_ATTEMPTS

__all__ = [
    "DEFAULT_TIMEOUT_S",
    "MAX_ATTEMPTS",
    "READ_AHEAD",
    "Answers",
    "AsyncAnswers",
    "AsyncClient",
    "AsyncInferenceClient",
    "AsyncLocalClient",
    "Client",
    "ConnectionOptions",
    "InferOptions",
    "InferenceClient",
    "Inputs",
    "LocalClient",
    "Options",
    "Result",
]
