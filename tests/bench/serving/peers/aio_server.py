"""The floors, on plain grpc.aio: `run` parses, runs, builds and nothing else; `echo` always says its first answer."""

# mypy: disable-error-code="import-not-found, var-annotated, no-any-return"

import asyncio
import sys

import grpc
import numpy as np
from engine import Model, read_job

from hedgerow.proto import oip_pb2

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
SERVICE = "inference.GRPCInferenceService"
Context = grpc.aio.ServicerContext[bytes, bytes]


async def main(kind: str) -> None:
    job = read_job()
    engine = Model(job)
    first: list[bytes] = []

    async def run(raw: bytes, _: Context) -> bytes:
        request = oip_pb2.ModelInferRequest.FromString(raw)
        array = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(request.inputs[0].shape)
        if job.threaded:
            answer = await asyncio.get_running_loop().run_in_executor(engine.pool, engine, array)
        else:
            answer = engine(array)
        output = oip_pb2.ModelInferResponse.InferOutputTensor(name=job.output, datatype="FP32", shape=answer.shape)
        return oip_pb2.ModelInferResponse(
            model_name=job.model, outputs=[output], raw_output_contents=[answer.tobytes()]
        ).SerializeToString()

    async def echo(raw: bytes, context: Context) -> bytes:
        if not first:
            first.append(await run(raw, context))
        return first[0]

    server = grpc.aio.server(options=OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler({"run": run, "echo": echo}[kind])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler})])
    server.add_insecure_port(f"127.0.0.1:{job.port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
