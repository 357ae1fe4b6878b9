"""Copies: the bytes of `target.copy_(source)`, those and no others, however the two lie."""

from __future__ import annotations

import pytest
import torch

from pushstep.optim.cpu.copies import PAST_CACHE_BYTES
from pushstep.optim.ops.copies import TORCH_ELEMENTS, copy

PAST_CACHE = PAST_CACHE_BYTES // 4


@pytest.mark.parametrize("elements", [0, 1, TORCH_ELEMENTS, TORCH_ELEMENTS + 1, 300_007, PAST_CACHE + 5])
@pytest.mark.parametrize(("at", "of"), [(0, 0), (1, 0), (7, 3), (16, 5)])
def test_a_copy_writes_its_target_and_nothing_beside_it(elements: int, at: int, of: int) -> None:
    source = torch.arange(elements + of, dtype=torch.float32)
    memory = torch.full((elements + at + 20,), -1.0)
    expected = memory.clone()
    expected[at : at + elements].copy_(source[of:])
    copy(memory[at : at + elements], source[of:])
    assert torch.equal(memory, expected)


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (torch.zeros(300, 200), torch.randn(200, 300).t()),
        (torch.zeros(200, 300).t(), torch.randn(300, 200)),
        (torch.zeros(60_000), torch.randn(60_000).to(torch.bfloat16)),
        (torch.zeros(60_000, dtype=torch.bfloat16), torch.randn(60_000)),
        (torch.zeros(60_000, dtype=torch.bfloat16), torch.randn(60_000).to(torch.bfloat16)),
        (torch.zeros(300, 200), torch.randn(200)),
        (torch.zeros(60_001, dtype=torch.uint8), torch.arange(60_001).to(torch.uint8)),
        (torch.zeros(60_000), torch.randn(120_000)[::2]),
        (torch.zeros(60_000), torch.complex(torch.zeros(60_000), torch.randn(60_000)).conj().imag),
    ],
    ids=[
        "transposed",
        "into transposed",
        "wider",
        "narrower",
        "half",
        "expanded",
        "bytes",
        "strided",
        "negated",
    ],
)
def test_a_copy_is_torchs(target: torch.Tensor, source: torch.Tensor) -> None:
    expected = target.clone().copy_(source)
    copy(target, source)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_float_becomes_torchs_float32(dtype: torch.dtype) -> None:
    source = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).repeat(5)[1:]
    target = torch.empty(source.numel())
    copy(target, source)
    expected = source.float()
    assert torch.equal(target.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(target[numbers].view(torch.int32), expected[numbers].view(torch.int32))


@pytest.mark.parametrize("elements", [10, 100_000])
def test_autograd_notices_that_a_parameter_was_written_to(elements: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(elements))
    loss = (parameter * parameter).sum()
    copy(parameter, torch.ones(elements))
    assert torch.equal(parameter.detach(), torch.ones(elements))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
