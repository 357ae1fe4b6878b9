"""The parameters that an attached optimizer steps: by the model's names, and at which version they are.

They are the user's own tensors. What is pulled is copied into them; a change that comes from elsewhere would be lost
with the next pull, so it is noticed before the next push, by torch's count of the writes to each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pushstep.optim.copies import copy
from pushstep.proto.layout import Layout, Slot

from .gradients import Rows, as_gradient
from .names import check_parameter
from .transport import Pulled


class Parameters:
    """The tensors by name; `at` is the (timeline, version) that they are at, None before the first pull."""

    def __init__(self, model: str, by_name: Mapping[str, Tensor]) -> None:
        self.at: tuple[int, int] | None = None
        self._model = model
        self._by_name: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._versions: dict[str, int] = {}
        for name, parameter in by_name.items():
            check_parameter(parameter, name)
        self.add(by_name)

    def add(self, by_name: Mapping[str, Tensor]) -> None:
        """Have more of them, of a group that was added."""
        self._by_name.update(by_name)
        self._names.update({id(parameter): name for name, parameter in by_name.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def name_of(self, parameter: Tensor) -> str:
        """What the model calls it."""
        return self._names[id(parameter)]

    def slot_of(self, parameter: Tensor, layout: Layout) -> Slot:
        """Where a parameter lies in the model."""
        return layout.slot(self.name_of(parameter), self._model)

    def values(self, layout: Layout) -> dict[tuple[Slot, str], Tensor]:
        """All of them, as an upload takes them."""
        return {(layout.slot(name, self._model), ""): parameter for name, parameter in self._by_name.items()}

    def gradients(self, layout: Layout) -> dict[Slot, Tensor | Rows]:
        """The gradients of those that have one."""
        found: dict[Slot, Tensor | Rows] = {}
        for name, parameter in self._by_name.items():
            if parameter.grad is not None:
                slot = layout.slot(name, self._model)
                found[slot] = as_gradient(parameter.grad, slot)
        return found

    def written(self) -> str | None:
        """The name of one that was written to since they were last taken or sent."""
        return next((n for n, p in self._by_name.items() if p._version != self._versions[n]), None)

    def are(self, pulled: Pulled) -> bool:
        """Whether they are what was pulled whole: then what was written to them has changed nothing."""
        at = (pulled.header.timeline, pulled.header.version)
        if at != self.at or not all(
            torch.equal(self._by_name[slot.name].detach().cpu(), values.to(slot.dtype))
            for slot, _, values in pulled.dense()
            if slot.name in self._by_name
        ):
            return False
        self.note(*at)
        return True

    def note(self, timeline: int, version: int) -> None:
        """They are at this version as they stand."""
        self.at = (timeline, version)
        self._versions = {name: parameter._version for name, parameter in self._by_name.items()}

    @torch.no_grad()
    def take(self, pulled: Pulled) -> None:
        """Become what was pulled."""
        # a group that another worker has added meanwhile is not this one's yet: the next push says so
        for slot, _, values in pulled.dense():
            if slot.name in self._by_name:
                copy(self._by_name[slot.name], values)
        for slot, ids, rows in pulled.rows():
            if slot.name not in self._by_name:
                continue
            parameter = self._by_name[slot.name]
            parameter.index_copy_(0, ids.to(parameter.device), rows.to(parameter.device, parameter.dtype))
        self.note(pulled.header.timeline, pulled.header.version)
