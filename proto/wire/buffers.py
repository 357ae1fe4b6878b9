"""Reused memory for bulk bytes: on loopback the page faults of fresh memory cost as much as the copies.

There are three measures. Messages of some MiB come and go by the hundred, and glibc maps and unmaps each of them
until a larger block has been freed once: `keep_freed_blocks` frees one. Bodies are larger than what glibc ever keeps,
so BufferPool keeps them; a pooled buffer comes back when the last tensor over it is gone, whoever held that tensor,
so it is never given out twice. The messages of a whole version are kept together and dropped together, and glibc
would unmap them then: MessagePool keeps their buffers.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Once a block is freed, glibc maps only larger ones. Its limit for that is 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX).
LARGEST_KEPT_BYTES: Final = (8 << 20) - (8 << 10)
# torch splits a copy among threads from its grain size on, 32768 elements. This is less.
SERIAL_ELEMENTS: Final = (32 << 10) - 64
# Smaller buffers are left to malloc.
SMALLEST_POOLED_BYTES: Final = 1 << 20


@cache
def keep_freed_blocks() -> None:
    """Have malloc keep freed blocks of up to 8 MiB, as it does once a program has freed one of that size.

    64 MiB through gRPC on loopback then take 33 to 40 ms instead of 55 to 66. The block is never touched, so it costs
    nothing. Another one would come from what malloc has kept, and be cleared: 0.5 ms, so it is freed once per process.
    With another malloc than glibc's this does nothing.
    """
    bytes(LARGEST_KEPT_BYTES)


class BufferPool:
    """Hands out byte buffers and keeps up to `keep_bytes` of those that nobody uses any more."""

    def __init__(self, keep_bytes: int, make: Callable[[int], NDArray[np.uint8]] | None = None) -> None:
        """`make` gives new memory by its size in bytes, in place of `fresh_memory`."""
        self._keep_bytes = keep_bytes
        self._make = make or fresh_memory
        # a finalizer may run at any allocation, also in a thread that holds the lock: a plain Lock would deadlock
        self._lock = threading.RLock()
        self._idle: list[NDArray[np.uint8]] = []
        # something was taken since the last `rest`
        self._is_used = False

    def take(self, size_bytes: int) -> Tensor:
        """An uninitialised uint8 buffer of `size_bytes` bytes. MemoryError if there is no memory."""
        if size_bytes < SMALLEST_POOLED_BYTES:
            return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        self._is_used = True
        memory = self._take_idle(size_bytes)
        if memory is None:
            memory = self._make(size_bytes)
        # each loan is an array of its own: the tensor's storage keeps it alive, and its end gives the memory back
        loan = memory[:size_bytes]
        weakref.finalize(loan, self._give_back, memory).atexit = False
        return torch.from_numpy(loan)

    def keep_at_most(self, keep_bytes: int) -> None:
        """Free idle memory, the longest idle first, until no more than `keep_bytes` is kept now."""
        with self._lock:
            while self._idle and sum(kept.size for kept in self._idle) > keep_bytes:
                self._idle.pop(0)

    def rest(self) -> bool:
        """Free the idle memory if nothing was taken since the last call. True if some was freed."""
        with self._lock:
            rests, self._is_used = not self._is_used and bool(self._idle), False
            if rests:
                self._idle.clear()
            return rests

    def _take_idle(self, size_bytes: int) -> NDArray[np.uint8] | None:
        with self._lock:
            fitting = [m for m in self._idle if size_bytes <= m.size <= 2 * size_bytes]
            if not fitting:
                return None
            best = min(fitting, key=lambda memory: memory.size)
            self._idle = [memory for memory in self._idle if memory is not best]
            return best

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self._idle.append(memory)
            self.keep_at_most(self._keep_bytes)


# Gives a buffer of exactly so many bytes. Its `getvalue()` is the message made in it, without a copy. While anybody
# holds that message, `getbuffer()` works on a copy, so a message never changes.
TakeMessage = Callable[[int], io.BytesIO]


def fresh_message(size_bytes: int) -> io.BytesIO:
    """A buffer of `size_bytes` zeros."""
    message = io.BytesIO()
    message.seek(size_bytes - 1)
    message.write(b"\0")
    return message


class MessageRing:
    """Buffers for a sender of messages that drops each one before it makes the next but one."""

    # gRPC's sender holds one message while it asks for the next
    _BUFFERS = 3

    def __init__(self) -> None:
        self._used: list[io.BytesIO] = []

    def take(self, size_bytes: int) -> io.BytesIO:
        """The buffer used the longest ago if it has that size, else a fresh one."""
        oldest = self._used.pop(0) if len(self._used) == self._BUFFERS else None
        fits = oldest is not None and len(oldest.getvalue()) == size_bytes
        taken = oldest if oldest is not None and fits else fresh_message(size_bytes)
        self._used.append(taken)
        return taken


class MessagePool:
    """Buffers for many messages that live long and are dropped together; the next messages are made in them.

    In fresh memory, encoding 16 M float32 takes 12,500 page faults, which are half of its 60 ms.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may give back while this thread holds it
        self._idle: list[io.BytesIO] = []

    def take(self, size_bytes: int) -> io.BytesIO:
        """An idle buffer of that size, or a fresh one."""
        with self._lock:
            for place, idle in enumerate(self._idle):
                if len(idle.getvalue()) == size_bytes:
                    return self._idle.pop(place)
        return fresh_message(size_bytes)

    def give_back(self, buffers: list[io.BytesIO]) -> None:
        """Keep these buffers for the next messages, and free those that are still idle."""
        with self._lock:
            self._idle = list(buffers)


def fresh_memory(size_bytes: int) -> NDArray[np.uint8]:
    """`size_bytes` zeros, which take no memory before they are touched. MemoryError if they cannot be had.

    It is private to the process: shared memory, which is Python's default, gets no huge pages. Touching 512 MiB first
    takes 62 ms so, where shared memory takes 405 and small pages take 280. Writing it again takes 20 ms, not 28.
    """
    try:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {size_bytes} bytes") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages uses small ones
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, dtype=np.uint8)


def copy_elements(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)` of flat tensors, by the calling thread alone.

    torch would split the copy among OpenMP threads. Each thread that copies gets a set of its own, also the new
    thread that gRPC has for every stream. They spin when they are done, and take the cores from the other end of the
    connection.
    """
    # a single element counts as contiguous whatever its stride, but only with stride 1 can it be viewed as bytes
    if not (source.is_cpu and source.is_contiguous() and source.stride(-1) == 1):
        target.copy_(source)
    elif source.dtype == target.dtype:
        np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
    else:
        for start in range(0, target.numel(), SERIAL_ELEMENTS):
            target[start : start + SERIAL_ELEMENTS].copy_(source[start : start + SERIAL_ELEMENTS])
