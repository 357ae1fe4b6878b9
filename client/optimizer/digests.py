"""Digests of nested dicts, lists and tensors: a few bytes that tell later whether another value is equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from ..attachment.local_edits import bits_of


def digest_of(value: Any) -> Any:
    """Return the value with each tensor replaced by its dtype, shape and 128-bit digest.

    Equal results mean equal values, on whatever device the tensors lie. A sparse or meta tensor equals nothing.
    """
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        return {key: digest_of(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [digest_of(held) for held in value]
    return value


def _of_tensor(tensor: Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return object()  # equal to nothing
    content = bits_of(tensor).cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), xxhash.xxh3_128_digest(content.numpy().data)
