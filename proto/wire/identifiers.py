"""Names of models and workers, which stand in URLs, file names and logs."""

from __future__ import annotations

import re
from typing import Final

from ..errors import InvalidName

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(name: object) -> bool:
    """Whether `name` is valid for a model or a worker."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """`name` if it is valid, else InvalidName. `what` says in the message what it names."""
    if not is_name(name):
        raise InvalidName(name=str(name)[:200], what=what)
    return name
