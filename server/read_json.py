"""JSON as it comes from outside: what has two meanings, or none that can be shown, is refused.

Names that come twice, NaN and infinity, which JSON does not have, numbers of thousands of digits, nesting without end,
control characters and halves of characters in texts.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final, NoReturn

from pushstep.proto.errors import InvalidSettings
from pushstep.proto.limits import check_text

MAX_DEPTH: Final = 32
# Of an object or a list: a policy may name every param group that a model may have. What is wrong with each entry is
# put into words, at 15 us each.
MAX_ENTRIES: Final = 5000


def read_json(text: str | bytes) -> Any:
    """What a JSON text holds. InvalidSettings or InvalidText."""
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # the latter is how deep nesting ends
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
    """Look at every text, level by level: a function that calls itself would end where the nesting wants it to."""
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
