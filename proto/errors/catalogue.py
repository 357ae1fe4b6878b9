"""Every error class by its code."""

from __future__ import annotations

# `__subclasses__` finds a class only once its module has been imported
from . import broken as _broken  # noqa: F401
from . import invalid as _invalid  # noqa: F401
from . import misuse as _misuse  # noqa: F401
from . import refused as _refused  # noqa: F401
from .base import PushstepError


def _leaves(kind: type[PushstepError]) -> list[type[PushstepError]]:
    return [kind] * bool(kind.code) + [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]


CATALOGUE: dict[str, type[PushstepError]] = {kind.code: kind for kind in _leaves(PushstepError)}
