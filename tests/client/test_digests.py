"""Digests of state_dicts: equal for equal ones wherever they lie, and small."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch

from pushstep.client.optimizer.digests import digest_of

STATE: dict[str, Any] = {
    "state": {0: {"step": torch.tensor(3.0), "sum": torch.arange(6.0).view(2, 3)}, 1: {}},
    "param_groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99), "foreach": None}],
}


def _changed(change: Any) -> dict[str, Any]:
    state = copy.deepcopy(STATE)
    change(state)
    return state


@pytest.mark.parametrize(
    ("name", "change", "equal"),
    [
        ("a copy", lambda s: None, True),
        (
            "in other strides",
            lambda s: s["state"][0].update(sum=s["state"][0]["sum"].t().contiguous().t()),
            True,
        ),
        ("an element", lambda s: s["state"][0]["sum"][1, 2].add_(1e-6), False),
        ("the shape", lambda s: s["state"][0].update(sum=torch.arange(6.0).view(3, 2)), False),
        ("the dtype", lambda s: s["state"][0].update(step=torch.tensor(3)), False),
        ("a value", lambda s: s["param_groups"][0].update(lr=0.2), False),
        ("a key more", lambda s: s["param_groups"][0].update(initial_lr=0.1), False),
        ("a state less", lambda s: s["state"].pop(1), False),
        ("a tensor for a number", lambda s: s["param_groups"][0].update(lr=torch.tensor(0.1)), False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_tells_equal_from_other(name: str, change: Any, equal: bool) -> None:
    assert (digest_of(STATE) == digest_of(_changed(change))) == equal, name


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
def test_each_dtype_and_nan(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, float("nan"), -0.0]).to(dtype)
    assert digest_of(values) == digest_of(values.clone())
    assert digest_of(values) != digest_of(torch.zeros_like(values))
    assert digest_of(torch.empty(0, dtype=dtype)) == digest_of(torch.empty(0, dtype=dtype))


def test_nothing_of_the_tensors_is_kept() -> None:
    """A million elements leave a digest of a few bytes, and what is returned may be written to."""
    big = torch.zeros(1 << 20)
    digest = digest_of({"sum": big})["sum"]
    assert sum(map(sys.getsizeof, digest)) < 1000
    assert not any(isinstance(part, torch.Tensor) for part in digest)
    big[7] = 1
    assert digest_of(big) != digest
