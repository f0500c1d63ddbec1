"""Servers of the kinds, started and ended, and the cache folder that the peers' packages are installed into."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.serving.process import Process
from bench.serving.wire import HOST, Grpc
from bench.transports.kinds import PACKAGES
from simulators.victims import ECHO, message

TESTS = Path(__file__).parent.parent.parent
START_S = 60.0
ASK_EVERY_S = 0.1
INSTALL_S = 600.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    port: int
    process: Process

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def descriptors(self) -> int:
        """Open in the server's process."""
        return len(list(Path(f"/proc/{self.process._process.pid}/fd").iterdir()))


def installed(cache: Path) -> Path:
    """The folder with the peers' packages, made if need be."""
    folder = cache / "transports"
    mark = folder / "hedgerow-bench"
    if not mark.exists() or mark.read_text() != " ".join(PACKAGES):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, timeout=INSTALL_S)
        mark.write_text(" ".join(PACKAGES))
    return folder


@contextmanager
def running(kind: str, packages: Path, **settings: object) -> Iterator[Running]:
    """A server of `kind` with these settings; raises `TimeoutError` with its last words if it does not answer."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-m", "bench.transports.server", kind, str(port), json.dumps(settings)]
        process = Process(command, Path(folder), {"PYTHONPATH": f"{TESTS}:{packages}"})
        try:
            _wait(port, process)
            yield Running(port, process)
        finally:
            process.stop()


def _wait(port: int, process: Process) -> None:
    body = b"\0" + len(message(ECHO)).to_bytes(4, "big") + message(ECHO)
    deadline = time.monotonic() + START_S
    while True:
        try:
            Grpc().ask(port, body)
        except OSError as error:
            if not process.running or time.monotonic() > deadline:
                raise TimeoutError(f"{error}; it said: {process.log_tail()}") from error
            time.sleep(ASK_EVERY_S)
        else:
            return
