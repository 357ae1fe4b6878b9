"""Neighbouring dense gradients as one source of bytes, gathered by one kernel where they are sent or shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pushstep.optim.ops.copies import Array, Runs
from pushstep.proto.wire.frames import Writer
from pushstep.proto.wire.layout import Slot

# Fewer are copied one by one: what the table costs beside them is not worth it.
LEAST_TENSORS: Final = 8


class Stretch:
    """The source of some gradients that lie anywhere in memory, in the order of their parameters."""

    def __init__(self, runs: Runs, tensors: Sequence[Tensor], addresses: Array, indices: Array) -> None:
        """indices: of the parameters, ascending."""
        self.runs = runs
        self.addresses = addresses
        self.indices = indices
        self.nbytes = runs.nbytes
        self.unit_bytes = runs.dtype.itemsize
        # the addresses are theirs
        self._tensors = tensors

    def writer(self) -> Writer:
        """A writer that gathers straight into its target."""

        def write(target: Tensor, start: int) -> None:
            self.runs.gather(target.data_ptr() - start, self.addresses, start, start + target.numel())

        return write


class StretchTable:
    """What `Stretch` needs of a run of parameters, made once."""

    def __init__(self, slots: Sequence[Slot], dtype: torch.dtype) -> None:
        self._runs = Runs([slot.stop - slot.start for slot in slots], dtype)
        self._indices = np.array([slot.index for slot in slots], np.int64)

    def of(self, tensors: Sequence[Tensor]) -> Stretch | None:
        """The source of these gradients, which have their slots' shapes; None if some have to be laid out anew or cast."""
        addresses = self._runs.addresses(tensors, fitting=True)
        return None if addresses is None else Stretch(self._runs, tensors, addresses, self._indices)
