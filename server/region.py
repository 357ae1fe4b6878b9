"""One session's shared memory: slots for gradients, a place for parameters, and who still uses them.

Where the memory lies is another room's business (`host_memory.py`, `exported_memory.py`). A region is closed when its
session or its worker is gone, at once; its memory is let go of with the last one that holds it: a call that reads or
writes there holds it to the end, also when nobody waits for that call any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import socket
from typing import Any, Final

from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.layout import Layout
from pushstep.proto.region import TOKEN_BYTES, Places, SharedBody, SharedSlot
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity

from .exported_memory import ExportedBody, ExportedMemory
from .host_memory import HostMemory
from .model import Model
from .staging import Budget
from .worker import WorkerState

# 16 M float32, 2 cores, one step through the Unix socket: 23 to 28 ms with Adagrad, of which the copy in takes 3 to 5, the
# gate 5 (norms as the digest goes), the step with its copy out 9, the copy out of the region 3 to 5, messages and threads 2.
# One slot would do for a loop that lets go of its gradients after each step; with two, a loop that still looks at the
# last ones goes on without copying. Memory of a slot that is never used is never touched.
SLOTS: Final = 2
HANDOVER_S: Final = 5.0


class Region:
    """One session's memory. Freed when it is closed and nothing reads it any more."""

    def __init__(
        self,
        model: Model,
        identity: Identity,
        gradients: Places,
        answer: Places,
        budget: Budget,
        memory: HostMemory | ExportedMemory,
    ) -> None:
        self.number = secrets.randbits(63) or 1
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.model = model
        self.identity = identity
        self.layout: Layout = gradients.layout
        self.gradients = gradients
        self.answer = answer
        self.bytes_reserved = SLOTS * gradients.nbytes + answer.nbytes
        self.memory = memory
        self._budget = budget
        # when the worker could come for it: making the memory may have to wait for others'
        self.ready_s = math.inf
        self.line: socket.socket | None = None
        self.closed = False
        self._uses = 0
        self._freeing = False
        # set when its bytes are free
        self.gone = asyncio.Event()
        self._slots: list[SharedSlot] = []
        self._parameters: SharedSlot | None = None

    def allocate(self) -> None:
        """Make the memory; in a thread, since it touches every page. The caller holds the region meanwhile."""
        if self.closed:
            return
        slots, slot_bytes = SLOTS * self.gradients.nbytes, self.gradients.nbytes
        written, read = self.memory.allocate(slots, self.answer.nbytes, slot_bytes)
        self._slots = [
            SharedSlot(written[start : start + slot_bytes]) for start in range(0, slots, slot_bytes)
        ]
        self._parameters = SharedSlot(read)

    def body(self, header: PushHeader) -> SharedBody:
        """The gradients that a push says lie in one of the slots."""
        if header.slot >= len(self._slots):
            raise NoSharedMemory(problem=f"the region has no slot {header.slot}")
        if header.manifest_hash != self.layout.manifest_hash:
            raise NoSharedMemory(problem="the region was laid out for another manifest")
        kind = ExportedBody if self.memory.on_device else SharedBody
        return kind(self.gradients, self._slots[header.slot], header.segments)

    @property
    def parameters(self) -> SharedSlot:
        """The memory for parameters on their way to the worker."""
        self.require_memory()
        if self._parameters is None:
            raise NoSharedMemory(problem="the region was never made")
        return self._parameters

    def require_memory(self) -> None:
        """NoSharedMemory once it was let go of: whoever has tensors over it is to hold it before."""
        if self._freeing:
            raise NoSharedMemory(problem="the region was closed")

    def is_current(self, now_s: float) -> bool:
        """Whether the session that it was opened for still stands."""
        worker = self.model.sessions.workers.get(self.identity.worker)
        return (
            not self.model.deleted
            and self.identity.timeline == self.model.timeline
            and worker is not None
            and worker.epoch == self.identity.epoch
            and worker.state is WorkerState.LIVE
            and now_s <= worker.lease_until_s
            and (self.line is not None or now_s <= self.ready_s + HANDOVER_S)
        )

    def hold(self) -> None:
        """Keep the memory until `let_go`."""
        self._uses += 1

    def hold_until(self, work: asyncio.Future[Any]) -> None:
        """Keep the memory until `work` is done, whoever still waits for it."""
        self.hold()
        work.add_done_callback(lambda _: self.let_go())

    def let_go(self) -> None:
        """Undo one `hold`."""
        self._uses -= 1
        self._free_if_idle()

    def close(self) -> None:
        """End it, at once or with the last one that holds it."""
        if self.closed:
            return
        self.closed = True
        if self.line is not None:
            with contextlib.suppress(OSError):
                # whoever waits at it closes it: a descriptor that is waited for must not become another's number
                self.line.shutdown(socket.SHUT_RDWR)
        self._free_if_idle()

    def _free_if_idle(self) -> None:
        if self.closed and self._uses == 0 and not self._freeing:
            # not before: the thread that makes the memory would seal what has got the number meanwhile
            self._freeing = True
            self._slots, self._parameters = [], None
            self.memory.free(self._freed)

    def _freed(self) -> None:
        self._budget.release(self.bytes_reserved)
        self.bytes_reserved = 0
        self.gone.set()
