"""Checks whether a model's parameters are finite: a few elements after each step, all of them now and then.

The gate checks gradients. Parameters may become nonfinite all the same: a step may make NaN or infinity of finite
gradients (an `eps` of 0, a learning rate too large), `nonfinite: apply` lets nonfinite ones through, and a worker may
write to shared memory after the check. Training goes on, as it does in torch. The model's events and REST name the
parameters that are nonfinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.ops.norms import square_sums
from pushstep.proto.wire.layout import Layout

from ..staging.gradient import DensePart, RowsPart

# Diverging parameters diverge together, so a few elements show it within some steps. That takes 3 us of a step's 700.
SAMPLED_ELEMENTS: Final = 8
# Of a step with more parts than this, each step looks at this many, in turn. All parts of 26 tables would take 0.2 ms.
SAMPLED_PARTS: Final = 4
# A pass over 16 M float32 takes 4 ms, which is 0.03 % of a thousand steps of that size.
WHOLE_EVERY_STEPS: Final = 1000


class FiniteWatch:
    """Which parameters of one model are nonfinite. Updated in the writer thread."""

    def __init__(self) -> None:
        # names of parameters with NaN or infinity, in manifest order; replaced as a whole, never written to
        self.nonfinite: tuple[str, ...] = ()
        self._steps = 0

    def stepped(
        self, layout: Layout, parameters: Sequence[Tensor], parts: Sequence[DensePart | RowsPart]
    ) -> None:
        """Check a few elements that a step has moved. Check all if one is nonfinite anew, and each WHOLE_EVERY_STEPS steps."""
        self._steps += 1
        if len(parts) > SAMPLED_PARTS:
            first = self._steps * SAMPLED_PARTS % len(parts)
            parts = [*parts[first:], *parts[:first]][:SAMPLED_PARTS]
        if self._steps % WHOLE_EVERY_STEPS == 0 or (
            not self.nonfinite and any(self._sample(parameters, part) for part in parts)
        ):
            self.look(layout, parameters)

    def _sample(self, parameters: Sequence[Tensor], part: DensePart | RowsPart) -> bool:
        """True if one of a few elements is nonfinite. Always False on a GPU, for which no step must wait."""
        if isinstance(part, RowsPart):
            flat, start = parameters[part.slot.arena], part.slot.start
            if not flat.is_cpu or part.ids.numel() == 0:
                return False
            row = int(part.ids[self._steps % part.ids.numel()])
            start += row * part.slot.row_elements
            few = flat[start : start + min(part.slot.row_elements, SAMPLED_ELEMENTS)]
        else:
            flat, start, stop = parameters[part.arena], part.start, part.slots[-1].stop
            if not flat.is_cpu or start == stop:
                return False
            stride = max(1, (stop - start) // SAMPLED_ELEMENTS)
            few = flat[start + self._steps % stride : stop : stride]
        return not math.isfinite(sum(few.tolist()))

    def look(self, layout: Layout, parameters: Sequence[Tensor]) -> None:
        """Check every parameter."""
        found: list[str] = []
        for arena, total in zip(layout.arenas, square_sums(parameters), strict=True):
            if not math.isfinite(total):
                flat = parameters[arena.index]
                found += [
                    slot.name
                    for slot in arena.slots
                    if not bool(torch.isfinite(flat[slot.start : slot.stop]).all())
                ]
        order = {slot.name: slot.index for slot in layout.slots} if found else {}
        names = tuple(sorted(found, key=lambda name: order[name]))
        if names != self.nonfinite:
            self.nonfinite = names
