"""Where a server's models lie, and what the other rooms ask of that device.

A push is received in the host's memory and measured there, on every device: a verdict then waits for no device, and
the norms are the same code's, in the same order. What may differ is here: how a measured gradient gets to where the
step reads it, where the step runs, when it is done, and how parameters come back. On the CPU the answers are that it is
there already, in the calling thread, at once, and in place: they cost nothing. `cuda_device.py` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.frames import Assembly, BodyDigest, Piece, Source
from pushstep.proto.memory import fresh_memory

from .staging import StagedPush
from .threads import PUSHES

_NOTHING: Final = nullcontext()
T = TypeVar("T")


class Lane:
    """One model's work on the device, in order. On the CPU whoever calls does it."""

    # whether the event loop may do small jobs itself: nothing in them waits for a device
    takes_small = True

    def __init__(self, where: torch.device) -> None:
        self.where = where

    def adopt(self) -> None:
        """Have everything that the calling thread asks of the device done in this lane from now on."""

    def here(self) -> AbstractContextManager[Any]:
        """The same for the length of a block."""
        return _NOTHING

    def over(self, pushes: Sequence[StagedPush]) -> AbstractContextManager[Any]:
        """A block that works on these gradients: it starts when they have arrived and ends when the work is done."""
        return _NOTHING

    def finish(self) -> None:
        """Return when all that was asked is done."""

    def outgoing(self, source: Tensor, dtype: torch.dtype) -> Sequence[Source]:
        """What the frames of some elements are made from; of the CPU's own memory, before the next step is taken."""
        return [Piece(source, dtype)]

    def publish(self, make: Callable[[], None]) -> None:
        """Make frames from what `outgoing` gave: now, or beside the next steps where it gave copies."""
        make()


class Device:
    """The CPU; a subclass is another device."""

    where = torch.device("cpu")

    def open(self) -> None:
        """OSError if this machine does not have it. Called once, before anything else."""

    def lane(self) -> Lane:
        """For one model, or one kind of work."""
        return Lane(self.where)

    def fresh_memory(self, size_bytes: int) -> NDArray[np.uint8]:
        """Memory that bodies are received into. MemoryError if there is none."""
        return fresh_memory(size_bytes)

    def uuid(self) -> bytes:
        """Which device it is, to another process; NoSharedMemory if it has no memory that another may open."""
        raise NoSharedMemory(problem="the model lies in the host's memory")

    def reading(self, body: object) -> AbstractContextManager[Any]:
        """A block in a thread of the gate's that reads a complete body."""
        return _NOTHING

    def shared(self, memory: Tensor) -> Tensor:
        """Memory that another process writes to and reads, made ready for copies to and from the device."""
        return memory

    async def prepared(self, make: Callable[[], T], *, small: bool) -> T:
        """What `make` makes, out of fresh memory for the most part. `small`: of few parameters."""
        return await PUSHES.run_unless(small, make)

    def body(
        self, lengths: Sequence[int], digest: BodyDigest, take: Callable[[int], Tensor], *, stepped: bool
    ) -> Assembly:
        """What a body is received into. `stepped`: as it lies there, with nothing to unpack (see `unpack.py`)."""
        return Assembly(lengths, digest, take)

    def bring(self, push: StagedPush, body: object) -> StagedPush:
        """The push with its gradients where a step reads them, or on their way there. `body` is where they lie now."""
        return push


def device(name: str) -> Device:
    """The device of a setting: cpu, cuda or cuda:N."""
    where = torch.device(name)
    if where.type == "cpu":
        return Device()
    from .cuda_device import CudaDevice

    return CudaDevice(where.index or 0)
