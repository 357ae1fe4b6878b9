"""Tables that kernels read on the device: the tensors' addresses, and which block belongs to which tensor.

A table is uploaded from pinned memory, without waiting, and cached by its contents. So a training run whose tensors
keep their addresses uploads nothing. Under graph capture the copy becomes part of the graph, which reads the pinned
memory again at each replay. Such memory is allocated beforehand, because pinning is not allowed during capture, and is
never given back. A table made under capture is not cached, because it holds nothing before the first replay.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

KEPT_TABLES: Final = 64
STAGING_BYTES: Final = 1 << 20


class Extents(NamedTuple):
    """How a list of tensors is cut into blocks."""

    extents: Tensor  # int64 (tensors, 2): number of elements, number of the first block
    blocks: Tensor  # int32 (programs,): the tensor of each block
    programs: int


class _Kept(NamedTuple):
    value: Any
    stream: Any
    ready: Any


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_used_by_graphs: list[Any] = []
_staging: list[Tensor] = []
_lock = threading.Lock()


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(array: Any, device: torch.device) -> Tensor:
    """A copy of a numpy array on the device, in the current stream's order; the host does not wait."""
    values = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":  # Triton's interpreter runs on the CPU
        return values.clone()
    with _lock:
        if not _staging:
            _staging.append(_pinned(STAGING_BYTES))
        pinned = _set_aside(values.nbytes) if capturing(device) else None
    if pinned is None:
        return values.pin_memory().to(device, non_blocking=True)
    pinned = pinned.view(values.dtype).view(values.shape)
    pinned.copy_(values)
    return pinned.to(device, non_blocking=True)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _set_aside(size: int) -> Tensor:
    """Take `size` bytes of pinned memory for good: no later call returns them."""
    room = -(-size // 16) * 16
    if _staging[-1].numel() < room:
        _staging.append(_pinned(max(room, STAGING_BYTES)))
    taken = _staging[-1][:size]
    _staging[-1] = _staging[-1][room:]
    return taken


def pointers(addresses: Any, device: torch.device) -> Tensor:
    """A table of int64 addresses on the device."""
    key = (device, addresses.shape, addresses.tobytes())
    table: Tensor = _keep(key, device, lambda: upload(addresses, device))
    return table


def extents(sizes: Sequence[int], block: int, device: torch.device) -> Extents:
    """Cut tensors of these sizes into blocks. An empty tensor gets a block too, to advance its counter."""
    key = (device, block, tuple(sizes))

    def make() -> Extents:
        counts = np.maximum(1, -(-np.asarray(sizes, np.int64) // block))
        table = np.zeros((len(sizes), 2), np.int64)
        table[:, 0] = sizes
        np.cumsum(counts[:-1], out=table[1:, 1])
        owners = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
        return Extents(upload(table, device), upload(owners, device), len(owners))

    made: Extents = _keep(key, device, make)
    return made


def _keep(key: Hashable, device: torch.device, make: Any) -> Any:
    """The value cached under `key`, or a new one from `make`.

    Beyond KEPT_TABLES the least recently used value is dropped.
    """
    recording = capturing(device)
    with _lock:
        found = _kept.get(key)
        if found is not None:
            _kept.move_to_end(key)
            if recording:
                # The graph may read it long after the cache has dropped it.
                if not any(value is found.value for value in _used_by_graphs):
                    _used_by_graphs.append(found.value)
            elif found.stream is not None:
                _order(found, device)
            return found.value
    value = make()
    if recording:
        return value
    stream = ready = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        ready = stream.record_event()
    with _lock:
        _kept[key] = _Kept(value, stream, ready)
        while len(_kept) > KEPT_TABLES:
            _kept.popitem(last=False)
    return value


def _order(found: _Kept, device: torch.device) -> None:
    """Make the current stream wait for the upload, if another stream did it.

    The allocator is told of the use, so that it does not reuse the table's memory before this stream has read it.
    """
    stream = torch.cuda.current_stream(device)
    if stream == found.stream:
        return
    stream.wait_event(found.ready)
    for table in found.value if isinstance(found.value, Extents) else (found.value,):
        if isinstance(table, Tensor):
            table.record_stream(stream)
