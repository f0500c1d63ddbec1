"""What is asked of each server: h2load's closed loops with prepared bodies, and connections that only stand there."""

import resource
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench.serving import load
from bench.serving.wire import HOST, Grpc
from bench.transports.running import Running
from simulators.http2 import PREFACE, settings
from simulators.victims import ECHO, message

IDLE_CONNECTIONS = 10_000
SPARE_DESCRIPTORS = 500
ANSWER_S = 30.0
SERVICE = "/inference.GRPCInferenceService"


@dataclass(frozen=True, slots=True)
class Call:
    """One request, sent over and over."""

    title: str
    path: str
    message: bytes

    @property
    def body(self) -> bytes:
        """As it travels, behind gRPC's prefix."""
        return struct.pack(">BI", 0, len(self.message)) + self.message


def echo(size: int) -> bytes:
    """A request of `size` bytes of tensor to the identity model."""
    return message(ECHO, *[0.5] * (size // 4))


CALLS: Mapping[str, Call] = {
    "live": Call("ServerLive", f"{SERVICE}/ServerLive", b""),
    "infer": Call("ModelInfer, 256 bytes", f"{SERVICE}/ModelInfer", echo(256)),
    "infer-1mb": Call("ModelInfer, 1 MB", f"{SERVICE}/ModelInfer", echo(2**20)),
}
SHAPES = ((1, 1), (8, 1), (32, 1), (32, 8))
"""Calls in flight, over how many connections."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What one load saw; CPU is the server's, a request. `missing`: calls without a whole answer."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    requests: int
    missing: int


def closed(server: Running, call: Call, inflight: int, connections: int, seconds: float) -> Loaded:
    """`inflight` calls at any time for `seconds`; raises `LoadFailure`."""
    wire = Grpc(path=call.path)
    answer = wire.ask(server.port, call.body)
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(call.body)
        command = ["h2load", "-D", f"{seconds * 1e3:.0f}ms", "-d", str(body), f"--log-file={log}"]
        for name, value in wire.headers:
            command += ["-H", f"{name}: {value}"]
        command += ["-c", str(connections), "-m", str(inflight // connections), f"http://{server.address}{call.path}"]
        before_s = server.process.cpu_s()
        printed = load._run(command, seconds)
        cpu_s = server.process.cpu_s() - before_s
        took_us = np.loadtxt(log, dtype=np.int64, usecols=2, ndmin=1)
    result = load.h2load_result(printed, took_us, answer_bytes=len(answer), inflight=inflight, seconds=seconds)
    cpu_us = cpu_s / result.requests * 1e6
    return Loaded(result.rate, result.p50_ms, result.p99_ms, cpu_us, result.requests, result.missing)


def idle_bytes(server: Running) -> float:
    """Resident bytes that `IDLE_CONNECTIONS` greeted ones cost, each; the server must still answer beside them."""
    before = server.process.rss_bytes()
    with _connections(server.port):
        Grpc(path=CALLS["live"].path).ask(server.port, CALLS["live"].body)
        if (held := server.descriptors) < IDLE_CONNECTIONS:
            raise ConnectionResetError(f"of {IDLE_CONNECTIONS} idle connections at most {held} are held")
        return (server.process.rss_bytes() - before) / IDLE_CONNECTIONS


@contextmanager
def _connections(port: int) -> Iterator[None]:
    """Raises `OSError` if one is not greeted."""
    with ExitStack() as stack:
        for _ in range(IDLE_CONNECTIONS):
            one = stack.enter_context(socket.create_connection((HOST, port), timeout=ANSWER_S))
            one.sendall(PREFACE + settings())
            if not one.recv(9):
                raise ConnectionResetError("the server hung up on an idle connection")
        yield


def allow_descriptors() -> None:
    """As many as the idle connections need, here and in servers started afterwards."""
    enough = IDLE_CONNECTIONS + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(enough, hard)), hard))
