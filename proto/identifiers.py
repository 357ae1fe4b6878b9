"""Names of models and workers: words of a path, a file's name and a log at once."""

from __future__ import annotations

import re
from typing import Final

from .errors import InvalidName

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def is_name(name: object) -> bool:
    """Whether a model or a worker may be called that."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """`name`, or InvalidName."""
    if not is_name(name):
        raise InvalidName(name=str(name)[:200], what=what)
    return name
