"""Floats for JSON, which has neither NaN nor infinity; a diverging run has both."""

from __future__ import annotations

import math
from collections.abc import Mapping


def finite(value: float | None) -> float | None:
    """`value`, or None if JSON cannot hold it."""
    return value if value is not None and math.isfinite(value) else None


def finite_values(values: Mapping[str, float | None] | Mapping[str, float]) -> dict[str, float | None]:
    """The values by name, each as `finite` gives it."""
    return {name: finite(value) for name, value in values.items()}
