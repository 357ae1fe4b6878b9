"""Settings of operators, workers and snapshots: JSON, read strictly into pydantic models.

Numbers are finite and have a range. Texts have a largest length. No value is converted: neither "1e3" nor 1.0 is a
whole number, and neither "yes" nor 1 is a flag. JSON that is ambiguous or cannot be shown is refused: names that come twice,
NaN and infinity (which JSON does not have), numbers of thousands of digits, unlimited nesting, and control characters and
lone surrogates in texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pushstep.proto.errors import InvalidRequest, InvalidSettings
from pushstep.proto.wire.limits import check_text

# The largest whole number that every JSON reader represents exactly.
LARGEST_WHOLE: Final = 2**53
LARGEST_S: Final = 1e9
# Limit for one whole policy or gate as JSON.
MAX_SETTINGS_BYTES: Final = 64 << 10
MAX_DEPTH: Final = 32
# Limit for one object or list. A policy may name every param group that a model may have. The error text describes each
# invalid entry, which takes 15 us.
MAX_ENTRIES: Final = 5000


Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_WHOLE)]
Seconds = Annotated[float, Field(gt=0, le=LARGEST_S)]
# Any finite number. The field that uses it sets the range.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# The rule of limits.check_text. `read_json` has refused lone surrogates already.
Text = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class Settings(BaseModel):
    """Base of all settings. An unknown field is refused, and no value is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


S = TypeVar("S", bound=BaseModel)


def read(
    kind: type[S],
    values: Mapping[str, Any],
    what: str,
    error: type[InvalidRequest] = InvalidSettings,
    most_bytes: int = MAX_SETTINGS_BYTES,
) -> S:
    """Validate `values`, as parsed from JSON, as settings of `kind`.

    Raises `error` with the problems, or if they take more than `most_bytes` as JSON.
    """
    text = json.dumps(values)
    if len(text) > most_bytes:
        raise error(problem=f"{what}: at most {most_bytes} bytes, not {len(text)}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as invalid:
        raise error(problem=f"{what}: {problems(invalid.errors())}") from invalid


def problems(found: Sequence[Mapping[str, Any]], whole: str = "", most: int | None = None) -> str:
    """What pydantic's `errors()` found, in one line: the place and the problem of each, at most `most` of them.

    `whole` is the place of a problem of all fields together.
    """
    shown = [f"{'.'.join(map(str, each['loc'])) or whole}: {each['msg']}" for each in found[:most]]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def read_json(text: str | bytes) -> Any:
    """Parse a JSON text. InvalidSettings or InvalidText if it is refused."""
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # deep nesting raises RecursionError
        raise InvalidSettings(problem="what was sent is not JSON") from error
    _check(found)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidSettings(problem=f"{name[:50]!r} is given twice")
            seen.add(name)
    return found


def _refuse(constant: str) -> NoReturn:
    raise InvalidSettings(problem=f"{constant} is not JSON")


def _check(found: Any) -> None:
    """Check every value, level by level. With recursion the input would choose the depth of the calls."""
    level = [found]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)) and len(value) > MAX_ENTRIES:
                raise InvalidSettings(problem=f"an object or a list has more than {MAX_ENTRIES} entries")
            if isinstance(value, str):
                check_text("a text", value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise InvalidSettings(problem="a number is larger than a float64 can be")
            elif isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise InvalidSettings(problem=f"what was sent is nested more than {MAX_DEPTH} deep")
