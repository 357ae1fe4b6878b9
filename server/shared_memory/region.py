"""One session's shared memory: slots for gradients, a place for parameters, and a count of the holders.

`devices/host_memory.py` and `devices/exported_memory.py` allocate the memory. A region closes at once when its session
or its worker is gone. Its memory is freed when the last holder lets go: a call that reads or writes there holds it
until the call ends, even if nobody waits for that call any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.shared_memory.slots import TOKEN_BYTES, Places, SharedBody, SharedSlot
from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity, Segment
from pushstep.proto.wire.layout import Layout

from ..access.caller import CALLER
from ..devices.exported_memory import ExportedBody, ExportedMemory
from ..devices.host_memory import HostMemory
from ..staging.budget import Budget

# One slot is enough for a loop that drops its gradients after each step. With two, a loop that still reads the last
# gradients need not copy the next ones. Memory of a slot that is never used is never touched.
SLOTS: Final = 2
HANDOVER_S: Final = 5.0


class Region:
    """One session's memory and its budget bytes. Freed when it is closed and nobody holds it any more."""

    def __init__(
        self,
        model_uid: bytes,
        is_current: Callable[[Identity, float], bool],
        identity: Identity,
        gradients: Places,
        answer: Places,
        budget: Budget,
        memory: HostMemory | ExportedMemory,
    ) -> None:
        self.number = secrets.randbits(63) or 1
        self.token = secrets.token_bytes(TOKEN_BYTES)
        # who opened it: the calls over its local socket are theirs
        self.caller = CALLER.get()
        self.model_uid = model_uid
        self._is_current = is_current
        self.identity = identity
        self.layout: Layout = gradients.layout
        self.gradients = gradients
        self.answer = answer
        self.bytes_reserved = SLOTS * gradients.nbytes + answer.nbytes
        self.memory = memory
        self._budget = budget
        # when the memory was ready for the worker: its allocation may have to wait for that of other regions
        self.ready_s = math.inf
        self.local_socket: socket.socket | None = None
        self.closed = False
        self._uses = 0
        self._freeing = False
        # set when its bytes are back in the budget
        self.gone = asyncio.Event()
        self._slots: list[SharedSlot] = []
        self._parameters: SharedSlot | None = None

    def allocate(self) -> None:
        """Allocate the memory; in a thread, since it touches pages. The caller holds the region meanwhile."""
        if self.closed:
            return
        slots, slot_bytes = SLOTS * self.gradients.nbytes, self.gradients.nbytes
        written, read = self.memory.allocate(slots, self.answer.nbytes, slot_bytes)
        self._slots = [
            SharedSlot(written[start : start + slot_bytes]) for start in range(0, slots, slot_bytes)
        ]
        self._parameters = SharedSlot(read)

    def body(self, header: PushHeader, segments: Sequence[Segment]) -> SharedBody:
        """The gradients of a push, in the slot that its header names. NoSharedMemory.

        `segments`: equal to the header's; the same object for every push if they stay the same.
        """
        if header.slot >= len(self._slots):
            raise NoSharedMemory(problem=f"the region has no slot {header.slot}")
        if header.manifest_hash != self.layout.manifest_hash:
            raise NoSharedMemory(problem="the region was laid out for another manifest")
        kind = ExportedBody if self.memory.on_device else SharedBody
        return kind(self.gradients, self._slots[header.slot], segments)

    @property
    def parameters(self) -> SharedSlot:
        """The memory into which parameters for the worker are written. NoSharedMemory if there is none."""
        self.require_memory()
        if self._parameters is None:
            raise NoSharedMemory(problem="the region was never made")
        return self._parameters

    def require_memory(self) -> None:
        """Raise NoSharedMemory if the memory was freed.

        A caller that keeps tensors over the memory must call this and `hold` first, or else it may be freed meanwhile.
        """
        if self._freeing:
            raise NoSharedMemory(problem="the region was closed")

    def is_current(self, now_s: float) -> bool:
        """True while its session and its token are, and its worker has come for the memory or still has time to."""
        if self.caller is not None and self.caller.is_revoked:
            return False
        came_for = self.local_socket is not None or now_s <= self.ready_s + HANDOVER_S
        return came_for and self._is_current(self.identity, now_s)

    def hold(self) -> None:
        """Keep the memory until `let_go`."""
        self._uses += 1

    def hold_until(self, work: asyncio.Future[Any]) -> None:
        """Keep the memory until `work` is done, even if nobody waits for it any more."""
        self.hold()
        work.add_done_callback(lambda _: self.let_go())

    def let_go(self) -> None:
        """Undo one `hold`."""
        self._uses -= 1
        self._free_if_idle()

    def close(self) -> None:
        """Close the region. Its memory is freed at once, or when the last holder lets go."""
        if self.closed:
            return
        self.closed = True
        if self.local_socket is not None:
            with contextlib.suppress(OSError):
                # only the task that waits on the socket closes it, or else its number could become another's
                self.local_socket.shutdown(socket.SHUT_RDWR)
        self._free_if_idle()

    def _free_if_idle(self) -> None:
        if self.closed and self._uses == 0 and not self._freeing:
            # not earlier: the allocating thread would seal whatever has got the descriptor's number meanwhile
            self._freeing = True
            self._slots, self._parameters = [], None
            self.memory.free(self._freed)

    def _freed(self) -> None:
        self._budget.release(self.bytes_reserved)
        self.bytes_reserved = 0
        self.gone.set()
