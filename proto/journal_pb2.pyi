from pushstep.proto import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalRecord(_message.Message):
    __slots__ = ("timeline", "version", "step", "failure", "values", "extras", "outcomes", "changed")
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    timeline: int
    version: int
    step: JournalStep
    failure: JournalFailure
    values: JournalValues
    extras: JournalExtras
    outcomes: _containers.RepeatedCompositeFieldContainer[JournalOutcome]
    changed: bytes
    def __init__(self, timeline: _Optional[int] = ..., version: _Optional[int] = ..., step: _Optional[_Union[JournalStep, _Mapping]] = ..., failure: _Optional[_Union[JournalFailure, _Mapping]] = ..., values: _Optional[_Union[JournalValues, _Mapping]] = ..., extras: _Optional[_Union[JournalExtras, _Mapping]] = ..., outcomes: _Optional[_Iterable[_Union[JournalOutcome, _Mapping]]] = ..., changed: _Optional[bytes] = ...) -> None: ...

class JournalStep(_message.Message):
    __slots__ = ("ticket", "gradients")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    ticket: _types_pb2.Ticket
    gradients: _containers.RepeatedCompositeFieldContainer[JournalGradient]
    def __init__(self, ticket: _Optional[_Union[_types_pb2.Ticket, _Mapping]] = ..., gradients: _Optional[_Iterable[_Union[JournalGradient, _Mapping]]] = ...) -> None: ...

class JournalGradient(_message.Message):
    __slots__ = ("segments",)
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    def __init__(self, segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ...) -> None: ...

class JournalFailure(_message.Message):
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

class JournalValues(_message.Message):
    __slots__ = ("segments", "fresh")
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    segments: _containers.RepeatedCompositeFieldContainer[_types_pb2.Segment]
    fresh: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, segments: _Optional[_Iterable[_Union[_types_pb2.Segment, _Mapping]]] = ..., fresh: _Optional[_Iterable[int]] = ...) -> None: ...

class JournalExtras(_message.Message):
    __slots__ = ("file_bytes", "all")
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    file_bytes: int
    all: bool
    def __init__(self, file_bytes: _Optional[int] = ..., all: bool = ...) -> None: ...

class JournalOutcome(_message.Message):
    __slots__ = ("receipt", "digest", "error", "worker_state", "refused_in_row")
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WORKER_STATE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_IN_ROW_FIELD_NUMBER: _ClassVar[int]
    receipt: _types_pb2.Receipt
    digest: int
    error: JournalFailure
    worker_state: bytes
    refused_in_row: int
    def __init__(self, receipt: _Optional[_Union[_types_pb2.Receipt, _Mapping]] = ..., digest: _Optional[int] = ..., error: _Optional[_Union[JournalFailure, _Mapping]] = ..., worker_state: _Optional[bytes] = ..., refused_in_row: _Optional[int] = ...) -> None: ...
