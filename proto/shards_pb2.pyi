from pushstep.proto import limits_pb2 as _limits_pb2
from pushstep.proto import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankError(_message.Message):
    __slots__ = ("code", "message", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class RankMessage(_message.Message):
    __slots__ = ("hello", "models", "staged", "stepped", "done", "failed", "sums", "alive", "asked")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    hello: RankHello
    models: RankModels
    staged: RankStaged
    stepped: RankStepped
    done: RankDone
    failed: RankError
    sums: RankSums
    alive: bool
    asked: RankAsked
    def __init__(self, hello: _Optional[_Union[RankHello, _Mapping]] = ..., models: _Optional[_Union[RankModels, _Mapping]] = ..., staged: _Optional[_Union[RankStaged, _Mapping]] = ..., stepped: _Optional[_Union[RankStepped, _Mapping]] = ..., done: _Optional[_Union[RankDone, _Mapping]] = ..., failed: _Optional[_Union[RankError, _Mapping]] = ..., sums: _Optional[_Union[RankSums, _Mapping]] = ..., alive: bool = ..., asked: _Optional[_Union[RankAsked, _Mapping]] = ...) -> None: ...

class RankHello(_message.Message):
    __slots__ = ("rank", "world", "build", "address", "unix_path")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UNIX_PATH_FIELD_NUMBER: _ClassVar[int]
    rank: int
    world: int
    build: str
    address: str
    unix_path: str
    def __init__(self, rank: _Optional[int] = ..., world: _Optional[int] = ..., build: _Optional[str] = ..., address: _Optional[str] = ..., unix_path: _Optional[str] = ...) -> None: ...

class RankModels(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[RankModel]
    def __init__(self, models: _Optional[_Iterable[_Union[RankModel, _Mapping]]] = ...) -> None: ...

class RankModel(_message.Message):
    __slots__ = ("model", "uid", "timeline", "version", "manifest_hash", "problem", "identity_timeline", "proven", "reaches")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_HASH_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_TIMELINE_FIELD_NUMBER: _ClassVar[int]
    PROVEN_FIELD_NUMBER: _ClassVar[int]
    REACHES_FIELD_NUMBER: _ClassVar[int]
    model: str
    uid: bytes
    timeline: int
    version: int
    manifest_hash: int
    problem: RankError
    identity_timeline: int
    proven: bool
    reaches: _containers.RepeatedCompositeFieldContainer[RankReach]
    def __init__(self, model: _Optional[str] = ..., uid: _Optional[bytes] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., manifest_hash: _Optional[int] = ..., problem: _Optional[_Union[RankError, _Mapping]] = ..., identity_timeline: _Optional[int] = ..., proven: bool = ..., reaches: _Optional[_Iterable[_Union[RankReach, _Mapping]]] = ...) -> None: ...

class RankReach(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class RankStaged(_message.Message):
    __slots__ = ("model", "identity", "digest", "sums", "fault")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    digest: int
    sums: RankSums
    fault: RankError
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., digest: _Optional[int] = ..., sums: _Optional[_Union[RankSums, _Mapping]] = ..., fault: _Optional[_Union[RankError, _Mapping]] = ...) -> None: ...

class RankSums(_message.Message):
    __slots__ = ("sums", "counts", "nonfinite", "reduce", "segments", "model", "problem")
    SUMS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    REDUCE_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    sums: _containers.RepeatedScalarFieldContainer[float]
    counts: _containers.RepeatedScalarFieldContainer[int]
    nonfinite: int
    reduce: int
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    model: str
    problem: RankError
    def __init__(self, sums: _Optional[_Iterable[float]] = ..., counts: _Optional[_Iterable[int]] = ..., nonfinite: _Optional[int] = ..., reduce: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ..., model: _Optional[str] = ..., problem: _Optional[_Union[RankError, _Mapping]] = ...) -> None: ...

class RankAsked(_message.Message):
    __slots__ = ("model", "read", "over")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    model: str
    read: int
    over: bool
    def __init__(self, model: _Optional[str] = ..., read: _Optional[int] = ..., over: bool = ...) -> None: ...

class RankStepped(_message.Message):
    __slots__ = ("model", "timeline", "version", "safe_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SAFE_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    timeline: int
    version: int
    safe_version: int
    def __init__(self, model: _Optional[str] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., safe_version: _Optional[int] = ...) -> None: ...

class RankDone(_message.Message):
    __slots__ = ("order", "problem", "snapshot", "digest", "steps", "figures")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    order: int
    problem: RankError
    snapshot: str
    digest: int
    steps: _containers.RepeatedCompositeFieldContainer[RankSteps]
    figures: RankFigures
    def __init__(self, order: _Optional[int] = ..., problem: _Optional[_Union[RankError, _Mapping]] = ..., snapshot: _Optional[str] = ..., digest: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[RankSteps, _Mapping]]] = ..., figures: _Optional[_Union[RankFigures, _Mapping]] = ...) -> None: ...

class RankSteps(_message.Message):
    __slots__ = ("model", "group", "steps")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    model: str
    group: int
    steps: int
    def __init__(self, model: _Optional[str] = ..., group: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class RankFigures(_message.Message):
    __slots__ = ("held_bytes", "held_limit_bytes", "staging_bytes", "staging_limit_bytes", "reading_bytes", "reading_limit_bytes", "memory_available_bytes", "memory_total_bytes", "pushes_staged", "steps", "step_s", "journal_records", "journal_s", "snapshot_created_s", "received_bytes", "sent_bytes", "device", "rates")
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    HELD_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGING_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    READING_BYTES_FIELD_NUMBER: _ClassVar[int]
    READING_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUSHES_STAGED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_RECORDS_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_S_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_CREATED_S_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RATES_FIELD_NUMBER: _ClassVar[int]
    held_bytes: int
    held_limit_bytes: int
    staging_bytes: int
    staging_limit_bytes: int
    reading_bytes: int
    reading_limit_bytes: int
    memory_available_bytes: int
    memory_total_bytes: int
    pushes_staged: int
    steps: int
    step_s: float
    journal_records: int
    journal_s: float
    snapshot_created_s: float
    received_bytes: int
    sent_bytes: int
    device: str
    rates: RankRates
    def __init__(self, held_bytes: _Optional[int] = ..., held_limit_bytes: _Optional[int] = ..., staging_bytes: _Optional[int] = ..., staging_limit_bytes: _Optional[int] = ..., reading_bytes: _Optional[int] = ..., reading_limit_bytes: _Optional[int] = ..., memory_available_bytes: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., pushes_staged: _Optional[int] = ..., steps: _Optional[int] = ..., step_s: _Optional[float] = ..., journal_records: _Optional[int] = ..., journal_s: _Optional[float] = ..., snapshot_created_s: _Optional[float] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., device: _Optional[str] = ..., rates: _Optional[_Union[RankRates, _Mapping]] = ...) -> None: ...

class RankRates(_message.Message):
    __slots__ = ("ingest_bytes_per_s", "step_elements_per_s", "age_s")
    class StepElementsPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    INGEST_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    STEP_ELEMENTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ingest_bytes_per_s: float
    step_elements_per_s: _containers.ScalarMap[str, float]
    age_s: float
    def __init__(self, ingest_bytes_per_s: _Optional[float] = ..., step_elements_per_s: _Optional[_Mapping[str, float]] = ..., age_s: _Optional[float] = ...) -> None: ...

class RankOrder(_message.Message):
    __slots__ = ("order", "welcome", "create", "commit_creation", "withdraw", "ticket", "drop", "publish", "reduce", "delete", "snapshot", "close", "serve", "alive", "durability", "hooks", "meet", "report", "export", "read")
    ORDER_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    COMMIT_CREATION_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_FIELD_NUMBER: _ClassVar[int]
    REDUCE_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    SERVE_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    HOOKS_FIELD_NUMBER: _ClassVar[int]
    MEET_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    EXPORT_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    order: int
    welcome: RankWelcome
    create: RankCreate
    commit_creation: RankCommitCreation
    withdraw: RankWithdraw
    ticket: RankTicket
    drop: RankDrop
    publish: RankPublish
    reduce: RankReduce
    delete: RankDelete
    snapshot: RankSnapshot
    close: bool
    serve: RankServe
    alive: bool
    durability: RankDurability
    hooks: RankHooks
    meet: RankMeet
    report: RankReport
    export: RankExport
    read: RankRead
    def __init__(self, order: _Optional[int] = ..., welcome: _Optional[_Union[RankWelcome, _Mapping]] = ..., create: _Optional[_Union[RankCreate, _Mapping]] = ..., commit_creation: _Optional[_Union[RankCommitCreation, _Mapping]] = ..., withdraw: _Optional[_Union[RankWithdraw, _Mapping]] = ..., ticket: _Optional[_Union[RankTicket, _Mapping]] = ..., drop: _Optional[_Union[RankDrop, _Mapping]] = ..., publish: _Optional[_Union[RankPublish, _Mapping]] = ..., reduce: _Optional[_Union[RankReduce, _Mapping]] = ..., delete: _Optional[_Union[RankDelete, _Mapping]] = ..., snapshot: _Optional[_Union[RankSnapshot, _Mapping]] = ..., close: bool = ..., serve: _Optional[_Union[RankServe, _Mapping]] = ..., alive: bool = ..., durability: _Optional[_Union[RankDurability, _Mapping]] = ..., hooks: _Optional[_Union[RankHooks, _Mapping]] = ..., meet: _Optional[_Union[RankMeet, _Mapping]] = ..., report: _Optional[_Union[RankReport, _Mapping]] = ..., export: _Optional[_Union[RankExport, _Mapping]] = ..., read: _Optional[_Union[RankRead, _Mapping]] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("rates",)
    RATES_FIELD_NUMBER: _ClassVar[int]
    rates: bool
    def __init__(self, rates: bool = ...) -> None: ...

class RankWelcome(_message.Message):
    __slots__ = ("world", "build")
    WORLD_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    world: int
    build: str
    def __init__(self, world: _Optional[int] = ..., build: _Optional[str] = ...) -> None: ...

class RankServe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankCreate(_message.Message):
    __slots__ = ("model", "ticket", "manifest", "uid")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    model: str
    ticket: int
    manifest: _types_pb2.Manifest
    uid: bytes
    def __init__(self, model: _Optional[str] = ..., ticket: _Optional[int] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ..., uid: _Optional[bytes] = ...) -> None: ...

class RankCommitCreation(_message.Message):
    __slots__ = ("model", "ticket", "durability")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    model: str
    ticket: int
    durability: str
    def __init__(self, model: _Optional[str] = ..., ticket: _Optional[int] = ..., durability: _Optional[str] = ...) -> None: ...

class RankWithdraw(_message.Message):
    __slots__ = ("model", "ticket")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    model: str
    ticket: int
    def __init__(self, model: _Optional[str] = ..., ticket: _Optional[int] = ...) -> None: ...

class RankTicket(_message.Message):
    __slots__ = ("model", "uid", "timeline", "ticket", "by_rows", "reduce")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    BY_ROWS_FIELD_NUMBER: _ClassVar[int]
    REDUCE_FIELD_NUMBER: _ClassVar[int]
    model: str
    uid: bytes
    timeline: int
    ticket: _types_pb2.Ticket
    by_rows: _containers.RepeatedScalarFieldContainer[int]
    reduce: int
    def __init__(self, model: _Optional[str] = ..., uid: _Optional[bytes] = ..., timeline: _Optional[int] = ..., ticket: _Optional[_Union[_types_pb2.Ticket, _Mapping]] = ..., by_rows: _Optional[_Iterable[int]] = ..., reduce: _Optional[int] = ...) -> None: ...

class RankDrop(_message.Message):
    __slots__ = ("model", "identity", "receipt", "error")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    model: str
    identity: _types_pb2.Identity
    receipt: _types_pb2.Receipt
    error: RankError
    def __init__(self, model: _Optional[str] = ..., identity: _Optional[_Union[_types_pb2.Identity, _Mapping]] = ..., receipt: _Optional[_Union[_types_pb2.Receipt, _Mapping]] = ..., error: _Optional[_Union[RankError, _Mapping]] = ...) -> None: ...

class RankPublish(_message.Message):
    __slots__ = ("model", "timeline", "version", "dtype", "have_version", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HAVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    timeline: int
    version: int
    dtype: _types_pb2.DType
    have_version: int
    state: bool
    def __init__(self, model: _Optional[str] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., dtype: _Optional[_Union[_types_pb2.DType, str]] = ..., have_version: _Optional[int] = ..., state: bool = ...) -> None: ...

class RankRead(_message.Message):
    __slots__ = ("model", "read")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    model: str
    read: int
    def __init__(self, model: _Optional[str] = ..., read: _Optional[int] = ...) -> None: ...

class RankReduce(_message.Message):
    __slots__ = ("model", "reduce", "contributions", "divisor")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REDUCE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    DIVISOR_FIELD_NUMBER: _ClassVar[int]
    model: str
    reduce: int
    contributions: _containers.RepeatedCompositeFieldContainer[_types_pb2.Contribution]
    divisor: float
    def __init__(self, model: _Optional[str] = ..., reduce: _Optional[int] = ..., contributions: _Optional[_Iterable[_Union[_types_pb2.Contribution, _Mapping]]] = ..., divisor: _Optional[float] = ...) -> None: ...

class RankDelete(_message.Message):
    __slots__ = ("model", "uid")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    model: str
    uid: bytes
    def __init__(self, model: _Optional[str] = ..., uid: _Optional[bytes] = ...) -> None: ...

class RankSnapshot(_message.Message):
    __slots__ = ("model", "version", "automatic", "committed")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AUTOMATIC_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    automatic: bool
    committed: bool
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., automatic: bool = ..., committed: bool = ...) -> None: ...

class RankExport(_message.Message):
    __slots__ = ("model", "snapshot", "state", "averages", "parameter")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AVERAGES_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    model: str
    snapshot: str
    state: bool
    averages: _containers.RepeatedCompositeFieldContainer[RankAverage]
    parameter: int
    def __init__(self, model: _Optional[str] = ..., snapshot: _Optional[str] = ..., state: bool = ..., averages: _Optional[_Iterable[_Union[RankAverage, _Mapping]]] = ..., parameter: _Optional[int] = ...) -> None: ...

class RankAverage(_message.Message):
    __slots__ = ("hook", "groups")
    HOOK_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    hook: str
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hook: _Optional[str] = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...

class RankContent(_message.Message):
    __slots__ = ("rank", "order", "timeline", "version", "content", "digest")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    order: int
    timeline: int
    version: int
    content: bytes
    digest: int
    def __init__(self, rank: _Optional[int] = ..., order: _Optional[int] = ..., timeline: _Optional[int] = ..., version: _Optional[int] = ..., content: _Optional[bytes] = ..., digest: _Optional[int] = ...) -> None: ...

class RankTaken(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankDurability(_message.Message):
    __slots__ = ("model", "settings")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    model: str
    settings: str
    def __init__(self, model: _Optional[str] = ..., settings: _Optional[str] = ...) -> None: ...

class RankHooks(_message.Message):
    __slots__ = ("model", "hooks")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    HOOKS_FIELD_NUMBER: _ClassVar[int]
    model: str
    hooks: str
    def __init__(self, model: _Optional[str] = ..., hooks: _Optional[str] = ...) -> None: ...

class RankMeet(_message.Message):
    __slots__ = ("goals",)
    GOALS_FIELD_NUMBER: _ClassVar[int]
    goals: _containers.RepeatedCompositeFieldContainer[RankGoal]
    def __init__(self, goals: _Optional[_Iterable[_Union[RankGoal, _Mapping]]] = ...) -> None: ...

class RankGoal(_message.Message):
    __slots__ = ("model", "version", "timeline", "refused", "aside")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    ASIDE_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    timeline: int
    refused: RankError
    aside: bool
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., timeline: _Optional[int] = ..., refused: _Optional[_Union[RankError, _Mapping]] = ..., aside: bool = ...) -> None: ...

class RankedModel(_message.Message):
    __slots__ = ("world", "rank", "manifest")
    WORLD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    world: int
    rank: int
    manifest: _types_pb2.Manifest
    def __init__(self, world: _Optional[int] = ..., rank: _Optional[int] = ..., manifest: _Optional[_Union[_types_pb2.Manifest, _Mapping]] = ...) -> None: ...
