"""`hedgerow top` over real devices: what it says is what was asked of them."""

import asyncio
import json
import math
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulators import agents, models
from simulators.agents import Agent
from simulators.background import in_background

from hedgerow.config import environment
from hedgerow.errors import Unavailable
from hedgerow.oip.messages import request_to_proto
from hedgerow.oip.service import SERVICE
from hedgerow_cloud.cli import top
from hedgerow_cloud.cli.top import Reading, quantile, read, report

HEDGEROW = [sys.executable, "-m", "hedgerow_cloud.cli.main"]
WAIT_S = 60.0
NOBODY = "127.0.0.1:1"


def metrics_of(agent: Agent) -> str:
    return (agent.state / "metrics-address").read_text().strip()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("device")
    models.classifier(folder / "student.onnx", sure=20.0)
    settings = {
        "models": {"digits": {"path": "student.onnx", "gate": {"output": "logits", "threshold": 0.9}}},
        "cloud": {"target": NOBODY},
        "metrics": {"listen": "127.0.0.1:0"},
    }
    with in_background(lambda: agents.running(Agent(folder, settings))) as running:
        yield running


def ask(agent: Agent, count: int, strength: float = 1.0) -> None:
    message = request_to_proto(models.request(models.pixels(3, strength=strength))).SerializeToString()
    with grpc.insecure_channel(agent.address) as channel:
        infer: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
        for _ in range(count):
            infer(message, timeout=WAIT_S)


def hedgerow(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [*HEDGEROW, "top", *arguments]
    return subprocess.run(
        command, env=environment(NO_COLOR="1"), capture_output=True, text=True, timeout=WAIT_S, check=False
    )


def test_what_was_asked_between_two_readings_is_what_is_said(agent: Agent) -> None:
    before = read(metrics_of(agent))
    ask(agent, 8)
    ask(agent, 2, strength=0.01)
    device = report("here", before, after := read(metrics_of(agent)))
    (model,) = device.models
    assert (model.model, model.version, model.state) == ("digits", "1", "ready")
    assert model.requests_per_s * (after.at - before.at) == pytest.approx(10)
    assert (model.edge_share, model.degraded_share, model.failed_share) == (0.8, 0.2, 0.0)
    assert model.rows_per_run == 1
    assert model.p50_s is not None
    assert model.p99_s is not None
    assert 0 < model.p50_s <= model.p99_s
    (remote,) = device.remotes
    assert (remote.remote, remote.up) == ("cloud", False)


def test_a_device_that_nobody_asks_has_nothing_to_tell_and_no_division_by_zero(agent: Agent) -> None:
    reading = read(metrics_of(agent))
    (model,) = report("here", reading, reading).models
    assert (model.requests_per_s, model.p95_s, model.edge_share, model.rows_per_run) == (0, None, None, None)


def test_once_prints_a_table_of_all_devices_and_names_those_that_are_away(agent: Agent) -> None:
    told = hedgerow("--once", "--interval-s", "0.1", metrics_of(agent), NOBODY)
    assert told.returncode == 0, told.stderr
    header, row, *_ = told.stdout.splitlines()
    assert header.split() == " ".join(top.MODEL_COLUMNS).split()
    assert row.split()[:4] == [metrics_of(agent), "digits", "1", "ready"]
    assert "circuit open" in told.stdout
    assert f"nothing answers at {NOBODY}" in told.stdout


def test_json_is_for_programs(agent: Agent) -> None:
    told = hedgerow("--json", "--interval-s", "0.1", metrics_of(agent))
    assert told.returncode == 0, told.stderr
    (device,) = json.loads(told.stdout)
    assert device["address"] == metrics_of(agent)
    assert device["models"][0]["model"] == "digits"


@pytest.mark.parametrize(("address", "said", "code"), [(NOBODY, "nothing answers", 1), ("here", "--metrics takes", 1)])
def test_nothing_to_watch_is_a_line_and_an_exit_code(address: str, said: str, code: int) -> None:
    told = hedgerow("--once", "--interval-s", "0.1", address)
    assert (told.returncode, told.stdout) == (code, "")
    assert said in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_on_a_terminal_it_goes_on_until_ctrl_c(agent: Agent) -> None:
    ours, theirs = pty.openpty()
    command = [*HEDGEROW, "top", "--interval-s", "0.1", metrics_of(agent)]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", COLUMNS="200")
    )
    os.close(theirs)
    try:
        seen = b""
        while seen.count(b"digits") < 2:  # drawn anew
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                if not os.read(ours, 4096):
                    break
            except OSError:  # the terminal's other end is closed
                break
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno{metric", b"HTTP/1.1 404 No\r\n\r\n"],
)
async def test_whatever_answers_there_it_is_said_in_a_line(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(serve, "127.0.0.1", 0))
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Unavailable, match=address):
            await asyncio.to_thread(read, address)


BOUNDS = (0.1, 0.2, 0.5, 1.0, math.inf)


@given(st.lists(st.floats(0.001, 2), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_a_quantile_is_in_the_bucket_that_the_value_is_in(values: list[float], q: float) -> None:
    buckets = [(bound, float(sum(value <= bound for value in values))) for bound in BOUNDS]
    found = quantile(buckets, q)
    exact = sorted(values)[math.ceil(q * len(values)) - 1]
    assert found is not None
    above = next(bound for bound in BOUNDS if exact <= bound)
    below = max((bound for bound in BOUNDS if bound < above), default=0.0)
    assert below <= found <= min(above, 1.0)


def test_a_device_that_was_started_anew_has_no_negative_rates() -> None:
    def reading(at: float, count: float) -> Reading:
        labels = {"model": "m", "version": "1", "status": "OK"}
        return Reading(
            at,
            {
                "hedgerow_requests_total": [(labels, count)],
                "hedgerow_model_info": [({"model": "m", "version": "1"}, 1.0)],
            },
        )

    (model,) = report("here", reading(0, 1000), reading(2, 6)).models
    assert model.requests_per_s == 3
    assert model.state == "hangs"  # it is loaded and not ready
