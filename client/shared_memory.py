"""The worker's side of shared memory: fetched when the server is on this host, and given up for frames when it breaks.

A step writes its gradients into a slot (those that do not lie there already, see `lent_gradients`), names the slot in
its push, and reads the parameters from the region when the push is answered. A slot is reused only after that: a call
that broke off leaves the whole region behind, since the server may still read it, and the step goes on with frames.
The next step opens another region.

Where the parameters lie on the GPU of the server's model the region is memory of that GPU (`imported_memory.py`); where
that cannot be had, which is said once, it is the host's like any other.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pushstep.proto import device_memory, dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory, PushstepError
from pushstep.proto.layout import Slot
from pushstep.proto.parts import WHOLE_BYTES

from .gradients import Rows
from .line import Line
from .membership import Member
from .region import Key, Region
from .retry import TransportFailure, answered
from .shield import shield
from .transport import Body, Transport

log = logging.getLogger("pushstep.client")

T = TypeVar("T")


class SharedMemory:
    """One session's region: opened when it is first wanted, and again after it broke."""

    def __init__(self, transport: Transport, model: str, wires: Any, *, wanted: bool) -> None:
        self.region: Region | None = None
        # called with a region that is being given up, while its memory is still whole
        self.before_drop: list[Callable[[Region], None]] = []
        self._transport = transport
        self._model = model
        self._wires = wires
        self._wanted = wanted and all(w is None or isinstance(w, torch.dtype) for w in wires)
        self._declined = False
        self._refused: Key | None = None
        # where the parameters lie, if it is a device whose memory may be shared; and the membership that was refused it
        self._device: torch.device | None = None
        self._host_for: Key | None = None
        _open_memories.add(self)

    def open(self, member: Member) -> Region | None:
        """The region of this membership; None where there is none to have, which is said once."""
        key = (member.uid, member.timeline, member.epoch, member.layout.manifest_hash)
        if self.region is not None:
            if self.region.key == key and self.region.line.is_open():
                return self.region
            self.drop()
        if not self._wanted or self._declined or self._refused == key:
            return None
        where = self._device if self._host_for != key else None
        try:
            self.region = self._opened(member, key, where)
        except (NoSharedMemory, OSError, TransportFailure) as error:
            shield.check()  # it may be a signal that broke the call
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
            log.debug("no region now: %s", error)  # the push will say so
        return self.region

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Have regions lie on the device of these parameters, if it is one that memory can be shared of."""
        found = {parameter.device for parameter in parameters}
        shared = len(found) == 1 and device_memory.driver.serves(next(iter(found)))
        self._device = found.pop() if shared else None

    def _opened(self, member: Member, key: Key, where: torch.device | None) -> Region:
        request = pb.OpenRegionRequest(
            model=self._model,
            identity=member.identity(),
            manifest_hash=member.layout.manifest_hash,
            push_dtype=_wire(self._wires[0]),
            pull_dtype=_wire(self._wires[1]),
            device_uuid=b"" if where is None else device_memory.driver.uuid(where),
        )
        with self._transport.wait:
            opened = answered(partial(self._transport.open_region, request))
        return Region(opened, member.layout, self._wires, key, self._transport.timeout_s, where)

    def decline(self) -> None:
        """Have everything sent as frames: a slot and the answer's place are for one call at a time, waited for."""
        self._declined = True
        self.drop()

    def reset(self) -> None:
        """Be as nobody had asked for anything."""
        self._declined, self._device = False, None
        self.drop()

    def place(
        self, member: Member, header: pb.PushHeader, body: Body, gradients: Mapping[Slot, Tensor | Rows]
    ) -> None:
        """Write a push into a slot and say so in its header, or leave both as they are: it then goes as frames."""
        header.ClearField("region")
        if header.HasField("pull"):
            header.pull.ClearField("region")
        if header.ByteSize() > WHOLE_BYTES:
            return  # the line takes one message
        region = self.open(member)
        slot = None if region is None else region.put(body, gradients)
        if region is not None and slot is not None:
            header.region, header.slot = region.number, slot
            if header.HasField("pull"):
                header.pull.region = region.number

    def attempt(self, header: pb.PushHeader, call: Callable[[Line], T]) -> T | None:
        """Make the call of a header whose gradients were placed. None when there is no region (any more): frames do it."""
        region = self.region
        if region is None or header.region != region.number:
            header.ClearField("region")
            if header.HasField("pull"):
                header.pull.ClearField("region")
            return None
        try:
            return call(region.line)
        except NoSharedMemory:
            self.drop()
            return self.attempt(header, call)
        except PushstepError:
            raise
        except BaseException:
            self.drop()  # whether the server did anything is not known, nor whether it has finished reading
            raise

    def abandon(self) -> None:
        """Let go of the region, in whatever thread: gradients that lie there are the user's, and so is their memory."""
        self._wanted = False
        region, self.region = self.region, None
        if region is not None:
            region.close()

    def drop(self) -> None:
        """Give the region up: the server may still read it, or has let go of it."""
        region, self.region = self.region, None
        if region is not None:
            for task in self.before_drop:
                task(region)
            region.close()


def is_same_host(address: str) -> bool:
    """Whether an address can only be this machine's."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wire(dtype: torch.dtype | None) -> Any:
    return 0 if dtype is None else dtypes.to_wire(dtype, "wire")


# A child of fork shares the memory and holds the life line open: it lets go of both before it does anything.
_open_memories: weakref.WeakSet[SharedMemory] = weakref.WeakSet()


def _let_go_in_child() -> None:
    for memory in list(_open_memories):
        memory.drop()


os.register_at_fork(after_in_child=_let_go_in_child)
