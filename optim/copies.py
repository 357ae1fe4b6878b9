"""Copies of large tensors on the CPU, without torch's own threads.

torch shares a copy among OpenMP threads, which spin for milliseconds when they are done: on a host where the next
process takes over at once (a worker has put its gradients down, the server begins to read them) they hold the cores
that it needs. The helpers here sleep. 64 MB between a parameter and shared memory, 2 cores, least time and CPU time:
torch 3.8 and 17 ms, these threads 2.5 and 5; one core's memcpy 6 to 9 and 7 to 9.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Up to here torch copies in the calling thread, and sooner than we do: its grain size is 32768 elements.
TORCH_ELEMENTS: Final = 32 << 10


def copy(target: Tensor, source: Tensor, *, non_blocking: bool = False) -> None:
    """`target.copy_(source, non_blocking)` of tensors that do not overlap, unseen by autograd."""
    same = target.dtype == source.dtype
    if (same or _is_wider(target, source)) and _are_long_runs(target, source):
        from .cpu_copies import copy_bytes, copy_wider

        (copy_bytes if same else copy_wider)(target, source)
        torch.autograd.graph.increment_version(target)
    else:
        with torch.no_grad():
            target.copy_(source, non_blocking=non_blocking)


def _is_wider(target: Tensor, source: Tensor) -> bool:
    return target.dtype == torch.float32 and source.dtype in (torch.bfloat16, torch.float16)


def _are_long_runs(target: Tensor, source: Tensor) -> bool:
    """Whether both are one run of as many elements."""
    return (
        target.numel() > TORCH_ELEMENTS
        and target.is_cpu
        and source.is_cpu
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
        and not (source.is_neg() or source.is_conj())
    )
