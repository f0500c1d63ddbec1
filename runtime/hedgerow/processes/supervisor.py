"""The side of the one who starts several processes that serve, and looks after them.

- The first time, all of them must serve; if one does not, none is kept, and the error says so. They listen together:
  the first one alone would be dealt all the connections that wait for a server, and keep them.
- One that ends is started again as `restarts.Restarts` says; meanwhile the others serve. When all have been given up,
  that is an error.
- At the end each is told to drain, and killed if it takes longer than that may.
- None outlives this process, whatever happens to it (`worker`).
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec

from hedgerow.config import Seconds, Settings
from hedgerow.errors import ConfigError, HedgerowError
from hedgerow.lifecycle import EXIT_CONFIG
from hedgerow.processes.line import Report, frame, read_frame
from hedgerow.restarts import Restarts, RestartSettings

LISTEN_S = 30.0
"""How long a process that has all it needs may take to listen."""
EXIT_S = 10.0
"""How long a process may take to be gone beside what it drains."""
REPORT_S = 2.0
"""Within which a process must have said how it fares, or is left out."""

log = logging.getLogger(__name__)


class SupervisorSettings(Settings, frozen=True, kw_only=True):
    """How processes are started, and started again."""

    start_timeout_s: Seconds = 120.0
    """Until one could listen."""
    restarts: RestartSettings = RestartSettings()


class Supervisor:
    """`count` processes of `command`, a `worker` each, which are `told` what to serve and may drain for `drain_s`."""

    def __init__(
        self, command: Sequence[str], told: bytes, count: int, drain_s: float, settings: SupervisorSettings
    ) -> None:
        self._command = command
        self._told = told
        self._drain_s = drain_s
        self._settings = settings
        self._together = asyncio.Barrier(count)
        self._starting = count
        self._restarts = [Restarts(settings.restarts) for _ in range(count)]
        self._running: dict[int, _Process] = {}
        self.restarted = [0] * count
        """How often each was started again."""
        self.serving = asyncio.Event()
        """Set once all of them serve."""

    async def run(self) -> None:
        """Keep them running until cancelled, then let them drain.

        Raises `HedgerowError` (in an ExceptionGroup) if one cannot be started, or none keeps running.
        """
        async with asyncio.TaskGroup() as group:
            for slot in range(len(self._restarts)):
                group.create_task(self._keep(slot))

    async def reports(self) -> Mapping[int, Report]:
        """How those fare that serve, by their place among them; without those that do not say so in time."""
        running = dict(self._running)
        answers = await asyncio.gather(*(process.report() for process in running.values()), return_exceptions=True)
        return {
            slot: answer for slot, answer in zip(running, answers, strict=True) if not isinstance(answer, BaseException)
        }

    async def _keep(self, slot: int) -> None:
        restarts, name = self._restarts[slot], f"process {slot + 1} of {len(self._restarts)}"
        loop, again = asyncio.get_running_loop(), False
        while True:
            how, served = await self._once(slot, name, again=again)
            if not (again or served):
                raise HedgerowError(f"{name} {how} before it served; the log says why")
            again = True
            at = restarts.ended(loop.time())
            if all(one.given_up for one in self._restarts):
                raise HedgerowError(f"no process keeps running; the last one {how}")
            doing = "it keeps failing and is left alone for" if restarts.given_up else "it is started again in"
            log.warning("%s %s; %s %.1f s", name, how, doing, at - loop.time())
            await asyncio.sleep(at - loop.time())

    async def _once(self, slot: int, name: str, *, again: bool) -> tuple[str, bool]:
        """Run a process to its end; how it ended, in words, and whether it has served."""
        try:
            starting = await _Process.start(self._command, self._told, self._drain_s)
        except OSError as error:  # out of processes or of memory, for a while
            return f"cannot be started ({error.strerror})", False
        async with starting as process:
            how = await process.prepares(self._settings.start_timeout_s)
            if not (how or again):
                await self._together.wait()
            if how := how or await process.listens():
                if not again and process.code == EXIT_CONFIG:
                    raise ConfigError(f"{name} {how} before it served; the log says why")
                return how, False
            self._serves(slot, process, again=again)
            how = await process.ends()
            del self._running[slot]
            return how, True

    def _serves(self, slot: int, process: "_Process", *, again: bool) -> None:
        self._running[slot] = process
        if again:
            self._restarts[slot].started()
            self.restarted[slot] += 1
            log.info("process %d of %d serves again", slot + 1, len(self._restarts))
        else:
            self._starting -= 1
            if not self._starting:
                self.serving.set()


class _Process:
    """One process from its start to its end. Leaving ``async with`` has it drain, if it serves, and waits for it."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        drain_s: float,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._drain_s = drain_s
        self._serves = False
        self._asked: asyncio.Future[Report] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], told: bytes, drain_s: float) -> Self:
        near, far = socket.socketpair()
        with far:
            reader, writer = await asyncio.open_unix_connection(sock=near)
            try:
                process = await asyncio.create_subprocess_exec(*command, stdin=far.fileno())
            except BaseException:
                writer.close()
                raise
        writer.write(frame(told))
        return cls(process, reader, writer, drain_s)

    @property
    def code(self) -> int | None:
        """Its exit code, once it is gone."""
        return self._process.returncode

    async def prepares(self, timeout_s: float) -> str:
        """Wait until it could listen; what became of it in words if it cannot, and nothing if it can."""
        try:
            async with asyncio.timeout(timeout_s):
                await read_frame(self._reader)
        except TimeoutError:
            return f"took more than {timeout_s:g} s to start"
        except EOFError:
            return await self._gone()
        return ""

    async def listens(self) -> str:
        """Have it listen; as `prepares`."""
        self._writer.write(frame(b""))
        how = await self.prepares(LISTEN_S)
        self._serves = not how
        return how

    async def report(self) -> Report:
        """How it fares; raises EOFError or TimeoutError if it does not say so."""
        if self._asked is None:  # several who ask at once get the same answer
            self._writer.write(frame(b""))  # raises once it was told to drain
            self._asked = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(REPORT_S):
            return await asyncio.shield(self._asked)

    async def ends(self) -> str:
        """Take its reports until it is gone; how it ended, in words."""
        try:
            while True:
                report = msgspec.msgpack.decode(await read_frame(self._reader), type=Report)
                if self._asked is not None:
                    self._asked.set_result(report)
                    self._asked = None
        except EOFError:
            return await self._gone()
        finally:
            if self._asked is not None:
                self._asked.cancel()

    async def _gone(self) -> str:
        try:
            async with asyncio.timeout(EXIT_S):
                code = await self._process.wait()
        except TimeoutError:
            return "hung up"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            if self._serves and self._writer.can_write_eof():
                self._writer.write_eof()
                async with asyncio.timeout(self._drain_s + EXIT_S):
                    await self._process.wait()
        except TimeoutError:
            log.warning("a process took more than %g s to end, and is killed", self._drain_s + EXIT_S)
        finally:
            if self._process.returncode is None:
                self._process.kill()
            self._writer.close()
            await self._process.wait()
