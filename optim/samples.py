"""Whether tensors have been written to, at the price of a look at some of their bytes.

Digests of some lines of 64 bytes are kept, and compared later. Which lines is another choice each time, so a change of
a whole tensor is found at once, and one of a few elements that is made again and again within SPREAD times. Tensors that
are watched whole are digested whole: what changes in them is always found.

64 MB of float32 in memory, one core: 50 us for each look with SPREAD 512 (97 with 256, 130 with 128); 2 ms whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

# Of so many lines one is read, of all tensors together; of fewer lines more, so that LEAST_LINES are.
SPREAD: Final = 512
LEAST_LINES: Final = 64
# Tensors that no kernel reads here (of a device, or with gaps) are looked at in turn, so many each time.
APART_AT_ONCE: Final = 8
_LINE_BYTES: Final = 64
_FACTOR: Final = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_WINDOW: Final = 1 << 22


class Samples:
    """Digests of tensors as they were at the last `take`. Whoever holds this keeps the tensors' memory where it is."""

    def __init__(self, tensors: Sequence[Tensor], whole: Collection[int] = ()) -> None:
        """`whole`: the places in the list of those that are watched whole."""
        from . import sample_kernels
        from .kernel_cache import compiled

        runs = [is_one_run(tensor) for tensor in tensors]
        self._places = [place for place, is_run in enumerate(runs) if is_run]
        self._apart = [
            _Apart(place, tensor, place in whole)
            for place, tensor in enumerate(tensors)
            if not runs[place] and tensor.numel()
        ]
        sizes = [tensors[place].numel() * tensors[place].itemsize for place in self._places]
        lines = sum(size for place, size in zip(self._places, sizes, strict=True) if place not in whole)
        spread = _power_of_two(lines // _LINE_BYTES // LEAST_LINES)
        self._table = np.zeros((len(self._places), sample_kernels.COLUMNS), np.int64)
        self._table[:, sample_kernels.ADDRESS] = [tensors[place].data_ptr() for place in self._places]
        self._table[:, sample_kernels.BYTES] = sizes
        self._table[:, sample_kernels.SPREAD] = [1 if place in whole else spread for place in self._places]
        self._digests = np.zeros(len(self._places), np.uint64)
        self._known = b""
        self._turn = 0
        self._kernel: Any = compiled(sample_kernels.pieces, sample_kernels.SIGNATURE, None)

    def take(self) -> None:
        """Remember them as they are, by other lines than the last time."""
        self._turn += 1
        self._kernel(self._table, self._turn, self._digests)
        self._known = self._digests.tobytes()
        for apart in self._looked_at():
            apart.take(self._turn)

    def changed(self) -> list[int]:
        """The places of those that are not as they were."""
        self._kernel(self._table, self._turn, self._digests)
        found: list[int] = []
        if self._digests.tobytes() != self._known:
            before = np.frombuffer(self._known, np.uint64)
            found = [self._places[row] for row in np.flatnonzero(self._digests != before)]
        return found + [apart.place for apart in self._looked_at() if apart.changed(self._turn)]

    def moved(self, place: int, address: int) -> None:
        """The memory of a tensor lies elsewhere now, as it is."""
        if place in self._places:
            self._table[self._places.index(place), 0] = address

    def _looked_at(self) -> list[_Apart]:
        """Of those apart: the ones that are watched whole, and some of the others."""
        if not self._apart:
            return []
        stride = -(-len(self._apart) // APART_AT_ONCE)
        return [a for k, a in enumerate(self._apart) if a.whole or (k + self._turn) % stride == 0]


class _Apart:
    """One tensor that is read by torch's operations."""

    def __init__(self, place: int, tensor: Tensor, whole: bool) -> None:
        self.place = place
        self.whole = whole
        self._tensor = tensor
        self._digest: Tensor | None = None

    def take(self, turn: int) -> None:
        self._digest = self._now(turn)

    def changed(self, turn: int) -> bool:
        return self._digest is None or not torch.equal(self._digest, self._now(turn))

    @torch.no_grad()
    def _now(self, turn: int) -> Tensor:
        flat = self._tensor.detach().reshape(-1)
        spread = 1 if self.whole else _power_of_two(flat.numel() // 1024)
        total = torch.zeros((), dtype=torch.int64, device=flat.device)
        first = (turn * 0x9E3779B1) & (spread - 1)
        for start in range(first, flat.numel(), _WINDOW * spread):
            values = flat[start : start + _WINDOW * spread : spread]
            bits = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
            words = bits.contiguous().view(_BITS[bits.itemsize]).to(torch.int64)
            places = torch.arange(start, start + words.numel(), device=flat.device, dtype=torch.int64)
            total += ((words ^ (words >> 32)) * (places * _FACTOR | 1)).sum()
        return total


_BITS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_one_run(tensor: Tensor) -> bool:
    """Whether a tensor's elements are all the bytes from its address on, in whatever order, in the host's memory."""
    return tensor.is_cpu and tensor.layout is torch.strided and tensor.numel() > 0 and is_dense(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether a strided tensor's elements lie side by side, in whatever order of dimensions, none of them twice."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def _power_of_two(at_most: int) -> int:
    """The largest up to `at_most`, from 1 to SPREAD."""
    return 1 << (min(max(at_most, 1), SPREAD).bit_length() - 1)
