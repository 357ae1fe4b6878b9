"""Settings as operators, workers and snapshots hold them: JSON, read strictly into a model of what is allowed.

Numbers are finite and have a range, texts a length, and nothing stands for something else: neither "1e3" nor 1.0 for a
whole number, neither "yes" nor 1 for a flag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pushstep.proto.errors import InvalidRequest, InvalidSettings

# The largest that every reader of JSON takes for what it is.
LARGEST_WHOLE: Final = 2**53
LARGEST_S: Final = 1e9
# Of a whole policy, or gate, as JSON.
MAX_SETTINGS_BYTES: Final = 64 << 10


Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
Positive = Annotated[int, Field(ge=1, le=LARGEST_WHOLE)]
Seconds = Annotated[float, Field(gt=0, le=LARGEST_S)]
# Finite, whatever else it may be: whoever uses it knows its range.
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# As limits.check_text has it; halves of characters are in no JSON that was read.
Text = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]


class Settings(BaseModel):
    """Base of whatever an operator sets."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


S = TypeVar("S", bound=BaseModel)


def read(
    kind: type[S],
    values: Mapping[str, Any],
    what: str,
    error: type[InvalidRequest] = InvalidSettings,
    most_bytes: int = MAX_SETTINGS_BYTES,
) -> S:
    """`values`, as JSON has them, as settings. `error`, with what is wrong, if they are none."""
    text = json.dumps(values)
    if len(text) > most_bytes:
        raise error(problem=f"{what}: at most {most_bytes} bytes, not {len(text)}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as invalid:
        raise error(problem=f"{what}: {problems(invalid)}") from invalid


def problems(invalid: ValidationError) -> str:
    """What is wrong, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in invalid.errors())
