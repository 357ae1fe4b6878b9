"""Memory for models and their copies: allocated whole, or refused with a named error.

If the machine has no memory, torch raises a plain RuntimeError on the CPU. Nothing else can raise one here, so the error
is recognised by its place and not by its text.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pushstep.proto.errors import OutOfMemory
from pushstep.proto.wire.buffers import SMALLEST_POOLED_BYTES, fresh_memory

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
    """A tensor with zeros, or with undefined elements. OutOfMemory, which names `what` the tensor was for."""
    need_bytes = (shape if isinstance(shape, int) else math.prod(shape)) * dtype.itemsize

    def make() -> Tensor:
        if device == CPU and need_bytes >= SMALLEST_POOLED_BYTES:
            # it has huge pages, and what is freed returns to the system: malloc would keep pieces of up to 32 MiB
            return torch.from_numpy(fresh_memory(need_bytes)).view(dtype).view(shape)
        return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=device)

    found = _had(make)
    if found is None:
        garbage.collect()  # refused pushes may lie in reference cycles, with the memory that they hold
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
    """The same elements in memory of their own on the CPU. OutOfMemory, which names `what`."""
    return take(source.shape, source.dtype, what).copy_(source)


def give_back_freed() -> None:
    """Have malloc return to the system what it keeps of freed blocks. With another malloc than glibc's this does nothing."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
