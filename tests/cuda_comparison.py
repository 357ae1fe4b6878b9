"""Where the CUDA cases run, what they are compared with, and how closely.

In Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) tensors lie on the CPU. It has its limits: fma
is a product and a sum, so the reference is `cuda_reference`; stores to bfloat16 truncate, so they may be 1 ulp
off. On a device nothing is allowed for: the bits must be those of the CPU kernels.
"""

from __future__ import annotations

import os

import cuda_reference
import torch

from pushstep.optim import cpu, cuda_kernels, cuda_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
REFERENCE = cuda_reference if INTERPRETED else cpu
BLOCK = cuda_kernels.BLOCK


def ordered(tensor):
    """Floating point numbers as integers in the same order, so that a difference counts ulps."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().resolve_neg().view(integer).to(torch.int64)
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def assert_same(got, want, ulps=0):
    """The same bits, or `ulps` apart; where the interpreter stores bfloat16, one."""
    for a, b in zip(got.written(), want.written(), strict=True):
        assert a.dtype == b.dtype
        if a.dtype.is_floating_point:
            allowed = max(ulps, 1 if INTERPRETED and a.dtype == torch.bfloat16 else 0)
            apart = (ordered(a.cpu()) - ordered(b.cpu())).abs()
            assert apart.numel() == 0 or int(apart.max()) <= allowed, (a.dtype, int(apart.max()))
        else:
            assert torch.equal(a.cpu(), b.cpu())


def count_launches(monkeypatch):
    """A list that gets the name of every kernel as it is launched."""
    names = []
    launch = cuda_launch.launch

    def counted(kernel, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(cuda_launch, "launch", counted)
    return names
