"""How far apart two results are, in units in the last place, and the bounds that one step is held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Against torch, float32, one step from equal state.
STATE_ULPS = {"square_avg": 2, "sum": 2, "acc_delta": 8}
PARAMETER_ULPS = 4


def distance(one: Tensor, other: Tensor) -> Tensor:
    """Float32 numbers between two float32 tensors, elementwise: 0 where equal, 1 for neighbours, across 0 too."""
    for tensor in (one, other):
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError("ulps are counted between finite float32 numbers")

    def place(tensor: Tensor) -> Tensor:
        raw = tensor.detach().contiguous().view(torch.int32).to(torch.int64)
        return torch.where(raw < 0, -(raw & 0x7FFF_FFFF), raw)

    return (place(one) - place(other)).abs()


def spacing(magnitude: Tensor) -> Tensor:
    """The size of one float32 ulp at each magnitude, in float64."""
    size = magnitude.detach().abs()
    return torch.nextafter(size, torch.tensor(torch.inf)).double() - size.double()


def parameter_distance(got: Tensor, expected: Tensor, before: Tensor) -> Tensor:
    """|got - expected| in ulps of the largest number involved: before, after, or what was applied.

    A parameter that a step carries close to 0 has lost the digits that cancelled, in torch as here; counted in
    its own ulps that loss would look like an error.
    """
    got, expected, before = (tensor.detach() for tensor in (got, expected, before))
    applied = (expected.double() - before.double()).float()
    largest = torch.stack([before.abs(), expected.abs(), applied.abs()]).amax(dim=0)
    return (got.double() - expected.double()).abs() / spacing(largest)


def assert_state_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], extra: int = 0) -> None:
    """One parameter's state within the bounds, plus `extra` ulps where the gradients differed. `step` is exact."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name == "step":
            assert float(got[name]) == float(value)
        else:
            far = int(distance(got[name], value).max())
            assert far <= STATE_ULPS[name] + extra, f"{name}: {far} ulps"


def assert_parameter_close(got: Tensor, expected: Tensor, before: Tensor, extra: int = 0) -> None:
    """A parameter within the bound; `extra` as above."""
    far = float(parameter_distance(got, expected, before).max())
    assert far <= PARAMETER_ULPS + extra, f"{far} ulps"
