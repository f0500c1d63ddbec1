from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Repository(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPOSITORY_UNSPECIFIED: _ClassVar[Repository]
    RELEASE: _ClassVar[Repository]
    DIRECTOR: _ClassVar[Repository]
REPOSITORY_UNSPECIFIED: Repository
RELEASE: Repository
DIRECTOR: Repository

class Request(_message.Message):
    __slots__ = ("id", "session", "metadata", "chunks", "samples")
    ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    id: str
    session: int
    metadata: MetadataRequest
    chunks: ChunkRequest
    samples: SampleUpload
    def __init__(self, id: _Optional[str] = ..., session: _Optional[int] = ..., metadata: _Optional[_Union[MetadataRequest, _Mapping]] = ..., chunks: _Optional[_Union[ChunkRequest, _Mapping]] = ..., samples: _Optional[_Union[SampleUpload, _Mapping]] = ...) -> None: ...

class Response(_message.Message):
    __slots__ = ("id", "metadata", "chunk", "receipt", "refusal")
    ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    metadata: Metadata
    chunk: Chunk
    receipt: SampleReceipt
    refusal: Refusal
    def __init__(self, id: _Optional[str] = ..., metadata: _Optional[_Union[Metadata, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., receipt: _Optional[_Union[SampleReceipt, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message")
    class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CODE_UNSPECIFIED: _ClassVar[Refusal.Code]
        NOT_FOUND: _ClassVar[Refusal.Code]
        INVALID: _ClassVar[Refusal.Code]
        BUSY: _ClassVar[Refusal.Code]
        INTERNAL: _ClassVar[Refusal.Code]
    CODE_UNSPECIFIED: Refusal.Code
    NOT_FOUND: Refusal.Code
    INVALID: Refusal.Code
    BUSY: Refusal.Code
    INTERNAL: Refusal.Code
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: Refusal.Code
    message: str
    def __init__(self, code: _Optional[_Union[Refusal.Code, str]] = ..., message: _Optional[str] = ...) -> None: ...

class MetadataRequest(_message.Message):
    __slots__ = ("repository", "name")
    REPOSITORY_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    repository: Repository
    name: str
    def __init__(self, repository: _Optional[_Union[Repository, str]] = ..., name: _Optional[str] = ...) -> None: ...

class Metadata(_message.Message):
    __slots__ = ("absent", "content")
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    absent: bool
    content: bytes
    def __init__(self, absent: bool = ..., content: _Optional[bytes] = ...) -> None: ...

class ChunkRequest(_message.Message):
    __slots__ = ("sha256", "chunk_bytes", "missing", "window")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    chunk_bytes: int
    missing: bytes
    window: int
    def __init__(self, sha256: _Optional[str] = ..., chunk_bytes: _Optional[int] = ..., missing: _Optional[bytes] = ..., window: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sha256", "index", "content")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    index: int
    content: bytes
    def __init__(self, sha256: _Optional[str] = ..., index: _Optional[int] = ..., content: _Optional[bytes] = ...) -> None: ...

class SampleUpload(_message.Message):
    __slots__ = ("model", "samples")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    model: str
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, model: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("digest", "request", "edge_response", "cloud_response", "confidence", "release", "unix_ms")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EDGE_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    CLOUD_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    digest: str
    request: bytes
    edge_response: bytes
    cloud_response: bytes
    confidence: float
    release: str
    unix_ms: int
    def __init__(self, digest: _Optional[str] = ..., request: _Optional[bytes] = ..., edge_response: _Optional[bytes] = ..., cloud_response: _Optional[bytes] = ..., confidence: _Optional[float] = ..., release: _Optional[str] = ..., unix_ms: _Optional[int] = ...) -> None: ...

class SampleReceipt(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, digests: _Optional[_Iterable[str]] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("kind", "serial")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Command.Kind]
        CHECK: _ClassVar[Command.Kind]
    KIND_UNSPECIFIED: Command.Kind
    CHECK: Command.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    kind: Command.Kind
    serial: int
    def __init__(self, kind: _Optional[_Union[Command.Kind, str]] = ..., serial: _Optional[int] = ...) -> None: ...

class Birth(_message.Message):
    __slots__ = ("session", "device", "hedgerow_version", "profile", "platform", "unix_ms", "address")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HEDGEROW_VERSION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    session: int
    device: str
    hedgerow_version: str
    profile: str
    platform: str
    unix_ms: int
    address: str
    def __init__(self, session: _Optional[int] = ..., device: _Optional[str] = ..., hedgerow_version: _Optional[str] = ..., profile: _Optional[str] = ..., platform: _Optional[str] = ..., unix_ms: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class ModelStatus(_message.Message):
    __slots__ = ("model", "running", "running_manifest", "target", "phase", "reason", "bytes_done", "bytes_total", "failed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    model: str
    running: int
    running_manifest: str
    target: int
    phase: str
    reason: str
    bytes_done: int
    bytes_total: int
    failed: int
    def __init__(self, model: _Optional[str] = ..., running: _Optional[int] = ..., running_manifest: _Optional[str] = ..., target: _Optional[int] = ..., phase: _Optional[str] = ..., reason: _Optional[str] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ..., failed: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("session", "online", "models", "serial", "unix_ms", "bytes_fetched", "bytes_refetched", "trust")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ONLINE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FETCHED_FIELD_NUMBER: _ClassVar[int]
    BYTES_REFETCHED_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    session: int
    online: bool
    models: _containers.RepeatedCompositeFieldContainer[ModelStatus]
    serial: int
    unix_ms: int
    bytes_fetched: int
    bytes_refetched: int
    trust: str
    def __init__(self, session: _Optional[int] = ..., online: bool = ..., models: _Optional[_Iterable[_Union[ModelStatus, _Mapping]]] = ..., serial: _Optional[int] = ..., unix_ms: _Optional[int] = ..., bytes_fetched: _Optional[int] = ..., bytes_refetched: _Optional[int] = ..., trust: _Optional[str] = ...) -> None: ...
