"""Fused steps on the CPU against torch's for-loop, foreach, fused and compiled ones, in one run.

Candidates take turns, so that a noisy neighbour hits all of them; a round measures each once. Before a
measurement nothing runs for a moment: torch's worker threads go on spinning for some milliseconds after an
operation and would take a core from whoever is next. GB/s counts what a step must move at least: each operand read
once, each result written once. `copy` is the memory's own speed, torch's copy_ of the same number of bytes.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from pushstep.optim import Adadelta, Adagrad
from pushstep.optim.ops import norms

PAUSE_S = 0.02
# torch.compile unrolls Adagrad's list: 1000 tensors were not compiled after 100 s.
MOST_COMPILED = 500
Steps = dict[str, Callable[[], object]]

# The tables of the DLRM reference model on Criteo Kaggle, cut as its --max-ind-range does; rows of 16.
CRITEO_ROWS = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
DLRM_LAYERS = ((13, 512, 256, 64, 16), (367, 512, 256, 1))


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of torchvision's resnet50, in its order."""

    def norm(n: int) -> list[tuple[int, ...]]:
        return [(n,), (n,)]

    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *norm(64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), *norm(width), (width, width, 3, 3), *norm(width)]
            shapes += [(4 * width, width, 1, 1), *norm(4 * width)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), *norm(4 * width)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def dlrm_layers() -> list[tuple[int, ...]]:
    """The shapes of the dense layers."""
    sizes = [pair for layers in DLRM_LAYERS for pair in itertools.pairwise(layers)]
    return [shape for inputs, outputs in sizes for shape in ((outputs, inputs), (outputs,))]


def measure(title: str, steps: Steps, *, least_bytes: int, rounds: int) -> None:
    """Print one table; the first candidate is what the others are compared with."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            time.sleep(PAUSE_S)
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    ours = next(iter(times.values()))
    print(
        f"\n### {title}\n\n| | min ms | median ms | GB/s | times ours, min | median |\n|---|--:|--:|--:|--:|--:|"
    )
    for name, taken in times.items():
        least, middle = min(taken), statistics.median(taken)
        print(
            f"| {name} | {least * 1e3:.2f} | {middle * 1e3:.2f} | {least_bytes / least / 1e9:.1f} "
            f"| {least / min(ours):.2f} | {middle / statistics.median(ours):.2f} |",
            flush=True,
        )


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    torch.manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape).to(dtype)
    return made


def dense(
    title: str, shapes: list[tuple[int, ...]], rounds: int, *, dtype: torch.dtype, compiled: bool
) -> None:
    """Adadelta and Adagrad over one list of shapes."""
    elements = sum(torch.Size(s).numel() for s in shapes)
    size = dtype.itemsize
    for ours, theirs, states in ((Adadelta, torch.optim.Adadelta, 2), (Adagrad, torch.optim.Adagrad, 1)):
        steps: Steps = {"pushstep": ours(parameters(shapes, dtype)).step}
        steps["torch foreach"] = theirs(parameters(shapes, dtype), foreach=True).step
        steps["torch for-loop"] = theirs(parameters(shapes, dtype), foreach=False).step
        if theirs is torch.optim.Adagrad:
            steps["torch fused"] = theirs(parameters(shapes, dtype), fused=True).step
        too_long = theirs is torch.optim.Adagrad and len(shapes) > MOST_COMPILED
        if compiled and not too_long:
            steps["torch.compile"] = torch.compile(theirs(parameters(shapes, dtype)).step)
        least = elements * (3 * size + 8 * states)
        if elements >= 1 << 20:
            source, target = torch.zeros(least // 8), torch.zeros(least // 8)
            steps["copy"] = lambda target=target, source=source: target.copy_(source)
        measure(f"{ours.__name__}, {title}", steps, least_bytes=least, rounds=rounds)
        if compiled and too_long:
            print("\ntorch.compile is left out: compiling a step of so many tensors takes more than 100 s.")


def sparse(rows: int, width: int, count: int, rounds: int) -> None:
    """`count` random rows of a table."""

    def table() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(rows, width))
        ids = torch.randint(0, rows, (1, count))
        p.grad = torch.sparse_coo_tensor(ids, torch.randn(count, width), p.shape, check_invariants=True)
        return [p]

    measure(
        f"Adagrad, {count:,} rows of {width} in {rows:,}",
        {
            "pushstep": Adagrad(table()).step,
            "torch": torch.optim.Adagrad(table()).step,
            "pushstep row_wise": Adagrad(table(), row_wise=True).step,
            "pushstep Adadelta": Adadelta(table(), sparse=True).step,
        },
        least_bytes=count * width * 20,
        rounds=rounds,
    )


def dlrm(most_rows: int, batch: int, rounds: int) -> None:
    """Dense layers and sparse tables of one model in one optimizer."""

    def model() -> list[torch.nn.Parameter]:
        made = parameters(dlrm_layers())
        for rows in CRITEO_ROWS:
            p = torch.nn.Parameter(torch.zeros(min(rows, most_rows), 16))
            ids = torch.randint(0, p.shape[0], (1, batch))
            p.grad = torch.sparse_coo_tensor(ids, torch.randn(batch, 16), p.shape, check_invariants=True)
            made.append(p)
        return made

    layers = sum(torch.Size(s).numel() for s in dlrm_layers())
    measure(
        f"Adagrad, DLRM on Criteo: {len(dlrm_layers())} dense tensors, 26 tables, batch {batch}",
        {"pushstep": Adagrad(model()).step, "torch": torch.optim.Adagrad(model()).step},
        least_bytes=20 * (layers + 26 * batch * 16),
        rounds=rounds,
    )


def norm(elements: int, rounds: int) -> None:
    """Sum of squares and finiteness in one read."""
    values = torch.randn(elements)
    steps: Steps = {
        "pushstep square_sum": lambda: norms.square_sum(values),
        "torch vector_norm": lambda: torch.linalg.vector_norm(values),
        "torch isfinite().all()": lambda: torch.isfinite(values).all(),
    }
    measure(f"norm of {elements:,} float32", steps, least_bytes=4 * elements, rounds=rounds)


def main(quick: bool = False) -> None:
    """Print every table."""
    warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)
    size, rounds = (1 << 20, 3) if quick else (64_000_000, 9)
    print(f"\n## optim, CPU: torch {torch.__version__}, {torch.get_num_threads()} threads")
    dense(f"{size:,} float32", [(size,)], rounds, dtype=torch.float32, compiled=True)
    dense(f"{size:,} bfloat16, our states float32", [(size,)], rounds, dtype=torch.bfloat16, compiled=True)
    few = 3 if quick else 21
    dense("1000 tensors of 1000", [(1000,)] * 1000, few, dtype=torch.float32, compiled=not quick)
    dense("ResNet-50", resnet50(), few, dtype=torch.float32, compiled=not quick)
    dense("DLRM's dense layers", dlrm_layers(), few, dtype=torch.float32, compiled=not quick)
    if quick:
        sparse(20_000, 32, 1_000, few)
        dlrm(10_000, 128, few)
    else:
        sparse(2_000_000, 32, 100_000, few)
        dlrm(1_000_000, 2048, few)
    norm(size, rounds)
