"""Path and query parameters, read as strictly as bodies: digits for a number, true or false for a flag."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from fastapi import Query
from pydantic import BeforeValidator

from ..coordinator.settings import LARGEST_WHOLE

_DIGITS: Final = re.compile(r"-?[0-9]{1,20}")


def _digits(value: Any) -> Any:
    """`value`; ValueError for a text that is not digits. pydantic would also take 1_0, ' 1' and 1.0."""
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise ValueError("a whole number is written in digits")
    return value


def _flag(value: Any) -> Any:
    """`value`; ValueError for a text other than true and false. pydantic would also take yes, on and 1."""
    if isinstance(value, str) and value not in ("true", "false"):
        raise ValueError("a flag is true or false")
    return value


Index = Annotated[int, BeforeValidator(_digits)]
Offset = Annotated[int, BeforeValidator(_digits), Query(ge=0, le=LARGEST_WHOLE)]
Flag = Annotated[bool, BeforeValidator(_flag)]
