"""Fused steps on a GPU against torch's foreach, fused and compiled ones, in one run.

`python -m tests.benchmarks.cuda` runs from a checkout without anything installed, with any torch that has CUDA and Triton. GB/s counts what a step must move at least:
each operand read once, each result written once (28 bytes per element for Adadelta in float32, 20 for Adagrad). The
last column is that rate over the one of a device-to-device copy, measured first. Times are of the device, by
events around several steps, except for small tensors, where the host is what takes the time: there they are wall time.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PendingPush = Callable[[], object]

ROUNDS, STEPS = 7, 5


def use_checkout() -> None:
    """Make pushstep.optim importable from the checkout if it is not installed: its folder is the package."""
    if importlib.util.find_spec("pushstep") is None:
        package = types.ModuleType("pushstep")
        package.__path__ = [str(ROOT)]
        sys.modules["pushstep"] = package


def device_ms(step: PendingPush, steps: int = STEPS) -> float:
    """Milliseconds of the device per step."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        step()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / steps


def wall_ms(step: PendingPush, steps: int = 20) -> float:
    """Milliseconds from the first call until the device is done, per step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3


def table(
    title: str,
    pushes: dict[str, Callable[[], PendingPush]],
    *,
    least_bytes: int = 0,
    copy_rate: float = 0.0,
    timer: Callable[[PendingPush], float] = device_ms,
) -> dict[str, float]:
    """Print one table. Each candidate is made, warmed up, measured and dropped before the next; median ms by name."""
    print(f"\n{title}")
    print(f"  {'':34s}{'min ms':>10s}{'median ms':>11s}{'GB/s':>9s}{'of copy':>9s}{'slower':>9s}")
    medians: dict[str, float] = {}
    for name, make in pushes.items():
        torch.cuda.empty_cache()
        try:
            step = make()
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        except RuntimeError as error:  # of the compiler, or of a peer that lacks something: the table goes on
            print(f"  {name:34s}  not run: {str(error).splitlines()[0][:90]}")
            continue
        times = [timer(step) for _ in range(ROUNDS)]
        del step
        medians[name] = statistics.median(times)
        rate = least_bytes / min(times) / 1e6
        of_copy = f"{rate / copy_rate:9.2f}" if copy_rate and least_bytes else f"{'':9s}"
        shown = f"{rate:9.0f}" if least_bytes else f"{'':9s}"
        slower = medians[name] / next(iter(medians.values()))
        print(f"  {name:34s}{min(times):10.4f}{medians[name]:11.4f}{shown}{of_copy}{slower:9.2f}", flush=True)
    return medians


def parameters(sizes: Sequence[int], grad_dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Parameters with gradients."""
    made = [torch.randn(n, device="cuda").requires_grad_() for n in sizes]
    for param in made:
        param.grad = torch.randn_like(param).mul_(0.1)
    return made


def writer(
    make: Any, sizes: Sequence[int], *, compiled: bool = False, **arguments: Any
) -> Callable[[], PendingPush]:
    """A candidate: the step of an optimizer over fresh parameters."""

    def build() -> PendingPush:
        torch.manual_seed(0)
        if "lr" in arguments and compiled:  # a number would be compiled in
            arguments["lr"] = torch.tensor(arguments["lr"], device="cuda")
        step: PendingPush = make(parameters(sizes), **arguments).step
        return torch.compile(step, fullgraph=False) if compiled else step

    return build


def flat(rule: str, count: int, grad_dtype: torch.dtype = torch.float32) -> Callable[[], PendingPush]:
    """A candidate: the kernel over one arena, without an optimizer around it."""

    def build() -> PendingPush:
        from pushstep.optim.cuda import steps as cuda
        from pushstep.optim.step.step import Step

        torch.manual_seed(0)
        states = [[torch.rand(count, device="cuda")] for _ in range(2 if rule == "adadelta" else 1)]
        step = Step(
            rule=rule, params=[torch.randn(count, device="cuda")], states=states, lr=1e-3, rho=0.9, eps=1e-6,
            grads=[torch.randn(count, device="cuda").to(grad_dtype)],
        )  # fmt: skip
        return lambda: cuda.step(step)

    return build


def copy_rate(count: int) -> float:
    """GB/s of a device-to-device copy, counting what is read and what is written."""
    source = torch.randn(count, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    best = min(device_ms(lambda: target.copy_(source)) for _ in range(ROUNDS))
    rate = 2 * source.nbytes / best / 1e6
    print(f"copy of {source.nbytes / 1e9:.2f} GB: {best:.3f} ms, {rate:.0f} GB/s read and written")
    return rate


def large(count: int, rate: float) -> None:
    """One G elements: how close to the memory."""
    from pushstep.optim import Adadelta, Adagrad

    parts = [count // 64] * 64
    theirs = torch.optim.Adadelta
    table(
        f"Adadelta, {count:,} float32", {
            "ours, one arena": flat("adadelta", count),
            "ours, 64 tensors": writer(Adadelta, parts),
            "torch foreach": writer(theirs, parts, foreach=True),
            "torch compiled": writer(theirs, parts, compiled=True, foreach=True, capturable=True),
        }, least_bytes=28 * count, copy_rate=rate,
    )  # fmt: skip
    table(
        f"Adadelta, {count:,}, bfloat16 gradients",
        {"ours, one arena": flat("adadelta", count, grad_dtype=torch.bfloat16)},
        least_bytes=26 * count, copy_rate=rate,
    )  # fmt: skip
    peer = torch.optim.Adagrad
    table(
        f"Adagrad, {count:,} float32", {
            "ours, one arena": flat("adagrad", count),
            "ours, 64 tensors": writer(Adagrad, parts, lr=1e-2),
            "torch._fused_adagrad_": writer(peer, parts, lr=1e-2, fused=True),
            "torch foreach": writer(peer, parts, lr=1e-2, foreach=True),
            "torch compiled": writer(peer, parts, compiled=True, lr=1e-2, foreach=True),
        }, least_bytes=20 * count, copy_rate=rate,
    )  # fmt: skip


def small(count: int, size: int) -> None:
    """Many small tensors: wall time, of which the host has most."""
    from pushstep.optim import Adadelta, Adagrad

    sizes = [size] * count
    for ours, theirs in ((Adadelta, torch.optim.Adadelta), (Adagrad, torch.optim.Adagrad)):
        fused = (
            {}
            if theirs is torch.optim.Adadelta
            else {"torch._fused_adagrad_": writer(theirs, sizes, fused=True)}
        )
        on_device = {"capturable": True} if theirs is torch.optim.Adadelta else {"fused": True}
        table(
            f"{ours.__name__}, {count} tensors of {size}, wall time", {
                "ours": writer(ours, sizes, **on_device),
                "ours, replayed graph": lambda ours=ours, on_device=on_device: replayed(ours, sizes, on_device),
                **fused,
                "torch foreach": writer(theirs, sizes, foreach=True),
                "torch compiled": writer(theirs, sizes, compiled=True, foreach=True),
            }, timer=wall_ms,
        )  # fmt: skip


def replayed(ours: Any, sizes: Sequence[int], on_device: dict[str, bool]) -> PendingPush:
    """A captured step."""
    optimizer = ours(parameters(sizes), **on_device)
    optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def rows(rate: float, table_rows: int = 2_000_000, width: int = 32, touched: int = 100_000) -> None:
    """Row-sparse Adagrad: 100 K rows of 32 in a table of 2 M, one in ten named twice."""
    from pushstep.optim import Adagrad

    ids = torch.randint(table_rows, (1, touched), device="cuda")
    ids[0, ::10] = ids[0, 1::10]

    def build(make: Any) -> PendingPush:
        weight = torch.randn(table_rows, width, device="cuda").requires_grad_()
        optimizer = make([weight], lr=1e-2)
        with torch.sparse.check_sparse_tensor_invariants(False):
            weight.grad = torch.sparse_coo_tensor(
                ids, torch.randn(touched, width, device="cuda"), weight.shape
            )

        def step() -> None:
            with torch.sparse.check_sparse_tensor_invariants(False):
                optimizer.step()

        return step

    table(
        f"Adagrad, {touched:,} rows of {width} in {table_rows:,}",
        {"ours": lambda: build(Adagrad), "torch": lambda: build(torch.optim.Adagrad)},
        least_bytes=20 * touched * width, copy_rate=rate,
    )  # fmt: skip


def norms(count: int, rate: float) -> None:
    """Sums of squares in float64, in the fixed order, against torch's norm."""
    from pushstep.optim.cuda import steps as cuda

    values = torch.randn(count, device="cuda")
    table(
        f"Sum of squares, {count:,} float32",
        {"ours": lambda: lambda: cuda.square_sums([values]), "torch norm": lambda: lambda: values.norm().item()},
        least_bytes=4 * count, copy_rate=rate,
    )  # fmt: skip


def captured() -> bool:
    """Whether replaying a captured step gives the bits of taking it, with a decaying rate and new hyperparameters."""
    from pushstep.optim import Adagrad

    sizes = [5, 1024, 70_001, 0]
    torch.manual_seed(0)
    lr = [torch.tensor(0.1, device="cuda") for _ in range(2)]
    eager, graphed = (Adagrad(parameters(sizes), lr=one, lr_decay=0.1, fused=True) for one in lr)
    pairs = list(zip(eager.param_groups[0]["params"], graphed.param_groups[0]["params"], strict=True))
    with torch.no_grad():
        for a, b in pairs:
            b.copy_(a)
            b.grad.copy_(a.grad)
    graphed.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for _ in range(3):
        graph.replay()
    for one in lr:
        one.fill_(0.01)
    graph.replay()
    lr[0].fill_(0.1)
    for k in range(5):
        lr[0].fill_(0.1 if k < 4 else 0.01)
        eager.step()
    same = all(torch.equal(a, b) for a, b in pairs)
    counted = {int(state["step"]) for state in graphed.state.values()}
    print(
        f"\nCUDA graph: one step, four replays: bits {'equal' if same else 'DIFFER'}, counters at {counted}"
    )
    return same and counted == {5}


def sweep(count: int, rate: float) -> None:
    """Other block sizes than the one chosen."""
    from pushstep.optim.cuda import kernels as cuda_kernels

    chosen = cuda_kernels.BLOCK, cuda_kernels.WARPS
    for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (2048, 16), (4096, 16)):
        cuda_kernels.BLOCK, cuda_kernels.WARPS = block, warps  # type: ignore[misc]  # what is swept
        for rule, least in (("adadelta", 28), ("adagrad", 20)):
            title = f"{rule}, {block} elements per block, {warps} warps"
            table(title, {"ours, one arena": flat(rule, count)}, least_bytes=least * count, copy_rate=rate)
    cuda_kernels.BLOCK, cuda_kernels.WARPS = chosen  # type: ignore[misc]


def main(*, quick: bool = False, sweep_blocks: bool = False) -> None:
    """Run on the first GPU, or say that there is none."""
    if not torch.cuda.is_available():
        print("cuda: no GPU here, nothing measured")
        return
    use_checkout()
    import triton

    name = torch.cuda.get_device_name(0)
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}")
    count = 1 << (24 if quick else 30)
    good = captured()
    rate = copy_rate(count)
    large(count, rate)
    small(1000, 1000)
    rows(rate)
    norms(count, rate)
    if sweep_blocks:
        sweep(count, rate)
    if not good:
        raise SystemExit("a replayed graph did not give the bits of the step that it captured")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="16 M elements instead of 1 G")
    parser.add_argument("--sweep", action="store_true", help="try other block sizes too")
    given = parser.parse_args()
    main(quick=given.quick, sweep_blocks=given.sweep)
