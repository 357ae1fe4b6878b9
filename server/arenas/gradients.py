"""A step's gradients after the operations of its ticket: clipped, centralized, given noise, in that ticket's order.

The gradients as they came are not written to: they may lie in a worker's memory. What is made lies in memory of its own, in
the dtype that is stepped. Equal gradients and an equal ticket give equal bits: norms are those of `optim/ops/norms.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pushstep.optim.ops import transforms
from pushstep.optim.ops.normal import noise_key
from pushstep.optim.ops.norms import (
    keras_factor,
    keras_global_factor,
    power_norm,
    square_sums,
    together,
    torch_factor,
)
from pushstep.proto.types_pb2 import Ticket
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot

from ..staging.gradient import DensePart, RowsPart
from ..staging.row_sums import row_square_sums

Part = DensePart | RowsPart
Take = Callable[[int], Tensor]


def bytes_of_change(ticket: Ticket, parts: Sequence[Part]) -> int:
    """Bytes that the changed gradients of a step take beside those that came."""
    return sum([_elements(part) * _stepped(part).itemsize for part in parts]) if ticket.operations else 0


def changed(ticket: Ticket, parts: Sequence[Part], take: Take) -> tuple[list[Part], float, float]:
    """The gradients after the ticket's factor and operations; the factor that is left; the product of all global ones.

    take: allocates memory on the CPU.
    """
    work = Gradients(ticket, parts, take)
    for operation in ticket.operations:
        match operation.WhichOneof("operation"):
            case "clip_value":
                work.clip(operation.clip_value)
            case "clip_grad_norm":
                work.multiply(torch_factor(work.norm(), operation.clip_grad_norm))
            case "clip_by_norm":
                clip = operation.clip_by_norm
                work.multiply(torch_factor(work.power_norm(clip.norm_type), clip.max_norm))
            case "global_clipnorm":
                work.multiply(keras_global_factor(work.norm(), operation.global_clipnorm))
            case "clipnorm":
                work.clip_each(operation.clipnorm)
            case "centralize":
                work.centralize()
            case "noise":
                work.add_noise(operation.noise.stddev, int(operation.noise.seed))
            case unknown:
                raise ValueError(f"the ticket asks for {unknown}, which this build does not know")
    left = work.finish()
    return work.parts, left, work.product


class Gradients:
    """The gradients of one step while operations change them. What only multiplies waits for the next pass."""

    def __init__(self, ticket: Ticket, parts: Sequence[Part], take: Take) -> None:
        self.parts = list(parts)
        # what global clipping and the ticket's factor have multiplied by
        self.product = float(ticket.factor)
        self._version = int(ticket.version)
        self._take = take
        self._slots = [[part.slot] if isinstance(part, RowsPart) else list(part.slots) for part in parts]
        self._owned = [False] * len(parts)
        # of each part's parameters, not yet multiplied
        self._factors = [[self.product] * len(slots) for slots in self._slots]
        self._is_uniform = True
        self._sums: dict[int, float] | None = None

    def multiply(self, factor: float) -> None:
        """Multiply everything."""
        self.product *= factor
        self._factors = [[one * factor for one in factors] for factors in self._factors]

    def norm(self) -> float:
        """The L2 norm over all gradients, their sums of squares added in manifest order."""
        sums = self._square_sums()
        factors = {
            slot.index: factor
            for slots, known in zip(self._slots, self._factors, strict=True)
            for slot, factor in zip(slots, known, strict=True)
        }
        if self._is_uniform and factors:
            factor = next(iter(factors.values()))
            return math.sqrt(sum([sums[index] for index in sorted(sums)])) * abs(factor)
        return math.sqrt(sum([sums[index] * factors[index] ** 2 for index in sorted(sums)]))

    def power_norm(self, norm_type: float) -> float:
        """Another norm over all gradients, the norms of the parameters taken together in manifest order."""
        norms: dict[int, float] = {}
        for k, part in enumerate(self.parts):
            slots = self._slots[k]
            pieces = [part.rows] if isinstance(part, RowsPart) else _pieces(part, slots)
            for slot, piece, factor in zip(slots, pieces, self._factors[k], strict=True):
                norms[slot.index] = power_norm(piece, norm_type) * abs(factor)
        return together([norms[index] for index in sorted(norms)], norm_type)

    def clip_each(self, limit: float) -> None:
        """Multiply each parameter's gradient by its own `keras_factor`."""
        sums = self._square_sums()
        for slots, factors in zip(self._slots, self._factors, strict=True):
            for k, slot in enumerate(slots):
                factors[k] *= keras_factor(math.sqrt(sums[slot.index]) * abs(factors[k]), limit)
        self._is_uniform = False

    def clip(self, bound: float) -> None:
        """Bring each element between -bound and bound."""
        self._pass(
            lambda k, target, source: transforms.clip(target, source, self._sizes(k), self._factors[k], bound)
        )

    def centralize(self) -> None:
        """Take the mean of each row from it, of parameters of more than one dimension."""
        self._pass(
            lambda k, target, source: transforms.centralize(
                target,
                source,
                self._sizes(k),
                self._factors[k],
                [slot.row_elements if len(slot.shape) > 1 else 0 for slot in self._slots[k]],
            )
        )

    def add_noise(self, stddev: float, seed: int) -> None:
        """Add normal noise to each element, by the version, its parameter and its number in that."""

        def noisy(k: int, target: Tensor, source: Tensor) -> None:
            part = self.parts[k]
            keys = [noise_key(seed, self._version, slot.index) for slot in self._slots[k]]
            ids = part.ids if isinstance(part, RowsPart) else None
            transforms.add_noise(target, source, self._sizes(k), self._factors[k], stddev, keys, ids)

        self._pass(noisy)

    def finish(self) -> float:
        """The factor that is left for the step; what is not the same for all is multiplied here."""
        if not self._is_uniform:
            self._pass(
                lambda k, target, source: transforms.scale(target, source, self._sizes(k), self._factors[k])
            )
        return self._factors[0][0] if self._factors and self._factors[0] else 1.0

    def _pass(self, change: Callable[[int, Tensor, Tensor], None]) -> None:
        """One pass over everything, in which the factors that wait are multiplied."""
        for k, part in enumerate(self.parts):
            if not _elements(part):
                continue
            source = part.rows if isinstance(part, RowsPart) else part.gradient
            source = source.reshape(-1)
            target = source if self._owned[k] else self._fresh(part, source)
            change(k, target, source)
            self._owned[k] = True
            self.parts[k] = (
                replace(part, rows=target.view(part.rows.shape))
                if isinstance(part, RowsPart)
                else replace(part, gradient=target)
            )
        self._factors = [[1.0] * len(slots) for slots in self._slots]
        self._is_uniform, self._sums = True, None

    def _fresh(self, part: Part, source: Tensor) -> Tensor:
        dtype = _stepped(part)
        if not source.is_cpu:
            return torch.empty(source.numel(), dtype=dtype, device=source.device)
        return self._take(source.numel() * dtype.itemsize).view(dtype)

    def _sizes(self, k: int) -> list[int]:
        part = self.parts[k]
        if isinstance(part, RowsPart):
            return [part.rows.numel()]
        return [slot.stop - slot.start for slot in part.slots]

    def _square_sums(self) -> dict[int, float]:
        """Each parameter's sum of squares, of what lies there now."""
        if self._sums is None:
            rows = [part for part in self.parts if isinstance(part, RowsPart)]
            totals = row_square_sums(rows) if rows else []
            self._sums = {part.slot.index: total for part, total in zip(rows, totals, strict=True)}
            for k, part in enumerate(self.parts):
                if isinstance(part, RowsPart):
                    continue
                slots = self._slots[k]
                found = zip(slots, square_sums(_pieces(part, slots)), strict=True)
                self._sums |= {slot.index: square_sum for slot, square_sum in found}
        return self._sums


def _pieces(part: DensePart, slots: Sequence[Slot]) -> list[Tensor]:
    return [part.gradient[slot.start - part.start : slot.stop - part.start] for slot in slots]


def _elements(part: Part) -> int:
    return part.rows.numel() if isinstance(part, RowsPart) else part.gradient.numel()


def _stepped(part: Part) -> torch.dtype:
    """The dtype in which a gradient is stepped."""
    slot = part.slot if isinstance(part, RowsPart) else part.slots[0]
    return dtypes.state_dtype(slot.dtype)
