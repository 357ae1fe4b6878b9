"""What finding local edits costs beside the step that it precedes.

A worker over shared memory, where steps are shortest. Both looks of each step are timed where they happen (before the push, and
after the answer), and the step around them; of each the least and the median time, and the share of the medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.client import connect
from pushstep.client.local_edits import LocalEdits
from pushstep.optim import Adagrad
from tests.harness import RunningServer, running_server

from .machine import Others
from .table import table

MODES = ("sample", "check", "upload")
ASKED = 0.01  # of a step, when sampling


def _dense(count: int, elements: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    gradients = [torch.full((elements,), 0.01) for _ in range(count)]
    return [nn.Parameter(torch.randn(elements)) for _ in range(count)], lambda: gradients


def _rows(rows: int, touched: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    def gradients() -> list[Tensor]:
        ids = torch.randint(0, rows, (1, touched))
        return [torch.sparse_coo_tensor(ids, torch.ones(touched, 32), (rows, 32))]

    return [nn.Parameter(torch.randn(rows, 32))], gradients


CASES: dict[str, Callable[[], Any]] = {
    "one of 10 K": lambda: _dense(1, 10_000),
    "12 of 2 K": lambda: _dense(12, 2_000),
    "1000 of 1 K": lambda: _dense(1000, 1_000),
    "4 of 4 M": lambda: _dense(4, 4 << 20),
    "1 K rows of 32 in 2 M": lambda: _rows(2 << 20, 1_000),
    "100 K rows of 32 in 2 M": lambda: _rows(2 << 20, 100_000),
}
QUICK = ("one of 10 K", "12 of 2 K")


class Watch:
    """Times the calls of a method, added up until they are asked for."""

    def __init__(self) -> None:
        self._s = 0.0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, timed."""

        def timed(*arguments: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self._s += time.perf_counter() - begin_s

        return timed

    def take_s(self) -> float:
        """What they took since."""
        taken_s, self._s = self._s, 0.0
        return taken_s


def _measure(
    server: RunningServer, case: str, mode: Any, number: int, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds of each step, and of the looks in it."""
    parameters, gradients = CASES[case]()
    watch, looks, whole = Watch(), [], []
    with closing(connect(server.grpc, model=f"m{number}", worker="w0")) as session:
        remote = session.attach(Adagrad(parameters, lr=0.01), edits=mode)
        edits: LocalEdits = remote._parameters._edits
        edits.look = watch.around(edits.look)  # type: ignore[method-assign]
        edits.settle = watch.around(edits.settle)  # type: ignore[method-assign]
        for _ in range(steps):
            for parameter, gradient in zip(parameters, gradients(), strict=True):
                parameter.grad = gradient
            begin_s = time.perf_counter()
            remote.step()
            whole.append(time.perf_counter() - begin_s)
            looks.append(watch.take_s())
    return whole[3:], looks[3:]


def main(quick: bool = False) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print(f"\n## edits: torch {torch.__version__}, {torch.get_num_threads()} threads")
    others, rows = Others(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--log-level", "error") as server,
    ):
        cases = QUICK if quick else CASES
        for number, (case, mode) in enumerate((case, mode) for case in cases for mode in MODES):
            steps = 10 if quick else 300 if case in QUICK else 60
            whole, looks = _measure(server, case, mode, number, steps)
            share = statistics.median(looks) / statistics.median(whole)
            verdict = "" if mode != "sample" else "yes" if share < ASKED else "**no**"
            rows.append(
                (
                    f"{case}, {mode}",
                    f"{min(whole) * 1e3:.2f}",
                    f"{statistics.median(whole) * 1e3:.2f}",
                    f"{min(looks) * 1e6:.1f}",
                    f"{statistics.median(looks) * 1e6:.1f}",
                    f"{share:.2%}",
                    verdict,
                )
            )
    columns = ("parameters, edits=", "step min ms", "median", "looks min us", "median", "share", "below 1 %")
    table("What looking for local edits costs", columns, rows, others.share())


if __name__ == "__main__":
    main()
