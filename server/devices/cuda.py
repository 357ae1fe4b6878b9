"""A CUDA device: three kinds of streams, which run concurrently and wait for each other by events only.

* Gradients go in on the `inward` stream, straight from the pinned memory that they are received into, while later
  chunks still arrive. A push carries the event after its last copy.
* Each model steps on a stream of its own, which waits for a push's event. The writer thread then waits for the stream.
  So a receipt says "applied" only when that is true, and the memory that the step read may be used again.
  What a worker on the same device has put into shared memory (`devices/exported_memory.py`) is there already. The gate
  reads it on a stream of its own.
* Parameters go out on the `outward` stream. They are cast and copied on the device in the model's stream, so the next
  step need not wait. Then they are fetched piece by piece into pinned memory, and a publisher thread makes frames of
  that.

The event loop only queues and never waits. A thread gives host memory back after it has waited for the copies, because
a broken stream or a refused push leaves copies under way. Device memory needs no such care: torch gives a block back to
the stream on which it was allocated, in that stream's order, and no other stream still reads it, because the model's
stream is waited for. The staging budget bounds device memory for gradients as it bounds the host's: gradients pass
through both.

Written from CUDA's and torch's documentation and not run on a device yet. Tests run it over a model of streams and events
(`tests/support/cuda/streams.py`), which finds a wait that is left out.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

from pushstep.proto.shared_memory import cuda_ipc as device_memory
from pushstep.proto.wire.buffers import (
    SMALLEST_POOLED_BYTES,
    BufferPool,
    copy_elements,
    fresh_memory,
)
from pushstep.proto.wire.frames import Assembly, BodyDigest, Chunk, Source, Writer

from ..process.threads import PUSHES
from ..staging.gradient import DensePart, RowsPart, StagedPush
from .device import Device, DeviceStream, T
from .exported_memory import ExportedBody

log = logging.getLogger("pushstep.device")

# A copy takes some microseconds to launch, so chunks of small parameters are copied together. Not measured on a device.
SEND_BYTES: Final = 1 << 20
# The first frames are made while later pieces are still fetched. Not measured on a device.
FETCH_BYTES: Final = 16 << 20
# Pinned memory of versions that were sent, kept for the next ones.
KEPT_BYTES: Final = 1 << 30


class CudaDevice(Device):
    """One CUDA device of this process."""

    def __init__(self, index: int) -> None:
        self.where = torch.device("cuda", index)
        self.fetched = BufferPool(KEPT_BYTES, self.fresh_memory)
        self.publisher = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._told = False
        # a SimpleQueue, because a finalizer puts into it, in any thread at any moment
        self._ended: queue.SimpleQueue[tuple[Callable[[], object], Any]] = queue.SimpleQueue()
        # kept, because a finalizer makes events too, however late: the runtime of its streams has to make them
        self._event_after = partial(_event, cuda.Event, blocking=True)

    def open(self) -> None:
        """Find the device and make the streams that all models share. OSError if torch does not find it."""
        count = cuda.device_count()
        if (self.where.index or 0) >= count:
            raise OSError(f"--device {self.where}: torch finds {count} CUDA devices here")
        # torch hands out 32 streams of each priority in turn: at the models' priority, some models would share these
        self.inward = _stream(self.where, priority=-1)
        self.outward = _stream(self.where, priority=-1)
        self.gate = _stream(self.where, priority=-1)
        threading.Thread(target=self._give_back, name="cuda-give-back", daemon=True).start()

    def memory(self) -> Mapping[str, int]:
        """What the driver says is there and free, and what torch holds of it; empty if neither answers."""
        try:
            free, total = cuda.mem_get_info(self.where)
            held = cuda.memory_reserved(self.where), cuda.memory_allocated(self.where)
        except RuntimeError:  # the device is lost
            return {}
        return {"free": free, "total": total, "reserved": held[0], "allocated": held[1]}

    def device_stream(self) -> DeviceStream:
        """A new stream."""
        return CudaLane(self)

    # Memory.

    def fresh_memory(self, size_bytes: int) -> NDArray[np.uint8]:
        """Pinned memory; unpinned where that is refused: copies are then slower, and still correct."""
        return self._pinned(fresh_memory(size_bytes))

    def uuid(self) -> bytes:
        """The driver's id of the device."""
        return device_memory.driver.uuid(self.where)

    def reading(self, body: object) -> AbstractContextManager[Any]:
        """A body on the device is measured there, on the `gate` stream.

        Its worker has waited for its own stream.
        """
        return cuda.stream(self.gate) if isinstance(body, ExportedBody) else contextlib.nullcontext()

    def shared(self, memory: Tensor) -> Tensor:
        """The same memory, pinned: the device reads gradients there and writes parameters for the worker."""
        return torch.from_numpy(self._pinned(memory.numpy()))

    def _pinned(self, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        address = memory.ctypes.data
        runtime: Any = cuda.cudart()  # type: ignore[no-untyped-call]
        with cuda.device(self.where):
            refused = int(runtime.cudaHostRegister(address, memory.size, 0))
        if refused:
            with contextlib.suppress(RuntimeError):
                # CUDA keeps the refusal as a pending error until a call reports it: the next launch would report it
                # as its own
                torch.zeros(1, dtype=torch.uint8, device=self.where)
            if not self._told:
                log.warning(
                    "%d bytes cannot be pinned (CUDA error %d): copies are slower", memory.size, refused
                )
                self._told = True
            return memory
        view = memory[:]
        # the queue keeps the mapping alive until it is unpinned
        unpin = partial(runtime.cudaHostUnregister, address)
        weakref.finalize(view, self._ended.put, (unpin, memory)).atexit = False
        return view

    def retire(self, stream: cuda.Stream, held: Sequence[Tensor]) -> None:
        """Release memory once the copies that are queued on `stream` now are done."""
        self._ended.put((self._event_after(stream).synchronize, held))

    def _give_back(self) -> None:
        cuda.set_device(self.where)
        while True:
            wait, held = self._ended.get()
            try:
                wait()
            except RuntimeError as error:  # the device is lost: so is everything on it
                log.error("waiting for copies to end: %s", error)
            del wait, held

    # Pushes.

    async def prepared(self, make: Callable[[], T], *, small: bool) -> T:
        """The result of `make`, which runs in a thread, because pinning takes a while."""
        return await PUSHES.run(make)

    def body(
        self, lengths: Sequence[int], digest: BodyDigest, take: Callable[[int], Tensor], *, stepped: bool
    ) -> Assembly:
        """A body with a twin on the device; no twin if it is unpacked first, or if it is small."""
        if not stepped or sum(lengths) < SMALLEST_POOLED_BYTES:
            return Assembly(lengths, digest, take)
        return TwinnedAssembly(lengths, digest, take, self)

    def bring(self, push: StagedPush, body: object) -> StagedPush:
        """The push with all gradients on the device or on their way there.

        It carries the event after the last copy.
        """
        if isinstance(body, ExportedBody):
            return replace(push, arrival=Arrival(_event(cuda.Event, self.gate), ()))
        twin = body.twin() if isinstance(body, TwinnedAssembly) else None
        copies = [] if twin is None else [twin]
        with cuda.stream(self.inward):
            parts = [self._brought(part, twin, copies) for part in push.parts]
            event = _event(cuda.Event, self.inward)
        return replace(push, parts=parts, arrival=Arrival(event, copies))

    def _brought(
        self, part: DensePart | RowsPart, twin: Copies | None, copies: list[Copies]
    ) -> DensePart | RowsPart:
        def there(tensor: Tensor) -> Tensor:
            found = None if twin is None else twin.of(tensor)
            if found is None:
                made = Copies(self, self.inward, tensor, torch.empty_like(tensor, device=self.where))
                made.there.copy_(tensor, non_blocking=True)
                copies.append(made)
                found = made.there
            return found

        if isinstance(part, DensePart):
            return replace(part, gradient=there(part.gradient))
        return replace(part, ids=there(part.ids), rows=there(part.rows))


class Copies:
    """A stretch of host memory and one of device memory, and copies between them.

    Both live until those are done.
    """

    def __init__(self, device: CudaDevice, stream: cuda.Stream, here: Tensor, there: Tensor) -> None:
        self.here = here
        self.there = there
        weakref.finalize(self, device.retire, stream, (here, there)).atexit = False

    def of(self, tensor: Tensor) -> Tensor | None:
        """The device's twin of a contiguous tensor in the host memory; None for any other tensor."""
        start = tensor.data_ptr() - self.here.data_ptr()
        if not tensor.is_contiguous() or not 0 <= start <= self.here.numel() - tensor.nbytes:
            return None
        return self.there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class TwinnedAssembly(Assembly):
    """A body that is copied to the device as it arrives."""

    def __init__(
        self, lengths: Sequence[int], digest: BodyDigest, take: Callable[[int], Tensor], device: CudaDevice
    ) -> None:
        super().__init__(lengths, digest, take)
        self._stream = device.inward
        with cuda.stream(self._stream):
            there = torch.empty_like(self.buffer, device=device.where)
        self._copies = Copies(device, self._stream, self.buffer, there)
        self._sent = 0

    def place(self, chunk: Chunk) -> None:
        """Copy a chunk to its place. Copy to the device what has gathered, once it is SEND_BYTES."""
        super().place(chunk)
        filled = self._starts[chunk.segment] + chunk.offset + len(chunk.payload)
        if filled - self._sent >= SEND_BYTES:
            self._send(filled)

    def twin(self) -> Copies:
        """The twin of a complete body, all of it on the device or on its way there."""
        self._send(self.buffer.numel())
        return self._copies

    def _send(self, filled: int) -> None:
        with cuda.stream(self._stream):
            here, there = self._copies.here, self._copies.there
            there[self._sent : filled].copy_(here[self._sent : filled], non_blocking=True)
        self._sent = filled


@dataclass(frozen=True, slots=True)
class Arrival:
    """The event after which a push's gradients are on the device, and the copies that lead there."""

    event: cuda.Event
    copies: Sequence[Copies]


class CudaLane(DeviceStream):
    """A CUDA stream. The thread that works on it waits for it."""

    takes_small = False

    def __init__(self, device: CudaDevice) -> None:
        super().__init__(device.where)
        self._device = device
        self._stream = _stream(device.where)

    def adopt(self) -> None:
        """Make it the calling thread's stream."""
        cuda.set_stream(self._stream)

    def here(self) -> AbstractContextManager[Any]:
        """Make it the calling thread's stream for the length of a block."""
        return cuda.stream(self._stream)

    @contextlib.contextmanager
    def over(self, pushes: Sequence[StagedPush]) -> Iterator[None]:
        """The stream waits for the pushes' events first; the thread waits for the stream at the end."""
        with self.here():
            for push in pushes:
                if isinstance(push.arrival, Arrival):
                    self._stream.wait_event(push.arrival.event)
            try:
                yield
            finally:
                self.finish()

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def outgoing(self, source: Tensor, dtype: torch.dtype) -> Sequence[Source]:
        """Pieces that are fetched from a copy on the device, so the next step may overwrite the source."""
        stream = self._device.outward
        with self.here():
            there = source.detach().reshape(-1).to(dtype, copy=True)
            copied = _event(cuda.Event, self._stream)
        here = self._device.fetched.take(there.nbytes).view(dtype)
        copies = Copies(self._device, stream, here, there)
        pieces = []
        with cuda.stream(stream):
            stream.wait_event(copied)
            for start in range(0, here.numel(), FETCH_BYTES // dtype.itemsize):
                piece = here[start : start + FETCH_BYTES // dtype.itemsize]
                piece.copy_(there[start : start + piece.numel()], non_blocking=True)
                pieces.append(Fetched(piece, _event(cuda.Event, stream, blocking=True), copies))
        return pieces

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """Copy in the stream's order, from any thread, and wait for the copy alone."""
        with self.here():
            target.copy_(source)

    def gathered(self, source: Tensor, ids: Tensor) -> Tensor:
        """Gathered on the device, or on the host where they lie there."""
        with self.here():
            return source.index_select(0, ids.to(source.device)).cpu()

    def publish(self, make: Callable[[], None]) -> None:
        """Make frames in the publisher thread. Their source is a copy, so the next steps need not wait."""
        self._device.publisher.submit(make)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Elements on their way from the device. `frames.Piece` is the same for elements on the host."""

    elements: Tensor
    event: cuda.Event
    copies: Copies

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.elements.nbytes

    @property
    def unit_bytes(self) -> int:
        """A chunk ends between elements."""
        return self.elements.itemsize

    def writer(self) -> Writer:
        """A function that waits for the elements and copies them. Never call it on the event loop."""
        elements, event = self.elements, self.event

        def write(target: Tensor, start: int) -> None:
            event.synchronize()
            first, count = start // elements.itemsize, target.numel() // elements.itemsize
            copy_elements(target.view(elements.dtype), elements[first : first + count])

        return write


def _stream(where: torch.device, *, priority: int = 0) -> cuda.Stream:
    return cuda.Stream(where, priority)  # type: ignore[no-untyped-call]


def _event(make: type[cuda.Event], stream: cuda.Stream, *, blocking: bool = False) -> cuda.Event:
    """An event after all that is queued on `stream` now. `blocking`: a thread that waits for it sleeps."""
    event = make(blocking=blocking)
    event.record(stream)
    return event
