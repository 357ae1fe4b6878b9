"""A round's sum has the same bits on every device, and leaves its gradients as they are."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pushstep.proto.types_pb2 import DType, Manifest
from pushstep.proto.wire.layout import Layout
from pushstep.server.staging import reduction
from pushstep.server.staging.gradient import DensePart

LAYOUT = Layout(
    Manifest(
        groups=[{"rule": "adagrad"}],
        parameters=[
            {"name": name, "shape": [length], "dtype": DType.DTYPE_FLOAT32}
            for name, length in (("a", 5000), ("b", 1), ("c", 9000))
        ],
    )
)
ELEMENTS = LAYOUT.arenas[0].elements


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float16, torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(("weights", "divisor"), [((1.0, 1.0, 1.0), 1.0), ((1.0, 3.7, 0.1), 4.8)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_a_sum_is_the_same_by_the_kernel_and_by_torch(
    dtypes: tuple[torch.dtype, ...], weights: tuple[float, ...], divisor: float, count: int
) -> None:
    torch.manual_seed(count)
    gradients = [torch.randn(ELEMENTS).to(dtype) for dtype in dtypes[:count]]
    before = [gradient.clone() for gradient in gradients]
    terms = [
        (weight, DensePart(0, 0, LAYOUT.slots, gradient))
        for weight, gradient in zip(weights, gradients, strict=False)
    ]
    here, _ = reduction._sum_dense(terms, divisor, partial(torch.empty, dtype=torch.uint8))
    elsewhere = reduction._sum_elsewhere(terms, divisor)
    assert torch.equal(here, elsewhere)
    assert here.dtype == elsewhere.dtype == torch.float32
    assert all(map(torch.equal, gradients, before))
