"""What a request may hold: every number, text and length in it is checked here, once, before any use.

The limits stand in the .proto, as options of the fields (limits.proto), so callers in every language read them there.
The check of a message type is made from its descriptor at its first use. A number or a text without a limit is a
TypeError then, so a new field cannot be forgotten. The check runs for every message and every segment, so it reads all fields that
have a limit at once, and looks only at those that are not empty. Whether a number fits a model, such as a row id or an
arena's index, is checked by the code that knows the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from ..errors import InvalidText, NumberOutOfRange, TooLong
from ..limits_pb2 import Limit, limit

Check = Callable[[Any], None]
# What no text may hold, since it cannot be shown: control characters, and surrogates, which JSON can spell.
_UNSHOWABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_WHOLE: Final = frozenset(
    {
        FieldDescriptor.TYPE_UINT32,
        FieldDescriptor.TYPE_UINT64,
        FieldDescriptor.TYPE_FIXED32,
        FieldDescriptor.TYPE_FIXED64,
    }
)
_NUMBERS: Final = _WHOLE | {FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT}
_TEXTS: Final = frozenset({FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES})
# Code that looks up an enum's number finds its name or refuses it.
_UNLIMITED: Final = frozenset({FieldDescriptor.TYPE_BOOL, FieldDescriptor.TYPE_ENUM})

_checks: dict[Any, Check | None] = {}


def check(request: Message) -> None:
    """NumberOutOfRange, TooLong or InvalidText if a field of a request is outside its limit."""
    checked = check_of(request.DESCRIPTOR)
    if checked is not None:
        checked(request)


def check_text(what: str, text: str) -> None:
    """InvalidText if a text holds a character that cannot be shown. `what` names the text in the error."""
    if text.isascii() and text.isprintable():
        return
    found = _UNSHOWABLE.search(text)
    if found is not None:
        raise InvalidText(what=what, character=f"U+{ord(found[0]):04X}")


def check_of(kind: Any) -> Check | None:
    """The check of a message type, by its descriptor. TypeError if a field of it has no limit.

    None if it holds nothing to check.
    """
    if kind not in _checks:
        _checks[kind] = _whole_check(kind)
    return _checks[kind]


def limit_of(kind: type[Message], field: str) -> Limit:
    """The limit that the .proto states for a field."""
    return _limit_of(kind.DESCRIPTOR.fields_by_name[field])


def _limit_of(field: Any) -> Limit:
    found: Limit = field.GetOptions().Extensions[limit]
    return found


def _whole_check(kind: Any) -> Check | None:
    """The check of a whole message, or None if there is nothing to check."""
    plain: list[tuple[str, Check]] = []
    if_set: list[tuple[str, Callable[[Any], Any], Check]] = []
    for field in kind.fields:
        one = _field_check(field)
        if one is not None and _needs_presence(field):
            if_set.append((field.name, attrgetter(field.name), one))
        elif one is not None:
            plain.append((field.name, one))
    if not plain and not if_set:
        return None
    read, checks = _reader([name for name, _ in plain]), [one for _, one in plain]

    def check_message(message: Any) -> None:
        for value, one in zip(read(message), checks, strict=True):
            if value:
                one(value)
        for name, part, one in if_set:
            if message.HasField(name):
                one(part(message))

    return check_message


def _reader(names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    """What reads these fields of a message at once."""
    if len(names) > 1:
        return attrgetter(*names)
    return (lambda message: (getattr(message, names[0]),)) if names else (lambda message: ())


def _needs_presence(field: Any) -> bool:
    """True if an empty value may not mean that the field was left out: a message, or a number that 0 is beyond."""
    if field.is_repeated or not field.has_presence or field.type in _TEXTS:
        return False
    return field.type == FieldDescriptor.TYPE_MESSAGE or not _limit_of(field).least <= 0


def _field_check(field: Any) -> Check | None:
    """The check of a field's value: not empty, unless the field `_needs_presence`."""
    own = _limit_of(field)
    what = f"{field.containing_type.name}.{field.name}"
    if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        return _map_check(what, field, own)
    one = _value_check(what, field, own)
    return _repeated_check(what, one, _required(own.count, what)) if field.is_repeated else one


def _value_check(what: str, field: Any, own: Limit) -> Check | None:
    """The check of one value, or None if there is nothing to check."""
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return check_of(field.message_type)
    if field.type in _TEXTS:
        is_shown = field.type == FieldDescriptor.TYPE_STRING and not own.any
        return _text_check(what, _required(own.bytes, what), is_shown=is_shown)
    if field.type in _UNLIMITED or own.any:
        return None
    if field.type not in _NUMBERS:
        raise TypeError(f"{what} is of a type that requests do not have: use an unsigned one or double")
    return _number_check(what, own.least, _required(own.most, what), is_whole=field.type in _WHOLE)


def _number_check(what: str, least: float, most: float, *, is_whole: bool) -> Check:
    shown = [f"{bound:.0f}" if is_whole else f"{bound:g}" for bound in (least, most)]

    def check_number(value: float) -> None:
        if not least <= value <= most:  # also for NaN
            raise NumberOutOfRange(what=what, got=value, least=shown[0], most=shown[1])

    return check_number


def _text_check(what: str, most_bytes: int, *, is_shown: bool) -> Check:
    def check_length(value: str | bytes) -> None:
        length = len(value) if isinstance(value, bytes) or value.isascii() else len(value.encode())
        if length > most_bytes:
            raise TooLong(what=what, got=length, unit="bytes", most=most_bytes)

    def check_shown(value: str) -> None:
        if len(value) > most_bytes or not (value.isascii() and value.isprintable()):
            check_length(value)
            check_text(what, value)

    return check_shown if is_shown else check_length


def _repeated_check(what: str, one: Check | None, most: int) -> Check:
    def check_repeated(values: Any) -> None:
        _check_count(what, len(values), most)
        if one is not None:
            for value in values:
                one(value)

    return check_repeated


def _map_check(what: str, field: Any, own: Limit) -> Check:
    key = _text_check(what, _required(own.bytes, what), is_shown=True)
    one = _value_check(what, field.message_type.fields_by_name["value"], own)
    most = _required(own.count, what)

    def check_map(entries: Any) -> None:
        _check_count(what, len(entries), most)
        for entry in entries:
            key(entry)
            if one is not None:
                try:
                    one(entries[entry])
                except NumberOutOfRange as error:
                    raise NumberOutOfRange(**{**error.fields, "what": f"{what}[{entry!r}]"}) from None

    return check_map


def _check_count(what: str, got: int, most: int) -> None:
    if got > most:
        raise TooLong(what=what, got=got, unit="entries", most=most)


def _required(bound: Any, what: str) -> Any:
    if not bound:
        raise TypeError(f"{what} has no limit: state one in the .proto")
    return bound
