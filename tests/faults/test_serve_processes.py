"""Several processes on one port: one that is killed costs only what it had, and the end costs nothing."""

import asyncio
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from simulators import fronts
from simulators.fronts import EXIT, WAIT_S, Caller, Fronts
from simulators.victims import ECHO, SLOW

from hedgerow import transports
from hedgerow.errors import ConfigError
from hedgerow.processes.port import SHARED, held

pytestmark = pytest.mark.skipif(not SHARED, reason="ports cannot be shared here")

CALLERS = 12
"""Connections; that the kernel deals all of them to one of two processes happens once in 2,048 times."""
SECONDS = 2.0
"""Of a call that is in flight."""


@pytest.fixture
async def two() -> AsyncIterator[Fronts]:
    async with fronts.running() as running:
        yield running


async def callers(stack: AsyncExitStack, to: Fronts) -> dict[int, list[Caller]]:
    """By the process at the other end: some at each."""
    found: dict[int, list[Caller]] = {process: [] for process in to.met}
    while sum(map(len, found.values())) < CALLERS or not all(found.values()):
        caller = await stack.enter_async_context(Caller(to.address))
        found[caller.process].append(caller)
    return found


async def until_gone(process: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while os.path.exists(f"/proc/{process}"):  # noqa: ASYNC110, ASYNC240, PTH110 (not our child, and no disk)
            await asyncio.sleep(0.02)


async def said(process: asyncio.subprocess.Process) -> str:
    """All that it writes to its log until it ends."""
    assert process.stderr is not None
    return (await asyncio.wait_for(process.stderr.read(), WAIT_S)).decode()


async def metrics(of: Fronts) -> dict[str, dict[str, float]]:
    """Values by name and process, summed over other labels."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families((await of.get("/metrics"))[1]):
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            values[sample.labels["process"]] = values.get(sample.labels["process"], 0) + sample.value
    return found


async def test_a_killed_process_costs_the_calls_on_its_connections_and_no_others(
    two: Fronts, stack: AsyncExitStack
) -> None:
    by_process = await callers(stack, two)
    victim, survivor = sorted(by_process)
    outcomes: dict[int, Counter[str]] = {victim: Counter(), survivor: Counter()}
    back = asyncio.Event()

    async def load(caller: Caller) -> None:
        while not back.is_set():
            try:
                await caller.ask(ECHO, 1.0)
                outcomes[caller.process]["OK"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[caller.process][error.code().name] += 1
                await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        in_flight = [group.create_task(_code(caller)) for caller in by_process[victim]]
        for caller in (*by_process[victim], *by_process[survivor]):
            group.create_task(load(caller))
        async with asyncio.timeout(WAIT_S):
            while not all(counts["OK"] >= 2 * CALLERS for counts in outcomes.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.kill(victim, signal.SIGKILL)
        (fresh,) = await two.meets(1)
        answered = outcomes[victim]["OK"]
        async with asyncio.timeout(WAIT_S):  # its callers have connected again, to whichever process
            while outcomes[victim]["OK"] < answered + CALLERS:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        back.set()
    assert {await task for task in in_flight} == {grpc.StatusCode.UNAVAILABLE}
    assert set(outcomes[survivor]) == {"OK"}, outcomes
    assert set(outcomes[victim]) <= {"OK", "UNAVAILABLE"}, outcomes
    assert fresh not in {victim, survivor}
    assert (await metrics(two))["hedgerow_process_restarts_total"] in ({"1": 1, "2": 0}, {"1": 0, "2": 1})


async def _code(caller: Caller) -> grpc.StatusCode:
    try:
        await caller.ask(SLOW, WAIT_S)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def inflight(of: Fronts) -> float:
    return sum((await metrics(of)).get("hedgerow_requests_inflight", {}).values())


async def test_sigterm_under_load_fails_no_request_that_was_accepted(stack: AsyncExitStack) -> None:
    two = await stack.enter_async_context(fronts.running(server={"port": 0, "drain_s": WAIT_S}))
    by_process = await callers(stack, two)
    outcomes: Counter[str] = Counter()

    async def load(caller: Caller) -> None:
        while True:
            try:
                await caller.ask(ECHO, 1.0)
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1
                return
            outcomes["OK"] += 1

    everyone = [caller for some in by_process.values() for caller in some]
    async with asyncio.TaskGroup() as group:
        slow = [group.create_task(caller.ask(SLOW, SECONDS)) for caller in everyone]
        loads = [group.create_task(load(caller)) for caller in everyone]
        async with asyncio.timeout(WAIT_S):
            while (not outcomes["OK"] or await inflight(two) < len(everyone)) and not slow[0].done():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        two.parent.terminate()
        assert [list(await task) for task in slow] == [[SECONDS]] * len(everyone)
        await asyncio.wait(loads)
    # Only what was not begun has failed, and was told so.
    assert set(outcomes) == {"OK", "UNAVAILABLE"}, outcomes
    assert await two.ended() == 0
    for process in two.met:
        await until_gone(process)


@pytest.mark.parametrize("transport", transports.known())
async def test_over_each_transport_connections_are_dealt_to_all_processes(transport: str) -> None:
    async with fronts.running(processes=3, server={"port": 0, "transport": transport}) as three:
        assert len(three.met) == 3
        three.parent.terminate()
        assert await three.ended() == 0


async def test_the_first_that_could_listen_does_not_take_all_the_connections_that_wait(tmp_path: Path) -> None:
    with held("127.0.0.1", 0) as port:
        pass
    async with fronts.started(server={"port": port}, uneven=str(tmp_path)), asyncio.timeout(WAIT_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.01)
        writer.close()
        assert (tmp_path / fronts.LAST).exists()


async def test_a_second_server_on_the_port_is_refused_and_takes_no_connection(two: Fronts) -> None:
    host, _, port = two.address.rpartition(":")
    async with fronts.started(server={"port": int(port)}) as second:
        log = await said(second)
        assert await second.wait() == 2
    assert f"cannot listen on {two.address}: Address already in use" in log
    with pytest.raises(OSError, match="in use"):
        socket.create_server((host, int(port)))
    async with Caller(two.address) as caller:
        assert caller.process in two.met


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_port_is_held_from_the_first_moment_and_given_back_at_the_last(host: str) -> None:
    with held(host, 0) as port:
        with pytest.raises(ConfigError, match=f"server.host, server.port: cannot listen on .*{port}"), held(host, port):
            pass
        with (
            socket.create_server(("127.0.0.1", port), reuse_port=True)
            if host != "::1"
            else socket.create_server((host, port), family=socket.AF_INET6, reuse_port=True)
        ):
            pass
        with pytest.raises(ConfigError), held(host, port):  # nor once they have all gone
            pass
    with held(host, port) as again:
        assert again == port


def test_a_port_that_somebody_else_has_is_not_held() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=True) as other,
        pytest.raises(ConfigError, match="in use"),
        held("127.0.0.1", other.getsockname()[1]),
    ):
        pass


@pytest.mark.parametrize(("refuse", "code", "line"), [("config", 2, "ended with exit code 2"), ("exit", 1, "code 3")])
async def test_processes_that_cannot_start_end_the_server_with_a_reason(refuse: str, code: int, line: str) -> None:
    async with fronts.started(refuse=refuse) as parent:
        log = await said(parent)
        assert await parent.wait() == code
    assert re.search(rf"process \d of 2 .*{line} before it served", log), log
    assert "Traceback" not in log


async def test_where_no_process_can_be_started_for_a_while_the_others_go_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    async with fronts.running(python=str(python)) as two:
        away = python.rename(tmp_path / "away")
        victim, survivor = sorted(two.met)
        os.kill(victim, signal.SIGKILL)
        assert two.parent.stderr is not None
        async with asyncio.timeout(WAIT_S):
            while b"cannot be started" not in await two.parent.stderr.readline():
                pass
        async with Caller(two.address) as caller:
            assert caller.process == survivor
        away.rename(python)
        assert len(await two.meets(1)) == 1


async def test_processes_that_keep_dying_are_given_up_and_that_ends_the_server() -> None:
    restarts = {"backoff_s": 0.01, "max_restarts": 2, "window_s": 10 * WAIT_S, "cool_down_s": 10 * WAIT_S}
    async with fronts.running(supervisor={"restarts": restarts}) as two:
        async with asyncio.timeout(WAIT_S):
            while two.parent.returncode is None:
                try:
                    async with asyncio.timeout(5), Caller(two.address) as caller:
                        await caller.ask(EXIT, 7)
                except (TimeoutError, grpc.aio.AioRpcError):
                    await asyncio.sleep(0.01)
        log = await said(two.parent)
        assert await two.ended() == 1
    assert "no process keeps running; the last one ended with exit code 7" in log


async def test_a_parent_that_is_killed_leaves_nobody_behind(two: Fronts) -> None:
    async with Caller(two.address) as caller:
        busy = asyncio.gather(caller.ask(SLOW, WAIT_S), return_exceptions=True)
        os.kill(min(two.met), signal.SIGSTOP)  # this one will not notice by itself
        two.parent.kill()
        for process in two.met:
            await until_gone(process)
        await busy
    with held(*_split(two.address)):
        pass


async def test_the_page_of_metrics_has_every_process_and_goes_on_without_one_that_hangs(
    two: Fronts, stack: AsyncExitStack
) -> None:
    by_process = await callers(stack, two)
    for caller in (caller for some in by_process.values() for caller in some):
        await caller.ask(ECHO, 1.0)
    found = await both(two)
    assert set(found["hedgerow_build_info"]) == {"1", "2", "supervisor"}
    assert set(found["process_resident_memory_bytes"]) == {"1", "2", "supervisor"}
    assert set(found["hedgerow_requests_total"]) == {"1", "2"}
    assert min(found["hedgerow_connections"].values()) > 0
    await ready(two)
    hung = min(two.met)
    os.kill(hung, signal.SIGSTOP)
    try:
        found = await metrics(two)
        assert 0 in found["hedgerow_process_up"].values()
        assert len(found.get("hedgerow_requests_total", {})) < len(two.met)
        await ready(two)
    finally:
        os.kill(hung, signal.SIGCONT)
    await both(two)


async def both(of: Fronts) -> dict[str, dict[str, float]]:
    """The metrics once both processes have told theirs, which they may be too busy to do at once."""
    async with asyncio.timeout(WAIT_S):
        while (found := await metrics(of))["hedgerow_process_up"] != {"1": 1, "2": 1}:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return found


async def ready(of: Fronts) -> None:
    async with asyncio.timeout(WAIT_S):
        while await of.get("/readyz") != (200, "ready\n"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
