"""A collector of traces: a real OTLP receiver that keeps what it is sent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Spans, and the service of each by its id."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: dict[bytes, str] = {}

    def Export(self, request: Any, _: Any) -> Any:  # noqa: N802 (gRPC's)
        for resource in request.resource_spans:
            name = next(pair.value.string_value for pair in resource.resource.attributes if pair.key == "service.name")
            for scope in resource.scope_spans:
                self.spans += scope.spans
                self.services |= {span.span_id: name for span in scope.spans}
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector, and its endpoint."""
    collector = Collector()
    with ThreadPoolExecutor(2) as workers:
        server = grpc.server(workers)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield collector, f"http://127.0.0.1:{port}"
        server.stop(None).wait()
