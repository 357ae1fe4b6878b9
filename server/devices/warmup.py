"""Compiles the kernels before the first worker needs them.

A kernel's first call costs seconds if no earlier process has compiled it. One tiny step of each rule, in each form that
pushes usually take, puts the kernels into the cache. The cache lies in the data folder if the package's own is
read-only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pushstep.optim import RULES
from pushstep.optim.kernels.cache import keep_in
from pushstep.optim.ops.copies import TORCH_ELEMENTS, copy
from pushstep.optim.ops.norms import square_sums
from pushstep.optim.ops.rows import coalesce
from pushstep.optim.ops.varints import Varints


def warm_kernels(device: torch.device, cache: Path) -> None:
    """Step each usual rule, dense (also for a worker on this host) and by rows, with and without factor."""
    keep_in(cache)
    host = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        copy(_ones(host, TORCH_ELEMENTS + 1), _ones(host, TORCH_ELEMENTS + 1).to(dtype))
    gradient = _ones(device, 2, 2)
    square_sums([gradient])
    Varints(b"", 1)
    ids, rows = coalesce(torch.tensor([1, 0, 1], dtype=torch.int64, device=host), _ones(host, 3, 2))
    for rule in RULES.values():
        if rule.kernel:
            continue  # less usual: compiled at its first step
        hyperparameters = dict(rule.defaults)
        for factor in (1.0, 0.5):
            param, *state = (_ones(device, 2, 2) for _ in range(1 + len(rule.state_names)))
            for copy_out in (None, _ones(host, 4)) if device.type == "cpu" else (None,):
                rule.step_dense(
                    param.view(-1),
                    gradient.view(-1),
                    [s.view(-1) for s in state],
                    hyperparameters,
                    step=1,
                    factor=factor,
                    copy_out=copy_out,
                )
            rule.step_rows(
                param, ids.to(device), rows.to(device), state, hyperparameters, step=1, factor=factor
            )


def _ones(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float32, device=device)
