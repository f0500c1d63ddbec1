"""The Python clients over TLS, with a certificate authority of the test's own: who is trusted, and who is let in."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Unpack

import grpc
import numpy as np
import pytest
from simulators.background import in_background
from simulators.certificates import Authority
from simulators.clients import TIMEOUT_S, TRANSPORTS, Explaining

from hedgerow.client import AsyncClient, Client, ConnectionOptions
from hedgerow.config import ServerSettings
from hedgerow.errors import ConfigError, Unavailable
from hedgerow.server import Server
from hedgerow.transports.native import NativeListener

transports = pytest.mark.parametrize("transport", TRANSPORTS)
X = np.arange(3, dtype=np.float32)


class Files:
    """Certificates of a server and a client, from two authorities."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder / "ours"), Authority(folder / "theirs")
        self.ca_file = self.ours.certificate
        self.server, self.client, self.stranger = (
            self.ours.issue("server"),
            self.ours.issue("client"),
            self.theirs.issue("stranger"),
        )

    def settings(self, transport: str, *, mutual: bool) -> ServerSettings:
        certificate, key = self.server
        return ServerSettings(
            port=0,
            transport=transport,
            tls_cert_file=str(certificate),
            tls_key_file=str(key),
            tls_client_ca_file=str(self.ca_file) if mutual else "",
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@asynccontextmanager
async def reached(address: str, **options: Unpack[ConnectionOptions]) -> AsyncIterator[AsyncClient]:
    options |= {"timeout_s": 30.0, "attempts": 1}
    async with AsyncClient(address, **options) as client:
        yield client


@asynccontextmanager
async def served(settings: ServerSettings) -> AsyncIterator[Server]:
    """A server that outlives its callers' connections: ending one over TLS takes both sides."""
    async with Server(Explaining(), settings) as server:
        yield server
        async with asyncio.timeout(TIMEOUT_S):
            while isinstance(server.listener, NativeListener) and server.listener.connections:  # noqa: ASYNC110 (no event says it)
                await asyncio.sleep(0.005)


@transports
async def test_a_server_is_trusted_by_its_authority_and_no_other(transport: str, files: Files) -> None:
    async with served(files.settings(transport, mutual=False)) as server:
        roots = grpc.ssl_channel_credentials(files.ca_file.read_bytes())
        distrusting: list[ConnectionOptions] = [{"ca_file": files.theirs.certificate}, {}]
        for options in distrusting:
            async with reached(server.address, **options) as client:
                with pytest.raises(Unavailable):
                    await client.infer("double", X)
        trusting: list[ConnectionOptions] = [{"ca_file": files.ca_file}, {"credentials": roots}]
        for options in trusting:
            async with reached(server.address, **options) as client:
                assert (await client.infer("double", X)).outputs["y"].tolist() == [0, 2, 4]
                async with client.stream("double", [X]) as answers:
                    assert (await anext(answers)).outputs["y"].tolist() == [0, 2, 4]


@transports
async def test_a_server_that_wants_to_know_its_callers_refuses_strangers(transport: str, files: Files) -> None:
    callers: list[ConnectionOptions] = [
        {"ca_file": files.ca_file},
        {"ca_file": files.ca_file, "cert_file": files.stranger[0], "key_file": files.stranger[1]},
        {"ca_file": files.ca_file, "cert_file": files.client[0], "key_file": files.client[1]},
    ]
    async with served(files.settings(transport, mutual=True)) as server:
        for options in callers[:-1]:
            async with reached(server.address, **options) as client:
                with pytest.raises(Unavailable):
                    await client.infer("double", X)
        async with reached(server.address, **callers[-1]) as client:
            assert (await client.infer("double", X)).outputs["y"].tolist() == [0, 2, 4]


@transports
def test_those_who_block_know_their_server_too(transport: str, files: Files) -> None:
    cert_file, key_file = files.client
    settings = files.settings(transport, mutual=True)
    with in_background(lambda: served(settings)) as server:
        with Client(server.address, ca_file=files.ca_file, attempts=1) as client, pytest.raises(Unavailable):
            client.infer("double", X)
        with Client(server.address, ca_file=files.ca_file, cert_file=cert_file, key_file=key_file) as client:
            assert client.infer("double", X).outputs["y"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_files_that_cannot_be_used_are_named(kind: Callable[..., object], files: Files, tmp_path: Path) -> None:
    nonsense, missing = tmp_path / "nonsense.pem", tmp_path / "missing.pem"
    nonsense.write_text("no certificate")
    certificate, key = files.client
    for options, said in (
        ({"ca_file": missing}, "ca_file: cannot read .*missing.pem: No such file"),
        ({"ca_file": tmp_path}, "ca_file: cannot read .*: Is a directory"),
        ({"ca_file": nonsense}, "ca_file: .*nonsense.pem is no certificate in PEM"),
        ({"cert_file": certificate, "key_file": missing}, "key_file: cannot read .*missing.pem"),
        ({"cert_file": missing, "key_file": key}, "cert_file: cannot read .*missing.pem"),
        ({"cert_file": certificate, "key_file": files.stranger[1]}, "cert_file, key_file: .* no certificate and its"),
        ({"cert_file": nonsense, "key_file": key}, "cert_file, key_file: .* no certificate and its key"),
        ({"cert_file": certificate}, "cert_file, key_file: expected both or neither"),
        ({"ca_file": files.ca_file, "credentials": grpc.ssl_channel_credentials()}, "credentials: .* got both"),
    ):
        with pytest.raises(ConfigError, match=said):
            kind("127.0.0.1:1", **options)
