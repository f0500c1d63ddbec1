"""Split over real models and servers: nobody is lost between releases, nor moved without need."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from simulators import models
from simulators.cloud import MODEL, Cloud
from simulators.places import PATIENCE_S, REMOTE, Place, X, Y, ask, infer, releases, running, until

from hedgerow.backend import Backend, Deadline
from hedgerow.config import ServerSettings, load
from hedgerow.errors import (
    ConfigError,
    DeadlineExceeded,
    EngineFault,
    Forbidden,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    Unavailable,
)
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.gate import Gate
from hedgerow.host.model_host import ModelHost
from hedgerow.journey import Route
from hedgerow.parameters import PRIVACY, RELEASE, SPLIT, SPLIT_REASON, STICKY
from hedgerow.remote.backend import RemoteBackend
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.tensors import InferResponse, ModelMetadata, Origin, TensorSpec
from hedgerow.traffic import split, targets
from hedgerow.traffic.quotas import Quotas
from hedgerow.traffic.split import Split, SplitSettings, SplitTarget, SplitTargetSettings
from hedgerow.traffic.tenants import TenantSettings, TenantsSettings


def split_over(stable: Backend, candidate: Backend, weights: Sequence[float] = (1, 1), **fields: Any) -> Split:
    both = zip(("stable", "candidate"), (stable, candidate), weights, strict=True)
    return Split(
        FunctionBackend(
            FunctionModel(ModelMetadata("other", ("1",), "python", (X,), (Y,)), lambda inputs: {"y": inputs["x"]})
        ),
        {"m": [SplitTarget(name, place, "there", weight=weight, **fields) for name, place, weight in both]},
    )


async def homes(backend: Backend, count: int = 60) -> dict[str, Any]:
    """Where so many keys are at home."""
    keys = [f"user-{number}" for number in range(count)]
    return {key: (await infer(backend, ask(key))).parameters[SPLIT] for key in keys}


async def test_answers_come_back_under_the_callers_names_and_say_whose_they_are() -> None:
    places = {"stable": Place(1), "candidate": Place(2)}
    both = split_over(places["stable"], places["candidate"])
    answers = [await infer(both, ask("a key", id=str(number))) for number in range(3)]
    answers += [await infer(both, ask(id=str(number))) for number in range(3, 20)]
    for number, answer in enumerate(answers):
        assert (answer.model, answer.id, answer.version) == ("m", str(number), "1")
        said = places[str(answer.parameters[SPLIT])].number
        assert (answer.parameters["said"], answer.output("y")[0]) == (said, said)
        assert SPLIT_REASON not in answer.parameters
    assert all(STICKY not in request.parameters for place in places.values() for request in place.asked)
    counts = both.splits["m"].counts
    assert {name: counts[name].answered for name in places} == {
        name: len(place.asked) for name, place in places.items()
    }
    assert both.snapshot("m").latency_p50_s is not None
    other = await infer(both, ask(model="other"))
    assert (other.model, SPLIT in other.parameters) == ("other", False)


async def test_without_keys_requests_are_shared_by_weight() -> None:
    places = Place(1), Place(2)
    both = split_over(*places, weights=(90, 10))
    for _ in range(200):
        await infer(both, ask())
    assert len(places[1].asked) == pytest.approx(20, abs=4)


async def test_a_key_or_else_a_tenant_stays_where_it_is() -> None:
    both = split_over(Place(1), Place(2))
    first = await homes(both)
    assert set(first.values()) == {"stable", "candidate"}
    assert await homes(both) == first
    assert await homes(split_over(Place(1), Place(2))) == first, "in another process too"
    for number in range(20):
        tenant = f"user-{number}"
        answers = [await infer(both, ask(tenant=tenant)) for _ in range(3)]
        assert {answer.parameters[SPLIT] for answer in answers} == {first[tenant]}
        assert (await infer(both, ask("user-0", tenant))).parameters[SPLIT] == first["user-0"], "what is said counts"
    with pytest.raises(InvalidInput, match="hedgerow_sticky is 7; it must be a text"):
        await infer(both, ask(parameters={STICKY: 7}))


async def test_new_weights_move_only_those_who_must_and_nobody_in_flight() -> None:
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate, weights=(90, 10))
    first = await homes(both)
    stable.let.clear()
    staying = next(key for key, home in first.items() if home == "stable")
    async with asyncio.TaskGroup() as group:
        stable.called = asyncio.Semaphore(0)
        in_flight = group.create_task(infer(both, ask(staying)))
        await stable.called.acquire()
        await both.splits["m"].set_weights({"stable": 0, "candidate": 1})
        assert (await infer(both, ask(staying))).parameters[SPLIT] == "candidate"
        stable.let.set()
    assert in_flight.result().parameters[SPLIT] == "stable"
    assert set((await homes(both)).values()) == {"candidate"}
    await both.splits["m"].set_weights({"stable": 60, "candidate": 40})
    second = await homes(both)
    assert all(second[key] == "candidate" for key, home in first.items() if home == "candidate")
    assert Counter(second.values())["candidate"] > Counter(first.values())["candidate"]


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"stable": 1}, "expected weights of stable, candidate, got stable"),
        ({"stable": 1, "candidate": 1, "x": 1}, "expected weights"),
        ({"stable": 0, "candidate": 0}, "no weight is above 0"),
        ({"stable": -1, "candidate": 1}, "the weight of stable is -1"),
        ({"stable": 1, "candidate": float("nan")}, "the weight of candidate is nan"),
        ({"stable": 1, "candidate": float("inf")}, "the weight of candidate is inf"),
    ],
)
async def test_weights_that_cannot_be_are_refused_and_change_nothing(weights: dict[str, float], text: str) -> None:
    both = split_over(Place(1), Place(2))
    with pytest.raises(ConfigError, match=text):
        await both.splits["m"].set_weights(weights)
    assert both.splits["m"].weights == {"stable": 1, "candidate": 1}


async def test_a_target_that_is_not_healthy_is_passed_over_and_has_its_callers_back() -> None:
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate)
    first = await homes(both)
    await candidate.unload("there")
    for key, home in first.items():
        answer = await infer(both, ask(key))
        assert answer.parameters[SPLIT] == "stable"
        said = answer.parameters.get(SPLIT_REASON)
        assert said == ("candidate is passed over: unloaded" if home == "candidate" else None)
    assert both.splits["m"].counts["candidate"].passed_over == Counter(first.values())["candidate"]
    assert {(await infer(both, ask())).parameters[SPLIT] for _ in range(10)} == {"stable"}
    assert both.snapshot("m").healthy
    assert await both.ready("m")
    await candidate.load("there")
    assert await homes(both) == first


async def test_the_callers_of_a_target_that_is_down_are_shared_by_the_others_weights_and_stay_there() -> None:
    places = {"out": Place(1, version="2"), "light": Place(2), "heavy": Place(3)}
    weights = {"out": 50.0, "light": 10.0, "heavy": 90.0}
    three = Split(
        FunctionBackend(), {"m": [SplitTarget(n, place, "there", "", weights[n]) for n, place in places.items()]}
    )
    assert (await three.metadata("m")).versions == ("2", "1"), "the heaviest one's is the last"
    first = await homes(three, 300)
    await places["out"].unload("there")
    second = await homes(three, 300)
    assert {key: second[key] for key in first if first[key] != "out"} == {
        key: home for key, home in first.items() if home != "out"
    }
    moved = Counter(second[key] for key, home in first.items() if home == "out")
    assert moved["heavy"] > moved["light"] > 0
    assert second == await homes(three, 300)
    for place in places.values():
        place.asked.clear()
    for _ in range(200):
        await infer(three, ask())
    assert len(places["light"].asked) == pytest.approx(20, abs=5)


async def test_where_no_target_is_healthy_its_own_refusal_comes_out() -> None:
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate)
    await infer(both, ask())
    for place in (stable, candidate):
        await place.unload("there")
    with pytest.raises(ModelNotReady, match="unloaded"):
        await infer(both, ask())
    assert both.snapshot("m").reason == "stable: unloaded; candidate: unloaded"
    assert not await both.ready("m")
    assert [(state.name, state.ready, state.reason) for state in await both.models()] == [
        ("other", True, ""),
        ("m", False, "unloaded"),
    ]


async def test_a_weightless_target_gets_nothing_even_when_it_is_the_last() -> None:
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate, weights=(1, 0))
    assert set((await homes(both)).values()) == {"stable"}
    await stable.unload("there")
    with pytest.raises(ModelNotReady):
        await infer(both, ask("a"))
    assert not candidate.asked
    assert not await both.ready("m")


async def test_targets_that_are_not_interchangeable_are_refused_at_the_first_use() -> None:
    stable, candidate = Place(1), Place(2, output=TensorSpec("z", "FP32", (-1,)))
    both = split_over(stable, candidate, weights=(9, 1))
    text = "split of m: stable and candidate are not interchangeable: output 'y' is FP32 .-1. here and missing there"
    for _ in range(2):
        with pytest.raises(ConfigError, match=text):
            await infer(both, ask())
        with pytest.raises(ConfigError, match=text):
            await both.metadata("m")
    assert not await both.ready("m")
    assert (await both.models())[-1].reason.startswith("split of m: stable and candidate")
    assert not stable.asked
    assert not candidate.asked


async def test_weight_is_not_given_to_a_target_of_another_interface() -> None:
    stable, candidate = Place(1), Place(2, output=TensorSpec("y", "FP32", (1,)))
    both = split_over(stable, candidate, weights=(1, 0))
    await infer(both, ask())
    with pytest.raises(ConfigError, match=r"candidate does not have the others' interface: output 'y' is FP32 \[-1\]"):
        await both.splits["m"].set_weights({"stable": 1, "candidate": 1})
    assert both.splits["m"].weights["candidate"] == 0
    candidate.becomes(outputs=(Y,))
    await both.splits["m"].set_weights({"stable": 1, "candidate": 1})
    assert set((await homes(both)).values()) == {"stable", "candidate"}


async def test_a_target_that_becomes_another_model_is_left_out_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(split, "LOOK_PAUSE_S", 0.001)
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate)
    first = await homes(both)
    movers = [key for key, home in first.items() if home == "candidate"]

    async def goes_to(key: str) -> InferResponse:
        return await infer(both, ask(key))

    async with running(both.run()):
        candidate.becomes(outputs=(TensorSpec("z", "FP32", (-1,)),), versions=("2",))
        await goes_to(movers[0])  # which gives it away
        await until(lambda: "candidate is left out" in caplog.text)
        answer = await goes_to(movers[1])
        assert answer.parameters[SPLIT] == "stable"
        assert "output 'y' is FP32 [-1] here and missing there" in str(answer.parameters[SPLIT_REASON])
        assert (await both.metadata("m")).versions == ("1",)
        await stable.unload("there")
        with pytest.raises(ModelNotReady):
            await goes_to(movers[1])
        await stable.load("there")
        candidate.becomes(outputs=(Y,))
        await both.splits["m"].set_weights({"stable": 1, "candidate": 1})
        assert (await goes_to(movers[1])).version == "2"
        # And if all of them move on, so does the split.
        for place in (stable, candidate):
            place.becomes(outputs=(TensorSpec("z", "FP32", (-1,)),), versions=("3",))
        await goes_to(movers[1])
        async with asyncio.timeout(PATIENCE_S):
            while [spec.name for spec in (await both.metadata("m")).outputs] != ["z"]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert await homes(both) == first
        # But not if they go separate ways.
        stable.becomes(outputs=(X,), versions=("4",))
        candidate.becomes(outputs=(Y,), versions=("4",))
        await goes_to(movers[1])
        await until(lambda: "stable and candidate are not interchangeable" in caplog.text)
        with pytest.raises(ConfigError, match="not interchangeable: output 'x'"):
            await goes_to(movers[1])
        assert not await both.ready("m")


async def test_a_target_that_says_nothing_of_itself_does_not_keep_the_others_from_answering(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets, "LOOK_TIMEOUT_S", 0.02)
    stable, candidate = Place(1), Place(2)
    stable.silent = True
    both = split_over(stable, candidate, weights=(9, 1))
    assert (await both.metadata("m")).outputs == (Y,)
    assert set((await homes(both)).values()) == {"stable", "candidate"}, "it is healthy, as far as is known"
    candidate.silent = True
    mute = split_over(stable, candidate)
    with pytest.raises(Unavailable, match="does not say its interface in time"):
        await infer(mute, ask())
    with pytest.raises(DeadlineExceeded):
        await mute.infer(ask(), Deadline.after(0))
    candidate.silent = False
    await infer(mute, ask())


async def test_versions_are_those_of_the_targets_and_go_to_who_has_them() -> None:
    stable, candidate = Place(1, version="7", sha256="a", task="t"), Place(2, version="8", sha256="b", task="t")
    both = split_over(stable, candidate, weights=(9, 1))
    metadata = await both.metadata("m")
    assert (metadata.name, metadata.versions, metadata.platform) == ("m", ("8", "7"), "")
    assert metadata.properties == {"task": "t"}, "what is true of both"
    assert [(state.name, state.version, state.ready) for state in (await both.models())[1:]] == [
        ("m", "7", True),
        ("m", "8", True),
    ]
    for version, name, sha256 in (("7", "stable", "a"), ("8", "candidate", "b")):
        for key in ("", "a", "b", "c"):
            answer = await infer(both, ask(key, version=version))
            assert (answer.version, answer.parameters[SPLIT]) == (version, name)
        assert (await both.metadata("m", version)).properties["sha256"] == sha256
        assert (await both.metadata("m", version)).versions == (version,)
        assert await both.ready("m", version)
    with pytest.raises(ModelNotFound, match="no model 'm' in version '9'"):
        await infer(both, ask(version="9"))
    with pytest.raises(ModelNotFound):
        await both.metadata("m", "9")
    assert not await both.ready("m", "9")
    await both.splits["m"].set_weights({"stable": 1, "candidate": 0})
    with pytest.raises(ModelNotFound):
        await infer(both, ask(version="8"))
    assert (await both.metadata("m")).versions == ("7",)


async def test_a_version_that_is_new_is_found_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "LOOK_PAUSE_S", 0.0)
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate)
    await infer(both, ask())
    candidate.becomes(versions=("2",))
    assert (await infer(both, ask(version="2"))).parameters[SPLIT] == "candidate"


async def test_a_request_that_must_not_leave_the_device_goes_to_local_targets_only() -> None:
    here, there = Place(1), Place(2)
    both = Split(
        FunctionBackend(),
        {"m": [SplitTarget("here", here, "there", local=True), SplitTarget("there", there, "there", weight=99)]},
    )
    for key in ("", "a", "b", "c", "d"):
        for parameters in ({PRIVACY: "edge-only"}, {"Hedgerow_Privacy": "no-learning"}):
            assert (await infer(both, ask(key, parameters=parameters))).parameters[SPLIT] == "here"
    assert not there.asked
    await here.unload("there")
    with pytest.raises(ModelNotReady):
        await infer(both, ask(parameters={PRIVACY: "edge-only"}))
    assert not there.asked, "also if there is no other"
    assert (await infer(both, ask(parameters={PRIVACY: "no-learning"}))).parameters[SPLIT] == "there"
    with pytest.raises(Forbidden, match="rules out all targets of m"):
        await infer(split_over(there, there), ask(parameters={PRIVACY: "edge-only"}))


async def test_streams_are_split_too_and_failures_counted() -> None:
    stable, candidate = Place(1), Place(2)
    both = split_over(stable, candidate)
    answers = [answer async for answer in both.stream(ask("a", id="7"), Deadline.never())]
    assert [(answer.model, answer.id) for answer in answers] == [("m", "7")]
    home = str(answers[0].parameters[SPLIT])
    place = {"stable": stable, "candidate": candidate}[home]
    place.raises = EngineFault("it fails")
    with pytest.raises(EngineFault):
        await anext(both.stream(ask("a"), Deadline.never()))
    with pytest.raises(EngineFault):
        await infer(both, ask("a"))
    counts = both.splits["m"].counts[home]
    assert (counts.answered, counts.failed) == (1, 2)
    assert both.snapshot("m").inflight == 0


async def test_closing_closes_every_backend_once() -> None:
    stable, candidate = Place(1), Place(2)
    await Split(stable, {"m": [SplitTarget("a", stable, "there"), SplitTarget("b", candidate, "there")]}).close()
    assert (stable.closed, candidate.closed) == (1, 1)
    with pytest.raises(ConfigError, match="two targets have the same name"):
        Split(stable, {"m": [SplitTarget("a", stable, "x"), SplitTarget("a", stable, "y")]})


# -- real models, real servers


@pytest.fixture
async def host(stack: AsyncExitStack, tmp_path: Path) -> ModelHost:
    return await releases(stack, tmp_path)


async def test_releases_are_split_with_quotas_over_the_wire_and_each_by_its_own_gate(
    stack: AsyncExitStack, host: ModelHost, tmp_path: Path
) -> None:
    settings = SplitSettings(
        targets={
            "stable": SplitTargetSettings(model="digits-7", weight=1),
            "candidate": SplitTargetSettings(model="digits-9", weight=1),
        }
    )
    router = Router({name: Route(model=name, edge=host) for name in ("digits-7", "digits-9")})
    for number in (7, 9):
        router.set_gate(f"digits-{number}", str(number), Gate(threshold=0.1), None)
    quotas = TenantsSettings(named={"greedy": TenantSettings(requests_per_s=1e-6, burst_requests=2)})
    both = Split(router, {"digits": settings.over(router, local=True)})
    server = await stack.enter_async_context(Server(Quotas(both, quotas), ServerSettings(port=0)))
    told = msgspec.structs.replace(REMOTE, forward_tenant=True)
    client = await stack.enter_async_context(RemoteBackend("device", server.address, told))
    metadata = await client.metadata("digits")
    assert metadata.versions == ("7", "9")
    seen = set()
    for number in range(20):
        answer = await infer(client, models.request(model="digits", hedgerow_sticky=f"user-{number}"))
        name = answer.parameters[SPLIT]
        seen.add(name)
        assert answer.model == "digits"
        assert answer.output("logits").argmax() == {"stable": 3, "candidate": 4}[str(name)]
        assert answer.parameters[RELEASE] == {"stable": "digits-7/7", "candidate": "digits-9/9"}[str(name)]
    assert seen == {"stable", "candidate"}
    greedy = replace(models.request(model="digits"), origin=Origin(tenant="greedy"))
    for _ in range(2):
        await infer(client, greedy)
    with pytest.raises(Overloaded, match="quota of tenant 'greedy'") as caught:
        await client.infer(greedy, Deadline.after(5.0))
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 1
    await infer(client, models.request(model="digits"))


async def test_a_cloud_that_dies_loses_its_share_to_the_other_and_gets_it_back(stack: AsyncExitStack) -> None:
    one, two = Cloud(), Cloud()
    async with one:
        port = one.port
        await stack.enter_async_context(two)
        remotes = [
            await stack.enter_async_context(RemoteBackend(name, cloud.target, REMOTE))
            for name, cloud in (("one", one), ("two", two))
        ]
        both = Split(FunctionBackend(), {"digits": [SplitTarget(r.name, r, MODEL) for r in remotes]})
        number = 0
        while (await infer(both, request := models.request(hedgerow_sticky=str(number)))).parameters[SPLIT] != "one":
            number += 1
    await until(lambda: not remotes[0].snapshot(MODEL).healthy)
    for _ in range(5):
        answer = await infer(both, request)
        assert answer.parameters[SPLIT] == "two"
        assert str(answer.parameters[SPLIT_REASON]).startswith("one is passed over: circuit open")
        assert answer.output("logits").argmax() == 3
    async with Cloud(port=port) as again:
        await until(lambda: remotes[0].snapshot(MODEL).healthy)
        assert (await infer(both, request)).parameters[SPLIT] == "one"
        assert again.asked == 1


def test_settings_are_read_from_toml_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "split.toml"
    file.write_text('[targets.stable]\nmodel = "digits-7"\nweight = 95\n[targets.candidate]\nmodel = "digits-8"\n')
    settings = load(SplitSettings, file, {})
    assert [(one.name, one.weight, one.local) for one in settings.over(FunctionBackend(), local=True)] == [
        ("stable", 95, True),
        ("candidate", 1, True),
    ]
    file.write_text('[targets.stable]\nmodel = "digits-7"\nweight = -1\n')
    with pytest.raises(ConfigError, match="targets"):
        load(SplitSettings, file, {})
