"""torch's global settings that a program may have changed, each as a context."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16


@contextlib.contextmanager
def switched(get, set_, *values):
    """A switch of torch's for the length of a block."""
    before = get()
    set_(*values)
    try:
        yield
    finally:
        set_(before)


def threads_at_most(count):
    """How many threads an operation may use, in this thread."""
    return switched(torch.get_num_threads, torch.set_num_threads, count)


@contextlib.contextmanager
def deterministic():
    """What is not written is NaN, and what has no deterministic way raises."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushed():
    """Numbers too small to be normal count as zero, in this thread."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def the_rest():
    """Switches of which each by itself has less to do with numbers or memory."""
    with contextlib.ExitStack() as stack:
        for get, set_, value in (
            (torch.get_num_threads, torch.set_num_threads, 1),
            (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
            (
                torch.__future__.get_overwrite_module_params_on_conversion,
                torch.__future__.set_overwrite_module_params_on_conversion,
                True,
            ),
        ):
            stack.enter_context(switched(get, set_, value))
        stack.enter_context(torch.autograd.set_detect_anomaly(True))
        stack.enter_context(torch.sparse.check_sparse_tensor_invariants())
        stack.enter_context(np.errstate(all="raise"))
        yield


SETTINGS = {
    "none": contextlib.nullcontext,
    **{
        f"default dtype {dtype}": lambda dtype=dtype: switched(
            torch.get_default_dtype, torch.set_default_dtype, dtype
        )
        for dtype in (F64, BF16, F16)
    },
    "default device": lambda: switched(lambda: None, torch.set_default_device, "meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
    "seven threads": lambda: threads_at_most(7),
    "swapped parameters": lambda: switched(
        torch.__future__.get_swap_module_params_on_conversion,
        torch.__future__.set_swap_module_params_on_conversion,
        True,
    ),
    "flushed denormals": flushed,
    "autocast": lambda: torch.autocast("cpu", dtype=BF16),
    "what else there is": the_rest,
}
# What torch's own operations make of it is torch's.
BY_TORCH = {
    ("flushed denormals", part)
    for part in (
        "optim, by torch",
        "optim, accumulation by torch",
        "client, lent gradients",
        "client, overlap",
        "client, scaled",
    )
}
