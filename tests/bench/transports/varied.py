"""What a call costs the server when its headers are new: h2load's are always the same, real deadlines never are.

`python -m bench.transports.varied` prints the server's CPU in µs a ServerLive, with equal headers and with a
`grpc-timeout` that is another one each time, sent as grpc's clients send it.
"""

import socket
import statistics
import sys

from bench.transports.__main__ import CACHE
from bench.transports.kinds import KINDS
from bench.transports.loads import ANSWER_S, CALLS
from bench.transports.running import Running, installed, running
from simulators.http2 import (
    PREFACE,
    Flag,
    Kind,
    RawConnection,
    Setting,
    call_fields,
    data,
    frame,
    settings,
    window_update,
)

CALLS_AT_ONCE, BURSTS, ROUNDS = 32, 400, 3
WINDOW = 2**31 - 1
HEAD_BYTES = 9


def cpu_us(server: Running, *, varied: bool) -> float:
    """The server's CPU a call."""
    call, host = CALLS["live"], server.address.rpartition(":")[0]
    encoder = RawConnection(server.address)  # never connected: it only keeps the header table
    bursts = []
    for burst in range(BURSTS):
        parts = []
        for index in range(CALLS_AT_ONCE):
            number = burst * CALLS_AT_ONCE + index
            timeout = f"{90_000_000 - number if varied else 90_000_000}u"
            parts += [encoder.headers(2 * number + 1, call_fields(call.path, grpc_timeout=timeout))]
            parts += [data(2 * number + 1, call.body)]
        bursts.append(b"".join(parts))
    with socket.create_connection((host, server.port), timeout=ANSWER_S) as to:
        to.sendall(PREFACE + settings({Setting.INITIAL_WINDOW_SIZE: WINDOW}) + window_update(0, WINDOW - 65_535))
        to.sendall(frame(Kind.SETTINGS, Flag.ACK, 0))
        reader = to.makefile("rb")
        before_s = server.process.cpu_s()
        for sent in bursts:
            to.sendall(sent)
            ended = 0
            while ended < CALLS_AT_ONCE:
                head = reader.read(HEAD_BYTES)
                reader.read(int.from_bytes(head[:3], "big"))
                ended += head[3] == Kind.HEADERS and bool(head[4] & Flag.END_STREAM)
        return (server.process.cpu_s() - before_s) / (BURSTS * CALLS_AT_ONCE) * 1e6


def main() -> None:
    """A line a kind."""
    packages = installed(CACHE)
    for kind in KINDS:
        with running(kind, packages) as server:
            cpu_us(server, varied=False)  # to warm up
            found = [(cpu_us(server, varied=False), cpu_us(server, varied=True)) for _ in range(ROUNDS)]
        equal, varied = (statistics.median(column) for column in zip(*found, strict=True))
        sys.stdout.write(f"{KINDS[kind].title}: {equal:.1f} with equal headers, {varied:.1f} with new ones: {found}\n")


if __name__ == "__main__":
    main()
