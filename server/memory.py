"""Memory for what a model is, and for copies of it: had whole, or refused by name.

Where the machine has none, torch raises a plain RuntimeError on the CPU. Here nothing else can raise one, so it is told
apart by the place and not by its words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushstep.proto.errors import OutOfMemory
from pushstep.proto.memory import SMALLEST_POOLED_BYTES, fresh_memory

from . import garbage

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
    need_bytes = (shape if isinstance(shape, int) else math.prod(shape)) * dtype.itemsize

    def make() -> Tensor:
        if not zeros and device == CPU and need_bytes >= SMALLEST_POOLED_BYTES:
            # a copy goes soon, and back to the system: malloc would keep what it takes, up to 32 MiB a piece
            return torch.from_numpy(fresh_memory(need_bytes)).view(dtype).view(shape)
        return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)

    found = _had(make)
    if found is None:
        garbage.collect()  # what was refused before may lie in cycles, with all that it had brought
        found = _had(make)
    if found is None:
        raise OutOfMemory(what=what, need=need_bytes)
    return found


def _had(make: Callable[[], Tensor]) -> Tensor | None:
    try:
        return make()
    except (RuntimeError, MemoryError):
        return None


def copy_of(source: Tensor, what: str) -> Tensor:
    """The same elements in memory of their own on the CPU."""
    return take(source.shape, source.dtype, what).copy_(source)
