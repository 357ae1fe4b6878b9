"""The values that a worker's module held before attach took the server's, kept until the first step.

A script that continues from a checkpoint loads its module, attaches, and then loads the optimizer's state. If the server
is at another version, attach has overwritten the values that the state belongs to, and loading brings them back. So does
an attach that fails. The copies lie in the host's memory. They are no larger than the optimizer state that torch would
have kept here, and that this side does not keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .local_edits import same_bits


class Overwritten:
    """Owns the earlier values, by name, of tensors whose values changed at attach."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def keep(self, name: str, tensor: Tensor, becomes: Tensor) -> None:
        """Copy a tensor that is about to be overwritten, if `becomes` differs from it."""
        if name not in self.values and not same_bits(tensor, becomes.to(tensor.dtype)):
            with torch.no_grad():
                self.values[name] = tensor.detach().to("cpu", copy=True)

    def drop(self, names: Iterable[str]) -> None:
        """Drop the earlier values of tensors that the user has written to since: the new values are wanted."""
        for name in names:
            self.values.pop(name, None)

    def forget(self) -> None:
        """Drop all earlier values."""
        self.values = {}

    def put_back(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the earlier values back into tensors, by name, and drop them."""
        with torch.no_grad():
            for name, value in self.values.items():
                if name in tensors:
                    tensors[name].copy_(value)
        self.forget()
