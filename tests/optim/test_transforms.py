"""What hooks do to gradients: the kernels against torch, any split, any dtype, in place, and without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pushstep.optim.ops import transforms
from pushstep.optim.ops.normal import noise_key, normals
from pushstep.optim.step.operands import OperandError

SIZES = [1, 4095, 0, 4097, 300, 9000]
ROWS = [0, 4095, 5, 17, 100, 9]
FACTORS = [1.0, -0.5, 3.0, 1e-3, 1.0, 2.0]
KEYS = [noise_key(1, 2, index) for index in range(len(SIZES))]
Change = Callable[[Tensor, Tensor], None]
CHANGES: dict[str, Change] = {
    "scale": lambda target, source: transforms.scale(target, source, SIZES, FACTORS),
    "clip": lambda target, source: transforms.clip(target, source, SIZES, FACTORS, 0.75),
    "noise": lambda target, source: transforms.add_noise(target, source, SIZES, FACTORS, 0.1, KEYS),
    "centralize": lambda target, source: transforms.centralize(target, source, SIZES, FACTORS, ROWS),
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
]


def source_of(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    found = torch.randn(sum(SIZES), generator=generator, dtype=torch.float64).to(dtype)
    found[7], found[4100] = torch.nan, torch.inf
    return found


def made(change: Change, source: Tensor, dtype: torch.dtype) -> Tensor:
    target = torch.full(source.shape, 9.0, dtype=dtype)
    change(target, source)
    return target


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(nan=-7.5), other.nan_to_num(nan=-7.5)) and torch.equal(
        one.isnan(), other.isnan()
    )


@pytest.mark.parametrize(("dtype", "stepped"), DTYPES, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_kernels_do_what_torch_does(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, stepped: torch.dtype
) -> None:
    """To the bit, but for means, which torch adds up in another order."""
    source = source_of(dtype)
    found = made(CHANGES[name], source, stepped)
    monkeypatch.setattr(transforms, "_is_elsewhere", lambda *_: True)
    expected = made(CHANGES[name], source, stepped)
    if name == "centralize":
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    else:
        assert same(found, expected)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", CHANGES)
def test_neither_threads_nor_place_change_a_bit(name: str, threads: int) -> None:
    source = source_of(torch.float32)
    expected = made(CHANGES[name], source, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        in_place = source.clone()
        CHANGES[name](in_place, in_place)
        assert same(in_place, expected)
    finally:
        torch.set_num_threads(before)


def test_rows_get_the_noise_of_their_place() -> None:
    """Whichever rows a gradient has, and in whatever pieces: each element's noise is that of the whole table."""
    key, row = noise_key(3, 4, 5), 7
    table = torch.zeros(11, row)
    transforms.add_noise(table.view(-1), table.view(-1), [77], [1.0], 0.5, [key])
    assert torch.equal(table.view(-1), torch.from_numpy(0.5 * normals(key, np.arange(77))).float())
    ids = torch.tensor([0, 3, 10])
    rows = torch.zeros(3, row)
    transforms.add_noise(rows.view(-1), rows.view(-1), [21], [1.0], 0.5, [key], ids)
    assert torch.equal(rows, table[ids])


def test_noise_is_normal() -> None:
    """The inverse of the distribution to 1e-14, its moments, and nothing in common between keys."""
    count = 200_000
    drawn = torch.from_numpy(normals(noise_key(0, 1, 2), np.arange(count)))
    assert abs(float(drawn.mean())) < 4 / count**0.5
    assert abs(float(drawn.var()) - 1) < 6 / count**0.5
    assert abs(float((drawn**4).mean()) - 3) < 40 / count**0.5
    expected = torch.special.ndtri(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    shares = torch.searchsorted(drawn.sort().values, expected) / count
    assert float((shares - torch.linspace(0.001, 0.999, 999)).abs().max()) < 2 / count**0.5
    for other in (noise_key(1, 1, 2), noise_key(0, 2, 2), noise_key(0, 1, 3)):
        theirs = torch.from_numpy(normals(other, np.arange(count)))
        assert abs(float((drawn * theirs).mean())) < 5 / count**0.5


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(("dtype", "kept"), DTYPES[:3], ids=str)
def test_averages(momentum: float, dtype: torch.dtype, kept: torch.dtype) -> None:
    """fma(1 - momentum, p - average, average), as the optimizers of `optim.keras` take it."""
    parameters = source_of(dtype)[8:4000]
    average = torch.randn(parameters.numel(), generator=torch.Generator().manual_seed(1), dtype=kept)
    p, a = parameters.to(kept), average.clone()
    rest = torch.tensor(1 - momentum, dtype=kept)
    exact = a.double() + rest.double() * (p - a).double()
    transforms.plan_average(average, parameters, momentum)()
    if momentum == 0:
        assert torch.equal(average, p)
    else:
        # float64 holds the product and rounds the sum once more: half an ulp
        torch.testing.assert_close(
            average, exact.to(kept), rtol=2**-23 if kept == torch.float32 else 2**-51, atol=0
        )


BAD: dict[str, tuple[Any, Any]] = {
    "too short": (torch.zeros(sum(SIZES) - 1), torch.zeros(sum(SIZES))),
    "not contiguous": (torch.zeros(2 * sum(SIZES))[::2], torch.zeros(sum(SIZES))),
    "a half target": (torch.zeros(sum(SIZES), dtype=torch.float16), torch.zeros(sum(SIZES))),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_fit_are_refused(case: str) -> None:
    target, source = BAD[case]
    before = target.clone()
    for change in CHANGES.values():
        with pytest.raises(OperandError):
            change(target, source)
    assert torch.equal(target, before)
