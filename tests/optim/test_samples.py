"""Samples: what is written to a tensor is found, at once or within so many looks, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pushstep.optim.ops.samples import LEAST_LINES, SPREAD, Samples, is_one_run

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 3, 17, 1000, LEAST_LINES * 16, 40_001, 1_000_003]
WRITES: dict[str, Callable[[Tensor], object]] = {
    "negated": lambda t: t.neg_(),
    "doubled": lambda t: t.mul_(2),
    "clamped": lambda t: t.clamp_(-0.5, 0.5),
    "zeroed": lambda t: t.zero_(),
    "filled": lambda t: t.fill_(1.25),
    "moved by a hair": lambda t: t.view(_bits(t)).add_(1),
    "turned round": lambda t: t.copy_(t.flip(0)),
    "renormed": lambda t: t.div_(t.float().norm().to(t.dtype)),
    "sorted": lambda t: t.copy_(t.sort().values),
}


def _bits(tensor: Tensor) -> torch.dtype:
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]


def _random(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)


@pytest.mark.parametrize("whole", [False, True], ids=["sampled", "whole"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_to_all_of_a_tensor_is_found_at_once(
    write: Callable[[Tensor], object], dtype: torch.dtype, whole: bool
) -> None:
    for size in SIZES:
        if size > 1000:
            tensors = [_random(size, dtype), _random(5, dtype)]
            samples = Samples(tensors, {0, 1} if whole else ())
            for _ in range(3):
                samples.take()
                assert samples.changed() == []
                write(tensors[0])
                assert samples.changed() == [0], size
                tensors[0].copy_(_random(size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_any_one_bit_is_found_in_what_is_watched_whole(size: int, dtype: torch.dtype) -> None:
    tensor = _random(size, dtype)
    samples = Samples([tensor], {0})
    samples.take()
    bits = tensor.view(_bits(tensor))
    generator = torch.Generator().manual_seed(1)
    for place in {0, size - 1, size // 2, *torch.randint(0, size, (50,), generator=generator).tolist()}:
        for bit in range(0, 8 * tensor.itemsize, 5):
            bits[place] ^= 1 << bit if bit < 8 * tensor.itemsize - 1 else torch.iinfo(bits.dtype).min
            assert samples.changed() == [0]
            bits[place] ^= 1 << bit if bit < 8 * tensor.itemsize - 1 else torch.iinfo(bits.dtype).min
    assert samples.changed() == []


@pytest.mark.parametrize("elements", [100, 40_001, 500_000])
def test_every_element_has_its_turn(elements: int) -> None:
    """A write that is made again and again is found, wherever it is."""
    tensors = [_random(elements) for _ in range(3)]
    for place in (0, 1, elements // 3, elements - 2, elements - 1):
        samples = Samples(tensors)
        for _ in range(SPREAD):
            samples.take()
            tensors[1][place] += 1
            if samples.changed():
                break
        assert samples.changed() == [1]


def test_small_tensors_are_watched_whole() -> None:
    tensors = [_random(size) for size in (1, 0, 7, 300, 500)]
    samples = Samples(tensors)
    samples.take()
    for place in (0, 2, 3, 4):
        tensors[place][-1] += 1
        assert samples.changed() == [place]
        tensors[place][-1] -= 1
        samples.take()


@pytest.mark.parametrize(
    ("tensor", "one_run"),
    [
        (_random(24).view(4, 6).t(), True),
        (_random(2 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (_random(60).view(6, 10)[:, :7], False),
        (_random(60)[::2], False),
        (_random(6).view(1, 6)[:, ::2], False),
        (torch.zeros(0, 3), False),
    ],
    ids=["transposed", "channels last", "with gaps", "every other", "one row of them", "empty"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["sampled", "whole"])
def test_layouts(tensor: Tensor, one_run: bool, whole: bool) -> None:
    assert is_one_run(tensor) is one_run
    samples = Samples([tensor], {0} if whole else ())
    samples.take()
    assert samples.changed() == []
    if tensor.numel():
        tensor.neg_()
        assert samples.changed() == [0]


def test_what_lies_beside_a_tensor_is_not_looked_at() -> None:
    memory = _random(1000)
    tensors = [memory[7:300], memory[301:302], memory[400:997]]
    samples = Samples(tensors, {0, 1, 2})
    samples.take()
    for place in (6, 300, 302, 399, 997):
        memory[place] += 1
    assert samples.changed() == []


def test_many_tensors_with_gaps_are_looked_at_in_turn() -> None:
    tensors = [_random(60).view(6, 10)[:, :7] for _ in range(50)]
    samples = Samples(tensors)
    found: set[int] = set()
    for _ in range(50):
        samples.take()
        for tensor in tensors:
            tensor.neg_()
        found.update(samples.changed())
    assert found == set(range(50))


def test_memory_that_was_moved_as_it_is() -> None:
    tensor = _random(5000)
    samples = Samples([tensor], {0})
    samples.take()
    copy = tensor.clone()
    samples.moved(0, copy.data_ptr())
    assert samples.changed() == []
    copy[17] = 0
    assert samples.changed() == [0]
