"""Shadow over real models and servers: nobody notices one, and it tells good candidates from bad ones."""

import logging
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from simulators import models
from simulators.cloud import MODEL, Cloud
from simulators.places import PATIENCE_S, REMOTE, Place, ask, infer, releases, running, until

from hedgerow.backend import Backend, Deadline
from hedgerow.config import load
from hedgerow.errors import (
    ConfigError,
    EngineFault,
    Overloaded,
)
from hedgerow.host.model_host import ModelHost
from hedgerow.parameters import PRIVACY
from hedgerow.remote.backend import RemoteBackend
from hedgerow.tensors import InferRequest, InferResponse, Origin
from hedgerow.traffic import shadow
from hedgerow.traffic.shadow import Mirror, Shadow, ShadowSettings


def shadowed(caller: Backend, candidate: Backend, *, local: bool = False, **settings: Any) -> tuple[Shadow, Mirror]:
    mirror = Mirror(candidate, ShadowSettings(**{"model": "there", "share": 1.0, **settings}), local=local)
    return Shadow(caller, {"there": mirror}), mirror


def see(**fields: Any) -> InferRequest:
    return ask(model="there", **fields)


def done(mirror: Mirror) -> int:
    counts = mirror.counts
    return counts.agreed + counts.differed + counts.failed.total()


def is_done(mirror: Mirror, count: int) -> bool:
    return done(mirror) == count


async def test_a_caller_gets_its_answer_whatever_becomes_of_the_shadow(caplog: pytest.LogCaptureFixture) -> None:
    caller, candidate = Place(1), Place(2)
    both, mirror = shadowed(caller, candidate)
    candidate.let.clear()
    async with running(both.run()):
        for _ in range(10):
            answer = await infer(both, see())
            assert answer.parameters == {"said": 1}
        await candidate.called.acquire()
        assert done(mirror) == 0
        candidate.let.set()
        await until(lambda: done(mirror) == 10)
        assert (mirror.counts.differed, mirror.counts.furthest) == (10, 1.0)
        for count, error in ((11, Overloaded("no room")), (12, EngineFault("it fails"))):
            candidate.raises = error
            await infer(both, see())
            await until(partial(is_done, mirror, count))
        assert mirror.counts.failed == {"RESOURCE_EXHAUSTED": 1, "INTERNAL": 1}
        candidate.raises, candidate.number = None, 1
        await infer(both, see())
        await until(lambda: mirror.counts.agreed)
        assert mirror.counts.candidate.quantile(0.5) is not None
        assert mirror.counts.current.quantile(0.5) is not None
    assert not caplog.records


async def test_a_comparison_that_breaks_is_said_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def broken(current: InferResponse, candidate: InferResponse) -> Any:
        raise ZeroDivisionError

    mirror = Mirror(Place(2), ShadowSettings(model="there", share=1.0), compare=broken)
    both = Shadow(Place(1), {"there": mirror})
    async with running(both.run()):
        for _ in range(5):
            await infer(both, see())
        await until(lambda: mirror.counts.failed["INTERNAL"] == 5)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_a_slow_candidate_costs_a_bounded_number_of_copies_and_the_rest_are_dropped() -> None:
    caller, candidate = Place(1), Place(1)
    both, mirror = shadowed(caller, candidate, max_concurrent=2, max_queue=4)
    candidate.let.clear()
    async with running(both.run()):
        await infer(both, see())
        await infer(both, see())
        for _ in range(2):
            await candidate.called.acquire()
        for _ in range(98):
            await infer(both, see())
        assert (candidate.now, mirror.counts.dropped) == (2, 94)
        candidate.let.set()
        await until(lambda: done(mirror) == 6)
    assert candidate.most == 2
    assert mirror.counts.agreed == 6
    assert len(caller.asked) == 100


async def test_copies_are_bounded_in_bytes_and_their_room_comes_back() -> None:
    caller, candidate = Place(1), Place(1)
    both, mirror = shadowed(caller, candidate, max_bytes=20, max_concurrent=8)  # 4 of a request and 4 of its answer
    async with running(both.run()):
        for error in (None, EngineFault("it fails"), None):
            candidate.raises = error
            candidate.let.clear()
            dropped, before = mirror.counts.dropped, done(mirror)
            for _ in range(5):
                await infer(both, see())
            assert mirror.counts.dropped == dropped + 3
            candidate.let.set()
            await until(partial(is_done, mirror, before + 2))


async def test_without_anybody_to_run_it_a_shadow_fills_up_and_that_is_all() -> None:
    both, mirror = shadowed(Place(1), Place(2), max_queue=3)
    for _ in range(10):
        await infer(both, see())
    assert mirror.counts.dropped == 7


async def test_a_candidate_that_never_answers_is_given_up_at_its_own_deadline() -> None:
    candidate = Place(1)
    both, mirror = shadowed(Place(1), candidate, timeout_s=0.02)
    candidate.let.clear()
    async with running(both.run()):
        for _ in range(3):
            await infer(both, see())
        await until(lambda: mirror.counts.failed == {"DEADLINE_EXCEEDED": 3})
    assert candidate.now == 0, "nothing is left behind"


@pytest.mark.parametrize("allowed", ["edge-only", "no-learning", "edge_only"])
async def test_what_must_not_be_seen_is_not_shown(allowed: str) -> None:
    caller, candidate = Place(1), Place(1)
    private, plain = see(parameters={PRIVACY: allowed}), see(id="plain")
    both, mirror = shadowed(caller, candidate)
    async with running(both.run()):
        for request in (private, plain):
            await infer(both, request)
        await until(lambda: done(mirror) == 1)
    assert [request.id for request in candidate.asked] == ["plain"]
    assert mirror.counts.private == 1
    both, mirror = shadowed(caller, candidate, local=True)
    async with running(both.run()):
        await infer(both, private)
        await until(lambda: done(mirror) == 1)
    assert candidate.asked[-1].parameters == {PRIVACY: allowed}, "where it stays here, it is seen, and still says so"


async def test_a_copy_is_nobodys_to_pay_for_and_what_it_was_when_it_was_made() -> None:
    class Reusing(Place):
        """Answers in the same array each time."""

        async def infer(self, request: InferRequest, deadline: Deadline) -> InferResponse:
            answer = await super().infer(request, deadline)
            return replace(answer, outputs=(replace(answer.outputs[0], array=buffer),))

    buffer = np.ones(1, np.float32)
    caller, candidate = Reusing(1), Place(1)
    both, mirror = shadowed(caller, candidate, version="1")
    request = see(version="1", parameters={"timeout": 1, "priority": 2})
    request = replace(request, origin=Origin(tenant="a", hops=2, traceparent="00-1-2-01", tracestate="b=c"))
    await infer(both, request)
    request.inputs[0].array[:] = 9.0
    buffer[:] = 9.0
    async with running(both.run()):
        await until(lambda: mirror.counts.agreed)
    (seen,) = candidate.asked
    assert seen.origin == Origin(hops=2)
    assert seen.parameters == {"priority": 2}
    assert (seen.model, seen.version, seen.input("x")[0]) == ("there", "1", 1.0)


async def test_only_the_share_is_shown_and_neither_failures_nor_streams() -> None:
    caller, candidate = Place(1), Place(1)
    both, mirror = shadowed(caller, candidate, share=0.1, max_queue=1000)
    async with running(both.run()):
        for _ in range(200):
            await infer(both, see())
        await until(lambda: done(mirror) >= 16)
        await until(lambda: not mirror._bytes)
        assert done(mirror) == pytest.approx(20, abs=4)
        mirror.share, before = 0.0, len(candidate.asked)
        for _ in range(50):
            await infer(both, see())
        mirror.share = 1.0
        assert len([answer async for answer in both.stream(see(), Deadline.never())]) == 1
        caller.raises = EngineFault("it fails")
        with pytest.raises(EngineFault):
            await infer(both, see())
        caller.raises = None
        await infer(both, see())
        await until(lambda: len(candidate.asked) > before)
    assert len(candidate.asked) == before + 1


async def test_closing_closes_caller_and_candidate() -> None:
    caller, candidate = Place(1), Place(2)
    await shadowed(caller, candidate)[0].close()
    assert (caller.closed, candidate.closed) == (1, 1)


# -- real models, real servers


@pytest.fixture
async def host(stack: AsyncExitStack, tmp_path: Path) -> ModelHost:
    return await releases(stack, tmp_path)


@pytest.mark.parametrize("inline_bytes", [0, shadow.INLINE_BYTES])
async def test_a_shadow_tells_a_good_candidate_from_a_bad_one(
    host: ModelHost, inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "INLINE_BYTES", inline_bytes)
    good, bad = (Mirror(host, ShadowSettings(model=f"digits-{n}", share=1.0), local=True) for n in (8, 9))
    both = Shadow(host, {"digits-7": good})
    async with running(good.run(), bad.run()):
        for digit in range(10):
            request = models.request(models.pixels(digit), model="digits-7")
            bad.show(request, await infer(both, request), 0.001)
        await until(lambda: done(good) == done(bad) == 10)
    assert (good.counts.agreed, good.counts.furthest) == (10, 0.0)
    assert (bad.counts.differed, bad.counts.furthest) == (10, 1.0)


async def test_a_cloud_that_dies_as_a_shadow_is_nothing_to_the_caller(stack: AsyncExitStack, host: ModelHost) -> None:
    async with Cloud() as cloud:
        remote = await stack.enter_async_context(RemoteBackend("cloud", cloud.target, REMOTE))
        mirror = Mirror(remote, ShadowSettings(model=MODEL, share=1.0))
        both = Shadow(host, {"digits-7": mirror})
        request = replace(models.request(model="digits-7"), outputs=("logits",))
        await stack.enter_async_context(running(both.run()))
        await infer(both, request)
        await until(lambda: mirror.counts.agreed == 1)
        cloud.delay_s = PATIENCE_S
        cloud.asking.clear()
        await infer(both, request)
        await cloud.asking.wait()
    for _ in range(5):
        assert (await infer(both, request)).output("logits").argmax() == 3
    await until(lambda: done(mirror) == 7)
    assert mirror.counts.failed["UNAVAILABLE"] == 6


def test_settings_are_read_from_toml_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "shadow.toml"
    file.write_text('model = "digits-8"\nshare = 0.5\ncomparison = "values"\n')
    assert load(ShadowSettings, file, {}).share == 0.5
    file.write_text('model = "digits-8"\nshare = 50\n')
    with pytest.raises(ConfigError, match="share"):
        load(ShadowSettings, file, {})
