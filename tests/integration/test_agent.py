"""A real agent, in a process of its own, with a real fleet behind a real broker."""

import asyncio
import contextlib
import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulators import agents, brokers, models, responder
from simulators.agents import Agent
from simulators.publisher import Publisher
from simulators.responder import DEVICE, Responder

from hedgerow.client import AsyncClient
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError, Overloaded
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import ModelFile
from hedgerow.oip.messages import request_from_proto, response_from_proto
from hedgerow.proto import link_pb2, oip_pb2
from hedgerow.release import Limits
from hedgerow.server import Server

MARKED_S = 30


@asynccontextmanager
async def device(tmp_path: Path, **sections: object) -> AsyncIterator[tuple[Agent, Responder]]:
    """A fleet on the embedded broker and one running agent."""
    publisher = Publisher(tmp_path / "fleet")
    async with (
        brokers.running("embedded", tmp_path / "broker") as broker,
        responder.running(publisher, broker) as cloud,
    ):
        agent = Agent(tmp_path / "device", agents.linked(publisher, broker, **sections))
        async with agents.running(agent):
            yield agent, cloud


async def answered_by(agent: Agent) -> int:
    """The release that answers, by its answer and by what it says of itself."""
    async with AsyncClient(agent.address) as client:
        result = await client.infer("digits", models.pixels(3))
    assert result.release == f"digits/{result.model_version}"
    said = int(result.model_version)
    np.testing.assert_array_equal(result.outputs["logits"], responder.answer(said, 3))
    return said


async def test_a_release_is_fetched_proved_swapped_live_and_confirmed_without_a_failed_request(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        await cloud.assign(cloud.make(1, threshold=0.5))
        status = await cloud.runs(1)
        assert (status.target, status.failed, status.reason) == (0, 0, "")
        assert await answered_by(agent) == 1

        done = asyncio.Event()

        async def load() -> None:
            releases: list[str] = []
            async with AsyncClient(agent.address) as client:
                while not done.is_set():
                    result = await client.infer("digits", models.pixels(3))
                    assert not result.degraded
                    assert result.outputs["logits"].argmax() == (3 + int(result.model_version)) % models.CLASSES
                    releases.append(result.model_version)
            assert releases == sorted(releases)
            assert set(releases) == {"1", "2"}

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(load())
            await cloud.assign(cloud.make(2, threshold=0.5))
            await cloud.runs(2)
            done.set()


def times(factor: float) -> Callable[[Path], Path]:
    """Release 2's model, with its answers multiplied."""
    return lambda path: models.classifier(path, sure=factor * responder.SURE, shift=2)


async def test_releases_that_do_not_prove_themselves_are_rejected_for_good_and_the_old_one_serves_on(
    tmp_path: Path,
) -> None:
    async with device(tmp_path) as (agent, cloud):
        await cloud.assign(cloud.make(1))
        await cloud.runs(1)
        table: tuple[tuple[int, dict[str, Any], str], ...] = (
            (2, {"write": times(1.01)}, "does not reproduce its probes here: output 'logits': off by up to 0.2"),
            (3, {"limits": Limits(latency_ms=1e-6)}, "ms for a probe here, allowed are 1e-06 ms"),
            (4, {"limits": Limits(memory_mb=-1e3)}, "MB of memory here, allowed are -1000 MB"),
            (5, {"write": lambda path: path.write_bytes(b"no model")}, "onnxruntime cannot load student.onnx"),
            (6, {"expected": np.zeros((10, 3), np.float32)}, "output 'logits': shape [10, 10], expected [10, 3]"),
        )
        made = {}
        for counter, release, reason in table:
            made[counter] = cloud.make(counter, **release)
            await cloud.assign(made[counter])
            status = await cloud.rejected(counter)
            assert reason in status.reason
            assert (status.running, status.target, status.phase) == (1, 0, "idle")
            assert await answered_by(agent) == 1
            cloud.phases.clear()
            await cloud.command()  # the same again is no news
        await cloud.assign(made[2])  # nor is an older one, but why it is not taken is said
        assert "does not reproduce its probes" in (await cloud.rejected(2)).reason
        await cloud.assign(cloud.make(7))
        status = await cloud.runs(7)
        assert (status.failed, status.reason) == (0, "")
        assert await answered_by(agent) == 7


async def test_a_release_that_fails_on_live_traffic_again_and_again_is_rolled_back_and_not_for_one_odd_input(
    tmp_path: Path,
) -> None:
    enough, too_many = 10, 3
    updates = {"probation_s": 60.0, "probation_requests": enough, "probation_faults": too_many}
    async with device(tmp_path, updates=updates) as (agent, cloud), AsyncClient(agent.address) as client:

        async def on_probation(counter: int) -> None:
            expected = np.sqrt(models.pixels(*range(models.CLASSES))[:, : models.CLASSES])
            await cloud.assign(cloud.make(counter, write=models.square_root, expected=expected))
            await cloud.until(lambda status: any((m.running, m.phase) == (counter, "probation") for m in status.models))

        async def fails() -> None:
            with pytest.raises(HedgerowError, match="not finite"):
                await client.infer("digits", models.pixels(3, strength=-1.0))

        await on_probation(1)
        for _ in range(too_many - 1):
            await fails()
        for _ in range(enough):
            await client.infer("digits", models.pixels(3))
        assert (await cloud.runs(1)).failed == 0

        await on_probation(2)
        for _ in range(too_many):
            assert (await client.infer("digits", models.pixels(3))).model_version == "2"
            await fails()
        status = await cloud.rejected(2)
        assert "failed on live traffic: 3 faults on probation" in status.reason
        assert status.running == 1
        assert (await client.infer("digits", models.pixels(3))).model_version == "1"


async def test_bytes_damaged_on_the_way_are_refused_and_the_release_is_fetched_once_they_are_right(
    tmp_path: Path,
) -> None:
    async with device(tmp_path) as (_agent, cloud):
        entry = cloud.make(1)
        student = next(digest for digest, content in cloud.publisher.files.items() if b"logits" in content[:200])

        def flip(chunk: link_pb2.Chunk) -> None:
            if chunk.sha256 == student:
                chunk.content = bytes([chunk.content[0] ^ 1]) + chunk.content[1:]

        cloud.tamper = flip
        await cloud.assign(entry)
        status = (await cloud.until(lambda status: any(model.reason for model in status.models))).models[0]
        assert "student.onnx: chunk 0 has sha256" in status.reason
        assert (status.running, status.target, status.phase) == (0, 1, "fetching")
        cloud.tamper = lambda _chunk: None
        assert (await cloud.runs(1)).reason == ""


async def test_a_flipped_bit_in_the_active_slot_brings_the_other_slot_back_and_is_repaired(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        await cloud.assign(cloud.make(1))
        await cloud.runs(1)
        await cloud.assign(cloud.make(2))
        await cloud.runs(2)
        await agent.stop()
        student = agent.state / "slots" / "digits" / "b" / "student.onnx"
        content = bytearray(student.read_bytes())
        content[-7] ^= 1
        student.write_bytes(content)

        link = agent.settings.pop("link")
        agent.settings["link"] = {**link, "enabled": False}
        await agent.start()
        assert await answered_by(agent) == 1
        await agent.stop()
        agent.settings["link"] = link
        await agent.start()
        await cloud.until(lambda status: status.online)
        await cloud.runs(2)
        assert await answered_by(agent) == 2
        assert "student.onnx in slot b has sha256" in agent.log


async def test_an_unreadable_database_costs_neither_the_model_nor_the_version_floor(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        first, second = cloud.make(1), cloud.make(2)
        await cloud.assign(second)
        await cloud.runs(2)
        async with asyncio.timeout(MARKED_S):  # the journal is first, and the marker is what must be there
            while "digits/2 is confirmed" not in agent.log:  # noqa: ASYNC110 (a log has no event)
                await asyncio.sleep(0.01)
        session = cloud.births[DEVICE].session
        await agent.kill()
        for file in agent.state.glob("state.db-*"):
            file.unlink()
        (agent.state / "state.db").write_bytes(b"SQLite format 3\0" + bytes(4096))
        await cloud.assign(first)
        await agent.start()
        assert await answered_by(agent) == 2
        status = await cloud.until(lambda status: bool(status.trust))
        assert "already confirmed digits/2" in status.trust
        assert cloud.births[DEVICE].session > session
        assert "unreadable" in agent.log


async def test_the_fleet_sees_births_progress_and_both_kinds_of_end(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        status = await cloud.until(lambda status: status.online)
        birth = cloud.births[DEVICE]
        assert (birth.session, birth.profile, birth.address) == (status.session, "cpu-generic", agent.address)
        await agent.kill()
        await cloud.until(lambda status: not status.online)
        await agent.start()
        status = await cloud.until(lambda status: status.online and status.session > birth.session)
        assert await agent.stop() == 0
        goodbye = await cloud.until(lambda status: not status.online)
        assert goodbye.session == status.session
        assert goodbye.serial > status.serial  # said by the device, not by its will


async def test_model_files_of_ones_own_are_served_to_stock_clients_without_any_fleet(tmp_path: Path) -> None:
    import tritonclient.grpc.aio as triton

    models.classifier(tmp_path / "mine.onnx", sure=responder.SURE)
    gate = {"score": "margin", "output": "logits", "threshold": 0.9}
    agent = Agent(tmp_path, {"models": {"mine": {"path": "mine.onnx", "gate": gate}}})
    async with agents.running(agent), triton.InferenceServerClient(agent.address) as client:
        assert (agent.state / "address").read_text().strip() == agent.address
        assert await client.is_server_ready()
        given = triton.InferInput("pixels", [2, models.FEATURES], "FP32")
        given.set_data_from_numpy(models.pixels(7, 8))
        result = await client.infer("mine", [given])
        assert result.as_numpy("logits").argmax(axis=1).tolist() == [7, 8]
        parameters = result.get_response().parameters
        assert parameters["hedgerow_tier"].string_param == "edge"
        assert parameters["hedgerow_confidence"].double_param > 0.99
        assert not parameters["hedgerow_degraded"].bool_param
        assert await agent.stop() == 0


async def test_split_shadow_cache_and_quotas_are_there_when_the_settings_say_so(tmp_path: Path) -> None:
    for name, shift in (("old", 0), ("new", 1)):
        models.classifier(tmp_path / f"{name}.onnx", sure=responder.SURE, shift=shift)
    agent = Agent(
        tmp_path,
        {
            "models": {name: {"path": f"{name}.onnx", "gate": {"threshold": 0.1}} for name in ("old", "new")},
            "splits": {"digits": {"targets": {"stable": {"model": "old"}, "candidate": {"model": "new"}}}},
            "shadows": {"old": {"model": "new", "share": 1.0}},
            "cache": {"models": ["old", "new"]},
            "tenants": {"others": {"requests_per_s": 0.001, "burst_requests": 40}},
        },
    )
    answers = {"stable": 3, "candidate": 4}
    async with agents.running(agent), AsyncClient(agent.address, attempts=1) as client:
        seen = set()
        for key in range(20):
            first, again = [
                await client.infer("digits", models.pixels(3), parameters={"hedgerow_sticky": f"user-{key}"})
                for _ in range(2)
            ]
            target = str(first.parameters["hedgerow_split"])
            assert target == again.parameters["hedgerow_split"]
            assert first.outputs["logits"].argmax() == again.outputs["logits"].argmax() == answers[target]
            seen.add(target)
        assert seen == set(answers)
        with pytest.raises(Overloaded):
            await client.infer("digits", models.pixels(3))


async def test_a_model_of_ones_own_is_not_replaced_by_a_release_and_the_fleet_is_told(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        await cloud.assign(cloud.make(1))
        await cloud.runs(1)
        await agent.stop()
        models.classifier(tmp_path / "mine.onnx", sure=responder.SURE)
        agent.settings["models"] = {"digits": {"path": str(tmp_path / "mine.onnx"), "version": "mine"}}
        await agent.start()
        status = await cloud.until(lambda status: status.online and bool(status.models))
        assert [(model.model, model.running) for model in status.models] == [("digits", 0)]
        assert status.models[0].reason == "digits/1 is assigned, but this device's settings bring a digits of its own"
        async with AsyncClient(agent.address) as client:
            assert (await client.infer("digits", models.pixels(3))).model_version == "mine"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"models": {"mine": {"path": "mine.onnx", "gate": {"output": "scores", "threshold": 0.9}}}},
            "models.mine.gate.output: the model has no output 'scores'; it has logits",
        ),
        ({"cloud": {"target": "http://127.0.0.1:8003"}}, "cloud.target: "),
        ({"models": {"mine": {"path": "nowhere.onnx"}}}, "models.mine: nowhere.onnx cannot be read"),
        ({"models": {"mine": {"pth": "mine.onnx"}}}, "models"),
        ({"routes": {"mine": {"policy": "guess"}}}, "routes.mine.policy: there is no policy 'guess'"),
        ({"device": {"profile": "toaster"}}, "there is no hardware profile 'toaster'"),
        ({"link": {"enabled": True}}, "trust.release_root: is needed to take updates"),
        ({"samples": {"collect": "everything"}}, "samples.collect: invalid enum value"),
    ],
    ids=["gate", "target", "file", "key", "policy", "profile", "roots", "value"],
)
async def test_a_wrong_setting_is_named_in_one_line(
    tmp_path: Path, settings: dict[str, object], complaint: str
) -> None:
    models.classifier(tmp_path / "mine.onnx")
    agent = Agent(tmp_path, settings)
    await agent.start()
    assert await agent.ended() == 2
    lines = [line for line in agent.log.splitlines() if " ERROR " in line]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "Traceback" not in agent.log


async def outbox_empty(agent: Agent) -> None:
    """Return once something was sent and nothing waits."""
    with contextlib.closing(sqlite3.connect(agent.state / "state.db")) as database:
        async with asyncio.timeout(20):
            query = "select count(*) from samples union all select count(*) from sent"
            while (counts := database.execute(query).fetchall()) != [(0,), (2,)]:
                assert counts < [(3,)]
                await asyncio.sleep(0.05)


async def test_escalated_samples_reach_the_fleet_once_and_private_ones_never(tmp_path: Path) -> None:
    teacher, path = ModelHost(name="cloud"), models.classifier(tmp_path / "teacher.onnx", sure=responder.SURE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    await teacher.load_file(ModelFile("digits", "9", path))
    async with Server(teacher, ServerSettings(port=0)) as server:
        settings = {"cloud": {"target": server.address}, "samples": {"collect": "escalated", "retry_s": 0.2}}
        async with device(tmp_path, **settings) as (agent, cloud):
            await cloud.assign(cloud.make(1, threshold=0.9, teacher_sha256=digest))
            await cloud.runs(1)
            async with AsyncClient(agent.address) as client:
                for strength, privacy in (
                    (1.0, ""),  # sure: not escalated
                    (0.01, "no-learning"),
                    (0.02, "edge-only"),
                    (0.03, ""),
                    (0.03, ""),  # the same again
                    (0.04, ""),
                ):
                    result = await client.infer(
                        "digits", models.pixels(3, strength=strength), parameters={"hedgerow_privacy": privacy}
                    )
                    escalated = strength < 1.0 and privacy != "edge-only"
                    assert result.tier == ("cloud" if escalated else "edge")
            await outbox_empty(agent)
            first, second = cloud.samples
            for sample, strength in ((first, 0.03), (second, 0.04)):
                request = request_from_proto(oip_pb2.ModelInferRequest.FromString(sample.request))
                np.testing.assert_array_equal(request.input("pixels"), models.pixels(3, strength=strength))
                answer = response_from_proto(oip_pb2.ModelInferResponse.FromString(sample.cloud_response))
                assert answer.output("logits").argmax() == 3
                assert sample.release == "digits/1"
                assert sample.confidence < 0.9
    await teacher.close()


async def test_with_the_broker_gone_it_serves_on_and_says_so_once(tmp_path: Path) -> None:
    async with device(tmp_path) as (agent, cloud):
        await cloud.assign(cloud.make(1))
        await cloud.runs(1)
        before = cloud.births[DEVICE].session
        await cloud.broker.kill()
        assert await answered_by(agent) == 1
        await agent.kill()
        await agent.start()
        assert await answered_by(agent) == 1
        await cloud.broker.start()
        await cloud.until(lambda status: status.online and status.session > before + 1)
        assert agent.log.count(" WARNING ") == 2  # once by each process
