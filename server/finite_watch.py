"""Whether a model's parameters are still finite: a few elements after each step, all of them now and then.

Gradients are checked at the gate, but a step may make NaN or infinity of finite ones (an `eps` of 0, a learning rate
too large), `nonfinite: apply` lets them through, and a worker may write to shared memory after the check. Training goes
on, as it does in torch; it is said, by the model's events and over REST, which parameters it has ruined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.optim.norms import square_sums
from pushstep.proto.layout import Layout

from .staging import DensePart, RowsPart

# Parameters that diverge do so together: a few elements tell within some steps. 3 us of a step of 700.
SAMPLED_ELEMENTS: Final = 8
# A pass over 16 M float32 takes 4 ms: 0.03 % of a thousand steps.
WHOLE_EVERY_STEPS: Final = 1000


class FiniteWatch:
    """What is known of one model's arenas. In the writer's thread."""

    def __init__(self) -> None:
        # names of parameters with NaN or infinity, in manifest order; replaced as a whole, never written to
        self.nonfinite: tuple[str, ...] = ()
        self._steps = 0

    def stepped(
        self, layout: Layout, parameters: Sequence[Tensor], parts: Sequence[DensePart | RowsPart]
    ) -> None:
        """Look at a few elements of what a step has moved, or at everything if it is time for that."""
        self._steps += 1
        if self._steps % WHOLE_EVERY_STEPS == 0 or (
            not self.nonfinite and any(self._sample(parameters, part) for part in parts)
        ):
            self.look(layout, parameters)

    def _sample(self, parameters: Sequence[Tensor], part: DensePart | RowsPart) -> bool:
        """Whether some of a few elements are not finite; on a device nobody waits for the answer at every step."""
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
        """Look at every parameter."""
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
