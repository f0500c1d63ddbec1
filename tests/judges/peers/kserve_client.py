"""KServe's own gRPC client, in KServe's environment: `python kserve_client.py HOST:PORT`; prints what it was told."""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest  # type: ignore[import-not-found]


async def main(address: str) -> None:
    client = InferenceGRPCClient(url=address)
    inputs = []
    for name, first in (("INPUT0", 0), ("INPUT1", 100)):
        inputs.append(InferInput(name, [1, 16], "INT32"))
        inputs[-1].set_data_from_numpy(np.arange(first, first + 16, dtype=np.int32).reshape(1, 16))
    answer = await client.infer(InferRequest(model_name="simple", infer_inputs=inputs, request_id="from-kserve"))
    told = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model": await client.is_model_ready("simple"),
        "unknown": await client.is_model_ready("no-such-model"),
        "id": answer.id,
        "sums": answer.outputs[0].as_numpy().ravel().tolist(),
    }
    await client.close()
    sys.stdout.write(json.dumps(told) + "\n")


asyncio.run(main(sys.argv[1]))
