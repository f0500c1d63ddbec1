"""A daemon stops when it is told to, leaves at once when told twice, and says why when it fails."""

import asyncio
import io
import logging
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from hedgerow.lifecycle import InFlight, supervise
from hedgerow.telemetry.logs import LineFormatter

WAIT_S = 20.0
DAEMON = """
import asyncio, logging, sys
from hedgerow.errors import ConfigError, Unavailable
from hedgerow.lifecycle import run, supervise

log = logging.getLogger("hedgerow.test")

async def main(stop):
{body}

sys.exit(run(main))
"""


@asynccontextmanager
async def daemon(body: str) -> AsyncIterator[asyncio.subprocess.Process]:
    code = DAEMON.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line_with(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        while line := (await process.stderr.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"{words!r} was not said")


async def ends(process: asyncio.subprocess.Process) -> tuple[int, str]:
    assert process.stderr is not None
    async with asyncio.timeout(WAIT_S):
        rest = (await process.stderr.read()).decode()
        return await process.wait(), rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_daemon_finish(number: signal.Signals) -> None:
    body = """
        log.info("up")
        await stop.wait()
        await asyncio.sleep(0.05)
        log.info("all put away")
    """
    async with daemon(body) as process:
        await line_with(process, "INFO hedgerow.test up")
        process.send_signal(number)
        await line_with(process, f"INFO hedgerow.lifecycle {number.name}: stopping")
        await line_with(process, "all put away")
        assert await ends(process) == (0, "")


async def test_a_second_signal_does_not_wait() -> None:
    async with daemon('log.info("up")\nawait asyncio.Event().wait()') as process:
        await line_with(process, "up")
        process.send_signal(signal.SIGTERM)
        await line_with(process, "SIGTERM: stopping")
        process.send_signal(signal.SIGTERM)
        code, said = await ends(process)
        assert code == 128 + signal.SIGTERM
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("body", "code", "lines"),
    [
        ('raise ConfigError("server.port: expected a number")', 2, ["server.port: expected a number"]),
        ('raise Unavailable("the broker is gone")', 1, ["the broker is gone"]),
        (
            "async def loop(): raise ConfigError('broker.host: expected a name')\nawait supervise(stop, link=loop())",
            2,
            ["broker.host: expected a name"],
        ),
    ],
)
async def test_a_known_error_is_one_line_and_a_code(body: str, code: int, lines: list[str]) -> None:
    async with daemon(body) as process:
        got, said = await ends(process)
    assert got == code
    assert [line.split(" ERROR hedgerow.lifecycle ")[1] for line in said.splitlines()] == lines


async def test_an_unknown_error_keeps_its_traceback() -> None:
    async with daemon('raise KeyError("oops")') as process:
        code, said = await ends(process)
    assert code == 1
    assert "CRITICAL hedgerow.lifecycle stopped by an unexpected error" in said
    assert "KeyError: 'oops'" in said


async def test_loops_live_until_stopped_and_die_together() -> None:
    stop, left = asyncio.Event(), []

    async def loop(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.append(name)

    async def short() -> None:
        await asyncio.sleep(0)

    async def crash() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("crashed")

    async with asyncio.TaskGroup() as group:
        supervised = group.create_task(supervise(stop, a=loop("a"), b=loop("b"), short=short()))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not supervised.done()
        stop.set()
    assert left == ["a", "b"]

    with pytest.raises(ExceptionGroup) as caught:
        await supervise(asyncio.Event(), c=loop("c"), crash=crash())
    assert caught.group_contains(RuntimeError, match="crashed")
    assert left == ["a", "b", "c"]


async def test_idle_means_that_the_last_one_has_left() -> None:
    work = InFlight()
    assert await work.idle(0)
    with work:
        with work:
            assert work.count == 2
        assert not await work.idle(0.01)
    assert await work.idle(0)


@pytest.fixture
def logged() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("hedgerow.test")  # noqa: LOG001 (one that leaves the process's own alone)
    logger.addHandler(handler)
    yield logger, stream
    handler.close()


def test_a_callers_name_cannot_forge_a_line_of_the_log(logged: tuple[logging.Logger, io.StringIO]) -> None:
    logger, stream = logged
    logger.warning("no model %s", "x\n2026-01-01 INFO all is well\x1b[2J")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("WARNING hedgerow.test no model x\\x0a2026-01-01 INFO all is well\\x1b[2J")
