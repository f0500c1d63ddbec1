"""Quotas: never more than is allowed, never less, and nobody's flood is another's drought."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hedgerow.backend import Deadline
from hedgerow.config import load
from hedgerow.errors import ConfigError, EngineFault, InvalidInput, Overloaded
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.tensors import InferRequest, ModelMetadata, Origin, TensorSpec, tensor
from hedgerow.traffic.buckets import ROUNDING, TokenBucket
from hedgerow.traffic.quotas import MAX_TENANT_CHARS, OTHERS, Quotas
from hedgerow.traffic.tenants import QuotaSettings, TenantSettings, TenantsSettings

PATIENCE_S = 60.0
NEVER = 1e-6
"""A rate that gives nothing back while a test runs, on the slowest machine."""
X, Y = TensorSpec("x", "FP32", (-1,)), TensorSpec("y", "FP32", (-1,))

rates = st.floats(min_value=0.1, max_value=1e4)
bursts = st.floats(min_value=1, max_value=1e4)
attempts = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 2e4)), max_size=60)
"""Seconds since the one before, and how much is asked for."""


# -- the bucket


@given(rates, bursts, attempts)
def test_no_stretch_of_time_sees_more_than_the_rate_and_the_burst(
    rate: float, burst: float, asked: list[tuple[float, float]]
) -> None:
    bucket, now = TokenBucket(rate, burst, 1000.0), 1000.0
    taken: list[tuple[float, float]] = []
    for pause, amount in asked:
        now += pause
        if not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            taken.append((now, amount))
    for first, (start, _) in enumerate(taken):
        total = 0.0
        for at, amount in taken[first:]:
            total += amount
            assert total <= (rate * (at - start) + burst) * (1 + 2 * ROUNDING)


@given(rates, bursts, attempts)
def test_who_comes_back_when_told_gets_in(rate: float, burst: float, asked: list[tuple[float, float]]) -> None:
    bucket, now = TokenBucket(rate, burst, 1000.0), 1000.0
    for pause, amount in asked:
        now += pause
        wait_s = bucket.wait_s(amount, now)
        assert math.isinf(wait_s) == (amount > burst * (1 + ROUNDING)) or not wait_s
        if math.isinf(wait_s):
            continue
        now += wait_s
        assert bucket.wait_s(amount, now) == 0.0
        bucket.take(amount, now)


@given(rates, st.integers(1, 100))
def test_who_never_heeds_the_wait_still_gets_the_whole_rate(rate: float, amount: int) -> None:
    """No starvation: refusals cost nothing, however many there are."""
    bucket, taken, steps, burst = TokenBucket(rate, amount, 0.0), 0, 2000, amount
    seconds = 20 * amount / rate
    for step in range(steps + 1):
        now = seconds * step / steps
        if not bucket.wait_s(amount, now):
            bucket.take(amount, now)
            taken += amount
    # What comes after the last attempt and before the next is lost at each refill, at most a step's worth.
    assert taken >= burst + rate * seconds * (1 - 20 / steps) - 2 * amount


def test_a_change_gives_nothing_back_and_takes_nothing_away() -> None:
    bucket = TokenBucket(1.0, 10.0, 0.0)
    bucket.take(10.0, 0.0)
    bucket.change(2.0, 100.0, 1.0)
    assert bucket.wait_s(1.0, 1.0) == 0.0, "a second at the old rate"
    assert bucket.wait_s(3.0, 1.0) == 1.0, "and two tokens a second from now on"
    bucket.change(2.0, 0.5, 101.0)
    assert math.isinf(bucket.wait_s(1.0, 101.0))
    assert bucket.wait_s(0.5, 101.0) == 0.0


# -- the backend


class Model:
    """`y` = `x`, once it is let; negative ones fail."""

    def __init__(self) -> None:
        self.calls = 0
        self.waits = asyncio.Semaphore(0)
        self.let = asyncio.Event()
        self.let.set()

    async def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls += 1
        if not self.let.is_set():
            self.waits.release()
            await self.let.wait()
        if (inputs["x"] < 0).any():
            raise EngineFault("it fails")
        return {"y": inputs["x"]}

    async def function(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return await self(inputs)


async def twice(inputs: Mapping[str, NDArray[Any]]) -> AsyncIterator[dict[str, NDArray[Any]]]:
    for _ in range(2):
        yield {"y": inputs["x"]}


@pytest.fixture
def model() -> Model:
    return Model()


def limited(model: Model, **tenants: Any) -> Quotas:
    functions = {"m": model.function, "twice": twice}
    models = [FunctionModel(ModelMetadata(name, ("1",), "python", (X,), (Y,)), f) for name, f in functions.items()]
    return Quotas(FunctionBackend(*models), TenantsSettings(**tenants))


def ask(tenant: str = "", *x: float, model: str = "m") -> InferRequest:
    value = tensor("x", np.array(x or (1.0,), np.float32))
    return InferRequest(model=model, inputs=(value,), origin=Origin(tenant=tenant))


def at_once(requests: int) -> TenantSettings:
    return TenantSettings(requests_per_s=NEVER, burst_requests=requests)


async def flood(quotas: Quotas, *tenants: str, requests: int = 20) -> int:
    """How many of so many requests of each of `tenants` got in."""
    admitted = 0
    for _ in range(requests):
        for tenant in tenants:
            try:
                await quotas.infer(ask(tenant), Deadline.after(PATIENCE_S))
            except Overloaded as error:
                admitted -= not error.retry_after_s  # never without a word of when to come again
            else:
                admitted += 1
    return admitted


@contextmanager
def refused(match: str) -> Iterator[None]:
    with pytest.raises(Overloaded, match=match):
        yield


async def test_one_tenants_flood_takes_nothing_of_anothers(model: Model) -> None:
    quotas = limited(model, named={"a": at_once(3), "b": at_once(5)}, others=at_once(10), each=at_once(4))
    assert await flood(quotas, "a") == 3
    assert await flood(quotas, "mallory") == 4, "its part of what is in common"
    assert await flood(quotas, "b") == 5
    assert await flood(quotas, "carol") == 4
    assert await flood(quotas, "dave") == 2, "what is left in common"
    assert model.calls == 18, "what is refused never reaches the model"
    counts = quotas.counts
    assert [(counts[who].admitted, counts[who].refused) for who in ("a", "b", OTHERS)] == [(3, 17), (5, 15), (10, 50)]


async def test_making_up_names_gets_no_more_than_what_is_in_common(model: Model) -> None:
    quotas = limited(model, named={"a": at_once(3)}, others=at_once(10), each=at_once(4), max_tracked=8)
    assert await flood(quotas, *(f"name-{number}" for number in range(100)), requests=2) == 10
    assert quotas.tracked <= 8
    assert await flood(quotas, "a") == 3


async def test_who_says_no_name_is_among_the_others(model: Model) -> None:
    quotas = limited(model, named={"a": at_once(3)}, others=at_once(5))
    assert await flood(quotas, "", "x") == 5
    assert quotas.tracked == 0, "without a quota of each there is nothing to track"


async def test_without_quotas_everybody_gets_everything(model: Model) -> None:
    quotas = limited(model)
    assert await flood(quotas, "a", "", "b") == 60


async def test_a_refusal_says_whose_limit_it_is_and_when_to_come_again(model: Model) -> None:
    quotas = limited(model, named={"a": TenantSettings(requests_per_s=0.01, burst_requests=1)})
    await quotas.infer(ask("a"), Deadline.never())
    with pytest.raises(Overloaded, match=r"quota of tenant 'a': 0\.01 requests/s") as caught:
        await quotas.infer(ask("a"), Deadline.never())
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 100


async def test_bytes_are_counted_and_what_can_never_pass_is_not_told_to_come_again(model: Model) -> None:
    quotas = limited(model, named={"a": TenantSettings(bytes_per_s=NEVER, burst_bytes=40)})
    with pytest.raises(Overloaded, match="the request has 44 bytes, at once there may be 40") as caught:
        await quotas.infer(ask("a", *range(11)), Deadline.never())
    assert caught.value.retry_after_s is None
    await quotas.infer(ask("a", *range(10)), Deadline.never())
    with refused("bytes/s"):
        await quotas.infer(ask("a"), Deadline.never())


async def test_a_refusal_by_one_limit_takes_nothing_of_the_others(model: Model) -> None:
    tenant = QuotaSettings(requests_per_s=NEVER, burst_requests=2, bytes_per_s=NEVER, burst_bytes=8)
    quotas = limited(model, each=tenant, others=at_once(4))
    for _ in range(10):
        with refused("bytes"):
            await quotas.infer(ask("a", 1, 2, 3), Deadline.never())
    assert await flood(quotas, "a") == 2
    assert await flood(quotas, "b") == 2


async def test_what_is_in_flight_is_limited_and_counted_to_the_end_whatever_the_end(model: Model) -> None:
    quotas = limited(model, named={"a": TenantSettings(max_inflight=2)})
    model.let.clear()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(quotas.infer(ask("a"), Deadline.never())) for _ in range(2)]
        for _ in tasks:
            await model.waits.acquire()
        with refused("2 requests in flight"):
            await quotas.infer(ask("a"), Deadline.never())
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        tasks.append(group.create_task(quotas.infer(ask("a"), Deadline.never())))
        await model.waits.acquire()
        with refused("2 requests in flight"):
            await quotas.infer(ask("a"), Deadline.never())
        model.let.set()
    for _ in range(3):
        with pytest.raises(EngineFault):
            await quotas.infer(ask("a", -1.0), Deadline.never())
    assert await flood(quotas, "a") == 20


async def test_a_stream_is_in_flight_until_it_ends_or_is_left(model: Model) -> None:
    quotas = limited(model, named={"a": TenantSettings(max_inflight=1)})
    async with aclosing(quotas.stream(ask("a", model="twice"), Deadline.never())) as answers:  # type: ignore[type-var]
        await anext(answers)
        with refused("in flight"):
            await quotas.infer(ask("a"), Deadline.never())
    await quotas.infer(ask("a"), Deadline.never())
    assert len([answer async for answer in quotas.stream(ask("a", model="twice"), Deadline.never())]) == 2
    await quotas.infer(ask("a"), Deadline.never())


async def test_quotas_change_live_and_forget_neither_what_was_taken_nor_what_is_in_flight(model: Model) -> None:
    quotas = limited(model, named={"a": at_once(3)}, each=at_once(3))
    assert await flood(quotas, "a") == 3
    assert await flood(quotas, "x") == 3
    quotas.change(TenantsSettings(named={"a": at_once(30), "b": at_once(1)}, each=at_once(30)))
    assert await flood(quotas, "a", "x") == 0, "a larger burst fills at the rate"
    assert await flood(quotas, "b") == 1
    quotas.change(TenantsSettings(named={"a": TenantSettings(max_inflight=1)}))
    model.let.clear()
    async with asyncio.TaskGroup() as group:
        group.create_task(quotas.infer(ask("a"), Deadline.never()))
        await model.waits.acquire()
        quotas.change(TenantsSettings(named={"a": TenantSettings(max_inflight=1), "c": at_once(2)}))
        with refused("1 requests in flight"):
            await quotas.infer(ask("a"), Deadline.never())
        model.let.set()
    assert await flood(quotas, "a") == 20
    quotas.change(TenantsSettings(each=QuotaSettings(max_inflight=5)))
    assert await flood(quotas, "x") == 20
    quotas.change(TenantsSettings(each=at_once(2), others=at_once(2)))
    assert await flood(quotas, "x") == 2
    quotas.change(TenantsSettings())
    assert await flood(quotas, "a", "x", "b") == 60
    assert set(quotas.counts) == {OTHERS}


async def test_a_tenant_with_requests_in_flight_is_not_forgotten_for_another(model: Model) -> None:
    quotas = limited(model, each=QuotaSettings(max_inflight=1), max_tracked=2)
    model.let.clear()
    async with asyncio.TaskGroup() as group:
        for tenant in ("a", "b"):
            group.create_task(quotas.infer(ask(tenant), Deadline.never()))
            await model.waits.acquire()
        with refused("requests of 2 tenants are in flight"):
            await quotas.infer(ask("c"), Deadline.never())
        with refused("1 requests in flight"):
            await quotas.infer(ask("a"), Deadline.never())
        model.let.set()
    assert await flood(quotas, "c", "d", "e") == 60
    assert quotas.tracked == 2


async def test_an_endless_name_is_not_kept(model: Model) -> None:
    quotas = limited(model, each=at_once(3))
    with pytest.raises(InvalidInput, match="the tenant's name has 257 characters"):
        await quotas.infer(ask("x" * (MAX_TENANT_CHARS + 1)), Deadline.never())
    assert quotas.tracked == 0


async def test_asking_about_models_is_free(model: Model) -> None:
    quotas = limited(model, others=at_once(1))
    assert await flood(quotas, "x") == 1
    assert (await quotas.metadata("m")).name == "m"
    assert await quotas.ready("m")
    assert [state.name for state in await quotas.models()] == ["m", "twice"]
    assert quotas.snapshot("m").healthy
    assert quotas.name == "function"
    await quotas.close()


def test_settings_are_read_from_toml_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text('max_tracked = 5\n[named."team a"]\nrequests_per_s = 0.5\n[others]\nbytes_per_s = 1e6\n')
    settings = load(TenantsSettings, file, {})
    assert settings.named["team a"].quota.burst_requests == 1, "a burst lets a request pass"
    assert settings.others.quota.burst_bytes == 1e6
    assert math.isinf(settings.each.quota.requests_per_s)
    for wrong, key in (
        ("[each]\nrequests_per_s = 0", "each.requests_per_s"),
        ('[named.""]\nmax_inflight = 1', "named"),
    ):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match=key):
            load(TenantsSettings, file, {})
