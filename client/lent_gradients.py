"""Gradients that autograd leaves where the server will read them, so that a step has nothing to copy.

As backward finishes a parameter's gradient it is copied into its place in shared memory, and `p.grad` becomes that
place: accumulation, clipping and unscaling then work there, in place, as they do on any gradient. torch's rules hold:
`zero_grad()` sets None, a gradient that somebody still holds is not overwritten, and a user may set `p.grad` to
anything; what does not lie in its place is copied at the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.layout import Slot

from .region import Region
from .shared_memory import SharedMemory
from .shield import shield


class LentGradients:
    """Hooks on an optimizer's parameters, until `remove`."""

    def __init__(self, memory: SharedMemory, name_of: Callable[[Tensor], str]) -> None:
        self._memory = memory
        self._name_of = name_of
        self._parameters: list[Tensor] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        memory.before_drop.append(self._withdraw)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Have the gradients of more parameters lie there."""
        for parameter in parameters:
            self._parameters.append(parameter)
            if parameter.is_leaf and parameter.is_cpu:
                handle = parameter.register_post_accumulate_grad_hook(self._lend)  # type: ignore[no-untyped-call]
                self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @shield  # or threads would still write into a place that is lent again
    @torch.no_grad()
    def _lend(self, parameter: Tensor) -> None:
        region, gradient = self._memory.region, parameter.grad
        if region is None or gradient is None or gradient.layout is not torch.strided:
            return
        slot = region.gradients.layout.by_name.get(self._name_of(parameter))
        if slot is None or not _may_lie_there(gradient, slot, region) or region.holds(gradient):
            return
        place = region.lend(slot)
        if place is not None:
            copy(place, gradient)
            parameter.grad = place

    def _withdraw(self, region: Region) -> None:
        """Copy the gradients out of a region that is given up: what lies there is not only ours any more."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.layout is torch.strided and region.holds(gradient):
                # numpy copies without threads: this also runs in a child of fork, which has none
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
