"""Tensors with bytes around them that nobody may change."""

from __future__ import annotations

import torch

GUARD = 0xA5
GUARD_BYTES = 256  # before and behind: more than the longest vector


class Guards:
    """Puts tensors between guards, and says whether these are as they were."""

    def __init__(self):
        self._kept = []

    def around(self, tensor):
        """The same values, strides and place within 64 bytes, in memory of its own that begins and ends with guards."""
        size = tensor.itemsize
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n)
        extent = (last + 1) * size if tensor.numel() else 0
        at = GUARD_BYTES + tensor.data_ptr() % 64 // size * size
        memory = torch.full((at + extent + GUARD_BYTES + 64,), GUARD, dtype=torch.uint8)
        at += -memory.data_ptr() % 64
        inner = memory[at : at + extent].view(tensor.dtype)
        inner.fill_(0)
        made = inner.as_strided(tensor.shape, tensor.stride()) if tensor.numel() else inner.view(tensor.shape)
        places = tuple(slice(0, 1) if s == 0 else slice(None) for s in tensor.stride())
        made[places].copy_(tensor[places])
        self._kept.append((memory, at, at + extent))
        return made

    def check(self):
        """Raise if a byte outside of the tensors was changed."""
        for memory, begin, end in self._kept:
            assert (memory[:begin] == GUARD).all(), "bytes before a tensor were written to"
            assert (memory[end:] == GUARD).all(), "bytes behind a tensor were written to"
