"""Requests with one field at, or beyond, what its limit allows: made of the descriptors, so no field is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as F
from google.protobuf.internal.encoder import _VarintBytes  # type: ignore[attr-defined]
from google.protobuf.message import Message

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import InvalidText, NumberOutOfRange, PushstepError, TooLong
from pushstep.proto.limits_pb2 import Limit, limit

LARGEST = {F.TYPE_UINT32: 2**32 - 1, F.TYPE_UINT64: 2**64 - 1, F.TYPE_FIXED64: 2**64 - 1}
FLOATS = (F.TYPE_DOUBLE, F.TYPE_FLOAT)
TEXTS = (F.TYPE_STRING, F.TYPE_BYTES)
SPECIAL = (math.nan, math.inf, -math.inf)
UNSHOWABLE = "a\x00b", "\x1b[31m", "line\nline", "\x85"
Refusal = tuple[Message, type[PushstepError]]


def request_kinds() -> list[type[Message]]:
    """What the service's methods take."""
    methods = pb.DESCRIPTOR.services_by_name["TrainingService"].methods
    return [getattr(pb, name) for name in sorted({method.input_type.name for method in methods})]


def is_map(field: Any) -> bool:
    return field.type == F.TYPE_MESSAGE and bool(field.message_type.GetOptions().map_entry)


@dataclass(frozen=True)
class Case:
    """One field of a kind of request, by the way to it."""

    kind: type[Message]
    path: tuple[Any, ...]

    def __str__(self) -> str:
        return ".".join(field.name for field in self.path)

    @property
    def field(self) -> Any:
        return self.path[-1]

    @property
    def limit(self) -> Limit:
        found: Limit = self.field.GetOptions().Extensions[limit]
        return found

    @property
    def named(self) -> str:
        """How the refusal begins."""
        return f"{self.field.containing_type.name}.{self.field.name}" if not self._in_map() else ""

    def _in_map(self) -> bool:
        return any(is_map(field) for field in self.path[:-1])

    def allowed(self, base: Message | None = None) -> Iterator[Message]:
        """Requests with this field at its limit; `base`: what the rest of the request is."""
        field, own = self.field, self.limit
        if is_map(field):
            if field.message_type.fields_by_name["value"].type in FLOATS:
                for value in [*SPECIAL, 1.0] if own.any else [own.least, own.most]:
                    request, at = self._request(base)
                    getattr(at, field.name)["k" * own.bytes] = value
                    yield request
        elif field.is_repeated and field.type == F.TYPE_MESSAGE:
            yield self._with_entries(base, 3)
        else:
            for value in self._values_allowed():
                yield self._with(base, value)

    def refused(self, base: Message | None = None) -> Iterator[Refusal]:
        """Requests with this field beyond its limit, and what each is refused with."""
        field, own = self.field, self.limit
        if field.is_repeated:
            yield self._with_entries(base, own.count + 1), TooLong
        if is_map(field):
            for key, expected in (("k" * (own.bytes + 1), TooLong), ("a\x00b", InvalidText)):
                request, at = self._request(base)
                entries = getattr(at, field.name)
                if field.message_type.fields_by_name["value"].message_type:
                    entries[key].SetInParent()
                else:
                    entries[key] = 1.0
                yield request, expected
        elif field.type != F.TYPE_MESSAGE:
            for value, expected in self._values_refused():
                yield self._with(base, value), expected

    def _values_allowed(self) -> list[Any]:
        own, kind = self.limit, self.field.type
        if kind in TEXTS:
            return ["x" * own.bytes if kind == F.TYPE_STRING else bytes(own.bytes)]
        if kind in FLOATS:
            return [*SPECIAL, 0.0] if own.any else [0.0, own.least, own.most]
        return [0, LARGEST[kind]] if own.any else [0, int(own.least), int(own.most)]

    def _values_refused(self) -> Iterator[tuple[Any, type[PushstepError]]]:
        own, kind = self.limit, self.field.type
        if kind == F.TYPE_STRING:
            yield "x" * (own.bytes + 1), TooLong
            yield "ä" * (own.bytes // 2 + 1), TooLong
            yield from ((text, InvalidText) for text in UNSHOWABLE if not own.any)
        elif kind == F.TYPE_BYTES:
            yield bytes(own.bytes + 1), TooLong
        elif kind in FLOATS and not own.any:
            beyond = [math.nextafter(own.most, math.inf), math.nextafter(own.least, -math.inf), -own.most]
            wrong = [value for value in beyond if value and not own.least <= value <= own.most]
            yield from ((value, NumberOutOfRange) for value in (*SPECIAL, *wrong))
        elif not own.any:
            yield from ((value, NumberOutOfRange) for value in (int(own.most) + 1, LARGEST[kind]))

    def _with(self, base: Message | None, value: Any) -> Message:
        request, at = self._request(base)
        if self.field.is_repeated:
            getattr(at, self.field.name).append(value)
        else:
            setattr(at, self.field.name, value)
        return request

    def _with_entries(self, base: Message | None, count: int) -> Message:
        request, at = self._request(base)
        at.MergeFromString(self._entries(count))
        return request

    def _entries(self, count: int) -> bytes:
        """So many entries of the field, as small as they can be, as they are on the wire."""
        field = self.field
        tag = _VarintBytes(field.number << 3 | 2)
        if is_map(field):
            keys = (b"\x0a" + _VarintBytes(len(key)) + key for key in (b"%x" % n for n in range(count)))
            return b"".join(tag + _VarintBytes(len(entry)) + entry for entry in keys)
        if field.type == F.TYPE_MESSAGE or field.type in TEXTS:
            return (tag + b"\x00") * count
        return tag + _VarintBytes(count) + bytes(count)

    def _request(self, base: Message | None) -> tuple[Message, Any]:
        """A request, and the message in it that has the field."""
        request = self.kind()
        if base is not None:
            request.CopyFrom(base)
        at: Any = request
        for field in self.path[:-1]:
            inner = getattr(at, field.name)
            if is_map(field):
                at = inner["k"]
            elif field.is_repeated:
                at = inner[0] if inner else inner.add()
            else:
                inner.SetInParent()
                at = inner
        return request, at


def cases(kind: type[Message]) -> Iterator[Case]:
    """Every field of a kind of request that has a limit, at whatever depth."""
    yield from _below(kind, kind.DESCRIPTOR, ())


def _below(kind: type[Message], descriptor: Any, path: tuple[Any, ...]) -> Iterator[Case]:
    for field in descriptor.fields:
        here = (*path, field)
        if field.type == F.TYPE_MESSAGE:
            if field.is_repeated:
                yield Case(kind, here)
            inner = field.message_type.fields_by_name["value"].message_type if is_map(field) else None
            below = inner if is_map(field) else field.message_type
            if below is not None:
                yield from _below(kind, below, here)
        elif field.type in TEXTS or field.type in FLOATS or field.type in LARGEST:
            yield Case(kind, here)
