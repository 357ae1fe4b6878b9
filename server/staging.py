"""Where a push's bytes wait, complete and checked, before the model sees them; and how many may wait at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from pushstep.proto.errors import OverBudget, OverCapacity
from pushstep.proto.layout import Slot
from pushstep.proto.types_pb2 import Staged

RETRY_AFTER_S = 0.1
# Up to here bytes are copied, and whole pushes inspected and stepped, on the event loop: a hop to a thread and back
# costs more (about 0.15 ms here).
INLINE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class DensePart:
    """The gradient of neighbouring parameters: elements [start, stop) of an arena, flat."""

    arena: int
    start: int
    slots: tuple[Slot, ...]
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class RowsPart:
    """The gradient of some rows of one parameter. ids: (n,) int64, ascending and unique; rows: (n, *row shape)."""

    slot: Slot
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class StagedPush:
    """A complete push: its gradient and what the gate's one pass found out about it."""

    staged: Staged
    parts: Sequence[DensePart | RowsPart]
    nonfinite_parameter: str | None

    def bytes(self) -> int:
        """What its gradients take."""
        tensors = [part.rows if isinstance(part, RowsPart) else part.gradient for part in self.parts]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def norm(self) -> float:
        """L2 norm over all parameters, their sums of squares added in manifest order."""
        sums = {norm.parameter: norm.square_sum for norm in self.staged.norms}
        return math.sqrt(sum(sums[index] for index in sorted(sums)))


class Budget:
    """The bytes that all pushes in flight may hold together.

    A push's whole declared size is taken before its body is read, so a server never finds out half way that it has
    no room.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0

    def reserve(self, need_bytes: int) -> None:
        """Take `need_bytes`, or raise OverBudget with the time after which to ask again.

        OverCapacity for what would not fit if nothing else were in flight: asking again would not help.
        """
        if need_bytes > self.total_bytes:
            raise OverCapacity(
                problem=f"{need_bytes} bytes at once are more than the {self.total_bytes} set aside for staging",
                setting="staging-bytes",
            )
        free = self.total_bytes - self.used_bytes
        if need_bytes > free:
            raise OverBudget(need=need_bytes, free=free, budget=self.total_bytes, retry_after_s=RETRY_AFTER_S)
        self.used_bytes += need_bytes

    def release(self, bytes_taken: int) -> None:
        """Give back what `reserve` took."""
        self.used_bytes -= bytes_taken
