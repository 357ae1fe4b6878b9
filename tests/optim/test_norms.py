"""Norms: the stated order to the bit, any number of threads, and finiteness from the same read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pushstep.optim.ops import norms
from tests.support.numbers.torch_settings import threads_at_most


def _stated(values):
    """The order of `norm_kernels`, in numpy."""
    flat = values.reshape(-1).double().numpy()
    total = 0.0
    for start in range(0, len(flat), 4096):
        block = flat[start : start + 4096]
        lanes = np.zeros(256)
        for chunk in range(0, len(block), 256):
            part = block[chunk : chunk + 256]
            lanes[: len(part)] += part * part
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        total += float(lanes[0])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 255, 257, 4096, 4097, 500_001])
def test_the_stated_order_to_the_bit(dtype, n):
    torch.manual_seed(n)
    values = torch.randn(n).to(dtype)
    expected = _stated(values)
    for threads in (1, 2, 7):
        with threads_at_most(threads):
            assert norms.square_sum(values) == expected


def test_any_split_on_block_borders_adds_up_to_the_same():
    torch.manual_seed(0)
    values = torch.randn(10 * 4096 + 17)
    total = 0.0
    for start in range(0, len(values), 4096):
        total += norms.square_sum(values[start : start + 4096])
    assert total == norms.square_sum(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_summed_stretch_by_stretch(dtype, threads):
    """Of each stretch that has rows, what `square_sum` says of them."""
    torch.manual_seed(0)
    tables, expected = [], []
    for table_rows, stretch_rows, width, share in (
        (1000, 256, 32, 0.3),
        (70, 128, 5, 0.5),
        (100_000, 512, 64, 0.05),
        (1000, 10, 3, 0.01),
        (50, 8, 4, 0.0),
        (20_000, 16_384, 3, 0.9),
    ):
        ids = torch.nonzero(torch.rand(table_rows) < share).flatten()
        rows = torch.randn(len(ids), width).to(dtype)
        tables.append(norms.SomeRows(ids, rows, table_rows, stretch_rows))
        own = (rows[ids // stretch_rows == stretch] for stretch in range(-(-table_rows // stretch_rows)))
        expected.append([norms.square_sum(some) for some in own if len(some)])
    with threads_at_most(threads):
        assert norms.stretch_sums(tables) == expected
        assert norms.row_square_sums(tables) == [sum(own, 0.0) for own in expected]
    # as on a device without kernels for rows
    assert [[norms.square_sum(some) for some in norms._stretches(table)] for table in tables] == expected


def test_layouts_read_in_row_major_order():
    torch.manual_seed(0)
    values = torch.randn(300, 100)
    assert norms.square_sum(values.t().contiguous().t()) == norms.square_sum(values)
    assert norms.square_sum(torch.randn(300, 1).expand(300, 50)) > 0


def test_a_list_is_its_tensors_and_the_global_norm_their_sum_in_order():
    torch.manual_seed(0)
    tensors = [
        torch.randn(n).to(d) for n, d in ((5, torch.float32), (9000, torch.bfloat16), (0, torch.float32))
    ]
    each = [norms.square_sum(t) for t in tensors]
    assert norms.square_sums(tensors) == each
    assert norms.global_norm(tensors) == math.sqrt(each[0] + each[1] + each[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_sum_is_finite_exactly_if_every_element_is(dtype, bad):
    """The squares of every dtype below float64 fit into a float64."""
    values = torch.full((5000,), torch.finfo(dtype).max, dtype=dtype)
    assert math.isfinite(norms.square_sum(values))
    values[4999] = bad
    assert not math.isfinite(norms.square_sum(values))


def test_devices_without_a_kernel_use_torch():
    values = torch.randn(10_000)
    assert norms._in_torch(values) == pytest.approx(norms.square_sum(values), rel=1e-14)


@pytest.mark.parametrize("norm_type", [0.01, 0.5, 1.0, 2.0, 3.5, 40.0, 1000.0, math.inf])
@pytest.mark.parametrize("n", [0, 1, 4097, 1_100_000])
def test_other_norms_are_torchs(norm_type, n):
    """Of float64 numbers; of the list, the norm of the norms. The bits are the same for any number of threads."""
    torch.manual_seed(n)
    values = torch.randn(n, dtype=torch.float64)
    tensors = [values, values[: n // 2], 1e-3 * values]
    expected = [float(torch.linalg.vector_norm(t, norm_type)) if n > 1 else 0.0 for t in tensors]
    found = [[norms.power_norm(t, norm_type) for t in tensors]]
    for threads in (1, 2):
        with threads_at_most(threads):
            found.append([norms.power_norm(t, norm_type) for t in tensors])
    assert found[0] == found[1] == found[2]
    if n > 1 and (0.5 <= norm_type <= 40 or norm_type == math.inf):  # between, torch's powers leave float64
        for one, other in zip(found[0], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        whole = float(torch.linalg.vector_norm(torch.tensor(expected), norm_type))
        assert norms.together(found[0], norm_type) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("norm_type", [0.01, 1.0, 3.0, 1000.0, math.inf])
def test_other_norms_of_extremes(norm_type):
    assert math.isnan(norms.power_norm(torch.tensor([1.0, math.nan]), norm_type))
    assert norms.power_norm(torch.tensor([1.0, -math.inf]), norm_type) == math.inf
    assert math.isnan(norms.together([math.nan, math.inf], norm_type))
    assert norms.together([], norm_type) == norms.together([0.0, 0.0], norm_type) == 0.0
    assert norms.power_norm(torch.tensor([-3e38]), norm_type) == pytest.approx(3e38)
    assert norms.power_norm(torch.tensor([1e-45]), norm_type) == pytest.approx(1.4e-45, rel=0.1)
