"""Processes a push's body while it arrives: takes norms, and unpacks int8 codes.

Each chunk is processed right after it was copied (in shared memory: digested), by the same thread. It is in the cache
then, and the result is ready when the last chunk is. A separate pass over 16 M float32 takes 4 to 8 ms more.
Row-sparse and element-sparse segments must be complete first; `staging/unpack.py` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pushstep.optim.ops import streaming
from pushstep.proto.shared_memory.slots import SharedBody
from pushstep.proto.types_pb2 import Segment
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.frames import Assembly
from pushstep.proto.wire.layout import INT8_UNPACKED

from .unpack import Take


class IncomingBody:
    """The dense segments of one body, as far as they have arrived."""

    def __init__(
        self,
        segments: Sequence[Segment],
        blocks: Sequence[streaming.Blocks | None],
        body: Assembly | SharedBody,
        take: Take,
    ) -> None:
        """`blocks`: of each dense segment's parameters. `take` allocates memory for what is unpacked."""
        self._dense: dict[int, tuple[Tensor, streaming.StreamingNorms]] = {}
        for index, (segment, of) in enumerate(zip(segments, blocks, strict=True)):
            if of is None:
                continue
            dtype = dtypes.of_push(segment.dtype, "segment")
            if dtype == torch.int8:
                values = take(int(of.tos[-1]) * INT8_UNPACKED.itemsize).view(INT8_UNPACKED)
                codes = body.part(index, torch.uint8)
                self._dense[index] = values, streaming.codes(codes, values, of, block=dtypes.INT8_BLOCK)
            else:
                values = body.part(index, dtype)
                self._dense[index] = values, streaming.floats(values, of)

    def advance(self, segment: int, arrived_bytes: int) -> None:
        """Process what is complete of a segment, now that `arrived_bytes` of it are there."""
        if segment in self._dense:
            self._dense[segment][1].advance(arrived_bytes)

    def first_block_sums(self, segment: int) -> list[float] | None:
        """The sums of squares of the blocks of a dense segment's first parameter. None for any other segment."""
        return self._dense[segment][1].first_block_sums() if segment in self._dense else None

    def dense(self, segment: int) -> tuple[Tensor, list[float]] | None:
        """A dense segment's gradient and its parameters' sums of squares, once the body is complete.

        None for any other segment.
        """
        if segment not in self._dense:
            return None
        values, found = self._dense[segment]
        return values, found.square_sums()
