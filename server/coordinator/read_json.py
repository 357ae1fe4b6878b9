"""Reads JSON from outside strictly: it refuses what is ambiguous and what cannot be shown.

Refused are names that come twice, NaN and infinity (which JSON does not have), numbers of thousands of digits,
unlimited nesting, and control characters and lone surrogates in texts.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

from pushstep.proto.errors import InvalidSettings
from pushstep.proto.wire.limits import check_text

MAX_DEPTH: Final = 32
# Limit for one object or list. A policy may name every param group that a model may have. The error text describes each
# invalid entry, which takes 15 us.
MAX_ENTRIES: Final = 5000


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
