from pushstep.proto import limits_pb2 as _limits_pb2
from pushstep.proto import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UploadKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPLOAD_KIND_UNSPECIFIED: _ClassVar[UploadKind]
    UPLOAD_KIND_CREATE: _ClassVar[UploadKind]
    UPLOAD_KIND_PARAMETERS: _ClassVar[UploadKind]
    UPLOAD_KIND_STATE: _ClassVar[UploadKind]
    UPLOAD_KIND_GROUP: _ClassVar[UploadKind]
    UPLOAD_KIND_EXTRAS: _ClassVar[UploadKind]
UPLOAD_KIND_UNSPECIFIED: UploadKind
UPLOAD_KIND_CREATE: UploadKind
UPLOAD_KIND_PARAMETERS: UploadKind
UPLOAD_KIND_STATE: UploadKind
UPLOAD_KIND_GROUP: UploadKind
UPLOAD_KIND_EXTRAS: UploadKind

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("server_version", "max_chunk_bytes", "models", "unix_path", "http_url", "memory_path", "rank", "ranks", "joined_chunks")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    HTTP_URL_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PATH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    JOINED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    max_chunk_bytes: int
    models: _containers.RepeatedScalarFieldContainer[str]
    unix_path: str
    http_url: str
    memory_path: str
    rank: int
    ranks: int
    joined_chunks: bool
    def __init__(self, server_version: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., models: _Optional[_Iterable[str]] = ..., unix_path: _Optional[str] = ..., http_url: _Optional[str] = ..., memory_path: _Optional[str] = ..., rank: _Optional[int] = ..., ranks: _Optional[int] = ..., joined_chunks: bool = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("model", "worker", "takeover", "manifest", "model_uid", "epoch", "attempt", "process", "timeline", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TAKEOVER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    MODEL_UID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    worker: str
    takeover: bool
    manifest: _types_pb2.Manifest
    model_uid: bytes
    epoch: int
    attempt: int
    process: Process
    timeline: int
    version: int
    def __init__(self, model: _Optional[str] = ..., worker: _Optional[str] = ..., takeover: bool = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., model_uid: _Optional[bytes] = ..., epoch: _Optional[int] = ..., attempt: _Optional[int] = ..., process: _Optional[_Union[Process, _Mapping]] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class Process(_message.Message):
    __slots__ = ("host", "pid", "started")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    host: bytes
    pid: int
    started: int
    def __init__(self, host: _Optional[bytes] = ..., pid: _Optional[int] = ..., started: _Optional[int] = ...) -> None: ...

class JoinPart(_message.Message):
    __slots__ = ("part",)
    PART_FIELD_NUMBER: _ClassVar[int]
    part: bytes
    def __init__(self, part: _Optional[bytes] = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("member", "create")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    member: Membership
    create: CreationTicket
    def __init__(self, member: _Optional[_Union[Membership, _Mapping]] = ..., create: _Optional[_Union[CreationTicket, _Mapping]] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("identity", "version", "manifest_hash", "manifest", "groups", "receipts", "lease_s", "lead", "worker_state", "policy", "forgotten_epoch", "forgotten_sequence", "extras_version", "rolled_back", "shards")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    WORKER_STATE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FORGOTTEN_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLLED_BACK_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    identity: _types_pb2.Identity
    version: int
    manifest_hash: int
    manifest: _types_pb2.Manifest
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.GroupValues]
    receipts: _containers.RepeatedCompositeFieldContainer[_types_pb2.Receipt]
    lease_s: float
    lead: bool
    worker_state: bytes
    policy: str
    forgotten_epoch: int
    forgotten_sequence: int
    extras_version: int
    rolled_back: int
    shards: ShardMap
    def __init__(self, identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., version: _Optional[int] = ..., manifest_hash: _Optional[int] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.GroupValues, _Mapping]]] = ..., receipts: _Optional[_Iterable[_Union[_types_pb2.Receipt, _Mapping]]] = ..., lease_s: _Optional[float] = ..., lead: bool = ..., worker_state: _Optional[bytes] = ..., policy: _Optional[str] = ..., forgotten_epoch: _Optional[int] = ..., forgotten_sequence: _Optional[int] = ..., extras_version: _Optional[int] = ..., rolled_back: _Optional[int] = ..., shards: _Optional[_Union[ShardMap, _Mapping]] = ...) -> None: ...

class ShardMap(_message.Message):
    __slots__ = ("version", "world", "shards")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    world: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, version: _Optional[int] = ..., world: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("rank", "address", "manifest_hash", "unix_path")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    rank: int
    address: str
    manifest_hash: int
    unix_path: str
    def __init__(self, rank: _Optional[int] = ..., address: _Optional[str] = ..., manifest_hash: _Optional[int] = ..., unix_path: _Optional[str] = ...) -> None: ...

class CreationTicket(_message.Message):
    __slots__ = ("model", "worker", "ticket", "expires_s", "manifest", "shards")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_S_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    model: str
    worker: str
    ticket: int
    expires_s: float
    manifest: _types_pb2.Manifest
    shards: ShardMap
    def __init__(self, model: _Optional[str] = ..., worker: _Optional[str] = ..., ticket: _Optional[int] = ..., expires_s: _Optional[float] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., shards: _Optional[_Union[ShardMap, _Mapping]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("model", "identity")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("version", "lease_s", "map_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    lease_s: float
    map_version: int
    def __init__(self, version: _Optional[int] = ..., lease_s: _Optional[float] = ..., map_version: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("model", "identity", "edits", "worker_state", "undo", "attempt")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    WORKER_STATE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    edits: _containers.RepeatedCompositeFieldContainer[GroupEdit]
    worker_state: bytes
    undo: bool
    attempt: int
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., edits: _Optional[_Iterable[_Union[GroupEdit, _Mapping]]] = ..., worker_state: _Optional[bytes] = ..., undo: bool = ..., attempt: _Optional[int] = ...) -> None: ...

class PullExtrasRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ("ignored_edits",)
    IGNORED_EDITS_FIELD_NUMBER: _ClassVar[int]
    ignored_edits: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ignored_edits: _Optional[_Iterable[str]] = ...) -> None: ...

class PullOptions(_message.Message):
    __slots__ = ("have_version", "dtype", "region", "version", "joined_chunks")
    HAVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOINED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    have_version: int
    dtype: _types_pb2.DType
    region: int
    version: int
    joined_chunks: bool
    def __init__(self, have_version: _Optional[int] = ..., dtype: _Optional[_Union[_types_pb2.DType, str]] = ..., region: _Optional[int] = ..., version: _Optional[int] = ..., joined_chunks: bool = ...) -> None: ...

class GroupEdit(_message.Message):
    __slots__ = ("group", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _types_pb2.Hyperparameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_types_pb2.Hyperparameter, _Mapping]] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    group: int
    values: _containers.MessageMap[str, _types_pb2.Hyperparameter]
    def __init__(self, group: _Optional[int] = ..., values: _Optional[_Mapping[str, _types_pb2.Hyperparameter]] = ...) -> None: ...

class PushHeader(_message.Message):
    __slots__ = ("model", "identity", "base_version", "manifest_hash", "segments", "edits", "metrics", "worker_state", "samples", "pull", "region", "slot", "skip", "held_digest", "hold_s", "traceparent", "map_version")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WORKER_STATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    HELD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    base_version: int
    manifest_hash: int
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    edits: _containers.RepeatedCompositeFieldContainer[GroupEdit]
    metrics: _containers.ScalarMap[str, float]
    worker_state: bytes
    samples: float
    pull: PullOptions
    region: int
    slot: int
    skip: bool
    held_digest: int
    hold_s: float
    traceparent: str
    map_version: int
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., base_version: _Optional[int] = ..., manifest_hash: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ..., edits: _Optional[_Iterable[_Union[GroupEdit, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., worker_state: _Optional[bytes] = ..., samples: _Optional[float] = ..., pull: _Optional[_Union[PullOptions, _Mapping]] = ..., region: _Optional[int] = ..., slot: _Optional[int] = ..., skip: bool = ..., held_digest: _Optional[int] = ..., hold_s: _Optional[float] = ..., traceparent: _Optional[str] = ..., map_version: _Optional[int] = ...) -> None: ...

class PartDigest(_message.Message):
    __slots__ = ("rank", "digest")
    RANK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    digest: int
    def __init__(self, rank: _Optional[int] = ..., digest: _Optional[int] = ...) -> None: ...

class PushCommit(_message.Message):
    __slots__ = ("digest", "edits", "metrics", "worker_state", "samples", "parts")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    WORKER_STATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    digest: int
    edits: _containers.RepeatedCompositeFieldContainer[GroupEdit]
    metrics: _containers.ScalarMap[str, float]
    worker_state: bytes
    samples: float
    parts: _containers.RepeatedCompositeFieldContainer[PartDigest]
    def __init__(self, digest: _Optional[int] = ..., edits: _Optional[_Iterable[_Union[GroupEdit, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., worker_state: _Optional[bytes] = ..., samples: _Optional[float] = ..., parts: _Optional[_Iterable[_Union[PartDigest, _Mapping]]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "segment", "offset", "commit", "header_part", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    HEADER_PART_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: PushHeader
    segment: int
    offset: int
    commit: PushCommit
    header_part: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[PushHeader, _Mapping]] = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., commit: _Optional[_Union[PushCommit, _Mapping]] = ..., header_part: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: _types_pb2.Receipt
    def __init__(self, receipt: _Optional[_Union[_types_pb2.Receipt, _Mapping]] = ...) -> None: ...

class OpenRegionRequest(_message.Message):
    __slots__ = ("model", "identity", "manifest_hash", "push_dtype", "pull_dtype", "device_uuid")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    PUSH_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PULL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    manifest_hash: int
    push_dtype: _types_pb2.DType
    pull_dtype: _types_pb2.DType
    device_uuid: bytes
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., manifest_hash: _Optional[int] = ..., push_dtype: _Optional[_Union[_types_pb2.DType, str]] = ..., pull_dtype: _Optional[_Union[_types_pb2.DType, str]] = ..., device_uuid: _Optional[bytes] = ...) -> None: ...

class OpenRegionResponse(_message.Message):
    __slots__ = ("region", "token", "path", "slots", "slot_bytes", "answer_bytes", "device_uuid")
    REGION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    SLOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    region: int
    token: bytes
    path: str
    slots: int
    slot_bytes: int
    answer_bytes: int
    device_uuid: bytes
    def __init__(self, region: _Optional[int] = ..., token: _Optional[bytes] = ..., path: _Optional[str] = ..., slots: _Optional[int] = ..., slot_bytes: _Optional[int] = ..., answer_bytes: _Optional[int] = ..., device_uuid: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("model", "identity", "options", "timeline", "manifest_hash", "map_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    options: PullOptions
    timeline: int
    manifest_hash: int
    map_version: int
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., options: _Optional[_Union[PullOptions, _Mapping]] = ..., timeline: _Optional[int] = ..., manifest_hash: _Optional[int] = ..., map_version: _Optional[int] = ...) -> None: ...

class PullRowsRequest(_message.Message):
    __slots__ = ("model", "parameter", "ids", "dtype", "selections", "joined_chunks", "manifest_hash", "map_version", "read", "ranks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SELECTIONS_FIELD_NUMBER: _ClassVar[int]
    JOINED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    parameter: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    dtype: _types_pb2.DType
    selections: _containers.RepeatedCompositeFieldContainer[RowSelection]
    joined_chunks: bool
    manifest_hash: int
    map_version: int
    read: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, model: _Optional[str] = ..., parameter: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[_types_pb2.DType, str]] = ..., selections: _Optional[_Iterable[_Union[RowSelection, _Mapping]]] = ..., joined_chunks: bool = ..., manifest_hash: _Optional[int] = ..., map_version: _Optional[int] = ..., read: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class RowSelection(_message.Message):
    __slots__ = ("parameter", "ids")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    parameter: str
    ids: bytes
    def __init__(self, parameter: _Optional[str] = ..., ids: _Optional[bytes] = ...) -> None: ...

class PullStateRequest(_message.Message):
    __slots__ = ("model", "manifest_hash", "map_version", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    manifest_hash: int
    map_version: int
    version: int
    def __init__(self, model: _Optional[str] = ..., manifest_hash: _Optional[int] = ..., map_version: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class PullHeader(_message.Message):
    __slots__ = ("model_uid", "timeline", "version", "unchanged", "segments", "manifest_hash", "receipt", "groups", "steps", "manifest", "shared", "extras_version", "extras_bytes", "apart", "shards")
    MODEL_UID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_BYTES_FIELD_NUMBER: _ClassVar[int]
    APART_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    model_uid: bytes
    timeline: int
    version: int
    unchanged: bool
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    manifest_hash: int
    receipt: _types_pb2.Receipt
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.GroupValues]
    steps: _containers.RepeatedScalarFieldContainer[int]
    manifest: _types_pb2.Manifest
    shared: bool
    extras_version: int
    extras_bytes: int
    apart: bool
    shards: ShardMap
    def __init__(self, model_uid: _Optional[bytes] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., unchanged: bool = ..., segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ..., manifest_hash: _Optional[int] = ..., receipt: _Optional[_Union[_types_pb2.Receipt, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.GroupValues, _Mapping]]] = ..., steps: _Optional[_Iterable[int]] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., shared: bool = ..., extras_version: _Optional[int] = ..., extras_bytes: _Optional[int] = ..., apart: bool = ..., shards: _Optional[_Union[ShardMap, _Mapping]] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "segment", "offset", "header_part", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    HEADER_PART_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: PullHeader
    segment: int
    offset: int
    header_part: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[PullHeader, _Mapping]] = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., header_part: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("model", "kind", "ticket", "identity", "manifest", "segments", "steps", "groups", "force", "manifest_hash", "extras_bytes", "policy", "fresh", "extras_all", "map_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_BYTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_ALL_FIELD_NUMBER: _ClassVar[int]
    MAP_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    kind: UploadKind
    ticket: int
    identity: _types_pb2.Identity
    manifest: _types_pb2.Manifest
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    steps: _containers.RepeatedScalarFieldContainer[int]
    groups: _containers.RepeatedCompositeFieldContainer[_types_pb2.GroupValues]
    force: bool
    manifest_hash: int
    extras_bytes: int
    policy: str
    fresh: _containers.RepeatedScalarFieldContainer[int]
    extras_all: bool
    map_version: int
    def __init__(self, model: _Optional[str] = ..., kind: _Optional[_Union[UploadKind, str]] = ..., ticket: _Optional[int] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ..., steps: _Optional[_Iterable[int]] = ..., groups: _Optional[_Iterable[_Union[_types_pb2.GroupValues, _Mapping]]] = ..., force: bool = ..., manifest_hash: _Optional[int] = ..., extras_bytes: _Optional[int] = ..., policy: _Optional[str] = ..., fresh: _Optional[_Iterable[int]] = ..., extras_all: bool = ..., map_version: _Optional[int] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("header", "segment", "offset", "header_part", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    HEADER_PART_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    segment: int
    offset: int
    header_part: bytes
    payload: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., segment: _Optional[int] = ..., offset: _Optional[int] = ..., header_part: _Optional[bytes] = ..., payload: _Optional[bytes] = ...) -> None: ...

class UploadResponse(_message.Message):
    __slots__ = ("member", "version", "timeline", "extras_version")
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_VERSION_FIELD_NUMBER: _ClassVar[int]
    member: Membership
    version: int
    timeline: int
    extras_version: int
    def __init__(self, member: _Optional[_Union[Membership, _Mapping]] = ..., version: _Optional[int] = ..., timeline: _Optional[int] = ..., extras_version: _Optional[int] = ...) -> None: ...
