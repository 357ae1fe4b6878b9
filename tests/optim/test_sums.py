"""Sums of gradients: torch's own arithmetic to the bit, and the norms that the sum would have."""

from __future__ import annotations

import pytest
import torch

from pushstep.optim.ops.norms import square_sums
from pushstep.optim.ops.sums import weighted_sum

WEIGHTS = [1.0, 3.7, 0.1, 12.0, 1e-3]


def by_torch(terms: list[torch.Tensor], weights: list[float], divisor: float) -> torch.Tensor:
    wide = torch.promote_types(terms[0].dtype, torch.float32)
    total = terms[0].to(wide) * torch.tensor(weights[0], dtype=wide)
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total = total + term.to(wide) * torch.tensor(weight, dtype=wide)
    return total / torch.tensor(divisor, dtype=wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[1], [4095, 1, 0, 4097, 70_000], [300_001]], ids=str)
def test_a_sum_is_torchs_to_the_bit(dtype: torch.dtype, count: int, sizes: list[int]) -> None:
    torch.manual_seed(count)
    terms = [torch.randn(sum(sizes)).to(dtype) for _ in range(count)]
    for weights in ([1.0] * count, WEIGHTS[:count]):
        for divisor in (1.0, sum(weights)):
            expected = by_torch(terms, weights, divisor)
            total = torch.empty_like(expected)
            norms = weighted_sum(total, terms, weights, divisor, sizes)
            assert torch.equal(total, expected)
            assert norms == square_sums(list(torch.split(expected, sizes)))


def test_signs_of_zero_and_what_is_not_finite_stay() -> None:
    term = torch.tensor([-0.0, 0.0, float("inf"), float("nan"), 3e38])
    total = torch.empty(5)
    weighted_sum(total, [term, term], [1.0, 1.0], 1.0, [5])
    assert torch.equal(total.view(torch.int32), by_torch([term, term], [1.0, 1.0], 1.0).view(torch.int32))
