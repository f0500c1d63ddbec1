"""The fleet service as a Python object, for the command line and the learning pipeline. Needs only the core.

::

    with FleetClient("127.0.0.1:8002") as fleet:
        for device in fleet.devices():
            print(device.id, device.online)
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import grpc

from hedgerow import release
from hedgerow.errors import BackendUnavailable, HedgerowError, Unavailable
from hedgerow.proto import fleet_pb2, fleet_pb2_grpc, link_pb2
from hedgerow.rpc import received

TIMEOUT_S = 10.0
PUBLISH_TIMEOUT_S = 3600.0
ASSIGN_TIMEOUT_S = 600.0
"""The fleet signs for one device after the other, and each is on the disk before the next."""
PART_BYTES = 2**20
RECONNECT_MS = 100
"""First wait before a connection is tried again: the service may just be starting."""
MAX_MESSAGE_BYTES = 16 * 2**20

Progress = Callable[[int, int], None]
"""Takes the bytes sent and the bytes in all."""


class FleetClient:
    """Calls the fleet service at `target` ("host:port"). A context manager, or `close` it.

    Methods raise `BackendUnavailable` when nobody answers there, and otherwise the error that the service names.
    """

    def __init__(self, target: str, timeout_s: float = TIMEOUT_S) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
                ("grpc.min_reconnect_backoff_ms", RECONNECT_MS),
            ],
        )
        self._stub = fleet_pb2_grpc.FleetStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; idempotent."""
        self._channel.close()

    def devices(self) -> Sequence[fleet_pb2.Device]:
        """Every device that was ever seen, by id."""
        with self._errors():
            return self._stub.ListDevices(fleet_pb2.ListDevicesRequest(), timeout=self._timeout_s).devices

    def device(self, device: str) -> fleet_pb2.Device:
        """One device."""
        with self._errors():
            return self._stub.GetDevice(fleet_pb2.GetDeviceRequest(id=device), timeout=self._timeout_s)

    def watch(self, device: str, timeout_s: float) -> Generator[fleet_pb2.Device, None, None]:
        """One device now and after each change; ends with `DeadlineExceeded` after `timeout_s`. Close it to leave."""
        with self._errors():
            call = self._stub.WatchDevice(fleet_pb2.GetDeviceRequest(id=device), timeout=timeout_s)
            try:
                yield from call
            finally:
                call.cancel()

    def releases(self, model: str = "") -> Sequence[fleet_pb2.Release]:
        """The releases of `model`, or of every model, in order."""
        with self._errors():
            return self._stub.ListReleases(fleet_pb2.ListReleasesRequest(model=model), timeout=self._timeout_s).releases

    def assign(self, model: str, counter: int, devices: Sequence[str] = ()) -> Sequence[str]:
        """Give a release to `devices`, or to every device known now; gives their ids."""
        request = fleet_pb2.AssignRequest(model=model, counter=counter, devices=devices)
        with self._errors():
            return self._stub.Assign(request, timeout=ASSIGN_TIMEOUT_S).devices

    def metadata(self, name: str) -> bytes:
        """The release repository's metadata file `name` ("targets.json")."""
        with self._errors():
            return self._stub.GetMetadata(fleet_pb2.GetMetadataRequest(name=name), timeout=self._timeout_s).content

    def publish(self, folder: Path, targets: bytes, progress: Progress | None = None) -> fleet_pb2.Release:
        """Upload the release in `folder`, checked first, with the signed `targets` that list it."""
        manifest = release.read(folder)
        with self._errors():
            return self._stub.Publish(_parts(folder, manifest, targets, progress), timeout=PUBLISH_TIMEOUT_S)

    def samples(self, model: str, timeout_s: float = 60.0) -> Iterator[link_pb2.Sample]:
        """The samples that devices have sent for `model`, in the order of arrival."""
        with self._errors():
            yield from self._stub.ListSamples(fleet_pb2.ListSamplesRequest(model=model), timeout=timeout_s)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._named(received(error)) from error

    def _named(self, error: HedgerowError) -> HedgerowError:
        if isinstance(error, Unavailable):
            why = "" if "connect" in str(error).lower() else f": {error}"  # else it answers, but its disk does not
            return BackendUnavailable(f"the fleet service at {self.target} does not answer{why}")
        return error


def _parts(
    folder: Path, manifest: release.Manifest, targets: bytes, progress: Progress | None
) -> Iterator[fleet_pb2.PublishRequest]:
    sizes = {release.MANIFEST: (folder / release.MANIFEST).stat().st_size}
    sizes |= {file.path: file.bytes for file in manifest.files}
    done, total = 0, sum(sizes.values())
    for path, size in sizes.items():
        with (folder / path).open("rb") as stream:
            for offset in range(0, max(size, 1), PART_BYTES):
                content = stream.read(PART_BYTES)
                last = offset + PART_BYTES >= size
                part = fleet_pb2.FilePart(path=f"{manifest.name}/{path}", content=content, last=last)
                yield fleet_pb2.PublishRequest(file=part)
                done += len(content)
                if progress is not None:
                    progress(done, total)
    yield fleet_pb2.PublishRequest(targets=targets)
