from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
LIMIT_FIELD_NUMBER: _ClassVar[int]
limit: _descriptor.FieldDescriptor

class Limit(_message.Message):
    __slots__ = ("least", "most", "bytes", "count", "any")
    LEAST_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    ANY_FIELD_NUMBER: _ClassVar[int]
    least: float
    most: float
    bytes: int
    count: int
    any: bool
    def __init__(self, least: _Optional[float] = ..., most: _Optional[float] = ..., bytes: _Optional[int] = ..., count: _Optional[int] = ..., any: bool = ...) -> None: ...
