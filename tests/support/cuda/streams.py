"""A model of CUDA's streams and events over the CPU's memory: the laziest device that the documentation allows.

Nothing that a stream is asked for is done before somebody waits for it: copies lie in the stream until an event behind
them is waited for, by the host or by a stream whose own work comes to that point. So whoever reads without having
waited sees the old bytes, and memory that is handed out or unpinned while copies over it are asked for is a fault. What is
wrong with `devices/cuda.py` in the order of its waits shows here; what CUDA itself does is not modelled.

Copies are `copy_(non_blocking=True)` and `to(copy=True)` in a stream. Everything else is done at once: where that is a
kernel, which runs in its stream's order, `install` has what was asked for before it done first.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.optim.ops import copies
from pushstep.proto.wire.buffers import BufferPool
from pushstep.server.arenas.arena import Arenas
from pushstep.server.devices import cuda as cuda_device
from pushstep.server.staging import reduction

_lock = threading.RLock()
_thread = threading.local()
_copy, _to, _take = Tensor.copy_, Tensor.to, BufferPool.take
Range = tuple[int, int]


class Stream:
    """Work that was asked for, in order, and how much of it is done."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.asked = self.done = 0
        self._waiting: deque[Callable[[], object]] = deque()

    def ask(self, work: Callable[[], object]) -> None:
        self._waiting.append(work)
        self.asked += 1

    def run(self, until: int) -> None:
        with _lock:
            while self.done < until:
                self._waiting.popleft()()
                self.done += 1

    def wait_event(self, event: Event) -> None:
        self.ask(event.reach)

    def synchronize(self) -> None:
        self.run(self.asked)

    def query(self) -> bool:
        return self.done == self.asked


class Event:
    """A point in a stream."""

    def __init__(self, *, blocking: bool = False) -> None:
        self._stream, self._at = Stream(), 0

    def record(self, stream: Stream) -> None:
        self._stream, self._at = stream, stream.asked

    def reach(self) -> None:
        self._stream.run(self._at)

    def synchronize(self) -> None:
        self.reach()


class Faults(list[str]):
    """What must not happen, and the memory that copies are still asked for over."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[Range] = []
        # by address; what is unpinned too early stays here, or the model would copy to where nothing is
        self.pinned: dict[int, NDArray[np.uint8]] = {}

    def check(self, what: str, address: int, size: int) -> bool:
        with _lock:
            fault = any(start < address + size and address < stop for start, stop in self.pending)
            if fault:
                self.append(f"{what} while copies over it are under way")
            return fault

    def bare(self, tensor: Tensor) -> Tensor:
        """The same memory for a copy that is under way, which keeps nobody's pinned memory from being given back."""
        start, stop = _range(tensor)
        if not any(at <= start < at + memory.size for at, memory in list(self.pinned.items())):
            return tensor
        memory = (ctypes.c_uint8 * (stop - start)).from_address(start)
        return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def current() -> Stream | None:
    return getattr(_thread, "stream", None)


@contextlib.contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    before = current()
    _thread.stream = stream
    try:
        yield
    finally:
        _thread.stream = before


def _range(tensor: Tensor) -> Range:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _in_order(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        stream = current()
        if stream is None:
            return kernel(*arguments, **options)
        stream.run(stream.asked)
        result = kernel(*arguments, **options)
        stream.ask(_nothing)  # so that nobody knows that it is done before somebody waits
        return result

    return run


def _nothing() -> None:
    pass


def install(setattr_: Callable[[Any, str, Any], object] = setattr) -> Faults:
    """Put the model in CUDA's place; `setattr_` may be a monkeypatch's. What it finds wrong is in the list that is returned."""
    faults = Faults()

    def lazily(target: Tensor, source: Tensor) -> None:
        stream, over = current(), (_range(target), _range(source))
        target, source = faults.bare(target), faults.bare(source)

        def work() -> None:
            _copy(target, source)
            for one in over:
                faults.pending.remove(one)

        with _lock:
            faults.pending.extend(over)
            stream.ask(work)  # type: ignore[union-attr]

    def copy_(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if current() is None:
            return _copy(self, source)
        if not non_blocking:
            return _in_order(_copy)(self, source)
        lazily(self, source)
        return self

    def to(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if current() is None or not options.get("copy") or "cpu" in arguments:
            return _to(self, *arguments, **options)
        made = torch.full(self.shape, -1, dtype=arguments[0])
        lazily(made, self)
        return made

    def take(self: BufferPool, size_bytes: int) -> Tensor:
        taken = _take(self, size_bytes)
        faults.check("handed out", taken.data_ptr(), size_bytes)
        return taken

    def unregister(address: int) -> int:
        if not faults.check("unpinned", address, faults.pinned[address].size):
            del faults.pinned[address]
        return 0

    made, pinned = cuda_device.CudaDevice.__init__, cuda_device.CudaDevice._pinned

    def pin(self: cuda_device.CudaDevice, memory: NDArray[np.uint8]) -> NDArray[np.uint8]:
        faults.pinned[memory.ctypes.data] = memory
        return pinned(self, memory)

    def init(self: cuda_device.CudaDevice, index: int) -> None:
        made(self, index)
        self.where = torch.device("cpu")

    cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        stream=_stream,
        set_stream=lambda stream: setattr(_thread, "stream", stream),
        device=lambda where: contextlib.nullcontext(),
        set_device=lambda where: None,
        device_count=lambda: 1,
        cudart=lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=unregister),
    )
    setattr_(cuda_device, "cuda", cuda)
    setattr_(cuda_device.CudaDevice, "__init__", init)
    setattr_(cuda_device.CudaDevice, "_pinned", pin)
    setattr_(Tensor, "copy_", copy_)
    setattr_(Tensor, "to", to)
    setattr_(BufferPool, "take", take)
    setattr_(
        copies, "_are_long_runs", lambda target, source: False
    )  # that way is between two places of the host's
    setattr_(reduction, "add_up", _in_order(reduction.add_up))
    for name in ("step", "copy", "load", "fill_initial_state"):
        setattr_(Arenas, name, _in_order(getattr(Arenas, name)))
    return faults
