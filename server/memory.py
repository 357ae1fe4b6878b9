"""Memory for what a model is, and for copies of it: had whole, or refused by name.

Where the machine has none, torch raises a plain RuntimeError on the CPU. Here nothing else can raise one, so it is told
apart by the place and not by its words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pushstep.proto.errors import OutOfMemory

CPU = torch.device("cpu")


def take(
    shape: int | Sequence[int],
    dtype: torch.dtype,
    what: str,
    *,
    device: torch.device = CPU,
    zeros: bool = False,
) -> Tensor:
    """A tensor, whose elements are whatever they were or zeros. OutOfMemory, naming `what` it was for."""
    make = torch.zeros if zeros else torch.empty
    try:
        return make(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        elements = shape if isinstance(shape, int) else math.prod(shape)
        raise OutOfMemory(what=what, need=elements * dtype.itemsize) from error


def copy_of(source: Tensor, what: str) -> Tensor:
    """The same elements in memory of their own on the CPU."""
    return take(source.shape, source.dtype, what).copy_(source)
