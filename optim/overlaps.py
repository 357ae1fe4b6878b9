"""Which tensors of a step share memory, and so may not be stepped at the same time.

torch steps a list one tensor after the other. Here threads and programs step all of them at once, which is the same as long
as none is written where another is. Where some are (two parameters over one storage, tied through `.data`; a state that
two parameters share) the list is cut into waves: whatever overlaps is in different ones, in the order of the list, and
the result is that of one after the other. That is found out from addresses, when a list is first seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from .operands import OperandError

Waves = Sequence[Sequence[int]]
"""Places in a list: each sequence is stepped at once, one after the other."""

KEPT: Final = 16


def waves_of(columns: Sequence[Sequence[Tensor]]) -> Waves | None:
    """The waves of a list; None if all of it can be stepped at once. columns: what is written, each of one length."""
    begins = np.array([list(map(_begin, tensors)) for tensors in columns], np.int64)
    lengths = np.array([list(map(_length_bytes, tensors)) for tensors in columns], np.int64)
    runs = np.array([list(map(_is_run, tensors)) for tensors in columns])
    return _waves(begins.tobytes(), (begins + lengths).tobytes(), runs.tobytes(), len(columns))


def waves_of_runs(begins: Any, ends: Any) -> Waves | None:
    """The same of tensors without gaps: (columns, tensors) first bytes of each, and those after the last."""
    return _waves(begins.tobytes(), ends.tobytes(), b"\1" * begins.size, len(begins))


@lru_cache(KEPT)
def _waves(begin_bytes: bytes, end_bytes: bytes, run_bytes: bytes, columns: int) -> Waves | None:
    begins, ends = np.frombuffer(begin_bytes, np.int64), np.frombuffer(end_bytes, np.int64)
    count = len(begins) // columns
    used = np.flatnonzero(ends > begins)
    order = used[np.argsort(begins[used], kind="stable")]
    begins, ends, owners = begins[order], ends[order], order % count
    touching = np.flatnonzero(begins[1:] < np.maximum.accumulate(ends)[:-1]) + 1
    if not len(touching):
        return None
    earlier: list[set[int]] = [set() for _ in range(count)]
    for at in touching.tolist():
        for before in np.flatnonzero(ends[:at] > begins[at]).tolist():
            first, second = sorted((int(owners[before]), int(owners[at])))
            if first != second:
                earlier[second].add(first)
            elif run_bytes[order[before]] and run_bytes[order[at]]:
                raise OperandError(
                    f"what belongs to parameter {first} of the list (itself, its states, ...) lies over each other in "
                    "memory: give each tensor its own"
                )
    return _in_order(earlier)


def _in_order(earlier: Sequence[set[int]]) -> Waves | None:
    """Each place in the first wave behind those of the earlier ones that it overlaps."""
    number_of: list[int] = []
    for others in earlier:
        number_of.append(1 + max((number_of[other] for other in others), default=-1))
    if not max(number_of):
        return None
    return [
        [place for place, number in enumerate(number_of) if number == wave]
        for wave in range(max(number_of) + 1)
    ]


def _begin(tensor: Tensor) -> int:
    """The address of the first element; 0 of a tensor that has no memory of its own: sparse, a subclass's."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _is_run(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _length_bytes(tensor: Tensor) -> int:
    """From the first byte of a tensor's first element to the last of its last, gaps included."""
    if tensor.numel() == 0 or _begin(tensor) == 0:
        return 0
    if _is_run(tensor):
        return tensor.numel() * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
