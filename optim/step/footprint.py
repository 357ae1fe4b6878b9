"""The footprint of a list of tensors: everything that a kernel takes from them, except their values.

What is remembered about tensors is remembered under their footprint, and holds for all tensors with the same one. An
address is not enough: another tensor may have it by now, with another dtype or size. A footprint refers to no tensor,
so it keeps none alive. It also holds no weak reference, since torch refuses to swap a tensor that has one
(`torch.utils.swap_tensors`).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

_dtype = attrgetter("dtype")

Footprint = tuple[list[int], list[torch.dtype], list[int], bool]
"""Addresses, dtypes and numbers of elements, and whether all tensors are contiguous.

A list with a tensor that is not contiguous is looked at anew in each step.
"""

Seen = tuple[Footprint, Footprint]
"""The footprints of the parameters and the gradients of a step."""


def footprint(tensors: Sequence[Tensor]) -> Footprint:
    """The footprint of tensors, by four loops in C: 0.15 ms for a thousand.

    RuntimeError for a tensor that has no memory of its own, such as a sparse or a fake one.
    """
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_dtype, tensors)),
        list(map(Tensor.numel, tensors)),
        all(map(Tensor.is_contiguous, tensors)),
    )
