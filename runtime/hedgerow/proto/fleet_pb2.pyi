from hedgerow.proto import link_pb2 as _link_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class GetDeviceRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("id", "online", "profile", "hedgerow_version", "address", "last_seen_unix_ms", "models", "assigned", "trust", "bytes_fetched", "bytes_refetched")
    ID_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    HEDGEROW_VERSION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_REFETCHED_FIELD_NUMBER: _ClassVar[int]
    id: str
    online: bool
    profile: str
    hedgerow_version: str
    address: str
    last_seen_unix_ms: int
    models: _containers.RepeatedCompositeFieldContainer[_link_pb2.ModelStatus]
    assigned: _containers.RepeatedCompositeFieldContainer[Assignment]
    trust: str
    bytes_fetched: int
    bytes_refetched: int
    def __init__(self, id: _Optional[str] = ..., online: bool = ..., profile: _Optional[str] = ..., hedgerow_version: _Optional[str] = ..., address: _Optional[str] = ..., last_seen_unix_ms: _Optional[int] = ..., models: _Optional[_Iterable[_Union[_link_pb2.ModelStatus, _Mapping]]] = ..., assigned: _Optional[_Iterable[_Union[Assignment, _Mapping]]] = ..., trust: _Optional[str] = ..., bytes_fetched: _Optional[int] = ..., bytes_refetched: _Optional[int] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("model", "counter")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    model: str
    counter: int
    def __init__(self, model: _Optional[str] = ..., counter: _Optional[int] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases",)
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("model", "counter", "manifest_sha256", "bytes", "published_unix_ms", "assigned", "running", "guarantee")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNED_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    GUARANTEE_FIELD_NUMBER: _ClassVar[int]
    model: str
    counter: int
    manifest_sha256: str
    bytes: int
    published_unix_ms: int
    assigned: int
    running: int
    guarantee: str
    def __init__(self, model: _Optional[str] = ..., counter: _Optional[int] = ..., manifest_sha256: _Optional[str] = ..., bytes: _Optional[int] = ..., published_unix_ms: _Optional[int] = ..., assigned: _Optional[int] = ..., running: _Optional[int] = ..., guarantee: _Optional[str] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("model", "counter", "devices")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    model: str
    counter: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., counter: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, devices: _Optional[_Iterable[str]] = ...) -> None: ...

class GetMetadataRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class MetadataFile(_message.Message):
    __slots__ = ("content",)
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    def __init__(self, content: _Optional[bytes] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("file", "targets")
    FILE_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    file: FilePart
    targets: bytes
    def __init__(self, file: _Optional[_Union[FilePart, _Mapping]] = ..., targets: _Optional[bytes] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("path", "content", "last")
    PATH_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    path: str
    content: bytes
    last: bool
    def __init__(self, path: _Optional[str] = ..., content: _Optional[bytes] = ..., last: bool = ...) -> None: ...

class ListSamplesRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...
