"""Finds out whether tensors have been written to, by reading some of their bytes.

Digests of some lines of 64 bytes are kept and compared later. Each time other lines are chosen. So a change of a whole
tensor is found at once, and a change of a few elements that is repeated is found within SPREAD times. Tensors that are
watched whole are digested whole, and every change in them is found. If a step changes only some rows of a table, a few
of the table's lines are read and some of the rows that changed last, so that the look costs little beside such a step.

A look at 64 MB of float32 takes 50 us on one core; whole, it takes 2 ms.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

# One of this many lines is read, over all tensors together. It is less where fewer than LEAST_LINES would be read.
SPREAD: Final = 512
LEAST_LINES: Final = 64
# Read of a table that changes by rows: lines, rows that changed last, and bytes of each such row, all at most.
TABLE_LINES: Final = 32
RECENT_ROWS: Final = 16
ROW_BYTES: Final = 4096
# Tensors that no kernel reads (on a device, or with gaps) are looked at in turn, about this many each time.
APART_AT_ONCE: Final = 8
_LINE_BYTES: Final = 64
_FACTOR: Final = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64
_WINDOW: Final = 1 << 22
_NOTHING: Final[list[int]] = []


class Samples:
    """Digests of tensors as they were at the last `take`.

    The owner must keep the tensors' memory in place, because this object reads it by address.
    """

    def __init__(
        self, tensors: Sequence[Tensor], whole: Collection[int] = (), tables: Collection[int] = ()
    ) -> None:
        """whole: places in `tensors` of those to watch whole; tables: of those that change by rows."""
        runs = [place for place, tensor in enumerate(tensors) if is_one_run(tensor)]
        others = set(range(len(tensors))) - set(runs)
        self._apart = [
            _Apart(place, tensors[place], place in whole)
            for place in sorted(others)
            if tensors[place].numel()
        ]
        lines = {place: -(-tensors[place].nbytes // _LINE_BYTES) for place in runs}
        usual = sum(count for place, count in lines.items() if place not in {*whole, *tables})
        spread = _power_of_two(usual // LEAST_LINES, SPREAD)
        self._tensors = _Pieces(
            runs,
            [tensors[place].data_ptr() for place in runs],
            [tensors[place].nbytes for place in runs],
            [_spread(place, lines[place], spread, whole, tables) for place in runs],
        )
        self._tables = {
            place: (tensors[place].data_ptr(), tensors[place].nbytes // tensors[place].shape[0])
            for place in runs
            if place in tables
            and place not in whole
            and tensors[place].is_contiguous()
            and tensors[place].dim()
        }
        # the places of tensors whose every byte is read, so that every change is found
        self.whole = frozenset(
            [place for place in runs if _spread(place, lines[place], spread, whole, tables) == 1]
            + [apart.place for apart in self._apart if apart.whole]
            + [place for place in others if not tensors[place].numel()]
        )
        self._recent: _Pieces | None = None
        # The last pieces of rows. They are used again if as many rows of the same tables come.
        self._kept: _Pieces | None = None
        self._turn = 0

    def take(self, rows: Mapping[int, Tensor] | None = None) -> None:
        """Remember the tensors as they are now, by other lines than the last time.

        rows: for each table's place, the ids of the rows that have just changed.
        """
        self._turn += 1
        self._tensors.take(self._turn)
        self._recent = self._rows(rows) if rows else None
        if self._recent is not None:
            self._recent.take(self._turn)
        if self._apart:
            for apart in self._looked_at():
                apart.take(self._turn)

    def changed(self) -> list[int]:
        """The places of tensors that are found to differ from the last `take`."""
        found = self._tensors.changed(self._turn)
        if self._recent is not None:
            found = found + self._recent.changed(self._turn)
        if self._apart:
            found = found + [apart.place for apart in self._looked_at() if apart.changed(self._turn)]
        return found

    def moved(self, place: int, address: int) -> None:
        """Say that the memory of the tensor at `place` is now at `address`, with the same content."""
        self._tensors.moved(place, address)
        self._recent = None

    def _rows(self, rows: Mapping[int, Tensor]) -> _Pieces | None:
        found = [
            (place, *self._tables[place], ids.numpy()) for place, ids in rows.items() if place in self._tables
        ]
        if not found:
            return None
        places: list[int] = []
        addresses, sizes = [], []
        for place, address, row_bytes, ids in found:
            stride = -(-len(ids) // RECENT_ROWS) or 1
            some = ids[self._turn % stride :: stride]
            places += [place] * len(some)
            addresses.append(address + some * row_bytes)
            sizes += [min(row_bytes, ROW_BYTES)] * len(some)
        where = addresses[0] if len(addresses) == 1 else np.concatenate(addresses)
        if self._kept is None or self._kept.places != places:
            self._kept = _Pieces(places, where, sizes, 1)
        else:
            self._kept.lie_at(where)
        return self._kept

    def _looked_at(self) -> list[_Apart]:
        """The tensors without a kernel to look at this turn: those watched whole, and some of the others."""
        stride = -(-len(self._apart) // APART_AT_ONCE)
        return [a for k, a in enumerate(self._apart) if a.whole or (k + self._turn) % stride == 0]


class _Pieces:
    """Pieces of memory that the kernel reads, each of one tensor, and their digests."""

    def __init__(self, places: Sequence[int], addresses: Any, sizes: Any, spreads: Any) -> None:
        """places: of each piece's tensor. spreads: of how many lines one is read. sizes are in bytes."""
        from ..kernels import samples as sample_kernels
        from ..kernels.cache import compiled

        self.places = list(places)
        self._table = np.empty((len(self.places), sample_kernels.COLUMNS), np.int64)
        self._table[:, sample_kernels.ADDRESS] = addresses
        self._table[:, sample_kernels.BYTES] = sizes
        self._table[:, sample_kernels.SPREAD] = spreads
        self._digests = np.zeros(len(self.places), np.uint64)
        self._known = b""
        self._kernel: Any = compiled(sample_kernels.pieces, sample_kernels.SIGNATURE, None)

    def take(self, turn: int) -> None:
        self._kernel(self._table, turn, self._digests)
        self._known = self._digests.tobytes()

    def changed(self, turn: int) -> list[int]:
        self._kernel(self._table, turn, self._digests)
        if self._digests.tobytes() == self._known:
            return _NOTHING
        before = np.frombuffer(self._known, np.uint64)
        return sorted({self.places[row] for row in np.flatnonzero(self._digests != before)})

    def moved(self, place: int, address: int) -> None:
        if place in self.places:
            self._table[self.places.index(place), 0] = address

    def lie_at(self, addresses: Any) -> None:
        """Set the pieces' addresses."""
        self._table[:, 0] = addresses


def _spread(place: int, lines: int, usual: int, whole: Collection[int], tables: Collection[int]) -> int:
    if place in whole:
        return 1
    return _power_of_two(lines // TABLE_LINES, lines) if place in tables else usual


class _Apart:
    """One tensor that torch's operations read, because no kernel does, and its digest."""

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
        spread = 1 if self.whole else _power_of_two(flat.numel() // 1024, SPREAD)
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
    """True if a tensor on the CPU has elements, and they fill memory from its address on, in any order."""
    return tensor.is_cpu and tensor.layout is torch.strided and tensor.numel() > 0 and is_dense(tensor)


def is_dense(tensor: Tensor) -> bool:
    """True if a strided tensor's elements lie side by side, in any order of dimensions, without overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride != expected:
                return False
            expected *= length
    return True


def _power_of_two(wanted: int, at_most: int) -> int:
    """The largest power of two that is at most `wanted` and `at_most`; 1 if there is none."""
    return 1 << (max(min(wanted, at_most), 1).bit_length() - 1)
