"""Buffers are used again once nobody looks at them any more, and never before."""

from __future__ import annotations

import errno
import mmap
import threading

import pytest
import torch

from pushstep.proto.wire.buffers import SMALLEST_POOLED_BYTES, BufferPool, MessagePool, MessageRing

SIZE = SMALLEST_POOLED_BYTES


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, 3 * SIZE + 5])
def test_a_buffer_is_as_long_as_asked_and_writable(size: int) -> None:
    buffer = BufferPool(1 << 30).take(size)
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (size,))
    assert int(buffer.fill_(3).sum()) == 3 * size


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHugePages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", NoHugePages)
    assert int(BufferPool(1 << 30).take(3 * SIZE).fill_(1).sum()) == 3 * SIZE


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    pool = BufferPool(1 << 30)
    buffer = pool.take(2 * SIZE)
    where = address(buffer)
    view = buffer[: 4 * 1000].view(torch.float32)[10:]
    del buffer
    other = pool.take(2 * SIZE)
    assert address(other) != where  # `view` still looks at it
    view.fill_(1.0)
    del view
    assert address(pool.take(2 * SIZE - 7)) == where


@pytest.mark.parametrize(("size", "again"), [(SIZE, True), (2 * SIZE, True), (2 * SIZE + 1, False)])
def test_only_memory_of_about_the_size_is_used_again(size: int, again: bool) -> None:
    """A small body must not sit in the memory of a large one, which would count for the large one's bytes."""
    pool = BufferPool(1 << 30)
    held = pool.take(size)
    where = address(held)
    del held
    smaller = pool.take(SIZE)
    assert (address(smaller) == where) is again


def test_no_more_is_kept_than_was_said() -> None:
    pool = BufferPool(3 * SIZE)
    buffers = [pool.take(SIZE) for _ in range(5)]
    places = [address(buffer) for buffer in buffers]
    while buffers:
        buffers.pop(0)
    assert sum(memory.size for memory in pool._idle) == 3 * SIZE
    assert [address(pool.take(SIZE)) in places for _ in range(3)] == [True] * 3


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool(1 << 30)
    wrong: list[int] = []

    def use(number: int) -> None:
        for _ in range(100):
            buffer = pool.take(SIZE)
            buffer.fill_(number)
            if int(buffer.min()) != number or int(buffer.max()) != number:
                wrong.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (
        1 <= len(pool._idle) <= 2 * len(threads)
    )  # a thread takes its next buffer before it lets go of the last


@pytest.mark.parametrize("kind", [MessageRing, MessagePool])
def test_a_message_which_is_held_never_changes(kind: type[MessageRing] | type[MessagePool]) -> None:
    memory = kind()
    held = []
    for number in range(8):
        buffer = memory.take(100)
        with buffer.getbuffer() as view:
            view[:] = bytes([number]) * 100
        held.append(buffer.getvalue())
        if isinstance(memory, MessagePool):
            memory.give_back([buffer])

    assert held == [bytes([number]) * 100 for number in range(8)]


def test_a_ring_makes_messages_in_the_memory_of_those_that_were_dropped() -> None:
    ring = MessageRing()
    first = [id(ring.take(SIZE).getvalue()) for _ in range(3)]

    assert [id(ring.take(SIZE).getvalue()) for _ in range(3)] == first
    assert len(ring.take(SIZE - 1).getvalue()) == SIZE - 1


def test_a_pool_keeps_what_was_given_back_last() -> None:
    pool = MessagePool()
    old, new = [[pool.take(SIZE) for _ in range(2)] for _ in range(2)]
    pool.give_back(old)
    pool.give_back(new)

    again = [pool.take(SIZE), pool.take(SIZE - 1), pool.take(SIZE), pool.take(SIZE)]
    assert {id(again[0]), id(again[2])} == set(map(id, new))
    assert all(id(buffer) not in set(map(id, old)) for buffer in again)
    assert [len(buffer.getvalue()) for buffer in again] == [SIZE, SIZE - 1, SIZE, SIZE]
