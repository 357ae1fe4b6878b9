"""Adds up a round's gradients. It blocks: call it in a thread.

The arithmetic is exactly this, so that anyone can reproduce it. In float32 (float64 where a gradient is float64), with
pushes in the order of their workers' names:

    total = w1 * g1;  total = total + w2 * g2;  ...  total = total / W

Each product, sum and quotient is rounded on its own. Weights are rounded to that dtype first. A weight or divisor of 1
leaves the value as it is. For a mean, W is the sum of the contributors' weights, taken in float64 in the same order. For
a sum, W is 1. A push that has no gradient for a parameter counts as zero there, so W does not change with it. Rows are
multiplied by their push's weight, concatenated in the order of the pushes, merged in order of appearance, then divided.
Where some pushes are dense and others have rows, the result is dense, and rows are added to it in their push's turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.rows import coalesce
from pushstep.optim.ops.sums import weighted_sum

from .gradient import DensePart, RowsPart, StagedPush
from .inspect import measured
from .unpack import Take

Part = DensePart | RowsPart
Term = tuple[float, Part]
# A part, and its parameters' sums of squares if they were taken with it.
Sum = tuple[Part, list[float] | None]
FRESH: Final[Take] = partial(torch.empty, dtype=torch.uint8, device="cpu")


def add_up(
    pushes: Sequence[StagedPush],
    weights: Sequence[float],
    divisor: float,
    take: Take = FRESH,
) -> StagedPush:
    """The weighted sum divided by `divisor`, measured as the gate measures a push.

    take: allocates memory for the sum.
    """
    sums = [_sum(terms, divisor, take) for terms in _places(pushes, weights)]
    return measured([part for part, _ in sums], [known for _, known in sums])


def largest_sum(pushes: Sequence[StagedPush]) -> int:
    """The most bytes that the sum of these pushes takes."""
    dense: dict[tuple[int, int, int], int] = {}
    rows = 0
    for part in (part for push in pushes for part in push.parts):
        if isinstance(part, RowsPart):
            rows += part.ids.nbytes + part.rows.numel() * _wide([part.rows]).itemsize
        else:
            place, nbytes = _place(part), part.gradient.numel() * _wide([part.gradient]).itemsize
            dense[place] = max(nbytes, dense.get(place, 0))
    return sum(dense.values()) + rows


def _places(pushes: Sequence[StagedPush], weights: Sequence[float]) -> Iterator[list[Term]]:
    """For each place in the arenas, the parts that the pushes have for it, with their weights."""
    cut = [list(push.parts) for push in pushes]
    if len({tuple(_place(part) for part in parts) for parts in cut}) > 1:
        cut = [[single for part in parts for single in _by_parameter(part)] for parts in cut]
    found: dict[tuple[int, int], list[Term]] = {}
    for weight, parts in zip(weights, cut, strict=True):
        for part in parts:
            # by the first parameter's index: a parameter without elements begins where another does
            first = part.slot if isinstance(part, RowsPart) else part.slots[0]
            found.setdefault((first.arena, first.index), []).append((weight, part))
    return (found[place] for place in sorted(found))


def _place(part: Part) -> tuple[int, int, int]:
    slots = (part.slot,) if isinstance(part, RowsPart) else part.slots
    return slots[0].arena, slots[0].start, slots[-1].stop


def _by_parameter(part: Part) -> list[Part]:
    if isinstance(part, RowsPart):
        return [part]
    return [
        DensePart(part.arena, s.start, (s,), part.gradient[s.start - part.start : s.stop - part.start])
        for s in part.slots
    ]


def _sum(terms: Sequence[Term], divisor: float, take: Take) -> Sum:
    rows = [(weight, part) for weight, part in terms if isinstance(part, RowsPart)]
    dense = [(weight, part) for weight, part in terms if isinstance(part, DensePart)]
    if not dense:
        return _sum_rows(rows, divisor), None
    place, known = dense[0][1], None
    if not place.gradient.numel():
        return place, [0.0]
    if rows:
        total = _sum_mixed(terms, divisor)
    elif place.gradient.is_cpu:
        total, known = _sum_dense(dense, divisor, take)
    else:
        total = _sum_elsewhere(dense, divisor)
    return DensePart(place.arena, place.start, place.slots, total), known


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _times(values: Tensor, weight: float) -> Tensor:
    return values if weight == 1 else values * torch.tensor(weight, dtype=values.dtype, device="cpu")


def _divide(values: Tensor, divisor: float) -> None:
    if divisor != 1:
        # a tensor on the values' device: for a number, CUDA multiplies by its inverse, which rounds differently
        values.div_(torch.full((), divisor, dtype=values.dtype, device=values.device))


def _sum_dense(
    terms: Sequence[tuple[float, DensePart]], divisor: float, take: Take
) -> tuple[Tensor, list[float]]:
    gradients = [part.gradient for _, part in terms]
    wide = _wide(gradients)
    if len({gradient.dtype for gradient in gradients}) > 1:
        gradients = [gradient.to(wide) for gradient in gradients]
    total = take(gradients[0].numel() * wide.itemsize).view(wide)
    sizes = [slot.stop - slot.start for slot in terms[0][1].slots]
    return total, weighted_sum(total, gradients, [weight for weight, _ in terms], divisor, sizes)


def _sum_elsewhere(terms: Sequence[tuple[float, DensePart]], divisor: float) -> Tensor:
    """The sum of dense gradients by torch operations, on the device where they are."""
    wide = _wide([part.gradient for _, part in terms])
    total = torch.zeros((), dtype=wide, device=terms[0][1].gradient.device)
    for number, (weight, part) in enumerate(terms):
        piece = _times(part.gradient.to(wide), weight)
        # a copy, because the total is divided in place: a gradient must not change
        total = total.add_(piece) if number else piece.clone() if piece is part.gradient else piece
    _divide(total, divisor)
    return total


def _sum_rows(terms: Sequence[tuple[float, RowsPart]], divisor: float) -> RowsPart:
    wide = _wide([part.rows for _, part in terms])
    ids = torch.cat([part.ids for _, part in terms])
    rows = torch.cat([_times(part.rows.to(wide), weight) for weight, part in terms])
    ids, rows = coalesce(ids, rows)
    _divide(rows, divisor)
    return RowsPart(terms[0][1].slot, ids, rows)


def _sum_mixed(terms: Sequence[Term], divisor: float) -> Tensor:
    """The sum for one parameter of which some pushes have rows and others a dense gradient."""
    tensors = [part.rows if isinstance(part, RowsPart) else part.gradient for _, part in terms]
    slot = next(part.slot for _, part in terms if isinstance(part, RowsPart))
    total = torch.zeros(slot.shape, dtype=_wide(tensors), device=tensors[0].device)
    for weight, part in terms:
        if isinstance(part, RowsPart):
            total[part.ids] += _times(part.rows.to(total.dtype), weight)  # its ids are unique
        else:
            total += _times(part.gradient.to(total.dtype), weight).view(slot.shape)
    _divide(total, divisor)
    return total.view(-1)
