"""The layouts of a step's tensors in device memory, and copies in one layout where they differ.

Tensors of one dense layout (any permutation of strides) are flat runs of memory under one numbering of elements,
and a kernel takes them as they are. If the operands of a parameter differ in layout, all use the parameter's layout if
it is dense, else row-major order. An operand in another layout is copied before the launch and copied back after it.
So all tensors of a list still go into one launch. Only the tensors that are copied cost memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..step.step import FUSED_DTYPES
from .arithmetic import COLUMNS, GRAD, PARAM

_dtype = attrgetter("dtype")


class Copied(NamedTuple):
    """A tensor and the copy that is stepped in its place."""

    tensor: Tensor
    copy: Tensor


def shares_memory(param: Tensor) -> bool:
    """Whether several elements share one memory location, as after `expand`."""
    return not param.is_contiguous() and any(
        s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)
    )


def is_row_wise(param: Tensor, state: Tensor) -> bool:
    """Whether the state has one number per row of a parameter whose rows are wider."""
    return state.numel() != param.numel() and tuple(state.shape) == _row_shape(param)


def elementwise(param: Tensor, state: Tensor) -> Tensor:
    """The state, viewed in the parameter's shape if it is row-wise and the rows have one element."""
    if (
        state.shape != param.shape
        and tuple(state.shape) == _row_shape(param)
        and state.numel() == param.numel()
    ):
        return state.view(param.shape)
    return state


def plain(operands: Mapping[int, Sequence[Tensor]]) -> bool:
    """Whether each list is contiguous and of one dtype with a kernel, and all share one device and sizes.

    Looking at a thousand small tensors takes longer than stepping them. So this is a few loops in C, which compare no
    shapes.
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
    """The pointer table of the operands: int64 (tensors, COLUMNS).

    The caller fills in the column of the counters.
    """
    addresses = np.zeros((len(operands[PARAM.value]), COLUMNS.value), np.int64)
    for column, tensors in operands.items():
        addresses[:, column] = list(map(Tensor.data_ptr, tensors))
    return addresses


def runs(addresses: Any, operands: Mapping[int, Sequence[Tensor]]) -> tuple[Any, Any]:
    """Addresses of the first byte and behind the last, each (columns, tensors), of operands that are `plain`."""
    sizes = list(map(Tensor.numel, operands[PARAM.value]))
    begins = np.ascontiguousarray(addresses[:, list(operands)].T)
    return begins, begins + np.outer([tensors[0].itemsize for tensors in operands.values()], sizes)


def has_null(addresses: Any, operands: Mapping[int, Sequence[Tensor]]) -> bool:
    """Whether a tensor with elements has no memory: it holds lazy zeros, or it was freed."""
    used = addresses[:, list(operands)]
    if used.all():
        return False
    sizes = np.array(list(map(Tensor.numel, operands[PARAM.value])))
    return bool(((used == 0) & (sizes > 0)[:, None]).any())


def in_one_layout(operands: Mapping[int, Tensor]) -> tuple[dict[int, Tensor], list[Copied]]:
    """The operands of one parameter as flat runs in one layout, and those of them that are copies."""
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
    """Write the values of copies back to their tensors.

    grad_too: whether the step changed the gradient. Otherwise the gradient's copy is not written back.
    """
    for tensor, copy in copied:
        if tensor is not grad or (grad_too and not tensor._is_zerotensor()):
            tensor.copy_(copy)


def _is_lazy(tensor: Tensor) -> bool:
    """Whether memory does not hold the values: the tensor has a pending negation, or holds lazy zeros."""
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
