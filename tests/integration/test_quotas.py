"""Quotas over real connections: who is asking is what it proves, over each transport, and nobody pays for another."""

import gc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from simulators.certificates import Authority
from simulators.clients import TIMEOUT_S, TRANSPORTS, Explaining

from hedgerow.backend import Deadline
from hedgerow.client import AsyncClient
from hedgerow.config import ServerSettings
from hedgerow.errors import Forbidden, Overloaded, Unauthenticated
from hedgerow.identity import token_digest
from hedgerow.oip.messages import request_to_proto
from hedgerow.oip.service import SERVICE
from hedgerow.parameters import STATUS
from hedgerow.proto import oip_pb2
from hedgerow.remote.backend import RemoteBackend
from hedgerow.remote.settings import RemoteSettings
from hedgerow.rpc import received
from hedgerow.server import Server
from hedgerow.tensors import InferRequest, Origin, tensor
from hedgerow.traffic.quotas import OTHERS, QuotaCounts, Quotas
from hedgerow.traffic.tenants import QuotaSettings, TenantSettings, TenantsSettings, identify

NEVER = 1e-6
"""A rate that gives nothing back while a test runs."""
X = np.arange(3, dtype=np.float32)
ACME, ZETA, GUEST, ROUTER = "spiffe://shop.example/acme", "zeta.example", "guest", "router"

pytestmark = pytest.mark.parametrize("transport", TRANSPORTS)


def twice(**fields: Any) -> TenantSettings:
    """Two requests, and no more."""
    return TenantSettings(requests_per_s=NEVER, burst_requests=2, **fields)


class Guarded:
    """A server that holds its callers to `tenants`, and those callers."""

    def __init__(self, folder: Path, transport: str, tenants: TenantsSettings, *, mutual: bool) -> None:
        self._authority = Authority(folder / "authority")
        certificate, key = self._authority.issue("server")
        self._files = {
            ACME: self._authority.issue("acme", uris=(ACME, "urn:other"), dns=(ZETA,)),
            ZETA: self._authority.issue("zeta", dns=(ZETA, "other.example")),
            GUEST: self._authority.issue(GUEST),
            ROUTER: self._authority.issue(ROUTER),
        } if mutual else {}  # fmt: skip
        self._settings = ServerSettings(
            port=0,
            transport=transport,
            tls_cert_file=str(certificate),
            tls_key_file=str(key),
            tls_client_ca_file=str(self._authority.certificate) if mutual else "",
        )
        self.quotas = Quotas(Explaining(), tenants)
        self.server = Server(self.quotas, self._settings, identify=identify(tenants, self._settings))

    @property
    def admitted(self) -> dict[str, int]:
        return {name: counts.admitted for name, counts in self.quotas.counts.items() if counts.admitted}

    def refused(self, tenant: str) -> int:
        return self.quotas.counts[tenant].refused

    def client(self, name: str) -> AsyncClient:
        """A caller with the certificate of `name`."""
        certificate, key = self._files[name]
        ca_file = self._authority.certificate
        return AsyncClient(
            self.server.address,
            ca_file=ca_file,
            cert_file=certificate,
            key_file=key,
            timeout_s=TIMEOUT_S,
            attempts=1,
        )

    def bearer(self, token: str) -> AsyncClient:
        """A caller without a certificate, who brings `token`."""
        ca_file = self._authority.certificate
        return AsyncClient(self.server.address, ca_file=ca_file, token=token, timeout_s=TIMEOUT_S, attempts=1)

    def remote(self, name: str, **settings: Any) -> RemoteSettings:
        """How a router with the certificate of `name` gets here."""
        certificate, key = map(str, self._files[name])
        ca_file = str(self._authority.certificate)
        return RemoteSettings(
            ca_file=ca_file, cert_file=certificate, key_file=key, forward_tenant=True, timeout_s=TIMEOUT_S, **settings
        )

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """A connection without a certificate."""
        roots = grpc.ssl_channel_credentials(self._authority.certificate.read_bytes())
        async with grpc.aio.secure_channel(self.server.address, roots) as channel:
            yield channel


async def guarded(stack: AsyncExitStack, folder: Path, transport: str, *, mutual: bool, **tenants: Any) -> Guarded:
    made = Guarded(folder, transport, TenantsSettings(**tenants), mutual=mutual)
    await stack.enter_async_context(made.server)
    stack.callback(gc.collect)  # errors keep their calls, and those their connections, for which the server would wait
    return made


async def ask(channel: grpc.aio.Channel, **said: str) -> oip_pb2.ModelInferResponse:
    """As any client would; `said` goes with it."""
    infer: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
    metadata = tuple((name.replace("_", "-"), value) for name, value in said.items())
    try:
        answer = await infer(message().SerializeToString(), metadata=metadata, timeout=TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        raise received(error) from error
    return oip_pb2.ModelInferResponse.FromString(answer)


def message(identity: str = "") -> oip_pb2.ModelInferRequest:
    return request_to_proto(InferRequest(model="double", inputs=(tensor("x", X),), id=identity))


# -- certificates


async def test_each_of_two_certificates_has_its_own_quota(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await guarded(
        stack, tmp_path, transport, mutual=True, identify_by="certificate", named={ACME: twice(), ZETA: twice()}
    )
    async with to.client(ACME) as acme, to.client(ZETA) as zeta, to.client(GUEST) as guest:
        for _ in range(2):
            assert (await acme.infer("double", X)).outputs["y"].tolist() == [0, 2, 4]
        for _ in range(3):
            with pytest.raises(Overloaded, match=f"quota of tenant '{ACME}'"):
                await acme.infer("double", X)
        for _ in range(2):
            await zeta.infer("double", X)
        with pytest.raises(Overloaded, match=f"quota of tenant '{ZETA}'"):
            await zeta.infer("double", X)
        for _ in range(4):
            await guest.infer("double", X)
    assert to.quotas.counts == {ACME: QuotaCounts(2, 3), ZETA: QuotaCounts(2, 1), OTHERS: QuotaCounts(4, 0)}


async def test_two_connections_with_one_certificate_are_one_tenant(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await guarded(stack, tmp_path, transport, mutual=True, identify_by="certificate", each=twice())
    async with to.client(GUEST) as one, to.client(GUEST) as other, to.client(ROUTER) as router:
        await one.infer("double", X)
        await other.infer("double", X)
        for client in (one, other):
            with pytest.raises(Overloaded, match="quota of tenant 'guest'"):
                await client.infer("double", X)
        await router.infer("double", X)


async def test_who_forges_a_name_is_refused_and_takes_nothing_of_that_tenants_quota(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await guarded(stack, tmp_path, transport, mutual=True, identify_by="certificate", named={ACME: twice()})
    async with to.client(ACME) as acme, to.client(ZETA) as forger:
        for _ in range(5):
            with pytest.raises(Forbidden, match=r"'zeta\.example' may not ask for tenant"):
                await forger.infer("double", X, tenant=ACME)
        await acme.infer("double", X, tenant=ACME)
        await acme.infer("double", X)
    assert to.quotas.counts == {ACME: QuotaCounts(2, 0), OTHERS: QuotaCounts(0, 0)}
    assert to.server.service.statistics.of("", "").statuses == {"PERMISSION_DENIED": 5}


async def test_a_router_that_is_trusted_speaks_for_its_callers_and_no_other_does(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await guarded(
        stack,
        tmp_path,
        transport,
        mutual=True,
        identify_by="certificate",
        trusted_routers=(ROUTER,),
        named={ACME: twice(), ROUTER: TenantSettings()},
    )
    async with to.client(ROUTER) as router, to.client(GUEST) as other:
        await router.infer("double", X, tenant=ACME)
        await router.infer("double", X, tenant="somebody")
        await router.infer("double", X)
        with pytest.raises(Forbidden):
            await other.infer("double", X, tenant=ACME)
    assert to.admitted == {ACME: 1, ROUTER: 1, OTHERS: 1}


@pytest.mark.parametrize("dialled_by", TRANSPORTS)
async def test_a_router_with_a_certificate_brings_its_callers_names_to_the_cloud(
    stack: AsyncExitStack, tmp_path: Path, transport: str, dialled_by: Any
) -> None:
    to = await guarded(
        stack,
        tmp_path,
        transport,
        mutual=True,
        identify_by="certificate",
        trusted_routers=(ROUTER,),
        named={ACME: twice()},
    )
    device = RemoteBackend("cloud", to.server.address, to.remote(ROUTER, transport=dialled_by))
    forger = RemoteBackend("cloud", to.server.address, to.remote(GUEST, transport=dialled_by))
    request = InferRequest(model="double", inputs=(tensor("x", X),), origin=Origin(tenant=ACME))
    async with device, forger:
        for _ in range(2):
            assert (await device.infer(request, Deadline.after(TIMEOUT_S))).output("y").tolist() == [0, 2, 4]
        with pytest.raises(Overloaded, match=f"quota of tenant '{ACME}'"):
            await device.infer(request, Deadline.after(TIMEOUT_S))
        with pytest.raises(Forbidden, match="'guest' may not ask for tenant"):
            await forger.infer(request, Deadline.after(TIMEOUT_S))
    assert to.admitted == {ACME: 2}


# -- tokens


async def by_token(stack: AsyncExitStack, folder: Path, transport: str, **settings: Any) -> Guarded:
    named = {name: twice(token_sha256=(token_digest(f"{name}-token"),)) for name in ("acme", "zeta")}
    return await guarded(stack, folder, transport, mutual=False, identify_by="token", named=named, **settings)


async def test_each_token_has_its_own_quota_and_a_wrong_one_is_no_key(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await by_token(stack, tmp_path, transport, others=QuotaSettings(requests_per_s=NEVER, burst_requests=1))
    async with to.channel() as channel:
        for token in ("wrong", "acme", token_digest("acme-token"), "acme-token2"):
            with pytest.raises(Unauthenticated, match="the token is none that this server knows") as caught:
                await ask(channel, authorization=f"Bearer {token}")
            assert token not in str(caught.value).split()
        with pytest.raises(Unauthenticated, match="hedgerow-tenant is 'acme' and nothing proves it"):
            await ask(channel, hedgerow_tenant="acme")
        with pytest.raises(Forbidden):
            await ask(channel, authorization="Bearer zeta-token", hedgerow_tenant="acme")
        for name in ("acme", "zeta"):
            for _ in range(2):
                await ask(channel, authorization=f"Bearer {name}-token")
            with pytest.raises(Overloaded, match=f"quota of tenant '{name}'"):
                await ask(channel, authorization=f"Bearer {name}-token")
        await ask(channel)
        with pytest.raises(Overloaded, match="quota of callers without a name"):
            await ask(channel)
    assert to.quotas.counts == {"acme": QuotaCounts(2, 1), "zeta": QuotaCounts(2, 1), OTHERS: QuotaCounts(1, 1)}
    assert to.server.service.statistics.of("", "").statuses == {"UNAUTHENTICATED": 5, "PERMISSION_DENIED": 1}


async def test_where_it_is_required_nobody_is_answered_without_a_token_but_may_ask_what_there_is(
    stack: AsyncExitStack, tmp_path: Path, transport: str
) -> None:
    to = await by_token(stack, tmp_path, transport, require=True)
    async with to.channel() as channel:
        with pytest.raises(Unauthenticated, match="nothing says who is asking"):
            await ask(channel)
        await ask(channel, authorization="Bearer acme-token")
        describe: Any = channel.unary_unary(f"/{SERVICE.full_name}/ModelMetadata")
        described = await describe(oip_pb2.ModelMetadataRequest(name="double").SerializeToString(), timeout=TIMEOUT_S)
        assert oip_pb2.ModelMetadataResponse.FromString(described).name == "double"
    assert to.admitted == {"acme": 1}


async def test_clients_say_their_token_with_every_call(stack: AsyncExitStack, tmp_path: Path, transport: str) -> None:
    to = await by_token(stack, tmp_path, transport, require=True)
    async with to.bearer("acme-token") as client:
        assert (await client.infer("double", {"x": X})).outputs["y"].tolist() == [0, 2, 4]
        async with client.stream("double", [{"x": X}]) as answers:
            assert [answer.outputs["y"].tolist() async for answer in answers] == [[0, 2, 4]]
    async with to.bearer("guess") as client:
        with pytest.raises(Unauthenticated):
            await client.infer("double", {"x": X})
    assert to.admitted == {"acme": 2}


@pytest.mark.parametrize(
    ("said", "status"), [("acme-token", ""), ("wrong", "UNAUTHENTICATED"), ("", "UNAUTHENTICATED")]
)
async def test_streams_are_asked_too(
    stack: AsyncExitStack, tmp_path: Path, transport: str, said: str, status: str
) -> None:
    to = await by_token(stack, tmp_path, transport, require=True)
    async with to.channel() as channel:
        stream: Any = channel.stream_stream(f"/{SERVICE.full_name}/ModelStreamInfer")
        metadata = (("authorization", f"Bearer {said}"),) if said else ()
        sent = iter([message(str(number)).SerializeToString() for number in range(2)])
        answers = [answer async for answer in stream(sent, metadata=metadata, timeout=TIMEOUT_S)]
    told = [oip_pb2.ModelStreamInferResponse.FromString(answer).infer_response for answer in answers]
    assert [(one.id, one.parameters[STATUS].string_param) for one in told] == [("0", status), ("1", status)]
    assert to.admitted == ({} if status else {"acme": 2})
