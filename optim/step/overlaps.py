"""Which tensors of a step share memory, and so must not be stepped at the same time.

torch steps a list one tensor after the other. Here threads and CUDA programs step all of them at once. The result is
the same as long as no tensor is written where another one is. Two parameters can share memory (one storage, tied
through `.data`), and two parameters can share a state. Then the list is cut into waves. Tensors that overlap are in
different waves, in the order of the list, so the result is that of torch's order. The waves are found from addresses,
when a list is first seen.
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
"""Waves of places in a list. The places of one wave are stepped at once, and the waves one after the other."""

KEPT: Final = 16


def waves_of(columns: Sequence[Sequence[Tensor]]) -> Waves | None:
    """The waves of a list; None if all of it can be stepped at once.

    columns: the lists of tensors that the step writes to, all of one length. OperandError if two contiguous tensors of
    one parameter overlap.
    """
    begins = np.array([list(map(_begin, tensors)) for tensors in columns], np.int64)
    lengths = np.array([list(map(_length_bytes, tensors)) for tensors in columns], np.int64)
    runs = np.array([list(map(_is_run, tensors)) for tensors in columns])
    return _waves(begins.tobytes(), (begins + lengths).tobytes(), runs.tobytes(), len(columns))


def waves_of_runs(begins: Any, ends: Any) -> Waves | None:
    """`waves_of` for contiguous tensors, by their addresses.

    begins, ends: int64 arrays of shape (columns, tensors), with each tensor's first byte and the byte after its last.
    """
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
    """The waves, given for each place the earlier places that it overlaps; None if nothing overlaps.

    Each place is in the first wave after the waves of the places that it overlaps.
    """
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
    """The address of the first element; 0 for a tensor without memory of its own, such as a sparse one."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def _is_run(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


def _length_bytes(tensor: Tensor) -> int:
    """Bytes from the start of a tensor's first element to the end of its last, gaps included."""
    if tensor.numel() == 0 or _begin(tensor) == 0:
        return 0
    if _is_run(tensor):
        return tensor.numel() * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
