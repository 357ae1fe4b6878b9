"""Where a server's models lie, and what the other folders need of that device.

On every device a push is received in host memory and measured there (except in memory shared on a GPU,
`devices/exported_memory.py`). So an outcome waits for no device, and the norms come from the same code in the same order.
What differs between devices is here: how a measured gradient gets to where the step reads it, where the step runs, when
it is done, and how parameters come back. On the CPU data is in place, work runs in the caller's thread, and nothing is
asynchronous. `devices/cuda.py` is the other device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.wire.buffers import fresh_memory
from pushstep.proto.wire.frames import Assembly, BodyDigest, Piece, Source

from ..process.threads import PUSHES
from ..staging.gradient import StagedPush

_NOTHING: Final = nullcontext()
T = TypeVar("T")


class DeviceStream:
    """One model's work on the device, in order. On the CPU the caller does it."""

    # the event loop may do small jobs itself, because nothing in them waits for a device
    takes_small = True

    def __init__(self, where: torch.device) -> None:
        self.where = where

    def adopt(self) -> None:
        """Run all device work of the calling thread on this stream from now on."""

    def here(self) -> AbstractContextManager[Any]:
        """Like `adopt`, for a block."""
        return _NOTHING

    def over(self, pushes: Sequence[StagedPush]) -> AbstractContextManager[Any]:
        """A block that works on these gradients: it starts when they are there, and ends when it is done."""
        return _NOTHING

    def finish(self) -> None:
        """Return when all work that was queued is done."""

    def outgoing(self, source: Tensor, dtype: torch.dtype) -> Sequence[Source]:
        """The sources of the frames for some elements.

        On the CPU, make those frames before the next step is taken.
        """
        return [Piece(source, dtype)]

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """Copy elements into host memory, behind the work that is queued. Returns when they are there."""
        copy(target, source)

    def gathered(self, source: Tensor, ids: Tensor) -> Tensor:
        """Rows of a tensor in host memory of their own, as `fetch` copies them."""
        return source.index_select(0, ids)

    def publish(self, make: Callable[[], None]) -> None:
        """Make frames from what `outgoing` returned: at once; if those are copies, beside the next steps."""
        make()


class Device:
    """The CPU. A subclass is another device."""

    where = torch.device("cpu")

    def open(self) -> None:
        """Prepare the device; OSError if this machine does not have it. Called once, before anything else."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of the device's own memory by what they are; empty for the host's. In any thread."""
        return {}

    def device_stream(self) -> DeviceStream:
        """A stream for one model, or for one kind of work."""
        return DeviceStream(self.where)

    def fresh_memory(self, size_bytes: int) -> NDArray[np.uint8]:
        """Memory that bodies are received into. MemoryError if there is none."""
        return fresh_memory(size_bytes)

    def uuid(self) -> bytes:
        """The device's id for another process.

        NoSharedMemory if it has no memory that another process may open.
        """
        raise NoSharedMemory(problem="the model lies in the host's memory")

    def reading(self, body: object) -> AbstractContextManager[Any]:
        """A block in one of the gate's threads that reads a complete body."""
        return _NOTHING

    def shared(self, memory: Tensor) -> Tensor:
        """Memory shared with another process, made ready for copies to and from the device."""
        return memory

    async def prepared(self, make: Callable[[], T], *, small: bool) -> T:
        """The result of `make`, which mostly allocates fresh memory. `small`: of few parameters."""
        return await PUSHES.run_unless(small, make)

    def body(
        self, lengths: Sequence[int], digest: BodyDigest, take: Callable[[int], Tensor], *, stepped: bool
    ) -> Assembly:
        """What a body is received into.

        `stepped`: the step reads it as it lies, with nothing to unpack (`staging/unpack.py`).
        """
        return Assembly(lengths, digest, take)

    def bring(self, push: StagedPush, body: object) -> StagedPush:
        """The push with its gradients where a step reads them, or on their way there.

        `body`: where they lie now.
        """
        return push
