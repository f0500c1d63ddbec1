"""Tenants of a real agent: who is asking is as its settings say, and what came of it is on its metrics page."""

import asyncio
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf.message import Message
from prometheus_client.parser import text_string_to_metric_families
from simulators import agents, models
from simulators.agents import Agent

from hedgerow.identity import token_digest
from hedgerow.oip.messages import request_to_proto
from hedgerow.oip.service import SERVICE
from hedgerow.proto import oip_pb2

TIMEOUT_S = 60.0


async def status(agent: Agent, **said: str) -> str:
    """What a request with `said` beside it gets."""
    return await _status(agent, "ModelInfer", request_to_proto(models.request(model="mine")), **said)


async def _status(agent: Agent, method: str, message: Message, **said: str) -> str:
    async with grpc.aio.insecure_channel(agent.address) as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        metadata = tuple((name.replace("_", "-"), value) for name, value in said.items())
        return (await ask(message.SerializeToString(), metadata=metadata, timeout=TIMEOUT_S).code()).name


async def test_a_token_is_the_key_to_a_quota_and_a_name_is_not(tmp_path: Path) -> None:
    models.classifier(tmp_path / "mine.onnx")
    acme = {"token_sha256": [token_digest("acme-token")], "requests_per_s": 1e-6, "burst_requests": 1}
    tenants = {"identify_by": "token", "require": True, "named": {"acme": acme}}
    agent = Agent(tmp_path, {"models": {"mine": {"path": "mine.onnx"}}, "tenants": tenants})
    async with agents.running(agent):
        assert await status(agent) == "UNAUTHENTICATED"
        assert await status(agent, hedgerow_tenant="acme") == "UNAUTHENTICATED"
        assert await status(agent, authorization="Bearer wrong") == "UNAUTHENTICATED"
        assert await status(agent, authorization="Bearer acme-token") == "OK"
        assert await status(agent, authorization="Bearer acme-token") == "RESOURCE_EXHAUSTED"
        address = (agent.state / "metrics-address").read_text().strip()
        page = (await asyncio.to_thread(_read, f"http://{address}/metrics")).decode()
    asked = {
        (sample.labels["tenant"], sample.labels["result"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "hedgerow_quota_requests_total"
    }
    assert asked == {
        ("acme", "admitted"): 1,
        ("acme", "refused"): 1,
        ("(others)", "admitted"): 0,
        ("(others)", "refused"): 0,
    }
    assert "acme-token" not in agent.log + page


def _read(url: str) -> bytes:
    with urlopen(url, timeout=TIMEOUT_S) as page:
        body: bytes = page.read()
    return body


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"tenants": {"named": {"acme": {"max_inflight": 1}}}}, "tenants.identify_by"),
        ({"tenants": {"identify_by": "certificate"}}, "server.tls_client_ca_file"),
        ({"cloud": {"forward_tenant": True}}, "cloud.forward_tenant"),
        ({"server": {"tls_client_ca_file": "ours.pem"}}, "server.tls_cert_file"),
    ],
)
async def test_an_agent_whose_callers_could_be_anybody_does_not_start(
    tmp_path: Path, settings: dict[str, object], key: str
) -> None:
    agent = Agent(tmp_path, settings)
    await agent.start()
    assert await agent.ended() == 2
    assert key in agent.log
    assert "Traceback" not in agent.log


async def test_who_has_to_prove_a_name_has_to_for_managing_models_too(tmp_path: Path) -> None:
    models.classifier(tmp_path / "mine.onnx")
    tenants = {
        "identify_by": "token",
        "require": True,
        "named": {"acme": {"token_sha256": [token_digest("acme-token")]}},
    }
    agent = Agent(
        tmp_path, {"models": {"mine": {"path": "mine.onnx"}}, "server": {"model_control": True}, "tenants": tenants}
    )
    unload = oip_pb2.RepositoryModelUnloadRequest(model_name="mine")
    async with agents.running(agent):
        assert await _status(agent, "RepositoryModelUnload", unload) == "UNAUTHENTICATED"
        assert await _status(agent, "RepositoryModelUnload", unload, authorization="Bearer acme-token") == "OK"
