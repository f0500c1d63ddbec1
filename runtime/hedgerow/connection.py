"""One gRPC channel to an OIP endpoint: how it is set up, when it stands, and what its failures are in words."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc

from hedgerow.errors import ConfigError
from hedgerow.proto.oip_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from hedgerow.proto.oip_pb2_grpc import GRPCInferenceServiceAsyncStub  # a type only

ADDRESSES = ("ipv4:", "ipv6:", "unix:", "DNS")
"""What marks the channel's own words, which name addresses, from the server's."""

Stub: TypeAlias = "GRPCInferenceServiceAsyncStub"
Connectivity = grpc.ChannelConnectivity


@dataclass(frozen=True, slots=True)
class Connection:
    """A channel and the stub over it."""

    channel: grpc.aio.Channel
    stub: Stub

    async def ready(self) -> None:
        """Wait until the connection stands; raises `ConnectionError` if it cannot be had."""
        while (state := self.channel.get_state(try_to_connect=True)) is not Connectivity.READY:
            if state in {Connectivity.TRANSIENT_FAILURE, Connectivity.SHUTDOWN}:
                raise ConnectionError("cannot connect")
            await self.channel.wait_for_state_change(state)

    async def close(self) -> None:
        """Close the channel; calls on it are cancelled."""
        await self.channel.close()


def connect(
    target: str, credentials: grpc.ChannelCredentials | None, *, connect_timeout_s: float, max_message_bytes: int
) -> Connection:
    """A connection to `target` ("host:port") that is about to be made; without `credentials`, in the clear."""
    options = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.min_reconnect_backoff_ms", round(connect_timeout_s * 1000)),
        ("grpc.enable_retries", 0),  # retries are the caller's to budget
        ("grpc.use_local_subchannel_pool", 1),  # or a new channel would be given an old one's dead connection
    ]
    if credentials is None:
        channel = grpc.aio.insecure_channel(target, options)
    else:
        channel = grpc.aio.secure_channel(target, credentials, options)
    return Connection(channel, GRPCInferenceServiceStub(channel))


def credentials_from(ca_file: str) -> grpc.ChannelCredentials | None:
    """Credentials that trust the authority in the PEM file; None for no file. Raises `ConfigError`."""
    if not ca_file:
        return None
    try:
        return grpc.ssl_channel_credentials(Path(ca_file).read_bytes())
    except OSError as error:
        raise ConfigError(f"ca_file: cannot read {ca_file}: {error.strerror}") from error


def in_words(error: grpc.aio.AioRpcError) -> str:
    """Why a call failed, without the addresses that the channel itself would name."""
    details = error.details() or error.code().name
    return "cannot connect" if any(mark in details for mark in ADDRESSES) else details
