"""Copies of large tensors on the CPU, without torch's own threads.

torch splits a copy among OpenMP threads, which spin for milliseconds when they are done. Where another process takes
over at once (a worker has written its gradients, and the server begins to read them), they hold the cores that it
needs. The threads here sleep instead. A copy of 64 MB between a parameter and shared memory takes 5 ms of CPU time
against torch's 17 ms (two cores).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Up to this size torch copies in the calling thread, which is faster: its grain size is 32768 elements.
TORCH_ELEMENTS: Final = 32 << 10


def copy(target: Tensor, source: Tensor, *, non_blocking: bool = False) -> None:
    """`target.copy_(source, non_blocking)` for tensors that do not overlap, not recorded by autograd."""
    if target.numel() <= TORCH_ELEMENTS and not torch.is_grad_enabled():
        target.copy_(source, non_blocking=non_blocking)
        return
    same = target.dtype == source.dtype
    if (same or _is_wider(target, source)) and _are_long_runs(target, source):
        from ..cpu.copies import copy_bytes, copy_wider

        (copy_bytes if same else copy_wider)(target, source)
        torch.autograd.graph.increment_version(target)
    else:
        with torch.no_grad():
            target.copy_(source, non_blocking=non_blocking)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """`copy` of each source into its target, of the same shape. Small tensors take one call of torch's for all."""
    if not targets:
        return
    if max(map(Tensor.numel, targets)) > TORCH_ELEMENTS:
        for target, source in zip(targets, sources, strict=True):
            copy(target, source)
    elif torch.is_grad_enabled():
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_copy_(targets, sources)


def _is_wider(target: Tensor, source: Tensor) -> bool:
    return target.dtype == torch.float32 and source.dtype in (torch.bfloat16, torch.float16)


def _are_long_runs(target: Tensor, source: Tensor) -> bool:
    """True if both are long, contiguous, on the CPU and of one shape, and memory holds their values."""
    return (
        target.numel() > TORCH_ELEMENTS
        and target.is_cpu
        and source.is_cpu
        and target.shape == source.shape
        and target.is_contiguous()
        and source.is_contiguous()
        and not (source.is_neg() or source.is_conj())
    )
