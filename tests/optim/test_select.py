"""Selecting the largest elements: against sorting them all, for any values, dtypes and threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushstep.optim.ops import select as room
from pushstep.optim.ops.select import select
from tests.support.numbers.torch_settings import threads_at_most

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0000001, 3.4e38, np.inf, -np.inf, np.nan]


def stated(source, residual, k, wire):
    """By sorting: indices, values, rest."""
    held = residual.dtype if residual is not None else source.dtype
    whole = source.to(held) + residual if residual is not None else source.clone()
    size = whole.abs().double().numpy()
    # lexsort is by its last key first: NaN, then magnitude, then index
    order = np.lexsort((np.arange(len(size)), -np.nan_to_num(size, posinf=np.inf), ~np.isnan(size)))
    indices = torch.from_numpy(np.sort(order[:k]))
    values = whole[indices].to(wire)
    rest = whole.clone()
    rest[indices] -= values.to(held)
    owed = torch.zeros_like(rest) if residual is None else residual
    return indices, values, torch.where(torch.isfinite(rest), rest, owed)


def same(got, expected):
    return np.array_equal(got.double().numpy(), expected.double().numpy(), equal_nan=True)


def check(source, residual, k, wire, threads):
    held = residual.dtype if residual is not None else source.dtype
    rest = torch.empty(len(source), dtype=held)
    with threads_at_most(threads):
        indices, values = select(source, residual, rest, k, wire=wire)
    expected_indices, expected_values, expected_rest = stated(source, residual, k, wire)
    assert torch.equal(indices, expected_indices)
    assert same(values, expected_values)
    assert values.dtype == wire
    assert same(rest, expected_rest)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), held=st.sampled_from([torch.float32, torch.float64]), owed=st.booleans())
def test_any_values_are_selected_as_by_sorting(data, held, owed):
    numbers = st.sampled_from(EDGES) | st.floats(width=32)
    lists = st.lists(numbers, min_size=1, max_size=60)
    source = torch.tensor(data.draw(lists), dtype=held)
    k = data.draw(st.integers(1, len(source)))
    wire = data.draw(st.sampled_from([held, torch.float32, torch.bfloat16, torch.float16]))
    finite = st.floats(-(2.0**100), 2.0**100, width=32)
    drawn = data.draw(st.lists(finite, min_size=len(source), max_size=len(source))) if owed else None
    residual = None if drawn is None else torch.tensor(drawn, dtype=held)
    check(source, residual, k, wire, 1)


N = 3 * room.SLICE_ELEMENTS + 321


def _values(kind):
    values = torch.randn(N, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        values = values.round()
    elif kind == "equal":
        values.fill_(-2.5)
    elif kind == "one bit apart":
        values = (torch.arange(N) % 3).int().add_(0x3F800000).view(torch.float32)
    elif kind == "edges":
        values = torch.tensor(EDGES).repeat(N // len(EDGES) + 1)[:N].contiguous()
    return values


@pytest.mark.parametrize("k", [1, N // 2, N])
@pytest.mark.parametrize("kind", ["noise", "ties", "equal", "one bit apart", "edges"])
def test_threads_change_nothing(kind, k):
    source = _values(kind)
    residual = torch.randn(N, generator=torch.Generator().manual_seed(2)).round()
    for threads in (1, 2, 7):
        check(source, None, k, torch.float32, threads)
        check(source.bfloat16(), residual, k, torch.bfloat16, threads)


def test_slices_grow_with_the_gradient(monkeypatch):
    monkeypatch.setattr(room, "MOST_SLICES", 2)
    for threads in (1, 2, 7):
        check(_values("ties"), None, N // 3, torch.float16, threads)


@pytest.mark.parametrize("gradient", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_other_dtypes_than_the_residual(gradient):
    source = torch.randn(9000, generator=torch.Generator().manual_seed(3)).to(gradient)
    residual = torch.randn(9000, generator=torch.Generator().manual_seed(4))
    check(source, residual, 90, torch.float32, 2)
