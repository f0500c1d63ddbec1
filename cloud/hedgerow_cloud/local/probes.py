"""Asking a daemon whether it is ready, in the protocol that it speaks. An address is "host:port"."""

import socket

import grpc
from grpc_health.v1 import health_pb2

from hedgerow.proto import oip_pb2, oip_pb2_grpc

PROBE_TIMEOUT_S = 1.0


def lives(address: str) -> bool:
    """Whether an OIP server lives; ready it may not be, for want of a model."""
    with grpc.insecure_channel(address) as channel:
        stub = oip_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            return stub.ServerLive(oip_pb2.ServerLiveRequest(), timeout=PROBE_TIMEOUT_S).live
        except grpc.RpcError:
            return False


def is_healthy(address: str) -> bool:
    """Whether a gRPC server says that it is serving."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def is_shaping(address: str) -> bool:
    """Whether a simulated link answers at its port for the counts."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S) as stream:
            return stream.recv(1) == b"{"
    except OSError:
        return False


def accepts_mqtt(address: str) -> bool:
    """Whether a CONNECT (MQTT 3.1.1, clean session, client id "hedgerow-up") is acknowledged."""
    host, _, port = address.rpartition(":")
    client_id = b"hedgerow-up"
    body = b"\x00\x04MQTT\x04\x02\x00\x0a" + len(client_id).to_bytes(2, "big") + client_id
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S) as stream:
            stream.sendall(bytes([0x10, len(body)]) + body)
            return stream.recv(4) == b"\x20\x02\x00\x00"
    except OSError:
        return False
