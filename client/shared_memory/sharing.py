"""The worker's side of shared memory: opened if the server is on this host, replaced by frames if it breaks.

A step writes its gradients into a slot, except those that lie there already (`client/optimizer/gradients_in_place.py`).
It names the slot in its push, and reads the parameters from the region when the push is answered. A slot is reused only
after that. A call that broke off drops the whole region, since the server may still read it; the step goes on with
frames, and the next step opens another region.

If the parameters lie on the GPU of the server's model, the region is memory of that GPU (`imported_memory.py`). If that
memory cannot be shared, one warning says so and the region is host memory.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory, PushstepError
from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Slot
from pushstep.proto.wire.parts import WHOLE_BYTES

from ..gradients.body import Rows
from ..membership.member import Member
from ..transport.channel import Transport
from ..transport.retry import TransportFailure, answered
from ..transport.shield import shield
from ..transport.streams import Body
from .local_socket import LocalSocket
from .region import Key, Region

log = logging.getLogger("pushstep.client")

T = TypeVar("T")


class SharedMemory:
    """Owns one session's region: opens it when a push first needs it, and again after it broke."""

    def __init__(self, transport: Transport, model: str, wires: Any, *, wanted: bool) -> None:
        self.region: Region | None = None
        # called with a region before it is closed, while its memory is still mapped
        self.before_drop: list[Callable[[Region], None]] = []
        self._transport = transport
        self._model = model
        self._wires = wires
        self._wanted = wanted and all(w is None or isinstance(w, torch.dtype) for w in wires)
        self._declined = False
        self._refused: Key | None = None
        # the parameters' device, if its memory can be shared; and the membership whose region fell back to the host
        self._device: torch.device | None = None
        self._host_for: Key | None = None
        _open_memories.add(self)

    def open(self, member: Member) -> Region | None:
        """The region of this membership; None if it cannot be opened, which one warning says."""
        key = (member.uid, member.timeline, member.epoch, member.layout.manifest_hash)
        if self.region is not None:
            if self.region.key == key and self.region.local_socket.is_open():
                return self.region
            self.drop()
        if not self._wanted or self._declined or self._refused == key or member.is_sharded:
            return None
        where = self._device if self._host_for != key else None
        try:
            self.region = self._opened(member, key, where)
        except (NoSharedMemory, OSError, TransportFailure) as error:
            shield.check()  # a signal may have broken the call: let its handler run
            if where is not None:
                why = error.fields.get("problem", error) if isinstance(error, NoSharedMemory) else error
                log.warning(
                    "no memory of %s shared with %s, using the host's: %s",
                    where,
                    self._transport.address,
                    why,
                )
                self._host_for = key
                return self.open(member)
            log.warning("no shared memory with %s, sending frames: %s", self._transport.address, error)
            self._refused = key
        except PushstepError as error:
            log.debug("no region now: %s", error)  # the push meets the same error
        return self.region

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Open regions on the device of these parameters, if they share one whose memory can be shared."""
        found = {parameter.device for parameter in parameters}
        shared = len(found) == 1 and device_memory.driver.serves(next(iter(found)))
        self._device = found.pop() if shared else None

    def _opened(self, member: Member, key: Key, where: torch.device | None) -> Region:
        request = pb.OpenRegionRequest(
            model=self._model,
            identity=member.identity(),
            manifest_hash=member.layout.manifest_hash,
            push_dtype=dtypes.to_wire_or_own(self._wires[0], "wire"),
            pull_dtype=dtypes.to_wire_or_own(self._wires[1], "wire"),
            device_uuid=b"" if where is None else device_memory.driver.uuid(where),
        )
        with self._transport.wait:
            opened = answered(partial(self._transport.open_region, request))
        return Region(opened, member.layout, self._wires, key, self._transport.timeout_s, where)

    def decline(self) -> None:
        """Send everything as frames: a region serves one call at a time, and prefetch does not wait."""
        self._declined = True
        self.drop()

    def reset(self) -> None:
        """Undo `decline` and `follow`, and drop the region."""
        self._declined, self._device = False, None
        self.drop()

    def place(
        self, member: Member, header: pb.PushHeader, body: Body, gradients: Mapping[Slot, Tensor | Rows]
    ) -> None:
        """Write a push into a slot and name it in the new header. If that is impossible, it goes as frames."""
        if not self._wanted or self._declined or header.ByteSize() > WHOLE_BYTES:
            return  # the local socket takes a single message
        region = self.open(member)
        slot = None if region is None else region.put(body, gradients)
        if region is not None and slot is not None:
            header.region, header.slot = region.number, slot
            if header.HasField("pull"):
                header.pull.region = region.number

    def attempt(
        self,
        call: Callable[[LocalSocket, pb.PushHeader, pb.PushCommit], T],
        header: pb.PushHeader,
        commit: pb.PushCommit,
    ) -> T | None:
        """Make the call of a push that `place` has placed. None if the region is gone: send frames then."""
        region = self.region
        if region is None or header.region != region.number:
            if header.region:
                header.ClearField("region")
                if header.HasField("pull"):
                    header.pull.ClearField("region")
                header.ClearField("traceparent")
            return None
        header.traceparent = self._transport.spans.traceparent()
        try:
            return call(region.local_socket, header, commit)
        except NoSharedMemory:
            self.drop()
            return self.attempt(call, header, commit)
        except PushstepError:
            raise
        except BaseException:
            self.drop()  # the server may have applied the push, and may still be reading the slot
            raise

    def abandon(self) -> None:
        """Close a dropped session's region, in any thread. Gradients in it keep their memory."""
        self._wanted = False
        region, self.region = self.region, None
        if region is not None:
            region.close()

    def drop(self) -> None:
        """Run `before_drop` and close the region: the server may still read it, or has closed it."""
        region, self.region = self.region, None
        if region is not None:
            for task in self.before_drop:
                task(region)
            region.close()


# A child of fork shares the memory and keeps the local socket open: it drops both before anything else.
_open_memories: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for memory in list(_open_memories):
        memory.drop()


os.register_at_fork(after_in_child=_let_go_in_child)
