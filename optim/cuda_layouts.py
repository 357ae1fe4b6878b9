"""How the tensors of a step lie in device memory, and copies in one layout where they differ.

Tensors of one dense layout (any permutation of strides) are flat runs of memory under one numbering of elements,
and a kernel takes them as they are. Where operands of a parameter differ, the parameter's layout decides if
it is dense, else row-major order, and what lies otherwise is copied there before the launch and back after it.
So even then all tensors of a list go into one launch; the copies cost memory for the tensors that need them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cuda_arithmetic import COLUMNS, GRAD, PARAM
from .step import FUSED_DTYPES

_dtype = attrgetter("dtype")


class Copied(NamedTuple):
    """A tensor and the copy that is stepped in its place."""

    tensor: Tensor
    copy: Tensor


def shares_memory(param: Tensor) -> bool:
    """Whether several elements live in one place, as after `expand`."""
    return not param.is_contiguous() and any(
        s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)
    )


def is_row_wise(param: Tensor, state: Tensor) -> bool:
    """Whether the state has one number per row of a parameter whose rows are wider."""
    return state.numel() != param.numel() and tuple(state.shape) == _row_shape(param)


def elementwise(param: Tensor, state: Tensor) -> Tensor:
    """The state in the parameter's shape, if it is row-wise and the rows have one element."""
    if (
        state.shape != param.shape
        and tuple(state.shape) == _row_shape(param)
        and state.numel() == param.numel()
    ):
        return state.view(param.shape)
    return state


def plain(operands: Mapping[int, Sequence[Tensor]]) -> bool:
    """Whether each list is contiguous, of one dtype, and all of them on one device and of equal sizes.

    A thousand small tensors are stepped faster than they are looked at: hence a few loops in C, and no shapes.
    """
    params = operands[PARAM.value]
    sizes, place = list(map(Tensor.numel, params)), {params[0].get_device()}
    return not any(map(Tensor.is_neg, operands[GRAD.value])) and all(
        len(set(map(_dtype, tensors))) == 1
        and tensors[0].dtype in FUSED_DTYPES
        and all(map(Tensor.is_contiguous, tensors))
        and set(map(Tensor.get_device, tensors)) == place
        and list(map(Tensor.numel, tensors)) == sizes
        for tensors in operands.values()
    )


def addresses_of(operands: Mapping[int, Sequence[Tensor]]) -> Any:
    """The pointer table of the operands; counters are left to whoever counts."""
    addresses = np.zeros((len(operands[PARAM.value]), COLUMNS.value), np.int64)
    for column, tensors in operands.items():
        addresses[:, column] = list(map(Tensor.data_ptr, tensors))
    return addresses


def runs(addresses: Any, operands: Mapping[int, Sequence[Tensor]]) -> tuple[Any, Any]:
    """First bytes, and those after the last, of operands that are `plain`, by column and tensor."""
    sizes = list(map(Tensor.numel, operands[PARAM.value]))
    begins = np.ascontiguousarray(addresses[:, list(operands)].T)
    return begins, begins + np.outer([tensors[0].itemsize for tensors in operands.values()], sizes)


def has_null(addresses: Any, operands: Mapping[int, Sequence[Tensor]]) -> bool:
    """Whether a tensor with elements has no memory: zeros that were never written, or it was freed."""
    used = addresses[:, list(operands)]
    if used.all():
        return False
    sizes = np.array(list(map(Tensor.numel, operands[PARAM.value])))
    return bool(((used == 0) & (sizes > 0)[:, None]).any())


def in_one_layout(operands: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], list[Copied]]:
    """The operands of one parameter as flat runs, and which of them are copies."""
    param = operands[PARAM.value]
    strides = (
        param.stride()
        if _is_dense(param)
        else torch.empty(param.shape, dtype=param.dtype, device="meta").stride()
    )
    flat, copied = {}, []
    for column, tensor in operands.items():
        if _is_lazy(tensor) or not _lies_like(tensor, strides):
            copy = torch.empty_strided(param.shape, strides, dtype=tensor.dtype, device=tensor.device)
            copy.copy_(tensor)
            copied.append(Copied(tensor, copy))
            tensor = copy
        flat[column] = tensor
    return flat, copied


def give_back(copied: Sequence[Copied], grad: Tensor, *, grad_too: bool) -> None:
    """Write the copies' new values to the tensors that they stand for, the gradient's only if the step changed it."""
    for tensor, copy in copied:
        if tensor is not grad or (grad_too and not tensor._is_zerotensor()):
            tensor.copy_(copy)


def _is_lazy(tensor: Tensor) -> bool:
    """Whether memory does not hold the values as they are: a pending negation, zeros that were never written."""
    return tensor.is_neg() or (tensor.data_ptr() == 0 and tensor.numel() > 0)


def _row_shape(param: Tensor) -> tuple[int, int]:
    return (param.shape[0] if param.dim() else 1, 1)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _lies_like(tensor: Tensor, strides: Sequence[int]) -> bool:
    return tensor.numel() == 0 or all(
        own == wanted
        for own, wanted, size in zip(tensor.stride(), strides, tensor.shape, strict=True)
        if size > 1
    )
