"""Compiling the kernels before the first worker needs them.

A kernel's first call costs seconds where no process before has compiled it. One tiny step of each rule and form that
pushes usually take puts them all into the cache, which lies in the data folder when the package's own is read-only.
"""

from __future__ import annotations

from pathlib import Path

import torch

from pushstep.optim import RULES
from pushstep.optim.copies import TORCH_ELEMENTS, copy
from pushstep.optim.kernel_cache import keep_in
from pushstep.optim.norms import square_sums
from pushstep.optim.rows import coalesce
from pushstep.optim.varints import Varints


def warm_kernels(device: torch.device, cache: Path) -> None:
    """Step every rule once, dense (for a worker on this host, too) and by rows, with and without a factor."""
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
            continue  # less usual, and compiled when it is first stepped
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
