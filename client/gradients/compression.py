"""Lossy pushes (int8, or only the largest elements), and the residuals that keep what they leave out.

A lossy push differs from its gradient. The difference is the residual: one float per element, kept here by parameter.
It is added to the parameter's next gradient, so what a push leaves out is delayed and not lost. Residuals reflect
applied pushes only: the new residual is kept aside until the receipt, and discarded if the push was not applied. Until
then a push's bytes are made once, so that every attempt sends the same bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from pushstep.proto.errors import InvalidSettings, WrongDtype
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.dtypes import INT8_BLOCK, int8_bytes
from pushstep.proto.wire.frames import Piece, Writer
from pushstep.proto.wire.layout import MAX_INDEXED, Slot

Dtype = torch.dtype | str | None
Wire = Dtype | tuple[Dtype, Dtype]


def push_and_pull(wire: Wire) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of pushes and pulls of `connect(wire=...)`; None means each parameter's own dtype.

    int8 alone means int8 pushes and bfloat16 pulls. WrongDtype for a dtype that cannot travel, for an explicit pull
    dtype of int8, and for a tuple that is not a pair.
    """
    if isinstance(wire, tuple) and len(wire) != 2:
        raise WrongDtype(what="wire", got=f"{len(wire)} dtypes", expected="one, or a pair (pushes, pulls)")
    push, pull = wire if isinstance(wire, tuple) else (wire, wire)
    pushed, pulled = dtypes.named(push, "wire"), dtypes.named(pull, "wire")
    if pulled == torch.int8:
        if isinstance(wire, tuple):
            raise WrongDtype(
                what="wire",
                got="int8 for pulls",
                expected=f"one of {', '.join(dtypes.NAMES.values())} for pulls",
            )
        pulled = torch.bfloat16
    return pushed, pulled


# Limit of the memory that is kept from earlier pushes for the next ones.
KEPT_BYTES: Final = 1 << 30


class Quantised:
    """The source of an int8 gradient. Each block's codes are made once, when they are first asked for."""

    unit_bytes = 1

    def __init__(
        self, gradient: Tensor, residual: Tensor, length: int, take: Callable[[int], Tensor]
    ) -> None:
        """`gradient`: units of `length` elements; `residual`: as many float32; `take` gives memory."""
        self._gradient = gradient.detach().cpu().contiguous()
        self._residual = residual
        self.rest = take(residual.nbytes).view(residual.dtype)
        self._length = length
        units = gradient.numel() // length if length else 0
        self.nbytes = units * int8_bytes(length)
        self._blocks = units * -(-length // INT8_BLOCK)
        self._made = 0
        self._codes = take(self.nbytes)
        # an attempt that timed out may still make codes in gRPC's thread while the next attempt runs
        self._lock = threading.Lock()

    def writer(self) -> Writer:
        """A function that makes the blocks up to the last byte asked for, then copies the bytes."""
        return self._write

    def _write(self, target: Tensor, start: int) -> None:
        stop = start + target.numel()
        with self._lock:
            self._make(self._blocks if stop == self.nbytes else self._block_after(stop))
        target.copy_(self._codes[start:stop])

    def _block_after(self, byte: int) -> int:
        unit, within = divmod(byte, int8_bytes(self._length))
        return unit * -(-self._length // INT8_BLOCK) + -(-within // int8_bytes(INT8_BLOCK))

    def _make(self, end: int) -> None:
        from pushstep.optim.ops.quantise import quantise  # with numba, which most workers need later or never

        if end > self._made:
            quantise(
                self._gradient,
                self._residual,
                self.rest,
                self._codes,
                length=self._length,
                block=INT8_BLOCK,
                begin=self._made,
                end=end,
            )
            self._made = end


class Compression:
    """Compresses one session's pushes, and owns the residuals of its parameters by name."""

    def __init__(self, wire: torch.dtype | None, top_k: float | None) -> None:
        """`top_k`: the fraction of a dense gradient to send; None: all. InvalidSettings, WrongDtype."""
        is_number = isinstance(top_k, (int, float)) and not isinstance(top_k, bool)
        if top_k is not None and not (is_number and 0 < top_k <= 1):
            raise InvalidSettings(
                problem=f"top_k={top_k!r}: the fraction of elements to send lies above 0, up to 1"
            )
        if top_k is not None and wire == torch.int8:
            raise WrongDtype(what="wire with top_k", got="int8", expected=", ".join(dtypes.NAMES.values()))
        self.wire = wire
        self.top_k = top_k
        self.residuals: dict[str, Tensor] = {}
        # memory of residuals that were replaced, for the next ones
        self._memory = BufferPool(KEPT_BYTES)
        self._pending: list[tuple[Slot, Tensor | None, Quantised | Tensor]] = []

    @property
    def owes(self) -> bool:
        """Whether pushes are lossy: they leave out what later pushes bring."""
        return self.wire == torch.int8 or self.top_k is not None

    @property
    def rounds_to(self) -> torch.dtype | None:
        """The dtype that a gradient may be rounded to before it comes here; None: it must not be rounded."""
        return None if self.owes else self.wire

    def begin(self) -> None:
        """Start a push: discard the pending residuals of an earlier one."""
        self._pending.clear()

    def settle(self, *, applied: bool) -> None:
        """Resolve the last push: keep its pending residuals if it was applied, otherwise discard them."""
        for slot, ids, rest in self._pending if applied else ():
            values = rest.rest if isinstance(rest, Quantised) else rest
            if ids is None:
                self.residuals[slot.name] = values
            else:
                if slot.name not in self.residuals:
                    # zeros from calloc: only the touched rows of a large table take memory
                    self.residuals[slot.name] = _zeros(slot.rows, slot.row_elements)
                self.residuals[slot.name][ids] = values.view(ids.numel(), slot.row_elements)
        self._pending.clear()

    def dtype_of(self, slot: Slot) -> torch.dtype:
        """The wire dtype of this parameter's gradients."""
        return self.wire or slot.dtype

    def dense(self, slot: Slot, gradient: Tensor) -> Piece | Quantised:
        """The source of a dense gradient's bytes."""
        if self.wire != torch.int8:
            return Piece(gradient, self.dtype_of(slot))
        residual = self.residuals.get(slot.name)
        if residual is None:
            residual = _zeros(slot.stop - slot.start)
        piece = Quantised(gradient, residual.view(-1), slot.stop - slot.start, self._memory.take)
        self._pending.append((slot, None, piece))
        return piece

    def rows(self, slot: Slot, ids: Tensor, rows: Tensor) -> Piece | Quantised:
        """The source of a row-sparse gradient's rows; `ids` are unique."""
        if self.wire != torch.int8:
            return Piece(rows, self.dtype_of(slot))
        table = self.residuals.get(slot.name)
        residual = _zeros(rows.numel()) if table is None else table.view(slot.rows, -1)[ids].view(-1)
        piece = Quantised(rows, residual, slot.row_elements, self._memory.take)
        self._pending.append((slot, ids, piece))
        return piece

    def may_select(self, slots: Sequence[Slot]) -> bool:
        """Whether only the largest elements of these neighbouring slots are sent."""
        return self.top_k is not None and slots[-1].stop - slots[0].start <= MAX_INDEXED

    def select(self, slots: Sequence[Slot], gradients: Mapping[Slot, Tensor]) -> tuple[Tensor, Tensor]:
        """The largest of each gradient plus residual: (int64 indices from the first slot on, values)."""
        indices, values = [], []
        for slot in slots:
            found, kept = self._largest(slot, gradients[slot])
            indices.append(found + (slot.start - slots[0].start))
            values.append(kept)
        return torch.cat(indices), torch.cat(values)

    def _largest(self, slot: Slot, gradient: Tensor) -> tuple[Tensor, Tensor]:
        from pushstep.optim.ops.select import select  # with numba, too

        flat = gradient.detach().cpu().contiguous().view(-1)
        residual = self.residuals.get(slot.name)
        held = dtypes.state_dtype(slot.dtype)
        rest = self._memory.take(flat.numel() * held.itemsize).view(held)
        count = min(flat.numel(), max(1, round((self.top_k or 1.0) * flat.numel())))
        indices, values = select(flat, residual, rest, count, wire=self.dtype_of(slot))
        self._pending.append((slot, None, rest))
        return indices, values


def _zeros(*shape: int) -> Tensor:
    """A residual of zeros. Made outside inference mode, or else a later step could not write to it."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
