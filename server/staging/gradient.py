"""A push's gradient once it is complete and checked: dense parts and rows, norms and finiteness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pushstep.proto.wire.layout import Slot

from ..process.inline import INLINE_PARTS


@dataclass(frozen=True, slots=True)
class DensePart:
    """The gradient of neighbouring parameters: elements [start, stop) of an arena, flat."""

    arena: int
    start: int
    slots: tuple[Slot, ...]
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class RowsPart:
    """The gradient of some rows of one parameter.

    ids: (n,) int64, ascending and unique; rows: (n, *row shape).
    """

    slot: Slot
    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class StagedPush:
    """A complete push: its gradient, and what the gate's one pass has measured."""

    # how many parameters it has gradients of
    parameters: int
    parts: Sequence[DensePart | RowsPart]
    nonfinite_parameter: str | None
    # L2 over all parameters, their sums of squares added in manifest order
    norm: float
    # of its gradient in float64, by part and parameter
    sums: Sequence[Sequence[float]] = ()
    # what the device waits for before it reads the parts, in a type of the device's own
    arrival: object = None
    # of a push to a model that lies in several ranks, which this describes as a whole: what is stepped here
    here: StagedPush | None = None
    # of a round's sum there: the number under which the other ranks have theirs
    reduce: int = 0

    @property
    def own(self) -> StagedPush:
        """What of it is stepped here."""
        return self if self.here is None else self.here

    @property
    def kind(self) -> frozenset[tuple[int, int, bool, torch.dtype]]:
        """What selects the kernels that step it: group, arena, by rows or not, dtype.

        A part without elements needs none.
        """
        found = set()
        for part in self.parts:
            if isinstance(part, RowsPart):
                if part.rows.numel():
                    found.add((part.slot.group, part.slot.arena, True, part.rows.dtype))
            elif part.gradient.numel():
                found.add((part.slots[0].group, part.arena, False, part.gradient.dtype))
        return frozenset(found)

    @property
    def groups(self) -> list[int]:
        """The param groups that it touches. An arena belongs to one group, so any slot of a part tells."""
        return sorted({(p.slot if isinstance(p, RowsPart) else p.slots[0]).group for p in self.parts})

    @property
    def is_of_few(self) -> bool:
        """True if it has so few parameters that the event loop may look at each."""
        return self.parameters <= INLINE_PARTS

    def bytes(self) -> int:
        """Bytes of its gradients, without row ids."""
        tensors = [part.rows if isinstance(part, RowsPart) else part.gradient for part in self.parts]
        return sum([tensor.nbytes for tensor in tensors])


def own_copy(push: StagedPush, take: Callable[[int], Tensor]) -> StagedPush:
    """The push in memory that no worker can write to. take: allocates memory on the CPU."""

    def copied(tensor: Tensor) -> Tensor:
        if not tensor.is_cpu or not tensor.numel():
            return tensor.clone()
        return take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    parts = [
        RowsPart(part.slot, copied(part.ids), copied(part.rows))
        if isinstance(part, RowsPart)
        else replace(part, gradient=copied(part.gradient))
        for part in push.parts
    ]
    return replace(push, parts=parts)
