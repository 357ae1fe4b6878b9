"""What a worker's module held before attach took the server's values: kept until its first step.

A script that goes on from a checkpoint loads its module, attaches, and then loads the optimizer's state. If the server is
elsewhere by then, attach has overwritten what the state belongs to. It is brought back then, as it is when attach fails.
In the host's memory, and no more than the state that torch would have kept here, of which this side is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .local_edits import same_bits


class Overwritten:
    """Earlier values by name, of those that became others."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def keep(self, name: str, tensor: Tensor, becomes: Tensor) -> None:
        """A tensor is about to be overwritten."""
        if name not in self.values and not same_bits(tensor, becomes.to(tensor.dtype)):
            with torch.no_grad():
                self.values[name] = tensor.detach().to("cpu", copy=True)

    def drop(self, names: Iterable[str]) -> None:
        """These were written to since: what they hold is wanted."""
        for name in names:
            self.values.pop(name, None)

    def forget(self) -> None:
        """They will not be asked for any more."""
        self.values = {}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Have tensors, by name, what they held, and forget it."""
        with torch.no_grad():
            for name, value in self.values.items():
                if name in tensors:
                    tensors[name].copy_(value)
        self.forget()
