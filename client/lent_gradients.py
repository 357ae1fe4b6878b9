"""Gradients that autograd leaves where the server will read them, so that a step has nothing to copy.

As backward finishes a parameter's gradient it is copied into its place in shared memory, and `p.grad` becomes that
place: accumulation, clipping and unscaling then work there, in place, as they do on any gradient. torch's rules hold:
`zero_grad()` sets None, a gradient that somebody still holds is not overwritten, and a user may set `p.grad` to
anything; what does not lie in its place is copied at the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.layout import Slot

from .parameters import Parameters
from .region import Region
from .shared_memory import SharedMemory
from .shield import shield


class LentGradients:
    """Hooks on an optimizer's parameters, until `remove`."""

    def __init__(self, memory: SharedMemory, parameters: Parameters) -> None:
        self._memory = memory
        self._names = parameters
        self._parameters: list[Tensor] = []
        self._handles: dict[Tensor, torch.utils.hooks.RemovableHandle] = {}
        # frozen ones, which take no hook until they are not
        self._frozen: list[Tensor] = []
        memory.before_drop.append(self._withdraw)

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Have the gradients of these parameters lie there, and of no others."""
        self._parameters = list(parameters)
        wanted = set(self._parameters)
        for parameter in [known for known in self._handles if known not in wanted]:
            self._handles.pop(parameter).remove()
        able = [p for p in self._parameters if p.is_leaf and p.is_cpu and p not in self._handles]
        self._frozen = [parameter for parameter in able if not parameter.requires_grad]
        for parameter in able:
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook  # torch gives it no types
                self._handles[parameter] = register(self._lend)

    @property
    def waits(self) -> bool:
        """Whether a parameter that was frozen is not any more."""
        return any(parameter.requires_grad for parameter in self._frozen)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._frozen = []

    @shield  # or threads would still write into a place that is lent again
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
