"""Lists a page at a time: `limit`, `cursor`, and `next`, the cursor of the page behind.

A cursor holds the key of the last entry shown and no position, so what is inserted or removed meanwhile makes no other entry
come twice or not at all.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Annotated, Any, Final, TypeVar

from fastapi import Query

from pushstep.proto.errors import InvalidSettings

# A name of 1,000 bytes, each escaped in JSON, in base64.
LONGEST_CURSOR: Final = 9000
LONGEST_KEY: Final = 4000
Cursor = Annotated[
    str | None,
    Query(max_length=LONGEST_CURSOR, description="`next` of the page before; without it the first page"),
]
T = TypeVar("T")
K = TypeVar("K")


def cursor_of(kind: str, key: Any) -> str:
    """The cursor behind the entry of a key, in lists of this kind."""
    return base64.urlsafe_b64encode(json.dumps([kind, key]).encode()).rstrip(b"=").decode()


def key_in(cursor: str | None, kind: str, of: type[K]) -> K | None:
    """The key in a cursor; None without one. InvalidSettings if no list of this kind has given it."""
    if cursor is None:
        return None
    try:
        found = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        found = None
    is_one = isinstance(found, list) and len(found) == 2 and found[0] == kind and _is_key(found[1], of)
    if not is_one:
        raise InvalidSettings(problem="cursor: it is not the `next` of a page of this list")
    key: K = found[1]
    return key


def _is_key(found: Any, of: type) -> bool:
    """True for a key of this type; a list's entries are texts."""
    is_one = type(found) is of and len(str(found)) <= LONGEST_KEY
    return is_one and (not isinstance(found, list) or all(isinstance(entry, str) for entry in found))


def page_of(
    entries: Iterable[T], limit: int, kind: str, key: Callable[[T], Any]
) -> tuple[list[T], str | None]:
    """The first `limit` entries, and the cursor behind them; None if no further entry follows."""
    found = list(islice(entries, limit + 1))
    shown = found[:limit]
    return shown, cursor_of(kind, key(shown[-1])) if len(found) > limit else None
