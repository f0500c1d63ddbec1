"""A plain grpc.aio proxy: the bytes of a call go to the upstream and its bytes come back."""

# mypy: disable-error-code="import-not-found, var-annotated, no-any-return"

import asyncio

import grpc
from aio_server import OPTIONS, SERVICE, Context
from engine import read_job


async def main() -> None:
    job = read_job()
    async with grpc.aio.insecure_channel(job.upstream, options=OPTIONS) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")

        async def forward(raw: bytes, context: Context) -> bytes:
            return await call(raw, timeout=context.time_remaining())

        server = grpc.aio.server(options=OPTIONS)
        handler = grpc.unary_unary_rpc_method_handler(forward)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler})])
        server.add_insecure_port(f"127.0.0.1:{job.port}")
        await server.start()
        await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
