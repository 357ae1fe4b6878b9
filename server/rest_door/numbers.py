"""Numbers as JSON has them: it knows neither NaN nor infinity, and a diverging run has both."""

from __future__ import annotations

import math
from collections.abc import Mapping


def finite(value: float | None) -> float | None:
    """`value`, or None if JSON cannot hold it."""
    return value if value is not None and math.isfinite(value) else None


def finite_values(values: Mapping[str, float | None] | Mapping[str, float]) -> dict[str, float | None]:
    """The same for each value."""
    return {name: finite(value) for name, value in values.items()}
