"""Buffers are used again once nobody looks at them any more, and never before."""

from __future__ import annotations

import threading

import pytest
import torch

from pushstep.proto.memory import SMALLEST_POOLED_BYTES, BufferPool

SIZE = SMALLEST_POOLED_BYTES


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, 3 * SIZE + 5])
def test_a_buffer_is_as_long_as_asked_and_writable(size: int) -> None:
    buffer = BufferPool(1 << 30).take(size)
    assert (buffer.dtype, buffer.shape) == (torch.uint8, (size,))
    assert int(buffer.fill_(3).sum()) == 3 * size


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
