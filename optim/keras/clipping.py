"""Keras's three kinds of clipping, as kernels take them: a factor per gradient, or a bound on its elements.

    clipnorm            g * clipnorm / max(|g|, clipnorm)            each gradient by its own norm
    global_clipnorm     g * global_clipnorm / max(N, global_clipnorm)  N over all gradients; not finite: all are NaN
    clipvalue           min(max(g, -clipvalue), clipvalue)

At most one may be given. 0 switches it off. Norms are summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..ops.norms import global_norm, keras_factor, keras_global_factor, square_sums


class Clipping(NamedTuple):
    """Keras's three clipping arguments. At most one of them is given."""

    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None

    def check(self) -> None:
        """Keras's ValueError if more than one is given."""
        if sum(value is not None for value in self) > 1:
            received = ", ".join(f"{name}={value}" for name, value in self._asdict().items())
            raise ValueError(
                f"Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: {received}"
            )

    @property
    def bound(self) -> float | None:
        """The bound on each element's magnitude; None without one."""
        return self.clipvalue if self.clipvalue is not None and self.clipvalue > 0 else None

    def factors(self, grads: Sequence[Tensor], ratio: float) -> list[float]:
        """The clipping factor of each gradient, for gradients that are still to be multiplied by `ratio`."""
        if self.clipnorm is not None and self.clipnorm > 0:
            sums = square_sums(grads)
            return [keras_factor(math.sqrt(one) * abs(ratio), self.clipnorm) for one in sums]
        if self.global_clipnorm is not None and self.global_clipnorm > 0:
            norm = global_norm(grads) * abs(ratio)
            return [keras_global_factor(norm, self.global_clipnorm)] * len(grads)
        return [1.0] * len(grads)
