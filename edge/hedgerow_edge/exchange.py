"""Asking the fleet: requests over the link, and the answers that belong to them.

Requests and answers may be lost or doubled. An answer is matched to its request by id. Silence is a `LinkError`, and so
is, at once, the end of the connection; whoever asked decides whether to ask again.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from google.protobuf.message import DecodeError

from hedgerow.errors import HedgerowError, InvalidInput, LinkError, NotFound, Overloaded
from hedgerow.link import Link, Topics
from hedgerow.proto.link_pb2 import Chunk, ChunkRequest, MetadataRequest, Refusal, Repository, Request, Response

ASK_TIMEOUT_S = 10.0
METADATA_ATTEMPTS = 3
"""How often one metadata file is asked for before silence counts as such."""
ANSWERS_WAITING = 256
"""Answers to one request that wait to be read; more are dropped and will be asked for again."""

_Answers = asyncio.Queue[Response | None]
"""None: the connection has ended, and no more will come. There is always a place for it."""

_REFUSALS: dict[int, type[HedgerowError]] = {
    Refusal.NOT_FOUND: NotFound,
    Refusal.INVALID: InvalidInput,
    Refusal.BUSY: Overloaded,
}
_REPOSITORIES = {"release": Repository.RELEASE, "director": Repository.DIRECTOR}

_log = logging.getLogger(__name__)


class Exchange:
    """Asks the fleet for things on behalf of `device`; `session` gives the session counter of the connection.

    It is the `MetadataSource` of `hedgerow_edge.trust` and the `ChunkSource` of `hedgerow_edge.transfer`.
    """

    def __init__(self, link: Link, topics: Topics, device: str, session: Callable[[], int]) -> None:
        self._link = link
        self._topic = topics.request(device)
        self._session = session
        self._waiting: dict[str, _Answers] = {}
        link.subscribe(topics.response(device), self._receive)
        link.on_disconnected(self._give_up)

    async def ready(self) -> None:
        """Return when there is a connection to ask over."""
        await self._link.wait_connected()

    async def ask(self, request: Request, timeout_s: float = ASK_TIMEOUT_S) -> Response:
        """The answer to `request`, whose `id` and `session` are filled in here.

        Raises `LinkError` when there is no connection or no answer in time, when the connection ends before, and for a
        refusal the error it stands for: `NotFound`, `InvalidInput`, `Overloaded`, or `LinkError` when the fleet failed.
        """
        with self._conversation() as (name, answers):
            return await self._first(name, answers, request, timeout_s)

    async def metadata(self, repository: str, name: str) -> bytes | None:
        """The TUF metadata file `name` of "release" or "director", or None if the fleet says there is none."""
        request = Request(metadata=MetadataRequest(repository=_REPOSITORIES[repository], name=name))
        for attempt in range(1, METADATA_ATTEMPTS + 1):
            try:
                response = await self.ask(request)
                break
            except LinkError:
                if attempt == METADATA_ATTEMPTS:
                    raise
        if not response.HasField("metadata"):
            raise LinkError(f"the fleet answered the request for {name} with something else")
        return None if response.metadata.absent else response.metadata.content

    async def chunks(self, request: ChunkRequest, timeout_s: float = ASK_TIMEOUT_S) -> AsyncGenerator[Chunk, None]:
        """The chunks that the fleet sends for `request`, doubled ones included; ends when as many came as were due.

        Raises as `ask` does; `timeout_s` bounds the silence before each chunk.
        """
        due = min(request.window, sum(byte.bit_count() for byte in request.missing))
        seen: set[int] = set()
        with self._conversation(request.sha256) as (name, answers):
            response = await self._first(name, answers, Request(chunks=request), timeout_s)
            while True:
                if response.HasField("chunk"):
                    yield response.chunk
                    seen.add(response.chunk.index)
                if len(seen) >= due:
                    return
                response = await self._next(answers, timeout_s)

    async def _first(self, name: str, answers: _Answers, request: Request, timeout_s: float) -> Response:
        filled = Request()
        filled.CopyFrom(request)
        filled.id, filled.session = name, self._session()
        await self._link.publish(self._topic, filled.SerializeToString(), timeout_s=timeout_s)
        return await self._next(answers, timeout_s)

    @staticmethod
    async def _next(answers: _Answers, timeout_s: float) -> Response:
        try:
            async with asyncio.timeout(timeout_s):
                response = await answers.get()
        except TimeoutError as error:
            raise LinkError(f"the fleet did not answer within {timeout_s:g} s") from error
        if response is None:
            raise LinkError("the connection ended before the fleet answered")
        if response.HasField("refusal"):
            refusal = response.refusal
            raise _REFUSALS.get(refusal.code, LinkError)(f"the fleet refused: {refusal.message}")
        return response

    @contextmanager
    def _conversation(self, sha256: str = "") -> Iterator[tuple[str, _Answers]]:
        """A new request id and the queue of its answers, and of late chunks of the file `sha256` asked for earlier."""
        name, answers = uuid.uuid4().hex, _Answers(ANSWERS_WAITING + 1)
        names = (name, sha256) if sha256 else (name,)
        self._waiting.update(dict.fromkeys(names, answers))
        try:
            yield name, answers
        finally:
            for key in names:
                del self._waiting[key]

    def _receive(self, topic: str, payload: bytes, _retained: bool) -> None:
        try:
            response = Response.FromString(payload)
        except DecodeError:
            _log.warning("%d bytes on %s are no response", len(payload), topic)
            return
        answers = self._waiting.get(response.id) or self._waiting.get(response.chunk.sha256)
        if answers is None:
            _log.debug("an answer on %s that nobody waits for any more", topic)
        elif answers.qsize() >= ANSWERS_WAITING:
            _log.debug("an answer on %s too many", topic)
        else:
            answers.put_nowait(response)

    def _give_up(self) -> None:
        for answers in self._waiting.values():
            if not answers.full():  # else it was told already
                answers.put_nowait(None)
