from pushstep.proto import limits_pb2 as _limits_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_FLOAT64: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_INT8: _ClassVar[DType]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_APPLIED: _ClassVar[Outcome]
    OUTCOME_SKIPPED: _ClassVar[Outcome]
    OUTCOME_DROPPED_LATE: _ClassVar[Outcome]
    OUTCOME_TOO_STALE: _ClassVar[Outcome]
    OUTCOME_REJECTED: _ClassVar[Outcome]
    OUTCOME_SUPERSEDED: _ClassVar[Outcome]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_APPLIED: _ClassVar[Durability]
    DURABILITY_EVERYSEC: _ClassVar[Durability]
    DURABILITY_DURABLE: _ClassVar[Durability]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_FLOAT64: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
DTYPE_INT8: DType
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_APPLIED: Outcome
OUTCOME_SKIPPED: Outcome
OUTCOME_DROPPED_LATE: Outcome
OUTCOME_TOO_STALE: Outcome
OUTCOME_REJECTED: Outcome
OUTCOME_SUPERSEDED: Outcome
DURABILITY_UNSPECIFIED: Durability
DURABILITY_APPLIED: Durability
DURABILITY_EVERYSEC: Durability
DURABILITY_DURABLE: Durability

class Hyperparameter(_message.Message):
    __slots__ = ("number", "flag")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FLAG_FIELD_NUMBER: _ClassVar[int]
    number: float
    flag: bool
    def __init__(self, number: _Optional[float] = ..., flag: bool = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape", "dtype", "group", "arena", "offset", "aliases", "whole_rows", "first_row")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ARENA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    WHOLE_ROWS_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: DType
    group: int
    arena: int
    offset: int
    aliases: _containers.RepeatedScalarFieldContainer[str]
    whole_rows: int
    first_row: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[_Union[DType, str]] = ..., group: _Optional[int] = ..., arena: _Optional[int] = ..., offset: _Optional[int] = ..., aliases: _Optional[_Iterable[str]] = ..., whole_rows: _Optional[int] = ..., first_row: _Optional[int] = ...) -> None: ...

class ParamGroup(_message.Message):
    __slots__ = ("rule", "optimizer", "values")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Hyperparameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Hyperparameter, _Mapping]] = ...) -> None: ...
    RULE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    rule: str
    optimizer: int
    values: _containers.MessageMap[str, Hyperparameter]
    def __init__(self, rule: _Optional[str] = ..., optimizer: _Optional[int] = ..., values: _Optional[_Mapping[str, Hyperparameter]] = ...) -> None: ...

class Arena(_message.Message):
    __slots__ = ("group", "dtype", "elements")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    group: int
    dtype: DType
    elements: int
    def __init__(self, group: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., elements: _Optional[int] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("parameters", "groups", "arenas", "part_bytes")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    ARENAS_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    groups: _containers.RepeatedCompositeFieldContainer[ParamGroup]
    arenas: _containers.RepeatedCompositeFieldContainer[Arena]
    part_bytes: int
    def __init__(self, parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[ParamGroup, _Mapping]]] = ..., arenas: _Optional[_Iterable[_Union[Arena, _Mapping]]] = ..., part_bytes: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("arena", "start", "stop", "dtype", "rows", "state", "elements", "parameter")
    ARENA_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    arena: int
    start: int
    stop: int
    dtype: DType
    rows: int
    state: str
    elements: int
    parameter: int
    def __init__(self, arena: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., rows: _Optional[int] = ..., state: _Optional[str] = ..., elements: _Optional[int] = ..., parameter: _Optional[int] = ...) -> None: ...

class Identity(_message.Message):
    __slots__ = ("model_uid", "timeline", "worker", "epoch", "sequence")
    MODEL_UID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    model_uid: bytes
    timeline: int
    worker: str
    epoch: int
    sequence: int
    def __init__(self, model_uid: _Optional[bytes] = ..., timeline: _Optional[int] = ..., worker: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class GroupValues(_message.Message):
    __slots__ = ("group", "values", "effective_lr")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Hyperparameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Hyperparameter, _Mapping]] = ...) -> None: ...
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_LR_FIELD_NUMBER: _ClassVar[int]
    group: int
    values: _containers.MessageMap[str, Hyperparameter]
    effective_lr: float
    def __init__(self, group: _Optional[int] = ..., values: _Optional[_Mapping[str, Hyperparameter]] = ..., effective_lr: _Optional[float] = ...) -> None: ...

class ServerTimes(_message.Message):
    __slots__ = ("receive_s", "queue_s", "wait_s", "step_s", "publish_s")
    RECEIVE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    PUBLISH_S_FIELD_NUMBER: _ClassVar[int]
    receive_s: float
    queue_s: float
    wait_s: float
    step_s: float
    publish_s: float
    def __init__(self, receive_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., step_s: _Optional[float] = ..., publish_s: _Optional[float] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("outcome", "reason", "identity", "version", "staleness", "gradient_norm", "clip_factor", "groups", "ignored_edits", "lead", "durability", "times", "duplicates", "contributors", "lr_scale", "step_norm", "notes", "policy", "missing_metrics", "durable_version")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_EDITS_FIELD_NUMBER: _ClassVar[int]
    LEAD_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    LR_SCALE_FIELD_NUMBER: _ClassVar[int]
    STEP_NORM_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MISSING_METRICS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    outcome: Outcome
    reason: str
    identity: Identity
    version: int
    staleness: int
    gradient_norm: float
    clip_factor: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupValues]
    ignored_edits: _containers.RepeatedScalarFieldContainer[str]
    lead: bool
    durability: Durability
    times: ServerTimes
    duplicates: int
    contributors: _containers.RepeatedScalarFieldContainer[str]
    lr_scale: float
    step_norm: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    policy: str
    missing_metrics: _containers.RepeatedScalarFieldContainer[str]
    durable_version: int
    def __init__(self, outcome: _Optional[_Union[Outcome, str]] = ..., reason: _Optional[str] = ..., identity: _Optional[_Union[Identity, _Mapping]] = ..., version: _Optional[int] = ..., staleness: _Optional[int] = ..., gradient_norm: _Optional[float] = ..., clip_factor: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., ignored_edits: _Optional[_Iterable[str]] = ..., lead: bool = ..., durability: _Optional[_Union[Durability, str]] = ..., times: _Optional[_Union[ServerTimes, _Mapping]] = ..., duplicates: _Optional[int] = ..., contributors: _Optional[_Iterable[str]] = ..., lr_scale: _Optional[float] = ..., step_norm: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., policy: _Optional[str] = ..., missing_metrics: _Optional[_Iterable[str]] = ..., durable_version: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("identity", "version", "factor", "lr_scale", "groups", "contributions", "divisor", "frozen", "operations", "averages")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    LR_SCALE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    DIVISOR_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    AVERAGES_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    version: int
    factor: float
    lr_scale: float
    groups: _containers.RepeatedCompositeFieldContainer[GroupValues]
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    divisor: float
    frozen: _containers.RepeatedScalarFieldContainer[int]
    operations: _containers.RepeatedCompositeFieldContainer[GradientOperation]
    averages: _containers.RepeatedCompositeFieldContainer[ParameterAverage]
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., version: _Optional[int] = ..., factor: _Optional[float] = ..., lr_scale: _Optional[float] = ..., groups: _Optional[_Iterable[_Union[GroupValues, _Mapping]]] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., divisor: _Optional[float] = ..., frozen: _Optional[_Iterable[int]] = ..., operations: _Optional[_Iterable[_Union[GradientOperation, _Mapping]]] = ..., averages: _Optional[_Iterable[_Union[ParameterAverage, _Mapping]]] = ...) -> None: ...

class GradientOperation(_message.Message):
    __slots__ = ("clip_value", "clip_grad_norm", "global_clipnorm", "clipnorm", "centralize", "noise", "clip_by_norm")
    CLIP_VALUE_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_CLIPNORM_FIELD_NUMBER: _ClassVar[int]
    CLIPNORM_FIELD_NUMBER: _ClassVar[int]
    CENTRALIZE_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    CLIP_BY_NORM_FIELD_NUMBER: _ClassVar[int]
    clip_value: float
    clip_grad_norm: float
    global_clipnorm: float
    clipnorm: float
    centralize: bool
    noise: GradientNoise
    clip_by_norm: ClipByNorm
    def __init__(self, clip_value: _Optional[float] = ..., clip_grad_norm: _Optional[float] = ..., global_clipnorm: _Optional[float] = ..., clipnorm: _Optional[float] = ..., centralize: bool = ..., noise: _Optional[_Union[GradientNoise, _Mapping]] = ..., clip_by_norm: _Optional[_Union[ClipByNorm, _Mapping]] = ...) -> None: ...

class ClipByNorm(_message.Message):
    __slots__ = ("max_norm", "norm_type")
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    NORM_TYPE_FIELD_NUMBER: _ClassVar[int]
    max_norm: float
    norm_type: float
    def __init__(self, max_norm: _Optional[float] = ..., norm_type: _Optional[float] = ...) -> None: ...

class GradientNoise(_message.Message):
    __slots__ = ("stddev", "seed")
    STDDEV_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    stddev: float
    seed: int
    def __init__(self, stddev: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class ParameterAverage(_message.Message):
    __slots__ = ("hook", "momentum", "overwrite", "groups")
    HOOK_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    hook: str
    momentum: float
    overwrite: bool
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hook: _Optional[str] = ..., momentum: _Optional[float] = ..., overwrite: bool = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("identity", "weight")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    identity: Identity
    weight: float
    def __init__(self, identity: _Optional[_Union[Identity, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("device_uuid", "handle", "size_bytes")
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_uuid: bytes
    handle: bytes
    size_bytes: int
    def __init__(self, device_uuid: _Optional[bytes] = ..., handle: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...
