"""Copies of large tensors on the CPU, without torch's own threads.

torch splits a copy among OpenMP threads, which spin for milliseconds when they are done. Where another process takes
over at once (a worker has written its gradients, and the server begins to read them), they hold the cores that it
needs. The threads here sleep instead. A copy of 64 MB between a parameter and shared memory takes 5 ms of CPU time
against torch's 17 ms (two cores).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")

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


class Runs:
    """Tensors of one dtype that are copied one behind the other, from or into one contiguous stretch of memory.

    Made once for a list of sizes: a copy then costs 0.02 us for each small tensor, where torch takes 1 us. The tensors'
    addresses come with each copy, from `addresses`, and the tensors have to live until its end.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        """sizes: each tensor's number of elements."""
        self.dtype = dtype
        self._sizes = list(sizes)
        self.starts = np.zeros(len(self._sizes) + 1, np.int64)
        np.cumsum(np.array(self._sizes, np.int64) * dtype.itemsize, out=self.starts[1:])
        self.nbytes = int(self.starts[-1])

    def addresses(self, tensors: Sequence[Tensor], *, fitting: bool = False) -> Array | None:
        """Where strided tensors lie; None if one is no plain run of memory of this dtype and of its size here.

        `fitting`: they are known to have these sizes.
        """
        if not (fitting or list(map(Tensor.numel, tensors)) == self._sizes) or not (
            set(map(_dtype, tensors)) == {self.dtype}
            and all(map(_is_cpu, tensors))
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
        ):
            return None
        found = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(self._sizes))
        return found if found.all() or not np.diff(self.starts)[found == 0].any() else None

    def still(self, tensors: Sequence[Tensor], known: Array) -> bool:
        """True if tensors whose addresses were `known` lie there still, as plain runs of their sizes.

        The caller keeps the memory that lay there: what has its address is it.
        """
        return (
            list(map(Tensor.data_ptr, tensors)) == known.tolist()
            and list(map(Tensor.numel, tensors)) == self._sizes
            and all(map(Tensor.is_contiguous, tensors))
        )

    def gather(self, target: int, addresses: Array, begin: int = 0, end: int | None = None) -> None:
        """Copy bytes [begin, end) of the runs to the address where the whole stretch begins."""
        from ..cpu.copies import copy_runs

        copy_runs(
            target + self.starts[:-1], addresses, self.starts, begin, self.nbytes if end is None else end
        )

    def scatter(self, addresses: Array, source: Tensor) -> None:
        """Copy a contiguous tensor into the runs. OperandError if it does not fit."""
        from ..cpu.copies import copy_runs
        from ..step.operands import check_run

        check_run("the stretch", source, self.nbytes // self.dtype.itemsize, self.dtype)
        copy_runs(addresses, source.data_ptr() + self.starts[:-1], self.starts, 0, self.nbytes)

    def gather_those(self, targets: Array, addresses: Array, which: Array) -> None:
        """Copy only some of the runs, by a mask, each to an address of its own."""
        from ..cpu.copies import copy_runs

        starts = np.zeros(int(which.sum()) + 1, np.int64)
        np.cumsum(np.diff(self.starts)[which], out=starts[1:])
        copy_runs(targets[which], addresses[which], starts, 0, int(starts[-1]))
