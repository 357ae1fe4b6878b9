"""What is worked out while bytes come in is what one pass over all of them finds, to the bit."""

from __future__ import annotations

import pytest
import torch

from pushstep.optim.ops import streaming as arriving
from pushstep.optim.ops.norms import square_sums
from pushstep.optim.ops.quantise import code_bytes, dequantise, quantise

BLOCK = 256
LENGTHS = [1, 4096, 3, 12_289, 255, 40_000]


def _in_steps(found: arriving.StreamingNorms, total: int, step: int) -> list[float]:
    for arrived in range(0, total, step):
        found.advance(arrived)
    found.advance(total)
    return found.square_sums()


@pytest.mark.parametrize("step", [1000, 16_384, 49_999, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_what_arrives_in_pieces(dtype: torch.dtype, step: int) -> None:
    torch.manual_seed(1)
    values = torch.randn(sum(LENGTHS)).to(dtype)

    found = _in_steps(arriving.floats(values, arriving.Blocks(LENGTHS)), values.nbytes, step)

    assert found == square_sums(values.split(LENGTHS))


def test_that_nothing_is_read_before_it_is_there() -> None:
    values = torch.randn(sum(LENGTHS))
    expected = square_sums(values.split(LENGTHS))
    arrived = torch.full_like(values, float("nan"))
    found = arriving.floats(arrived, arriving.Blocks(LENGTHS))
    for start in range(0, len(values), 1001):
        stop = min(start + 1001, len(values))
        arrived[start:stop] = values[start:stop]
        found.advance(stop * values.itemsize)

    assert found.square_sums() == expected


@pytest.mark.parametrize("step", [260, 5000, 10**9])
def test_codes_that_arrive_in_pieces(step: int) -> None:
    torch.manual_seed(2)
    units = []
    for length in LENGTHS:
        codes = torch.empty(code_bytes(length, BLOCK), dtype=torch.uint8)
        quantise(
            torch.randn(length), torch.zeros(length), torch.empty(length), codes, length=length, block=BLOCK
        )
        units.append(codes)
    whole = torch.cat(units)
    expected = torch.empty(sum(LENGTHS))
    sums = dequantise(whole, expected, LENGTHS, block=BLOCK)
    arrived, values = torch.full_like(whole, 255), torch.empty(sum(LENGTHS))
    found = arriving.codes(arrived, values, arriving.Blocks(LENGTHS), block=BLOCK)
    for start in range(0, len(whole), step):
        arrived[start : start + step] = whole[start : start + step]
        found.advance(min(start + step, len(whole)))

    assert found.square_sums() == sums
    assert torch.equal(values, expected)
