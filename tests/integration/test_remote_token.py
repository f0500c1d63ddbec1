"""The token of a router: brought with all that it asks of the servers behind it, and said to nobody else."""

import gc
import logging
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from simulators.certificates import Authority
from simulators.clients import TIMEOUT_S, TRANSPORTS, Explaining
from simulators.foreign import Foreign, refuses, says

from hedgerow.backend import Deadline
from hedgerow.client import AsyncClient, Client
from hedgerow.config import ServerSettings, load
from hedgerow.errors import BackendUnavailable, ConfigError, HedgerowError, Unauthenticated
from hedgerow.host.model_host import ModelHost
from hedgerow.identity import token_digest
from hedgerow.journey import Route
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend
from hedgerow.remote.settings import RemoteSettings
from hedgerow.router import Router
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, tensor
from hedgerow.traffic.quotas import Quotas
from hedgerow.traffic.tenants import TenantSettings, TenantsSettings, identify
from hedgerow_edge.settings import AgentSettings

SECRET = "s3cret-of-ours"
REQUEST = InferRequest(model="double", inputs=(tensor("x", np.arange(3, dtype=np.float32)),))

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def bringing(token: str, **changes: Any) -> RemoteSettings:
    times = {"connect_timeout_s": TIMEOUT_S, "probe_timeout_s": TIMEOUT_S, "timeout_s": TIMEOUT_S}
    return RemoteSettings(token=token, **{**times, **changes})


class Recording(Foreign):
    """Keeps who each call says it is from, by method."""

    def __init__(self) -> None:
        answer = oip_pb2.ModelInferResponse(model_name="double")
        super().__init__(
            {
                "ModelInfer": says(answer),
                "ModelMetadata": says(oip_pb2.ModelMetadataResponse(name="double")),
                "ModelReady": says(oip_pb2.ModelReadyResponse(ready=True)),
                "RepositoryIndex": says(oip_pb2.RepositoryIndexResponse()),
            },
            [oip_pb2.ModelStreamInferResponse(infer_response=answer)],
        )
        self.authorizations: dict[str, set[Any]] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        said = dict(details.invocation_metadata or ()).get("authorization")
        self.authorizations.setdefault(details.method.rpartition("/")[2], set()).add(said)
        return super().service(details)


@each_transport
async def test_every_call_brings_the_token_be_it_a_request_or_a_probe(stack: AsyncExitStack, transport: str) -> None:
    server = await stack.enter_async_context(Recording())
    async with RemoteBackend("cloud", server.target, bringing(SECRET, transport=transport)) as remote:
        for _ in range(3):
            await remote.infer(REQUEST, Deadline.after(TIMEOUT_S))
        assert [answer.model async for answer in remote.stream(REQUEST, Deadline.after(TIMEOUT_S))] == ["double"]
        assert (await remote.metadata("double")).name == "double"
        assert await remote.ready("double")
        await remote.models()
    asked = {"ServerReady", "ModelInfer", "ModelStreamInfer", "ModelMetadata", "ModelReady", "RepositoryIndex"}
    assert server.authorizations == {method: {f"Bearer {SECRET}"} for method in asked}


@each_transport
@pytest.mark.parametrize("served_by", TRANSPORTS)
async def test_a_router_gets_answers_of_a_server_that_has_none_for_strangers(
    stack: AsyncExitStack, tmp_path: Path, transport: str, served_by: str
) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("server")
    settings = ServerSettings(port=0, transport=served_by, tls_cert_file=str(certificate), tls_key_file=str(key))
    named = {"edge": TenantSettings(token_sha256=(token_digest(SECRET),))}
    tenants = TenantsSettings(identify_by="token", require=True, named=named)
    quotas = Quotas(Explaining(), tenants)
    server = Server(quotas, settings, identify=identify(tenants, settings))
    await stack.enter_async_context(server)

    stack.callback(gc.collect)  # errors keep their calls, and those their connections, for which the server would wait

    async def router_with(token: str) -> Router:
        ours = bringing(token, ca_file=str(authority.certificate), transport=transport)
        cloud = await stack.enter_async_context(RemoteBackend("cloud", server.address, ours))
        return Router({"double": Route(model="double", edge=ModelHost(), cloud=cloud)})

    ours = await router_with(SECRET)
    assert (await ours.infer(REQUEST, Deadline.after(TIMEOUT_S))).output("y").tolist() == [0, 2, 4]
    for token, said in (("", "nothing says who is asking"), ("guess", "the token is none that this server knows")):
        stranger = await router_with(token)
        with pytest.raises(HedgerowError, match=said):
            await stranger.infer(REQUEST, Deadline.after(TIMEOUT_S))
    assert {name: counts.admitted for name, counts in quotas.counts.items() if counts.admitted} == {"edge": 1}


@each_transport
async def test_a_token_is_in_no_log_no_error_and_no_text_of_settings(
    stack: AsyncExitStack, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = await stack.enter_async_context(Recording())
    server.answers["ModelInfer"] = refuses(grpc.StatusCode.UNAUTHENTICATED, "the token is none that is known")
    settings = bringing(SECRET, transport=transport)
    remote = await stack.enter_async_context(RemoteBackend("cloud", server.target, settings))
    with pytest.raises(Unauthenticated) as refused:
        await remote.infer(REQUEST, Deadline.after(TIMEOUT_S))
    away = RemoteBackend("cloud", "127.0.0.1:1", bringing(SECRET, transport=transport, connect_timeout_s=0.1))
    with pytest.raises(BackendUnavailable) as unreachable:
        await away.infer(REQUEST, Deadline.after(TIMEOUT_S))
    await away.close()
    agent = load(AgentSettings, environ={"HEDGEROW_CLOUD__TOKEN": SECRET})
    assert agent.cloud.token == settings.token == SECRET
    told = [repr(agent), repr(settings), str(settings), str(refused.value), str(unreachable.value), caplog.text]
    assert SECRET not in "".join(told)
    assert "token='…'" in repr(agent)


@pytest.mark.parametrize("wrong", ["two\nlines", "nul\0", "schlüssel", " before", "after ", "tab\t"])
async def test_what_no_header_can_say_is_refused_at_configuration_and_not_repeated(wrong: str) -> None:
    expected = "^token: expected printable ASCII, with no space at either end$"
    for transport in TRANSPORTS:
        with pytest.raises(ConfigError, match=expected):
            RemoteBackend("cloud", "127.0.0.1:1", bringing(wrong, transport=transport))
    with pytest.raises(ConfigError, match=expected):
        Client("127.0.0.1:1", token=wrong)
    with pytest.raises(ConfigError, match=expected):
        AsyncClient("127.0.0.1:1", token=wrong)


@pytest.mark.parametrize(
    ("target", "overheard"),
    [
        ("cloud.example:8001", True),
        ("dns:cloud.example:8001", True),
        ("127.example:8001", True),
        ("localhost:8001", False),
        ("127.0.0.1:8001", False),
        ("[::1]:8001", False),
    ],
)
async def test_who_sends_a_token_in_the_clear_is_told_unless_it_stays_on_this_machine(
    tmp_path: Path, target: str, overheard: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ca_file = str(Authority(tmp_path / "authority").certificate)
    quiet = [bringing(""), bringing(SECRET, ca_file=ca_file)]
    for settings in quiet:
        await RemoteBackend("cloud", target, settings).close()
    Client(target, token=SECRET, ca_file=ca_file).close()
    Client(target).close()
    assert not caplog.messages
    remote = RemoteBackend("cloud", target, bringing(SECRET))
    remote.update_targets(target)  # which it was told of before
    await remote.close()
    Client(target, token=SECRET).close()
    await AsyncClient(target, token=SECRET).close()
    warnings = [message for message in caplog.messages if f"the token for {target} goes there in the clear" in message]
    assert len(warnings) == len(caplog.messages) == (3 if overheard else 0)
