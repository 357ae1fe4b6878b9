"""Gradients in place: backward leaves them in memory that the server reads, so a step copies nothing.

When backward finishes a parameter's gradient, a hook copies it into its place in shared memory and sets `p.grad` to that
place. Accumulation, clipping and unscaling then work there, as on any gradient. torch's rules hold: `zero_grad()` sets
None, a gradient that somebody still holds is not overwritten, and a user may set `p.grad` to anything. The step copies
each gradient that does not lie in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.proto.wire.layout import Slot

from ..attachment.parameters import Parameters
from ..shared_memory.region import Region
from ..shared_memory.sharing import SharedMemory
from ..transport.shield import shield

# Of lists longer than this, gradients below so many bytes are gathered at the step: a hook takes some 10 us of backward, and
# the kernel 0.02 us.
FEW: Final = 64
SMALL_BYTES: Final = 64 << 10


class GradientsInPlace:
    """Owns the hooks on an optimizer's parameters, until `remove`."""

    def __init__(self, memory: SharedMemory, parameters: Parameters) -> None:
        self._memory = memory
        self._names = parameters
        self._parameters: list[Tensor] = []
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        # frozen parameters: torch takes a hook only once they require a gradient
        self.frozen: list[Tensor] = []
        memory.before_drop.append(self._withdraw)

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Keep the gradients of these parameters in place, and of no others."""
        self._parameters = list(parameters)
        wanted = set(self._parameters)
        for parameter in [known for known in self._handles if known not in wanted]:
            self._handles.pop(parameter).remove()
        few = len(self._parameters) <= FEW
        able = [
            p
            for p in self._parameters
            if p.is_leaf and p.is_cpu and p not in self._handles and (few or p.nbytes >= SMALL_BYTES)
        ]
        self.frozen = [parameter for parameter in able if not parameter.requires_grad]
        for parameter in able:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook  # torch gives it no types
                self._handles[parameter] = register(self._offer)

    @property
    def waits(self) -> bool:
        """True if a frozen parameter now requires a gradient, so that `watch` has to be called."""
        return any(parameter.requires_grad for parameter in self.frozen)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.frozen = []

    def _offer(self, parameter: Tensor) -> None:
        # in a graph that torch.compile makes, memory cannot be lent: the step copies such gradients
        if not torch.compiler.is_compiling():
            self._lend(parameter)

    @shield  # an interrupted copy's threads would still write into a place that is lent again
    @torch.no_grad()
    def _lend(self, parameter: Tensor) -> None:
        region, gradient = self._memory.region, parameter.grad
        if region is None or gradient is None or gradient.layout is not torch.strided:
            return
        slot = region.gradients.layout.by_name.get(self._names.name_of(parameter))
        if slot is None or not _may_lie_there(gradient, slot, region) or region.holds(gradient):
            return
        place = region.lend(slot)
        if place is not None:
            copy(place, gradient)
            parameter.grad = place

    def _withdraw(self, region: Region) -> None:
        """Copy the gradients out of a region that is given up, since another process may still use its memory."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided and region.holds(gradient):
                # numpy copies without threads: this also runs in a forked child, which has no threads
                copied = np.array(gradient.detach().reshape(-1).view(torch.uint8).numpy())
                parameter.grad = torch.from_numpy(copied).view(gradient.dtype).view(gradient.shape)


def _may_lie_there(gradient: Tensor, slot: Slot, region: Region) -> bool:
    return (
        gradient.is_cpu
        and not gradient.requires_grad
        and gradient.dtype == region.gradients.dtypes[slot.arena]
        and gradient.shape == slot.shape
        and slot.stop > slot.start
    )
