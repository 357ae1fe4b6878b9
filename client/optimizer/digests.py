"""Digests of nested dicts, lists and tensors: a few bytes that tell later whether another value is equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..attachment.local_edits import bits_of


@singledispatch
def digest_of(value: Any) -> Any:
    """Return the value with each tensor replaced by its dtype, shape and 128-bit digest.

    Equal results mean equal values, on whatever device the tensors lie. A sparse or meta tensor equals nothing.
    """
    return value


@digest_of.register(Mapping)
def _(value: Mapping[Any, Any]) -> Any:
    return {key: digest_of(held) for key, held in value.items()}


@digest_of.register(list)
@digest_of.register(tuple)
def _(value: Sequence[Any]) -> Any:
    return [digest_of(held) for held in value]


@digest_of.register
def _(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return object()  # equal to nothing
    content = bits_of(tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), xxhash.xxh3_128_digest(content.numpy().data)
