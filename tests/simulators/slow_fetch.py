"""A process that fetches <folder>/content to <folder>/slot/0.onnx and says how far it is, in order to be killed."""

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from hedgerow import release
from hedgerow.proto.link_pb2 import Chunk, ChunkRequest
from hedgerow_edge.transfer import Transfer

CHUNK_PAUSE_S = 0.005


class Slow:
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def ready(self) -> None:
        pass

    async def chunks(self, request: ChunkRequest, timeout_s: float) -> AsyncGenerator[Chunk, None]:
        size = request.chunk_bytes
        for index in range(8 * len(request.missing)):
            if request.missing[index // 8] >> index % 8 & 1:
                await asyncio.sleep(CHUNK_PAUSE_S)
                content = self._content[index * size : (index + 1) * size]
                yield Chunk(sha256=request.sha256, index=index, content=content)


def say(done: int, _total: int) -> None:
    sys.stdout.write(f"{done}\n")
    sys.stdout.flush()


async def main(folder: Path) -> None:
    source = Slow((folder / "content").read_bytes())
    await Transfer(folder / "parts", source).fetch(release.describe(folder, "content"), folder / "slot" / "0.onnx", say)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
