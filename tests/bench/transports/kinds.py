"""What is compared: each kind is a transport by name, on an event loop; peers are modules of `peers`."""

from collections.abc import Mapping
from dataclasses import dataclass

PACKAGES = ("pygrpc-native==0.5.0", "uvloop==0.23.0", "grpclib==0.4.9")


@dataclass(frozen=True, slots=True)
class Kind:
    """A transport as it is measured. `sound`: whether it is put to the soundness probes, too."""

    title: str
    transport: str
    uvloop: bool = False
    sound: bool = True


KINDS: Mapping[str, Kind] = {
    "native": Kind("native", "native"),
    "native-uvloop": Kind("native, uvloop", "native", uvloop=True),
    "aio": Kind("grpc.aio", "grpcio"),
    "aio-uvloop": Kind("grpc.aio, uvloop", "grpcio", uvloop=True, sound=False),
    "sync": Kind("grpc, threads", "grpcio_sync", sound=False),
    "pygrpc": Kind("pygrpc-native, aio", "pygrpc_aio"),
    "pygrpc-front": Kind("pygrpc-native, low-level", "pygrpc_front"),
    "grpclib": Kind("grpclib", "pure_grpclib"),
}
REFERENCE = "aio"
"""What ratios are to."""
