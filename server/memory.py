"""Memory for what a model is, and for copies of it: had whole, or refused by name.

Where the machine has none, torch raises a plain RuntimeError on the CPU. Here nothing else can raise one, so it is told
apart by the place and not by its words.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial

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
    make = partial(torch.zeros if zeros else torch.empty, shape, dtype=dtype, device=device)
    found = _had(make)
    if found is None:
        gc.collect()  # what was refused before may lie in cycles, with all that it had brought
        found = _had(make)
    if found is None:
        elements = shape if isinstance(shape, int) else math.prod(shape)
        raise OutOfMemory(what=what, need=elements * dtype.itemsize)
    return found


def _had(make: Callable[[], Tensor]) -> Tensor | None:
    try:
        return make()
    except (RuntimeError, MemoryError):
        return None


def copy_of(source: Tensor, what: str) -> Tensor:
    """The same elements in memory of their own on the CPU."""
    return take(source.shape, source.dtype, what).copy_(source)
